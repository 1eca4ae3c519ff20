"""The sentences of the report, made from the numbers and no surer than they are."""

from collections.abc import Iterable, Sequence
from typing import Any

from resformer.study.results import Result
from resformer.study.stats import FEWEST, estimate
from resformer.study.summary import Setting, learned, outcome, tied

COLLAPSED, APART = 0.9998, 0.995  # token cosines that told failing from learning nets in this project's trials

FAILED = {"chance": "at chance", "worse": "worse than chance", "diverged": "diverged", "failed": "failed"}

INITIALISATIONS = {
    "xavier": "Xavier initialisation",
    "bert": "BERT's N(0, 0.02) initialisation",
    "width_scaled": "width-scaled initialisation",
}


def title(setting: Setting) -> str:
    """What the setting is called: the task, and what sets it apart from the task's other settings."""
    parts = [f"{key.replace('_', ' ')} {number(value)}" for key, value in setting.differs.items()]
    return ", ".join([setting.task, *parts])


def headline(setting: Setting) -> str:
    """The finding in a sentence, conditional on how the runs were made."""
    return f"{where(setting)}: {'; '.join(claims(setting))}."


def where(setting: Setting) -> str:
    """What the finding is conditional on: "At learning rate 1e-3, with Xavier initialisation, ..., on sentiment"."""
    configs = [run.config for run in setting.runs]

    def known(key: str) -> str:
        """The value, all values where depths differ in it, or nothing."""
        return " or ".join(dict.fromkeys(number(config[key]) for config in configs if key in config))

    words = []
    if start := known("weight_init"):
        words.append(INITIALISATIONS.get(start, f"{start} initialisation"))
    if steps := known("steps"):
        warmup = known("warmup")
        after = "" if not warmup else " without warm-up" if warmup == "0" else f" (warm-up {warmup} of them)"
        words.append(f"{steps} steps{after}")
    if width := known("width"):
        words.append(f"a {known('family') or 'BERT'} of width {width}")  # build_encoder makes BERTs
    rate = f"At learning rate {known('learning_rate')}"
    return f"{rate}{', with ' * bool(words)}{joined(words) if words else ''}, on {setting.task}"


def claims(setting: Setting) -> list[str]:
    """Which schemes learn, and to what depth: clauses, best first, true only under `where`."""
    if not setting.finished:
        return ["no run has finished yet"]
    if setting.threshold is None:
        scored = [(c.score.mean, c.scheme) for (_, d), c in setting.cells.items() if d == setting.deepest and c.score]
        if not scored:
            return ["no finished run has a score"]
        (low, worst), (high, best) = min(scored), max(scored)
        return [f"mean scores at depth {setting.deepest} run from {low:.3f} ({worst}) to {high:.3f} ({best})"]
    deepest = setting.deepest
    learn: dict[tuple[int, ...], list[str]] = {}  # the depths measured -> schemes
    partly: dict[int, list[str]] = {}
    fail: dict[tuple[int, int, str], list[str]] = {}
    uneven = []
    for scheme in setting.schemes:
        row = setting.row(scheme)
        if not row:
            continue
        start = setting.fails_from(scheme)
        if setting.learns_to(scheme) == deepest:
            learn.setdefault(tuple(cell.depth for cell in row), []).append(scheme)
        elif setting.learns_to(scheme) == row[-1].depth:
            partly.setdefault(row[-1].depth, []).append(scheme)
        elif start:
            states = {cell.state for cell in row if cell.depth >= start}
            how = states.pop() if len(states) == 1 else "failed"
            fail.setdefault((start, row[-1].depth, how), []).append(scheme)
        else:
            odd = joined(f"{c.learned} of {len(c.finished)} at depth {c.depth}" for c in row if c.state != "learned")
            uneven.append(f"{scheme} learned unevenly ({odd})")

    parts = []
    for depths, names in sorted(learn.items(), key=lambda item: -len(item[0])):
        still = "still " * (len(depths) > 1)
        counts = _learned_counts(setting, names, depths)
        parts.append(f"{joined(names)} {still}{_verb('learn', names)} at depth {deepest} ({counts})")
    if not learn:
        some = any(setting.row(scheme)[-1].learned for scheme in setting.schemes if setting.row(scheme))
        parts.append(f"no scheme learns {'in every run down to' if some else 'at'} depth {deepest}")
    for depth, names in sorted(partly.items(), reverse=True):
        parts.append(f"{joined(names)} {_verb('learn', names)} at depth {depth}, the deepest {_they(names)} finished")
    for (start, end, how), names in sorted(fail.items(), reverse=True):
        be = ("is " if len(names) == 1 else "are ") * (how in ("chance", "worse"))
        until = "on" if end == deepest else f"to {end}"
        since = f"from depth {start} {until}" if start < end else f"at depth {start}"
        limit = f", the deepest {_they(names)} finished" * (end < deepest)
        parts.append(f"{joined(names)} {be}{FAILED[how]} {since}{limit}")
    return [*parts, *uneven]


