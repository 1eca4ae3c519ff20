"""The report, on studies with made-up outcomes written to disk as real ones are."""

import csv
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from resformer.study.plan import Run, Settings, Study
from resformer.study.report import read_report, write_report

FAILING = {"plain": 8, "post_ln": 16, "exclusive_gate:bias=0": 16}  # scheme -> the depth from which it fails
QUICK = ("plain", "post_ln", "pre_ln", "deepnorm", "rezero", "exclusive_gate:bias=0")
COMMAND = "resformer compare --schemes 'plain' --output \"my runs\""
PROVENANCE = {"resformer": "0.1.0", "torch": "2.13.0", "python": "3.11.2", "platform": "Linux-6.1-x86_64"}


QuickReport = tuple[str, str, list[dict[str, str]], str]


def outcome(run: Run) -> dict[str, Any]:
    """A result shaped like those of the project's trials, a fixed function of the run."""
    draw = random.Random(run.id)
    fails = run.depth >= FAILING.get(run.scheme, 10**6)
    loss = draw.uniform(0.690, 0.694) if fails else draw.uniform(0.2, 0.45)
    score = draw.choice((0.512, 0.488)) if fails else 0.97 - loss / 2.2 + draw.uniform(-0.02, 0.02)
    cosine = 1 - 10 ** -draw.uniform(4, 7) if fails else draw.uniform(0.09, 0.6)
    slope = {"pre_ln": -0.02, "post_ln": 0.015, "plain": 0.01}.get(run.scheme, 0)
    norms = [10 ** (-2 + slope * layer + draw.uniform(-0.05, 0.05)) for layer in range(run.depth + 1)]
    if run.scheme == "rezero":
        norms = [10**-2.2] * (run.depth + 1)
    curve = [
        [step, loss + (0.72 - loss) * math.exp(-step / (60 if not fails else 9)) + draw.uniform(-0.008, 0.008)]
        for step in range(25, run.settings.steps + 1, 25)
    ]
    return {
        "status": "ok",
        "flags": ["constant_prediction", "at_chance"] if fails else [],
        "score": score,
        "metrics": {"accuracy": score, "accuracy_hard": score - 0.1, "majority": 0.512},
        "train_loss": loss,
        "loss_curve": curve,
        "diagnostics": {"token_cosine": cosine, "gradient_norms": norms},
        "cost": {
            "parameters": 12_770 + 12_704 * run.depth,
            "scheme_parameters": 2 * run.depth if run.scheme == "rezero" else 0,
            "seconds": 1.1 * run.depth + draw.uniform(0, 1),
            "examples_per_second": 9000 / run.depth,
            "peak_memory_mb": 410.0 + 3 * run.depth,
        },
        "provenance": {**PROVENANCE, "git": "0123abc", "dirty": False, "finished": "2026-11-21T03:00:00Z"},
    }


def write_study(
    output: Path,
    *studies: Study,
    outcome: Callable[[Run], dict[str, Any] | None] = outcome,
    command: str = "resformer compare --output runs",
) -> None:
    """A study's folder. An outcome of None: not started; one with "error": failed."""
    entries = [{"study": asdict(s), "command": command, "provenance": PROVENANCE, "started": "now"} for s in studies]
    output.mkdir(parents=True)
    (output / "study.json").write_text(json.dumps({"version": 1, "studies": entries}))
    for study in studies:
        for run in study.runs():
            found = outcome(run)
            if found is None:
                continue
            directory = output / "runs" / run.id
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "config.json").write_text(json.dumps(run.config))
            name = "error.json" if "error" in found else "result.json"
            (directory / name).write_text(json.dumps({"version": 1, "config": run.config, **found}))


def quick(output: Path, **options: Any) -> Path:
    """The shape of the quick start: two seeds at depths 2, 8, 16, and one at 32."""
    write_study(output, Study(QUICK, (2, 8, 16), ("sentiment",), 2), Study(QUICK, (32,), ("sentiment",), 1), **options)
    return output


