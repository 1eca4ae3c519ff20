"""`resformer finetune` as a file, for `accelerate launch scripts/finetune.py ...` and plain python."""

import sys

from resformer.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
