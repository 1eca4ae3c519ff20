"""What a run starts from."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fakes import TASK, tiny_bert, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from resformer.patching import is_patched
from resformer.train.load import load_model, start_model
from resformer.train.start import Start

CLASSIFY = AutoModelForSequenceClassification


def start(*, length=32, precision="fp32", say=lambda text: None, **given):
    given = {"depth": 2, "width": 8, "heads": 2} | given
    options = {"seed": 0, "length": length, "precision": precision, "say": say}
    return start_model(Start(**given), CLASSIFY, task=TASK, tokenizer=tiny_tokenizer(), **options)[0]


@pytest.fixture
def checkpoint(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice is for CPUs")
def test_the_attention_that_is_faster_on_cpus():
    kinds = {
        (p, n): start(precision=p, length=n).config._attn_implementation for p in ("fp32", "bf16") for n in (8, 513)
    }
    assert kinds == {("fp32", 8): "sdpa", ("fp32", 513): "sdpa", ("bf16", 8): "eager", ("bf16", 513): "sdpa"}
    assert start(precision="bf16", attention="sdpa").config._attn_implementation == "sdpa"


def test_without_a_scheme_a_new_model_is_a_plain_one():
    assert not is_patched(start())
    assert is_patched(start(scheme="rezero"))


def test_how_nearly_the_parameters_match_is_said():
    said = []
    model = start(width=None, depth=4, match_parameters="2x8", say=said.append)
    assert said == [f"matched: {said[0].removeprefix('matched: ')}"]
    assert f"width {model.config.hidden_size}: " in said[0]
    assert "% of" in said[0]


def test_weights_that_are_not_those_of_the_configuration_are_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    load_model(str(checkpoint), CLASSIFY, task=TASK)
    save_file({f"wrong.{name}": value for name, value in weights.items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"not those of its configuration, a BertForSequence.*: of \d+ they"):
        load_model(str(checkpoint), CLASSIFY, task=TASK)
    key = "bert.encoder.layer.1.output.dense.weight"
    save_file(weights | {key: weights[key][:, :7].contiguous()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layer.1.output.dense.weight has shape \(16, 7\), and \(16, 32\) is needed"):
        load_model(str(checkpoint), CLASSIFY, task=TASK)


def test_a_head_may_be_new(checkpoint):
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "classifier" not in name}, file, {"format": "pt"})
    model, _ = load_model(str(checkpoint), CLASSIFY, task=TASK)
    assert torch.equal(
        model.bert.encoder.layer[1].output.dense.weight, weights["bert.encoder.layer.1.output.dense.weight"]
    )
