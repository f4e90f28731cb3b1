#!/usr/bin/env python3
"""The command `mbn-rewrite`, from a checkout and without installation.

    python tools/rewrite_savedmodel.py [FLAGS] IN OUT

See --help, or `mbn_rewrite.cli.flags`.
"""

import os
import sys

# The repository's own package comes first.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mbn_rewrite.cli.main import main

if __name__ == "__main__":
    main()
