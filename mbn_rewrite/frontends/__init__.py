"""Front ends: what reads, writes and runs models of one kind. They decide nothing."""
