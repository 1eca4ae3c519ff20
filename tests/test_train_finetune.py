"""One fine-tuning run, end to end, on a tiny random BERT."""

import json
import math

import numpy as np
import pytest
import torch
from training_fakes import PAIR, SCORE, TASK, tiny_bert, tiny_data, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from resformer.data.tasks import Task
from resformer.files import write_json_atomically
from resformer.train.finetune import finetune
from resformer.train.settings import Settings

SETTINGS = {"batch_size": 8, "learning_rate": 3e-3, "warmup": 0.1}
OTHERS = ("max_length", "resume", "overwrite", "save_model", "describe", "diagnostics")


def run(output, *, task=TASK, model=None, tokenizer=None, data=None, **given):
    others = {name: given.pop(name) for name in OTHERS if name in given}
    return finetune(
        tiny_bert() if model is None else model,
        tokenizer or tiny_tokenizer(),
        task,
        data or tiny_data(task),
        output,
        Settings(**(SETTINGS | given)),
        **({"save_model": False, "progress": False} | others),
    )


def lines(output):
    return [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]


def test_a_run_fits_its_examples_and_says_so(tmp_path):
    result = run(
        tmp_path / "run", steps=200, describe={"scheme": "plain", "depth": 2}, diagnostics={"n": [1.0, math.inf]}
    )
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert result["version"] == 1
    assert result["status"] == "ok"
    assert result["flags"] == []
    assert len(result["config"].pop("data_sha256")) == 64
    assert result["config"] == {
        "scheme": "plain", "depth": 2, "task": "toy", "seed": 0, "steps": 200, "batch_size": 8,
        "learning_rate": 3e-3, "weight_decay": 0.01, "beta2": 0.999, "epsilon": 1e-8,
        "scheme_lr_multiplier": 1.0, "warmup": 0.1, "schedule": "linear", "clip": 1.0, "precision": "fp32",
        "max_length": 128, "compile": False, "gradient_checkpointing": False, "matmul_precision": "highest",
    }  # fmt: skip
    assert result["train_loss"] < 0.1
    assert result["score"] == result["metrics"]["accuracy"] > 0.8
    assert set(result["metrics"]) == {"accuracy", "accuracy_long_one", "accuracy_short", "majority", "loss"}
    assert result["metrics"]["majority"] == 0.5
    assert [step for step, _ in result["loss_curve"]] == [25, 50, 75, 100, 125, 150, 175, 200]
    assert result["loss_curve"][-1][1] == pytest.approx(result["train_loss"])
    assert result["loss_curve"][0][1] > 0.5
    assert result["diagnostics"] == {"n": [1.0, None]}
    cost = result["cost"]
    assert cost["parameters"] == sum(parameter.numel() for parameter in tiny_bert().parameters())
    assert cost["scheme_parameters"] == 0
    assert cost["examples_per_second"] == pytest.approx(1600 / cost["seconds"])
    assert cost["peak_memory_mb"] > 10
    made = result["provenance"]
    assert {"resformer", "torch", "transformers", "python", "platform", "git", "dirty", "finished"} <= set(made)
    assert made["torch"] == torch.__version__
    assert made["processes"] == 1
    log = lines(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(1, 201))
    assert set(log[0]) == {"step", "loss", "learning_rate", "grad_norm"}
    assert np.mean([line["loss"] for line in log[-25:]]) == pytest.approx(result["train_loss"])
    assert log[19]["learning_rate"] == pytest.approx(3e-3)  # the end of warm-up
    files = ["config.json", "evaluations.jsonl", "result.json", "train.jsonl"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == files


def test_the_same_seed_gives_the_same_losses_and_leaves_the_generator_alone(tmp_path):
    data = tiny_data()
    equal = type(data)(data | {"train": data["train"].select([0] * 64)})

    def losses(name, seed, data=data, dropout=0.1):
        run(tmp_path / name, steps=6, seed=seed, data=data, model=tiny_bert(dropout=dropout))
        return [line["loss"] for line in lines(tmp_path / name)]

    torch.manual_seed(5)
    first = losses("a", 0)
    drawn = torch.rand(3)
    assert losses("b", 0) == first
    assert losses("order", 1, dropout=0.0) != losses("other order", 0, dropout=0.0)
    assert losses("dropout", 1, equal) != losses("other dropout", 0, equal)
    assert losses("nothing", 1, equal, dropout=0.0) == losses("to draw", 0, equal, dropout=0.0)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


def test_epochs_are_rounded_to_steps(tmp_path):
    assert run(tmp_path / "a", epochs=0.5)["config"]["steps"] == 4
    assert run(tmp_path / "b", epochs=0.01)["config"]["steps"] == 1


def test_a_pair_task_in_bf16_saves_a_model_that_loads(tmp_path):
    model = tiny_bert()
    result = run(tmp_path, task=PAIR, model=model, steps=5, precision="bf16", save_model=True)
    assert {"accuracy", "f1", "majority", "loss"} == set(result["metrics"])
    assert result["score"] == pytest.approx((result["metrics"]["accuracy"] + result["metrics"]["f1"]) / 2)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    batch = AutoTokenizer.from_pretrained(tmp_path / "model")(["good film"], ["bad"], return_tensors="pt")
    logits = model(**batch).logits
    assert logits.dtype == torch.float32  # the autocast is off again
    torch.testing.assert_close(again(**batch).logits, logits)


def test_regression(tmp_path):
    result = run(tmp_path, task=SCORE, model=tiny_bert(num_labels=1), steps=150)
    assert set(result["metrics"]) == {"pearson", "spearman", "loss"}
    assert result["metrics"]["pearson"] > 0.5
    assert result["train_loss"] < 0.02
    assert result["flags"] == []


def test_both_validation_splits_are_kept(tmp_path):
    splits = ("validation_matched", "validation_mismatched")
    task = Task("two", "", ("sentence",), ("no", "yes"), ("accuracy",), splits)
    data = tiny_data(task)
    data["validation_mismatched"] = data["validation_mismatched"].filter(lambda row: row["label"] == 1)
    result = run(tmp_path, task=task, data=data.remove_columns("difficulty"), steps=2)
    assert set(result["metrics"]) == {"accuracy", "majority", "loss", "accuracy_mm", "majority_mm", "loss_mm"}
    assert result["metrics"]["majority_mm"] == 1.0
    assert result["score"] == pytest.approx((result["metrics"]["accuracy"] + result["metrics"]["accuracy_mm"]) / 2)


def test_a_run_that_learns_nothing_is_flagged(tmp_path):
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([9.0, 0.0]))
        model.classifier.weight.zero_()
    result = run(tmp_path, model=model, steps=1, learning_rate=1e-9, max_length=6)
    assert result["flags"] == ["constant_prediction", "at_chance", "loss_above_chance", "truncated_inputs"]


