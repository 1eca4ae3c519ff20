"""Values taken from a batch: by hand, on stacks, and in fine-tuning."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import pvariance

import pytest
import torch
from reference import slots_of
from torch import nn
from training_fakes import TASK, tiny_bert, tiny_data, tiny_tokenizer

import resformer
from resformer import ResidualStack
from resformer.calibration import uncalibrated
from resformer.testing.hosts import batch, tiny_host
from resformer.testing.nets import net_of_host
from resformer.train.batches import encode, training_batches
from resformer.train.finetune import finetune
from resformer.train.settings import Settings

QUIET = {"save_model": False, "progress": False}


def factors(model) -> torch.Tensor:
    return torch.stack([p.detach() for name, p in model.named_parameters() if name.endswith(".w")])


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert"])
@pytest.mark.parametrize("padded", [False, True])
def test_admin_is_profiled_as_its_authors_do(family, padded):
    """w_1 = 1, w_i+1² = Var(w_i x_i) + Var(F_i) as a slow loop, over the numbers of real tokens."""
    given = batch(padded=padded)
    model = resformer.patch(tiny_host(family, layers=3), "admin", init="paper")
    assert uncalibrated(model)
    assert resformer.calibrate(model, given) is model
    assert not uncalibrated(model)
    net, x = net_of_host(family, tiny_host(family, layers=3), model, given, slots_of("admin", "paper", "post"))
    real, squared = given["attention_mask"].bool(), 1.0
    with torch.no_grad():
        for site in net.sites:
            w = math.sqrt(squared)
            assert site.numbers("w") == pytest.approx([w] * 16, rel=1e-9)
            y = site.branch(x)
            squared = pvariance((w * x)[real].flatten().tolist()) + pvariance(y[real].flatten().tolist())
            x = site.post(w * x + y)
    assert w > 1.2
    before = factors(model)
    torch.testing.assert_close(factors(resformer.calibrate(model, given)), before)  # again gives the same


def test_a_stack_can_be_calibrated_and_modes_stay():
    torch.manual_seed(0)
    stack = ResidualStack([nn.Linear(4, 4) for _ in range(3)], 4, "admin").train()
    resformer.calibrate(stack, torch.randn(5, 4))
    w = [scheme.w[0].item() for scheme in stack.schemes]
    assert w[0] == 1
    assert w[2] > w[1] != 1
    model = resformer.patch(tiny_host("bert"), "admin", init="paper").train()
    model.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    resformer.calibrate(model, batch())
    assert [module.training for module in model.modules()] == modes
    assert not any("step" in vars(module) for module in model.modules())
    assert all(p.requires_grad and p.grad is None for n, p in model.named_parameters() if n.endswith(".w"))


def test_dropout_and_the_dtype_do_not_matter():
    exact = resformer.calibrate(resformer.patch(tiny_host("bert"), "admin", init="paper"), batch())
    for changes, tolerance in (({"dropout": 0.5}, 1e-9), ({"dtype": torch.bfloat16}, 3e-2)):
        model = resformer.patch(tiny_host("bert", **changes), "admin", init="paper").train()
        found = factors(resformer.calibrate(model, batch())).double()
        torch.testing.assert_close(found, factors(exact), rtol=tolerance, atol=0)


def test_a_failure_leaves_the_model_as_it_was():
    model = resformer.patch(tiny_host("bert", layers=3), "admin", init="paper").train()
    last = model.encoder.layer[2].output.dense
    hook = last.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("on the way")))
    with pytest.raises(RuntimeError, match="on the way"):
        resformer.calibrate(model, batch())
    hook.remove()
    assert (factors(model) == 1).all()
    assert all(module.training for module in model.modules())
    assert not any("step" in vars(module) for module in model.modules())
    resformer.calibrate(model, batch())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "admin",
            {"init": "preserve"},
            r"'admin' \(init='preserve', profile=True\) has nothing to calibrate.*: admin",
        ),
        ("admin", {"init": "paper", "profile": False}, "profile=False"),
        ("rezero", {}, r"scheme 'rezero' \(init='preserve'\) has nothing to calibrate"),
        (None, {}, "this BertModel without a scheme has nothing to calibrate"),
    ],
)
def test_models_with_nothing_to_calibrate_are_refused(name, options, message):
    model = tiny_host("bert")
    if name:
        resformer.patch(model, name, **options)
    assert not uncalibrated(model)
    with pytest.raises(ValueError, match=message):
        resformer.calibrate(model, batch())


# ------------------------------------------------------------------------------------------------ fine-tuning


def first_batch(batch_size: int) -> dict:
    split = encode(tiny_data()["train"], tiny_tokenizer(), TASK, max_length=128, inputs=("input_ids", "attention_mask"))
    ((first, _),) = next(training_batches(split, batch_size, seed=0))
    return first


def test_fine_tuning_calibrates_once(tmp_path):
    model = resformer.patch(tiny_bert(dropout=0.1), "admin", init="paper")
    expected = factors(resformer.calibrate(copy.deepcopy(model), first_batch(8)))
    settings = Settings(steps=2, batch_size=8, learning_rate=1e-9)
    finetune(model, tiny_tokenizer(), TASK, tiny_data(), tmp_path / "one", settings, **QUIET)
    torch.testing.assert_close(factors(model), expected, rtol=1e-5, atol=1e-5)
    assert not (factors(model) == 1).all()
    finetune(model, tiny_tokenizer(), TASK, tiny_data(), tmp_path / "two", replace(settings, batch_size=4), **QUIET)
    torch.testing.assert_close(factors(model), expected, rtol=1e-5, atol=1e-5)  # what it came with stays


TWO = """
import os, sys
import resformer
from torch import distributed
from training_fakes import TASK, tiny_bert, tiny_data, tiny_tokenizer
from resformer.train.finetune import finetune
from resformer.train.settings import Settings
name, output = sys.argv[1:]
options = {"warmup": 20} if name == "branch_norm" else {}
model = resformer.patch(tiny_bert(), name, init="paper", **options)
settings = Settings(steps=30, batch_size=8, learning_rate=1e-3)
finetune(model, tiny_tokenizer(), TASK, tiny_data(), output, settings, progress=False)
distributed.destroy_process_group()
os._exit(0)  # see test_train_processes
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["admin", "branch_norm"])
def test_two_processes_calibrate_and_warm_up_as_one_does(tmp_path, name):
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    (tmp_path / "two.py").write_text(TWO)
    losses = []
    for processes in ("1", "2"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        command = [*launch, str(tmp_path / "two.py"), name, str(tmp_path / processes)]
        subprocess.run(command, env=environment, check=True, timeout=300, cwd=tmp_path)
        rows = (tmp_path / processes / "train.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


def test_what_is_not_finite_is_refused_and_taken_back():
    model = resformer.patch(tiny_host("bert"), "admin", init="paper")
    given = batch()
    with pytest.raises(ValueError, match="no token that is not padding"):
        resformer.calibrate(model, given | {"attention_mask": 0 * given["attention_mask"]})
    assert all((p == 1).all() for name, p in model.named_parameters() if name.endswith(".w"))
    with pytest.raises(ValueError, match="batch must be a mapping"):
        resformer.calibrate(model, [given])
