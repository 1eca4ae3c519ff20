"""The command line: what it lists, a fine-tuning run, and one clear message for each wrong input."""

import json
import subprocess
import sys

import pytest

from resformer import cli
from resformer.cli import speaking, spread
from resformer.cli.training import COMPILING


@pytest.fixture
def resformer(capsys):
    def run(*arguments) -> tuple[int, str]:
        code = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out + err

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny unpatched BERT with a tokenizer of the built-in agreement task."""
    import torch
    from transformers import BertConfig, BertModel

    from resformer.data.glue import load_task
    from resformer.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(load_task("agreement")["train"]["sentence"])
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=len(tokenizer)
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_lists(resformer):
    from resformer.hosts import families
    from resformer.schemes import schemes

    code, text = resformer("schemes")
    assert code == 0
    assert all(name in text for name in schemes())
    assert "arXiv:2003.04887" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    code, text = resformer("hosts")
    assert all(name in text for name in families())
    assert all(len(line) <= 80 for line in text.splitlines())
    code, text = resformer("data")
    assert "sentiment" in text
    assert "mrpc" in text
    code, text = resformer("schemes", "rezero")
    assert "x ← x + a F(x)" in text


def test_all_about_a_family(resformer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name, layer in (("gpt2", "GPT2Block"), ("bert", "BertLayer")):
        code, text = resformer("hosts", name)
        assert code == 0
        assert all(len(line) <= 80 for line in text.splitlines())
        text = " ".join(text.split())
        for part in (f".{layer}", "cross", "norms: p", "points: q k v o", "kept by", "init='paper' only"):
            assert part in text
    assert "x0_mix" in text.partition("kept by")[2].partition("changed by")[0]
    assert "pre_ln" in text.partition("changed by")[2]
    code, text = resformer("hosts", "gpt2")
    assert "se_gate: serves encoder stacks" in " ".join(text.split())


def test_all_about_the_model_of_a_checkpoint(resformer, checkpoint, tmp_path):
    """Its configuration is enough."""
    from transformers import AutoModel, MambaConfig

    from resformer.patching import patch

    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_bytes((checkpoint / "config.json").read_bytes())
    code, text = resformer("hosts", tmp_path / "bare")
    assert code == 0, text
    text = " ".join(text.split())
    for part in ("BertModel, family bert (post-LN), 2 layers", "2 of BertLayer", "width 16, 2 heads", "kept by 2"):
        assert part in text

    patch(AutoModel.from_pretrained(checkpoint), "deepnorm").save_pretrained(tmp_path / "patched")
    code, text = resformer("hosts", tmp_path / "patched")
    assert code == 0, text
    assert "deepnorm(), init='preserve'" in text

    MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4).save_pretrained(tmp_path / "mamba")
    config = json.loads((checkpoint / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized/config.json").write_text(json.dumps(quantized))
    (tmp_path / "empty").mkdir()
    for name, message in (
        (tmp_path / "quantized", "quantized model (config.quantization_config)"),
        (tmp_path / "mamba", "no family describes this MambaModel"),
        (tmp_path / "empty", "holds no config.json"),
        ("brt", "unknown family 'brt'. Did you mean 'bert'"),
    ):
        code, text = resformer("hosts", name)
        assert code == 2, text
        assert message in text


def test_several_values_after_one_option():
    assert spread(["compare", "--depths", "2", "8", "--seeds", "2", "x"]) == [
        "compare", "--depths", "2", "--depths", "8", "--seeds", "2", "x",
    ]  # fmt: skip
    assert spread(["--depths=1", "2", "--output", "runs"]) == ["--depths", "1", "--depths", "2", "--output", "runs"]


def test_finetune_then_finetune_what_it_saved(resformer, checkpoint, tmp_path):
    common = ("--task", "agreement", "--steps", 3, "--batch-size", 4, "--train-size", 50)
    code, text = resformer(
        "finetune", "--model", checkpoint, *common, "--scheme", "layer_scale", "--output", tmp_path / "a"
    )
    assert code == 0, text
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert result["config"]["scheme"] == "layer_scale"
    assert result["cost"]["scheme_parameters"] == 2 * 2 * 16
    assert "accuracy" in result["metrics"]

    again = ("finetune", "--model", tmp_path / "a/model", *common)
    code, text = resformer(*again, "--output", tmp_path / "b")
    assert code == 0, text
    assert json.loads((tmp_path / "b/result.json").read_text())["cost"]["scheme_parameters"] == 64
    code, text = resformer(*again, "--scheme", "rezero", "--output", tmp_path / "c")
    assert code == 2
    assert "already" in text
    assert not (tmp_path / "c").exists()


def test_finetune_on_files_of_ones_own(resformer, checkpoint, tmp_path):
    for name, rows in (("a.csv", 20), ("b.csv", 6)):
        lines = [f'"the dogs run, {i}",{i % 3}\n' for i in range(rows)]
        (tmp_path / name).write_text("body,grade\n" + "".join(lines))
    own = ("--train-file", tmp_path / "a.csv", "--validation-file", tmp_path / "b.csv")
    columns = ("--text", "body", "--label", "grade")
    common = ("finetune", "--model", checkpoint, *own, "--steps", 2, "--batch-size", 4)
    code, text = resformer(*common, *columns, "--output", tmp_path / "classes")
    assert code == 0, text
    assert "own: text body; label grade: 3 classes (0, 1, 2); train 20 rows, validation 6 rows" in " ".join(
        text.split()
    )
    result = json.loads((tmp_path / "classes/result.json").read_text())
    assert {"accuracy", "macro_f1"} <= set(result["metrics"])
    assert result["config"]["task"] == "own"
    assert result["config"]["train_file"] == str(tmp_path / "a.csv")
    assert json.loads((tmp_path / "classes/model/config.json").read_text())["id2label"] == {
        "0": "0",
        "1": "1",
        "2": "2",
    }
    code, text = resformer(*common, *columns, "--regression", "--output", tmp_path / "scores")
    assert code == 0, text
    assert set(json.loads((tmp_path / "scores/result.json").read_text())["metrics"]) == {"pearson", "spearman", "loss"}
    for wrong, message in (
        ((), "hold the text"),
        ((*columns, "--task", "mrpc"), "give --task, or both --train-file and --validation-file; given: --task, --tr"),
        ((*columns, "--data", "x"), "--data is of --task"),
        (("--text", "body"), "lacks the column label; it has body, grade"),
    ):
        code, text = resformer(*common, *wrong, "--output", tmp_path / "x")
        assert code == 2, text
        assert message in text
        assert not (tmp_path / "x").exists()


COMPARE = ("compare", "--schemes", "rezero", "--depths", "1", "--tasks", "agreement", "--output", "x")
FINETUNE = ("finetune", "--model", "MODEL", "--task", "agreement", "--output", "x")
TUNE = ("finetune", "--model", "MODEL", "--task", "agreement", "--output", "x")
WRONG = [
    (("schemes", "rezro"), "Did you mean 'rezero'"),
    (("data", "sentimnt", "--output", "x"), "Did you mean 'sentiment'"),
    (("data", "sentiment"), "--output"),
    (("data", "sentiment", "--output", "x", "--format", "xlsx"), "parquet"),
    (("compare", "--schemes", "rezro", "--depths", "1", "--tasks", "agreement", "--output", "x"), "'rezero'"),
    (("compare", "--schemes", "rezero:alpha=1", "--depths", "1", "--tasks", "agreement", "--output", "x"), "alpha"),
    (("compare", "--schemes", "rezero:", "--depths", "1", "--tasks", "agreement", "--output", "x"), "NAME:OPTION"),
    (("compare", "--schemes", "rezero", "--depths", "0", "--tasks", "agreement", "--output", "x"), "at least 1"),
    (("compare", "--schemes", "rezero", "--depths", "two", "--tasks", "agreement", "--output", "x"), "two"),
    (("compare", "--schemes", "rezero", "--depths", "1", "--tasks", "agrement", "--output", "x"), "'agreement'"),
    (("compare", "--schemes", "rezero", "my.toml", "--output", "x"), "give the study file first"),
    (("compare", "--schemes", "rezero", "--depths", "1", "my.toml", "--output", "x"), "give the study file first"),
    ((*COMPARE, "--dry-run", "--executor", "slurm"), "unknown executor 'slurm'"),
    (
        ("compare", "--schemes", "rezero", "--depths", "1", "--tasks", "agreement", "--width", "0", "--output", "x"),
        "width",
    ),
    (
        ("compare", "--schemes", "rezero", "--depths", "1", "--tasks", "agreement", "--heads", "3", "--output", "x"),
        "divisor",
    ),
    (
        ("compare", "--schemes", "rezero", "--depths", "1", "--tasks", "agreement", "--shard", "2/2", "--output", "x"),
        "I from 0 to N - 1",
    ),
    (("finetune", "--model", "MODEL", "--task", "mprc", "--output", "x"), "'mrpc'"),
    (("finetune", "--model", "MODEL", "--task", "mrpc", "--data", "nowhere", "--output", "x"), "nowhere"),
    (("finetune", "--model", "MODEL", "--task", "agreement", "--scheme", "higway", "--output", "x"), "'highway'"),
    (("finetune", "--model", "MODEL", "--task", "agreement", "--scheme", "pre_ln", "--output", "x"), "init='paper'"),
    (
        ("finetune", "--model", "MODEL", "--task", "agreement", "--learning-rate", "-1", "--output", "x"),
        "learning_rate",
    ),
    (("finetune", "--model", ".", "--task", "agreement", "--output", "x"), "config.json"),
    (("report", "nowhere"), "nowhere"),
    (("finetune", "--task", "agreement", "--output", "x"), "give --model, a checkpoint, or --depth and --width"),
    ((*TUNE, "--depth", "2"), "are both given; a run has one model"),
    ((*TUNE, "--width", "8"), "--width: of a new model"),
    ((*TUNE, "--steps", "0"), "steps is 0"),
    ((*TUNE, "--seconds", "-1"), "seconds is -1.0"),
    ((*TUNE, "--steps", "3", "--seconds", "5"), "a run has one length"),
    ((*TUNE, "--micro-batch-size", "0"), "micro_batch_size is 0"),
    ((*TUNE, "--warmup", "1.5"), "warmup is 1.5"),
    ((*TUNE, "--schedule", "cosin"), "'cosine'"),
    ((*TUNE, "--precision", "fp16"), "CUDA"),
    ((*TUNE, "--matmul-precision", "low"), "matmul_precision"),
    ((*TUNE, "--patience", "2"), "evaluate_every"),
    ((*TUNE, "--resume", "x/step-000000004"), "no such folder"),
    ((*TUNE, "--track", "wandbb"), "'wandb'"),
    ((*TUNE, "--tokenizer", "nowhere"), "'nowhere' holds no tokenizer"),
    ((*TUNE, "--scheme", "rezero", "--scheme-options", "{"), "JSON"),
    (("finetune", "--depth", "2", "--width", "9", "--heads", "2", "--task", "agreement", "--output", "x"), "heads"),
    (("finetune", "--depth", "2", "--width", "8", "--family", "brt", "--task", "agreement", "--output", "x"), "'bert'"),
    (("pretrain", "--corpus", "nothing*.txt", "--model", "MODEL", "--output", "x"), "nothing*.txt"),
    (("pretrain", "--corpus", ".", "--depth", "2", "--width", "8", "--output", "x"), "needs a tokenizer"),
    (("pretrain", "--corpus", ".", "--model", "MODEL", "--objective", "nsp", "--output", "x"), "'nsp'"),
    (("pretrain", "--corpus", ".", "--model", "MODEL", "--output", "x"), "no"),
    (("finetune", "--model", "MODEL", "--output", "x"), "give --task, or both --train-file and --validation-file"),
    (("finetune", "--model", "MODEL", "--train-file", "a.csv", "--output", "x"), "given: --train-file"),
    (("finetune", "--model", "MODEL", "--task", "agreement", "--text", "a", "--output", "x"), "your own files"),
    (("predict", "MODEL", "--task", "mprc", "--output", "x"), "'mrpc'"),
    (("predict", "MODEL", "--task", "mrpc", "--data", "nowhere", "--output", "x"), "nowhere"),
    (("predict", "MODEL", "--task", "agreement", "--output", "x"), "unknown split 'test'"),
    (("predict", "MODEL", "--task", "agreement", "--split", "validation", "--output", "x"), "not fine-tuned"),
    (("finetune", "--model", "MODEL", "--task", "agreement", "--placement", "pre", "--output", "x"), "scheme as well"),
    (("finetune", "--model", "MODEL", "--task", "agreement", "--train-size", "0", "--output", "x"), "train_size"),
    ((*TUNE, "--dropout", "0.5", "--heads", "3"), "--heads, --dropout: of a new model"),
    ((*TUNE, "--init", "foo"), "unknown init 'foo'. Known: paper, preserve"),
    ((*TUNE, "--init", "preserve"), "init 'preserve' is of a scheme"),
    ((*TUNE, "--seed", "99999999999999999999"), "below 2^63"),
    ((*TUNE, "--max-length", "2"), "max_length is 2, and 2 tokens are special"),
    ((*TUNE, "--push-to-hub", "mine"), "OWNER/NAME"),
    ((*TUNE, "--dry-run", "--track", "wandbb"), "'wandb'"),
    (("finetune", "--model", "./nowhere", "--task", "agreement", "--output", "x"), "there is no such folder"),
    (("pretrain", "--corpus", "nothing*.txt", "--model", "MODEL", "--output", "x", "--dry-run"), "nothing*.txt"),
    (("pretrain", "--corpus", "nothing", "--model", "MODEL", "--output", "x", "--tokens", "0"), "tokens is 0"),
    (("pretrain", "--corpus", "nothing", "--model", "MODEL", "--output", "x", "--held-out", "0"), "held_out is 0"),
    (("pretrain", "--corpus", "nothing", "--model", "MODEL", "--output", "x", "--push-to-hub", "m"), "OWNER/NAME"),
    (("pretrain", "--corpus", "nothing", "--model", "MODEL", "--output", "x", "--resume", "y"), "'y' is no checkpoint"),
    (("finetune", "--model", "nowhere", "--task", "agreement", "--output", "x", "--resume", "y"), "is no checkpoint"),
    ((*COMPARE, "--weight-inits", "xav"), "xavier"),
    ((*COMPARE, "--precision", "fp8"), "fp8"),
    ((*COMPARE, "--max-length", "2"), "max_length"),
    ((*COMPARE, "--init", "preserve", "--schemes", "pre_ln"), "cannot keep"),
    ((*COMPARE, "--schemes", "post_ln:placement=pre"), "fixes where"),
    ((*COMPARE, "--schemes", "highway:init=preserve"), "sets 'init', which is of the encoder"),
    ((*COMPARE, "x.toml"), "x.toml"),
    ((*FINETUNE, "--scheme", "highway", "--scheme-options", "{bias: 1}"), "write a JSON object"),
    ((*FINETUNE, "--scheme", "highway:bias=1", "--scheme-options", '{"bias": 1}'), "one of the two ways"),
    ((*FINETUNE, "--scheme", "highway", "--scheme-options", '{"placement": "pre"}'), "give it as --placement"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a)[:60] for a, _ in WRONG])
def test_wrong_input_is_one_clear_message(resformer, checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, text = resformer(*(checkpoint if argument == "MODEL" else argument for argument in arguments))
    assert code == 2, text
    assert message in text
    assert not (tmp_path / "x").exists(), "nothing may be written before the input is checked"


def test_of_several_processes_one_tells_what_is_wrong(resformer, monkeypatch):
    """The launcher ends those that wait when the first fails; what the first does not meet is told nevertheless."""
    waits = []
    monkeypatch.setattr(speaking.time, "sleep", waits.append)
    for rank, waited in (("0", []), ("1", [speaking.WAIT])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        code, text = resformer("data", "sentimnt", "--output", "x")
        assert (code, waits) == (2, waited)
        assert "Did you mean 'sentiment'" in text


def test_processes_part_at_the_end(resformer, tmp_path):
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert resformer("data")[0] == 0
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def test_compiling_is_said(resformer, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda model, dynamic: model)
    common = ("finetune", "--model", checkpoint, "--task", "agreement", "--train-size", 20, "--steps", 1, "--dry-run")
    assert COMPILING in " ".join(resformer(*common, "--compile", "--output", tmp_path / "a")[1].split())
    assert "compile" not in resformer(*common, "--output", tmp_path / "a")[1]


def test_a_folder_without_tokenizer_or_whole_weights_is_refused(resformer, checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    arguments = ("finetune", "--model", tmp_path, "--task", "agreement", "--output", tmp_path / "x")
    code, text = resformer(*arguments)
    assert code == 2
    assert "tokenizer" in text
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:500])
    code, text = resformer(*arguments)
    assert code == 2
    assert "weights" in text


def test_a_run_that_is_asked_to_stop_exits_with_75_and_goes_on(resformer, checkpoint, tmp_path, monkeypatch):
    from training_runs import stopped_by

    steps = ("--steps", 6, "--batch-size", 4, "--train-size", 50)
    arguments = ("finetune", "--model", checkpoint, "--task", "agreement", *steps, "--output", tmp_path / "a")
    with stopped_by(monkeypatch, 3):
        code, text = resformer(*arguments)
    assert code == 75
    assert "the same command goes on" in text
    code, text = resformer(*arguments)
    assert code == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()] == [
        *range(1, 7)
    ]
    code, text = resformer(*arguments)
    assert code == 2
    assert "this run is finished" in text


def test_a_new_model_of_the_words_of_a_task(resformer, tmp_path):
    sizes = ("--depth", 2, "--width", 8, "--heads", 2, "--scheme", "rezero", "--steps", 3, "--train-size", 50)
    arguments = ("finetune", *sizes, "--task", "agreement", "--output", tmp_path / "a")
    code, text = resformer(*arguments, "--dry-run")
    assert code == 0
    for words in ("3 steps of 32 examples, 1.5 passes", "first step   loss 0.", "activations"):
        assert words in text
    assert not (tmp_path / "a").exists()
    code, text = resformer(*arguments)
    assert code == 0, text
    assert "flag constant_prediction: gave every" in text
    assert max(map(len, text.splitlines())) <= 80 or str(tmp_path) in text
    code, text = resformer(*arguments, "--dry-run")
    assert code == 2
    assert "this run is finished" in text
    again = ("finetune", "--task", "agreement", "--output", tmp_path / "b", "--model", tmp_path / "a")
    code, text = resformer(*again)
    assert code == 2
    assert "is the folder of a run; its model is" in text
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["depth"], config["width"], config["scheme"], config["train_size"]) == (2, 8, "rezero", 50)
    assert "model" not in config


def test_divergence_is_no_success(resformer, checkpoint, tmp_path):
    steps = ("--steps", 4, "--batch-size", 4, "--train-size", 50, "--learning-rate", 1e30, "--clip", 0)
    code, text = resformer("finetune", "--model", checkpoint, "--task", "agreement", *steps, "--output", tmp_path / "a")
    assert code == 3
    assert "not finite" in text


def test_gpt2_gets_a_pad_token(resformer, checkpoint, tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2Model

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), eos_token_id=3, bos_token_id=3)
    GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    common = ("--task", "agreement", "--steps", 2, "--batch-size", 4, "--train-size", 20, "--scheme", "highway")
    code, text = resformer("finetune", "--model", tmp_path / "gpt2", *common, "--output", tmp_path / "a")
    assert code == 0, text


def test_folder_of_something_else_is_refused(resformer, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    code, text = resformer(
        "compare", "--schemes", "rezero", "--depths", 1, "--tasks", "agreement", "--output", tmp_path
    )
    assert code == 2
    assert "holds" in text
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_piece_without_cells_is_no_failure(resformer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = resformer(*COMPARE, "--no-controls", "--shard", "3/9")
    assert code == 0, text
    assert "piece 3/9 has no cells: there are 1" in " ".join(text.split())
    assert not (tmp_path / "x").exists()


def test_start_is_cheap():
    code = """
import sys
from resformer.cli import main
try:
    main(["--help"])
finally:
    print([name for name in ("torch", "transformers", "datasets") if name in sys.modules], file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "schemes" in ran.stdout
    assert ran.stderr == "[]\n"
