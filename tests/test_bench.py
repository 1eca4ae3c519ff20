"""The benchmark measures what it says; no test looks at a time."""

import itertools
import json
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from scipy.stats import quantile_test
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import resformer
from resformer.data.tasks import TASKS
from resformer.data.tokenizer import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench
from benchmark import depth, finetune, overhead, peers, pretrain, schemes, startup, steps, study
from benchmark.measuring import interleaved, interval, matrix_rate, products, ratios
from benchmark.nets import Subject, loss_of_logits
from benchmark.record import Record
from benchmark.steps import PEAK
from benchmark.stock import glue_epoch, mlm_steps
from benchmark.suite import Bench, Goal, Row, Size, Suite, choose
from benchmark.table import markdown, marked, shown

CPU = torch.device("cpu")
TINY = Size(depth=2, width=16, vocabulary=60, batch=2, length=12)


@pytest.mark.parametrize("n", range(1, 14))
def test_the_interval_is_the_narrowest_that_covers_the_median(n):
    low, high, coverage = interval(list(range(n, 0, -1)))  # the values are their ranks
    assert low + high == n + 1  # as many left out below as above

    def covered(k):  # of all ways in which n values can lie below (1) or above the median
        return np.mean([k <= sum(below) <= n - k for below in itertools.product((0, 1), repeat=n)])

    assert coverage == pytest.approx(covered(low) if n > 1 else 0.0)
    assert low == 1 or coverage >= 0.95
    assert covered(low + 1) < 0.95


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(0).lognormal(size=15)
    found = quantile_test(values, q=1, p=0.5).confidence_interval(0.95)
    low, high, coverage = interval(values)
    assert (low, high) == (found.low, found.high) == (sorted(values)[3], sorted(values)[11])
    assert coverage == pytest.approx(0.9648, abs=1e-4)


def test_ratios_are_pair_by_pair():
    found = ratios([2.0, 30.0, 1.0], [1.0, 10.0, 1.0])
    assert (found["median"], found["low"], found["high"], found["n"]) == (2.0, 1.0, 3.0, 3)


def test_pairs_are_interleaved_in_turned_order_after_the_warm_up():
    seen = []
    taken = interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3, CPU, lambda note: None)
    assert "".join(seen) == "abab" + "abbaab"
    assert [len(times) for times in taken.values()] == [3, 3]


@pytest.mark.parametrize(
    ("goal", "low", "median", "high", "mark"),
    [
        (Goal("time", most=1.05), 1.04, 1.05, 1.2, ""),
        (Goal("time", most=1.05), 1.04, 1.06, 1.2, "?"),  # the goal is in the interval
        (Goal("time", most=1.05), 1.06, 1.1, 1.2, "!"),
        (Goal("time", most=1.05), 1.053, 1.054, 1.2, ""),  # as it is shown
        (Goal("time", most=1.01, top=1.03), 1.0, 1.01, 1.03, ""),
        (Goal("time", most=1.01, top=1.03), 1.0, 1.01, 1.04, "?"),
        (Goal("time", most=1.01, top=1.03), 1.0, 1.02, 1.02, "?"),
        (Goal("time", most=1.01, top=1.03), 1.02, 1.02, 1.02, "!"),
        (Goal("time", most=1.05, least=0.95), 0.8, 0.9, 0.94, "!"),
        (Goal("time", least=1.5), 1.2, 1.5, 1.6, ""),
        (Goal("time", least=1.5), 1.2, 1.4, 1.5, "?"),
        (Goal("time", least=1.5), 1.2, 1.3, 1.4, "!"),
    ],
)
def test_a_goal_is_marked_where_it_is_missed(goal, low, median, high, mark):
    value = {"median": median, "low": low, "high": high, "n": 15, "coverage": 0.96}
    assert goal.mark(value) == mark
    assert marked(Row("row", (goal,)), "time", {"time": value}).rpartition(")")[2] == mark
    assert marked(Row("row", (goal,)), "saved", {"saved": 9.0}) == "9.00"  # of another quantity


