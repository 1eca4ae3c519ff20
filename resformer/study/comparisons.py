"""Every arm against the baseline, at every depth of every setting: the tests of a study, and how depth changes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, compress

from resformer.study.interaction import resolved_from, slope_difference
from resformer.study.multiplicity import benjamini_hochberg, holm
from resformer.study.plan import ENDPOINTS
from resformer.study.results import HALVED
from resformer.study.stats import FEWEST, FEWEST_FOR_STARS, Estimate, comparison, detectable, estimate, stars
from resformer.study.summary import FAILING, SIGN, Cell, Setting
from resformer.study.words import joined, ranges

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """One arm minus the baseline at one depth, paired by seed, by one endpoint."""

    setting: int  # its position in the study
    arm: str
    depth: int
    endpoint: str
    primary: bool  # by the endpoint that the study declared
    gap: Estimate | None  # None: no seed has both
    p: float | None  # of the paired t test; None where there is none
    unequal: int  # pairs of which a run had to take its batches in smaller pieces
    reason: str | None  # why a small p-value would not be believed: see `_withheld`
    adjusted: float | None  # Holm's over the declared endpoint's tests, Benjamini and Hochberg's over the others

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that so many pairs of this spread find in 80 % of studies."""
        if self.gap is None or self.gap.sd is None or self.gap.flat:
            return None
        return detectable(self.gap.sd, self.gap.n)

    @property
    def sentence(self) -> str:
        return "no seed has both" if self.gap is None else comparison(self.gap)

    @property
    def stars(self) -> str:
        return stars(self.adjusted, self.gap.n) if self.gap else ""

    @property
    def significant(self) -> bool:
        return self.adjusted is not None and self.adjusted < LEVEL

    @property
    def withheld(self) -> bool:
        return self.reason is not None

    @property
    def verdict(self) -> str | None:
        """ "better" or "worse" where the adjusted p-value is below 0.05 and is to be believed."""
        if not self.significant or self.withheld or self.gap is None:
            return None
        return _verdict(self.gap, self.endpoint)


@dataclass(frozen=True)
class Interaction:
    """How the advantage of an arm over the baseline changes with depth, by the declared endpoint."""

    arm: str
    slope: Estimate | None  # of the arm minus that of the baseline, for each doubling of depth
    resolved_from: int | None  # the depth from which on the paired interval excludes zero, at a level for all arms
    verdict: str | None  # "better" or "worse" from there on
    reason: str | None  # why there is no slope: a cell did not learn, whose loss says how far training got, not a gain

    @property
    def found(self) -> str:
        resolved = f"{self.verdict} from depth {self.resolved_from}" if self.verdict else "none found"
        return f"no slope: {self.reason}" + f"; {resolved}" * bool(self.verdict) if self.reason else resolved


def compare(settings: Sequence[Setting], declared: str) -> list[Comparison]:
    """All arms but the baseline x depths x settings x endpoints, with p-values adjusted within each endpoint.

    The family is what was planned: a test that cannot be made yet, or has too few pairs, counts as one.
    """
    found = []
    for endpoint in (declared, *(name for name in ENDPOINTS if name != declared)):
        tests = [
            (position, arm, depth, setting.difference(arm, setting.baseline, depth, endpoint))
            for position, setting in enumerate(settings)
            if setting.baseline is not None
            for arm in setting.arms
            if arm != setting.baseline
            for depth in shared(setting, arm)
        ]
        p_values = [gap.p_value if gap else None for *_, gap in tests]
        adjusted = (holm if endpoint == declared else benjamini_hochberg)(p_values)
        found += [
            Comparison(
                position,
                arm,
                depth,
                endpoint,
                endpoint == declared,
                gap,
                p,
                _unequal(settings[position], arm, depth),
                _withheld(settings[position], arm, depth, gap, endpoint),
                q,
            )
            for (position, arm, depth, gap), p, q in zip(tests, p_values, adjusted, strict=True)
        ]
    return found


def _withheld(setting: Setting, arm: str, depth: int, gap: Estimate | None, endpoint: str) -> str | None:
    """Why no word is given on a difference, whatever its p-value: the better of the two has not learned, or runs failed
    among fewer than 6 pairs. Failures make two heaps of a scheme's runs, and all of a few in one heap look like a
    difference without spread. None where a word may be given."""
    if gap is None:
        return None
    own, base = setting.cells[arm, depth], setting.cells[str(setting.baseline), depth]
    better = own if gap.mean * SIGN[endpoint] > 0 else base
    failed = any(cell.failures is not None and cell.failures.failed for cell in (own, base))
    if better.state not in FAILING and not (failed and gap.n < FEWEST_FOR_STARS):
        return None
    return _unlearned(own, base) or "some runs failed"


