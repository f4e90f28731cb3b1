"""Training layers with statistics of a sample."""
