"""A patched model is saved and comes back bit for bit through every door, and through none unnoticed."""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    EncoderDecoderModel,
)
from transformers.models.bert.modeling_bert import BertLayer

import resformer
from resformer import families, schemes
from resformer.testing.hosts import attentions, batch, head_for, randomize, stands, tiny_config, tiny_host

THREE = ["bert", "gpt2", "modernbert"]
KINDS = {"rezero", "post_ln", "resi_dual", "deepnorm", "denseformer", "mhc", "sub_ln", "branch_norm", "ode"}
CASES = [  # with all options: the contract
    pytest.param(family, name, id=f"{family}-{name}", marks=[] if name in KINDS else [pytest.mark.slow])
    for family in THREE
    for name in schemes()
    if family == "bert" or name in KINDS
]
CLASSIFY = AutoModelForSequenceClassification
WEIGHTS = "model.resformer.safetensors"


def host(family: str, auto=AutoModel):
    return tiny_host(family, auto, layers=3, attention=attentions(family)[-1])  # what loading chooses


def saved(directory: Path, family: str, name: str, *, auto=CLASSIFY, init="paper", layers=None, **options):
    """A patched host with trained-like parameters, and its checkpoint."""
    model = resformer.patch(host(family, auto), name, init=init, layers=layers, verify=False, **options)
    randomize(model)
    model.save_pretrained(directory)
    return model


def assert_same_model(found, expected) -> None:
    """The same function, names, settings and numbers, to the bit."""
    assert type(found).__qualname__ == type(expected).__qualname__
    assert found.config.resformer == expected.config.resformer
    assert found.config.model_type == expected.config.model_type
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    made = type(expected)(copy.deepcopy(expected.config))
    tables = {n for n, p in made.named_parameters() if not p.requires_grad}  # RoFormer's sines, which loading thaws
    flags = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (found, expected)]
    assert flags[0] - tables == flags[1] - tables
    # copies: sums of products may round otherwise where weights lie in memory as a file had them
    outputs = [copy.deepcopy(model).eval()(**batch(padded=True)) for model in (found, expected)]
    kind = "logits" if "logits" in outputs[0] else "last_hidden_state"
    assert torch.equal(outputs[0][kind], outputs[1][kind])


@pytest.mark.parametrize(("family", "name"), CASES)
def test_round_trip(tmp_path, family, name):
    model = saved(tmp_path, family, name)
    found = resformer.from_pretrained(tmp_path, CLASSIFY)
    assert_same_model(found, model)
    concrete = resformer.from_pretrained(str(tmp_path), type(host(family, CLASSIFY)))
    assert_same_model(concrete, model)
    base = resformer.from_pretrained(tmp_path, AutoModel)
    assert_same_model(base, model.base_model)
    # the loaded model is a patched model like any other: it can be trained, saved again and unpatched
    found.train()(**batch(labels=True), use_cache=False).loss.backward()
    found.save_pretrained(tmp_path / "again")
    assert_same_model(resformer.from_pretrained(tmp_path / "again", CLASSIFY), model)
    resformer.unpatch(found)
    assert found.state_dict().keys() == host(family, CLASSIFY).state_dict().keys()


@pytest.mark.parametrize(
    "family", [name for name, one in families().items() if len(one.stacks) == 1 and stands("hyper_connections", name)]
)
def test_round_trip_of_every_family(tmp_path, family):
    auto = head_for(family)
    model = saved(tmp_path, family, "hyper_connections", auto=auto, layers=range(1, 3), dynamic=True)
    assert_same_model(resformer.from_pretrained(tmp_path, auto), model)


@pytest.mark.parametrize(("family", "name"), [("bert", "deepnorm"), ("bert", "scaled"), ("gpt2", "highway")])
def test_round_trip_of_a_preserving_start(tmp_path, family, name):
    """Folded factors are not folded twice, the norm's eps comes back, and unpatching gives the host back."""
    options = {"shortcut": 0.5, "branch": 2.0} if name == "scaled" else {}
    original = host(family)
    model = resformer.patch(host(family), name, **options)
    model.save_pretrained(tmp_path)
    found = resformer.from_pretrained(tmp_path, AutoModel)
    assert_same_model(found, model)
    resformer.unpatch(found)
    for key, value in original.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-14, atol=0)
    epsilons = [[m.eps for m in model.modules() if hasattr(m, "eps")] for model in (found, original)]
    assert epsilons[0] == epsilons[1]


