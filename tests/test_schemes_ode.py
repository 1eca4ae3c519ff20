"""The layer as a vector field: adaptive solvers, their gradients, and what a repeated branch excludes."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import resformer
from resformer import ResidualStack, schemes
from resformer.schemes import Place
from resformer.schemes.ode import ADAPTIVE
from resformer.testing.hosts import batch, checkpoint, gradients, tiny_host

CLASSIFY = AutoModelForSequenceClassification
PLACE = Place(name="block", index=0, sites=2, layer=0, layers=1, width=4)
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def patched(
    family: str = "bert", auto=CLASSIFY, *, layers: int = 2, dropout: float = 0.0, dtype=torch.float64, **options
):
    host = tiny_host(family, auto, layers=layers, dropout=dropout, dtype=dtype)
    return resformer.patch(host, "ode", init="paper", **options)


def solvers(model) -> list:
    return [module for module in model.modules() if type(module) is schemes()["ode"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dopri6"}, "Did you mean 'dopri"),
        ({"steps": 0}, "steps"),
        ({"method": "dopri5", "steps": 2}, "'steps' is for the methods euler, rk2, rk4; got method='dopri5'"),
        ({"method": "rk4", "rtol": 1e-5}, "'rtol' is for the methods adaptive_heun, bosh3, dopri5"),
        ({"adjoint": True}, "'adjoint' is for the methods"),
        ({"method": "dopri5", "adjoint": 1}, "adjoint"),
        ({"method": "dopri5", "rtol": 0.0}, "rtol"),
        ({"method": "dopri5", "atol": float("nan")}, "atol"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        schemes()["ode"](PLACE, **options)


def test_a_missing_package_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    schemes()["ode"](PLACE, method="rk4")
    with pytest.raises(ValueError, match=r"need torchdiffeq: pip install torchdiffeq, or resformer\[ode\]"):
        patched(method="dopri5")


# ------------------------------------------------------------------------------------------------ solutions


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_solvers_solve_the_equation(method):
    """dx/dt = A x from t = 0 to 1: the last state of the trajectory is exp(A) x."""
    A = torch.tensor([[-0.5, 1.0], [-1.0, -0.2]], dtype=torch.float64)
    options = {"rtol": 1e-5, "atol": 1e-6}
    stack = ResidualStack(
        [lambda x: x @ A.T], 2, "ode", placement=None, norm=lambda width: nn.Identity(), method=method, **options
    )
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stack(x), x @ torch.linalg.matrix_exp(A).T, rtol=1e-4, atol=1e-4)
    (scheme,) = stack.schemes
    assert scheme.evaluations > 1


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert"])
def test_adaptive_is_the_limit_of_many_small_steps(family):
    adaptive, fixed = patched(family, method="dopri5", **TIGHT), patched(family, method="rk4", steps=40)
    torch.testing.assert_close(adaptive(**batch()).logits, fixed(**batch()).logits, rtol=1e-5, atol=1e-5)


def test_one_weight_tied_layer_is_the_neural_ode():
    """Many steps of one layer cost no parameters: depth is the solver's."""
    model = resformer.build_encoder(1, 16, "ode", vocab_size=30, heads=2, method="dopri5").eval()
    before = model(torch.arange(8)[None]).last_hidden_state
    (solver,) = solvers(model)
    coarse = solver.evaluations
    solver.rtol = solver.atol = 1e-6
    assert not torch.equal(model(torch.arange(8)[None]).last_hidden_state, before)
    assert solver.evaluations > coarse
    plain = resformer.build_encoder(1, 16, vocab_size=30, heads=2)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())


# ------------------------------------------------------------------------------------------------ evaluations


@pytest.mark.parametrize(("options", "calls"), [({}, 2), ({"method": "rk4", "steps": 3}, 12), ({"method": "euler"}, 1)])
def test_evaluations_of_fixed_steps(options, calls):
    scheme = schemes()["ode"](PLACE, init="paper", **options)
    assert scheme.evaluations == calls
    assert scheme.repeats == (calls > 1)
    assert scheme.compiles


def test_evaluations_are_counted_and_told():
    model = patched(method="dopri5", layers=2)
    calls = [0, 0]
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.intermediate.register_forward_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    model(**batch())
    assert [solver.evaluations for solver in solvers(model)] == calls
    assert min(calls) > 6
    assert f"in the last forward: {calls[0]}, {calls[1]}" in " ".join(str(resformer.describe(model)).split())
    assert not solvers(model)[0].compiles
    assert "∫ f(x(t)) dt" in str(resformer.describe(model))


# ------------------------------------------------------------------------------------------------ gradients


def trained(model, **given):
    torch.manual_seed(0)
    model.train()
    loss = model(**batch(labels=True), **given).loss
    loss.backward()
    return loss, gradients(model)


