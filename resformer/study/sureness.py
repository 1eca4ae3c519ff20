"""How sure the findings are: sentences on seeds, order, the declared tests and the controls."""

from collections.abc import Sequence

from resformer.study.comparisons import Comparison, Ranking, against_controls, ranking
from resformer.study.findings import ENDPOINT, named, title
from resformer.study.stats import FEWEST
from resformer.study.summary import Setting
from resformer.study.words import joined, ranges, verb


def certainty(setting: Setting, endpoint: str) -> list[str]:
    """How sure the headline is: seeds, coverage, and whether the schemes that learn can be ranked."""
    cells = [cell for cell in setting.cells.values() if cell.finished]
    if not cells:
        return [_coverage(setting)]
    few = sum(len(cell.finished) < FEWEST for cell in cells)
    seeds = f"Seeds a cell: {_seed_counts(setting)}."
    if few:
        which = "every cell has" if few == len(cells) else f"{few} of {len(cells)} cells have"
        seeds += f" Exploratory: {which} fewer than {FEWEST} seeds and so no interval."
    return [text for text in (seeds, order(setting, endpoint), _coverage(setting)) if text]


def order(setting: Setting, endpoint: str) -> str:
    """Whether the arms that learn at the deepest depth can be told apart; empty where fewer than two do."""
    found = ranking(setting, endpoint)
    if found is None:
        return ""
    depth, what = setting.deepest, ENDPOINT[endpoint]
    over = f" on the {found.seeds} seeds they share" * found.partial
    every = len(found.among) == len(setting.arms)
    among = "all schemes" if every else named(setting, found.among)
    unresolved = f"The order among {among} at depth {depth} by {what} is not resolved"
    if found.seeds < FEWEST:
        return f"{unresolved} at so few {'shared ' * found.partial}seeds."
    if found.resolved:
        of = "" if every else f" of {named(setting, found.among)}"
        best = named(setting, [found.best])
        is_best = f"{best} scores highest" if endpoint == "score" else f"{best} has the lowest {what}"
        return (
            f"At depth {depth} {is_best}{of}{over}: its paired differences to the others "
            f"exclude zero (Student-t, n = {found.seeds}, {_level(found)})."
        )
    if any(gap.flat for gap in found.gaps):
        return f"{unresolved}{over}: paired differences that are the same at every seed leave no spread to judge by."
    extreme = "highest" if endpoint == "score" else "lowest"
    return (
        f"{unresolved}{over}: the paired interval between the {extreme} mean and at least one other includes zero "
        f"({_level(found)})."
    )


def _level(found: Ranking) -> str:
    return "95%" if found.pairs == 1 else f"95% over all {found.pairs} pairs after Bonferroni"


def against_baseline(comparisons: Sequence[Comparison], settings: Sequence[Setting]) -> str:
    """What the declared tests found, over the whole study; empty without one."""
    tests = [test for test in comparisons if test.primary]
    if not tests or not any(test.gap for test in tests):
        return ""
    baselines = joined(dict.fromkeys(str(settings[test.setting].baseline) for test in tests))
    made = sum(test.p is not None for test in tests)
    few = " at so few seeds" if all(test.gap is None or test.gap.n < FEWEST for test in tests) else ""
    if len(tests) == 1:
        return _the_one(tests[0], settings, few)
    what = f"Of {len(tests)} declared comparisons with {baselines} by {ENDPOINT[tests[0].endpoint]}"
    if not made:
        return f"{what} none can be tested{few or ': no differences spread over seeds'}."
    parts = []
    for verdict in ("better", "worse"):
        by_arm: dict[str, dict[int, list[int]]] = {}
        for test in tests:
            if test.verdict == verdict:
                name = named(settings[test.setting], [test.arm])
                by_arm.setdefault(name, {}).setdefault(test.setting, []).append(test.depth)
        for name, places in by_arm.items():
            at = joined(
                ranges(depths, settings[s].depths) + f" on {title(settings[s])}" * (len(settings) > 1)
                for s, depths in places.items()
            )
            parts.append(f"{name} is {verdict} at {at}")
    excluded = sum(bool(test.gap and test.gap.excludes(0)) for test in tests)
    own = "has an interval of its own" if excluded == 1 else "have intervals of their own"
    alone = f"{excluded} of the {made} that could be tested {own} that {verb('exclude', 'x' * excluded)} zero"
    if not parts:
        return f"{what} none shows a difference after Holm's correction; {alone}."
    others = any(test.verdict is None for test in tests)
    rest = f"; the others show no difference ({alone})" * others
    return f"{what}, after Holm's correction: {'; '.join(parts)}{rest}."


def _the_one(test: Comparison, settings: Sequence[Setting], few: str) -> str:
    setting = settings[test.setting]
    name, base = named(setting, [test.arm]), setting.baseline
    what = f"The one declared comparison, {name} with {base} at depth {test.depth} by {ENDPOINT[test.endpoint]},"
    if test.p is None:
        return f"{what} cannot be tested{few or ': the difference does not spread over seeds'}."
    if test.verdict:
        return f"{what} finds {name} {test.verdict}."
    if test.significant:
        return f"{what} has a small p-value and is given no verdict, see caveats."
    return f"{what} shows no difference."


def controls_overview(settings: Sequence[Setting], endpoint: str) -> str:
    """The same over several settings; empty where no control has finished."""
    found = {title(setting): against_controls(setting, endpoint) for setting in settings}
    known = {name: against for name, against in found.items() if against is not None}
    if not known:
        return ""
    if all(against.seeds < FEWEST for against in known.values()):
        return "There are too few seeds to tell a scheme from the controls."
    beaten = [f"{joined(against.beat)} on {name}" for name, against in known.items() if against.beat]
    controls = "; ".join(dict.fromkeys(control for against in known.values() for control in against.controls))
    sure = f"by paired intervals of {ENDPOINT[endpoint]} at the deepest depth, 95% over all pairs of a setting"
    if not beaten:
        return f"No scheme is shown to beat every control ({controls}) on any setting ({sure})."
    rest = " None does on the others." if len(beaten) < len(known) else ""
    return f"Better than every control ({controls}): {'; '.join(beaten)} ({sure}).{rest}"


def seeds(settings: Sequence[Setting]) -> str:
    """How many seeds the cells of a study have."""
    counts = [len(cell.finished) for setting in settings for cell in setting.cells.values() if cell.runs]
    low, high = min(counts), max(counts)
    missing = [setting for setting in settings if _coverage(setting)]
    partial = f" Not all runs have finished: {joined(map(_share, missing))}." if missing else ""
    return f"Seeds a cell: {low if low == high else f'{low} to {high}'}.{partial}"


def _share(setting: Setting) -> str:
    return f"{len(setting.finished)} of {len(setting.runs)} on {title(setting)}"


def _seed_counts(setting: Setting) -> str:
    by_count: dict[str, list[int]] = {}
    for depth in setting.depths:
        counts = [len(setting.cells[arm, depth].finished) for arm in setting.arms]
        low, high = min(counts), max(counts)
        by_count.setdefault(f"{low}" if low == high else f"{low} to {high}", []).append(depth)
    if len(by_count) == 1:
        return next(iter(by_count))
    return ", ".join(f"{count} at {ranges(depths, setting.depths)}" for count, depths in by_count.items())


def _coverage(setting: Setting) -> str:
    missing = len(setting.runs) - len(setting.finished)
    return f"{len(setting.finished)} of {len(setting.runs)} runs finished." if missing else ""
