"""Two processes on this machine: data parallel and fully sharded training give the gradients of one process."""

import os
import socket
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import make_trainer, patched
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification

import resformer
from resformer import schemes
from resformer.host import find_host
from resformer.testing.hosts import batch, checkpoint, randomize, stands, tiny_host

CLASSIFY = AutoModelForSequenceClassification
# One scheme of each kind: shared within a layer, moved norms, history, streams, inside, matrices with norms elsewhere.
KINDS = ["rezero", "post_ln", "denseformer", "hyper_connections", "sub_ln", "highway"]
FAST = [("bert", name, {}) for name in KINDS] + [("gpt2", name, {}) for name in ("rezero", "post_ln")]
FAST += [("gpt2", "hyper_connections", {"dynamic": True})]
RANDOM = {"drop_path", "dropout_shortcut"}  # two processes draw other masks than one
HOSTS = ("bert", "gpt2", "modernbert")
ALL = [(family, name, {}) for family in HOSTS for name in schemes() if name not in RANDOM and stands(name, family)]


def model_of(family: str, name: str, options: dict):
    torch.manual_seed(0)
    model = resformer.patch(tiny_host(family, CLASSIFY, layers=3), name, init="paper", **options)
    randomize(model)
    return model.train()


def gradients(family: str, name: str, options: dict, wrapper: str, checkpointing: bool, rank: int):
    """The gradients of half a batch in each of two processes, averaged, by name."""
    model = model_of(family, name, options)
    if checkpointing:
        checkpoint(model, {"use_reentrant": False})
    if wrapper == "ddp":
        run = DistributedDataParallel(model)  # without find_unused_parameters
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in find_host(model).layers:
            fully_shard(layer, mesh=mesh)
        run = fully_shard(model, mesh=mesh)
    half = {key: value[rank : rank + 1] for key, value in batch(labels=True).items()}
    run(**half, use_cache=False).loss.backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    return {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in found.items()}


def check(rank: int, port: int, cases: list, ways: list) -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    failures = []
    for family, name, options in cases:
        alone = model_of(family, name, options)
        alone(**batch(labels=True), use_cache=False).loss.backward()
        expected = {key: p.grad for key, p in alone.named_parameters() if p.requires_grad}
        for wrapper, checkpointing in ways:
            found = gradients(family, name, options, wrapper, checkpointing, rank)
            for key, value in expected.items():
                g = found[key]
                if g is None or value is None or not torch.allclose(g, value, rtol=1e-9, atol=1e-12):
                    failures.append((family, name, wrapper, checkpointing, key))
    assert not failures, failures[:10]
    leave()


def leave() -> None:
    """End a process that has done its work, at once: at the interpreter's own exit threads of torch and gloo that still
    run abort it now and then ("terminate called without an active exception")."""
    distributed.destroy_process_group()
    os._exit(0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(cases: list, ways: list) -> None:
    torch.multiprocessing.spawn(check, (free_port(), cases, ways), nprocs=2)


pytestmark = pytest.mark.skipif(
    not distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)


def test_two_processes_give_the_gradients_of_one():
    launch(FAST, [("ddp", False), ("fsdp", True)])


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_every_scheme_in_two_processes(wrapper):
    launch(ALL, [(wrapper, False), (wrapper, True)])


def train(rank: int, port: int, directory: str) -> None:
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= rendezvous | {"WORLD_SIZE": "2"}
    model, scores = patched(), iter([0.0, 1.0, 0.5])
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_strategy": "steps", "eval_steps": 2}
    make_trainer(model, directory, metrics=lambda prediction: {"score": next(scores)}, **best).train()
    expected = load_file(f"{directory}/checkpoint-4/model.resformer.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())
    expected = load_file(f"{directory}/checkpoint-6/model.resformer.safetensors")
    resumed = patched()
    make_trainer(resumed, f"{directory}/again").train(resume_from_checkpoint=f"{directory}/checkpoint-4")
    assert all(torch.equal(resumed.state_dict()[key], value) for key, value in expected.items())
    leave()


@pytest.mark.slow
def test_trainer_in_two_processes(tmp_path):
    """Only the first process saves; both read."""
    torch.multiprocessing.spawn(train, (free_port(), str(tmp_path)), nprocs=2)
