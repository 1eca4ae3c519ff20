"""The theory suite: that laws can fail, that what is measured is computed, and what is printed and written."""

import csv
import dataclasses
import json
import math
import pickle
import xml.etree.ElementTree

import pytest
import torch
from rich.console import Console

from resformer import cli
from resformer.diagnostics.small_nets import BatchNorm, perceptrons
from resformer.theory import claim as registry
from resformer.theory import run
from resformer.theory.claim import Curve, Law, Measured, claims, each, find_claim, judge
from resformer.theory.claims.decomposition import through_norms
from resformer.theory.claims.ensemble import deleted
from resformer.theory.claims.shattering import correlation
from resformer.theory.report import write_theory
from resformer.theory.run import Outcome, run_claim, run_claims
from resformer.theory.table import number, table
from resformer.theory.teacher import CHANCE, Classifier, Examples, train

FAST = [name for name, one in claims().items() if one.seconds <= 2]
SLOW = [name for name in claims() if name not in FAST]
LAWS = [(name, law) for name, one in claims().items() for law in one.laws]


@pytest.fixture
def resformer(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main(["theory", *(str(argument) for argument in arguments)])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        return (code, *capsys.readouterr())

    return run


def printed(outcomes) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(outcomes, explain=True))
    return console.export_text()


def outcome(laws, values, curves=None) -> Outcome:
    one = dataclasses.replace(find_claim("decomposition"), name="made_up", laws=tuple(laws))
    return Outcome(one, Measured(values, curves or {}), judge(laws, values), 1.0)


@pytest.mark.parametrize("name", FAST)
def test_fast_claims_come_out_as_expected(name):
    before = torch.random.get_rng_state()
    found = run_claim(name)
    assert found.expected, printed([found])
    assert torch.equal(torch.random.get_rng_state(), before)
    for values in found.measured.values.values():
        assert len(values) == found.claim.seeds


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_all_other_claims_come_out_as_expected(name):
    found = run_claim(name)
    assert found.expected, printed([found])


@pytest.mark.parametrize("one", claims().values(), ids=list(claims()))
def test_every_claim_says_what_it_is(one):
    assert "\n\n" in one.statement, "the claim, then the protocol"
    assert any(char.isdigit() for char in one.source + one.reference)
    assert one.laws
    assert one.seeds >= 10
    assert all(axis for axis in one.axes)
    assert any(not law.popular for law in one.laws)


@pytest.mark.parametrize(("name", "law"), LAWS, ids=[f"{name}-{law.quantity}" for name, law in LAWS])
def test_every_law_can_fail(name, law):
    """Just outside of the tolerance it does not hold, just inside it does; what is popular is judged the other way."""
    step = law.tolerance + 1e-9 * max(1.0, abs(law.predicted))
    outside = law.predicted - step if law.relation == "≥" else law.predicted + step
    for value, holds in ((outside, False), (law.predicted, True), (math.nan, False), (math.inf, law.relation == "≥")):
        (verdict,) = judge([law], {law.quantity: [value]})
        if math.isfinite(value):
            assert verdict.law.holds(value) is holds
            assert verdict.expected is (holds != bool(law.popular))
        else:
            assert not verdict.expected, "what is not finite is no result"


def test_words_of_a_verdict():
    values = {"q": [1.0, 3.0]}
    assert [one.word for one in judge([Law("q", 2.0, 0.0, 0.0)], values)] == ["holds"]
    assert [one.word for one in judge([Law("q", 4.0, 1.9, 0.0)], values)] == ["FAILS"]
    assert [one.word for one in judge([Law("q", 4.0, 1.9, 0.0, popular="since")], values)] == ["false"]
    assert [one.word for one in judge([Law("q", 4.0, 2.1, 0.0, popular="since")], values)] == ["TRUE?"]
    (verdict,) = judge([Law("q", 2.0, 0.0, 0.0)], values)
    assert verdict.mean == 2.0
    assert verdict.deviation == pytest.approx(2**0.5)
    assert judge([Law("q", 2.0, 0.0, 0.0)], {"q": [2.0]})[0].deviation is None
    with pytest.raises(ValueError, match="nothing was measured for 'other'; measured: q"):
        judge([Law("other", 2.0, 0.0, 0.0)], values)


def test_a_wrong_law_is_found_out():
    """The exponent of another law, and the right law of another network."""
    plain, residual = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        plain.append(correlation(4, "plain", {"norm": BatchNorm, "placement": "pre"}))
        residual.append(correlation(4, "scaled", {"norm": BatchNorm, "placement": "pre"}))
    right = next(law for law in find_claim("shattering").laws if law.quantity == "plain + BN, L=4: 2^-L")
    wrong = dataclasses.replace(right, predicted=0.75**4)
    assert judge([right], {right.quantity: plain})[0].word == "holds"
    assert judge([wrong], {right.quantity: plain})[0].word == "FAILS"
    assert judge([right], {right.quantity: residual})[0].word == "FAILS"


def test_terms_pass_norms():
    """One norm of mean 0 and σ 2 halves both terms."""
    start, branch = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, -1.0]])
    terms = through_norms(start, [branch], 0.0)
    torch.testing.assert_close(terms[0], torch.tensor([[0.5, -0.5]]))
    torch.testing.assert_close(sum(terms), torch.tensor([[1.0, -1.0]]))


