"""The statistics of a report, on a study whose numbers are worked out by hand."""

import math
from dataclasses import replace

import pytest
from study_folders import FULL, diverged, ended, full, study, told, write_study

from resformer.study import summary
from resformer.study.document import study_document
from resformer.study.plan import arm
from resformer.study.results import Result
from resformer.study.speed import loss_at
from resformer.study.summary import chance


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    return study_document(write_study(tmp_path_factory.mktemp("study") / "runs", FULL, outcome=full))


def one(records, **wanted):
    """The record with these values."""
    (found,) = [record for record in records if all(record[key] == value for key, value in wanted.items())]
    return found


def test_paired_differences_with_intervals_and_holm(document):
    sentiment, agreement = document["settings"]
    # gains 0.04, 0.05, 0.06: mean 0.05, sd 0.01, t_{0.975, 2} = 4.302653; for 2 degrees p = 1 - t / sqrt(t^2 + 2)
    test = one(agreement["comparisons"], arm="rezero", depth=12, endpoint="score")
    assert test["gap"]["mean"] == pytest.approx(0.05)
    assert test["gap"]["high"] - test["gap"]["mean"] == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert test["p"] == pytest.approx(1 - math.sqrt(75 / 77), rel=1e-6)
    # 18 declared tests: 3 arms x 3 depths x 2 tasks; this p-value is the smallest, twice
    assert sum(test["primary"] for setting in document["settings"] for test in setting["comparisons"]) == 18
    assert test["adjusted"] == pytest.approx(18 * (1 - math.sqrt(75 / 77)), rel=1e-6)
    assert one(sentiment["comparisons"], arm="rezero", depth=12, endpoint="score")["adjusted"] == test["adjusted"]
    # gains 0.07, 0.08, 0.12: the third smallest
    t2 = 3 * 0.09**2 / (0.0014 / 2)
    third = one(agreement["comparisons"], arm="rezero", depth=24, endpoint="score")
    assert third["adjusted"] == pytest.approx(16 * (1 - math.sqrt(t2 / (t2 + 2))), rel=1e-6)
    assert (third["stars"], third["verdict"], third["primary"]) == ("", None, True)
    assert test["sentence"] == "+0.050 (95% interval +0.025 to +0.075, n=3)"
    equal = one(agreement["comparisons"], arm="pre_ln + wider ffn", depth=6, endpoint="score")
    assert equal["sentence"].startswith("no detectable difference (95% interval −0.025 to +0.025, n=3, detectable 0.0")


def test_the_other_endpoint_is_exploratory(document):
    tests = [test for setting in document["settings"] for test in setting["comparisons"] if not test["primary"]]
    assert {test["endpoint"] for test in tests} == {"train_loss"}
    # Benjamini and Hochberg: the two smallest p-values of 18 are equal, so each becomes 18 p / 2
    smallest = one(document["settings"][1]["comparisons"], arm="rezero", depth=12, endpoint="train_loss")
    assert smallest["gap"]["mean"] == pytest.approx(-0.05)
    assert smallest["adjusted"] == pytest.approx(9 * (1 - math.sqrt(75 / 77)), rel=1e-6)


def test_what_was_not_planned_is_no_test(tmp_path):
    # pre_ln went one depth further than rezero: depths 4 and 8 are compared, and resolve; 16 is not held against it
    studies = [study(("pre_ln", "rezero"), (4, 8), 3), study(("pre_ln",), (16,), 3)]

    def outcome(run):
        gain = (0.1, 0.11, 0.12)[run.seed] if run.condition.scheme == "rezero" else 0
        return ended(run, 0.7 + gain)

    (setting,) = study_document(write_study(tmp_path / "runs", *studies, outcome=outcome))["settings"]
    tests = [test for test in setting["comparisons"] if test["primary"]]
    assert [test["depth"] for test in tests] == [4, 8]
    p = tests[0]["p"]
    assert tests[0]["adjusted"] == pytest.approx(2 * p)
    assert setting["interactions"][0]["resolved_from"] == 4


