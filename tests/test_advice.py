"""Advice before training, and what is known of its worth: the rule, its test, the study it comes from, the table."""

import csv
import json
import math
import xml.etree.ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau
from study_folders import ended, study, write_study

from resformer import cli
from resformer.advice import recorded
from resformer.advice.advise import Row, ranked
from resformer.advice.calibration import Calibration, HeldOut, Point, Rule, calibrate, split, tau
from resformer.advice.predictors import rate, spread
from resformer.study.settings import Settings

SCHEMES = [f"s{number}" for number in range(8)]


@pytest.fixture
def resformer(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        return (code, *capsys.readouterr())

    return run


def points(loss, schemes=SCHEMES, depths=(6, 12, 24), tasks=("a", "b")) -> list[Point]:
    """`good` is the number of the scheme, `noise` is not; `loss(number, depth)`, failed from 0.9 on."""
    noise = np.random.default_rng(0).permutation(len(schemes))
    return [
        Point(
            task,
            depth,
            scheme,
            {"good": [number - 0.1, number + 0.1], "noise": [float(noise[number])]},
            [loss(number, depth)] * 2,
            float(loss(number, depth) >= 0.9),
        )
        for task in tasks
        for depth in depths
        for number, scheme in enumerate(schemes)
    ]


def found(some) -> Calibration:
    return calibrate(some, np.random.default_rng(0))


def test_rank_correlation():
    generator = np.random.default_rng(0)
    x, y = generator.integers(5, size=(2, 9)).astype(float)
    assert tau(x, y) == pytest.approx(kendalltau(x, y).statistic)
    assert tau(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.0])) == pytest.approx(-1 / 3)
    assert tau(np.array([1.0, math.inf, math.inf]), np.array([1.0, 2.0, 2.0])) == pytest.approx(1.0)
    assert tau(np.ones(3), np.arange(3.0)) == 0.0


def test_a_predictor_that_tells_is_found_and_holds():
    one = found(points(lambda number, depth: number / 8 + depth / 100))
    assert (one.rule.predictor, one.rule.worse, one.rule.agreement) == ("good", "high", pytest.approx(1.0))
    assert one.chosen_on == (6, 12)
    assert (one.test.depth, one.test.tau, one.test.schemes) == (24, pytest.approx(1.0), tuple(SCHEMES))
    assert one.test.p < 0.001
    assert one.test.predicts
    assert one.test.shallower == pytest.approx(1.0)
    assert 6.5 <= one.rule.threshold <= 7.5, "failed at 6 and 12: number 7 alone"
    assert one.test.counts["failed, foretold"] == 2
    assert one.test.counts["failed, not foretold"] == 2, "at 24 number 6 failed as well"
    assert one.test.accuracy == pytest.approx(0.75)


def test_the_side_that_is_worse_is_part_of_the_rule():
    one = found(points(lambda number, depth: -number / 8))
    assert one.rule.worse == "low"
    assert one.test.tau == pytest.approx(1.0)
    assert one.rule.threshold is None, "nothing failed"
    assert one.test.accuracy is None


def test_what_holds_at_small_depths_alone_is_not_believed():
    turned = found(points(lambda number, depth: number / 8 if depth < 24 else -number / 8))
    assert turned.rule.predictor == "good"
    assert turned.test.tau == pytest.approx(-1.0)
    assert turned.test.p > 0.99
    assert not turned.test.predicts
    generator = np.random.default_rng(3)
    drawn = generator.permutation(8)
    by_chance = found(points(lambda number, depth: number / 8 if depth < 24 else drawn[number] / 8))
    assert by_chance.rule == turned.rule, "the greatest depth has no part in the choice"
    assert not by_chance.test.predicts


def test_the_p_value_is_that_of_permutations():
    """Five schemes in the right order: of 120 permutations each of the two predictors orders them in two, up and down,
    whatever the number of tasks, which are permuted together."""
    one = found(points(lambda number, depth: number / 8, SCHEMES[:5]))
    assert one.test.p == pytest.approx(4 / 120, rel=0.2)


def test_failing_from_training_is_less_than_an_order():
    """Three of eight fail and have the largest numbers; among the others the order is the wrong way round."""
    some = points(lambda number, depth: 1.0 if number >= 5 else (4 - number) / 10)
    one = found([replace(point, predictors={"good": point.predictors["good"]}) for point in some])
    assert one.rule.worse == "high"
    assert one.test.trained == pytest.approx(-1.0)
    assert one.test.trained_p > 0.9
    assert not one.test.orders
    ordered = found(points(lambda number, depth: 1.0 if number >= 5 else number / 10))
    assert ordered.test.trained == pytest.approx(1.0)
    assert ordered.test.trained_p == pytest.approx(1 / 120, rel=0.3)
    assert ordered.test.orders
    most = found(points(lambda number, depth: 1.0 if number >= 2 else 0.0))
    assert most.test.trained is None, "two schemes are no order"


