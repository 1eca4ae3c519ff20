"""`resformer compare`, for plain python."""

import sys

from resformer.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
