"""`resformer diagnose`: models and texts as they are named, tables within 80 columns, files, clear errors."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, T5Config
from transformers import T5ForConditionalGeneration as T5

from resformer import cli
from resformer.data.tokenizer import train_tokenizer
from resformer.diagnosing import SENTENCES, objective, subject
from resformer.diagnostics.measures import MEASURES, summary
from resformer.patching import patch
from resformer.train.start import Start

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def resformer(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

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
def folders(tmp_path_factory):
    """A patched classifier and an encoder-decoder, with tokenizers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(SENTENCES)
    model = BertForSequenceClassification(BertConfig(**SMALL, vocab_size=len(tokenizer), num_labels=3))
    patch(model, "hyper_connections", init="paper").save_pretrained(folder / "patched")
    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=len(tokenizer))
    config.decoder_start_token_id = 0
    T5(config).save_pretrained(folder / "t5")
    for name in ("patched", "t5"):
        tokenizer.save_pretrained(folder / name)
    return folder


def test_all_measures_of_a_new_model(resformer, tmp_path):
    options = ("--depth", 3, "--width", 32, "--scheme", "mhc", "--texts", 4, "--output", tmp_path / "out")
    code, text = resformer("diagnose", *options)
    assert code == 0, text
    assert all(len(line) <= 80 for line in text.replace(str(tmp_path), "").splitlines())
    assert "BertForMaskedLM (family bert, 3 layers, patched with mhc), on 4 texts" in text
    for name in MEASURES:
        content = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert content["rows"]
        assert (tmp_path / "out" / f"{name}.csv").read_text().count("\n") == len(content["rows"]) + 1
        assert "</svg>" in (tmp_path / "out" / f"{name}.svg").read_text()
        assert summary(name).endswith(".")


def test_folders_and_measures_by_name(resformer, folders):
    code, text = resformer("diagnose", folders / "patched", "--measure", "gradient_flow", "gates", "--texts", 3)
    assert code == 0, text
    assert "BertForSequenceClassification" in text
    assert "--task gives real ones" in " ".join(text.split())
    assert "verdict" in text
    assert "mixture" in text
    assert "Drift" not in text
    code, text = resformer("diagnose", folders / "t5", "--measure", "signal_propagation", "--texts", 3)
    assert code == 0, text
    assert "2 + 2 layers" in text
    assert "cross" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_texts_of_a_file_and_of_a_task(resformer, tmp_path):
    (tmp_path / "text.txt").write_text("one line of words\n\nanother line of other words\n\na third\n")
    new = ("--depth", 2, "--width", 16, "--measure", "gradient_flow")
    code, text = resformer("diagnose", *new, "--data", tmp_path / "text.txt", "--family", "gpt2", "--texts", 2)
    assert code == 0, text
    assert "GPT2LMHeadModel" in text
    assert "2 texts" in text
    assert "next token" in text
    code, text = resformer("diagnose", *new, "--task", "sentiment", "--texts", 5)
    assert code == 0, text
    assert "5 texts" in text
    assert "loss: task sentiment" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give MODEL, a checkpoint, or --depth and --width"),
        (("--depth", 2, "--width", 16, "--measure", "gradient_flo"), "unknown measure 'gradient_flo'. Did you mean"),
        (("--depth", 2, "--width", 16, "--task", "sentimen"), "unknown task 'sentimen'"),
        (("--depth", 1, "--width", 16, "--measure", "gradient_flow"), "needs at least two layers"),
        (("--depth", 2, "--width", 16, "--texts", 0), "texts must be at least 1, got 0"),
        (("--depth", 2, "--width", 16, "--max-length", 2), "max_length must be at least 3"),
        (("--depth", 2, "--width", 16, "--output", __file__), "is a file; give a folder"),
        (("--depth", 2, "--width", 16, "--data", "none.txt"), "none.txt"),
        (("nowhere", "--depth", 2), "are both given"),
    ],
)
def test_wrong_arguments(resformer, arguments, message):
    code, text = resformer("diagnose", *arguments)
    assert code == 2
    assert message in " ".join(text.split())


def test_a_folder_without_a_tokenizer_is_refused(resformer, folders, tmp_path):
    """T5's, too, of which transformers makes one of nothing."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders / "t5" / name).read_bytes())
    code, text = resformer("diagnose", tmp_path)
    assert code == 2
    assert "holds no tokenizer; save it there" in " ".join(text.split())


def test_what_refuses_does_not_stop_the_others(resformer, monkeypatch):
    """Unless it was asked for by name, or nothing is left."""
    for name in set(MEASURES) - {"signal_propagation", "shattering"}:
        monkeypatch.delitem(MEASURES, name)
    new = ("--depth", 2, "--width", 16, "--texts", 1)
    code, text = resformer("diagnose", *new)
    assert code == 0, text
    assert "shattering was not measured: " in text
    assert "two of them or more, got 1" in " ".join(text.split())
    assert "centred states" in text, "of signal_propagation"
    code, text = resformer("diagnose", *new, "--measure", "signal_propagation", "shattering")
    assert code == 2
    assert "two of them or more, got 1" in " ".join(text.split())
    code, text = resformer("diagnose", "--depth", 1, "--width", 16)
    assert code == 2
    assert "needs at least two layers" in " ".join(text.split())


def test_labels_that_fit_the_loss(folders):
    """Masked tokens alone, the text itself without padding, or classes in turn."""
    masked = subject(Start(depth=2, width=16))
    assert 0.1 < float((masked.batch["labels"] != -100).sum() / masked.batch["attention_mask"].sum()) < 0.2
    causal = subject(Start(depth=2, width=16, family="gpt2")).batch
    assert torch.equal(causal["labels"] != -100, causal["attention_mask"] == 1)
    assert subject(Start(model=str(folders / "patched")), texts=4).batch["labels"].tolist() == [0, 1, 2, 0]
    assert objective(Start(model=str(folders / "t5"))) == "copying"
    again = subject(Start(depth=2, width=16))
    assert torch.equal(again.batch["input_ids"], masked.batch["input_ids"])
    for p, q in zip(again.model.parameters(), masked.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_model_keeps_its_classes(folders):
    found = subject(Start(model=str(folders / "patched")), texts=2)
    assert found.model.config.num_labels == 3
    assert isinstance(found.model, AutoModelForSequenceClassification._model_mapping[BertConfig])