def test_a_scheme_that_is_not_everywhere_is_left_out():
    some = [p for p in points(lambda number, depth: number / 8) if (p.scheme, p.task, p.depth) != ("s3", "b", 6)]
    assert found(some).test.schemes == tuple(one for one in SCHEMES if one != "s3")
    with pytest.raises(ValueError, match=r"there are runs at depths \[6\] alone"):
        found(points(lambda number, depth: number, depths=(6,)))
    with pytest.raises(ValueError, match="4 schemes have finished runs on every task and depth"):
        found(points(lambda number, depth: number, SCHEMES[:4]))


def test_a_threshold():
    rule = Rule("good", "high", 1.0, None, None)
    some = points(lambda number, depth: 1.0 if number >= 5 else 0.0, depths=(6,), tasks=("a",))
    assert split(rule, some) == (pytest.approx(4.5), 1.0)
    low = split(replace(rule, worse="low"), some)
    assert low[1] <= 0.5
    assert split(rule, points(lambda number, depth: 0.0)) == (None, None)
    assert Rule("good", "low", 1.0, 4.5, 1.0).fails(4.0)
    assert not Rule("good", "low", 1.0, 4.5, 1.0).fails(5.0)


def test_gradients_by_layer():
    assert spread([1.0, 10.0, 100.0]) == pytest.approx(2.0)
    assert rate([100.0, 10.0, 1.0]) == pytest.approx(10.0), "from the top down it grows"
    assert rate([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    for broken in ([1.0, 0.0], [1.0, math.nan], [math.inf, 1.0]):
        assert spread(broken) == rate(broken) == math.inf


def test_ranks_and_their_range():
    rows = [Row(name, {"good": own}) for name, own in {"b": [1.0, 4.0], "a": [2.0, 3.0], "c": [9.0, math.inf]}.items()]
    test = HeldOut(24, (), (), 1.0, 0.5, 1.0, 0.01, None, {}, {}, None, trained=0.9, trained_p=0.01)
    calibration = Calibration((6,), 2, Rule("good", "high", 1.0, 3.5, 1.0), test)
    made = ranked(rows, calibration)
    assert [(row.scheme, row.rank, row.best, row.worst, row.fails) for row in made] == [
        ("a", 1, 1, 2, 0.0),
        ("b", 1, 1, 2, 0.5),
        ("c", 3, 3, 3, 1.0),
    ]
    made = ranked(rows, replace(calibration, test=replace(test, trained_p=0.3)))
    assert [(row.scheme, row.rank, row.best, row.worst, row.fails) for row in made] == [
        ("a", 1, 1, 1, 0.0),
        ("b", 2, 1, 2, 0.5),
        ("c", 3, 2, 3, 1.0),
    ]


# --- on a study, with real nets at the start and made-up ends

ARMS = ("plain", "post_ln", "pre_ln", "rezero", "deepnorm")
SMALL = Settings(width=16, heads=2, steps=10, ffn_ratio=1.0)
LOSSES = dict(zip(ARMS, (0.9, 0.6, 0.5, 0.3, 0.2), strict=True))


def outcome(run, **diagnostics):
    shares = {"class_shares": [0.5, 0.5]} | diagnostics
    return ended(run, 0.8, LOSSES[run.condition.scheme] + run.seed / 100, diagnostics=shares)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration") / "study"
    plan = study(ARMS, (2, 3), 1, settings=SMALL)
    write_study(folder, plan, outcome=outcome)
    return recorded.calibrate_study(folder)


def test_the_record_of_a_study(record, tmp_path):
    assert record["conditions"]["width"] == 16
    assert record["test"]["depth"] == 3
    assert set(record["test"]["schemes"]) == set(ARMS)
    assert len(record["points"]) == 10
    cosines = {p["scheme"]: p["predictors"]["token_cosine"][0] for p in record["points"] if p["depth"] == 3}
    assert cosines["plain"] > cosines["pre_ln"] > cosines["rezero"]
    assert {p["scheme"]: p["failed"] for p in record["points"]} == {name: float(name == "plain") for name in ARMS}
    recorded.write_calibration(tmp_path / "c.json", record)
    again = recorded.read_calibration(tmp_path / "c.json")
    assert json.dumps(asdict(again.rule)) == json.dumps(record["rule"])
    assert json.dumps(asdict(again.test)) == json.dumps(record["test"])


def test_the_calibration_that_comes_along_is_of_the_recorded_study():
    """Its losses are those of the committed results, and its verdict follows from its points."""
    top = Path(__file__).parents[1]
    record = json.loads((top / "resformer" / "advice" / "calibration.json").read_text())
    with (top / "scripts" / "studies" / "depth_x_scheme" / "results.csv").open(newline="") as file:
        runs = [row for row in csv.DictReader(file) if row["tuning"] == "False" and row["extra_ffn"] == "0"]
    losses: dict[tuple[str, int, str], list[float]] = {}
    for row in sorted(runs, key=lambda row: row["seed"]):
        losses.setdefault((row["task"], int(row["depth"]), row["scheme"]), []).append(float(row["train_loss"]))
    points = [Point(**point) for point in record["points"]]
    assert {(point.task, point.depth, point.scheme): pytest.approx(point.losses) for point in points} == losses
    again = calibrate(points, np.random.default_rng(0))
    assert asdict(again.rule) == record["rule"]
    assert again.test.tau == pytest.approx(record["test"]["tau"])
    assert again.test.p == pytest.approx(record["test"]["p"])
    assert again.test.trained_p == pytest.approx(record["test"]["trained_p"])


def test_another_net_than_the_recorded_one_is_noticed(tmp_path):
    plan = study(("pre_ln",), (2,), 1, settings=SMALL)
    folder = write_study(tmp_path / "study", plan, outcome=lambda run: outcome(run, token_cosine=0.987))
    with pytest.raises(ValueError, match=r"pre_ln, depth 2, sentiment, seed 0.*the recorded one 0.987"):
        recorded.calibrate_study(folder)


def test_calibrations_that_are_none(tmp_path):
    (tmp_path / "c.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="is no calibration; `resformer study calibrate STUDY` makes one"):
        recorded.read_calibration(tmp_path / "c.json")
    with pytest.raises(ValueError, match="cannot be read"):
        recorded.read_calibration(tmp_path / "none.json")


def told(record, **changes) -> dict:
    return {**record, "test": {**record["test"], **changes}}


def test_the_command(resformer, record, tmp_path):
    schemes = [part for name in ("pre_ln", "rezero", "mhc") for part in ("--schemes", name)]
    sizes = ["advise", "--depth", 3, "--width", 16, "--heads", 2, "--seeds", 2, "--workers", 1, *schemes]
    file = tmp_path / "c.json"
    recorded.write_calibration(file, told(record, p=0.01, low=0.2, high=0.9, tau=0.6, trained=0.5, trained_p=0.02))
    code, out, err = resformer(*sizes, "--calibration", file, "--output", tmp_path / "out")
    assert code == 0, err
    assert "6 of 6 nets are measured" in err
    assert all(len(line) <= 80 for line in out.splitlines()[:-1])
    text = " ".join(out.split())
    assert "Ranked by" in text
    assert (
        "5 schemes on sentiment at depth 3, not used to choose the rule: tau 0.60 (95 % interval 0.20 to 0.90" in text
    )
    assert "2 of the 3 schemes were in the test" in text
    content = json.loads((tmp_path / "out" / "advice.json").read_text())
    assert content["ranked"]
    assert sorted(row["rank"] for row in content["schemes"]) == [1, 2, 3]
    assert (tmp_path / "out" / "advice.csv").read_text().count("\n") == 7
    assert xml.etree.ElementTree.parse(tmp_path / "out" / "advice.svg").getroot().tag.endswith("svg")

    code, out, _ = resformer(*sizes, "--calibration", file, "--weight-init", "bert")
    assert code == 0
    assert "was shown to tell how training ends from xavier weights, and these are bert" in " ".join(out.split())

    recorded.write_calibration(file, told(record, p=0.4, low=-0.3))
    code, out, _ = resformer(*sizes, "--calibration", file)
    assert code == 0
    assert "Nothing is ranked" in out
    assert "is not shown to tell it at depth 3" in " ".join(out.split())
    assert "rank " not in out.splitlines()[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--depth", 0), "depth must be a whole number of at least 1, got 0"),
        (("--depth", 2, "--schemes", "rezro"), "Did you mean 'rezero'"),
        (("--depth", 2, "--task", "sst3"), "unknown task 'sst3'"),
        (("--depth", 2, "--weight-init", "he"), "unknown weight_init 'he'"),
        (("--depth", 2, "--family", "brt"), "Did you mean 'bert'"),
        (("--depth", 2, "--seeds", 0), "seeds must be a whole number of at least 1, got 0"),
    ],
)
def test_the_command_says_what_is_wrong(resformer, options, message):
    code, _, err = resformer("advise", *options)
    assert code == 2
    assert message in " ".join(err.split())