def test_adjoint_gradients_are_those_of_the_steps():
    """Also of the layers' parameters, which the solver must be told of."""
    _, direct = trained(patched(method="dopri5", **TIGHT))
    _, adjoint = trained(patched(method="dopri5", adjoint=True, **TIGHT))
    for name, gradient in direct.items():
        assert (gradient is None) == (adjoint[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(adjoint[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert direct["bert.encoder.layer.1.attention.self.query.weight"].any()


def test_adjoint_gradients_reach_the_states_of_an_encoder():
    changes = {"is_decoder": True, "add_cross_attention": True}
    found = []
    for adjoint in (False, True):
        host = tiny_host("bert", AutoModelForCausalLM, layers=1, **changes)
        model = resformer.patch(host, "ode", init="paper", method="dopri5", adjoint=adjoint, **TIGHT)
        states = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(**batch(), encoder_hidden_states=states, use_cache=False).logits.square().mean().backward()
        found.append(states.grad)
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-8)


def test_adjoint_gradients_in_a_stack():
    found = []
    for adjoint in (False, True):
        torch.manual_seed(0)
        sublayers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)]
        stack = ResidualStack(sublayers, 4, "ode", layer_size=2, method="dopri5", adjoint=adjoint, **TIGHT).double()
        stack(torch.randn(2, 4, dtype=torch.float64)).square().sum().backward()
        found.append(gradients(stack))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("adjoint", [False, True])
def test_dropout_holds_its_mask_through_a_solution(adjoint):
    """Else the field changes between evaluations, and no step meets the tolerance."""
    model = patched(method="dopri5", dropout=0.2, adjoint=adjoint)
    loss, first = trained(model)
    assert all(solver.evaluations < 100 for solver in solvers(model))
    model.zero_grad()
    again, second = trained(model)
    assert torch.equal(loss, again)
    assert all(g is None or torch.equal(g, second[name]) for name, g in first.items())
    with torch.no_grad():
        other = model(**batch(labels=True)).loss
    assert not torch.equal(other, loss), "another forward draws other masks"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adjoint", [False, True])
def test_gradient_checkpointing(adjoint, reentrant):
    found = []
    for checkpointed in (False, True):
        model = patched(method="dopri5", dropout=0.2, adjoint=adjoint)
        if checkpointed:
            checkpoint(model, {"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss, gradient = trained(model)
        found.append((loss, gradient, [solver.evaluations for solver in solvers(model)]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][2] == found[1][2], "the repetition counts as the forward did"
    for name, gradient in found[0][1].items():
        assert gradient is None or torch.equal(gradient, found[1][1][name]), name


# ------------------------------------------------------------------------------------------------ mechanics


@pytest.mark.parametrize("adjoint", [False, True])
def test_half_precision(adjoint):
    model = patched(method="dopri5", adjoint=adjoint, dtype=torch.bfloat16)
    loss, gradient = trained(model)
    assert loss.isfinite()
    assert all(g is None or (g.dtype == torch.bfloat16 and g.isfinite().all()) for g in gradient.values())
    with torch.autocast("cpu", torch.bfloat16):
        assert trained(patched(method="dopri5", adjoint=adjoint, dtype=torch.float32))[0].isfinite()


def test_copies_and_checkpoints(tmp_path):
    model = patched(method="dopri5", adjoint=True).eval()
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path)
    loaded = resformer.from_pretrained(tmp_path, CLASSIFY, attn_implementation="eager").eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        torch.testing.assert_close(other(**batch()).logits, expected, rtol=1e-12, atol=1e-12)
    assert solvers(loaded)[0].adjoint
    assert "first to last, in the last forward" in " ".join(str(resformer.describe(loaded)).split())


def test_adaptive_solvers_do_not_compile_to_one_graph():
    torch._dynamo.reset()
    model = patched(method="dopri5")
    with pytest.raises(Exception, match="adaptive solver"):
        torch.compile(lambda **kw: model(**kw).logits, fullgraph=True, backend="eager")(**batch())
    torch._dynamo.reset()
    run = torch.compile(lambda **kw: model(**kw).logits, backend="eager")
    torch.testing.assert_close(run(**batch()), model(**batch()).logits, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ attentions


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert", "distilbert"])
def test_attentions_are_refused_where_there_is_more_than_one(family):
    model = patched(family)
    given = batch() | {"use_cache": False} if family == "gpt2" else batch()
    for ask in (
        lambda: model(**given, output_attentions=True),
        lambda: model.base_model(**given, output_attentions=True),
    ):
        with pytest.raises(ValueError, match="no one attention to show; leave output_attentions out"):
            ask()
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="off in the config"):
        model(**given)
    assert model(**given, output_attentions=False).logits.isfinite().all()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="no one attention"):
            other(**given)
    resformer.unpatch(model)
    assert len(model(**given).attentions) == 2
    with pytest.raises(ValueError, match="off in the config"):
        resformer.patch(model, "ode", init="paper")
    assert len(model(**given).attentions) == 2, "a refused patch leaves no refusal behind"
    resformer.patch(model, "rezero")
    assert len(model(**given).attentions) == 2


def test_one_euler_step_shows_attentions_and_keeps_a_cache():
    host, model = tiny_host("gpt2", AutoModelForCausalLM), patched("gpt2", AutoModelForCausalLM, method="euler")
    expected, found = (m(**batch(), output_attentions=True) for m in (host, model))
    for f, e in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(f, e)
    given = {"input_ids": batch()["input_ids"], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**given, use_cache=True), host.generate(**given, use_cache=True))
