"""`python -m resformer.testing [FAMILY ...]`: check families, by default all, and say what was checked."""

from __future__ import annotations

import sys
import time
import warnings

from transformers.utils import logging

from resformer.hosts import families
from resformer.testing.families import SAMPLE, check_family, family_checks


def main(names: list[str]) -> int:
    """Print a line for each family; returns how many fail."""
    pairs = failed = 0
    for name in names or list(families()):
        start = time.process_time()
        try:
            left_out = check_family(name)
        except AssertionError as error:
            sys.stdout.write(f"{error}\n")
            failed += 1
            continue
        served = len(SAMPLE) - sum(line.startswith("serves-") for line in left_out)
        points = len(family_checks(name)) - len(left_out)
        pairs += served
        sys.stdout.write(
            f"{name:<24}{points:>4} points of {served} schemes, {len(left_out)} do not apply, "
            f"{time.process_time() - start:.1f} s\n"
        )
    sys.stdout.write(f"{pairs} pairs of family and scheme, {failed} families fail\n")
    return failed


if __name__ == "__main__":
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of what is around: peft on transposed weights
    sys.exit(bool(main(sys.argv[1:])))
