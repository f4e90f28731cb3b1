"""How per-channel maps move past operations: one row for each."""
