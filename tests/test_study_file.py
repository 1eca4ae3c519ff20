"""A study as users write it: read from a file and options, and all that is wrong with it told at once."""

import shutil
from dataclasses import replace

import pytest
import torch

import resformer
from resformer import describe
from resformer.study.file import read_study
from resformer.study.plan import Condition
from resformer.study.resolve import fingerprint, resolve
from resformer.study.run import encoding, load_once, parts, vocabulary, without_slice
from resformer.study.settings import PROTOCOLS
from resformer.train.batches import encode
from resformer.train.batches import fingerprint as fingerprint_of_tokens

SMALL = """
schemes = ["pre_ln", "highway"]
depths = [1, 2]
tasks = ["sentiment"]
seeds = 2
learning-rates = [1e-3, 3e-3]
width = 16
heads = 2
steps = 3
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "study.toml"
        path.write_text(text)
        return path

    return write


def test_a_file_is_read_and_looked_up(written):
    said = []
    study = read_study(written(SMALL), {"seeds": 3, "ffn_ratio": 2.0}, said.append)
    assert study.schemes == ("pre_ln", "highway", "static_mix")  # the control
    assert (study.seeds, study.learning_rates, study.baseline) == (3, (1e-3, 3e-3), "pre_ln")
    assert (study.settings.steps, study.settings.ffn_ratio, study.settings.schedule) == (3, 2.0, "linear")
    # Of highway 2 (D^2 + D) a layer, the LayerNorm at the end of pre-LN is taken off; a unit takes 2 D + 1.
    assert study.facts.wider == {"1": round((2 * 272 - 32) / 33), "2": round((4 * 272 - 32) / 66)}
    data = load_once("sentiment", None)
    assert study.facts.data == {"sentiment": fingerprint(data)}
    assert any("sentiment" in line for line in said)


def test_protocols(written):
    cramming = read_study(written(SMALL.replace("learning-rates = [1e-3, 3e-3]", "")), {"protocol": "cramming"})
    settings = cramming.settings
    assert cramming.learning_rates == (4e-5,)
    assert (settings.batch_size, settings.schedule, settings.weight_decay, settings.beta2) == (16, "cosine", 0, 0.98)
    assert (settings.clip, settings.warmup, settings.epsilon) == (0, 0.1, 1e-6)
    own = read_study(written(SMALL + 'protocol = "cramming"\nbatch_size = 8'))
    assert (own.settings.batch_size, own.settings.schedule, own.learning_rates) == (8, "cosine", (1e-3, 3e-3))
    assert PROTOCOLS["controlled"] == {}


def test_a_depth_has_the_parameters_of_another(written):
    study = read_study(written(SMALL.replace("width = 16", 'match_parameters = "4x16"')), {"controls": False})
    assert study.facts.widths.keys() == {"1", "2"}
    assert study.facts.widths["1"] > study.facts.widths["2"] > 16
    assert {run.condition.depth: run.config["width"] for run in study.runs({})} == {
        int(depth): width for depth, width in study.facts.widths.items()
    }


def test_all_that_is_wrong_is_told_with_its_line(written):
    text = """
schemes = [
  "pre_ln",
  "highwy",
  "rezero:width=3",
]
depths = [2, 0]
tasks = ["sentiment", "sst3"]
seeds = 0
learning-rates = [1e-3, -1]
widht = 32
dropout = "much"
schedule = "lineer"

