"""`python -m qlora_core`: the command line."""

import sys

from qlora_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
