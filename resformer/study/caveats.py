"""What a reader must know before believing the report; each item is there because the data call for it."""

from collections.abc import Iterator, Sequence
from statistics import median

from resformer.study.apart import tied
from resformer.study.comparisons import LEVEL, compare, mean_of
from resformer.study.findings import ENDPOINT, title
from resformer.study.layers import outside_layers
from resformer.study.limits import limits
from resformer.study.norms import differing
from resformer.study.plan import Study
from resformer.study.rates import Grid, by_training_loss
from resformer.study.reading import Reading
from resformer.study.results import HALVED
from resformer.study.stats import FEWEST, FEWEST_FOR_STARS, detectable
from resformer.study.summary import Setting, outcome
from resformer.study.words import counted, joined, number, signed

NAMED = 6  # cells that a caveat names before it only counts


def caveats(settings: Sequence[Setting], reading: Reading, tried: Sequence[Sequence[Grid]]) -> list[str]:
    """All that hold, the gravest first. `tried`: the grids of learning rates of each setting."""
    if not any(run.finished for run in reading.runs):
        return ["No run has finished: there is nothing to conclude yet."]
    parts = (
        _seeds(settings),
        _tests(settings, reading),
        _coverage(reading),
        _breadth(settings, reading),
        _rates(settings, reading, tried),
        _failures(settings, reading),
        _fairness(settings, reading),
        differing(settings),
        limits(settings),
        _provenance(reading),
    )
    return [text for part in parts for text in part]


def _seeds(settings: Sequence[Setting]) -> Iterator[str]:
    counts = [len(cell.finished) for setting in settings for cell in setting.cells.values() if cell.finished]
    if min(counts) < FEWEST:
        few = sum(n < FEWEST for n in counts)
        yield (
            f"Exploratory: {few} of {len(counts)} cells have fewer than {FEWEST} seeds. These have no interval, and "
            "differences between schemes that learn may be seed noise."
        )
    if max(counts) >= FEWEST:
        yield (
            "Intervals are 95% Student-t, one cell or difference at a time; p-values are corrected for the number of "
            "tests where they are called adjusted, and only those are meant to decide anything."
        )
        if max(counts) < FEWEST_FOR_STARS:
            yield f"At most {counted(max(counts), 'seed')} a cell: an interval from so few leans on normal seed noise."


def _tests(settings: Sequence[Setting], reading: Reading) -> Iterator[str]:
    tests = [test for test in compare(settings, reading.study.endpoint) if test.primary]
    withheld = sum(test.significant and test.withheld for test in tests)
    if withheld:
        yield (
            f"{counted(withheld, 'declared comparison')} with a small p-value {'is' if withheld == 1 else 'are'} given "
            f"no verdict: the better side did not learn, or runs failed among fewer than {FEWEST_FOR_STARS} pairs, "
            "which a t test takes for no spread. See the failure rates."
        )
    pairs = [test.gap.n for test in tests if test.gap is not None and test.gap.n >= FEWEST]
    if len(tests) > 1 and pairs:
        n = min(pairs)
        alone, together = detectable(1.0, n), detectable(1.0, n, alpha=LEVEL / len(tests))
        sizes = [s for t in tests if t.gap and (s := detectable(t.gap.sd or 0.0, n, alpha=LEVEL / len(tests)))]
        if alone and together and sizes:
            yield (
                f"Detectable sizes are those of one test. The first of {len(tests)} declared ones to pass Holm's "
                f"correction needs a difference {together / alone:.1f} times as large at {n} pairs: "
                f"{median(sizes):.2g} in {ENDPOINT[reading.study.endpoint]} at the median spread of the pairs, from "
                f"{min(sizes):.2g} to {max(sizes):.2g} at the others."
            )