[pretraining]
corpus = ["/nowhere/text.txt"]
steps = 5
batch = 3
"""
    path = written(text)
    with pytest.raises(ValueError, match="things are wrong") as error:
        read_study(path, {"clip": -1.0, "width": 16})
    told = [line.strip() for line in str(error.value).splitlines()[1:]]
    begins = {
        "--clip: clip must be a finite number of at least 0": "",
        "4": "unknown scheme 'highwy'. Did you mean 'highway'?",
        "5": "scheme 'rezero:width=3' sets 'width'",
        "7": "depths must be a whole number of at least 1, got 0",
        "8": "unknown task 'sst3'. Did you mean 'sst2'",
        "9": "seeds must be a whole number of at least 1, got 0",
        "10": "learning_rates must be a finite number above 0, got -1",
        "11": "unknown key 'widht'. Did you mean 'width'?",
        "12": "dropout must be a number, got 'much'",
        "13": "unknown schedule 'lineer'",
        "16": "/nowhere/text.txt",
        "18": "[pretraining] unknown key 'batch'",
    }
    assert len(told) == len(begins)
    for line, (place, words) in zip(told, begins.items(), strict=True):
        assert line.startswith(f"{path}, line {place}: " if words else place)
        assert words in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('schemes = ["pre_ln", 3]\ndepths = [0, "three", 2]\ntasks = "sentiment"\nseeds = []',
         ["1: schemes must be text, got 3", "2: depths must be a whole number, got 'three'",
          "2: depths must be a whole number of at least 1, got 0", "3: tasks must be a list, each of it text",
          "4: seeds must be a whole number, got []"]),
        ('schemes = []\ndepths = ["a"]\ntasks = ["sentimnt"]\nlearning_rates = []',
         ["1: schemes must be a list of at least one, got []", "2: depths must be a whole number, got 'a'",
          "3: unknown task 'sentimnt'", "4: learning_rates must be a list of at least one, got []"]),
        ('family = "brt"\nschemes = ["rezero",\n "highwy"]\ndepths = [1]\ntasks = ["sentiment"]\nbaseline="highwy"',
         ["1: unknown family 'brt'", "3: unknown scheme 'highwy'"]),
        (SMALL.replace("heads = 2", 'family = "modernbert"\nheads = 16'), ["9: family 'modernbert' turns"]),
        (SMALL + "workers = 3", ["10: workers is said on the command line, --workers, not in the file"]),
        (SMALL + "seeed = 3\nwidth-inits = []\n[pretrain]\nsteps = 1",
         ["10: unknown key 'seeed'. Did you mean 'seeds'", "11: unknown key 'width-inits'. Did you mean",
          "12: unknown key 'pretrain'. Did you mean 'pretraining'"]),
        ('width = 0\nheads = 3\nschemes = ["rezero", "rezero"]\ndepths = [1]\ntasks = ["sentiment"]',
         ["1: width must be a whole number of at least 1, got 0", "3: schemes has 'rezero' more than once"]),
        (SMALL + "batch-size = 2\nbatch_size = 2", ["10: batch_size is there twice, with - and with _"]),
        (SMALL + "[pretraining]\nsteps = 0\nwarmup = 1", ["10: [pretraining] corpus, the text, is missing",
         "11: [pretraining] steps must be a whole number of at least 1, got 0", "12: [pretraining] warmup must be"]),
        (SMALL + "train_size = 1", ["10: no slice can be held out of the 1 training examples"]),
    ],
)  # fmt: skip
def test_each_thing_is_told_once_at_its_own_line(written, text, told):
    path, said = written(text), []
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_study(path, say=said.append)
    lines = [line.strip() for line in str(error.value).splitlines()]
    lines = lines[1:] if "things are wrong" in lines[0] else lines
    assert len(lines) == len(told)
    for line, begin in zip(lines, told, strict=True):
        assert line.startswith(f"{path}, line {begin}")
    assert not any("no control" in line for line in said)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("", "samples of 128 tokens, with 512 to be held out: too few for one batch of 32"),
        ("length = 2", "line 12: [pretraining] length=2 leaves no room"),
        ("vocabulary = 9", "line 12: [pretraining] vocab_size=9 is too small"),
        ('schedule = "lin"\nlength = 16', "line 12: [pretraining] unknown schedule 'lin'"),
    ],
)
def test_pretraining_that_cannot_be_is_refused_before_any_run(written, tmp_path, monkeypatch, table, says):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n\n".join(f"the cat {n} sat on mat {7 * n}" for n in range(60)))
    path = written(f"{SMALL}[pretraining]\ncorpus = [{str(tmp_path / 'text.txt')!r}]\n{table}")
    with pytest.raises(ValueError, match="pretraining") as error:
        read_study(path)
    assert str(error.value).count("too few") <= 1
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "schemes: give at least one"),
        ("schemes = [", "is no TOML file"),
        ('schemes = ["pre_ln"]\ndepths = [1]\ntasks = ["sentiment"]\npretraining = 3', "must be a table"),
        (
            'schemes = ["pre_ln"]\ndepths = [1]\ntasks = ["sentiment"]\n[pretraining]\nsteps = 3',
            "[pretraining] corpus",
        ),
        (SMALL + 'protocol = "mine"', "unknown protocol 'mine'"),
        (SMALL + 'family = "electro"', "electra"),
        (SMALL + 'model = "/nowhere"', "/nowhere"),
        (SMALL + 'precision = "fp8"', "unknown precision 'fp8'"),
        (SMALL + 'data = "/nowhere"\n', None),  # not of a built-in task
        (SMALL.replace("[1, 2]", "[3]") + 'match_parameters = "4by4"', "DEPTHxWIDTH"),
    ],
)
def test_other_files_that_will_not_do(written, text, says):
    if says is None:
        text = text.replace("sentiment", "cola")
        says = "'/nowhere' is not a directory"
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_study(written(text))
    assert says in str(error.value)


def test_a_slice_of_the_training_data_is_held_out_for_tuning(written):
    study = resolve(read_study(written(SMALL), {"controls": False}))
    (run, *_), reported = study.tuning(study.conditions()[0]), study.runs({})[0]
    full = parts(replace(reported, learning_rate=1e-3))[3]
    model, _, task, data, training = parts(run)
    assert len(data["train"]) + len(data["validation"]) == len(full["train"])
    assert len(data["validation"]) == 500
    assert 240 <= sum(data["validation"]["label"]) <= 260  # stratified
    assert without_slice(full, task)["validation"]["sentence"] == data["validation"]["sentence"]  # the same for all
    assert (training.learning_rate, training.steps, training.seed) == (1e-3, 3, run.seed)
    assert model.config.num_hidden_layers == run.condition.depth


def test_the_control_spends_the_parameters(written):
    study = read_study(written(SMALL))
    wider = next(run for run in study.runs({}) if run.condition.extra_ffn)
    plain = replace(wider, condition=Condition("pre_ln", 2, "sentiment"))
    highway = replace(wider, condition=Condition("highway", 2, "sentiment"))
    counts = [
        sum(p.numel() for p in parts(replace(run, learning_rate=1e-3))[0].parameters())
        for run in (plain, wider, highway)
    ]
    unit = 2 * (2 * 16 + 1)
    assert counts[0] < counts[1]
    assert abs(counts[1] - counts[2]) <= unit / 2 + 32  # the pre-LN of highway's host has its end norm, too


def test_runs_from_fresh_weights_have_their_tokens_once(written):
    study = read_study(written(SMALL), {"controls": False, "train_size": 700})
    first, second = (replace(run, learning_rate=1e-3) for run in study.runs({})[:2])
    inputs, made = frozenset({"input_ids", "attention_mask"}), []
    for run in (first, second):
        _, tokenizer, task, data, _ = parts(run)
        given = (data["train"], tokenizer, task)
        made.append(encoding(run)(*given, max_length=run.settings.max_length, inputs=inputs))
    assert made[0] is made[1]
    assert len(made[0]) == 700
    assert fingerprint_of_tokens({"": made[0]}) == fingerprint_of_tokens(
        {"": encode(*given, max_length=first.settings.max_length, inputs=inputs)}
    )
    checkpoint = replace(first, settings=replace(first.settings, model="somewhere"))
    assert encoding(checkpoint) is encode, "each run has a tokenizer of its own"


def test_data_decide(written):
    data = load_once("sentiment", None)
    swapped = data["train"].select([1, 0, *range(2, len(data["train"]))])
    assert fingerprint(data) != fingerprint({**data, "train": swapped})


def test_a_checkpoint_is_patched_with_each_scheme(tmp_path, written):
    words = vocabulary("sentiment", None, 128)
    unpatched = resformer.unpatch(resformer.build_encoder(3, 16, heads=2, tokenizer=words))
    unpatched.save_pretrained(tmp_path / "plain")
    words.save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "copy")

    text = 'schemes = ["identity", "rezero"]\ntasks = ["sentiment"]\nsteps = 2\nseeds = 1\nmodel = '
    studies = [read_study(written(f"{text}{str(tmp_path / name)!r}")) for name in ("plain", "copy")]
    assert [run.id for run in studies[0].runs({})] == [run.id for run in studies[1].runs({})]
    study = studies[0]
    assert (study.depths, study.controls, study.learning_rates) == ((3,), False, (3e-5, 1e-4, 3e-4))
    models = {run.condition.scheme: parts(replace(run, learning_rate=1e-3))[0] for run in study.runs({})}
    ids = {"input_ids": torch.tensor([[2, 7, 8, 3]])}
    hidden = [model.base_model.eval()(**ids).last_hidden_state for model in (unpatched, *models.values())]
    torch.testing.assert_close(hidden[1], hidden[0], rtol=0, atol=0)
    torch.testing.assert_close(hidden[2], hidden[0])
    assert "rezero" in str(describe(models["rezero"]))

    path = written(f"{text}{str(tmp_path / 'plain')!r}\nwidth = 3")
    with pytest.raises(ValueError, match="3 things are wrong") as error:
        read_study(path, {"depths": [2], "schemes": ["identity", "rezro"]})
    begins = ("--schemes: unknown scheme 'rezro'", "--depths: depths [2] of a checkpoint with 3 layers",
              f"{path}, line 6: width must be left out where a checkpoint brings the model, got 3")  # fmt: skip
    assert all(begin in str(error.value) for begin in begins)


def test_a_checkpoint_with_identity_is_patched_as_the_host_it_is(tmp_path, written):
    words = vocabulary("sentiment", None, 128)
    text = f'schemes = ["rezero"]\ntasks = ["sentiment"]\nsteps = 2\nmodel = {str(tmp_path)!r}\n'
    words.save_pretrained(tmp_path)
    patched = resformer.build_encoder(3, 16, heads=2, tokenizer=words)
    patched.save_pretrained(tmp_path)
    (run, *_) = read_study(written(text)).runs({})
    model = parts(replace(run, learning_rate=1e-3))[0]
    assert "rezero" in str(describe(model))
    ids = {"input_ids": torch.tensor([[2, 7, 8, 3]])}
    hidden = [one.eval()(**ids).last_hidden_state for one in (patched, model.base_model)]
    torch.testing.assert_close(hidden[1], hidden[0])

    shutil.rmtree(tmp_path)
    resformer.build_encoder(3, 16, "highway", heads=2, tokenizer=words).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"study.toml, line 4: model .* is patched with 'highway' already"):
        read_study(written(text))