class Net(nn.Module):
    def __init__(self, vocabulary, width):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)

    def forward(self, ids):
        return self.head(self.embedding(ids))


def test_saved_bytes_and_operations_by_hand():
    subject = Subject(Net(TINY.vocabulary, TINY.width), Bench(Record(), size=TINY), loss_of_logits)
    tokens = TINY.batch * TINY.length
    ids = 2 * tokens * 8  # of the embedding and of the loss
    states, log_probabilities, weight_of_loss = tokens * TINY.width * 4, tokens * TINY.vocabulary * 4, 4
    assert subject.plan.activations_mib * 2**20 == ids + states + log_probabilities + weight_of_loss
    assert subject.flops == 3 * 2 * tokens * TINY.width * TINY.vocabulary
    before = subject.model.head.weight.clone()
    subject.step()
    assert not torch.equal(before, subject.model.head.weight)


def test_the_matrix_rate_is_of_the_linear_layers():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    shapes = products(net, lambda: net(torch.zeros(2, 7, 3)))
    assert shapes == {(14, 3, 4): 1, (14, 4, 5): 1, (14, 5, 5): 2}
    before = torch.get_float32_matmul_precision()
    assert matrix_rate(shapes, torch.float32, CPU, repeats=4) > 0
    assert torch.get_float32_matmul_precision() == before


def test_a_record_goes_on_and_merges(tmp_path):
    path = tmp_path / "new" / "cpu.json"
    record = Record(path, {"threads": 1}, "python scripts/bench.py")
    record.keep("overhead", "identity", {"time": 1.0, "lost": float("nan")}, 15)
    found = [record.part("finetune", "mrpc 0 stock", lambda value=value: {"seconds": value}) for value in (1, 2)]
    assert [one["seconds"] for one in found] == [1, 1]
    assert found[0]["git"] == record.made["git"]
    again = Record(path, {"threads": 1})
    again.keep("schemes", "mhc", {"time": 2.0}, 0)
    again.keep("overhead", "rezero", {"time": 3.0}, 15)
    merged = Record(path, {"threads": 1})
    assert merged.row("overhead", "identity")["values"] == {"time": 1.0, "lost": None}
    assert merged.row("overhead", "identity")["made"]["command"] == "python scripts/bench.py"
    assert merged.has("overhead", "rezero", 15)
    assert not merged.has("schemes", "mhc", 15)  # it had no pairs
    assert merged.part("finetune", "mrpc 0 stock", lambda: {"seconds": 3})["seconds"] == 1
    merged.made["python"] = "4"
    merged.keep("overhead", "rezero", {"time": 3.0}, 15, of_parts=True)  # the same: made as it was
    assert merged.row("overhead", "rezero")["made"]["python"] != "4"
    merged.keep("overhead", "rezero", {"time": 3.0}, 15)
    assert merged.row("overhead", "rezero")["made"]["python"] == "4"
    merged.keep("schemes", "mhc", {"time": 2.0}, 15)
    assert merged.has("schemes", "mhc", 15)
    merged.forget("finetune", "mrpc bf16")
    assert merged.part("finetune", "mrpc 0 stock", lambda: {"seconds": 3})["seconds"] == 3
    with pytest.raises(ValueError, match=r"was measured with threads 1 \(here 2\).*give another file"):
        Record(path, {"threads": 2})


@pytest.fixture
def counted(monkeypatch):
    """Two suites that count what is measured of them."""
    seen = []

    def measure(row, given):
        seen.append(row.name)
        return {"time": {"median": 1.2, "low": 1.1, "high": 1.3, "n": 15, "coverage": 0.96}}

    goals = (Goal("time", most=1.0),)
    suites = [
        Suite(
            "one", "about one", ("time",), (Row("a", goals, note="why a"), Row("b"), Row("big", asked=True)), measure
        ),
        Suite("two", "about two", ("time",), (Row("c"),), measure),
        Suite("far", "about far", (), (Row("d"),), measure, packages=("no_such_package",)),
    ]
    monkeypatch.setattr(bench, "SUITES", {suite.name: suite for suite in suites})
    return seen


