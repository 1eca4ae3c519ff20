"""The sentences of the report, made from the numbers and no surer than they are."""

from collections.abc import Sequence
from pathlib import Path

from resformer.study.chance import NEAR
from resformer.study.comparisons import AgainstControls, against_controls
from resformer.study.stats import FEWEST, comparison
from resformer.study.summary import FAR, Setting, outcome
from resformer.study.words import counted, joined, number, ranges, they, verb

COLLAPSED, APART = 0.9998, 0.995  # token cosines that told failing from learning nets in this project's trials

FAILED = {"chance": "at chance", "worse": "worse than chance", "diverged": "diverged", "failed": "failed"}
ENDPOINT = {"score": "score", "train_loss": "training loss at the end"}
BETTER = {"score": "higher", "train_loss": "lower"}
INITIALISATIONS = {
    "xavier": "Xavier initialisation",
    "bert": "BERT's N(0, 0.02) initialisation",
    "width_scaled": "width-scaled initialisation",
}


def title(setting: Setting) -> str:
    """What the setting is called: the task, and what sets it apart from the task's other settings."""
    return ", ".join([setting.task, *apart(setting)])


def apart(setting: Setting) -> list[str]:
    """What sets a setting apart from the others of its task, in words; what does not apply to it is left out."""
    found = {key: number(value) for key, value in setting.differs.items() if value is not None}
    if "model" in found:
        found["model"] = f"{Path(setting.runs[0].config['model']).name} ({found['model']})"
    fresh = ["fresh weights"] * ("model" in setting.differs and "model" not in found)
    return fresh + [f"{key.replace('_', ' ')} {value}" for key, value in found.items()]


def named(setting: Setting, arms: Sequence[str]) -> str:
    """Arms in words, each control called one."""
    return joined(f"{arm} (control)" if arm in setting.controls else arm for arm in arms)


def where(setting: Setting) -> str:
    """What the finding is conditional on: "At learning rate 1e-3, with Xavier initialisation, ..., on sentiment"."""
    configs = [run.config for run in setting.runs]

    def known(key: str) -> str:
        """The value, all values where depths differ in it, or nothing."""
        return " or ".join(dict.fromkeys(number(c[key]) for c in configs if c.get(key) is not None))

    words = []
    if start := known("weight_init"):
        words.append(INITIALISATIONS.get(start, f"{start} initialisation"))
    length = f"{known('steps')} steps" if known("steps") else f"{known('epochs')} epochs" * bool(known("epochs"))
    if length:
        warmup = known("warmup")
        after = "" if not warmup else " without warm-up" if warmup == "0" else f" (warm-up {warmup} of them)"
        words.append(length + after)
    if known("encoder"):
        words.append(f"a net of width {known('width')} ({known('family') or 'bert'}) pre-trained for each cell")
    elif model := known("model"):
        words.append(f"the patched checkpoint {model}")
    elif width := known("width"):
        matched = f" with the parameters of {known('match_parameters')}" * bool(known("match_parameters"))
        words.append(f"a net of width {width} ({known('family') or 'bert'}){matched}")
    rates = sorted({c["learning_rate"] for c in configs if c.get("learning_rate")})
    rate = f"At learning rate {number(rates[0])}" if rates else "At learning rates that are not chosen yet"
    if len(rates) > 1:
        rate = f"At the learning rate of each cell ({number(rates[0])} to {number(rates[-1])})"
    return f"{rate}{', with ' * bool(words)}{joined(words) if words else ''}, on {setting.task}"


def claims(setting: Setting, endpoint: str) -> list[str]:
    """Which schemes learn, to what depth, and whether they beat the controls: clauses, best first, true only under
    `where`."""
    if not setting.finished:
        return ["no run has finished yet"]
    found = _reaching(setting) if setting.chance.threshold is not None else _scoring(setting)
    return [*found, *controls_claims(setting, endpoint)]


def _scoring(setting: Setting) -> list[str]:
    """Where no constant guess says what learning is."""
    at = [(setting.cells[arm, setting.deepest].estimate("score"), arm) for arm in setting.arms]
    scored = [(score.mean, arm) for score, arm in at if score]
    if not scored:
        return ["no finished run has a score"]
    (low, worst), (high, best) = min(scored), max(scored)
    at_best, at_worst = named(setting, [best]), named(setting, [worst])
    return [f"mean scores at depth {setting.deepest} run from {low:.3f} ({at_worst}) to {high:.3f} ({at_best})"]