def written(output: Path) -> tuple[str, str, list[dict[str, str]]]:
    """The page as the reader sees its text, the Markdown, and the rows of the table."""
    page = write_report(output)
    assert page == output / "report.html"
    with open(output / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return text_of(page.read_text("utf-8")), (output / "report.md").read_text("utf-8"), rows


def text_of(page: str) -> str:
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []
            self.skip = False

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.skip = self.skip or tag == "style"

        def handle_endtag(self, tag: str) -> None:
            self.skip = self.skip and tag != "style"

        def handle_data(self, data: str) -> None:
            if not self.skip:
                self.words.append(data)

    reader = Reader()
    reader.feed(page)
    return " ".join(" ".join(reader.words).split())


@pytest.fixture(scope="module")
def quick_report(tmp_path_factory: pytest.TempPathFactory) -> QuickReport:
    """What the quick start's report shows: text of the page, Markdown, table rows, and the page itself."""
    output = quick(tmp_path_factory.mktemp("study") / "runs", command=COMMAND)
    return *written(output), (output / "report.html").read_text("utf-8")


def changed(**changes: Any) -> Callable[[Run], dict[str, Any]]:
    return lambda run: outcome(run) | changes


def test_the_headline_says_which_schemes_to_what_depth_and_under_which_conditions(quick_report: QuickReport) -> None:
    page, text, *_ = quick_report
    headline = (
        "At learning rate 1e-3, with Xavier initialisation, 400 steps without warm-up and a BERT of width 32, "
        "on sentiment: pre_ln, deepnorm and rezero still learn at depth 32 (1 of 1 seed; 2 of 2 at depths 2 to 16); "
        "post_ln and exclusive_gate:bias=0 are at chance from depth 16 on; plain is at chance from depth 8 on."
    )
    assert headline in text
    assert page.index("plain is at chance from depth 8 on") < page.index("2/2 learned")
    for shown in (page, text):
        assert "Exploratory: every cell has fewer than 3 seeds" in shown
        assert "Seeds a cell: 2 at depths 2 to 16, 1 at depth 32." in shown
        assert "The order among pre_ln, deepnorm and rezero at depth 32 is not resolved" in shown
        assert "highest" not in shown
        assert "±" not in shown


def test_failures_are_named_with_their_reason_and_run(tmp_path: Path) -> None:
    def mixed(run: Run) -> dict[str, Any] | None:
        match run.scheme, run.depth, run.seed:
            case "rezero", 8, 0:
                return outcome(run) | {"status": "diverged", "score": None, "train_loss": None}
            case "rezero", 8, 1:
                return {"error": "RuntimeError: out of memory", "traceback": "Traceback: here"}
            case "deepnorm", 16, 1:
                return None
        return outcome(run)

    study = Study(("pre_ln", "plain", "rezero", "deepnorm"), (2, 8, 16), ("sentiment",), 2)
    write_study(tmp_path / "runs", study, outcome=mixed)
    page, text, rows = written(tmp_path / "runs")
    ids = {(run.scheme, run.depth, run.seed): run.id for run in study.runs()}
    for shown in (page, text):
        assert "diverged 1/1, 1 error" in shown
        assert "1/1 learned, 1 unfinished" in shown
        assert "error: RuntimeError: out of memory (seed 1)" in shown
        assert "rezero learned unevenly (0 of 1 at depth 8)" in shown
        assert "at chance: final training loss 0.69" in shown
        assert "22 of 24 runs finished." in shown
        assert all(ids[key] in shown for key in [("plain", 8, 0), ("plain", 16, 1), ("rezero", 8, 0), ("rezero", 8, 1)])
    assert "Traceback: here" in page
    by_id = {row["run"]: row for row in rows}
    assert len(by_id) == 24
    assert by_id[ids["rezero", 8, 0]]["status"] == "diverged"
    assert by_id[ids["rezero", 8, 0]]["learned"] == "False"
    assert by_id[ids["rezero", 8, 1]]["error"] == "RuntimeError: out of memory"
    assert by_id[ids["deepnorm", 16, 1]]["status"] == "unfinished"


def test_a_table_row_for_each_run_with_its_configuration_outcome_and_cost(quick_report: QuickReport) -> None:
    rows = quick_report[2]
    assert len(rows) == 42
    wanted = {"run", "scheme", "depth", "task", "seed", "learning_rate", "width", "weight_init", "steps", "status"}
    wanted |= {"learned", "score", "train_loss", "flags", "metric_accuracy_hard", "token_cosine", "parameters"}
    wanted |= {"scheme_parameters", "seconds", "examples_per_second", "peak_memory_mb", "git", "error"}
    assert wanted <= rows[0].keys()
    for row in rows:
        assert (row["learned"] == "True") == (float(row["train_loss"]) < 0.68)


def test_names_and_errors_from_the_study_are_escaped(tmp_path: Path) -> None:
    def fails(run: Run) -> dict[str, Any]:
        return {"error": "ValueError: <script>alert(1)</script>", "traceback": "<img src=x>"}

    study = Study(("pre_ln", "custom:note='<b>$x$</b>|&'"), (2,), ("sentiment",))
    write_study(tmp_path / "a", study, outcome=fails, command="resformer compare '<i>'")
    write_study(tmp_path / "b", study)
    for name in "ab":
        write_report(tmp_path / name)
        page = (tmp_path / name / "report.html").read_text("utf-8")
        assert not re.search(r"<(script|img|b>\$|i>)", page)
        assert "&lt;b&gt;$x$&lt;/b&gt;|&amp;" in page
        assert "<b>$" not in (tmp_path / name / "report.md").read_text("utf-8")
    assert "<b>" not in (tmp_path / "b" / "report.svg").read_text("utf-8")


def test_the_page_is_one_file_that_loads_nothing(quick_report: QuickReport) -> None:
    page = quick_report[3]
    assert not re.search(r"<(script|link|img|iframe|object|embed|base)\b", page)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|https?://", page)
    assert all(target.startswith("#") for target in re.findall(r"href=\"([^\"]*)\"", page))
    ids = re.findall(r"\bid=\"([^\"]*)\"", page)
    assert len(ids) == len(set(ids)), "figures share ids"
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", page)) <= set(ids)


def test_figures_have_text_as_text_and_colours_from_the_page(quick_report: QuickReport) -> None:
    page = quick_report[3]
    for shown in (
        "Score",
        "Training loss at the end",
        "Token cosine at initialisation",
        "Gradient norm by layer, depth 32",
    ):
        assert f"<b>{shown}</b>" in page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert ">depth (layers)</text>" in drawn
    colours = set(re.findall(r"#[0-9a-f]{6}\b", drawn))
    assert not colours, "a colour that does not follow the light and the dark page"
    assert "DejaVu" not in drawn


def test_the_token_cosine_is_compared_with_the_outcome_in_counts(quick_report: QuickReport) -> None:
    page, *_ = quick_report
    assert "of 11 runs with a token cosine of 0.9998 or more at initialisation, 11 failed to learn" in page
    assert "of 31 with 0.995 or less, 31 learned" in page
    assert "a correlation, not a cause" in page
    assert "In this project's trials it did not track which schemes fail." in page


def test_gradients_that_are_exactly_zero_are_drawn_and_named(tmp_path: Path) -> None:
    zero = {"token_cosine": 0.1, "gradient_norms": [0.0, 0.1, 0.2]}
    write_study(tmp_path / "runs", Study(("pre_ln", "rezero"), (2,), ("sentiment",)), outcome=changed(diagnostics=zero))
    page, *_ = written(tmp_path / "runs")
    assert "Exactly zero somewhere, and drawn at the floor there: pre_ln, rezero." in page


@pytest.mark.parametrize(
    "diagnostics", [{}, {"token_cosine": 1.0000001, "gradient_norms": [0.0, 0.0, 0.0]}, {"gradient_norms": []}]
)
def test_diagnostics_may_be_missing_or_degenerate(tmp_path: Path, diagnostics: dict[str, Any]) -> None:
    changes = changed(diagnostics=diagnostics, loss_curve=[], cost={}, metrics={}, provenance={})
    write_study(tmp_path / "runs", Study(("pre_ln",), (2,), ("sentiment",)), outcome=changes)
    page, *_ = written(tmp_path / "runs")
    assert "pre_ln learns at depth 2 (1 of 1 seed)" in page
    assert "Gradient norm" not in page


def test_nothing_finished_yet(tmp_path: Path) -> None:
    page, text, rows = written(quick(tmp_path / "runs", outcome=lambda run: None))
    for shown in (page, text):
        assert "no run has finished yet" in shown
        assert "0 of 42 runs finished." in shown
        assert "2 unfinished" in shown
    assert len(rows) == 42
    assert not (tmp_path / "runs" / "report.svg").exists()


def test_every_run_failed(tmp_path: Path) -> None:
    page, *_ = written(quick(tmp_path / "runs", outcome=lambda run: {"error": "OSError: disk full"}))
    assert "no run has finished yet" in page
    assert "error: OSError: disk full" in page


def test_a_result_cut_in_half_is_named_and_not_counted(tmp_path: Path) -> None:
    study = Study(("pre_ln",), (2,), ("sentiment",), 2)
    write_study(tmp_path / "runs", study)
    broken = tmp_path / "runs" / "runs" / study.runs()[0].id / "result.json"
    broken.write_text(broken.read_text()[:100])
    page, *_ = written(tmp_path / "runs")
    assert "not counted: result.json cannot be read" in page
    assert "1 of 2 runs finished." in page


def test_one_depth_and_no_scheme_that_learns(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", Study(("plain", "post_ln"), (16,), ("sentiment",)))
    page, *_ = written(tmp_path / "runs")
    assert "no scheme learns at depth 16; plain and post_ln are at chance at depth 16." in page
    assert "still" not in page
    assert "The order among" not in page


def test_intervals_and_order_with_enough_seeds(tmp_path: Path) -> None:
    def clear(run: Run) -> dict[str, Any]:
        score, slope = {"pre_ln": (0.80, 0.002), "rezero": (0.90, 0.003), "deepnorm": (0.70, 0.001)}[run.scheme]
        return outcome(run) | {"score": score + slope * run.seed}

    study = Study(("pre_ln", "rezero", "deepnorm"), (2, 8), ("sentiment",), 4)
    write_study(tmp_path / "clear", study, outcome=clear)
    _, text, _ = written(tmp_path / "clear")
    assert "At depth 8 rezero scores highest" in text
    assert "n = 4, 95% over all 3 pairs" in text
    assert "xploratory" not in text
    assert re.search(r"0\.80\d ± 0\.0", text)
    write_study(tmp_path / "noise", study)
    _, text, _ = written(tmp_path / "noise")
    assert "order among all schemes at depth 8 is not resolved: the paired interval" in text
    assert "highest:" not in text


def scores(table: dict[str, dict[int, float]]) -> Callable[[Run], dict[str, Any] | None]:
    """Outcomes with these scores, by scheme and seed; a seed that is not in the table has not started."""
    return lambda run: outcome(run) | {"score": found} if (found := table[run.scheme].get(run.seed)) else None


def test_the_highest_score_is_one_over_the_seeds_that_all_share(tmp_path: Path) -> None:
    # pre_ln has the highest mean by its lucky seed 3 alone, and loses at every shared seed
    table = {"pre_ln": {0: 0.60, 1: 0.61, 2: 0.62, 3: 0.99}, "rezero": {0: 0.65, 1: 0.67, 2: 0.66}}
    study = Study(("pre_ln", "rezero"), (8,), ("sentiment",), 4)
    write_study(tmp_path / "runs", study, outcome=scores(table))
    _, text, _ = written(tmp_path / "runs")
    assert "pre_ln scores highest" not in text
    assert "At depth 8 rezero scores highest on the 3 seeds they share: its paired differences" in text


def test_the_highest_score_is_claimed_among_the_schemes_that_learn(tmp_path: Path) -> None:
    table = {"pre_ln": {0: 0.60, 1: 0.61, 2: 0.62}, "rezero": {0: 0.65, 1: 0.67, 2: 0.66}}
    table["deepnorm"] = {0: 0.90, 1: 0.91, 2: 0.92}

    def uneven(run: Run) -> dict[str, Any] | None:
        found = scores(table)(run)
        return found | {"train_loss": 0.7} if found and (run.scheme, run.seed) == ("deepnorm", 0) else found

    write_study(tmp_path / "runs", Study(tuple(table), (8,), ("sentiment",), 3), outcome=uneven)
    _, text, _ = written(tmp_path / "runs")
    assert "At depth 8 rezero scores highest of pre_ln and rezero: its paired differences" in text


def test_identical_differences_order_nothing(tmp_path: Path) -> None:
    table = {"pre_ln": {0: 0.6, 1: 0.7, 2: 0.8}, "rezero": {0: 0.7, 1: 0.8, 2: 0.9}}  # 0.1 each, but for rounding
    write_study(tmp_path / "runs", Study(("pre_ln", "rezero"), (8,), ("sentiment",), 3), outcome=scores(table))
    _, text, _ = written(tmp_path / "runs")
    assert "scores highest" not in text
    assert "is not resolved: paired differences that are the same at every seed leave no spread to judge by" in text


def test_chance_and_losses_far_above_it_are_told_apart(tmp_path: Path) -> None:
    losses = {"pre_ln": 0.2, "plain": 0.7, "post_ln": 7.3}

    def far(run: Run) -> dict[str, Any]:
        return outcome(run) | {"train_loss": losses.get(run.scheme, (0.7, 7.3)[run.seed])}

    write_study(tmp_path / "runs", Study((*losses, "identity"), (2, 8), ("sentiment",), 2), outcome=far)
    page, text, _ = written(tmp_path / "runs")
    for shown in (page, text):
        assert "within 2%" not in shown
        assert "At chance: 0.68 or more, which is 98% of the loss of a constant guess (0.693)." in shown
        assert "Worse than chance: above 1.5 times 0.68." in shown
        assert "plain is at chance from depth 2 on" in shown
        assert "post_ln is worse than chance from depth 2 on" in shown
        assert "identity failed from depth 2 on" in shown
        assert "worse than chance 0/2" in shown
        assert "worse than chance: final training loss 7.300" in shown
        assert "0/2 learned" in shown


def test_a_run_that_diverged_is_not_at_chance(tmp_path: Path) -> None:
    def half(run: Run) -> dict[str, Any]:
        ended = {"status": "diverged", "score": None, "train_loss": None}
        return outcome(run) | ({"train_loss": 0.7} if run.seed else ended)

    write_study(tmp_path / "runs", Study(("plain",), (8,), ("sentiment",), 2), outcome=half)
    page, *_ = written(tmp_path / "runs")
    assert "plain failed at depth 8" in page
    assert "0/2 learned, 1 diverged" in page
    assert "At chance after a fixed number of steps" in page


def test_no_claim_reaches_beyond_the_depths_a_scheme_finished(tmp_path: Path) -> None:
    studies = [Study(("pre_ln",), (2, 8, 32), ("sentiment",)), Study(("plain", "rezero"), (2, 8), ("sentiment",))]
    write_study(tmp_path / "one", *studies)
    page, *_ = written(tmp_path / "one")
    assert "plain is at chance at depth 8, the deepest it finished" in page
    assert "rezero learns at depth 8, the deepest it finished" in page
    write_study(tmp_path / "two", *studies, outcome=lambda r: outcome(r) | ({} if r.depth > 8 else {"train_loss": 0.7}))
    page, *_ = written(tmp_path / "two")
    assert "plain and rezero are at chance from depth 2 to 8, the deepest they finished" in page


def test_counts_of_seeds_hold_for_every_scheme_they_name(tmp_path: Path) -> None:
    studies = [Study(("pre_ln", "rezero"), (2, 8), ("sentiment",), 2), Study(("deepnorm",), (8,), ("sentiment",), 2)]
    write_study(tmp_path / "runs", *studies)
    _, text, _ = written(tmp_path / "runs")
    assert "pre_ln and rezero still learn at depth 8 (2 of 2 seeds at depths 2 and 8); deepnorm learns" in text
    assert "deepnorm learns at depth 8 (2 of 2 seeds)." in text


def test_settings_are_never_averaged_over(tmp_path: Path) -> None:
    study = Study(("plain", "pre_ln"), (2, 8), ("agreement", "sentiment"), 2, (3e-3, 1e-3))
    write_study(tmp_path / "runs", study)
    report = read_report(tmp_path / "runs")
    assert [(s.task, s.differs) for s in report.settings] == [
        (task, {"learning_rate": rate}) for task in ("agreement", "sentiment") for rate in (1e-3, 3e-3)
    ]
    page, text, _ = written(tmp_path / "runs")
    assert "Settings in which a scheme still learns at the greatest depth: pre_ln in 4 of 4; plain in none." in page
    assert "## agreement, learning rate 3e-3" in text
    assert "At learning rate 3e-3, with Xavier" in page


def test_what_differs_between_depths_is_a_caveat(tmp_path: Path) -> None:
    deep = Study(("pre_ln",), (8,), ("sentiment",), settings=Settings(steps=50))
    write_study(tmp_path / "runs", Study(("pre_ln",), (2,), ("sentiment",)), deep)
    page, *_ = written(tmp_path / "runs")
    assert "steps differs between depths: a change with depth can come from it." in page
    assert len(read_report(tmp_path / "runs").settings) == 1


def test_regression_has_no_chance_line_and_no_claim_of_learning(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", Study(("pre_ln", "plain"), (2, 8), ("stsb",), 3))
    page, *_ = written(tmp_path / "runs")
    assert "mean scores at depth 8 run from" in page
    assert "constant guess" not in page
    assert "at chance" not in page


def test_chance_on_unequal_classes_is_the_entropy_of_their_shares(tmp_path: Path) -> None:
    metrics = {"accuracy": 0.68, "f1": 0.81, "majority": 0.684}
    write_study(
        tmp_path / "runs",
        Study(("pre_ln",), (2,), ("mrpc",)),
        outcome=changed(metrics=metrics, train_loss=0.62, score=0.745),
    )
    page, *_ = written(tmp_path / "runs")
    assert "at chance 0/1" in page
    assert "Learned: final training loss below 0.61." in page


@pytest.mark.parametrize(("majority", "threshold"), [(0.985, "0.0763"), (0.9995, "0.00421"), (0.512, "0.68")])
def test_a_constant_guess_never_learns(tmp_path: Path, majority: float, threshold: str) -> None:
    guess = -sum(p * math.log(p) for p in (majority, 1 - majority))
    study = Study(("pre_ln", "plain"), (2,), ("sentiment",))

    def skewed(run: Run) -> dict[str, Any]:
        share = 1.0 if run.scheme == "plain" else 0.97
        return outcome(run) | {"metrics": {"accuracy": majority, "majority": majority}, "train_loss": share * guess}

    write_study(tmp_path / "runs", study, outcome=skewed)
    page, *_ = written(tmp_path / "runs")
    assert f"Learned: final training loss below {threshold}." in page
    assert "pre_ln learns at depth 2" in page
    assert "plain is at chance at depth 2" in page


def test_protocol_and_commands_are_told_verbatim(quick_report: QuickReport) -> None:
    page, text, *_ = quick_report
    assert COMMAND in page
    assert COMMAND in text
    assert "0123abc" in page
    assert "weight_ init xavier" in page  # a narrow column may break after the underscore


def test_reading_a_study_needs_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from resformer.study.report import write_report
write_report(Path({str(quick(tmp_path / "runs"))!r}))
print([name for name in ("torch", "transformers", "datasets", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no study"):
        write_report(tmp_path)


def test_the_same_study_gives_the_same_page(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", Study(("pre_ln", "plain"), (2, 8), ("sentiment",)))
    pages = [write_report(tmp_path / "runs").read_text("utf-8") for _ in range(2)]
    assert pages[0] == pages[1]