def test_a_run_that_diverged_counts_as_a_constant_guess_and_as_failed(document):
    cell = one(document["settings"][0]["cells"], arm="rezero", depth=24)
    assert cell["score"]["mean"] == pytest.approx((0.87 + 0.89 + 0.5) / 3)
    assert cell["train_loss"]["mean"] == pytest.approx((0.13 + 0.11 + math.log(2)) / 3)
    gap = one(document["settings"][0]["comparisons"], arm="rezero", depth=24, endpoint="score")["gap"]
    assert (gap["mean"], gap["n"]) == (pytest.approx((0.07 + 0.08 - 0.32) / 3), 3)
    assert gap["sd"] == pytest.approx(0.2281081, rel=1e-6)
    # Wilson: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) with p = 1/3, n = 3, z = 1.959964
    rate = cell["failures"]
    assert (rate["failed"], rate["n"]) == (1, 3)
    assert (rate["low"], rate["high"]) == (pytest.approx(0.061492, abs=1e-6), pytest.approx(0.792340, abs=1e-6))
    assert cell["verdict"] == "2/3 above chance, 1 diverged"


def test_depth_and_scheme(document):
    sentiment, agreement = (setting["interactions"] for setting in document["settings"])
    found = one(agreement, arm="rezero")
    # over log2 of 6, 12, 24 the slope is half of the last minus the first: 0.03, 0.03, 0.045
    assert found["slope"]["mean"] == pytest.approx(0.035)
    half = 4.302653 * math.sqrt(0.00015 / 2) / math.sqrt(3)
    assert found["slope"]["high"] - found["slope"]["mean"] == pytest.approx(half, rel=1e-6)
    # Over three arms the intervals are at 1 - 0.05 / 3: t_{0.99167, 2} = 7.65, so half of it is 0.117 at depth 24
    # around 0.09, and 0.044 at depth 12 around 0.05: nothing is resolved from there on at every greater depth.
    assert (found["resolved_from"], found["found"]) == (None, "none found")
    assert one(sentiment, arm="rezero")["found"] == "none found"  # the interval at depth 24 is wide


def test_across_tasks(document):
    # (score - 0.5) / 0.5 is 0.62, 0.66, 0.70 on either task, and of the baseline 0.60, 0.62, 0.64
    entry = one(document["across"], arm="rezero", depth=6)
    assert (entry["value"]["value"], entry["value"]["runs"]) == (pytest.approx(0.66), 3)
    assert entry["gap"]["value"] == pytest.approx(0.04)
    # t_{0.975, 2} = 4.302653; the seeds' differences are 0.02, 0.04, 0.06
    assert entry["gap"]["low"] == pytest.approx(0.04 - 4.302653 * 0.02 / math.sqrt(3), abs=1e-6)
    assert one(document["across"], arm="pre_ln", depth=6)["gap"] is None
    assert not [e for e in document["across"] if (e["arm"], e["depth"]) == ("static_mix", 24)]  # not in both
    assert "Of fewer than 4 tasks: the mean over tasks and seeds" in document["across_note"]


def test_ten_seeds_have_a_bootstrap_interval_with_its_coverage(tmp_path):
    ten = study(("pre_ln", "rezero"), (2,), 10, tasks=("sentiment", "agreement", "sst2", "rte"))
    gain = {"pre_ln": 0.0, "rezero": 0.03}

    def outcome(run):
        return ended(run, 0.8 + gain[run.condition.scheme] + 0.003 * (run.seed * 7 % 10))

    found = study_document(write_study(tmp_path / "runs", ten, outcome=outcome))
    gap = one(found["across"], arm="rezero")["gap"]
    assert gap["low"] <= gap["value"] <= gap["high"]
    assert gap["value"] == pytest.approx(0.06)
    assert (
        "In simulations of 8 tasks the nominal 95% bootstrap interval covered the truth in 94%" in found["across_note"]
    )


def test_convergence(document):
    speed = document["settings"][0]["speed"]
    # at three quarters the losses of pre_ln at depth 6 are 0.30, 0.29, 0.28
    assert speed["target"] == pytest.approx(0.29)
    assert "the median run of pre_ln at depth 6 has after three quarters of its steps" in speed["words"]
    own = one(speed["cells"], arm="pre_ln", depth=6)
    assert (own["median"], own["reached"], own["n"]) == (75, 3, 3)  # steps 75, 75, 100
    assert [at["mean"] for at in own["at"]] == pytest.approx([0.49, 0.39, 0.29, 0.19])
    lost = one(speed["cells"], arm="rezero", depth=24)
    assert (lost["median"], lost["reached"], lost["n"]) == (75, 2, 3)
    # the run that diverged has 0.8 and 2.5 in its curve, and then the loss of a constant guess
    ends = [(0.43 + 0.41 + 0.8) / 3, (0.33 + 0.31 + 2.5) / 3]
    ends += [(a + b + math.log(2)) / 3 for a, b in ((0.23, 0.21), (0.13, 0.11))]
    assert [at["mean"] for at in lost["at"]] == pytest.approx(ends)


