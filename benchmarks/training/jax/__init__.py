"""What the benchmarks of training do on JAX: room.py; see `backends`."""
