"""A run: how a step is taken, what is seen of it, what it leaves."""

import importlib.util
import io
import json
import math

import pytest
import torch
from accelerate.tracking import GeneralTracker, register_tracker_class
from rich.console import Console
from training_fakes import TASK, tiny_bert, tiny_data, tiny_tokenizer
from training_runs import SETTINGS, log, train, whole_run
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import resformer
from resformer.optim import scheme_parameters
from resformer.train.finetune import finetune, finetuning
from resformer.train.rehearsal import rehearse
from resformer.train.settings import Settings


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory)


def test_a_rehearsal_of_a_loss_that_is_no_number(tmp_path):
    settings = Settings(**SETTINGS)
    model = resformer.patch(tiny_bert(), "rezero", init="paper")
    torch.nn.init.constant_(model.classifier.bias, math.inf)
    found = rehearse(model, finetuning(model, tiny_tokenizer(), TASK, tiny_data(), settings), tmp_path / "x", settings)
    assert not math.isfinite(found.step.loss)
    assert "loss nan" in shown(found) or "loss inf" in shown(found)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("micro", "batch"), [(None, 8), (3, 3), (100, 8)])
def test_a_rehearsal_is_of_a_micro_batch(tmp_path, micro, batch):
    settings = Settings(**(SETTINGS | {"micro_batch_size": micro}))
    model = resformer.patch(tiny_bert(), "rezero", init="paper")
    job = finetuning(model, tiny_tokenizer(), TASK, tiny_data(), settings)
    assert rehearse(model, job, tmp_path / "x", settings).plan.batch == batch


def test_a_rehearsal_looks_at_the_folder(whole):
    settings = Settings(**SETTINGS)
    model = resformer.patch(tiny_bert(), "rezero", init="paper")
    job = finetuning(model, tiny_tokenizer(), TASK, tiny_data(), settings)
    with pytest.raises(ValueError, match="this run is finished"):
        rehearse(model, job, whole, settings)
    assert rehearse(model, job, whole, settings, overwrite=True).epoch == 8
    assert (whole / "result.json").exists(), "and deletes nothing"


def shown(what):
    with io.StringIO() as text:
        Console(file=text, width=80).print(what)
        return text.getvalue()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_parts_of_a_batch_give_what_the_whole_gives(tmp_path, whole, size):
    parts = train(tmp_path / "parts", micro_batch_size=size, dropout=0.0)
    at_once = train(tmp_path / "whole", dropout=0.0)
    losses = [[line["loss"] for line in log(tmp_path / name)] for name in ("parts", "whole")]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    assert parts["config"] == at_once["config"]


def test_gradients_are_clipped_as_asked(tmp_path):
    """Adam follows directions, but nothing below its epsilon of 1e-8."""
    losses = {}
    for clip in (0.0, 1.0, 1e-12):
        train(tmp_path / str(clip), clip=clip, dropout=0.0, steps=6, warmup=0.0, evaluate_every=None)
        losses[clip] = [line["loss"] for line in log(tmp_path / str(clip))]
        assert max(line["grad_norm"] for line in log(tmp_path / str(clip))) > 1.0
    still = losses.pop(1e-12)
    assert all(abs(found[-1] - still[-1]) > 0.01 for found in losses.values())
    assert losses[0.0] != pytest.approx(losses[1.0], rel=1e-6)


def test_a_scheme_learns_at_its_own_rate(tmp_path):
    """The first step of Adam is as long as the learning rate, in every coordinate."""
    model = resformer.patch(tiny_bert(), "rezero", init="paper")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = Settings(steps=1, warmup=0.0, learning_rate=1e-3, weight_decay=0.0, scheme_lr_multiplier=7.0)
    finetune(model, tiny_tokenizer(), TASK, tiny_data(), tmp_path, settings, progress=False, save_model=False)
    scheme = {id(p) for p in scheme_parameters(model)}
    moved = {True: 0.0, False: 0.0}
    for name, p in model.named_parameters():
        moved[id(p) in scheme] = max(moved[id(p) in scheme], float((p.detach() - before[name]).abs().max()))
    assert moved == {True: pytest.approx(7e-3, rel=1e-3), False: pytest.approx(1e-3, rel=1e-3)}


def test_checkpointed_layers_give_the_same(tmp_path, whole):
    train(tmp_path / "run", gradient_checkpointing=True)
    assert [line["loss"] for line in log(tmp_path / "run")] == [line["loss"] for line in log(whole)]


def test_layers_are_watched(tmp_path):
    train(tmp_path / "run", watch_every=5)
    looks = log(tmp_path / "run", "layers.jsonl")
    assert [look["step"] for look in looks] == [5, 10, 15, 20]
    assert [(site["layer"], site["site"]) for site in looks[0]["sites"]] == [
        (layer, site) for layer in (0, 1) for site in ("attn", "ffn")
    ]
    assert all(site["branch_to_stream"] > 0 for look in looks for site in look["sites"])
    scalars = [site["a"] for look in looks for site in look["sites"] if "a" in site]
    assert scalars[0] != scalars[-1], "they learn"
    assert [line["loss"] for line in log(tmp_path / "run")] == [
        line["loss"] for line in (train(tmp_path / "other"), log(tmp_path / "other"))[1]
    ]