def test_there_is_no_target_where_the_baseline_does_not_learn(tmp_path):
    never = study(("pre_ln", "rezero"), (2, 8), 2)
    path = write_study(tmp_path / "runs", never, outcome=lambda run: ended(run, 0.5, 0.69))
    speed = study_document(path)["settings"][0]["speed"]
    assert speed["target"] is None
    assert {cell["median"] for cell in speed["cells"]} == {None}


def test_a_curve_in_epochs_ends_where_the_others_do(tmp_path):
    from resformer.study.apart import split
    from resformer.study.reading import read_runs
    from resformer.study.settings import Settings

    epochs = study(("pre_ln",), (2,), 2, settings=Settings(width=32))
    path = write_study(tmp_path / "runs", epochs, outcome=lambda r: diverged(r) if r.seed else ended(r, 0.8))
    (setting,) = split(read_runs(path).runs)
    ok, lost = setting.finished
    assert loss_at(ok, 0.75, setting) == pytest.approx(0.3)
    assert loss_at(lost, 0.5, setting) == 2.5
    assert loss_at(lost, 1.0, setting) is None


def test_learning_rates(document):
    grids = document["settings"][0]["learning_rates"]
    assert len(grids) == 12
    grid = one(grids, arm="rezero", depth=12)
    assert (grid["chosen"], grid["edge"], grid["diverged"]) == (3e-3, None, [1e-2])
    assert grid["values"] == {"0.001": 0.7, "0.003": 0.8, "0.01": 0.5}
    assert grid["drop"] == pytest.approx(0.3)
    assert one(grids, arm="static_mix", depth=12)["edge"] == "largest"
    assert one(document["settings"][0]["cells"], arm="static_mix", depth=12)["learning_rates"] == [1e-2]


def test_the_rates_of_a_study_of_training_loss_are_shown_by_the_loss_on_the_slice(tmp_path):
    def outcome(run):
        return ended(run, 0.6) | {"metrics": {"loss": 0.4 if run.learning_rate == 1e-3 else 0.9}}

    two = study(("pre_ln",), (2,), learning_rates=(1e-3, 1e-2), endpoint="train_loss")
    (grid,) = study_document(write_study(tmp_path / "runs", two, outcome=outcome))["settings"][0]["learning_rates"]
    assert grid["values"] == {"0.001": 0.4, "0.01": 0.9}
    assert (grid["chosen"], grid["best"], grid["edge"]) == (1e-3, 1e-3, "smallest")


@pytest.mark.parametrize("endpoint", ["score", "train_loss"])
def test_better_is_higher_for_a_score_and_lower_for_a_loss(tmp_path, endpoint):
    gains = {"pre_ln": 0.0, "rezero": 0.1, "plain": -0.1, "static_mix": 0.02}

    def outcome(run):
        return ended(run, 0.7 + 0.01 * run.seed + gains[run.condition.scheme] + 0.001 * (run.seed * 3 % 7))

    six = study(tuple(gains), (4,), 6, endpoint=endpoint)
    jitter = {"rezero": 1, "plain": 2, "static_mix": 3, "pre_ln": 0}

    def noisy(run):
        own = jitter[run.condition.scheme]
        return ended(run, 0.7 + gains[run.condition.scheme] + 0.001 * (run.seed * (own + 3) % 7) + 0.01 * run.seed)

    path = write_study(tmp_path / "runs", six, outcome=noisy)
    found = study_document(path)
    tests = {t["arm"]: t for t in found["settings"][0]["comparisons"] if t["primary"]}
    assert {name: t["verdict"] for name, t in tests.items()} == {
        "rezero": "better",
        "plain": "worse",
        "static_mix": "better",
    }
    assert tests["rezero"]["endpoint"] == endpoint
    assert tests["rezero"]["stars"] == "***"
    text = told(path)
    what = {"score": "rezero scores highest", "train_loss": "rezero has the lowest training loss at the end"}[endpoint]
    assert what in text
    assert "rezero beats the control (static\\_mix) at depth 4" in text.replace("static_mix", "static\\_mix")


