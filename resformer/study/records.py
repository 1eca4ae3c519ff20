"""The parts of a report's document: an estimate, a cell, a comparison, a run as plain dicts."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from resformer.study.comparisons import Comparison, mean_of
from resformer.study.findings import FAILED
from resformer.study.plan import arm
from resformer.study.rates import Grid
from resformer.study.results import Result
from resformer.study.stats import Estimate
from resformer.study.summary import Cell, Setting, outcome

COSTS = {
    "parameters": "parameters",
    "layer_parameters": "in the layers",
    "scheme_parameters": "of the scheme",
    "flops": "FLOPs",
    "seconds": "seconds",
    "examples_per_second": "examples/s",
    "peak_memory_mb": "peak MiB",
}
Record = dict[str, Any]


def row(run: Result, setting: Setting) -> dict[str, Any]:
    """A run as a flat row of results.csv."""
    known = setting.chance.threshold is not None and run.finished
    return {
        "run": run.directory.name,
        "arm": arm(run.config),
        **run.config,
        "status": run.status,
        "learned": outcome(run, setting.chance.threshold) == "learned" if known else None,
        "score": run.score,
        "train_loss": run.train_loss,
        "flags": " ".join(run.flags),
        **{f"metric_{name}": value for name, value in run.metrics.items()},
        "token_cosine": run.diagnostics.get("token_cosine"),
        **{name: run.cost.get(name) for name in COSTS if name != "layer_parameters"},
        "git": run.provenance.get("git"),
        "error": run.error or run.problem,
    }


def cell_record(cell: Cell, outside: int | None) -> Record:
    """Of a cell in whose nets so many parameters are outside of the layers."""
    failures = cell.failures
    cosines = [run.diagnostics.get("token_cosine") for run in cell.finished]
    return {
        "arm": cell.arm,
        "depth": cell.depth,
        "state": cell.state,
        "verdict": cell.verdict,
        "planned": len(cell.runs),
        "finished": len(cell.finished),
        "score": estimate_record(cell.estimate("score")),
        "train_loss": estimate_record(cell.estimate("train_loss")),
        "seeds": [
            {
                "seed": run.config["seed"],
                "status": run.status,
                "score": cell.values("score").get(run.config["seed"]),
                "train_loss": cell.values("train_loss").get(run.config["seed"]),
                "token_cosine": run.diagnostics.get("token_cosine"),
            }
            for run in cell.finished
        ],
        "failures": failures and asdict(failures),
        "learning_rates": sorted({r.config["learning_rate"] for r in cell.runs if r.config["learning_rate"]}),
        "token_cosine": [value for value in cosines if value is not None],
        "gradient_norms": _by_layer([run.diagnostics.get("gradient_norms") or [] for run in cell.finished]),
        "cost": _costs(cell, outside) if cell.finished else None,
    }


def _costs(cell: Cell, outside: int | None) -> dict[str, float | None]:
    found = {name: mean_of([cell], name) for name in COSTS}
    if outside is not None and (whole := found["parameters"]) is not None:
        found["layer_parameters"] = whole - outside
    return found


def _by_layer(norms: Sequence[Sequence[float]]) -> list[float]:
    """The median over seeds; empty where they differ in length."""
    known = [own for own in norms if own]
    return [median(layer) for layer in zip(*known, strict=True)] if len({len(own) for own in known}) == 1 else []


def comparison_record(test: Comparison) -> Record:
    own = {name: getattr(test, name) for name in ("arm", "depth", "endpoint", "primary", "p", "adjusted", "unequal")}
    more = {name: getattr(test, name) for name in ("detectable", "stars", "verdict", "sentence")}
    return own | {"gap": estimate_record(test.gap)} | more


def grid_record(grid: Grid) -> Record:
    found, choice = grid.sensitivity, grid.choice
    return {
        "arm": grid.arm,
        "depth": grid.depth,
        "values": {str(rate): value for rate, value in grid.values.items()},
        "diverged": grid.diverged,
        "chosen": choice.rate,
        "edge": choice.edge,
        "complete": choice.complete,
        "best": found and found.best,
        "drop": found and found.drop,
        "at_edge": found and found.at_edge,
    }


def failure_records(cell: Cell) -> Iterator[Record]:
    """Every run that did not learn, by reason. Runs that are merely not finished are not among them."""

    def failure(what: str, detail: str, runs: Sequence[Result]) -> Record:
        named = [{"id": run.directory.name, "traceback": run.traceback} for run in runs]
        return {"arm": cell.arm, "depth": cell.depth, "what": what, "detail": detail, "runs": named}

    for kind in ("chance", "worse"):
        runs = [run for run, ended in zip(cell.finished, cell.outcomes, strict=True) if ended == kind]
        losses = [run.train_loss for run in runs if run.train_loss is not None]
        if losses:
            low, high = f"{min(losses):.3f}", f"{max(losses):.3f}"
            spread = low if low == high else f"{low} to {high}"
            yield failure(FAILED[kind], f"final training loss {spread}", runs)
    for run in cell.runs:
        seed = run.config["seed"]
        if run.status == "diverged":
            last = f"; last step logged {run.loss_curve[-1][0]:.0f}" if run.loss_curve else ""
            yield failure("diverged", f"loss not finite, seed {seed}{last}", [run])
        elif run.status == "failed":
            yield failure("error", f"{run.error} (seed {seed})", [run])
        elif run.problem:
            yield failure("not counted", f"{run.problem} (seed {seed})", [run])


def estimate_record(value: Estimate | None) -> Record | None:
    if value is None:
        return None
    return {"mean": value.mean, "n": value.n, "sd": value.sd, "low": value.low, "high": value.high}
