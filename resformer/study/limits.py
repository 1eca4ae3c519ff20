"""What the measures of a report cannot tell: scores of few examples, flags of runs, times, first passages."""

import math
from collections.abc import Iterator, Sequence

from resformer.study.findings import title
from resformer.study.speed import target
from resformer.study.summary import Setting
from resformer.study.words import counted, joined
from resformer.train.flags import FLAGS

COUNTED = ("gradient_spikes", "truncated_inputs")  # flags that say something of a run whether or not it learned
UNSTEADY = 1.5  # times as long as another run of its cell took, and the times are not those of the arms alone


def limits(settings: Sequence[Setting]) -> Iterator[str]:
    """The caveats that hold."""
    if few := dict.fromkeys(text for setting in settings if (text := _examples(setting))):
        yield (
            f"Intervals are over seeds, not over the examples that are scored: {joined(few)}. All runs are scored on "
            "the same examples; on others every score would be another."
        )
    for flag in COUNTED:
        counts = [(sum(flag in run.flags for run in s.finished), len(s.finished), title(s)) for s in settings]
        if raised := [f"{n} of {total} runs on {name}" for n, total, name in counts if n]:
            yield f"In {joined(raised)} {FLAGS[flag]} ({flag})."
    ratios = [
        (max(times) / min(times), cell.arm, cell.depth)
        for setting in settings
        for cell in setting.cells.values()
        if len(times := [t for run in cell.finished if run.status == "ok" and (t := run.cost.get("seconds"))]) > 1
    ]
    if ratios and max(ratios)[0] > UNSTEADY:
        ratio, arm, depth = max(ratios)
        wide = sum(one > UNSTEADY for one, *_ in ratios)
        yield (
            f"Runs of one cell took up to {ratio:.1f} times as long as each other ({arm} at depth {depth}), in "
            f"{counted(wide, 'cell')} of {len(ratios)} over {UNSTEADY:g} times: the machine had other work, and "
            "seconds and examples/s do not compare arms; FLOPs do."
        )
    windows = sorted({_window(setting) for setting in settings if target(setting)} - {0})
    if windows:
        yield (
            f"Steps to the target end at the first window of {joined(map(str, windows))} steps whose mean loss is "
            "there: by noise that comes early, and the earlier the noisier the curve."
        )


def _examples(setting: Setting) -> str:
    """So many examples, and the largest standard error that the share of them answered correctly can have."""
    counts = {n for run in setting.finished for n in run.examples.values()}
    if not counts:
        return ""
    n = min(counts)
    error = f" (where an accuracy has a standard error of up to {50 / math.sqrt(n):.1f} points)"
    return f"{n:,} on {setting.task}{'' if setting.chance.loss is None else error}"


def _window(setting: Setting) -> int:
    return round(next((run.loss_curve[0][0] for run in setting.finished if run.loss_curve), 0))
