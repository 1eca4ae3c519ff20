"""What one waits for before anything happens, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmark.measuring import estimate
from benchmark.suite import Bench, Goal, Row, Suite, Values

IMPORT = """
import time
start = time.perf_counter()
import resformer
print(time.perf_counter() - start)
"""
PATCH = """
import time
from transformers import AutoModel, BertConfig
from resformer import patch
model = AutoModel.from_config(BertConfig({sizes}))
start = time.perf_counter()
patch(model, "rezero", verify=False)
print(time.perf_counter() - start)
"""
LARGE = "hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096"


def measure(row: Row, bench: Bench) -> Values:
    """Milliseconds: those that the process prints, or all of it if it prints none."""
    arguments, prints = row.given
    taken = []
    for number in range(bench.pairs):
        bench.tell(f"{number + 1} of {bench.pairs}")
        start = time.perf_counter()
        said = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout
        taken.append(1000 * (float(said) if prints else time.perf_counter() - start))
    return {"ms": estimate(taken)} if taken else {}


SUITE = Suite(
    "startup",
    "milliseconds in fresh processes whose files were read before",
    ("ms",),
    (
        Row("import resformer", (Goal("ms", most=50),), (("-c", IMPORT), True)),
        Row(
            "resformer --help",
            (Goal("ms", most=300),),
            (("-m", "resformer.cli", "--help"), False),
            "interpreter and all",
        ),
        Row(
            "patch",
            (Goal("ms", most=50),),
            (("-c", PATCH.format(sizes=LARGE)), True),
            'patch(model, "rezero", verify=False) of a BERT-large of 24 layers, without the imports',
        ),
    ),
    measure,
)
