"""How sure the findings are: sentences on seeds, order, the declared tests and the controls."""

from collections.abc import Callable, Mapping, Sequence

from resformer.study.comparisons import AgainstControls, Comparison, Ranking, against_controls, ranking
from resformer.study.findings import ENDPOINT, named, title
from resformer.study.stats import FEWEST, comparison
from resformer.study.summary import Setting
from resformer.study.words import joined, ranges, verb


def certainty(setting: Setting, endpoint: str) -> list[str]:
    """How sure the headline is: seeds, coverage, and whether the schemes above chance can be ranked."""
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
    few = " at so few seeds" if all(test.gap is None or test.gap.n < FEWEST for test in tests) else ""
    if len(tests) == 1:
        return _the_one(tests[0], settings, few)
    what = f"Of {len(tests)} declared comparisons with {baselines} by {ENDPOINT[tests[0].endpoint]}"
    if all(test.p is None for test in tests):
        return f"{what} none can be tested{few or ': no differences spread over seeds'}."
    decided = [test for test in tests if test.verdict]
    unjudged = [test for test in tests if test.withheld and not test.verdict]
    rest = [test for test in tests if not test.verdict and not test.withheld]
    many = f"{len(decided)} find" if len(decided) > 1 else f"{len(decided) or 'none'} finds"
    words = [f"{what} {many} a difference after Holm's correction"]
    words[0] += f": {_places(decided, settings, lambda test: f'is {test.verdict}')}." if decided else "."
    if unjudged:
        small = sum(test.significant for test in unjudged)
        of = ("it" if small == 1 else "all") if small == len(unjudged) else f"{small} of them"
        low = f", though {of} {'has' if small == 1 else 'have'} an adjusted p-value below 0.05" * bool(small)
        no = f"{len(unjudged)} {'is' if len(unjudged) == 1 else 'are'} given no verdict{low}"
        words.append(f"{no}: {_places(unjudged, settings, lambda test: f'({test.reason})')}.")
    if rest:
        tested = [test for test in rest if test.p is not None]
        excluded = sum(bool(test.gap and test.gap.excludes(0)) for test in tested)
        own = "has an interval of its own" if excluded == 1 else "have intervals of their own"
        alone = f"; {excluded} of them {own} that {verb('exclude', 'x' * excluded)} zero" * bool(excluded)
        other = "other " * (len(rest) < len(tests))
        words += [f"In the {other}{len(tested)} that could be tested no difference is detected{alone}."] * bool(tested)
        if untested := len(rest) - len(tested):
            words.append(f"{untested} cannot be tested: too few pairs, or differences without spread.")
    return " ".join(words)


def _places(tests: Sequence[Comparison], settings: Sequence[Setting], said: Callable[[Comparison], str]) -> str:
    """Tests by arm and by what is said of each: "rezero is better at depths 6 to 24 on sst2 and depth 24 on mnli"."""
    found: dict[str, dict[int, list[int]]] = {}
    for test in tests:
        name = f"{named(settings[test.setting], [test.arm])} {said(test)}"
        found.setdefault(name, {}).setdefault(test.setting, []).append(test.depth)
    parts = []
    for name, places in found.items():
        at = [
            ranges(depths, settings[s].depths) + f" on {title(settings[s])}" * (len(settings) > 1)
            for s, depths in places.items()
        ]
        parts.append(f"{name} at {joined(at)}")
    return "; ".join(parts)


def _the_one(test: Comparison, settings: Sequence[Setting], few: str) -> str:
    setting = settings[test.setting]
    name, base = named(setting, [test.arm]), setting.baseline
    what = f"The one declared comparison, {name} with {base} at depth {test.depth} by {ENDPOINT[test.endpoint]},"
    if test.p is None:
        return f"{what} cannot be tested{few or ': the difference does not spread over seeds'}."
    if test.verdict:
        return f"{what} finds {name} {test.verdict}."
    if test.significant:
        return f"{what} has a small p-value and is given no verdict: {name}, {test.reason}."
    return f"{what} detects none."


def controls_overview(settings: Sequence[Setting], endpoint: str) -> list[str]:
    """Over several settings whether a scheme is better than the controls, and whether a control is than schemes; empty
    where no control has finished."""
    found = {title(setting): against_controls(setting, endpoint) for setting in settings}
    known = {name: against for name, against in found.items() if against is not None}
    if not known:
        return []
    if all(against.seeds < FEWEST for against in known.values()):
        return ["There are too few seeds to tell a scheme from the controls."]
    beaten = [f"{joined(against.beat)} on {name}" for name, against in known.items() if against.beat]
    controls = "; ".join(dict.fromkeys(control for against in known.values() for control in against.controls))
    sure = f"by paired intervals of {ENDPOINT[endpoint]} at the deepest depth, 95% over all pairs of a setting"
    if beaten:
        rest = " None does on the others." if len(beaten) < len(known) else ""
        words = f"Better than every control ({controls}): {'; '.join(beaten)} ({sure}).{rest}"
    else:
        words = f"No scheme is shown to beat every control ({controls}) on any setting ({sure})."
    return [text for text in (words, _best_pairs(known), _controls_ahead(known)) if text]


def _best_pairs(known: Mapping[str, AgainstControls]) -> str:
    """The difference of the best scheme and the best control, by setting, with what could be detected."""
    parts = []
    for name, against in known.items():
        if best := against.best():
            scheme, control, gap = best
            parts.append(f"{scheme} minus {control} on {name}: {comparison(gap)}")
    return f"Best scheme minus best control: {'; '.join(parts)}." if parts else ""


def _controls_ahead(known: Mapping[str, AgainstControls]) -> str:
    """How many schemes each control is ahead of, by setting."""
    parts = []
    for control in dict.fromkeys(control for against in known.values() for control in against.controls):
        counts = []
        for name, against in known.items():
            if control in against.controls and against.schemes:
                behind, shown = (len(against.behind(control, only)) for only in (False, True))
                counts.append(f"{behind} of {len(against.schemes)} [{shown}] on {name}")
        if counts:
            parts.append(f"of {control} {joined(counts)}")
    above = " above chance" * any(against.some_failed for against in known.values())
    which = f"Schemes{above} with a worse mean than that of a control [with an interval that excludes zero]"
    return f"{which}: {'; '.join(parts)}." if parts else ""


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
