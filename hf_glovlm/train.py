"""The door for `accelerate launch hf_glovlm/train.py ARGS`, which is `glovlm train ARGS`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder comes first on the path; there `data` or `model` would hide others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from hf_glovlm.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
