"""A run in two processes of this machine gives what it gives in one."""

import errno
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import test_train_predict as predict
import test_train_pretrain as pretrain
import torch
from safetensors.torch import load_file
from training_fakes import TASK, tiny_bert, tiny_data, tiny_tokenizer
from training_runs import SETTINGS, assert_same, log, stopped_by, train

import resformer
from resformer.data.tasks import TASKS
from resformer.train.finetune import finetuning
from resformer.train.rehearsal import rehearse
from resformer.train.settings import Settings

HERE = Path(__file__).parent
# What each process of a launch does. Then it leaves at once: at the interpreter's own exit threads of torch and gloo
# that still run abort it now and then ("terminate called without an active exception").
ALONE = """
import json, os, sys
from pathlib import Path
from torch import distributed
from test_train_processes import {name}
{name}(Path(sys.argv[1]), **json.loads(sys.argv[2]))
if distributed.is_initialized():
    distributed.destroy_process_group()
os._exit(0)
"""
TRACKED = """
from accelerate.tracking import GeneralTracker, register_tracker_class

class Silent(GeneralTracker):
    name, requires_logging_directory = "silent", False
    tracker = store_init_configuration = log = None

    def __init__(self, run_name, **kwargs):
        super().__init__()

    def store_init_configuration(self, values): ...
    def log(self, values, step=None, **kwargs): ...

register_tracker_class(Silent)
"""
# accelerate shards on accelerators only, and falls back to DDP on CPUs without a word: here it is told that it may.
SHARDED = """
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from resformer.train import finetune as module
make_accelerator, finish = module.make_accelerator, module.finish

def sharded(precision):
    accelerator = make_accelerator(precision)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"]
    )
    accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator

def checked(result, output, model, *args, **kwargs):
    assert any(isinstance(p, DTensor) for p in model.parameters())
    return finish(result, output, model, *args, **kwargs)

module.make_accelerator, module.finish = sharded, checked
"""


def launch(output, name="train", *, first="", **changes):
    """Call the function `name` of this module on `output` in two processes, after the lines `first`."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    variables = {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    script = output.parent / f"{output.name}.py"
    script.write_text(first + ALONE.format(name=name))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run([*command, str(output), json.dumps(changes)], env=os.environ | variables, check=True, timeout=300)


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_give_what_one_gives_and_go_on_from_it(tmp_path, way):
    """The losses at an equal batch, in parts that do not divide evenly; also from a checkpoint of one process."""
    changes = {"dropout": 0.0, "batch_size": 9, "micro_batch_size": 2, "save_every": 10}
    changes |= {"scheme": "highway", "watch_every": 15}
    train(tmp_path / "one", **changes)
    (tmp_path / "two").mkdir()
    for name in ("config.json", "train.jsonl"):
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    (tmp_path / "one" / "checkpoints" / "step-000000010").rename(tmp_path / "half")
    if way == "fsdp":
        (tmp_path / "two" / "checkpoints").mkdir()
        (tmp_path / "half").rename(tmp_path / "two" / "checkpoints" / "step-000000010")
    else:
        (tmp_path / "two" / "train.jsonl").unlink()
    launch(tmp_path / "two", first=SHARDED * (way == "fsdp") + TRACKED, track=["silent"], **changes)
    losses, norms = (
        [[line[what] for line in log(tmp_path / n)] for n in ("two", "one")] for what in ("loss", "grad_norm")
    )
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=1e-6)
    looks = [log(tmp_path / name, "layers.jsonl")[0]["sites"] for name in ("two", "one")]
    names = looks[0][0].keys() - {"layer", "site", "branch_to_stream"}
    means = [[[site[name] for name in sorted(names)] for site in look] for look in looks]
    assert names
    torch.testing.assert_close(means[0], means[1], rtol=1e-3, atol=1e-5)
    two, one = (load_file(tmp_path / name / "model/model.resformer.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name, weight in one.items():
        if not name.endswith("key.bias"):  # attention is the same with any: what Adam makes of rounding
            torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one["provenance"]["processes"], two["provenance"]["processes"]) == (1, 2)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    assert [line["learning_rate"] for line in log(tmp_path / "one")] == [
        line["learning_rate"] for line in log(tmp_path / "two")
    ], "the schedule has one length on any number of processes"


TEXT = {"steps": 12, "batch_size": 9, "micro_batch_size": 2, "held_out": 13}  # nothing divides evenly


def rehearsed(folder):
    settings = Settings(**(SETTINGS | {"batch_size": 9}))
    model = resformer.patch(tiny_bert(), "rezero", init="paper")
    return rehearse(model, finetuning(model, tiny_tokenizer(), TASK, tiny_data(), settings), folder, settings)


def predicted(folder, output):
    return predict.run(folder / "model", TASKS["rte"], output, data=folder / "data", batch_size=4)


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def together(folder):
    """All that two processes are to do as one does, one after the other; what each of them got is written."""
    rank = int(os.environ["RANK"])
    pretrain.run(folder / "pretrained", pretrain.counting(folder), **TEXT)
    found = rehearsed(folder / "rehearsed")
    train(folder / "whole")
    with pytest.MonkeyPatch.context() as patch, stopped_by(patch, 8) if rank == 1 else nullcontext():
        first = train(folder / "stopped")
    second = train(folder / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        on_full_disk = train(folder / "full")
    predicted(folder, folder / "answers")
    got = {
        "rehearsed": [found.processes, found.plan.batch, found.step.loss, found.step.grad_norm],
        "stopped": [first["status"], first["cost"]["steps"], second["status"]],
        "full": [on_full_disk["status"], len(on_full_disk["notes"])],
    }
    (folder / f"{rank}.json").write_text(json.dumps(got))


def test_two_processes_do_what_one_does(tmp_path):
    """All in one test, so that there is one launch, which takes seconds, however tests are divided among workers."""
    pretrain.counting(tmp_path)
    predict.save(tmp_path / "model")
    predict.put(tmp_path / "data")
    launch(tmp_path, "together")
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]

    pretrain.run(tmp_path / "alone", pretrain.counting(tmp_path), **TEXT)
    alone, pair = tmp_path / "alone", tmp_path / "pretrained"
    for what in ("loss", "grad_norm"):
        one, two = ([line[what] for line in log(folder)] for folder in (alone, pair))
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (alone, pair))
    assert two["provenance"]["processes"] == 2
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert (two["config"], two["examples"]) == (one["config"], one["examples"])

    once = rehearsed(tmp_path / "rehearsed")
    for got in both:
        processes, batch, *step = got["rehearsed"]
        assert (processes, batch) == (2, 5), "the larger part of 9"
        assert step == pytest.approx([once.step.loss, once.step.grad_norm], rel=1e-4)
    assert not (tmp_path / "rehearsed").exists()

    assert [got["stopped"] for got in both] == [["stopped", 8, "ok"]] * 2, "one was asked, and not the main one"
    assert_same(tmp_path / "stopped", tmp_path / "whole")

    assert [got["full"] for got in both] == [["ok", 6], ["ok", 0]], "the main one writes, and the other does not wait"
    assert_same(tmp_path / "full", tmp_path / "whole")
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []

    predicted(tmp_path, tmp_path / "own")
    assert (tmp_path / "answers" / "RTE.tsv").read_text() == (tmp_path / "own" / "RTE.tsv").read_text()
