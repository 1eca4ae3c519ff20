"""Where the last state comes from and what the shortcuts multiply, against the same by hand."""

import pytest
import torch
from diagnosed import given, subject
from torch import nn

import resformer
from resformer.diagnostics.decomposition import decomposition
from resformer.diagnostics.shortcut_product import shortcut_product
from resformer.diagnostics.skip import freeze


def over_text(a, b, inputs):
    return float((a * b).detach().sum(-1)[inputs["attention_mask"] > 0].sum())


def seen(model, inputs, paths):
    """What modules read and gave, by path."""
    found = {}
    for path in paths:

        def leaving(module, args, output, path=path):
            found[path] = (args[0], output[0] if isinstance(output, tuple) else output)

        model.get_submodule(path).register_forward_hook(leaving)
    with torch.no_grad():
        model(**inputs)
    return found


def test_a_pre_ln_host_is_the_plain_sum():
    model, inputs = subject("gpt2"), given("gpt2")
    measured = decomposition(model, inputs)
    names = [f"transformer.h.{i}.{name}" for i in range(3) for name in ("attn", "mlp")]
    found = seen(model, inputs, [*names, "transformer.h.0.ln_1", "transformer.ln_f"])
    last = found["transformer.ln_f"][0]
    given_by = [found["transformer.h.0.ln_1"][0], *(found[name][1] for name in names)]
    torch.testing.assert_close(sum(given_by), last)
    whole = over_text(last, last, inputs)
    expected = [over_text(y, last, inputs) / whole for y in given_by]
    assert measured.column("share") == pytest.approx(expected, rel=1e-9)
    assert measured.column("gain") == pytest.approx([1.0] * 7, rel=1e-9)
    assert [row["site"] for row in measured.rows] == ["input"] + ["attn", "ffn"] * 3
    assert abs(measured.facts["rest"]) < 1e-12
    assert measured.facts["apart"] < 1e-12


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_exact_in_single_precision(family):
    """‖x_L - x_0 - Σ y‖ / ‖x_L‖ is rounding: over 10 seeds 6.6e-8 ± 0.8e-8, the largest 8.3e-8."""
    assert decomposition(subject(family).float(), given(family)).facts["apart"] < 2e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [None, "deepnorm", "sub_ln"])
def test_low_precision_is_rounding_and_no_other_norm(scheme, dtype):
    """Shares as in double precision, up to the unit of the type."""
    model, inputs = subject("bert"), given("bert")
    if scheme is not None:
        resformer.patch(model, scheme, init="paper")
    exact, rounded = decomposition(model, inputs), decomposition(model.to(dtype), inputs)
    assert rounded.column("share") == pytest.approx(exact.column("share"), abs=8 * torch.finfo(dtype).eps)


def test_a_post_ln_host_with_frozen_norms():
    """Older terms are centred, divided and multiplied by each later norm as it stood; biases make up the rest."""
    model, inputs = subject("bert"), given("bert")
    measured = decomposition(model, inputs)
    layers = [f"bert.encoder.layer.{i}" for i in range(3)]
    norms = [f"{layer}.{name}.LayerNorm" for layer in layers for name in ("attention.output", "output")]
    branches = [f"{layer}.{name}.dense" for layer in layers for name in ("attention.output", "output")]
    found = seen(model, inputs, [*norms, *branches, f"{layers[0]}.attention.self"])
    terms, biases = [found[f"{layers[0]}.attention.self"][0]], 0.0
    for norm_path, branch in zip(norms, branches, strict=True):
        terms.append(found[branch][1])
        norm, z = model.get_submodule(norm_path), found[norm_path][0]
        scale = norm.weight / (z.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        terms = [scale * (term - term.mean(-1, keepdim=True)) for term in terms]
        biases = norm.bias + (0.0 if isinstance(biases, float) else scale * (biases - biases.mean(-1, keepdim=True)))
    last = found[norms[-1]][1]
    torch.testing.assert_close(sum(terms) + biases, last)
    whole = over_text(last, last, inputs)
    assert measured.column("share") == pytest.approx(
        [over_text(term, last, inputs) / whole for term in terms], rel=1e-7, abs=1e-9
    )
    assert measured.facts["norm_biases"] == pytest.approx(over_text(biases.expand_as(last), last, inputs) / whole)
    assert abs(measured.facts["rest"]) < 1e-9


def test_several_streams_that_start_as_one():
    plain, inputs = decomposition(subject("gpt2"), given("gpt2")), given("gpt2")
    copies = decomposition(resformer.patch(subject("gpt2"), "hyper_connections"), inputs)
    assert copies.column("share") == pytest.approx(plain.column("share"), rel=1e-6)


def test_a_history_by_its_weights():
    """x_i = Σ_j a_ij X_j: a branch reaches the end by every later mixture that has it."""
    model, inputs = subject("gpt2", "denseformer"), given("gpt2")
    measured = decomposition(model, inputs)
    names = [f"transformer.h.{i}.{name}" for i in range(3) for name in ("attn", "mlp")]
    found = seen(model, inputs, [*names, "transformer.h.0.ln_1", "transformer.ln_f"])
    sources = [found["transformer.h.0.ln_1"][0], *(found[name][1] for name in names)]
    eye = torch.eye(7, dtype=torch.float64)
    x, outputs = eye[0], [eye[0]]  # as weights on the sources
    for layer in range(3):
        outputs.append(x + eye[1 + 2 * layer] + eye[2 + 2 * layer])
        weights = model.transformer.h[layer].resformer.ffn.a.detach()
        x = sum(w * output for w, output in zip(weights, outputs, strict=True))
    last = found["transformer.ln_f"][0]
    torch.testing.assert_close(sum(w * y for w, y in zip(x, sources, strict=True)), last)
    whole = over_text(last, last, inputs)
    expected = [float(w) * over_text(y, last, inputs) / whole for w, y in zip(x, sources, strict=True)]
    assert measured.column("share") == pytest.approx(expected, rel=1e-9)
    assert measured.column("gain") == pytest.approx([abs(float(w)) for w in x], rel=1e-9)


@pytest.mark.parametrize("gain", [1.0, 1e-3])
@pytest.mark.parametrize("norm", [nn.LayerNorm(10, eps=0.1), nn.RMSNorm(10, eps=0.1), nn.LayerNorm(10, bias=False)])
def test_frozen_norms_are_linear_and_agree(norm, gain):
    torch.manual_seed(0)
    norm = norm.double()
    for p in norm.parameters():
        p.data = gain * torch.randn(10, dtype=torch.float64)
    z, shifts = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True), []
    out = freeze(norm, z, shifts=shifts)
    torch.testing.assert_close(out, norm(z))
    v = torch.randn_like(out)
    (g,) = torch.autograd.grad(out, z, v)
    # linear: <v, out - shift> = <g, z>
    torch.testing.assert_close((v * (out - shifts[0])).sum(), (g * z).sum())


