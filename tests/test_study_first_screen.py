"""The first screen of a report as long as a recorded study's: which scheme, to what depth, how sure, which controls."""

import html as escaping
import json
import re
import shutil
import subprocess

import pytest
from study_folders import TEN, TEN_AGAIN, Page, ended, study, ten, told, write_study

from resformer.study.document import study_document
from resformer.study.report import html


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    return study_document(write_study(tmp_path_factory.mktemp("ten") / "runs", TEN, TEN_AGAIN, outcome=ten))


@pytest.fixture(scope="module")
def page(document):
    return html(document)


def test_the_settings_with_the_most_cells_come_first_and_are_drawn(document, page):
    names = ["sst2, weight init xavier", "mnli", "sst2, weight init bert"]
    assert [setting["title"] for setting in document["settings"]] == names
    header = page[: page.index("</header>")]
    assert re.findall(r"<figcaption><b>([^<]*)</b>", header) == [f"Training loss at the end, {n}" for n in names[:2]]


def test_a_loss_below_that_of_a_constant_guess_is_not_called_learned(document, page):
    (heading,) = Page(page).texts("h1")
    assert heading.startswith(
        "Settings in which a scheme still trains above chance (final training loss below 98% of a constant guess's)"
    )
    table = Page(page).texts("table")[0]
    assert re.search(r"above chance to depth .* rezero 24 of 24: 0\.4\d\d ± 0\.\d+ −0\.0", table)
    assert "Constant guess, as training loss: 0.693 on sst2, weight init xavier, 1.099 on mnli," in Page(page).text
    (claim, *_) = document["settings"][0]["claims"]
    assert re.search(
        r"still train above chance at depth 24 \(3 of 3 seeds .*; mean training loss there 0\.4\d+ to", claim
    )


def test_declared_comparisons_are_three_groups(document):
    (found,) = [text for text in document["claims"] if "declared comparisons" in text]
    tests = [test for setting in document["settings"] for test in setting["comparisons"] if test["primary"]]
    decided = sum(test["verdict"] is not None for test in tests)
    assert found.startswith(f"Of 63 declared comparisons with pre_ln by training loss at the end {decided} find")
    unjudged = re.search(r" (\d+) are given no verdict, though all have an adjusted p-value below 0.05", found)
    left = re.search(r"In the other (\d+) that could be tested no difference is detected; \d+ of them have", found)
    assert decided + int(unjudged[1]) + int(left[1]) == 63
    assert "plain (did not learn) at depths 12 and 24 on sst2, weight init xavier" in found
    assert "post_ln (did not learn) at depth 24 on sst2" in found
    assert "show no difference" not in found


def test_a_control_that_is_ahead_of_schemes_is_said_to_be(document):
    overall = " ".join(document["claims"])
    assert re.search(
        r"Schemes above chance with a worse mean than that of a control "
        r"\[with an interval that excludes zero\]: of static_mix "
        r"6 of 6 \[1\] on sst2, weight init xavier, \d of 6", overall
    )  # fmt: skip
    best = r"Best scheme minus best control: rezero minus static_mix on sst2, weight init xavier: .*\(99\.7% interval"
    assert re.search(best, overall)
    own = document["settings"][0]["claims"]
    (ahead,) = [claim for claim in own if claim.startswith("the control static_mix has a lower mean")]
    assert ahead.endswith("than 6 of 6 schemes above chance, shown by these intervals for denseformer")
    rows = [(row["arm"], row["control"]) for row in document["settings"][0]["against_controls"]]
    assert len(rows) == len(set(rows)) == 16


@pytest.mark.parametrize(("loss", "says"), [(0.5, "worse from depth 4"), (0.2, "better from depth 4")])
def test_what_is_resolved_has_a_sign(tmp_path, loss, says):
    def outcome(run):
        base = run.condition.scheme == "pre_ln"
        return ended(run, 0.7, 0.3 + 0.001 * run.seed if base else loss + 0.002 * (run.seed - 1) ** 2)

    two = study(("pre_ln", "rezero"), (4, 8), 3, endpoint="train_loss")
    (setting,) = study_document(write_study(tmp_path / "runs", two, outcome=outcome))["settings"]
    (found,) = setting["interactions"]
    assert (found["resolved_from"], found["found"]) == (4, says)
    assert found["slope"] is not None


@pytest.mark.parametrize(("stuck", "says"), [("rezero", "did not learn"), ("pre_ln", "pre_ln did not learn")])
def test_a_cell_at_chance_is_no_gain_of_depth(tmp_path, stuck, says):
    def outcome(run):
        fails = run.condition.scheme == stuck and run.condition.depth == 8
        return ended(run, 0.7, (0.692 if fails else 0.3) + 0.001 * run.seed * (run.condition.scheme == "rezero"))

    two = study(("pre_ln", "rezero"), (2, 4, 8), 3, endpoint="train_loss")
    (setting,) = study_document(write_study(tmp_path / "runs", two, outcome=outcome))["settings"]
    (found,) = setting["interactions"]
    assert found["slope"] is None
    assert found["found"] == f"no slope: {says} at depth 8"


def test_one_comparison_without_a_verdict_has_its_reason(tmp_path):
    def outcome(run):
        fails = run.condition.scheme == "plain"
        return ended(run, 0.7, 0.692 if fails else 0.3 + 0.001 * run.seed)

    two = study(("pre_ln", "plain"), (8,), 3, endpoint="train_loss")
    text = told(write_study(tmp_path / "runs", two, outcome=outcome))
    assert "has a small p-value and is given no verdict: plain, did not learn." in text


def test_a_second_setting_of_one_task_leaves_the_tasks_together(document):
    """An axis that one task alone varies does not set the other task apart, which has one of its values."""
    found = [e for e in document["across"] if (e["arm"], e["depth"]) == ("rezero", 24)]
    (entry,) = found
    assert entry["title"] == "sst2 and mnli, weight init xavier"
    assert {e["depth"] for e in document["across"]} == {6, 12, 24}
    assert entry["statistic"] == "mean"
    assert entry["gap"]["low"] < entry["gap"]["value"] < entry["gap"]["high"]


# --- in a browser, where there is one

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
MEASURE = """
const page = document.querySelector("iframe").contentDocument, hits = [];
for (const svg of page.querySelectorAll("svg[role=img]")) {
  const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
  boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (across > 1 && down > 3) hits.push(svg.getAttribute("aria-label") + ": " + one + " on " + other);
  }));
}
const wide = page.documentElement.scrollWidth - page.documentElement.clientWidth;
document.title = JSON.stringify({texts: page.querySelectorAll("svg[role=img] text").length, wide, hits});
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_two_labels_of_a_figure_overlap(tmp_path, page, width):
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{escaping.escape(page)}"></iframe>'
    shell = tmp_path / "shell.html"
    shell.write_text(f"<!doctype html>{frame}<script>onload = () => {{{MEASURE}}}</script>", encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", shell.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    found = json.loads(escaping.unescape(re.search(r"<title>(\{.*?\})</title>", dom, flags=re.DOTALL)[1]))
    assert found["texts"] > 100
    assert found["hits"] == []
    assert found["wide"] <= 0, "the page is wider than the window"
