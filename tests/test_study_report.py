"""The report: its page, its sentences and its files, on studies with made-up outcomes."""

import csv
import fcntl
import json
import math
import re
import subprocess
import sys

import pytest
from study_folders import (
    COMMAND,
    FULL,
    Page,
    diverged,
    ended,
    full,
    planned,
    put,
    study,
    told,
    write_study,
)

from resformer.cli import main
from resformer.study.document import study_document
from resformer.study.report import html, write_report
from resformer.study.settings import Settings


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of the full study in a folder of its own, and its page."""
    root = tmp_path_factory.mktemp("study")
    page = write_report(write_study(root / "runs", FULL, outcome=full), root / "out")
    assert page == root / "out" / "report.html"
    assert not (root / "runs" / "report.html").exists()
    return root / "out", Page(page.read_text("utf-8"))


def by(schemes, at=lambda run: 0.3):
    """Outcomes of schemes that fail from a depth on, the others learn with a training loss."""

    def outcome(run):
        fails = run.condition.depth >= schemes.get(run.condition.scheme, 10**6)
        return ended(run, 0.5 if fails else 0.8 + 0.01 * run.seed, 0.693 if fails else at(run))

    return outcome


# --- the page


def test_the_first_screen_says_which_scheme_to_what_depth_and_how_sure(written):
    _, page = written
    (heading,) = page.texts("h1")
    assert heading == (
        "Settings in which a scheme still trains above chance (final training loss below 98% of a constant guess's) at "
        "depth 24, of those in which it ran there: pre_ln and "
        "pre_ln + wider ffn (control) in 2 of 2; static_mix (control) in 1 of 1; rezero in 1 of 2."
    )
    header = page.texts("header")[0]
    assert "No scheme is shown to beat every control (static_mix; pre_ln + wider ffn) on any setting" in header
    assert (
        "Of 18 declared comparisons with pre_ln by score none finds a difference after Holm's correction. "
        "1 is given no verdict: rezero (some runs failed) at depth 24 on sentiment. In the other 16 that could be "
        "tested no difference is detected; 3 of them have intervals of their own that exclude zero. 1 cannot be tested"
    ) in header
    assert "Seeds a cell: 0 to 3. Not all runs have finished: 33 of 36 on agreement." in header
    table = page.texts("table")[0]
    assert "rezero 12 of 24: 0.753 ± 0.546 −0.057 ± 0.567 at 24 24 of 24: 0.900 ± 0.090 +0.090 ± 0.066 at 24" in table


def test_the_page_has_every_section(written):
    _, page = written
    assert page.texts("h2") == [
        "sentiment", "agreement", "Across tasks", "Coverage", "Caveats", "Runs", "Protocol and provenance",
    ]  # fmt: skip
    wanted = [
        "Differences from pre_ln", "Does depth change the difference?", "Over depth",
        "Gradient norm by layer, at initialisation", "Training loss by step", "Learning rates tried", "Cost",
    ]  # fmt: skip
    assert [h for h in page.texts("h3") if h in wanted] == wanted * 2
    assert not page.unbalanced, "tags that are closed and were not open"
    assert not page.open


def test_the_main_table_has_a_row_for_each_cell_with_its_numbers(written):
    _, page = written
    rows = page.texts("tr")
    assert (
        "rezero 12 0.860 ± 0.050 +0.050 (95% interval +0.025 to +0.075, n=3) 0.24 0/3 (0 to 56%) 0.140 ± 0.050 "
        "−0.050 ± 0.025 0.12"
    ) in rows
    assert any(row.startswith("rezero 24 0.753 ± 0.546") and "1/3 (6 to 79%)" in row for row in rows)
    assert any(row.startswith("pre_ln 6 0.810 ± 0.025 the baseline 0/3") for row in rows)
    assert "rezero +0.035 ± 0.022 3 none found" in rows
    assert not any(row.startswith("static_mix control 24") and "agreement" in row for row in rows)


def test_controls_are_called_so_wherever_they_are(written):
    _, page = written
    for tag in ("th", "li"):
        for text in page.texts(tag):
            if text.startswith(("static_mix", "pre_ln + wider ffn")) and "at depth" not in text and "Every" not in text:
                assert "control" in text, text


def test_coverage_is_a_table_of_runs_done_and_planned(written):
    _, page = written
    tables = page.texts("table", class_="cover")
    assert "static_mix control 3/3 3/3 0/3" in tables[1]
    assert "static_mix control 3/3 3/3 3/3" in tables[0]
    assert "69 of 72 runs finished, 1 of them diverged; 3 not finished; 72 of 72 tuning runs finished." in page.text
    assert len(page.texts("td", class_="part")) == 1


def test_failures_caveats_and_the_command(written):
    _, page = written
    assert "diverged: loss not finite, seed 2; last step logged 50" in page.text
    caveats = page.texts("li")
    assert "3 of 72 planned runs have no result: the picture is partial." in caveats
    assert any(text.startswith("1 run diverged: means and differences take it with") for text in caveats)
    assert any(
        text.startswith("The chosen learning rate is the largest of its grid in 6 cells of 24") for text in caveats
    )
    assert "At most 3 seeds a cell: an interval from so few leans on normal seed noise." in caveats
    assert COMMAND in page.texts("pre")


def test_the_page_is_one_file_that_loads_nothing(written):
    folder, page = written
    text = (folder / "report.html").read_text("utf-8")
    assert not {tag for tag, *_ in page.elements} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|https?://", text)
    hrefs = [found.get("href") or found.get("xlink:href") for _, found, _ in page.elements]
    assert all(href.startswith("#") for href in hrefs if href)
    ids = [found["id"] for _, found, _ in page.elements if "id" in found]
    assert len(ids) == len(set(ids)), "figures share ids"
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text)) <= set(ids)


def test_figures_have_text_as_text_and_colours_of_the_page(written):
    folder, page = written
    text = (folder / "report.html").read_text("utf-8")
    panels = re.findall(r"<svg[^>]*role=\"img\".*?</svg>", text, flags=re.DOTALL)
    names = set(re.findall(r"aria-label=\"([^\"]*)\"", text))
    assert {
        "Score against depth, by scheme",
        "Learning rates tried, depth 24",
        "Score against seconds of a run",
    } <= names
    assert not re.findall(r"#[0-9a-f]{6}\b", "".join(panels)), "a colour that does not follow light and dark"
    assert ">depth (layers)</text>" in "".join(panels)
    assert "DejaVu" not in "".join(panels)
    strips = [found for tag, found, _ in page.elements if tag == "svg" and found.get("class") == "strip"]
    assert len(strips) == 2 * (4 * 3 + 1) - 1  # arms x depths and a scale, a setting; one cell did not run


def test_the_files_beside_the_page(written):
    folder, _ = written
    drawn = {"report.svg", "start.svg", "curves.svg", "learning_rates.svg", "gradients.svg", "cost.svg"}
    assert {path.name for path in folder.iterdir()} == drawn | {
        "report.html", "report.json", "report.md", "results.csv", "comparisons.csv",
    }  # fmt: skip
    text = (folder / "report.md").read_text("utf-8")
    assert {f"({name})" for name in drawn} <= set(re.findall(r"\([a-z_]+\.svg\)", text))
    assert ">static_mix (control)</text>" in (folder / "report.svg").read_text("utf-8")
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 72
    assert {"arm", "score", "train_loss", "learned", "metric_loss", "flops", "status", "learning_rate"} <= rows[
        0
    ].keys()
    with open(folder / "comparisons.csv", newline="", encoding="utf-8") as file:
        tests = list(csv.DictReader(file))
    assert len(tests) == 36
    assert {"setting", "arm", "baseline", "depth", "endpoint", "mean", "low", "high", "adjusted", "n"} <= tests[
        0
    ].keys()


def test_the_page_is_made_from_the_document_alone(tmp_path):
    path = write_study(tmp_path / "runs", study(("pre_ln", "rezero"), (2,), 3), outcome=lambda run: ended(run, 0.8))
    page = write_report(path)
    document = json.loads((path / "report.json").read_text("utf-8"))
    assert document["version"] == 1
    assert html(document) == page.read_text("utf-8")


def test_names_and_errors_from_the_study_are_escaped(tmp_path):
    def outcome(run):
        if run.seed:
            return {"error": "ValueError: <script>alert(1)</script>", "traceback": "<img src=x>"}
        return ended(run, 0.8)

    named = study(("pre_ln", "custom:note='<b>$x$</b>|&'"), (2,), 2)
    page = write_report(write_study(tmp_path / "runs", named, outcome=outcome, command="resformer '<i>'"))
    text = page.read_text("utf-8")
    assert not re.search(r"<(script|img|b>\$|i>)", text)
    assert "&lt;b&gt;$x$&lt;/b&gt;|&amp;" in text
    assert "<b>$" not in (tmp_path / "runs" / "report.md").read_text("utf-8")
    for drawing in (tmp_path / "runs").glob("*.svg"):
        assert "<b>" not in drawing.read_text("utf-8")


def test_one_setting_fills_the_first_screen(tmp_path):
    one = study(("pre_ln", "plain"), (2, 8), 3)
    page = Page(html(study_document(write_study(tmp_path / "runs", one, outcome=by({"plain": 8})))))
    (heading,) = page.texts("h1")
    assert heading == (
        "At learning rate 1e-3, with Xavier initialisation, 100 steps without warm-up and a net of width 32 (bert), on "
        "sentiment: pre_ln still trains above chance at depth 8 (3 of 3 seeds at depths 2 and 8; mean training loss "
        "there 0.300, constant guess 0.693); plain is at chance at depth 8."
    )
    assert "No negative control was planned: a gain may come from more parameters alone." in page.texts("li")


# --- the sentences


def test_the_headline_says_to_what_depth_each_scheme_learns(tmp_path):
    schemes = ("plain", "post_ln", "pre_ln", "rezero")
    grown = [study(schemes, (2, 8, 16), 2), study(schemes, (32,), 1)]
    path = write_study(tmp_path / "runs", *grown, outcome=by({"plain": 8, "post_ln": 16}))
    text = told(path)
    assert (
        "pre_ln and rezero still train above chance at depth 32 (1 of 1 seed; 2 of 2 at depths 2 to 16; mean training "
        "loss there 0.300, constant guess 0.693); "
        "post_ln is at chance from depth 16 on; plain is at chance from depth 8 on."
    ) in text
    assert "Exploratory: every cell has fewer than 3 seeds" in text
    assert "Seeds a cell: 2 at depths 2 to 16, 1 at depth 32." in text
    assert "The order among pre_ln and rezero at depth 32 by score is not resolved" in text
    assert "±" not in text


def test_failures_are_named_with_their_reason_and_run(tmp_path):
    def mixed(run):
        match run.condition.scheme, run.condition.depth, run.seed:
            case "rezero", 8, 0:
                return diverged(run)
            case "rezero", 8, 1:
                return {"error": "RuntimeError: out of memory", "traceback": "Traceback: here"}
            case "deepnorm", 16, 1:
                return None
        return by({"plain": 8})(run)

    four = study(("pre_ln", "plain", "rezero", "deepnorm"), (2, 8, 16), 2)
    path = write_study(tmp_path / "runs", four, outcome=mixed)
    text = told(path)
    ids = {(run.condition.scheme, run.condition.depth, run.seed): run.id for run in planned(path, four)}
    for words in (
        "diverged 1/1, 1 error", "1/1 above chance, 1 unfinished", "error: RuntimeError: out of memory (seed 1)",
        "rezero trains above chance in part of its runs (0 of 1 at depth 8)", "at chance: final training loss 0.693",
        "22 of 24 runs finished", "1 run ended with an error of the program",
    ):  # fmt: skip
        assert words in text, words
    assert all(ids[key] in text for key in [("plain", 8, 0), ("plain", 16, 1), ("rezero", 8, 0), ("rezero", 8, 1)])
    rows = {row["run"]: row for setting in study_document(path)["settings"] for row in setting["runs"]}
    assert rows[ids["rezero", 8, 0]]["learned"] is False
    assert rows[ids["deepnorm", 16, 1]]["status"] == "unfinished"


def scored(table):
    """Outcomes with these scores, by scheme and seed; a seed that is not in the table has not started."""
    return lambda run: ended(run, found, 0.3) if (found := table[run.condition.scheme].get(run.seed)) else None


@pytest.mark.parametrize(
    ("table", "says"),
    [
        # pre_ln has the highest mean by its lucky seed 3 alone, and loses at every shared seed
        (
            {"pre_ln": {0: 0.60, 1: 0.61, 2: 0.62, 3: 0.99}, "rezero": {0: 0.65, 1: 0.67, 2: 0.66}},
            "At depth 8 rezero scores highest on the 3 seeds they share: its paired differences",
        ),
        # plain has too few seeds, which is no reason not to rank the others
        (
            {"pre_ln": {0: 0.6, 1: 0.61, 2: 0.62}, "rezero": {0: 0.65, 1: 0.67, 2: 0.66}, "plain": {0: 0.7, 1: 0.7}},
            "At depth 8 rezero scores highest of pre_ln and rezero: its paired differences",
        ),
        # 0.1 each, but for rounding
        (
            {"pre_ln": {0: 0.6, 1: 0.7, 2: 0.8}, "rezero": {0: 0.7, 1: 0.8, 2: 0.9}},
            "is not resolved: paired differences that are the same at every seed leave no spread to judge by",
        ),
        (
            {"pre_ln": {0: 0.6, 1: 0.7, 2: 0.8}, "rezero": {0: 0.7, 1: 0.6, 2: 0.9}},
            "the paired interval between the highest mean and at least one other includes zero",
        ),
        (
            {"pre_ln": {0: 0.6, 1: 0.7}, "rezero": {0: 0.7, 1: 0.6}},
            "by score is not resolved at so few seeds.",
        ),
    ],
)
def test_the_order_of_the_schemes_that_learn(tmp_path, table, says):
    path = write_study(tmp_path / "runs", study(tuple(table), (8,), 4), outcome=scored(table))
    assert says in told(path)


def test_the_best_is_one_of_the_schemes_that_learn(tmp_path):
    table = {"pre_ln": (0.60, 0.61, 0.62), "rezero": (0.65, 0.67, 0.66), "deepnorm": (0.90, 0.91, 0.92)}

    def uneven(run):
        lost = (run.condition.scheme, run.seed) == ("deepnorm", 0)
        return ended(run, table[run.condition.scheme][run.seed], 0.7 if lost else 0.3)

    path = write_study(tmp_path / "runs", study(tuple(table), (8,), 3), outcome=uneven)
    assert "At depth 8 rezero scores highest of pre_ln and rezero: its paired differences" in told(path)


@pytest.mark.parametrize(
    ("seeds", "gain", "says"),
    [
        (2, 0.3, "at depth 4 there are too few seeds to tell a scheme from the control (static_mix)"),
        (3, 0.0, "no scheme is shown to beat the control (static_mix) at depth 4"),
        (3, 0.3, "rezero beats the control (static_mix) at depth 4"),
    ],
)
def test_whether_a_scheme_beats_the_controls(tmp_path, seeds, gain, says):
    gains = {"pre_ln": (0, 0, 0), "static_mix": (0.01, 0, -0.01), "rezero": (gain, gain + 0.01, gain - 0.01)}
    three = study(tuple(gains), (4,), seeds)

    def outcome(run):
        return ended(run, 0.6 + 0.001 * run.seed**2 + gains[run.condition.scheme][run.seed], 0.3)

    assert says in told(write_study(tmp_path / "runs", three, outcome=outcome))


def test_a_scheme_with_too_few_seeds_is_no_reason_to_say_nothing_of_the_others(tmp_path):
    gains = {"pre_ln": (0, 0, 0), "static_mix": (0.01, 0, -0.01), "rezero": (0.3, 0.31, 0.29), "deepnorm": (0.2,)}

    def outcome(run):
        own = gains[run.condition.scheme]
        return ended(run, 0.6 + 0.001 * run.seed**2 + own[run.seed], 0.3) if run.seed < len(own) else None

    text = told(write_study(tmp_path / "runs", study(tuple(gains), (4,), 3), outcome=outcome))
    assert "rezero beats the control (static_mix) at depth 4" in text


def test_intervals_that_leave_the_panel_are_said_to(tmp_path):
    def wide(run):
        return ended(run, (0.5, 0.9, 0.7)[run.seed])

    path = write_study(tmp_path / "runs", study(("pre_ln",), (2,), 3), outcome=wide)
    notes = Page(html(study_document(path))).texts("p", class_="note")
    assert any("Intervals that leave the panel are cut off at its edge." in note for note in notes)


@pytest.mark.parametrize(
    ("gain", "says"),
    [((0.1, 0.11, 0.12), "finds rezero better."), ((0.1, -0.1, 0.0), "detects none."), ((0.1,) * 3, "spread")],
)
def test_one_comparison_is_called_one(tmp_path, gain, says):
    def outcome(run):
        return ended(run, 0.6 + (run.condition.scheme == "rezero") * gain[run.seed], 0.3)

    text = told(write_study(tmp_path / "runs", study(("pre_ln", "rezero"), (8,), 3), outcome=outcome))
    (line,) = [line for line in text.splitlines() if line.startswith("The one declared comparison")]
    assert line.startswith("The one declared comparison, rezero with pre_ln at depth 8 by score,")
    assert says in line


def test_no_minus_is_a_hyphen(written):
    """In numbers of the page; names and commands may have them."""
    _, page = written
    texts = [*page.texts("td", class_="num"), *page.texts("p"), *page.texts("li")]
    assert any("−0." in text for text in texts)
    assert not [text for text in texts if re.search(r"(?<!\w)-\d", text)]


def test_chance_and_losses_far_above_it_are_told_apart(tmp_path):
    losses = {"pre_ln": 0.2, "plain": 0.7, "post_ln": 7.3}

    def far(run):
        return ended(run, 0.5, losses.get(run.condition.scheme, (0.7, 7.3)[run.seed % 2]))

    path = write_study(tmp_path / "runs", study((*losses, "identity"), (2, 8), 2), outcome=far)
    text = told(path)
    for words in (
        "At chance: 0.68 or more, which is 98% of the loss of a constant guess (0.693).",
        "Worse than chance: above 1.5 times 0.68.", "plain is at chance from depth 2 on",
        "post_ln is worse than chance from depth 2 on", "identity failed from depth 2 on", "worse than chance 0/2",
        "worse than chance: final training loss 7.300", "0/2 above chance",
    ):  # fmt: skip
        assert words in text, words
    page = Page(html(study_document(path)))
    assert "Dotted: the constant guess, 0.693. Above 0.80: drawn at the top." in page.texts("p", class_="note")
    above = [note for note in page.texts("p", class_="note") if note.startswith("With a run that ends above the panel")]
    assert len(above) == 2
    assert all("post_ln" in note and "plain" not in note for note in above)


def test_no_claim_reaches_beyond_the_depths_a_scheme_finished(tmp_path):
    studies = [study(("pre_ln",), (2, 8, 32)), study(("plain", "rezero"), (2, 8))]
    text = told(write_study(tmp_path / "runs", *studies, outcome=by({"plain": 8})))
    assert "plain is at chance at depth 8, the deepest it finished" in text
    assert "rezero trains above chance at depth 8, the deepest it finished" in text


def test_the_token_cosine_is_compared_with_the_outcome_in_counts(tmp_path):
    def outcome(run):
        fails = run.condition.scheme == "plain"
        cosine = 0.99999 if fails else 0.3
        return by({"plain": 2})(run) | {"diagnostics": {"token_cosine": cosine}}

    text = told(write_study(tmp_path / "runs", study(("pre_ln", "plain"), (2,), 3), outcome=outcome))
    assert "of 3 runs with a token cosine of 0.9998 or more at initialisation, 3 failed to learn" in text
    assert "of 3 runs with one of 0.995 or less, 3 learned" in text
    assert "of 0 run" not in text


def test_regression_has_no_chance_line_and_no_claim_of_learning(tmp_path):
    def outcome(run):
        if (run.condition.scheme, run.seed) == ("plain", 2):
            return diverged(run)
        return ended(run, 0.6 + 0.01 * run.seed)

    text = told(write_study(tmp_path / "runs", study(("pre_ln", "plain"), (2, 8), 3, tasks=("stsb",)), outcome=outcome))
    assert "mean scores at depth 8 run from" in text
    assert "at chance" not in text
    assert "What a constant guess gets as training loss is not known on stsb" in text


@pytest.mark.parametrize(("majority", "threshold"), [(0.985, "0.0763"), (0.9995, "0.00421"), (0.512, "0.68")])
def test_a_constant_guess_never_learns(tmp_path, majority, threshold):
    guess = -sum(p * math.log(p) for p in (majority, 1 - majority))

    def skewed(run):
        share = 1.0 if run.condition.scheme == "plain" else 0.97
        return ended(run, majority, share * guess, metrics={"accuracy": majority, "majority": majority})

    text = told(write_study(tmp_path / "runs", study(("pre_ln", "plain"), (2,)), outcome=skewed))
    assert f"Above chance: final training loss below {threshold}." in text
    assert "pre_ln trains above chance at depth 2" in text
    assert "plain is at chance at depth 2" in text


def test_what_is_unequal_is_a_caveat(tmp_path):
    def outcome(run):
        deep, other = run.condition.depth == 8, run.condition.scheme == "rezero"
        flags = ["micro_batch_halved"] if deep and other else ["at_chance"] * other
        size = {"parameters": 12_000 if other else 10_000}
        provenance = {"git": "9999" if deep else "0123", "dirty": deep, "torch": "2.13"}
        return ended(run, 0.8, flags=flags, cost=size, provenance=provenance)

    deep = study(("pre_ln", "rezero"), (8,), settings=Settings(width=32, steps=50, warmup=0.0))
    path = write_study(tmp_path / "runs", study(("pre_ln", "rezero"), (2,)), deep, outcome=outcome)
    document = study_document(path)
    caveats = document["caveats"]
    assert [test["unequal"] for test in document["settings"][0]["comparisons"] if test["primary"]] == [0, 1]
    assert "; 1 pair unequal, see caveats" in told(path)
    for words in (
        "1 run had to take batches in smaller pieces, for want of memory: pairs with it are not quite equal.",
        "Arms of a depth differ in parameters by up to 20% (at depth 8)",
        "The runs were not all made with the same git",
        "Some runs were made with code changed", "steps differs between depths: a change with depth can come from it.",
        "1 run with a training loss below chance answered the validation split no better than chance",
        "One task (sentiment)", "One learning rate (1e-3)", "One weight initialisation (xavier)",
    ):  # fmt: skip
        assert any(words in text for text in caveats), words


def test_studies_that_declare_different_things_say_so(tmp_path):
    first = study(("pre_ln", "rezero"), (2,))
    second = study(("pre_ln", "rezero"), (8,), endpoint="train_loss", baseline="rezero")
    document = study_document(write_study(tmp_path / "runs", first, second, outcome=lambda run: ended(run, 0.8)))
    assert document["endpoint"] == "train_loss"
    assert {setting["baseline"] for setting in document["settings"]} == {"rezero"}
    assert (
        "The studies here declare different endpoints (score and train_loss): the last one's is primary."
        in (document["caveats"])
    )


# --- studies that are not what they should be


@pytest.mark.parametrize("diagnostics", [{}, {"token_cosine": 1.0000001, "gradient_norms": [0.0, 0.0, 0.0]}])
def test_what_was_measured_may_be_missing_or_degenerate(tmp_path, diagnostics):
    bare = {"diagnostics": diagnostics, "loss_curve": [], "cost": {}, "metrics": {}, "provenance": {}}
    path = write_study(tmp_path / "runs", study(("pre_ln",), (2,)), outcome=lambda run: ended(run, 0.8, **bare))
    page = write_report(path).read_text("utf-8")
    assert "pre_ln trains above chance at depth 2" in Page(page).text
    assert "Gradient norm" not in page
    assert "Cost" not in Page(page).texts("h3")


def test_nothing_finished_is_told_and_the_exit_is_not_zero(tmp_path, capsys):
    path = write_study(tmp_path / "runs", study(("pre_ln", "plain"), (2, 8), 2), outcome=lambda run: None)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 1
    assert "resformer: no run is finished (8 planned): there is nothing to report yet" in capsys.readouterr().err
    page = Page((tmp_path / "out" / "report.html").read_text("utf-8"))
    assert "no run has finished yet" in page.text
    assert "0 of 8 runs finished" in page.text
    assert page.texts("li")[-1] == "No run has finished: there is nothing to conclude yet."
    assert not list((tmp_path / "out").glob("*.svg"))


def test_every_run_failed(tmp_path, capsys):
    def failed(run):
        return {"error": "OSError: disk full"}

    path = write_study(tmp_path / "runs", study(("pre_ln",), (2,)), outcome=failed)
    with pytest.raises(SystemExit):
        main(["report", str(path)])
    assert "no run is finished (1 planned, 1 failed)" in capsys.readouterr().err
    assert "error: OSError: disk full" in Page((path / "report.html").read_text("utf-8")).text


def test_the_command_says_where_the_report_is(tmp_path, capsys):
    path = write_study(tmp_path / "runs", study(("pre_ln",), (2,)), outcome=lambda run: ended(run, 0.8))
    with pytest.raises(SystemExit) as stop:
        main(["report", str(path)])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"report: {path / 'report.html'}\n"


def test_the_command_says_what_does_not_count_and_what_is_missing(tmp_path, capsys):
    three = study(("pre_ln",), (2,), 3)
    path = write_study(tmp_path / "runs", three, outcome=lambda run: ended(run, 0.8) if run.seed < 2 else None)
    first, second, third = (path / "runs" / run.id for run in planned(path, three))
    (first / "result.json").write_text("{")
    (path / "runs" / "stranger").mkdir()
    (second / "result.json").rename(path / "runs" / "stranger" / "result.json")
    put(path, planned(path, three)[1], ended(planned(path, three)[1], 0.8))
    (second / "rejected-1.json").write_text("{")
    third.mkdir()
    with open(third / "log.txt", "w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # as a worker of another process holds it
        with pytest.raises(SystemExit) as stop:
            main(["report", str(path)])
    assert stop.value.code == 0
    bad, moved, partial = capsys.readouterr().err.splitlines()
    names = sorted([first.name, "stranger"])
    assert bad.startswith(f"resformer: 2 result files do not count: runs/{names[0]}: result.json ")
    assert "; 1 more. `resformer compare` into the folder moves those of its runs to rejected-N.json" in bad
    aside = f"runs/{second.name}/rejected-1.json"
    assert moved == f"resformer: 1 result file did not count and was moved aside: {aside}"
    assert partial == (
        "resformer: 2 of 3 runs have no result yet, 1 under way in another process: the report is partial"
    )
    caveats = study_document(path)["caveats"]
    assert "2 result files cannot be read or belong elsewhere, and are not counted." in caveats
    assert "1 result file did not count and was moved aside, to rejected-1.json of a run." in caveats


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no study"):
        write_report(tmp_path)


def test_reading_a_study_needs_no_torch(tmp_path):
    path = write_study(tmp_path / "runs", study(("pre_ln",), (2,)), outcome=lambda run: ended(run, 0.8))
    code = f"""
import sys
from pathlib import Path
from resformer.study.report import write_report
write_report(Path({str(path)!r}))
print([name for name in ("torch", "transformers", "datasets", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
