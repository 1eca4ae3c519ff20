"""A run in two processes of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import log, train

HERE = Path(__file__).parent
ALONE = """
import json, sys
from pathlib import Path
from training_runs import train
train(Path(sys.argv[1]), **json.loads(sys.argv[2]))
"""
# accelerate shards on accelerators only, and falls back to DDP on CPUs without a word: here it is told that it may.
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


def alone(output, *, processes=1, fsdp=False, check=True, **changes):
    """In processes of its own."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    variables = {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    script = output.parent / f"{output.name}.py"
    script.write_text(SHARDED * fsdp + TRACKED + ALONE)
    command = [sys.executable, *launch, str(script), str(output), json.dumps(changes)]
    return subprocess.run(command, env=os.environ | variables, check=check, timeout=300, capture_output=not check)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
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
    alone(tmp_path / "two", processes=2, fsdp=way == "fsdp", track=["silent"], **changes)
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
    assert two["metrics"] == one["metrics"]
    assert [line["learning_rate"] for line in log(tmp_path / "one")] == [
        line["learning_rate"] for line in log(tmp_path / "two")
    ], "the schedule has one length on any number of processes"
