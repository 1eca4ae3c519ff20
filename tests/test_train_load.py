"""What a run starts from."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fakes import TASK, tiny_bert, tiny_tokenizer
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from resformer import build_encoder, patch, unpatch
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


# --------------------------------------------------------------------------------------------------- what is new


def saved(model, folder, *, without: tuple[str, ...] = ()):
    """A checkpoint that lacks the weights with these words in their names."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if without:
        (file,) = folder.glob("model*.safetensors")
        weights = {name: p for name, p in load_file(file).items() if not any(word in name for word in without)}
        save_file(weights, file, {"format": "pt"})
    return str(folder)


def loaded(path, *, auto=CLASSIFY, **options):
    torch.manual_seed(99)  # of which nothing must depend
    return load_model(path, auto, task=TASK, **options)[0]


def test_a_new_head_follows_from_the_seed_and_its_names(tmp_path):
    tiny = tiny_bert()
    first = loaded(saved(tiny, tmp_path / "a", without=("classifier",)))
    pooler = tiny.bert.pooler.dense.weight
    assert torch.equal(first.bert.pooler.dense.weight, pooler)
    assert not first.classifier.bias.any()
    assert float(first.classifier.weight.detach().std()) == pytest.approx(0.2, rel=0.5)

    more_is_new = loaded(saved(tiny, tmp_path / "b", without=("classifier", "pooler")))
    assert not torch.equal(more_is_new.bert.pooler.dense.weight, pooler)
    assert float(more_is_new.bert.pooler.dense.weight.detach().std()) == pytest.approx(0.2, rel=0.2)
    other_labels = loaded(saved(tiny_bert(num_labels=3), tmp_path / "c"))
    deeper = loaded(saved(tiny_bert(layers=3), tmp_path / "d", without=("classifier",)))
    patched = loaded(saved(patch(tiny, "concat", init="paper"), tmp_path / "e", without=("classifier",)))
    for other in (more_is_new, other_labels, deeper, patched):
        assert torch.equal(other.classifier.weight, first.classifier.weight)
    assert not torch.equal(loaded(str(tmp_path / "a"), seed=1).classifier.weight, first.classifier.weight)


def test_a_scheme_on_a_checkpoint_draws_the_same_whatever_is_new(tmp_path):
    whole, headless = saved(tiny_bert(), tmp_path / "a"), saved(tiny_bert(), tmp_path / "b", without=("classifier",))
    one, other = (loaded(path, scheme="concat", init="paper").state_dict() for path in (whole, headless))
    inside = [name for name in one if name.endswith("resformer.attn.weight")]
    assert len(inside) == 2
    assert all(torch.equal(one[name], other[name]) for name in inside)


def test_a_new_head_is_that_of_a_new_model(tmp_path):
    built = start(depth=3)
    found = loaded(saved(built, tmp_path / "model", without=("classifier",)))
    assert torch.equal(found.classifier.weight, built.classifier.weight)


@pytest.mark.parametrize("family", ["bert", "albert", "roberta", "modernbert"])
def test_a_new_head_is_distributed_as_its_class_has_it(tmp_path, family):
    """And nothing that the checkpoint brings is drawn, tied tables included."""
    body = unpatch(build_encoder(1, 32, family=family, vocab_size=12, max_length=16, heads=2))
    path = saved(body, tmp_path / "model")
    for auto in (AutoModelForMaskedLM, CLASSIFY):
        plain = dict(auto.from_pretrained(path).named_parameters(remove_duplicate=False))
        brought = {id(p) for p in plain.values() if any(torch.equal(p, q) for q in body.parameters() if p.ndim > 1)}
        drawn = 0
        for name, p in loaded(path, auto=auto).named_parameters(remove_duplicate=False):
            before = plain[name]
            if id(before) in brought or not before.std() > 0:
                assert torch.equal(p, before), name
            else:
                drawn += 1
                spread = 5 / math.sqrt(p.numel())
                assert float(p.detach().std()) == pytest.approx(float(before.detach().std()), rel=spread), name
                assert not torch.equal(p, before), name
        assert drawn
