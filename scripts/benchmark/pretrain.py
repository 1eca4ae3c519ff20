"""A step of pre-training: `resformer pretrain` against the loop that people write, batches and masks included."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmark.finetune import MEDIUM
from benchmark.measuring import estimate, interleaved, ratios
from benchmark.steps import machine_rate
from benchmark.stock import mlm_steps
from benchmark.suite import Bench, Goal, Row, Size, Suite, Values
from resformer.data.packing import Packed
from resformer.data.tokenizer import train_tokenizer
from resformer.sizes import encoder_config
from resformer.train.load import start_model
from resformer.train.loop import WINDOW
from resformer.train.plan import plan
from resformer.train.pretrain import pack, pretraining
from resformer.train.settings import Settings
from resformer.train.sitting import Sitting
from resformer.train.start import Start

BATCHES = 32  # of different samples


@dataclass(frozen=True)
class Steps:
    """One side: steps without end, `at_once` of them in what comes next, and what one of them takes."""

    comes: Iterator[Any]
    matmul_precision: str
    flops: float
    saved_mib: float
    parameters: int

    def take(self) -> None:
        torch.set_float32_matmul_precision(self.matmul_precision)
        next(self.comes)


def words(size: Size, folder: Path) -> tuple[PreTrainedTokenizerBase, Packed]:
    """Text of random words, a tokenizer with an entry for each, and the samples."""
    numbers = np.random.default_rng(0)
    known = np.array([f"w{i}" for i in range(size.vocabulary - 5)])  # beside the special tokens
    tokenizer = train_tokenizer([" ".join(known)], max_length=size.length)
    texts = numbers.choice(known, (size.batch * (BATCHES + 1), size.length))
    (folder / "text.txt").write_text("\n\n".join(map(" ".join, texts)))
    return tokenizer, pack([str(folder / "text.txt")], tokenizer, size.length, "mlm", shards=folder / "shards")


def measure(row: Row, bench: Bench) -> Values:
    settings = Settings(steps=10**6, batch_size=bench.size.batch, learning_rate=1e-4, **row.given)
    at_once = 1 if bench.device.type == "cpu" else WINDOW  # steps between looks at a GPU, as in training
    bench.tell("text")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tokenizer, packed = words(bench.size, folder)
        ours = _ours(tokenizer, packed, settings, folder, at_once, bench, stack)
        theirs = _theirs(tokenizer, packed, settings.precision, at_once, bench)
        values: Values = {"saved": ours.saved_mib / theirs.saved_mib, "FLOP": ours.flops / theirs.flops}
        values |= {"saved MiB": ours.saved_mib, "GFLOP": ours.flops / 1e9, "parameters": ours.parameters}
        if not bench.pairs:
            return values
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        rates = [machine_rate(bench.size, dtype, bench.device)]
        try:
            taken = interleaved({"ours": ours.take, "stock": theirs.take}, bench.pairs, bench.device, bench.tell)
        finally:
            torch.set_float32_matmul_precision("highest")
        rates.append(machine_rate(bench.size, dtype, bench.device))
    rate, tokens = fmean(rates), bench.size.batch * bench.size.length
    return values | {
        "ms": 1000 * median(taken["ours"]) / at_once,
        "speed-up": ratios(taken["stock"], taken["ours"]),
        "tokens/s": estimate([tokens * at_once / seconds for seconds in taken["ours"]]),
        "of rate": estimate([ours.flops * at_once / seconds / rate for seconds in taken["ours"]]),
        "stock of rate": theirs.flops * at_once / median(taken["stock"]) / rate,
        "rate GFLOP/s": rate / 1e9,
    }


def _ours(
    tokenizer: PreTrainedTokenizerBase,
    packed: Packed,
    settings: Settings,
    folder: Path,
    at_once: int,
    bench: Bench,
    stack: ExitStack,
) -> Steps:
    """What `resformer pretrain` does, from the model that it would start from."""
    size = bench.size
    model, _ = start_model(
        Start(depth=size.depth, width=size.width, dropout=size.dropout),
        AutoModelForMaskedLM,
        seed=0,
        length=size.length,
        precision=settings.precision,
        tokenizer=tokenizer,
    )
    job = pretraining(model, tokenizer, packed, settings, held_out=size.batch)
    device = job.accelerator.device
    stack.enter_context(job.around())
    found = plan(
        model.to(device),
        batch=size.batch,
        length=size.length,
        precision=settings.precision,
        loss=lambda called, rows, length: called(**send_to_device(job.heaviest(rows), device)).loss,
    )
    sitting = Sitting(model, job, folder, settings, None, lambda: False)
    comes = sitting.windows(lambda step: None, look=lambda step: step % at_once == 0)
    flops = found.flops_per_token * size.batch * size.length
    return Steps(comes, settings.matmul_precision, flops, found.activations_mib, found.parameters)


def stock_model(size: Size, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(0)
    config = encoder_config(
        "bert", size.depth, size.width, tokenizer=tokenizer, max_length=size.length, dropout=size.dropout
    )
    return AutoModelForMaskedLM.from_config(config)


def _theirs(tokenizer: PreTrainedTokenizerBase, packed: Packed, precision: str, at_once: int, bench: Bench) -> Steps:
    size, model = bench.size, stock_model(bench.size, tokenizer).to(bench.device)

    def loss(model: Any, rows: int, length: int) -> torch.Tensor:
        ids = torch.from_numpy(packed.batch(range(rows))).to(bench.device)
        return model(input_ids=ids, labels=ids).loss

    found = plan(model, batch=size.batch, length=size.length, precision=precision, loss=loss)
    comes = mlm_steps(
        model,
        tokenizer,
        packed.batch(range(len(packed))),
        batch_size=size.batch,
        precision=precision,
        at_once=at_once,
    )
    flops = found.flops_per_token * size.batch * size.length
    return Steps(comes, "highest", flops, found.activations_mib, found.parameters)


SUITE = Suite(
    "pretrain",
    "a step of masked language modelling of BERT as `resformer pretrain` takes it, against a loop with transformers' "
    "model and collator, autocast, and torch's AdamW as they come: seconds of stock over ours for the same tokens. "
    "of rate: share of the rate at which this machine multiplies the matrices of the stock model in this precision",
    ("speed-up", "of rate", "stock of rate", "saved"),
    (
        Row("bf16", (Goal("speed-up", least=1.5), Goal("of rate", least=0.4)), {"precision": "bf16"}),
        Row(
            "fp32",
            (Goal("speed-up", least=1.6),),
            {"precision": "fp32", "matmul_precision": "medium"},
            MEDIUM,
        ),
        Row("fp32 highest", (), {"precision": "fp32"}, "with torch's own matrix-product precision"),
    ),
    measure,
    more=("FLOP", "ms", "tokens/s", "GFLOP", "rate GFLOP/s", "saved MiB", "parameters"),
)