def _unlearned(own: Cell, base: Cell) -> str | None:
    """Which of the two did not learn in any run; the arm itself is not named."""
    if own.state in FAILING:
        return "neither side learned" if base.state in FAILING else "did not learn"
    return f"{base.arm} did not learn" if base.state in FAILING else None


def shared(setting: Setting, arm: str) -> list[int]:
    """The depths at which runs of an arm and of the baseline were planned."""
    both = (arm, str(setting.baseline))
    return [depth for depth in setting.depths if all(setting.cells[name, depth].runs for name in both)]


def _unequal(setting: Setting, arm: str, depth: int) -> int:
    """The pairs with the baseline that are not quite equal, since memory did not hold the batches of a run."""
    cells = [setting.cells[name, depth] for name in (arm, str(setting.baseline))]
    both = set.intersection(*({run.config["seed"] for run in cell.finished} for cell in cells))
    halved = {run.config["seed"] for cell in cells for run in cell.finished if HALVED in run.flags}
    return len(both & halved)


def interactions(setting: Setting, endpoint: str) -> list[Interaction]:
    """Of every arm but the baseline; empty without a baseline or with one depth.

    Each arm has one chance more to look resolved, so the intervals of `resolved_from` hold for all arms together
    (Bonferroni). Cells on which `_withheld` gives no word resolve nothing.
    """
    if setting.baseline is None or len(setting.depths) < 2:
        return []
    level = 1 - LEVEL / max(1, len(setting.arms) - 1)

    def values(arm: str) -> dict[int, dict[int, float]]:
        return {depth: setting.cells[arm, depth].values(endpoint) for depth in setting.depths}

    found = []
    for arm in setting.arms:
        if arm != setting.baseline:
            gaps = {d: setting.difference(arm, setting.baseline, d, endpoint, level) for d in shared(setting, arm)}
            believed = {d: None if _withheld(setting, arm, d, gap, endpoint) else gap for d, gap in gaps.items()}
            resolved = resolved_from(believed)
            gap = gaps.get(max(gaps, default=0))
            verdict = None if resolved is None or gap is None else _verdict(gap, endpoint)
            reason = _no_slope(setting, arm, [depth for depth, gap in gaps.items() if gap])
            slope = None if reason else slope_difference(values(arm), values(setting.baseline))
            found.append(Interaction(arm, slope, resolved, verdict, reason))
    return found


def _verdict(gap: Estimate, endpoint: str) -> str:
    return "better" if gap.mean * SIGN[endpoint] > 0 else "worse"


def _no_slope(setting: Setting, arm: str, depths: Sequence[int]) -> str | None:
    """Where the arm or the baseline did not learn at one of the depths; None where both did at all."""
    by_reason: dict[str, list[int]] = {}
    for depth in depths:
        if reason := _unlearned(setting.cells[arm, depth], setting.cells[str(setting.baseline), depth]):
            by_reason.setdefault(reason, []).append(depth)
    words = [f"{reason} at {ranges(own, setting.depths)}" for reason, own in by_reason.items()]
    return joined(words) if words else None


@dataclass(frozen=True)
class Ranking:
    """Which of some arms is best at a depth, over the seeds that all of them share."""

    best: str
    among: tuple[str, ...]
    seeds: int  # that they share
    partial: bool  # some have more seeds than those
    gaps: tuple[Estimate, ...]  # of the best to each other, at the level that holds for all pairs together
    sign: int

    @property
    def pairs(self) -> int:
        return len(list(combinations(self.among, 2)))

    @property
    def resolved(self) -> bool:
        return self.seeds >= FEWEST and all(gap.excludes(0) for gap in self.gaps)