def test_a_second_call_measures_what_is_missing(counted, tmp_path, capsys):
    file = ["--json", str(tmp_path / "cpu.json")]
    bench.main(["--suite", "one", "--only", "b", *file])
    bench.main(file)
    assert counted == ["b", "a", "c"]
    assert "suite far is left out: it needs no_such_package" in capsys.readouterr().err
    bench.main(["--suite", "one", "--only", "a", "--again", *file])
    bench.main(["--suite", "one", "--only", "big", *file])
    assert counted == ["b", "a", "c", "a", "big"]
    assert set(json.loads((tmp_path / "cpu.json").read_text())["suites"]["one"]) == {"a", "b", "big"}
    text = (tmp_path / "cpu.md").read_text()
    assert "| a | 1.20 (1.10-1.30)! | time <= 1 |" in text
    assert "- a: why a" in text
    assert "python scripts/bench.py --suite one --only 'a' --device cpu --threads 1 --pairs 15" in text
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_peak_memory_is_that_of_a_fresh_process(monkeypatch, tmp_path):
    suite = Suite("one", "", (PEAK,), (Row("a"), Row("b")), lambda row, given: {PEAK: 9000.0, "saved": 1.0})
    monkeypatch.setattr(bench, "SUITES", {"one": suite})
    monkeypatch.setattr(bench, "in_fresh_process", lambda suite, row, given: {PEAK: {"a": 1.0, "b": 2.0}[row.name]})
    bench.main(["--json", str(tmp_path / "cpu.json")])
    rows = json.loads((tmp_path / "cpu.json").read_text())["suites"]["one"]
    assert [rows[name]["values"] for name in "ab"] == [{PEAK: 1.0, "saved": 1.0}, {PEAK: 2.0, "saved": 1.0}]


@pytest.mark.slow
def test_a_fresh_process_measures_what_this_one_does():
    row, given = overhead.SUITE.rows[1], Bench(Record(), pairs=1, size=TINY)
    here, there = (
        overhead.SUITE.measure(row, replace(given, pairs=0)),
        bench.in_fresh_process(overhead.SUITE, row, given),
    )
    assert there.pop(PEAK) > 0
    del here[PEAK]
    assert there == here


@pytest.mark.slow
def test_a_fresh_process_does_not_begin_with_the_peak_of_this_one():
    row, given = overhead.SUITE.rows[1], Bench(Record(), size=TINY)
    before = bench.in_fresh_process(overhead.SUITE, row, given)[PEAK]
    held = bytearray(int(2 * before) * 2**20)
    held[:: 2**10] = b"x" * (len(held) // 2**10)
    assert bench.in_fresh_process(overhead.SUITE, row, given)[PEAK] < 1.5 * before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "onne"], "unknown suite 'onne'. Did you mean 'one'"),
        (["--suite", "two", "--only", "a"], "unknown row 'a' of the chosen suites"),
        (["--suite", "far"], "suite 'far' cannot be measured: it needs no_such_package"),
        (["--pairs", "4"], "pairs is 4; it must be odd"),
        (["--threads", "0"], "threads is 0; it must be at least 1"),
        (["--width", "100"], "width is 100; it must be a multiple of 64"),
        (["--model", "nowhere"], "model is nowhere, which is no folder"),
    ],
)
def test_wrong_names_are_told_before_work(counted, arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--suite", "one", *arguments] if "--suite" not in arguments else arguments)
    assert said in capsys.readouterr().err
    assert counted == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("cpu", None, "its name must end in .json"),
        ("cpu.md", None, "its name must end in .json"),
        ("notes.json", None, "would replace"),
        ("other.json", "[1, 2]", "other.json is no record of this benchmark"),
        ("other.json", "{}", "other.json is no record of this benchmark"),
        ("other.json", '{"machine": ', "other.json is no record of this benchmark"),
        ("folder.json", None, "folder.json is no record of this benchmark"),
        ("notes.md/cpu.json", None, "cannot be written"),
    ],
)
def test_files_of_others_stay_as_they_are(counted, name, text, said, tmp_path, capsys):
    (tmp_path / "notes.md").write_text("precious")
    (tmp_path / "folder.json").mkdir()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit):
        bench.main(["--suite", "one", "--json", str(tmp_path / name)])
    assert said in " ".join(capsys.readouterr().err.split())
    assert counted == []
    assert (tmp_path / "notes.md").read_text() == "precious"
    assert text is None or (tmp_path / name).read_text() == text