def overview(settings: Sequence[Setting]) -> str:
    """A study of several settings in a sentence: in how many of them each scheme learns at the greatest depth."""
    comparable = [setting for setting in settings if setting.threshold is not None and setting.finished]
    if not comparable:
        return f"{len(settings)} settings; none has finished runs with a constant guess to compare with."
    by_count: dict[int, list[str]] = {}
    for scheme in dict.fromkeys(scheme for setting in comparable for scheme in setting.schemes):
        count = sum(s.learns_to(scheme) == s.deepest for s in comparable if scheme in s.schemes)
        by_count.setdefault(count, []).append(scheme)
    parts = [
        f"{joined(names)} in {f'{count} of {len(comparable)}' if count else 'none'}"
        for count, names in sorted(by_count.items(), reverse=True)
    ]
    return f"Settings in which a scheme still learns at the greatest depth: {'; '.join(parts)}."


def reach(setting: Setting, scheme: str) -> tuple[str, str]:
    """How far a scheme gets in a setting, and the words under it."""
    row = setting.row(scheme) if scheme in setting.schemes else []
    if not row:
        return "–", "not run"
    if setting.threshold is None:
        score = row[-1].score
        return (f"{score.mean:.3f}" if score else "–"), f"score at depth {row[-1].depth}"
    return str(setting.learns_to(scheme) or "none"), f"of {row[-1].depth}"


def certainty(setting: Setting) -> list[str]:
    """How sure the headline is: seeds, coverage, and whether the schemes that learn can be ranked."""
    cells = [cell for cell in setting.cells.values() if cell.finished]
    if not cells:
        return [_coverage(setting)]
    few = sum(len(cell.finished) < FEWEST for cell in cells)
    seeds = f"Seeds a cell: {_seed_counts(setting)}."
    if few:
        which = "every cell has" if few == len(cells) else f"{few} of {len(cells)} cells have"
        seeds += f" Exploratory: {which} fewer than {FEWEST} seeds and so no interval."
    return [text for text in (seeds, order(setting), _coverage(setting)) if text]


def order(setting: Setting) -> str:
    """Whether the schemes that learn at the deepest depth can be told apart; empty where fewer than two do."""
    depth = setting.deepest
    scored = [c for (_, d), c in setting.cells.items() if d == depth and c.state in ("learned", "scored") and c.scores]
    names = [cell.scheme for cell in scored]
    if len(names) < 2:
        return ""
    # One sample of seeds for the means and for all pairs: otherwise the highest mean can lose every pair.
    shared = sorted(set.intersection(*(set(cell.scores) for cell in scored)))
    partial = any(len(cell.scores) > len(shared) for cell in scored)
    over = f" on the {len(shared)} seeds they share" * partial
    every = len(names) == len(setting.schemes)
    unresolved = f"The order among {'all schemes' if every else joined(names)} at depth {depth} is not resolved"
    if len(shared) < FEWEST:
        return f"{unresolved} at so few {'shared ' * partial}seeds."
    pairs = len(names) * (len(names) - 1) // 2
    level = 1 - 0.05 / pairs  # Bonferroni: the best one is picked after looking at all pairs
    best = max(scored, key=lambda cell: sum(cell.scores[seed] for seed in shared))
    gaps = [
        estimate([best.scores[seed] - other.scores[seed] for seed in shared], level)
        for other in scored
        if other is not best
    ]
    if all(gap.excludes(0) for gap in gaps):
        among = "" if every else f" of {joined(names)}"
        return (
            f"At depth {depth} {best.scheme} scores highest{among}{over}: its paired differences to the others "
            f"exclude zero (Student-t, n = {len(shared)}, 95% over all {pairs} pairs after Bonferroni)."
        )
    if any(gap.flat for gap in gaps):
        return f"{unresolved}{over}: paired differences that are the same at every seed leave no spread to judge by."
    return (
        f"{unresolved}{over}: the paired interval between the highest mean and at least one other includes zero "
        f"(95% over all {pairs} pairs after Bonferroni)."
    )


def collapse(setting: Setting) -> str:
    """How the token cosine at initialisation went with the outcome, in this study's own counts."""
    if setting.threshold is None:
        return ""
    known = [
        (run.diagnostics["token_cosine"], learned(run, setting.threshold))
        for run in setting.finished
        if run.diagnostics.get("token_cosine") is not None
    ]
    if not known:
        return ""
    high = [ok for cosine, ok in known if cosine >= COLLAPSED]
    low = [ok for cosine, ok in known if cosine <= APART]
    between = [ok for cosine, ok in known if APART < cosine < COLLAPSED]
    parts = [
        f"of {_count(len(high), 'run')} with a token cosine of {COLLAPSED} or more at initialisation, "
        f"{high.count(False)} failed to learn",
        f"of {len(low)} with {APART} or less, {low.count(True)} learned",
    ]
    if between:
        parts.append(f"of {len(between)} in between, {between.count(True)} learned")
    return f"Here, {'; '.join(parts)}. The bounds come from earlier trials; this is a correlation, not a cause."


