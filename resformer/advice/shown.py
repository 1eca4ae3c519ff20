"""Advice as people see it: a table in lines of at most 80 characters, and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import StringIO

import matplotlib
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table
from rich.text import Text

from resformer.advice.advise import Advice, Row
from resformer.advice.calibration import Calibration
from resformer.advice.predictors import PREDICTORS
from resformer.palette import GREY, RC, SERIES

SHOWN = {"token_cosine": "token cosine", "update_size": "update size", "gradient_spread": "gradient spread"}
MADE = "`resformer study calibrate STUDY` measures one"
LINE = 0.19  # inches a scheme in the picture


def table(advice: Advice) -> Group:
    """rank | of single seeds, or what is expected | scheme | each predictor ± standard deviation over seeds, and
    below it what the order is worth."""
    orders = advice.calibration is not None and advice.calibration.test.orders
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    if advice.ranked:
        shown.add_column("rank", justify="right", no_wrap=True)
        shown.add_column("range" if orders else "expected", no_wrap=True)
    shown.add_column("scheme", no_wrap=True, max_width=22)
    for title in SHOWN.values():
        shown.add_column(title, no_wrap=True)
    for row in advice.rows:
        place = [str(row.rank), f"{row.best}-{row.worst}" if orders else _expected(row)] if advice.ranked else []
        style = "dim" if row.fails is not None and row.fails > 0.5 else ""
        shown.add_row(*place, row.scheme, *(_value(row, name) for name in SHOWN), style=style)
    settings = advice.settings
    title = (
        f"{settings.family}, {advice.depth} layers of width {settings.width}, weights {advice.weight_init}, task "
        f"{advice.task}, before training; means over {advice.seeds} seed{'s' * (advice.seeds > 1)} ± their deviation"
    )
    meanings = "; ".join(f"{SHOWN[name]}: {meaning}" for name, meaning in PREDICTORS.items())
    return Group(
        Text(title, style="bold"), shown, Text(), *(Text(line) for line in worth(advice)), Text(meanings, style="dim")
    )


def _expected(row: Row) -> str:
    """To fail or to train, or of how many of the nets which."""
    of = len(next(iter(row.values.values())))
    fails = round((row.fails or 0) * of)
    return {0: "trains", of: "fails"}.get(fails, f"{fails} of {of} fail")


def _value(row: Row, name: str) -> str:
    deviation = row.deviation(name)
    return f"{row.mean(name):.3g}" + ("" if deviation is None else f" ±{deviation:.1g}")


def worth(advice: Advice) -> Iterator[str]:
    """What the order is worth, in sentences."""
    if advice.calibration is None:
        yield (
            "Nothing is ranked: there is no calibration that says whether any of these numbers tells how training "
            f"ends; {MADE}."
        )
    else:
        yield from _tested(advice.calibration, advice)
    if advice.refused:
        yield f"Not measured, since they cannot serve here: {', '.join(advice.refused)}."


def _tested(found: Calibration, advice: Advice) -> Iterator[str]:
    rule, test = found.rule, found.test
    name, depths = SHOWN[rule.predictor], " and ".join(map(str, found.chosen_on))
    better = "lower" if rule.worse == "high" else "higher"
    if not test.predicts:
        yield (
            f"Nothing is ranked: {name}, which at depth{'s' * (len(found.chosen_on) > 1)} {depths} went best with the "
            f"final training loss (Kendall's tau {rule.agreement:.2f}), is not shown to tell it at depth {test.depth}."
        )
    elif not advice.ranked:
        tested, here = found.conditions.get("weight_init"), advice.weight_init
        also = f" from {tested} weights, and these are {here}" if tested != here else ""
        yield f"Nothing is ranked: {name} was shown to tell how training ends{also or ', but not which nets fail'}."
    else:
        if not test.orders:
            yield "Equal ranks: these schemes are not told apart, but from those that are expected to fail."
        how = f"{better} first" if test.orders else "as expected to train or to fail"
        yield f"Ranked by {name}, {how}: the rule was chosen on depth{'s' * (len(found.chosen_on) > 1)} " + (
            f"{depths} (Kendall's tau with the final training loss {rule.agreement:.2f})."
        )
    count = f"{len(test.schemes)} schemes on {' and '.join(test.tasks)}"
    yield (
        f"On {count} at depth {test.depth}, not used to choose the rule: tau {test.tau:.2f} (95 % interval "
        f"{test.low:.2f} to {test.high:.2f}, over schemes and {found.seeds} seed{'s' * (found.seeds > 1)}), "
        f"p {_p(test.p)}."
    )
    if test.trained is not None and test.trained_p is not None:
        yield (
            f"Among the schemes that trained there tau {test.trained:.2f}, p {_p(test.trained_p)}: "
            + ("it orders them, too." if test.orders else "which of them train better it is not shown to tell.")
        )
    if test.shallower is not None:
        yield (
            f"For comparison: the training losses at depth {found.chosen_on[-1]} order those at {test.depth} with tau "
            f"{test.shallower:.2f}."
        )
    if test.accuracy is not None and rule.threshold is not None:
        missed, false = test.counts["failed, not foretold"], test.counts["trained, foretold to fail"]
        failed, trained = missed + test.counts["failed, foretold"], false + test.counts["trained, as foretold"]
        beyond = "above" if rule.worse == "high" else "below"
        yield (
            f"A {name} {beyond} {rule.threshold:.4g} foretold {failed - missed} of {failed} failures there, and "
            f"wrongly {false} of {trained} cells that trained."
        )
    yield from _elsewhere(advice)


def _elsewhere(advice: Advice) -> Iterator[str]:
    """Where the advice goes beyond what was tested."""
    assert advice.calibration is not None
    test, of, settings = advice.calibration.test, advice.calibration.conditions, advice.settings
    here = {"family": settings.family, "width": settings.width, "weight_init": advice.weight_init}
    here["ffn_ratio"] = settings.ffn_ratio
    other = [f"{name.replace('_', ' ')} {of[name]}" for name, value in here.items() if name in of and of[name] != value]
    other += [f"depth {test.depth}"] if advice.depth != test.depth else []
    other += [] if advice.task in test.tasks else [f"tasks {' and '.join(test.tasks)}"]
    if other:
        yield f"The test was of {', '.join(other)}; elsewhere, as here, this is an extrapolation."
    if "steps" in of:
        yield f"Training there was {of['steps']} steps at the best learning rate of a grid for each scheme."
    new = [row.scheme for row in advice.rows if row.scheme not in test.schemes]
    if new:
        yield f"{len(advice.rows) - len(new)} of the {len(advice.rows)} schemes were in the test; no other one was."


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "below 0.001"


def picture(advice: Advice) -> str:
    """An <svg> document: a panel for each predictor, a line for each scheme, a dot for each seed and the mean."""
    rows = advice.rows[::-1]
    style = RC | {"svg.hashsalt": "advice", "figure.facecolor": "white", "ytick.labelsize": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11.0, 1.2 + LINE * max(4, len(rows))), layout="constrained")
        panels = figure.subplots(1, len(SHOWN), sharey=True)
        for axes, (name, title) in zip(panels, SHOWN.items(), strict=True):
            for place, row in enumerate(rows):
                seeds = [value for value in row.values[name] if math.isfinite(value)]
                axes.plot(seeds, [place] * len(seeds), "o", color=GREY, markersize=3, alpha=0.6)
                if math.isfinite(row.mean(name)):
                    axes.plot([row.mean(name)], [place], "D", color=SERIES[0], markersize=4.5)
            if name == "update_size":
                axes.set_xscale("log")
            rule = advice.calibration.rule if advice.ranked and advice.calibration else None
            if rule is not None and rule.predictor == name and rule.threshold is not None:
                axes.axvline(rule.threshold, color=SERIES[1], linewidth=1.2)
            axes.set_title(title, loc="left")
        panels[0].set_yticks(range(len(rows)), [row.scheme for row in rows])
        panels[0].set_ylim(-0.7, len(rows) - 0.3)
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
