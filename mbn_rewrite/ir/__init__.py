"""The intermediate representation: graphs, per-channel maps and kernels. numpy only."""
