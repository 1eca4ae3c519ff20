"""What a run of a study takes beyond its training steps."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

from benchmark.measuring import estimate
from benchmark.suite import Bench, Goal, Row, Suite, Values
from resformer.study.execute import execute
from resformer.study.file import read_study


def measure(row: Row, bench: Bench) -> Values:
    """Between the ends of two runs of one worker, less the training of the later; the first run starts the worker."""
    bench.tell("the whole of it")
    with tempfile.TemporaryDirectory() as folder:
        tally = execute(read_study(None, row.given), Path(folder), workers=1)
        if tally.failed:
            raise RuntimeError(f"runs of the study failed: {tally.failed}")
        results = sorted(Path(folder).rglob("result.json"), key=lambda path: path.stat().st_mtime_ns)
        ends = [path.stat().st_mtime for path in results]
        training = [json.loads(path.read_text())["cost"]["seconds"] for path in results]
    beyond = [end - before - steps for (before, end), steps in zip(pairwise(ends), training[1:], strict=True)]
    return {"overhead s": estimate(beyond), "training s": estimate(training[1:])}


SUITE = Suite(
    "study",
    "seconds of a run beyond its training steps: building, patching, checking, evaluating, writing. Runs of one worker "
    "one after the other, the first of them, which starts it, left out",
    ("overhead s", "training s"),
    (
        Row(
            "sentiment, 32 x 32",
            (Goal("overhead s", most=1.5),),
            {
                "schemes": ["pre_ln", "rezero"],
                "depths": [32],
                "tasks": ["sentiment"],
                "seeds": 8,
                "learning_rates": [1e-3],
                "weight_inits": ["xavier"],
                "controls": False,
                "width": 32,
                "heads": 2,
                "ffn_ratio": 2.0,
                "steps": 50,
            },
        ),
    ),
    measure,
)
