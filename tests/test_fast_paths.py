"""Fast paths compute what their formulas say: values, gradients, gradients of gradients, in every precision."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import resformer
from resformer import ResidualStack
from resformer.schemes import mixing, streams, sums
from resformer.schemes.fast import fast, written_out
from resformer.testing.hosts import batch, tiny_host

B, T, S, D = 2, 3, 4, 8
STREAMS = [
    ("hyper_connections", {}),
    ("hyper_connections", {"dynamic": True}),
    ("mhc", {}),
]
STACKS = [
    *STREAMS,
    ("denseformer", {}),
    ("dlcl", {}),
    ("laurel", {"previous": 3}),
    ("highway", {"init": "paper"}),
    ("attn_residual", {}),
    ("attn_residual", {"blocks": 2}),
]
IDS = [name + "-".join(map(str, options.values())) for name, options in STACKS]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


OPERATIONS = {
    "weighted": (sums.weighted, lambda w, *x: (w, x), [(3,), (B, T, D), (B, T, D), (B, T, D)]),
    "attended": (sums.attended, lambda q, *v: (q, v, 3.0), [(D,), (B, T, D), (B, T, D), (B, T, D)]),
    "blend": (sums.blend, lambda *x: x, [(B, T, D)] * 3),
    "read": (mixing.read, lambda *x: x, [(B, T, S, D), (S,)]),
    "mix": (mixing.mix, lambda *x: x, [(B, T, S, D), (S, S), (S,), (B, T, D)]),
    "project": (mixing.project, lambda *x: x, [(B, T, S, D), (5, D)]),
    "project_all": (mixing.project, lambda *x: x, [(B, T, S, D), (5, S * D)]),
    "project_centred": (mixing.project, lambda *x: (*x, None, True), [(B, T, S, D), (5, D)]),
    "read_by_token": (mixing.read_by_token, lambda *x: x, [(B, T, S, D), (B, T, S)]),
    "mix_by_token": (mixing.mix_by_token, lambda *x: x, [(B, T, S, D), (B, T, S, S), (B, T, S), (B, T, D)]),
    "doubly_stochastic": (streams.doubly_stochastic, lambda z: (z, 5), [(S, S, B, T)]),
}


def outputs(name: str, inputs: list[Tensor]) -> list[Tensor]:
    operation, arranged, _ = OPERATIONS[name]
    found = operation(*arranged(*inputs))
    return list(found) if isinstance(found, tuple) else [found]


def inputs_of(name: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(OPERATIONS[name][2])]


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_are_the_formulas(name):
    inputs = inputs_of(name)
    found = outputs(name, inputs)
    assert any("Backward" in type(out.grad_fn).__name__ and hasattr(out.grad_fn, "saved_tensors") for out in found)
    with written_out():
        expected = outputs(name, inputs)
    grads = [drawn(*out.shape, seed=9 + i).detach() for i, out in enumerate(expected)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, grads), torch.autograd.grad(expected, inputs, grads), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_output_alone_has_its_gradient(name):
    inputs = inputs_of(name)
    for i in range(len(outputs(name, inputs))):
        found = torch.autograd.grad(outputs(name, inputs)[i].sin().sum(), inputs, allow_unused=True)
        with written_out():
            expected = torch.autograd.grad(outputs(name, inputs)[i].sin().sum(), inputs, allow_unused=True)
        for one, other in zip(found, expected, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(*(zero if g is None or not g.any() else g for g in (one, other)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_can_be_differentiated_again(name):
    inputs = inputs_of(name)

    def function(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs(name, list(x)))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("name", "one"), [(name, i) for name in OPERATIONS for i in range(len(OPERATIONS[name][2]))])
def test_one_input_alone_that_learns_has_its_gradients(name, one):
    inputs = [x.detach() for x in inputs_of(name)]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs(name, [*inputs[:one], x, *inputs[one + 1 :]]))

    x = inputs[one].clone().requires_grad_()
    assert torch.autograd.gradcheck(function, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_backward_passes_called_inside_of_autocast_round_nothing(name):
    inputs = inputs_of(name, torch.float32)

    def run() -> list[Tensor]:
        found = outputs(name, inputs)
        return [*found, *torch.autograd.grad(found, inputs, [torch.ones_like(out) for out in found])]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_low_precision_errs_no_more_than_the_formula(name, dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs_of(name)]
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def run(x: list[Tensor]) -> list[Tensor]:
        found = outputs(name, x)
        return [*found, *torch.autograd.grad([out.double().sin().sum() for out in found], x)]

    with written_out():
        expected, formula = run(exact), run(inputs)
    for one, other, truth in zip(run(inputs), formula, expected, strict=True):
        assert one.dtype == other.dtype
        bound = 4 * (other.double() - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
        assert (one.double() - truth).abs().max() <= bound


def test_sinkhorn_stays_exact_with_logits_that_exponentials_cannot_hold():
    logits = 150 * drawn(S, S, 50)
    found = streams.doubly_stochastic(logits.float(), 20)
    with written_out():
        expected = streams.doubly_stochastic(logits, 20)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_norm_of_streams_is_as_exact_as_the_norm_of_torch_far_from_zero():
    scheme = stack("hyper_connections", {"dynamic": True}).schemes[1].float()
    h = (drawn(50, S, D) + 300).float().detach()
    _, m, *_ = scheme.moved(h, None)

    def formula(h: Tensor) -> Tensor:
        norm = nn.functional.layer_norm(h, (D,), *(p.to(h.dtype) for p in scheme.norm.parameters()), scheme.norm.eps)
        moved = torch.tanh(norm @ scheme.mix_weight[:, 0].to(h.dtype))
        return scheme.read_mix.to(h.dtype) + scheme.mix_scale.to(h.dtype) * moved

    exact = formula(h.double())
    assert (m - exact).abs().max() <= 4 * (formula(h) - exact).abs().max()


def stack(name: str, options: dict) -> ResidualStack:
    torch.manual_seed(0)
    sublayers = [nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(10)]
    made = ResidualStack(sublayers, D, name, **{"init": "paper", **options}).double()
    with torch.no_grad():
        for p in made.parameters():  # away from where many gradients are zero
            p.add_(0.2 * torch.randn(p.shape, dtype=p.dtype))
    return made


def losses(model: nn.Module, x: Tensor) -> list[Tensor]:
    loss = model(x).sin().sum()
    return [loss, *torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)]


@pytest.mark.parametrize(("name", "options"), STACKS, ids=IDS)
def test_stacks_are_what_their_formulas_give(name, options):
    model, x = stack(name, options), drawn(B, T, D)
    found = losses(model, x)
    with written_out():
        expected = losses(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("name", "options"), STACKS, ids=IDS)
def test_stacks_can_be_differentiated_twice(name, options):
    model, x = stack(name, options), drawn(B, T, D)

    def twice() -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *model.parameters()], allow_unused=True)

    found = twice()
    with written_out():
        expected = twice()
    for one, other in zip(found, expected, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
        else:
            assert all(g is None or not g.any() for g in (one, other))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("name", "options"), STREAMS, ids=IDS[: len(STREAMS)])
def test_streams_made_again_under_checkpointing(name, options, reentrant):
    model, x = stack(name, options), drawn(B, T, D)
    expected = losses(model, x)
    loss = checkpoint(model, x, use_reentrant=reentrant).sin().sum()
    parameters = list(model.parameters())
    if reentrant:
        loss.backward()
        found = [loss, x.grad, *(p.grad for p in parameters)]
    else:
        found = [loss, *torch.autograd.grad(loss, [x, *parameters], allow_unused=True)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), STACKS, ids=IDS)
def test_checkpointing_unpacks_once_when_gradients_are_differentiated_again(name, options):
    model, x = stack(name, options), drawn(B, T, D)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        (first,) = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("name", "options"), STREAMS, ids=IDS[: len(STREAMS)])
def test_a_graph_kept_gives_the_same_gradients_again(name, options):
    model, x = stack(name, options), drawn(B, T, D)
    loss = model(x).sin().sum()
    first, second = (
        torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True, allow_unused=True) for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def kept(states: int, name: str, options: dict) -> int:
    """How many tensors as large as so many states the backward pass needs."""
    model, x = stack(name, options), drawn(B, T, D)
    found: dict[int, Tensor] = {}  # held, or their addresses would be taken again

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return [tensor.untyped_storage().nbytes() for tensor in found.values()].count(states * B * T * D * 8)


def test_weights_that_learn_nothing_keep_no_state():
    weights, *states = inputs_of("weighted")
    found = []
    with saved_tensors_hooks(lambda tensor: found.append(tensor.shape) or tensor, lambda tensor: tensor):
        sums.weighted(weights.detach(), states)
    assert found == [weights.shape]


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_was_changed_between_two_parts_of_a_backward_pass_is_told(dynamic):
    """The streams that the first part makes again come of what the second part needs."""
    h, y, w = drawn(B, T, S, D), drawn(B, T, D), drawn(B, T, S) if dynamic else drawn(S)
    r = drawn(B, T, S, S) if dynamic else drawn(S, S)
    mix = mixing.mix_by_token if dynamic else mixing.mix
    between = mix(h, r, w, y)
    after = r.detach().clone().requires_grad_()
    loss = mix(between, after, w, y, mixing.again(between)).sum()
    torch.autograd.grad(loss, after, retain_graph=True)
    with torch.no_grad():
        r.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(loss, h)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_loss_of_lower_layers_may_come_first_and_free_them(dynamic):
    h, y, w = drawn(B, T, S, D), drawn(B, T, D), drawn(B, T, S) if dynamic else drawn(S)
    r, m = drawn(B, T, S, S) if dynamic else drawn(S, S), w.detach().clone().requires_grad_()
    mix, read = (mixing.mix_by_token, mixing.read_by_token) if dynamic else (mixing.mix, mixing.read)

    def run() -> list[Tensor]:
        between = mix(h, r, w, y)
        lower, made = between.sin().sum(), mixing.again(between)
        between, x = read(between, m, made)
        upper = mix(between, r.detach(), w.detach(), x.sin(), made).sum()
        return [*torch.autograd.grad(lower, [h, r]), *torch.autograd.grad(upper, [m])]

    found = run()
    with written_out():
        torch.testing.assert_close(found, run(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "sites"), [({}, 10 // streams.KEPT), ({"dynamic": True}, 10 // streams.KEPT_BY_TOKEN - 1)]
)
def test_only_some_sites_keep_their_streams(options, sites):
    """Of the 10 those whose number is divisible; the first has one state, which is repeated without a copy."""
    assert kept(S, "hyper_connections", options) == sites


@pytest.mark.parametrize(("name", "options"), [("mhc", {}), ("hyper_connections", {"dynamic": True})])
def test_streams_keep_their_precision_under_autocast(name, options):
    model, x = stack(name, options).float(), drawn(B, T, D, dtype=torch.float32)
    seen = []
    for module in model.modules():
        if isinstance(module, resformer.schemes()[name]):
            step = module.step

            def record(s, branch, norm, step=step):
                out = step(s, branch, norm)
                seen.append(out[0].dtype)
                return out

            module.step = record
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).sum()
    loss.backward()
    assert set(seen) == {torch.float32}


def test_compilers_and_transforms_take_the_formula():
    assert fast()
    found = []

    def function(x: Tensor) -> Tensor:
        found.append(fast())
        return x.square().sum()

    torch.func.grad(function)(torch.ones(2))
    torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))
    with torch.autograd.forward_ad.dual_level():
        function(torch.ones(2))
    with written_out():
        function(torch.ones(2))
    assert found == [False] * 4
    assert fast()


@pytest.mark.parametrize(("name", "options"), STACKS, ids=IDS)
def test_functional_transforms(name, options):
    model, x = stack(name, options), drawn(B, T, D).detach()
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(values: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)).sin().sum()

    values = tuple(v.detach() for v in values)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x[:, None])
    alone = torch.func.grad(loss)(values, x)
    for one, whole in zip(each, alone, strict=True):
        torch.testing.assert_close(one.sum(0), whole, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "options"), STACKS, ids=IDS)
def test_a_patched_host_computes_what_the_formulas_give(name, options):
    model = resformer.patch(tiny_host("bert", layers=3), name, **{"init": "paper", **options}).double().eval()
    inputs = batch()

    def run() -> list[Tensor]:
        loss = model(**inputs)[0].sin().sum()
        trained = [p for p in model.parameters() if p.requires_grad]
        return [loss, *torch.autograd.grad(loss, trained, allow_unused=True)]

    found = run()
    with written_out():
        expected = run()
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", OPERATIONS)
def test_many_gradients_can_be_taken_at_once(name):
    inputs = inputs_of(name)
    grads = [drawn(3, *out.shape, seed=9 + i).detach() for i, out in enumerate(outputs(name, inputs))]
    found = torch.autograd.grad(outputs(name, inputs), inputs, grads, is_grads_batched=True)
    for i in range(3):
        one = torch.autograd.grad(outputs(name, inputs), inputs, [grad[i] for grad in grads])
        torch.testing.assert_close([grad[i] for grad in found], list(one), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), STACKS, ids=IDS)
def test_stacks_run_without_storage(name, options):
    model, x = stack(name, options).to("meta"), drawn(B, T, D).detach().to("meta").requires_grad_()
    model(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(("name", "options"), STACKS, ids=IDS)
def test_stacks_can_be_traced_and_saved(name, options, tmp_path):
    model, x = stack(name, options).requires_grad_(requires_grad=False), drawn(B, T, D).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `torch.jit` is deprecated, and says of constants that they are
        torch.jit.save(torch.jit.trace(model, (x,)), tmp_path / "traced.pt")
        found = torch.jit.load(tmp_path / "traced.pt")(x)
    torch.testing.assert_close(found, model(x))


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2).sin()


@pytest.mark.parametrize(("name", "options"), STREAMS, ids=IDS[: len(STREAMS)])
def test_branches_may_change_what_they_read_in_place(name, options):
    model = ResidualStack([InPlace() for _ in range(6)], D, name, placement="none", **options).double()
    x = drawn(B, T, D)
    found = losses(model, x)
    with written_out():
        expected = losses(model, x)
    torch.testing.assert_close(found, expected)


def test_sums_over_many_entries_keep_their_digits():
    a, b = torch.rand(4000, 1000), torch.rand(4000, 1000)
    torch.testing.assert_close(sums.inner(a, b).double(), (a.double() * b.double()).sum(), rtol=1e-6, atol=0)