def _reaching(setting: Setting) -> list[str]:
    deepest = setting.deepest
    learn: dict[tuple[int, ...], list[str]] = {}  # the depths measured -> arms
    partly: dict[int, list[str]] = {}
    fail: dict[tuple[int, int, str], list[str]] = {}
    uneven = []
    for arm in setting.arms:
        row = setting.row(arm)
        if not row:
            continue
        start = setting.fails_from(arm)
        if setting.learns_to(arm) == deepest:
            learn.setdefault(tuple(cell.depth for cell in row), []).append(arm)
        elif setting.learns_to(arm) == row[-1].depth:
            partly.setdefault(row[-1].depth, []).append(arm)
        elif start:
            states = {cell.state for cell in row if cell.depth >= start}
            how = states.pop() if len(states) == 1 else "failed"
            fail.setdefault((start, row[-1].depth, how), []).append(arm)
        else:
            odd = joined(f"{c.learned} of {len(c.finished)} at depth {c.depth}" for c in row if c.state != "learned")
            uneven.append(f"{named(setting, [arm])} trains above chance in part of its runs ({odd})")

    parts = []
    for depths, names in sorted(learn.items(), key=lambda item: -len(item[0])):
        still = "still " * (len(depths) > 1)
        counts = _learned_counts(setting, names, depths)
        parts.append(
            f"{named(setting, names)} {still}{verb('train', names)} above chance at depth {deepest} "
            f"({counts}; {_mean_losses(setting, names)})"
        )
    if not learn:
        some = any(setting.row(arm)[-1].learned for arm in setting.arms if setting.row(arm))
        parts.append(f"no scheme trains above chance {'in every run down to' if some else 'at'} depth {deepest}")
    for depth, names in sorted(partly.items(), reverse=True):
        parts.append(
            f"{named(setting, names)} {verb('train', names)} above chance at depth {depth}, the deepest "
            f"{they(names)} finished"
        )
    for (start, end, how), names in sorted(fail.items(), reverse=True):
        be = ("is " if len(names) == 1 else "are ") * (how in ("chance", "worse"))
        until = "on" if end == deepest else f"to {end}"
        since = f"from depth {start} {until}" if start < end else f"at depth {start}"
        limit = f", the deepest {they(names)} finished" * (end < deepest)
        parts.append(f"{named(setting, names)} {be}{FAILED[how]} {since}{limit}")
    return [*parts, *uneven]


def _mean_losses(setting: Setting, arms: Sequence[str]) -> str:
    """What arms that are above chance at the deepest depth come to there, beside the constant guess."""
    means = [e.mean for arm in arms if (e := setting.cells[arm, setting.deepest].estimate("train_loss"))]
    low, high = f"{min(means):.3f}", f"{max(means):.3f}"
    values = low if low == high else f"{low} to {high}"
    return f"mean training loss there {values}, constant guess {setting.chance.loss or 0:.3f}"


def controls_claims(setting: Setting, endpoint: str) -> list[str]:
    """Whether a scheme is better than the negative controls, and a control than schemes; empty where none finished."""
    found = against_controls(setting, endpoint)
    if found is None:
        return []
    controls, at = f"({'; '.join(found.controls)})", f"at depth {found.depth}"
    several = len(found.controls) > 1
    if found.seeds < FEWEST:
        return [f"{at} there are too few seeds to tell a scheme from the control{'s' * several} {controls}"]
    sure = f"paired intervals of {ENDPOINT[endpoint]}, 95% over all {found.pairs} pairs"
    if not found.beat:
        every = "every control" if several else "the control"
        parts = [f"no scheme is shown to beat {every} {controls} {at} ({sure})"]
    else:
        all_of = {1: "the control", 2: "both controls"}.get(len(found.controls), "all controls")
        parts = [f"{joined(found.beat)} {verb('beat', found.beat)} {all_of} {controls} {at} ({sure})"]
    for control in found.controls:
        if behind := found.behind(control):
            rest = [scheme for scheme in found.schemes if scheme not in behind]
            which = f" (all but {joined(rest)})" if 0 < len(rest) < len(behind) else f" ({joined(behind)})" * bool(rest)
            sure_of = found.behind(control, shown=True)
            shown = f"shown by these intervals for {joined(sure_of or ['none'])}"
            parts.append(
                f"the control {control} has a {BETTER[endpoint]} mean {ENDPOINT[endpoint]} than {len(behind)} of "
                f"{among(found)}{which}, {shown}"
            )
    if best := found.best():
        scheme, control, gap = best
        parts.append(f"the best scheme there minus the best control, {scheme} minus {control}: {comparison(gap)}")
    return parts


def among(found: AgainstControls) -> str:
    """The schemes that controls are held against: all, or those that are above chance."""
    return f"{counted(len(found.schemes), 'scheme')}{' above chance' * found.some_failed}"