def _coverage(reading: Reading) -> Iterator[str]:
    runs = reading.reported
    missing = sum(not run.finished for run in runs)
    if missing:
        under_way = f", {reading.under_way} under way as this was written" * bool(reading.under_way)
        yield f"{missing} of {len(runs)} planned runs have no result{under_way}: the picture is partial."
    if bad := reading.not_counted:
        are, belong = ("is", "belongs") if len(bad) == 1 else ("are", "belong")
        yield f"{counted(len(bad), 'result file')} cannot be read or {belong} elsewhere, and {are} not counted."
    if moved := reading.moved:
        were = "was" if len(moved) == 1 else "were"
        yield f"{counted(len(moved), 'result file')} did not count and {were} moved aside, to {moved[0].name} of a run."
    if n := reading.other_rates:
        are = "is" if n == 1 else "are"
        yield f"{counted(n, 'finished run')} at learning rates that are not the ones chosen now {are} not shown."
    if n := reading.unplanned:
        are, them = ("is", "it") if n == 1 else ("are", "them")
        yield (
            f"{counted(n, 'finished run')} {are} not shown: no study of this folder plans {them} as things stand. The "
            "units of a wider feed-forward change with the schemes, say, or runs were copied here without their study."
        )


def _breadth(settings: Sequence[Setting], reading: Reading) -> Iterator[str]:
    finished = [run for run in reading.runs if run.finished]
    for key, what in (("learning_rate", "learning rate"), ("weight_init", "weight initialisation"), ("task", "task")):
        values = sorted({str(number(run.config[key])) for run in finished if key in run.config})
        if len(values) == 1 and not (key == "learning_rate" and reading.choices):
            yield f"One {what} ({values[0]}): with another one the outcome can differ."
    mixed = [s.task for s in settings if len({r.config["learning_rate"] for r in s.finished}) > 1]
    if mixed and any(len(study.learning_rates) == 1 for study in reading.studies):
        yield (
            f"On {joined(dict.fromkeys(mixed))} arms were run at different learning rates that were given, not chosen "
            "for each: a difference can come from that."
        )
    if not any(setting.controls for setting in settings):
        yield "No negative control was planned: a gain may come from more parameters alone."
    elif missing := [s for s in settings if not any(s.cells[c, d].finished for c in s.controls for d in s.depths)]:
        yield f"No negative control has finished on {joined(dict.fromkeys(s.task for s in missing))}."
    if len(endpoints := dict.fromkeys(study.endpoint for study in reading.studies)) > 1:
        yield f"The studies here declare different endpoints ({joined(endpoints)}): the last one's is primary."
    if len(baselines := dict.fromkeys(str(study.baseline) for study in reading.studies)) > 1:
        yield f"The studies here name different baselines ({joined(baselines)}): the last one's is used."
    narrow = {depth for study in reading.studies for depth, units in study.facts.wider.items() if not units}
    if narrow:
        yield (
            f"There is no control with a wider feed-forward at depth {joined(sorted(narrow, key=int))}: no scheme adds "
            "as many parameters as one more unit in each layer takes."
        )
    for study in reading.studies:
        if study.pretraining is not None and study.pretraining.seeds < study.seeds:
            yield (
                f"{counted(study.pretraining.seeds, 'encoder')} for each arm and depth and {study.seeds} seeds of "
                "fine-tuning: intervals do not cover what another pre-training would change."
            )
    for key in dict.fromkeys(key for setting in settings for key in tied(setting.runs)):
        yield f"{key} differs between depths: a change with depth can come from it."
    yield from dict.fromkeys(matched(study) for study in reading.studies if study.facts.widths)


def matched(study: Study) -> str:
    """The widths of a study that follow from `match_parameters`, and how near they come to it."""
    from resformer.sizes import matched_width  # only here: it brings torch

    given, found = study.settings, []
    wanted = str(given.match_parameters)
    parameters = int(wanted) if wanted.isdigit() else wanted
    for depth in sorted(study.depths):
        match = matched_width(depth, parameters, family=given.family, heads=given.heads, ffn_ratio=given.ffn_ratio)
        found.append(f"{match.width} at depth {depth} ({signed(100 * match.relative, 1)}%)")
    return (
        f"Widths follow from match_parameters {wanted}: {joined(found)}; in parentheses how far the parameters of the "
        "layers are from that. A change with depth can come from either."
    )