def ranking(setting: Setting, endpoint: str) -> Ranking | None:
    """Of the arms that learn at the deepest depth; None where fewer than two do.

    Bonferroni over all pairs, since the best one is picked after looking at all of them. One sample of seeds serves the
    means and the pairs: otherwise the best mean can lose every pair.
    """
    cells = [setting.cells[arm, setting.deepest] for arm in setting.arms if setting.deepest]
    cells = [cell for cell in cells if cell.state in ("learned", "scored") and cell.values(endpoint)]
    if sum(enough := [len(cell.values(endpoint)) >= FEWEST for cell in cells]) >= 2:
        cells = list(compress(cells, enough))  # the others cannot be ranked, and would leave fewer seeds to share
    if len(cells) < 2:
        return None
    values = {cell.arm: cell.values(endpoint) for cell in cells}
    shared = sorted(set.intersection(*map(set, values.values())))
    names, sign = tuple(values), SIGN[endpoint]
    partial = any(len(own) > len(shared) for own in values.values())
    if not shared:
        return Ranking(names[0], names, 0, partial, (), sign)
    level = 1 - LEVEL / len(list(combinations(names, 2)))
    best = max(names, key=lambda name: sign * sum(values[name][seed] for seed in shared))
    gaps = [
        estimate([values[best][seed] - values[name][seed] for seed in shared], level) for name in names if name != best
    ]
    return Ranking(best, names, len(shared), partial, tuple(gaps), sign)


@dataclass(frozen=True)
class AgainstControls:
    """Which schemes are better than every control at the deepest depth where controls ran, and which controls are
    better than a scheme."""

    depth: int
    controls: tuple[str, ...]  # that ran there
    schemes: tuple[str, ...]  # that learn there, by what the task can tell
    beat: tuple[str, ...]
    gaps: dict[tuple[str, str], Estimate]  # (scheme, control) -> scheme - control, at a level for all pairs together
    pairs: int
    seeds: int  # that the scheme with the most has in common with every control
    endpoint: str

    @property
    def some_failed(self) -> bool:
        """Whether schemes ran there that did not learn."""
        return len(self.schemes) * len(self.controls) < self.pairs

    def behind(self, control: str, shown: bool = False) -> list[str]:
        """The schemes with a worse mean than a control; `shown`: those whose interval excludes zero."""
        return [s for s in self.schemes if (gap := self.gaps.get((s, control))) and self._worse(gap)
                and (gap.excludes(0) or not shown)]  # fmt: skip

    def best(self) -> tuple[str, str, Estimate] | None:
        """The best scheme, the control that comes out best against it, and their difference."""
        full = [s for s in self.schemes if all((s, c) in self.gaps for c in self.controls)]
        if not full:
            return None
        sign = SIGN[self.endpoint]
        scheme = max(full, key=lambda s: sum(sign * self.gaps[s, c].mean for c in self.controls))
        control = min(self.controls, key=lambda c: sign * self.gaps[scheme, c].mean)
        return scheme, control, self.gaps[scheme, control]

    def _worse(self, gap: Estimate) -> bool:
        return gap.mean * SIGN[self.endpoint] < 0


def against_controls(setting: Setting, endpoint: str) -> AgainstControls | None:
    """By paired intervals, Bonferroni over all pairs of scheme and control; None where no control has finished."""

    def ran(arm: str, depth: int) -> bool:
        return bool(setting.cells[arm, depth].values(endpoint))

    depth = max((d for d in setting.depths if any(ran(c, d) for c in setting.controls)), default=None)
    if depth is None:
        return None
    controls = tuple(c for c in setting.controls if ran(c, depth))
    schemes = tuple(a for a in setting.arms if a not in setting.controls and ran(a, depth))
    pairs = len(controls) * len(schemes)
    if not pairs:
        return None
    rows = {s: [setting.difference(s, c, depth, endpoint, 1 - LEVEL / pairs) for c in controls] for s in schemes}
    seeds = max(min(gap.n if gap else 0 for gap in row) for row in rows.values())
    learning = tuple(scheme for scheme in schemes if setting.cells[scheme, depth].state not in FAILING)
    beat = [
        scheme
        for scheme in learning
        if all(gap is not None and gap.excludes(0) and gap.mean * SIGN[endpoint] > 0 for gap in rows[scheme])
    ]
    gaps = {(s, c): gap for s, row in rows.items() for c, gap in zip(controls, row, strict=True) if gap is not None}
    return AgainstControls(depth, controls, learning, tuple(beat), gaps, pairs, seeds, endpoint)


def mean_of(cells: Sequence[Cell], name: str) -> float | None:
    """The mean of an entry of `cost` over the finished runs of cells that have it."""
    values = [run.cost[name] for cell in cells for run in cell.finished if run.cost.get(name) is not None]
    return estimate(values).mean if values else None