def test_below_three_seeds_there_is_no_interval_and_no_test(tmp_path):
    pair = study(("pre_ln", "rezero"), (2,), 2)
    found = study_document(write_study(tmp_path / "runs", pair, outcome=lambda r: ended(r, 0.8 + 0.01 * r.seed)))
    test = found["settings"][0]["comparisons"][0]
    assert (test["gap"]["low"], test["p"], test["adjusted"], test["detectable"]) == (None,) * 4
    assert test["sentence"] == "+0.000 (exploratory: n=2, no interval)"
    assert "cannot be tested at so few seeds" in found["claims"][0]


@pytest.mark.parametrize(
    ("task", "majority", "score", "loss"),
    [
        ("sst2", 0.51, 0.51, -0.51 * math.log(0.51) - 0.49 * math.log(0.49)),
        ("mnli", 0.35, 0.35, math.log(3)),
        ("cola", 0.69, 0.0, -0.69 * math.log(0.69) - 0.31 * math.log(0.31)),
        ("mrpc", 0.68, (0.68 + 2 * 0.68 / 1.68) / 2, -0.68 * math.log(0.68) - 0.32 * math.log(0.32)),
        ("qqp", 0.63, 0.63 / 2, -0.63 * math.log(0.63) - 0.37 * math.log(0.37)),
        ("stsb", 0.2, 0.0, None),
    ],
)
def test_what_a_constant_guess_gets(task, majority, score, loss, tmp_path):
    name = "majority_matched" if task == "mnli" else "majority"
    found = chance(task, [Result(tmp_path, {}, "ok", metrics={name: majority})])
    assert (found.score, found.loss) == (pytest.approx(score), loss if loss is None else pytest.approx(loss))


def test_the_arms_of_the_study(document):
    assert [(a["name"], a["control"], a["baseline"]) for a in document["arms"]] == [
        ("pre_ln", False, True),
        ("rezero", False, False),
        ("static_mix", True, False),
        ("pre_ln + wider ffn", True, False),
    ]
    assert {arm(run) for setting in document["settings"] for run in setting["runs"]} == {
        a["name"] for a in document["arms"]
    }


def test_the_better_side_must_have_learned(tmp_path):
    """Diverged runs count as a constant guess, which is a little better than nets that are stuck."""

    def outcome(run):
        if run.condition.scheme == "rezero":
            return {"status": "diverged", "score": None, "train_loss": None}
        return ended(run, 0.5, 0.694 + 0.0002 * (run.seed % 2))

    planned = study(("pre_ln", "rezero"), (8,), 6, endpoint="train_loss")
    (setting,) = study_document(write_study(tmp_path / "runs", planned, outcome=outcome))["settings"]
    (test,) = [test for test in setting["comparisons"] if test["primary"]]
    assert test["adjusted"] < 0.05
    assert test["verdict"] is None


@pytest.mark.parametrize(("seeds", "verdict"), [(3, None), (6, "worse")])
def test_failures_of_few_pairs_are_no_verdict(tmp_path, seeds, verdict):
    planned = study(("pre_ln", "rezero"), (8,), seeds, endpoint="train_loss")

    def outcome(run):
        stuck = run.condition.scheme == "rezero"
        return ended(run, 0.5 if stuck else 0.8, 0.693 if stuck else 0.3 + 0.01 * run.seed)

    document = study_document(write_study(tmp_path / "runs", planned, outcome=outcome))
    (test,) = [test for test in document["settings"][0]["comparisons"] if test["primary"]]
    assert test["adjusted"] < 0.05
    assert test["verdict"] == verdict
    assert any("is given no verdict" in caveat for caveat in document["caveats"]) == (verdict is None)


def test_a_constant_answer_has_not_learned(tmp_path):
    stuck = Result(tmp_path, {}, "ok", 0.5, 0.6, flags=["constant_prediction"])
    assert summary.outcome(stuck, 0.68) == "chance"
    assert summary.outcome(replace(stuck, flags=[]), 0.68) == "learned"


def test_chance_is_that_of_the_training_data(tmp_path):
    shares = {"class_shares": [0.2956, 0.7044]}  # of CoLA; of its validation split 0.309
    found = chance("cola", [Result(tmp_path, {}, "ok", metrics={"majority": 0.691}, diagnostics=shares)])
    assert found.loss == pytest.approx(-0.2956 * math.log(0.2956) - 0.7044 * math.log(0.7044))
    assert found.threshold == pytest.approx(0.595, abs=6e-3)
    assert found.score == 0.0