def _rates(settings: Sequence[Setting], reading: Reading, tried: Sequence[Sequence[Grid]]) -> Iterator[str]:
    several = len(settings) > 1
    named = [
        (grid, f"{grid.arm} at depth {grid.depth}" + f" on {title(setting)}" * several)
        for setting, own in zip(settings, tried, strict=True)
        for grid in own
    ]
    if not named:
        return
    yield (
        "Learning rates were chosen on one tuning run each, on a slice of the training data: another seed could have "
        "chosen others."
    )
    for edge in ("smallest", "largest"):
        cells = [name for grid, name in named if grid.choice.edge == edge]
        if cells:
            yield (
                f"The chosen learning rate is the {edge} of its grid in {counted(len(cells), 'cell')} of {len(named)} "
                f"({_some(cells)}): a better one may lie beyond."
            )
    if reading.study.endpoint == "train_loss":
        other, of, gap = by_training_loss([grid for grid, _ in named])
        if other:
            yield (
                f"Rates are chosen by the loss on the slice, and arms compared by that of training: in {other} of "
                f"{counted(of, 'cell')} another rate ended tuning with a lower training loss, by up to {gap:.3f}."
            )
    lost = [name for grid, name in named if grid.choice.complete and grid.choice.rate is None]
    if lost:
        yield f"Every learning rate diverged in tuning, and the smallest was run, in {_some(lost)}."
    open_ = sum(not grid.choice.complete for grid, _ in named)
    if open_:
        yield f"The learning rate is not chosen yet in {counted(open_, 'cell')} of {len(named)}."


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return joined([*names[:NAMED], *([f"{more} more"] if more > 0 else [])])


def _failures(settings: Sequence[Setting], reading: Reading) -> Iterator[str]:
    ends = [(run, cell) for s in settings for cell in s.cells.values() for run in cell.finished]
    if any(outcome(run, cell.chance.threshold) == "chance" for run, cell in ends):
        yield "At chance after a fixed number of steps can mean slow to learn rather than unable to."
    blind = [r for r, c in ends if outcome(r, c.chance.threshold) == "learned" and "at_chance" in r.flags]
    if blind:
        yield (
            f"{counted(len(blind), 'run')} with a training loss below chance answered the "
            "validation split no better than chance: learned here means the training data."
        )
    diverged = sum(run.status == "diverged" for run, _ in ends)
    if diverged:
        yield (
            f"{counted(diverged, 'run')} diverged: means and differences take "
            f"{'it' if diverged == 1 else 'each of them'} with the score and the loss of a constant guess."
        )
    for what, name in (("score", "score"), ("loss", "training loss")):
        lost = [s.task for s in settings if getattr(s.chance, what) is None
                and any(run.status == "diverged" for run in s.finished)]  # fmt: skip
        if lost:
            yield (
                f"What a constant guess gets as {name} is not known on {joined(dict.fromkeys(lost))}: runs that "
                "diverged are missing from its means there, and count as failed alone."
            )
    errors = sum(run.status == "failed" for run in reading.runs)
    if errors:
        yield f"{counted(errors, 'run')} ended with an error of the program, which says nothing about the scheme."


def _fairness(settings: Sequence[Setting], reading: Reading) -> Iterator[str]:
    halved = sum(HALVED in run.flags for run in reading.runs if run.finished)
    if halved:
        yield (
            f"{counted(halved, 'run')} had to take batches in smaller pieces, for want of memory: pairs with "
            f"{'it' if halved == 1 else 'them'} are not quite equal."
        )
    gaps = []
    for s in settings:
        outside = outside_layers(s)
        for depth in s.depths:
            sizes = [size - (outside or 0) for a in s.arms if (size := mean_of([s.cells[a, depth]], "parameters"))]
            if len(sizes) > 1:
                gaps.append((max(sizes) / min(sizes) - 1, depth, outside is not None))
    if gaps and max(gaps)[0] > 0.01:
        gap, depth, of_layers = max(gaps)
        yield (
            f"Arms of a depth differ in parameters{' of their layers' * of_layers} by up to {gap:.0%} (at depth "
            f"{depth}): what they are compared at is equal steps, not equal size or time; see cost."
        )


def _provenance(reading: Reading) -> Iterator[str]:
    finished = [run for run in reading.runs if run.finished]
    finished += [run for run in (*reading.tuning, *reading.encoders) if run.finished]
    for key in (
        "resformer",
        "git",
        "torch",
        "transformers",
        "tokenizers",
        "scikit-learn",
        "numpy",
        "platform",
        "device",
    ):
        if len({run.provenance.get(key) for run in finished}) > 1:
            yield f"The runs were not all made with the same {key} (see provenance)."
    if any(run.provenance.get("dirty") for run in finished):
        yield "Some runs were made with code changed since the commit that is named."