@pytest.mark.parametrize(
    ("family", "name", "placement"),
    [
        ("bert", "highway", "sandwich"),
        ("bert", "rezero", "pre"),
        ("gpt2", "scaled", "post"),
        ("modernbert", "concat", "none"),
    ],
)
def test_round_trip_of_moved_norms(tmp_path, family, name, placement):
    model = resformer.patch(host(family), name, init="paper", placement=placement)
    randomize(model)
    model.save_pretrained(tmp_path)
    assert_same_model(resformer.from_pretrained(tmp_path, AutoModel), model)


@pytest.mark.parametrize(("family", "auto"), [("bert", AutoModelForMaskedLM), ("gpt2", AutoModelForCausalLM)])
def test_another_head(tmp_path, family, auto):
    """Pretrain with one head, fine-tune with another: only the new head is missing."""
    model = saved(tmp_path, family, "highway", auto=auto)
    found, info = resformer.from_pretrained(tmp_path, CLASSIFY, output_loading_info=True)
    assert info["missing_keys"]
    assert all("score" in key or "classifier" in key or "pooler" in key for key in info["missing_keys"])
    outputs = [copy.deepcopy(m.base_model).eval()(**batch()).last_hidden_state for m in (found, model)]
    assert torch.equal(*outputs)


def test_arguments_of_from_pretrained(tmp_path):
    model = saved(tmp_path, "bert", "highway")
    half = resformer.from_pretrained(tmp_path, CLASSIFY, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.state_dict()["classifier.weight"], model.classifier.weight.bfloat16())
    more = resformer.from_pretrained(tmp_path, CLASSIFY, num_labels=5, ignore_mismatched_sizes=True)
    assert more.classifier.out_features == 5
    eager = resformer.from_pretrained(tmp_path, CLASSIFY, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    given = batch() | {"output_attentions": True}
    assert len(eager(**given).attentions) == 3
    for name in ("dtype", "torch_dtype"):
        same = resformer.from_pretrained(tmp_path, CLASSIFY, **{name: "auto"})
        assert same.dtype == same.config.dtype == model.dtype


def test_shards(tmp_path):
    model = resformer.patch(host("bert", CLASSIFY), "highway")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_model(resformer.from_pretrained(tmp_path, CLASSIFY), model)


@pytest.mark.parametrize("name", ["rezero", "resi_dual", "denseformer", "mhc", "sub_ln", "value_residual", "ode"])
def test_shards_in_half_precision(tmp_path, name):
    """As models of any size are loaded: from pieces, on the meta device first; buffers too."""
    model = resformer.patch(host("bert", CLASSIFY).bfloat16(), name, init="paper")
    randomize(model)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for arguments in ({}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True, "dtype": torch.bfloat16}):
        found = resformer.from_pretrained(tmp_path, CLASSIFY, **arguments)
        assert_same_model(found, model)
        assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
        buffers = dict(found.named_buffers())
        for key, value in model.named_buffers():
            assert torch.equal(buffers[key], value), key


def test_base_model_saves_itself_as_patched(tmp_path):
    model = resformer.patch(host("bert", CLASSIFY), "highway")
    model.bert.save_pretrained(tmp_path)
    assert_same_model(resformer.from_pretrained(tmp_path, AutoModel), model.bert)


def test_weights_of_the_host_are_not_left_beside_ours(tmp_path):
    model = host("bert")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    resformer.patch(model, "plain", init="paper")
    with pytest.raises(ValueError, match=r"not patched.*another directory"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    model.save_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "ours")
    resformer.unpatch(model).save_pretrained(tmp_path / "ours")  # the host over ours: it is the host that is found
    assert not hasattr(BertModel.from_pretrained(tmp_path / "ours").config, "resformer")


def test_unpatched_model_saves_as_the_host(tmp_path):
    original = host("bert", CLASSIFY)
    model = resformer.unpatch(resformer.patch(host("bert", CLASSIFY), "highway"))
    model.save_pretrained(tmp_path)
    found = CLASSIFY.from_pretrained(tmp_path)
    assert torch.equal(found(**batch()).logits, original(**batch()).logits)
    assert not hasattr(found.config, "resformer")