def test_a_broken_weight_ends_as_diverged(tmp_path):
    model = tiny_bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = math.nan
    result = run(tmp_path, model=model, steps=100, save_model=True)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["status"] == "diverged"
    assert (result["score"], result["metrics"], result["train_loss"], result["loss_curve"]) == (None, {}, None, [])
    assert [line["loss"] for line in lines(tmp_path)] == [None]
    assert not (tmp_path / "model").exists()


def test_weights_that_break_in_the_last_step_are_seen(tmp_path):
    result = run(tmp_path, steps=1, learning_rate=1e30, warmup=0.0)
    assert result["status"] == "diverged"
    assert math.isfinite(result["train_loss"])


def test_an_unfinished_run_starts_again_and_a_finished_one_is_left(tmp_path):
    output = tmp_path / "run"
    config = run(tmp_path / "other", steps=3)["config"]
    output.mkdir()
    write_json_atomically(output / "config.json", config)
    (output / "train.jsonl").write_text('{"step": 1}\n')
    (output / "result.json").write_text('{"version": 1, "conf')
    result = run(output, steps=3)
    assert len(lines(output)) == 3
    with pytest.raises(ValueError, match="this run is finished"):
        run(output, steps=3)
    assert json.loads((output / "result.json").read_text()) == result
    (output / "result.json").unlink()
    with pytest.raises(ValueError, match=r"(?s)another configuration:.*steps: 3 there, 4 here.*seed: 0 there, 1 here"):
        run(output, steps=4, seed=1)
    assert run(output, steps=4, seed=1, overwrite=True)["config"]["steps"] == 4


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds no run \(thesis.txt\)"):
        run(tmp_path, steps=1)
    with pytest.raises(ValueError, match="is a file"):
        run(tmp_path / "thesis.txt", steps=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"epochs": -1.0}, "epochs is -1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_length": 0}, "max_length is 0"),
        ({"describe": {"seed": 7}}, "describe contradicts the run: seed 7, the run has 0"),
        ({"model": tiny_bert(num_labels=3)}, "num_labels 3, task 'toy' needs 2 .no, yes."),
        ({"task": SCORE}, "needs 1 .regression."),
        ({"model": tiny_bert(max_position_embeddings=8)}, "longest input has 16 tokens, the model takes 8"),
        ({"model": tiny_bert(vocab_size=9)}, "the tokenizer gives token 11, the model has 9"),
        ({"model": BertModel(tiny_bert().config)}, "takes no labels"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_data_that_do_not_fit_are_refused(tmp_path):
    data = tiny_data()
    for change, message in (
        ({"train": data["train"].select([])}, "the split 'train'.*is empty"),
        ({"train": data["train"].remove_columns("label")}, "lacks the columns label"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", data=type(data)(data | change))
    del data["validation"]
    with pytest.raises(ValueError, match="needs the split 'train' and one of validation; the data have train"):
        run(tmp_path / "run", data=data)


def test_a_missing_padding_token_is_explained(tmp_path):
    tokenizer = tiny_tokenizer()
    numbers = {"vocab_size": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = GPT2ForSequenceClassification(GPT2Config(**numbers, eos_token_id=3, bos_token_id=2, num_labels=2))
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    with pytest.raises(ValueError, match=r"no padding token.*pad_token = tokenizer\.eos_token"):
        run(tmp_path, model=model, tokenizer=tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="pads with token 3, GPT2ForSequenceClassification expects None"):
        run(tmp_path, model=model, tokenizer=tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    assert run(tmp_path, model=model, tokenizer=tokenizer, steps=2)["status"] == "ok"