def test_a_deleted_site_hands_the_stream_on():
    torch.manual_seed(0)
    net, x = perceptrons(2, 4, "identity", placement="none"), torch.randn(3, 4)
    with deleted([net.schemes[0]]):
        torch.testing.assert_close(net(x), x + net.sublayers[1](x))
    torch.testing.assert_close(net(x), x + net.sublayers[0](x) + net.sublayers[1](x + net.sublayers[0](x)))


def test_the_task_can_be_learned_and_is_balanced():
    examples = Examples([0, 1], 512)
    assert examples.labels.mean(1).tolist() == pytest.approx([0.5, 0.5])
    build = lambda: Classifier(2, "identity", placement="pre")
    losses = train(build, examples, [0, 1], 60, 3e-3)[1]
    assert losses[0].min() > 0.5 * CHANCE
    assert losses[-10:].mean() < 0.8 * CHANCE
    assert torch.equal(losses, train(build, examples, [0, 1], 60, 3e-3)[1])


def test_a_seed_does_not_depend_on_the_others():
    draw = each(lambda seed: ({"q": float(torch.rand(()))}, {"line": ([0, 1], [seed, seed])}))
    assert draw([3]).values["q"] == draw(range(5)).values["q"][3:4]
    assert draw([4, 5]).curves["line"] == Curve([0, 1], [[4, 4], [5, 5]])
    one = find_claim("decomposition").measure
    assert one([2]).values == {key: values[2:] for key, values in one(range(3)).values.items()}


def test_names_and_numbers_are_checked():
    with pytest.raises(ValueError, match=r"unknown claim 'shatering'\. Did you mean 'shattering'"):
        find_claim("shatering")
    with pytest.raises(ValueError, match="seeds must be a whole number of at least 1, got 0"):
        run_claim("decomposition", 0)
    with pytest.raises(ValueError, match="workers must be a whole number of at least 1, got -1"):
        run_claims(["decomposition"], workers=-1)
    with pytest.raises(AssertionError):
        registry.register("decomposition", "", "", [], seconds=1, axes=("", ""))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0625, "0.0625"), (-0.5123, "-0.512"), (1.3e-6, "1.3e-6"), (12345.0, "12345"), (math.nan, "nan")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_the_table_fits_a_terminal():
    laws = [Law(law.quantity, law.predicted, law.tolerance, 0.0, law.relation, law.popular) for _, law in LAWS]
    values = {law.quantity: [-1.234567e-5, 1.23456e-3] for law in laws}
    text = printed([outcome(laws, values)])
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(word in text for word in ("predicted", "measured", "within", "verdict", "often claimed", "FAILS"))
    assert "…" not in text, "nothing is cut"


def test_the_command(resformer, tmp_path):
    code, out, err = resformer("decomposition", "vanishing", "--report", tmp_path / "new" / "report", "--workers", "1")
    assert code == 0, out + err
    assert all(len(line) <= 80 for line in out.splitlines()[:-1])
    assert "7 predictions of 2 claims" in out
    assert "Reference: He et al. 2016" in out
    assert "decomposition is measured" in err
    folder = tmp_path / "new" / "report"
    names = {path.name for path in folder.iterdir()}
    assert names == {"theory.json", "verdicts.csv", "curves.csv", "decomposition.svg", "vanishing.svg"}
    record = json.loads((folder / "theory.json").read_text())
    assert [one["claim"] for one in record["claims"]] == ["decomposition", "vanishing"]
    assert record["torch"]
    assert all(law["verdict"] in ("holds", "false") for one in record["claims"] for law in one["laws"])
    rows = list(csv.DictReader((folder / "verdicts.csv").open()))
    assert len(rows) == 7
    assert float(rows[0]["measured"]) == record["claims"][0]["laws"][0]["measured"]
    points = list(csv.DictReader((folder / "curves.csv").open()))
    assert {"claim", "curve", "seed", "x", "y"} == set(points[0])
    assert {int(point["seed"]) for point in points} == set(range(10))
    assert xml.etree.ElementTree.parse(folder / "vanishing.svg").getroot().tag.endswith("svg")


def test_the_command_says_what_is_wrong(resformer, monkeypatch):
    code, _, err = resformer("decompositoin")
    assert code == 2
    assert "Did you mean 'decomposition'" in err
    one = find_claim("decomposition")
    wrong = dataclasses.replace(one, laws=(dataclasses.replace(one.laws[0], predicted=1.0),))
    monkeypatch.setitem(registry._CLAIMS, "decomposition", wrong)
    code, out, _ = resformer("decomposition", "--workers", "1")
    assert code == 1
    assert "FAILS" in out
    assert "1 are not as expected" in " ".join(out.split())


def test_what_a_process_sends_back_can_be_sent():
    found = pickle.loads(pickle.dumps(run._measure))("vanishing", 2)
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.slow  # starting processes takes longer than what they do here
def test_two_processes_measure_what_one_does():
    names = ["decomposition", "vanishing"]
    one, two = run_claims(names, workers=1), run_claims(names, workers=2)
    assert [a.measured for a in one] == [b.measured for b in two]
    assert [a.claim.name for a in two] == names


def test_a_report_without_curves(tmp_path):
    files = write_theory([outcome([Law("q", 1.0, 0.0, 0.0)], {"q": [1.0, math.nan]})], tmp_path)
    assert [path.name for path in files] == ["theory.json", "verdicts.csv", "curves.csv"]
    assert json.loads(files[0].read_text())["claims"][0]["laws"][0]["measured"] is None
