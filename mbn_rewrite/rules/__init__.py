"""Rules for moving per-channel maps past operations: one row for each."""
