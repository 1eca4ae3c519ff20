"""Feed-forwards of parallel bottlenecks."""

import copy
import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import gelu
from transformers import AutoModel, AutoModelForSequenceClassification

import resformer
from resformer import build_encoder, unpatch
from resformer.grouped import GroupedIntermediate, bottleneck
from resformer.testing.hosts import checkpoint

CLASSIFY = AutoModelForSequenceClassification
IDS = torch.arange(8)[None]


def encoder(cardinality: int | None = 4, scheme: str = "identity", width: int = 32, depth: int = 2, **options):
    torch.manual_seed(0)
    made = build_encoder(depth, width, scheme, heads=2, vocab_size=30, cardinality=cardinality, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases too
    return made.eval()


def feed_forward_parameters(model) -> int:
    layer = model.encoder.layer[0]
    modules = (layer.intermediate, layer.output.dense)
    return sum(p.numel() for module in modules for p in module.parameters())


@torch.no_grad()
def test_it_is_a_sum_of_bottlenecks():
    """Σ_c W_c3 act(W_c2 act(W_c1 x + b) + b) + b, one transform after the other."""
    model = encoder(cardinality=3)
    layer = model.encoder.layer[0]
    up, middle, down = layer.intermediate.dense, layer.intermediate.middle, layer.output.dense
    x = torch.randn(2, 5, 32)
    size = bottleneck(32, 128, 3)[0]
    expected = down.bias.clone()
    for c in range(3):
        own = slice(c * size, (c + 1) * size)
        h = gelu(x @ up.weight[own].T + up.bias[own])
        h = gelu(h @ middle.weight[c].T + middle.bias[own])
        expected = expected + h @ down.weight[:, own].T
    torch.testing.assert_close(down(layer.intermediate(x)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.feed_forward_chunk(x), layer.output.LayerNorm(x + expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "ffn"), [(64, None), (128, None), (256, None), (128, 300)])
@pytest.mark.parametrize("cardinality", [1, 2, 4, 8, 16, 32])
def test_parameters_are_those_of_the_plain_feed_forward(width, ffn, cardinality):
    """As nearly as whole channels allow: half a channel of each transform, 1 % where one is 50 wide."""
    size, more = bottleneck(width, ffn or 4 * width, cardinality)
    grouped = encoder(cardinality, width=width, ffn_ratio=(ffn or 4 * width) / width, depth=1)
    plain = encoder(None, width=width, ffn_ratio=(ffn or 4 * width) / width, depth=1)
    counts = [feed_forward_parameters(model) for model in (grouped, plain)]
    assert counts[0] - counts[1] == more
    assert abs(more) / counts[1] <= 0.6 / size
    for near in (size - 1, size + 1):
        assert abs(more) <= abs(cardinality * near * (near + 2 * width + 2) - (2 * width + 1) * (ffn or 4 * width))


def test_the_plain_one_is_the_default():
    assert not isinstance(encoder(None).encoder.layer[0].intermediate, GroupedIntermediate)
    assert not hasattr(encoder(None).config, "ffn_cardinality")
    text = " ".join(str(resformer.describe(encoder(4))).split())
    size, more = bottleneck(32, 128, 4)
    assert f"sum of 4 bottlenecks of width {size}, {more:+,} parameters a layer" in text
    assert "bottlenecks" not in str(resformer.describe(encoder(None)))


@pytest.mark.parametrize(
    ("cardinality", "message"),
    [
        (0, "at least 1, got 0"),
        (-2, "at least 1"),
        (2.0, "whole number"),
        (True, "whole number"),
        ("4", "whole number"),
        (126, "less than one channel.*at most 124"),
    ],
)
def test_bad_cardinality(cardinality, message):
    with pytest.raises(ValueError, match=message):
        encoder(cardinality)
    assert encoder(124).config.ffn_cardinality == 124


# ------------------------------------------------------------------------------------------------ saved and loaded


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("identity", {}), ("deepnorm", {}), ("sub_ln", {}), ("hyper_connections", {}), ("highway", {"placement": "pre"})],
)
@pytest.mark.parametrize("auto", [AutoModel, CLASSIFY])
def test_round_trip(tmp_path, scheme, options, auto):
    model = encoder(4, scheme, auto=auto, **options)
    expected = model(IDS)[0]
    model.save_pretrained(tmp_path)
    found = resformer.from_pretrained(tmp_path, auto)
    assert found.config.ffn_cardinality == 4
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(found.state_dict()[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(found(IDS)[0], expected, rtol=1e-6, atol=1e-6)
    found.save_pretrained(tmp_path / "again")
    again = resformer.from_pretrained(tmp_path / "again", CLASSIFY, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS)[0], expected)


@pytest.mark.slow  # with other models: test_checkpoint.py
def test_installed_doors_load_it(tmp_path):
    model = encoder(4, "highway")
    model.save_pretrained(tmp_path / "model")
    torch.save(model(IDS).last_hidden_state, tmp_path / "expected.pt")
    code = f"""
import torch, resformer
from transformers import AutoModel
resformer.install()
model = AutoModel.from_pretrained({str(tmp_path / "model")!r}).eval()
expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(model(torch.arange(8)[None]).last_hidden_state, expected, rtol=1e-6, atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unpatched_one_does_not_load_as_a_plain_bert(tmp_path):
    model = unpatch(encoder(4, "highway"))
    assert isinstance(model.encoder.layer[0].intermediate, GroupedIntermediate)
    resformer.patch(copy.deepcopy(model), "rezero").save_pretrained(tmp_path / "patched")
    torch.testing.assert_close(resformer.from_pretrained(tmp_path / "patched", AutoModel)(IDS)[0], model(IDS)[0])
    with pytest.raises(ValueError, match=r"no class would load it; resformer.patch\(model, 'identity'\)"):
        model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    with pytest.raises(ValueError, match="sums of bottlenecks, which no plain host has"):
        resformer.fold(resformer.patch(model, "identity"))


def test_a_damaged_record_is_told(tmp_path):
    encoder(4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_cardinality": 0}))
    with pytest.raises(ValueError, match="cardinality must be"):
        resformer.from_pretrained(tmp_path, AutoModel)


# ------------------------------------------------------------------------------------------------ weights, training


def test_weight_inits():
    def std(weight_init):
        torch.manual_seed(0)
        model = build_encoder(2, 128, heads=2, vocab_size=30, cardinality=4, weight_init=weight_init)
        layer = model.encoder.layer[1]
        parts = (layer.intermediate.dense, layer.intermediate.middle, layer.output.dense)
        assert not any(part.bias.any() for part in parts)
        return [float(part.weight.detach().std()) for part in parts]

    size = bottleneck(128, 512, 4)[0]
    assert std("bert") == pytest.approx([0.02] * 3, rel=0.05)
    assert std("width_scaled") == pytest.approx([0.02 * math.sqrt(768 / 128)] * 3, rel=0.05)
    outer = math.sqrt(2 / (128 + 4 * size))
    assert std("xavier") == pytest.approx([outer, math.sqrt(2 / (size + size)), outer], rel=0.05)


def test_schemes_start_from_equal_weights():
    weights = []
    for scheme in ("identity", "rezero"):
        torch.manual_seed(0)
        weights.append(unpatch(build_encoder(2, 16, scheme, vocab_size=30, cardinality=2)).state_dict())
    assert all(torch.equal(weights[1][key], value) for key, value in weights[0].items())


def test_it_trains_and_compiles():
    model = encoder(4, "highway", auto=CLASSIFY).train()
    checkpoint(model)
    model(IDS, labels=torch.tensor([1])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.bert.encoder.layer[0].intermediate.parameters())
    torch._dynamo.reset()
    plain = encoder(4, "highway")
    run = torch.compile(lambda ids: plain(ids).last_hidden_state, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(IDS), plain(IDS).last_hidden_state)
