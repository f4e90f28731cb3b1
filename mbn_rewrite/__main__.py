"""`python -m mbn_rewrite`, the same as the command `mbn-rewrite`."""

from mbn_rewrite.cli.main import main

if __name__ == "__main__":
    main()