# ------------------------------------------------------------------------------------------------ parts and configs


def test_a_model_whose_base_was_patched_saves_itself_as_patched(tmp_path):
    model = host("bert", CLASSIFY)
    randomize(resformer.patch(model.bert, "highway", init="paper"))
    model.save_pretrained(tmp_path)
    assert_same_model(resformer.from_pretrained(tmp_path, CLASSIFY), model)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        BertForSequenceClassification.from_pretrained(tmp_path)
    resformer.unpatch(model).save_pretrained(tmp_path / "host")
    assert not hasattr(CLASSIFY.from_pretrained(tmp_path / "host").config, "resformer")


def test_a_model_with_a_patched_part_that_would_not_come_back_is_not_saved(tmp_path):
    parts = [host("bert"), AutoModelForCausalLM.from_config(tiny_config("bert", is_decoder=True))]
    model = EncoderDecoderModel(encoder=parts[0], decoder=parts[1])
    resformer.patch(model.encoder, "post_ln")
    with pytest.raises(ValueError, match="only a part of this EncoderDecoderModel is patched"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_models_of_one_configuration_object_do_not_mix(tmp_path):
    config = tiny_config("bert")
    one, other = BertModel(config), BertModel(config)
    resformer.patch(one, "highway", bias=-1.0)
    other.save_pretrained(tmp_path / "host")
    assert not hasattr(BertModel.from_pretrained(tmp_path / "host").config, "resformer")
    resformer.patch(other, "post_ln")  # without parameters: a mix-up would show nowhere else
    one.save_pretrained(tmp_path / "one")
    resformer.unpatch(one)
    other.save_pretrained(tmp_path / "other")
    found = [resformer.from_pretrained(tmp_path / name, AutoModel).config.resformer for name in ("one", "other")]
    assert [settings["scheme"] for settings in found] == ["highway", "post_ln"]
    assert found[0]["options"] == {"bias": -1.0}


# ------------------------------------------------------------------------------------------------ other processes

PICKLED = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
model.save_pretrained(sys.argv[2])
"""
PREAMBLE = """
import copy, json, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
import transformers
root = Path(sys.argv[1])
cases = json.loads((root / "cases.json").read_text())
given = torch.load(root / "batch.pt")

def check(model, case):
    found = copy.deepcopy(model).eval()(**given).logits
    assert torch.equal(found, torch.load(root / case["path"] / "logits.pt")), case
"""
UNINSTALLED = """
for case in cases:
    path, concrete = root / case["path"], getattr(transformers, case["class"])
    base = getattr(transformers, case["base"])
    for load in (AutoModel, AutoModelForSequenceClassification, AutoConfig, concrete, base):
        try:
            load.from_pretrained(path)
        except (ValueError, OSError) as error:
            assert "trust_remote_code" in str(error) or "model.safetensors" in str(error), (case, load, error)
        else:
            raise AssertionError(f"{case} was loaded by {load} as if it were not patched")
assert "resformer" not in sys.modules
"""
INSTALLED = """
import resformer
resformer.install(), resformer.install()
for case in cases:
    path, concrete = root / case["path"], getattr(transformers, case["class"])
    check(AutoModelForSequenceClassification.from_pretrained(path), case)
    model = concrete.from_pretrained(path)
    check(model, case)
    assert type(model).__qualname__ == case["class"] and model.config.resformer["scheme"] == case["scheme"]
    assert AutoConfig.from_pretrained(path).resformer["scheme"] == case["scheme"]
assert AutoModel.from_pretrained(path, dtype=torch.bfloat16).dtype == torch.bfloat16
for load in (concrete, AutoModelForSequenceClassification):
    more = load.from_pretrained(path, num_labels=5, ignore_mismatched_sizes=True)
    assert more.config.num_labels == 5 and more(**given).logits.shape == (2, 5)
half = concrete.from_pretrained(pretrained_model_name_or_path=path, dtype=torch.bfloat16, device_map="cpu")
by_hand = concrete.from_pretrained(None, config=half.config, state_dict=half.state_dict(), dtype="auto")
assert by_hand.dtype == torch.bfloat16 and by_hand.state_dict().keys() == half.state_dict().keys()
assert all(torch.equal(value, by_hand.state_dict()[key]) for key, value in half.state_dict().items())
half.save_pretrained(root / "shards", max_shard_size="4KB")
assert len(list((root / "shards").glob("*.safetensors"))) > 1
again = AutoModelForSequenceClassification.from_pretrained(root / "shards")
assert all(torch.equal(value, again.state_dict()[key]) for key, value in half.state_dict().items())
masked = transformers.AutoModelForMaskedLM.from_pretrained(root / "bert-highway")
assert type(masked).__name__ == "BertForMaskedLM" and masked.config.resformer["scheme"] == "highway"
plain = transformers.BertModel.from_pretrained(root / "plain")
assert not hasattr(plain.config, "resformer")
resformer.patch(plain, "rezero")
try:
    transformers.BertModel.from_pretrained(root / "plain", config=plain.config)
except ValueError as error:
    assert "is not patched" in str(error)
else:
    raise AssertionError("the config of a patched model with unpatched weights")
"""
REMOTE = """
for case in cases:
    check(AutoModelForSequenceClassification.from_pretrained(root / case["path"], trust_remote_code=True), case)
assert "resformer" in sys.modules
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Every scheme on one of three hosts in turn, with what the models compute, and one host that is not patched."""
    root = tmp_path_factory.mktemp("checkpoints")
    cases = []
    for number, name in enumerate(schemes()):
        turn = THREE[number % 3 :] + THREE[: number % 3]
        family = next(family for family in turn if stands(name, family))
        path = f"{family}-{name}"
        model = saved(root / path, family, name)
        torch.save(model(**batch()).logits.detach(), root / path / "logits.pt")
        names = {"class": type(model).__name__, "base": type(model.base_model).__name__}
        cases.append({"path": path, "family": family, "scheme": name} | names)
    tiny_host("bert").save_pretrained(root / "plain")
    torch.save(batch(), root / "batch.pt")
    (root / "cases.json").write_text(json.dumps(cases))
    return root


@pytest.mark.parametrize("door", ["uninstalled", "installed", "remote"])
def test_doors_of_transformers(checkpoints, tmp_path, door):
    """In a process of its own: nothing loads a patched checkpoint as the host, and the two doors load it whole."""
    script = PREAMBLE + {"uninstalled": UNINSTALLED, "installed": INSTALLED, "remote": REMOTE}[door]
    run_alone(script, checkpoints, HF_HOME=str(tmp_path))


def run_alone(script: str, *arguments: Path, **variables: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(resformer.__file__).parents[1])} | variables
    command = [sys.executable, "-c", script, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_a_pickle_opens_where_resformer_was_not_imported(tmp_path):
    model = resformer.patch(host("bert", CLASSIFY), "highway")
    randomize(model)
    torch.save(model, tmp_path / "model.pt")
    run_alone(PICKLED, tmp_path / "model.pt", tmp_path / "saved")
    assert_same_model(resformer.from_pretrained(tmp_path / "saved", CLASSIFY), model)


@pytest.mark.parametrize("name", ["rezero", "plain"])
@pytest.mark.parametrize("shard", ["1GB", "4KB"])
def test_no_silent_loading_where_resformer_is_imported(tmp_path, monkeypatch, name, shard):
    monkeypatch.setattr("builtins.input", lambda prompt: "n")  # transformers asks whether to trust the code
    saved(tmp_path / "first", "bert", name).save_pretrained(tmp_path, max_shard_size=shard)
    for load in (AutoModel, CLASSIFY):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load.from_pretrained(tmp_path)
    for load in (BertModel, BertForSequenceClassification):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            load.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------ damaged


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["resformer"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2 .*reads version 1"),
        ({"version": None}, "version None"),
        ({"scheme": "higway"}, "Did you mean 'highway'"),
        ({"options": {"bais": 1.0}}, "Did you mean 'bias'"),
        ({"options": {"bias": "x"}}, "'bias' must be a finite number"),
        ({"layers": [0, 9]}, "layers"),
        ({"host": "no_such_host"}, "no_such_host"),
    ],
)
def test_settings_that_cannot_be_read(tmp_path, changes, message):
    saved(tmp_path, "bert", "highway")
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        resformer.from_pretrained(tmp_path, CLASSIFY)


@pytest.mark.parametrize("field", ["version", "host", "scheme", "init", "placement", "layers", "options"])
def test_settings_that_lack_something(tmp_path, field):
    saved(tmp_path, "bert", "highway")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["resformer"][field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=field):
        resformer.from_pretrained(tmp_path, CLASSIFY)


def test_a_missing_scheme_parameter_is_noticed(tmp_path):
    saved(tmp_path, "bert", "highway")
    weights = load_file(tmp_path / WEIGHTS)
    lost = next(key for key in weights if ".resformer." in key)
    save_file({key: value for key, value in weights.items() if key != lost}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=f"missing.*{lost}.*damaged"):
        resformer.from_pretrained(tmp_path, CLASSIFY)


def test_parameters_of_another_scheme_are_noticed(tmp_path):
    saved(tmp_path, "bert", "highway")
    edit_config(tmp_path, scheme="plain", options={})
    with pytest.raises(ValueError, match=r"'plain'.*unexpected.*damaged"):
        resformer.from_pretrained(tmp_path, CLASSIFY)
    edit_config(tmp_path, scheme="highway", options={"coupled": False})
    with pytest.raises(ValueError, match=r"missing.*carry.*damaged"):
        resformer.from_pretrained(tmp_path, CLASSIFY)


def test_a_parameter_of_another_shape_is_noticed(tmp_path):
    saved(tmp_path, "bert", "hyper_connections")
    edit_config(tmp_path, options={"num_streams": 2})
    with pytest.raises((ValueError, RuntimeError), match=r"resformer|mismatch"):
        resformer.from_pretrained(tmp_path, CLASSIFY)


def test_what_is_not_a_patched_checkpoint(tmp_path):
    tiny_host("bert").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"not a patched checkpoint.*resformer.patch"):
        resformer.from_pretrained(tmp_path / "plain", AutoModel)
    with pytest.raises(OSError, match="no_such_directory"):
        resformer.from_pretrained(tmp_path / "no_such_directory", AutoModel)
    saved(tmp_path / "bert", "bert", "rezero")
    with pytest.raises(ValueError, match="AutoModelForImageClassification knows no model for a BertConfig"):
        resformer.from_pretrained(tmp_path / "bert", AutoModelForImageClassification)


@pytest.mark.parametrize(
    "change", [{"options": None}, {"options": []}, {"layers": "all"}, {"layers": ["a", "b"]}, {"placement": None}]
)
def test_damaged_settings_are_told(tmp_path, change):
    saved(tmp_path, "bert", "rezero")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"resformer": config["resformer"] | change}))
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        resformer.from_pretrained(tmp_path, CLASSIFY)


def test_weights_of_a_layer_that_lack_or_do_not_fit_are_told(tmp_path):
    saved(tmp_path, "bert", "hyper_connections")
    weights = load_file(tmp_path / WEIGHTS)
    key = "bert.encoder.layer.1.attention.self.query.weight"
    save_file({name: w for name, w in weights.items() if name != key}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"query\.weight"):
        resformer.from_pretrained(tmp_path, CLASSIFY)
    mix = "bert.encoder.layer.1.resformer.attn.mix"
    save_file(weights | {mix: weights[mix][:2].contiguous()}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"of another shape .*attn.mix"):
        resformer.from_pretrained(tmp_path, CLASSIFY, ignore_mismatched_sizes=True)


def test_a_host_that_changed_is_noticed_when_loaded(tmp_path, monkeypatch):
    """As another version of transformers could: the numbers would be those of the old one, or of neither."""
    resformer.patch(tiny_host("bert"), "highway").save_pretrained(tmp_path)
    state = torch.get_rng_state()
    resformer.from_pretrained(tmp_path, AutoModel)
    assert torch.equal(torch.get_rng_state(), state)

    forward = BertLayer.forward
    later = functools.wraps(forward)(lambda self, *args, **kwargs: 0.5 * forward(self, *args, **kwargs))
    monkeypatch.setattr(BertLayer, "forward", later)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"not loaded, .* family 'bert' does not describe .* something else"):
            resformer.from_pretrained(tmp_path, AutoModel)
    monkeypatch.undo()
    resformer.from_pretrained(tmp_path, AutoModel)