def test_a_map_that_is_no_norm():
    with pytest.raises(ValueError, match="Tanh is no norm of the form"):
        freeze(nn.Tanh(), torch.randn(1, 3, 8, dtype=torch.float64), shifts=[])


def test_the_product_of_constant_shortcuts():
    """∏ λ on the skip path, exactly; with the branches on, a pre-LN net gains (He's law is conditional)."""
    model, inputs = subject("gpt2", "scaled", shortcut=0.8, branch=1.0), given("gpt2")
    measured = shortcut_product(model, inputs, probes=1)
    powers = [0.8**n for n in range(6, 0, -1)]
    assert measured.column("factor") == pytest.approx([0.8] * 6, rel=1e-12)
    assert measured.column("product") == pytest.approx(powers, rel=1e-12)
    assert measured.column("skip") == pytest.approx(powers, rel=1e-12)
    assert measured.facts["skip_rate"] == pytest.approx(0.64)
    assert measured.facts["total_rate"] > 1  # over 10 seeds 1.31 ± 0.15, at least 1.05


def test_closed_branches_leave_the_shortcuts():
    model = subject("gpt2", "scaled", shortcut=0.9, branch=1e-9, layers=4)
    measured = shortcut_product(model, given("gpt2"))
    assert measured.column("total") == pytest.approx(measured.column("skip"), rel=1e-5)


@pytest.mark.parametrize(("family", "scheme"), [("bert", None), ("bert", "denseformer"), ("gpt2", "hyper_connections")])
def test_gains_against_the_whole_jacobian(family, scheme):
    """The mean over probes is the Frobenius norm of ∂x_L / ∂x_l over the root of its rows, taken row by row."""
    model, inputs = subject(family, scheme, layers=2), given(family)
    for name in ("input_ids", "attention_mask", "labels"):
        inputs[name] = inputs[name][:1, :3] if inputs[name].ndim > 1 else inputs[name][:1]
    measured = shortcut_product(model, inputs, probes=400)
    layers = model.base_model.encoder.layer if family == "bert" else model.base_model.h
    found = {}

    def leaving(module, args, output):
        stream = output[1:] if isinstance(output, tuple) else (output,)
        found["leaves"] = [tensor.detach().requires_grad_() for tensor in stream]
        return (output[0], *found["leaves"]) if isinstance(output, tuple) else found["leaves"][0]

    layers[0].register_forward_hook(leaving)
    layers[1].register_forward_hook(lambda _, args, out: found.update(end=out))
    model(**inputs)
    end, square = found["end"].flatten(), 0.0
    for one in end:
        for g in torch.autograd.grad(one, found["leaves"], retain_graph=True, allow_unused=True):
            square += 0.0 if g is None else float(g.square().sum())
    row = next(row for row in measured.rows if (row["layer"], row["site"]) == (1, "attn"))
    assert row["total"] == pytest.approx((square / len(end)) ** 0.5, rel=0.05)


def test_probes():
    with pytest.raises(ValueError, match="probes must be a whole number of at least 1, got 0"):
        shortcut_product(subject("gpt2"), given("gpt2"), probes=0)
