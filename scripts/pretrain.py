"""`resformer pretrain` as a file, for `accelerate launch scripts/pretrain.py ...` and plain python."""

import sys

from resformer.cli import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
