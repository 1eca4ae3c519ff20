"""A short run of fine-tuning, whole or asked to stop, for the tests of training."""

import json
import os
import signal
from contextlib import contextmanager

import torch
from training_fakes import TASK, tiny_bert, tiny_data, tiny_tokenizer

import resformer
from resformer.spelling import parse_scheme
from resformer.train import sitting
from resformer.train.finetune import finetune
from resformer.train.settings import Settings

# 64 examples in batches of 8: an epoch has 8 steps, and checkpoints lie within one
SETTINGS = {"steps": 20, "batch_size": 8, "learning_rate": 3e-3, "save_every": 3, "evaluate_every": 7}


def train(output, *, scheme="rezero", dropout=0.1, resume="auto", overwrite=False, data=None, **changes):
    name, scheme_options = parse_scheme(scheme)
    model = resformer.patch(tiny_bert(dropout=dropout), name, init="paper", verify=False, **scheme_options)
    options = {"progress": False, "resume": resume, "overwrite": overwrite}
    return finetune(
        model, tiny_tokenizer(), TASK, data or tiny_data(), output, Settings(**(SETTINGS | changes)), **options
    )


def whole_run(factory):
    """The folder of a run that nothing interrupted."""
    torch.set_num_threads(1)
    output = factory.mktemp("runs") / "whole"
    train(output)
    return output


def log(output, name="train.jsonl"):
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def weights(output):
    return (output / "model" / "model.resformer.safetensors").read_bytes()


def assert_same(output, whole):
    assert log(output) == log(whole)
    assert log(output, "evaluations.jsonl") == log(whole, "evaluations.jsonl")
    assert weights(output) == weights(whole)
    first, second = (json.loads((one / "result.json").read_text()) for one in (output, whole))
    for name in ("score", "metrics", "best", "train_loss", "loss_curve", "flags", "config"):
        assert first[name] == second[name], name


@contextmanager
def stopped_by(monkeypatch, after):
    """Within, a run is asked to stop after so many steps."""
    original = sitting.windows

    def windows(*args, on_step, **kwargs):
        def asked(step):
            on_step(step)
            if step == after:
                os.kill(os.getpid(), signal.SIGTERM)

        return original(*args, on_step=asked, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(sitting, "windows", windows)
        yield


def stopped(output, monkeypatch, after=8, **changes):
    with stopped_by(monkeypatch, after):
        return train(output, **changes)
