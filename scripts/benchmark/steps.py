"""Training steps side by side: what all suites of steps have in common."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from statistics import fmean, median

import torch

from benchmark.measuring import interleaved, matrix_rate, products, ratios
from benchmark.nets import Subject, random_batch, stock
from benchmark.suite import Bench, Size, Values
from resformer.train.cost import peak_memory_mb, reset_peak_memory

Make = Callable[[Bench], Subject]
PEAK = "peak MiB"
SHOWN = ("time", "saved", "FLOP", "of rate")
MORE = ("ms", "GFLOP", "rate GFLOP/s", "saved MiB", PEAK, "parameters")


def stock_subject(bench: Bench) -> Subject:
    return Subject(stock(bench.size), bench)


def compare(make: Make, bases: dict[str, Make], bench: Bench) -> Values:
    """The step of `make` against that of each base; what is measured against a base has its name behind it.

    time    ratio of the times of a step, pair by pair, with its interval
    saved   ratio of the bytes that autograd keeps from forward to backward, each storage once, without the weights
    FLOP    ratio of the operations of matrix products
    of rate share of the rate at which this machine multiplies the matrices of the stock model, before and after it
    peak    MiB: of the process in a step while it holds no other model, interpreter and all; on a GPU of its tensors.
            In a process that had other models pieces of them may be among it
    """
    bench.tell("memory")
    one = make(bench)
    values: Values = {PEAK: _peak(one), "parameters": one.plan.parameters, "saved MiB": one.plan.activations_mib}
    values["GFLOP"] = one.flops / 1e9
    others = {name: base(bench) for name, base in bases.items()}
    for name, other in others.items():
        values["saved" + name] = one.plan.activations_mib / other.plan.activations_mib
        values["FLOP" + name] = one.flops / other.flops
    if not bench.pairs:
        return values
    acts = {"one": one.step, **{f"base{name}": other.step for name, other in others.items()}}
    rates = [machine_rate(bench.size, one.dtype, bench.device)]
    taken = interleaved(acts, bench.pairs, bench.device, bench.tell)
    rates.append(machine_rate(bench.size, one.dtype, bench.device))
    for name in others:
        values["time" + name] = ratios(taken["one"], taken[f"base{name}"])
    rate, seconds = fmean(rates), median(taken["one"])
    return values | {"ms": 1000 * seconds, "of rate": one.flops / seconds / rate, "rate GFLOP/s": rate / 1e9}


def machine_rate(size: Size, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second in the matrix products of the stock model."""
    model, batch = stock(size).to(device), random_batch(size, device)
    return matrix_rate(products(model, lambda: model(**batch)), dtype, device)


def _peak(subject: Subject) -> float:
    subject.step()  # makes the optimizer's numbers
    _give_back()
    reset_peak_memory(subject.device)
    subject.step()
    return peak_memory_mb(subject.device)


def _give_back() -> None:
    """What glibc's allocator has kept of what is freed: of building, and of earlier models."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another system
        ctypes.CDLL(None).malloc_trim(0)