def test_trackers_are_told(tmp_path):
    told = []

    class Memory(GeneralTracker):
        name, requires_logging_directory = "memory", False

        def __init__(self, run_name, **kwargs):
            super().__init__()

        @property
        def tracker(self):
            return told

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step=None, **kwargs):
            told.append((step, values))

    register_tracker_class(Memory)
    train(tmp_path / "run", track=("memory",))
    assert told[0]["learning_rate"] == 3e-3
    assert [step for step, values in told[1:] if "validation/accuracy" in values] == [7, 14, 20]
    assert {step: values["loss"] for step, values in told[1:] if "loss" in values}[20] == log(tmp_path / "run")[-1][
        "loss"
    ]
    with pytest.raises(ValueError, match=r"unknown tracker 'tensorbord'\. Did you mean 'tensorboard'"):
        train(tmp_path / "other", track=("tensorbord",))
    monkeyed = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name) is None]
    for name in monkeyed:
        with pytest.raises(ValueError, match=f"tracker '{name}' is not installed; pip install {name}"):
            train(tmp_path / "other", track=(name,))
    assert not (tmp_path / "other").exists()


def test_the_residual_stream_stays_in_fp32(tmp_path):
    """Under bf16 every sublayer computes in it, and what they add to does not."""
    for placement in ("pre", "post"):
        model = resformer.patch(tiny_bert(layers=4), "identity", init="paper", placement=placement)
        ids = torch.arange(8).reshape(1, 8) % 12
        with torch.autocast("cpu", torch.bfloat16):
            found = model(input_ids=ids, output_hidden_states=True).hidden_states
            inner = model.bert.encoder.layer[0].attention.self.query(found[0])
        assert {state.dtype for state in found} == {torch.float32}
        assert inner.dtype == torch.bfloat16


def test_the_card_lies_beside_the_weights(whole):
    card = (whole / "model" / "README.md").read_text()
    assert "BertForSequenceClassification, 2 layers, width 16" in card
    assert "rezero" in card
    assert "resformer.from_pretrained" in card


def test_what_it_cost_and_was_measured_on(whole):
    result = json.loads((whole / "result.json").read_text())
    data, tokenizer = tiny_data(), tiny_tokenizer()
    lengths = [len(ids) for ids in tokenizer(list(data["train"]["sentence"]))["input_ids"]]
    assert result["cost"]["tokens"] == pytest.approx(20 * 8 * sum(lengths) / 64, abs=1)
    model = resformer.patch(tiny_bert(), "rezero", init="paper")
    tables = sum(p.numel() for name, p in model.named_parameters() if "embeddings" in name and p.ndim == 2)
    wanted = 6 * (sum(p.numel() for p in model.parameters()) - tables) * 20 * 8 * sum(lengths) / 64
    assert result["cost"]["flops"] == pytest.approx(wanted)
    assert result["examples"] == {"validation": 40}
    assert set(result["higher_is_better"].items()) >= {("accuracy", True), ("majority", True)}
    assert result["patched"]["scheme"] == "rezero"
    assert result["settings"]["save_every"] == 3


def test_only_on_request_the_model_goes_to_the_hub(tmp_path, monkeypatch):
    from resformer.train import result

    sent = []

    class Api:
        def create_repo(self, name, exist_ok):
            sent.append(name)

        def upload_folder(self, *, repo_id, folder_path):
            sent.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(result, "HfApi", Api)
    settings = Settings(**(SETTINGS | {"steps": 2}))
    model = resformer.patch(tiny_bert(), "rezero")
    finetune(model, tiny_tokenizer(), TASK, tiny_data(), tmp_path, settings, progress=False, push_to="me/mine")
    assert sent[0] == "me/mine"
    assert sent[1][0] == "me/mine"
    assert {"README.md", "config.json", "model.resformer.safetensors"} <= set(sent[1][1])


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_operations_are_nearly_those_counted(family):
    """But for the products within attention, a few percent of these."""
    from resformer.train.plan import plan
    from resformer.train.result import _computing

    auto = AutoModelForCausalLM if family == "gpt2" else AutoModelForMaskedLM
    sizes = {"family": family, "vocab_size": 1000, "max_length": 32, "heads": 2}
    model = resformer.build_encoder(4, 64, "identity", auto=auto, **sizes)
    counted = plan(model, batch=1, length=32, precision="fp32").flops_per_token
    assert 0.9 < 6 * _computing(model, 1.0) / counted < 1.0
    assert 6 * (_computing(model, 1.0) - _computing(model, 0.15)) == pytest.approx(6 * 0.85 * 1000 * 64)
