"""What stands in the tables of the page and of the Markdown alike: rows and numbers in words."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from resformer.study.words import counted, signed, unsigned

Record = dict[str, Any]


def indexed(records: Sequence[Record]) -> dict[tuple[str, int], Any]:
    """By arm and depth; None for what is not there."""
    return defaultdict(lambda: None, {(record["arm"], record["depth"]): record for record in records})


def main_rows(setting: Record) -> Iterator[Record]:
    """For each arm and depth: its cell, and its comparisons with the baseline by the declared and the other endpoint.

    Cells without a finished run are left out: the table of coverage has them.
    """
    cells = indexed(setting["cells"])
    primary = indexed([test for test in setting["comparisons"] if test["primary"]])
    other = indexed([test for test in setting["comparisons"] if not test["primary"]])
    for arm in setting["arms"]:
        for depth in setting["depths"]:
            if cells[arm, depth]["finished"]:
                tests = {"primary": primary.get((arm, depth)), "other": other.get((arm, depth))}
                yield {"arm": arm, "depth": depth, "cell": cells[arm, depth], **tests}


def sentence(test: Record | None) -> str:
    """A comparison in words, with the pairs that are not quite equal."""
    if test is None:
        return "the baseline"
    unequal = f"; {counted(test['unequal'], 'pair')} unequal, see caveats" if test["unequal"] else ""
    return test["sentence"] + unequal


def shown(value: Record | None, sign: bool = False) -> str:
    """An estimate: 0.814 ± 0.021, or 0.814 without an interval; nothing for None."""
    if value is None:
        return ""
    mean = signed(value["mean"]) if sign else unsigned(value["mean"])
    return mean if value["low"] is None else f"{mean} ± {(value['high'] - value['low']) / 2:.3f}"


def aggregate(value: Record | None, sign: bool = False) -> str:
    """0.814 (0.790 to 0.833), or 0.814 without an interval; nothing for None."""
    if value is None:
        return ""

    def words(of: float) -> str:
        return signed(of) if sign else unsigned(of)

    interval = "" if value["low"] is None else f" ({words(value['low'])} to {words(value['high'])})"
    return words(value["value"]) + interval


def failed(rate: Record | None) -> str:
    """1/3 (6 to 79%)"""
    if rate is None:
        return ""
    return f"{rate['failed']}/{rate['n']} ({100 * rate['low']:.0f} to {100 * rate['high']:.0f}%)"


def p_value(test: Record | None) -> str:
    """Of a comparison, adjusted, with its stars."""
    if test is None or test["adjusted"] is None:
        return ""
    p = test["adjusted"]
    return ("< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}") + test["stars"]


def entry(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def cost(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2e}" if value >= 1e9 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