def test_a_stop_loses_nothing_that_was_measured(counted, monkeypatch, tmp_path, capsys):
    file = ["--suite", "one", "--json", str(tmp_path / "cpu.json")]
    bench.main(file)
    monkeypatch.setattr(bench, "SUITES", {"one": replace(bench.SUITES["one"], measure=_stop)})
    with pytest.raises(SystemExit, match="130"):
        bench.main([*file, "--again"])
    assert "the same command goes on, without --again" in capsys.readouterr().err
    assert set(json.loads((tmp_path / "cpu.json").read_text())["suites"]["one"]) == {"a", "b"}


def _stop(row, given):
    raise KeyboardInterrupt


def test_rows_for_large_machines_are_measured_by_name():
    everything = {suite.name: [row.name for row in rows] for suite, rows in choose(bench.SUITES, ["all"], []).items()}
    assert everything.keys() == bench.SUITES.keys()
    assert "xt attn_aggregated_residuals" not in everything["peers"]
    ((suite, (row,)),) = choose(bench.SUITES, ["all"], ["xt attn_aggregated_residuals"]).items()
    assert (suite.name, row.name) == ("peers", "xt attn_aggregated_residuals")


def test_fine_tuning_needs_a_model_and_data(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--suite", "finetune"])
    assert "it needs --model and --data" in capsys.readouterr().err


def _reviews(rows):
    texts = [("dull awful film", "great lovely film")[i % 2] for i in range(rows)]
    return Dataset.from_dict({"sentence": texts, "label": [i % 2 for i in range(rows)]})


def _classifier(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return BertForSequenceClassification(config)


def test_the_stock_loop_of_glue_learns():
    data = DatasetDict(train=_reviews(160), validation=_reviews(10))
    tokenizer = train_tokenizer(data["train"]["sentence"])
    model = _classifier(tokenizer)
    seconds, answers = glue_epoch(
        model, tokenizer, TASKS["sst2"], data, seed=0, batch_size=8, max_length=8, learning_rate=1e-2
    )
    assert answers.tolist() == data["validation"]["label"]
    assert seconds > 0


def test_the_stock_loop_of_language_models_takes_steps_by_the_number(tmp_path):
    tokenizer, packed = pretrain.words(TINY, tmp_path)
    model = pretrain.stock_model(TINY, tokenizer)
    assert len(tokenizer) == TINY.vocabulary
    given, samples = [], packed.batch(range(6))
    model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs["input_ids"]), with_kwargs=True)
    steps = mlm_steps(model, tokenizer, samples, batch_size=2, precision="fp32", at_once=2)
    before = model.cls.predictions.transform.dense.weight.clone()
    next(steps), next(steps)
    assert len(given) == 4
    assert given[0].shape == (2, TINY.length)
    assert not torch.equal(before, model.cls.predictions.transform.dense.weight)


STEPS = [(module.SUITE, row) for module in (overhead, schemes, peers) for row in module.SUITE.rows]


@pytest.mark.parametrize(("suite", "row"), STEPS, ids=lambda given: given.name)
def test_every_row_of_steps_takes_one(suite, row):
    for package in suite.packages:
        pytest.importorskip(package)
    size = replace(TINY, width=128) if row.asked else TINY  # its low rank is 64
    values = suite.measure(row, Bench(Record(), pairs=0, size=size))
    assert {*suite.shown, *suite.more} - {"time", "time / HF", "of rate", "rate GFLOP/s", "ms"} <= values.keys()
    record = Record()
    record.keep(suite.name, row.name, values, 0)
    for package in suite.packages:
        assert f"{package.replace('_', '-')} {version(package)}" in markdown({suite.name: suite}, record)
    if row.name in ("stock again", "identity", "xt default", "hc plain"):
        assert values["saved"] == values["FLOP"] == 1.0