def overview(settings: Sequence[Setting]) -> str:
    """A study of several settings in a sentence: in how many of them each scheme learns at the greatest depth."""
    comparable = [s for s in settings if s.chance.threshold is not None and s.finished]
    if not comparable:
        return f"{len(settings)} settings; none has finished runs with a constant guess to compare with."
    by_count: dict[tuple[int, int], list[str]] = {}  # settings in which it learns there, and in which it ran there
    for arm in dict.fromkeys(arm for setting in comparable for arm in setting.arms):
        ran = [s for s in comparable if arm in s.arms and s.cells[arm, s.deepest].finished]
        count = sum(s.learns_to(arm) == s.deepest for s in ran)
        control = any(arm in setting.controls for setting in comparable)
        by_count.setdefault((count, len(ran)), []).append(f"{arm} (control)" if control else arm)

    def order(item: tuple[tuple[int, int], list[str]]) -> tuple[float, int]:
        (count, ran), _ = item
        return -count / ran if ran else 1.0, -ran

    parts = [
        f"{joined(names)} " + (f"in {count or 'none'} of {ran}" if ran else "not run there")
        for (count, ran), names in sorted(by_count.items(), key=order)
    ]
    depths = {setting.deepest for setting in comparable}
    at = (
        f"depth {depths.pop()}"
        if len(depths) == 1
        else f"their greatest depth ({' or '.join(map(str, sorted(depths)))})"
    )
    of = ", of those in which it ran there" * (len({ran for _, ran in by_count}) > 1)
    above = f"(final training loss below {NEAR:.0%} of a constant guess's)"
    return f"Settings in which a scheme still trains above chance {above} at {at}{of}: {'; '.join(parts)}."


def reach(setting: Setting, arm: str) -> tuple[str, str]:
    """How far an arm gets in a setting, and the words under it."""
    row = setting.row(arm) if arm in setting.arms else []
    if not row:
        return "–", "not run"
    if setting.chance.threshold is None:
        score = row[-1].estimate("score")
        return (f"{score.mean:.3f}" if score else "–"), f"score at depth {row[-1].depth}"
    return str(setting.learns_to(arm) or "none"), f"of {row[-1].depth}"


def collapse(setting: Setting) -> str:
    """How the token cosine at initialisation went with the outcome, in this study's own counts."""
    threshold = setting.chance.threshold
    if threshold is None:
        return ""
    known = [
        (run.diagnostics["token_cosine"], outcome(run, threshold) == "learned")
        for run in setting.finished
        if run.diagnostics.get("token_cosine") is not None
    ]
    if not known:
        return ""
    high = [ok for cosine, ok in known if cosine >= COLLAPSED]
    low = [ok for cosine, ok in known if cosine <= APART]
    between = [ok for cosine, ok in known if APART < cosine < COLLAPSED]
    groups = (
        (high, f"with a token cosine of {COLLAPSED} or more at initialisation", False),
        (low, f"with one of {APART} or less", True),
        (between, "with one in between", True),
    )
    parts = [
        f"of {counted(len(ends), 'run')} {which}, {ends.count(ok)} {'learned' if ok else 'failed to learn'}"
        for ends, which, ok in groups
        if ends
    ]
    return f"Here, {'; '.join(parts)}. The bounds come from earlier trials; this is a correlation, not a cause."


def definition(setting: Setting) -> str:
    """When a run counts as above chance; empty without a constant guess to compare with."""
    limit = setting.chance.threshold
    if limit is None or setting.chance.loss is None:
        return ""
    threshold = f"{limit:.3g}"
    words = (
        f"Above chance: final training loss below {threshold}. At chance: {threshold} or more, which is "
        f"{limit / setting.chance.loss:.0%} of the loss of a constant guess ({setting.chance.loss:.3g}). "
        "Above chance says that training got going, not that it went well."
    )
    if any(outcome(run, limit) == "worse" for run in setting.finished):
        words += f" Worse than chance: above {FAR} times {threshold}."
    return words


def _learned_counts(setting: Setting, arms: Sequence[str], depths: Sequence[int]) -> str:
    """The runs of arms that learned in all, deepest of `depths` first: "1 of 1 seed; 2 of 2 at depths 2 to 16"."""
    by_seeds: dict[int, list[int]] = {}  # seeds a cell (0: not the same for all) -> depths
    for depth in reversed(depths):
        found = {len(setting.cells[arm, depth].finished) for arm in arms}
        by_seeds.setdefault(found.pop() if len(found) == 1 else 0, []).insert(0, depth)
    words: list[str] = []
    for seeds, counted_at in by_seeds.items():
        count = f"{seeds} of {seeds}" if seeds else "every seed"
        noun = "" if words or not seeds else " seed" if seeds == 1 else " seeds"
        place = "" if counted_at == [setting.deepest] else f" at {ranges(counted_at, setting.depths)}"
        words.append(f"{count}{noun}{place}")
    return "; ".join(words)
