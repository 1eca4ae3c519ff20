"""transformers.Trainer with patched models: resume, the best model at the end, reload; and never the wrong weights."""

import copy
import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import resformer
from resformer.layer import Residual
from resformer.schedule import progress
from resformer.testing.hosts import VOCAB, randomize, tiny_host
from resformer.trainer import load_weights

CLASSIFY = AutoModelForSequenceClassification


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(3, VOCAB, (6,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": i % 2}


def patched(family="bert", scheme="highway", auto=CLASSIFY, **options):
    model = resformer.patch(tiny_host(family, auto, dtype=torch.float32), scheme, init="paper", **options)
    randomize(model, scale=0.1)
    return model


def make_trainer(model, directory, optimizer=None, metrics=None, **changes):
    arguments = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_steps": 2,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    optimizers = (optimizer, None)
    arguments = TrainingArguments(**(arguments | changes))
    return Trainer(
        model, arguments, train_dataset=Texts(), eval_dataset=Texts(), optimizers=optimizers, compute_metrics=metrics
    )


def assert_same_weights(found, expected):
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def grouped(model):
    """The line of the documentation that keeps weight decay away from gates."""
    return torch.optim.AdamW(resformer.param_groups(model, 0.01, 0.1, scheme_lr_multiplier=5.0))


@pytest.mark.parametrize(
    ("scheme", "with_groups"), [("highway", True), ("hyper_connections", False), ("post_ln", True)]
)
def test_resume_is_as_if_never_stopped(tmp_path, scheme, with_groups):
    whole = patched(scheme=scheme)
    again = copy.deepcopy(whole)
    make_trainer(whole, tmp_path / "whole", grouped(whole) if with_groups else None).train()
    trainer = make_trainer(again, tmp_path / "whole", grouped(again) if with_groups else None)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert trainer.state.global_step == 6
    assert_same_weights(again, whole)
    found = resformer.from_pretrained(tmp_path / "whole" / "checkpoint-6", CLASSIFY)
    assert_same_weights(found, whole)
    if with_groups:
        groups = {group["name"]: group for group in trainer.optimizer.param_groups}
        assert groups["decayed"]["weight_decay"] == 0.1
        if "scheme" in groups:
            assert groups["scheme"]["weight_decay"] == 0
            assert groups["scheme"]["initial_lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("scheme", ["rezero", "plain"])
def test_the_best_model_comes_back(tmp_path, monkeypatch, scheme, sharded):
    model = patched(scheme=scheme)
    if sharded:
        save = functools.partial(model.save_pretrained, max_shard_size="10KB")
        monkeypatch.setattr(model, "save_pretrained", save)
    scores = iter([0.0, 1.0, 0.5])
    trainer = make_trainer(
        model,
        tmp_path,
        metrics=lambda prediction: {"score": next(scores)},
        load_best_model_at_end=True,
        metric_for_best_model="score",
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert len(list((tmp_path / "checkpoint-4").glob("*.safetensors"))) > 1 or not sharded
    assert_same_weights(model, resformer.from_pretrained(tmp_path / "checkpoint-4", CLASSIFY))
    last = resformer.from_pretrained(tmp_path / "checkpoint-6", CLASSIFY)
    assert any(not torch.equal(value, last.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "auto"), [("gpt2", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM), ("modernbert", CLASSIFY)]
)
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_weights_are_put_back(tmp_path, family, auto, shard):
    """Also where two names share a tensor."""
    model = patched(family, auto=auto)
    expected = copy.deepcopy(model)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    randomize(model)
    load_weights(model, tmp_path)
    assert_same_weights(model, expected)


def test_other_weights_are_refused(tmp_path):
    model = patched()
    host = tiny_host("bert", CLASSIFY, dtype=torch.float32)
    host.save_pretrained(tmp_path / "host")
    patched(scheme="exclusive_gate").save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "host" / "trainer_state.json").write_text(json.dumps({}))
    for name, message in (("host", "holds no patched model"), ("other", "patched otherwise")):
        with pytest.raises(ValueError, match=message):
            make_trainer(model, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / name))
    with pytest.raises(ValueError, match="valid checkpoint"):
        make_trainer(host, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "ours"))
    deeper = resformer.patch(tiny_host("bert", CLASSIFY, layers=3, dtype=torch.float32), "highway", init="paper")
    with pytest.raises(ValueError, match="missing"):
        load_weights(deeper, tmp_path / "ours")
    (tmp_path / "ours" / "model.resformer.safetensors").unlink()
    trainer = make_trainer(model, tmp_path / "run")
    trainer.state.best_model_checkpoint = str(tmp_path / "ours")
    with pytest.raises(ValueError, match="holds no patched model"):
        trainer._load_best_model()


def test_a_host_is_trained_as_before(tmp_path):
    host = tiny_host("bert", CLASSIFY, dtype=torch.float32)
    again = copy.deepcopy(host)
    make_trainer(host, tmp_path).train()
    make_trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(again, host)


def test_what_decays_where_trainer_makes_the_optimizer(tmp_path):
    """The other lines of the documentation, for models that Trainer shards."""

    class Undecayed(Trainer):
        def get_decay_parameter_names(self, model):
            return [name for name in super().get_decay_parameter_names(model) if ".resformer." not in name]

    model = patched()
    groups = Undecayed(model, make_trainer(model, tmp_path).args).create_optimizer().param_groups
    own = {id(p) for name, p in model.named_parameters() if ".resformer." in name}
    assert own <= {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert any(group["weight_decay"] == 0.1 and group["params"] for group in groups)


def test_schedules_follow_the_steps_and_go_on_after_a_stop(tmp_path):
    def run(steps: int, **more):
        torch.manual_seed(0)
        model = resformer.patch(tiny_host("bert", CLASSIFY, dtype=torch.float32), "branch_norm", init="paper", warmup=8)
        trainer = make_trainer(model, tmp_path, max_steps=steps, save_steps=2)
        trainer.train(**more)
        return progress(model)

    assert run(4) == 4
    assert run(6, resume_from_checkpoint=str(tmp_path / "checkpoint-4")) == 6


def test_the_first_batch_calibrates(tmp_path):
    model = resformer.patch(tiny_host("bert", CLASSIFY, dtype=torch.float32), "admin", init="paper")
    make_trainer(model, tmp_path, max_steps=1).train()
    assert all((own.ffn.w > 1.01).all() for own in (m for m in model.modules() if isinstance(m, Residual)))


def test_weights_that_do_not_fit_are_refused_before_any_is_loaded(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.resformer.safetensors"
    weights = {key: value + 1 for key, value in load_file(path).items()}
    weights.pop(next(key for key in weights if "resformer" in key))
    save_file(weights, path, metadata={"format": "pt"})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="do not fit"):
        load_weights(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