@pytest.mark.parametrize("suite", [overhead.SUITE, pretrain.SUITE, depth.SUITE], ids=lambda suite: suite.name)
def test_what_is_timed_has_all_that_is_shown(suite):
    for row in {overhead.SUITE: suite.rows[:1], depth.SUITE: suite.rows[:: len(suite.rows) - 1]}.get(suite, suite.rows):
        record = Record()
        values = suite.measure(row, Bench(record, pairs=1, size=TINY))
        timed = {name for name in suite.shown if name.startswith("time") and row.given and row.given.get("all_before")}
        assert {*suite.shown, *suite.more} - timed == values.keys()
        record.keep(suite.name, row.name, values, 1)
        assert f"| {row.name} |" in markdown({suite.name: suite}, record)
        assert all(goal.quantity in values for goal in row.goals)


def test_times_are_over_those_of_what_a_row_is_measured_against(monkeypatch):
    """Ours takes twice the time of stock, and a layer of a net k times as deep k times that of one less deep."""
    of = {
        "one": 2.0,
        "base": 1.0,
        "ours": 2.0,
        "stock": 1.0,
        **{str(times): float(times) ** 2 for times in depth.TIMES},
    }
    for module in (steps, pretrain, depth):
        fixed = lambda acts, pairs, *others: {name: [of[name]] * pairs for name in acts}
        monkeypatch.setattr(module, "interleaved", fixed)
    monkeypatch.setattr(steps, "machine_rate", lambda *given: 1e6)
    monkeypatch.setattr(pretrain, "machine_rate", lambda *given: 1e6)
    given = Bench(Record(), pairs=1, size=TINY)
    step = overhead.SUITE.measure(overhead.SUITE.rows[0], given)
    assert (step["time"]["median"], step["ms"]) == (2.0, 2000.0)
    assert step["of rate"] == pytest.approx(step["GFLOP"] * 1e9 / 2.0 / 1e6)
    trained = pretrain.SUITE.measure(pretrain.SUITE.rows[-1], given)
    assert trained["speed-up"]["median"] == 0.5
    layers = depth.SUITE.measure(depth.SUITE.rows[0], given)
    assert [layers[f"time x{times}"]["median"] for times in depth.TIMES[1:]] == list(depth.TIMES[1:])


def test_pre_training_computes_the_masked_tokens_alone():
    values = pretrain.SUITE.measure(pretrain.SUITE.rows[-1], Bench(Record(), pairs=0, size=TINY))
    assert values["FLOP"] < 1
    assert values["saved"] < 1


