"""One epoch of fine-tuning a real encoder: `resformer finetune` against the loop of transformers' GLUE script."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from transformers import AutoModelForSequenceClassification

from benchmark.measuring import ratios
from benchmark.stock import glue_epoch
from benchmark.suite import Bench, Goal, Row, Suite, Values
from resformer.data.glue import load_task
from resformer.data.metrics import evaluate, score
from resformer.data.tasks import TASKS
from resformer.train.finetune import finetune
from resformer.train.load import start_model
from resformer.train.settings import Settings
from resformer.train.start import Start

ROWS = {"mrpc": None, "sst2": 5000}  # of the training split, the first ones; None: all
OURS = {  # how `resformer finetune` is asked for speed on a CPU
    "bf16": {"precision": "bf16"},
    "fp32": {"matmul_precision": "medium"},
}
SHARED: dict[str, Any] = {"epochs": 1.0, "batch_size": 32, "learning_rate": 5e-5}
MAX_LENGTH = 128
SMALL = 1e-9  # for the error of seeds that all differ by the same


def measure(row: Row, bench: Bench) -> Values:
    """Each seed trains stock and ours one after the other, from the same head, and each such run is kept by itself.

    A row of more seeds stays one. Raises `ValueError` if the record's runs are of another encoder, or other data.
    """
    task, side = row.given
    before = bench.record.row("finetune", row.name)
    seeds = max(bench.seeds, before["values"]["speed-up"]["n"] if before else 0)
    given = {"encoder": _weights(bench.model), "data": _examples(_data(task, bench))}
    runs: dict[str, list[dict[str, float]]] = {"stock": [], **{name: [] for name in OURS}}
    for seed in range(seeds):
        for name in list(runs)[:: -1 if seed % 2 else 1]:
            bench.tell(f"{task}, seed {seed}, {name}")
            found = bench.record.part(
                "finetune",
                f"{task} {seed} {name}",
                lambda n=name, s=seed: _run(task, n, s, bench) | given,
            )
            for what, value in given.items():
                if found.get(what) != value:
                    raise ValueError(f"{bench.record.path} has runs of another {what} than given; give another file")
            runs[name].append(found)
    stock, ours = runs["stock"], runs[side]
    gaps = [a["score"] - b["score"] for a, b in zip(ours, stock, strict=True)]
    error = float(np.std(gaps, ddof=1) / len(gaps) ** 0.5) if len(gaps) > 1 else float("nan")
    gap = fmean(gaps)
    return {
        "speed-up": ratios([one["seconds"] for one in stock], [one["seconds"] for one in ours]),
        "CPU speed-up": ratios(_cpu(stock), _cpu(ours)),
        "stock s": median(one["seconds"] for one in stock),
        "s": median(one["seconds"] for one in ours),
        "stock score": fmean(one["score"] for one in stock),
        "gap": gap,
        "error": error,
        "gap/error": gap / max(error, SMALL),
        "least busy": min(one["busy"] for one in (*stock, *ours)),
        "verdict": _verdict(gap, error),
    }


def _weights(folder: Path | None) -> str:
    """What tells one encoder from another: the first digits of the sum of its files of weights."""
    assert folder is not None
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _examples(data: DatasetDict) -> str:
    """What tells data from other data."""
    return hashlib.sha256(repr({name: split.to_dict() for name, split in data.items()}).encode()).hexdigest()[:12]


def _cpu(runs: list[dict[str, float]]) -> list[float]:
    return [one["seconds"] * one["busy"] for one in runs]


def _verdict(gap: float, error: float) -> str:
    if math.isnan(error):
        return "one seed"
    return "within the error" if abs(gap) <= error else "better" if gap > 0 else "worse"


def _run(name: str, side: str, seed: int, bench: Bench) -> dict[str, float]:
    task, data = TASKS[name], _data(name, bench)
    settings = Settings(**SHARED, seed=seed, **OURS.get(side, {}))
    model, tokenizer = start_model(
        Start(model=str(bench.model)),
        AutoModelForSequenceClassification,
        seed=seed,
        length=MAX_LENGTH,
        precision=settings.precision,
        task=task,
    )
    wall, busy = time.perf_counter(), time.process_time()
    if side == "stock":
        seconds, answers = glue_epoch(model, tokenizer, task, data, seed=seed, max_length=MAX_LENGTH)
        reached = score(task, evaluate(task, answers, data[task.splits[0]]["label"]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            to, given = Path(folder) / "run", {"max_length": MAX_LENGTH, "save_model": False, "progress": False}
            result = finetune(model, tokenizer, task, data, to, settings, **given)
        if result["status"] != "ok":
            raise SystemExit(f"the run of {name}, seed {seed}, {side}, ended {result['status']}; it is not kept")
        seconds, reached = result["cost"]["seconds"], result["score"]
        torch.set_float32_matmul_precision("highest")
    busy = (time.process_time() - busy) / (time.perf_counter() - wall)
    return {"seconds": seconds, "score": reached, "busy": busy}


def _data(name: str, bench: Bench) -> DatasetDict:
    data = load_task(name, bench.data)
    rows = min(bench.rows or len(data["train"]), ROWS[name] or len(data["train"]), len(data["train"]))
    return DatasetDict({**data, "train": data["train"].select(range(rows))})


MEDIUM = "--matmul-precision medium: on some processors and GPUs it may round to bf16 or tf32"
SCORE = Goal("gap/error", least=-1.0)
SUITE = Suite(
    "finetune",
    "one epoch of a pretrained encoder, batches of 32, lr 5e-5: seconds of the loop of transformers' "
    "run_glue_no_trainer.py in fp32 over those of `resformer finetune`, a pair a seed; sst2: its first 5,000 rows. "
    "gap: difference of the mean scores on the dev split (mrpc: mean of accuracy and F1); its standard error is paired "
    "by seed. least busy: CPU "
    "seconds over wall clock, below the number of threads where others took the cores; CPU speed-up: ratio of these",
    ("speed-up", "stock score", "gap", "gap/error"),
    (
        Row("mrpc bf16", (Goal("speed-up", least=4.0), SCORE), ("mrpc", "bf16")),
        Row("mrpc fp32", (Goal("speed-up", least=2.0), SCORE), ("mrpc", "fp32"), MEDIUM),
        Row("sst2 bf16", (Goal("speed-up", least=5.0), SCORE), ("sst2", "bf16")),
        Row("sst2 fp32", (Goal("speed-up", least=2.0), SCORE), ("sst2", "fp32"), MEDIUM),
    ),
    measure,
    more=("stock s", "s", "CPU speed-up", "error", "verdict", "least busy"),
    piecemeal=True,
    needs=("model", "data"),
)
