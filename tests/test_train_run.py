"""A run that is interrupted goes on as if it had not been: killed, stopped, on a full disk, from a cut file."""

import errno
import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker, register_tracker_class
from rich.console import Console
from safetensors.torch import load_file
from training_fakes import TASK, tiny_bert, tiny_data, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import resformer
from resformer.optim import scheme_parameters
from resformer.spelling import parse_scheme
from resformer.train import checkpoints, sitting
from resformer.train.finetune import finetune, finetuning
from resformer.train.folder import go_on_from
from resformer.train.rehearsal import rehearse
from resformer.train.settings import Settings

# 64 examples in batches of 8: an epoch has 8 steps, and checkpoints lie within one
SETTINGS = {"steps": 20, "batch_size": 8, "learning_rate": 3e-3, "save_every": 3, "evaluate_every": 7}
HERE = Path(__file__).parent
ALONE = """
import json, sys
from pathlib import Path
from test_train_run import train
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


def train(output, *, scheme="rezero", dropout=0.1, resume="auto", overwrite=False, data=None, **changes):
    name, scheme_options = parse_scheme(scheme)
    model = resformer.patch(tiny_bert(dropout=dropout), name, init="paper", **scheme_options)
    options = {"progress": False, "resume": resume, "overwrite": overwrite}
    return finetune(
        model, tiny_tokenizer(), TASK, data or tiny_data(), output, Settings(**(SETTINGS | changes)), **options
    )


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


def log(output, name="train.jsonl"):
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def weights(output):
    return (output / "model" / "model.resformer.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "whole"
    train(output)
    return output


def assert_same(output, whole):
    assert log(output) == log(whole)
    assert log(output, "evaluations.jsonl") == log(whole, "evaluations.jsonl")
    assert weights(output) == weights(whole)
    first, second = (json.loads((one / "result.json").read_text()) for one in (output, whole))
    for name in ("score", "metrics", "best", "train_loss", "loss_curve", "flags", "config"):
        assert first[name] == second[name], name


@pytest.mark.parametrize("at", ["before the rename", "in the file", "between"])
def test_killed_at_any_moment_it_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, whole, at):
    """Without a word of goodbye, in a child, in the middle of an epoch."""
    output = tmp_path / "run"
    child = os.fork()
    if child == 0:
        seen = [0]
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)

        def third(then, number=3):
            def called(*args, **kwargs):
                seen[0] += 1
                if seen[0] == number:
                    then(*args)
                return original(*args, **kwargs)

            return called

        if at == "before the rename":
            original = checkpoints.write_json_atomically
            checkpoints.write_json_atomically = third(lambda *args: die())
        elif at == "in the file":
            original = torch.save
            torch.save = third(lambda found, file: (file.write(b"half"), file.flush(), die()))
        else:
            original = sitting.append
            sitting.append = third(lambda *args: die(), number=6)  # after steps 1, 2, 3, 4, 6, and before 7 is written
        try:
            train(output)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (output / "result.json").exists()
    begun = checkpoints.newest(output / "checkpoints")[0]
    assert begun is not None
    assert 0 < checkpoints.step_of(begun) < 20
    result = train(output)
    assert result["notes"] == []
    assert_same(output, whole)
    assert len(list((output / "checkpoints").iterdir())) == 2, "older ones, and what was half written, are gone"


@pytest.fixture
def clock(monkeypatch):
    """Each step takes a second, and nothing else takes time."""
    now = [0.0]
    original = sitting.windows

    def windows(*args, on_step, **kwargs):
        def ticking(step):
            on_step(step)
            now[0] += 1.0

        return original(*args, on_step=ticking, **kwargs)

    monkeypatch.setattr(sitting, "windows", windows)
    monkeypatch.setattr(sitting.time, "perf_counter", lambda: now[0])


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


def test_interrupted_after_its_last_step_it_is_evaluated_once(tmp_path, monkeypatch):
    changes = {"steps": 6, "save_every": 3, "evaluate_every": 3}
    with monkeypatch.context() as patched:
        patched.setattr("resformer.train.finetune.finish", lambda *args, **kwargs: None)
        train(tmp_path / "run", **changes)
    train(tmp_path / "run", **changes)
    train(tmp_path / "whole", **changes)
    assert [line["step"] for line in log(tmp_path / "run", "evaluations.jsonl")] == [3, 6]
    assert_same(tmp_path / "run", tmp_path / "whole")


def stopped(output, monkeypatch, after=8, **changes):
    with stopped_by(monkeypatch, after):
        return train(output, **changes)


def test_asked_to_stop_it_saves_and_goes_on(tmp_path, monkeypatch, whole):
    output = tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    result = stopped(output, monkeypatch)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert result["status"] == "stopped"
    assert result["score"] is None
    assert not (output / "result.json").exists()
    assert [line["step"] for line in log(output)] == list(range(1, 9))
    assert checkpoints.newest(output / "checkpoints")[0].name == "step-000000008"
    train(output)
    assert_same(output, whole)


def test_a_cut_checkpoint_is_passed_over_with_a_word(tmp_path, monkeypatch, whole):
    output = tmp_path / "run"
    stopped(output, monkeypatch)
    file = output / "checkpoints" / "step-000000008" / "training.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"passed over the checkpoint .*step-000000008: training.pt has .* bytes"):
        result = train(output)
    assert "step-000000008" in result["notes"][0]
    assert_same(output, whole)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"bytes": "many"}'])
def test_a_damaged_marker_is_as_none(tmp_path, monkeypatch, content):
    stopped(tmp_path / "run", monkeypatch)
    (tmp_path / "run" / "checkpoints" / "step-000000008" / "COMPLETE").write_text(content)
    found, broken = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert found.name == "step-000000006"
    assert "not written to its end" in broken[0]


def test_a_named_checkpoint_is_gone_on_from_or_refused(tmp_path, monkeypatch, whole):
    output = tmp_path / "run"
    stopped(output, monkeypatch)
    chosen = output / "checkpoints" / "step-000000006"
    file = chosen / "training.pt"
    content = file.read_bytes()
    file.write_bytes(content[:100])
    for folder in (output, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"step-000000006' cannot be used: training.pt has 100 bytes"):
            train(folder, resume=str(chosen))
    assert not (tmp_path / "new").exists()
    file.write_bytes(content)
    train(output, resume=str(chosen))
    assert_same(output, whole)
    with pytest.raises(ValueError, match="is no checkpoint; their folders are called"):
        train(tmp_path / "other", resume=str(output))
    with pytest.raises(ValueError, match="no such folder"):
        train(tmp_path / "other", resume=str(output / "checkpoints" / "step-000000099"))


def test_a_checkpoint_elsewhere_brings_its_log_and_its_configuration(tmp_path, monkeypatch, whole):
    stopped(tmp_path / "run", monkeypatch)
    chosen = str(tmp_path / "run" / "checkpoints" / "step-000000008")
    with pytest.raises(ValueError, match=r"(?s)is of another configuration:\n  batch_size: 8 there, 4 here"):
        train(tmp_path / "other", resume=chosen, batch_size=4)
    assert not (tmp_path / "other").exists()
    train(tmp_path / "other", resume=chosen)
    assert_same(tmp_path / "other", whole)


def test_going_back_leaves_no_checkpoint_of_what_was_given_up(tmp_path, monkeypatch, whole):
    output = tmp_path / "run"
    stopped(output, monkeypatch, after=17)
    stopped(output, monkeypatch, after=4, resume="never")
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-000000003", "step-000000004"]
    train(output)
    assert_same(output, whole)


def test_asked_to_stop_at_its_last_step_it_is_finished(tmp_path, monkeypatch, whole):
    assert stopped(tmp_path / "run", monkeypatch, after=20)["status"] == "ok"
    assert_same(tmp_path / "run", whole)


def test_going_back_cuts_the_looks_at_layers(tmp_path, monkeypatch):
    output = tmp_path / "run"
    stopped(output, monkeypatch, after=16, watch_every=4)
    assert [look["step"] for look in log(output, "layers.jsonl")] == [4, 8, 12, 16]
    train(output, watch_every=4, resume=str(output / "checkpoints" / "step-000000015"))
    assert [look["step"] for look in log(output, "layers.jsonl")] == [4, 8, 12, 16, 20]


def test_what_a_sitting_goes_on_from_stays(tmp_path):
    for step in (3, 6, 9):
        (tmp_path / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
    go_on_from(tmp_path, 6, {"train.jsonl": [{"step": 6}]})
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]
    assert log(tmp_path) == [{"step": 6}]


def test_overwriting_leaves_what_is_not_of_the_run(tmp_path):
    train(tmp_path / "run", steps=2)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train(tmp_path / "run", steps=3, overwrite=True)["cost"]["steps"] == 3
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_log_that_cannot_be_written_is_noted(tmp_path, monkeypatch, whole):
    original = sitting.append

    def full(path, entries):
        if path.name == "evaluations.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, entries)

    monkeypatch.setattr(sitting, "append", full)
    with pytest.warns(UserWarning, match="nothing in evaluations.jsonl up to step 7: No space left on device"):
        result = train(tmp_path / "run")
    assert len(result["notes"]) == 3
    assert weights(tmp_path / "run") == weights(whole)


def test_a_rehearsal_of_a_loss_that_is_no_number(tmp_path):
    settings = Settings(**SETTINGS)
    model = resformer.patch(tiny_bert(), "rezero", init="paper")
    torch.nn.init.constant_(model.classifier.bias, math.inf)
    found = rehearse(model, finetuning(model, tiny_tokenizer(), TASK, tiny_data(), settings), tmp_path / "x", settings)
    assert not math.isfinite(found.step.loss)
    assert "loss nan" in shown(found) or "loss inf" in shown(found)
    assert not (tmp_path / "x").exists()


def shown(what):
    with io.StringIO() as text:
        Console(file=text, width=80).print(what)
        return text.getvalue()


def test_what_is_refused_deletes_nothing(tmp_path, monkeypatch, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    for changes, message in (
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"scheme_lr_multiplier": 0.0}, "scheme_lr_multiplier is 0.0"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be a whole number below"),
        ({"resume": str(tmp_path / "step-000000001")}, "overwrite begins again, and resume="),
        ({"resume": "nonsense"}, "'nonsense' is no checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            train(whole, overwrite=True, **changes)
    monkeypatch.setattr("transformers.BertPreTrainedModel.supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no gradient checkpointing"):
        train(whole, overwrite=True, gradient_checkpointing=True)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_a_run_that_was_over_by_patience_is_over_when_it_goes_on(tmp_path, monkeypatch):
    changes = {"steps": 100, "learning_rate": 1e-9, "evaluate_every": 2, "patience": 3, "save_every": 4}
    with monkeypatch.context() as patched:
        patched.setattr("resformer.train.finetune.finish", lambda *args, **kwargs: None)
        train(tmp_path / "run", **changes)
    assert train(tmp_path / "run", **changes)["cost"]["steps"] == 8
    assert len(log(tmp_path / "run")) == 8


@pytest.mark.parametrize("scheme", ["pro_res:warmup=7", "admin"])
def test_a_scheme_that_follows_the_steps_goes_on_with_them(tmp_path, monkeypatch, scheme):
    whole = train(tmp_path / "whole", scheme=scheme, dropout=0.1)
    stopped(tmp_path / "run", monkeypatch, after=11, scheme=scheme)
    train(tmp_path / "run", scheme=scheme)
    assert whole["status"] == "ok"
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_changed_data_are_another_configuration(tmp_path, monkeypatch):
    stopped(tmp_path / "run", monkeypatch)
    with pytest.raises(ValueError, match=r"another configuration:\n  data_sha256: "):
        train(tmp_path / "run", data=tiny_data(seed=1))


def test_never_starts_from_the_beginning(tmp_path, monkeypatch, whole):
    output = tmp_path / "run"
    stopped(output, monkeypatch)
    train(output, resume="never")
    assert_same(output, whole)


@pytest.mark.parametrize("hidden", [False, True])
def test_on_a_full_disk_training_goes_on(tmp_path, monkeypatch, whole, hidden):
    """Also where torch tells of it as of an error of its own."""

    def full(found, file):
        file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if hidden:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1")  # noqa: B904
            raise

    output = tmp_path / "run"
    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="no checkpoint after step 3: No space left on device"):
        result = train(output)
    assert len(result["notes"]) == 6
    assert list((output / "checkpoints").iterdir()) == []
    assert_same(output, whole)


def test_another_configuration_is_refused_with_what_differs(tmp_path, monkeypatch):
    output = tmp_path / "run"
    stopped(output, monkeypatch)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    message = r"(?s)another configuration:\n  learning_rate: 0.003 there, 0.001 here\nGive the same to go on"
    with pytest.raises(ValueError, match=message):
        train(output, learning_rate=1e-3)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert train(output, learning_rate=1e-3, overwrite=True)["status"] == "ok"


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


def test_patience(tmp_path):
    result = train(tmp_path / "run", steps=100, learning_rate=1e-9, evaluate_every=2, patience=3, save_every=None)
    assert result["cost"]["steps"] == 8  # the first evaluation is the best, and three are not better
    assert result["best"]["step"] == 2

    def is_over(*scores, patience=2):
        return sitting._patience_is_over([{"score": score} for score in scores], patience)

    assert is_over(0.9, 0.5, 0.6, 0.5), "better than the one before is not better than the best"
    assert not is_over(0.5, 0.9, 0.6)
    assert not is_over(0.9, 0.5)
    assert not is_over(0.9, 0.5, 0.6, 0.5, patience=None)
    with pytest.raises(ValueError, match="give evaluate_every as well"):
        train(tmp_path / "other", patience=3, evaluate_every=None)


def test_the_seconds_are_those_of_all_sittings(tmp_path, monkeypatch, clock):
    """Of a run of so many steps, and of one that they end."""
    for name, changes in (("steps", {}), ("seconds", {"steps": None, "seconds": 20.0})):
        assert stopped(tmp_path / name, monkeypatch, after=8, **changes)["cost"]["seconds"] == 8.0
        cost = train(tmp_path / name, **changes)["cost"]
        assert (cost["seconds"], cost["steps"]) == (20.0, 20)


def test_a_run_by_the_clock(tmp_path, clock):
    """The schedule follows the time, between looks by the pace until then: as a run of so many steps would."""
    changes = {"save_every": None, "evaluate_every": None, "warmup": 0.0}
    result = train(tmp_path / "run", steps=None, seconds=60.0, **changes)
    assert (result["cost"]["seconds"], result["cost"]["steps"]) == (60.0, 60)
    train(tmp_path / "counted", steps=60, **changes)
    rates, counted = ([line["learning_rate"] for line in log(tmp_path / name)] for name in ("run", "counted"))
    assert rates == pytest.approx(counted, abs=1e-6), "a run of ten thousand small steps"


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
    assert [step for step, values in told[1:] if "accuracy" in values] == [7, 14, 20]
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
