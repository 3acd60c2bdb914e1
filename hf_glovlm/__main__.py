"""`python -m hf_glovlm`, which is the command `glovlm`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
