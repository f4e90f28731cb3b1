"""Front ends, each of which reads, writes and runs models of one kind. They decide nothing."""