def caveats(settings: Sequence[Setting], runs: Sequence[Result]) -> list[str]:
    """What a reader must know before believing the report; each item is there because the data call for it."""
    finished = [run for run in runs if run.finished]
    if not finished:
        return ["No run has finished: there is nothing to conclude yet."]
    found = []
    cells = [cell for setting in settings for cell in setting.cells.values()]
    counts = [len(cell.finished) for cell in cells if cell.finished]
    if min(counts) < FEWEST:
        few = sum(n < FEWEST for n in counts)
        found.append(
            f"Exploratory: {few} of {len(counts)} cells have fewer than {FEWEST} seeds. These have no interval, and "
            "differences between schemes that learn may be seed noise."
        )
    if max(counts) >= FEWEST:
        found.append("Intervals are 95% Student-t, one cell at a time, not corrected for their number.")
    for key, what in (("learning_rate", "learning rate"), ("weight_init", "weight initialisation"), ("task", "task")):
        values = sorted({str(number(run.config[key])) for run in finished if key in run.config})
        if len(values) == 1:
            found.append(f"One {what} ({values[0]}): with another one the outcome can differ.")
    if any(outcome(run, cell.threshold) == "chance" for cell in cells for run in cell.finished):
        found.append("At chance after a fixed number of steps can mean slow to learn rather than unable to.")
    blind = [r for s in settings for r in s.finished if learned(r, s.threshold) and "at_chance" in r.flags]
    if blind:
        found.append(
            f"{_count(len(blind), 'run')} with a training loss below chance answered the "
            "validation split no better than chance: learned here means the training data."
        )
    diverged = sum(run.status == "diverged" for run in finished)
    if diverged:
        found.append(
            f"{_count(diverged, 'run')} diverged, without a score: mean scores leave such runs out, the counts of "
            "runs that learned do not."
        )
    missing = len(runs) - len(finished)
    if missing:
        found.append(f"{missing} of {len(runs)} planned runs have no result: the picture is partial.")
    for key in dict.fromkeys(key for setting in settings for key in tied(setting.runs)):
        found.append(f"{key} differs between depths: a change with depth can come from it.")
    for key in ("git", "torch", "transformers", "platform"):
        if len({run.provenance.get(key) for run in finished}) > 1:
            found.append(f"The runs were not all made with the same {key} (see provenance).")
    if any(run.provenance.get("dirty") for run in finished):
        found.append("Some runs were made with code changed since the commit that is named.")
    return found


def number(value: Any) -> str:
    """A number as people write it: 1e-3, 0.05, 400. Other values as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value and abs(value) < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def joined(names: Iterable[str]) -> str:
    """a; a and b; a, b and c."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def ranges(depths: Sequence[int], among: Sequence[int]) -> str:
    """Depths in words, neighbours in `among` taken together: "depths 2 to 16 and 48"."""
    spans: list[list[int]] = []
    for depth in depths:
        if spans and among.index(depth) == among.index(spans[-1][-1]) + 1:
            spans[-1].append(depth)
        else:
            spans.append([depth])
    words = [f"{s[0]} to {s[-1]}" if len(s) > 2 else joined(map(str, s)) for s in spans]
    return f"{'depth' if len(depths) == 1 else 'depths'} {joined(words)}"


def _learned_counts(setting: Setting, schemes: Sequence[str], depths: Sequence[int]) -> str:
    """The runs of schemes that learned in all, deepest of `depths` first: "1 of 1 seed; 2 of 2 at depths 2 to 16"."""
    by_seeds: dict[int, list[int]] = {}  # seeds a cell (0: not the same for all) -> depths
    for depth in reversed(depths):
        found = {len(setting.cells[scheme, depth].finished) for scheme in schemes}
        by_seeds.setdefault(found.pop() if len(found) == 1 else 0, []).insert(0, depth)
    words: list[str] = []
    for seeds, counted in by_seeds.items():
        count = f"{seeds} of {seeds}" if seeds else "every seed"
        noun = "" if words or not seeds else " seed" if seeds == 1 else " seeds"
        place = "" if counted == [setting.deepest] else f" at {ranges(counted, setting.depths)}"
        words.append(f"{count}{noun}{place}")
    return "; ".join(words)


def _seed_counts(setting: Setting) -> str:
    by_count: dict[str, list[int]] = {}
    for depth in setting.depths:
        counts = [len(setting.cells[scheme, depth].finished) for scheme in setting.schemes]
        low, high = min(counts), max(counts)
        by_count.setdefault(f"{low}" if low == high else f"{low} to {high}", []).append(depth)
    if len(by_count) == 1:
        return next(iter(by_count))
    return ", ".join(f"{count} at {ranges(depths, setting.depths)}" for count, depths in by_count.items())


def _coverage(setting: Setting) -> str:
    missing = len(setting.runs) - len(setting.finished)
    return f"{len(setting.finished)} of {len(setting.runs)} runs finished." if missing else ""


def _verb(verb: str, names: Sequence[str]) -> str:
    return f"{verb}s" if len(names) == 1 else verb


def _they(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "they"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