def test_fine_tuning_keeps_each_run(tmp_path):
    pairs = _reviews(16).rename_column("sentence", "sentence1").map(lambda row: {"sentence2": row["sentence1"]})
    for split in ("train", "validation"):
        (tmp_path / "mrpc").mkdir(exist_ok=True)
        pairs.to_parquet(tmp_path / "mrpc" / f"{split}.parquet")
    tokenizer = train_tokenizer(pairs["sentence1"])
    _classifier(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    record = Record()
    given = Bench(record, model=tmp_path / "model", data=tmp_path, seeds=2, rows=8)
    row = finetune.SUITE.rows[0]
    values = finetune.SUITE.measure(row, given)
    assert {*finetune.SUITE.shown, *finetune.SUITE.more} == values.keys()
    sides = ("stock", "bf16", "fp32")
    parts = record.content["parts"]["finetune"]
    assert parts.keys() == {f"mrpc {seed} {side}" for seed in range(2) for side in sides}
    for seed in range(2):  # ours is 4 times as fast, and better by 0.1 and 0.3
        parts[f"mrpc {seed} stock"] |= {"seconds": 8.0, "score": 0.5}
        parts[f"mrpc {seed} bf16"] |= {"seconds": 2.0, "score": 0.6 + 0.2 * seed}
    values = finetune.SUITE.measure(row, given)
    assert values["speed-up"]["median"] == 4.0
    assert (values["gap"], values["error"], values["verdict"]) == (pytest.approx(0.2), pytest.approx(0.1), "better")
    for seed in range(2):  # worse by the same
        parts[f"mrpc {seed} bf16"]["score"] = 0.4
    assert marked(row, "gap/error", finetune.SUITE.measure(row, given)).endswith("!")
    (other := _classifier(tokenizer)).bert.embeddings.word_embeddings.weight.data.mul_(2)
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has runs of another encoder than given; give another file"):
        finetune.SUITE.measure(row, given)
    _classifier(tokenizer).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has runs of another data than given"):
        finetune.SUITE.measure(row, replace(given, rows=4))
    record.keep("finetune", row.name, values, 15)
    assert finetune.SUITE.measure(row, replace(given, seeds=1))["speed-up"]["n"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("row", startup.SUITE.rows[:2], ids=lambda row: row.name)
def test_start_up_gives_numbers(row):
    assert startup.SUITE.measure(row, Bench(Record(), pairs=1))["ms"]["median"] > 0


@pytest.mark.slow
def test_a_study_gives_numbers():
    given = Bench(Record(), pairs=1)
    tiny = {"depths": [1], "width": 8, "seeds": 1, "steps": 2}
    row = study.SUITE.rows[0]
    values = study.SUITE.measure(replace(row, given={**row.given, **tiny}), given)
    assert values["overhead s"]["n"] == 1
    assert values["overhead s"]["median"] > 0


@pytest.mark.slow
@pytest.mark.skipif("verify" not in signature(resformer.patch).parameters, reason="patch always verifies")
def test_patching_starts_up():
    row = startup.SUITE.rows[2]
    code = startup.PATCH.format(sizes="hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8")
    assert startup.SUITE.measure(replace(row, given=(("-c", code), True)), Bench(Record(), pairs=1))["ms"]["n"] == 1


RECORDS = Path(__file__).parents[1] / "scripts" / "studies" / "benchmark"
PEERS = {  # of a scheme, where a package has the like
    "layer_scale": "xt use_layerscale",
    "highway": "xt gate_residual",
    "hyper_connections dynamic": "hc dynamic",
    "mhc": "hc mHC",
    "denseformer": "xt integrate_layers",
}


def recorded(name):
    """The values of a committed record, by suite and row."""
    suites = json.loads((RECORDS / name).read_text())["suites"]
    return {suite: {row: made["values"] for row, made in rows.items()} for suite, rows in suites.items()}


def speed_rows():
    """The rows of the README's tables of speed, from the committed benchmark."""
    one, two, rows = recorded("cpu.json"), recorded("cpu2.json"), []
    for suite in (overhead.SUITE, schemes.SUITE):
        for row in suite.rows:
            times = [marked(row, "time", values[suite.name][row.name]) for values in (one, two)]
            peer = one["peers"].get(PEERS.get(row.name), {})
            beside = [shown(peer[name]) if peer else "" for name in ("time", "saved")]
            rows.append([row.name, *times, marked(row, "saved", one[suite.name][row.name]), *beside])
    for row in depth.SUITE.rows:
        found = one["depth"][row.name]
        rows.append([row.name, *(marked(row, name, found) if name in found else "" for name in depth.SUITE.shown)])
    for suite in (pretrain.SUITE, finetune.SUITE):
        for row in suite.rows:
            found = one[suite.name][row.name]
            more = marked(row, "speed-up", two[suite.name][row.name]) if row.name in two.get(suite.name, {}) else ""
            gap = f"{found['gap']:+.4f} ± {found['error']:.4f}".replace("-", "−") if "gap" in found else ""
            rows.append([f"{suite.name} {row.name}", marked(row, "speed-up", found), more, gap])
    return [re.sub(" +", " ", f"| {' | '.join(row)} |") for row in rows]


def test_the_tables_of_speed_are_the_committed_benchmark():
    inside = (RECORDS.parents[2] / "README.md").read_text().partition("<!-- speed -->")[2].partition("<!-- /speed")[0]
    assert re.findall(r"^\| (?!scheme )[a-z].*", inside, re.MULTILINE) == speed_rows()
