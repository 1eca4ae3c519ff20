"""The papers' update rules as slow loops over tokens and channels, and three hosts as explicit loops over sublayers.

Written from the equations, in float64 and in plain Python numbers where the scheme computes anything; nothing of
resformer is imported. A test feeds both this and the implementation the same parameters and compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]
Vector = list[float]


def nothing(x: Tensor) -> Tensor:
    return x


@dataclass
class Site:
    """One sublayer, the norms that act around it, and the scheme's parameters there."""

    f: Map
    p: dict[str, Tensor] = field(default_factory=dict)
    pre: Map = nothing
    out: Map = nothing
    post: Map = nothing

    def branch(self, x: Tensor) -> Tensor:
        return self.out(self.f(self.pre(x)))

    def numbers(self, name: str) -> Any:
        return self.p[name].double().tolist()


@dataclass
class Net:
    layers: list[list[Site]]
    final: Map = nothing
    embed: Map = nothing
    options: dict[str, Any] = field(default_factory=dict)
    init: str = "paper"
    training: bool = False

    @property
    def sites(self) -> list[Site]:
        return [site for layer in self.layers for site in layer]


# ------------------------------------------------------------------------------------------------ plain arithmetic


def tokenwise(rule: Callable[..., Vector], *xs: Tensor) -> Tensor:
    """The rule applied to the vectors that all x have at the same token."""
    rows = [x.double().reshape(-1, x.shape[-1]).tolist() for x in xs]
    return torch.tensor([rule(*at) for at in zip(*rows, strict=True)], dtype=torch.float64).reshape(xs[0].shape)


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def affine(W: list[Vector], x: Vector, b: Vector | None = None) -> Vector:
    """(W x + b)_i = Σ_j W_ij x_j + b_i"""
    found = [sum(w * a for w, a in zip(row, x, strict=True)) for row in W]
    return found if b is None else [f + shift for f, shift in zip(found, b, strict=True)]


def layer_norm(x: Vector, weight: Vector, bias: Vector, eps: float = 1e-5) -> Vector:
    mean = sum(x) / len(x)
    variance = sum((a - mean) ** 2 for a in x) / len(x)
    scale = 1 / math.sqrt(variance + eps)
    return [(a - mean) * scale * w + b for a, w, b in zip(x, weight, bias, strict=True)]


def gate(site: Site, name: str, x: Vector) -> Vector:
    """σ(W x + b)"""
    return [sigmoid(a) for a in affine(site.numbers(f"{name}.weight"), x, site.numbers(f"{name}.shift"))]


def once(rule: Callable[[Net, Site], Callable[[Vector, Vector], Vector]]) -> Callable[[Net, Tensor], Tensor]:
    """The loop of the schemes that carry one stream and look at nothing but (x, F(x)) at a token."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x)
        for site in net.sites:
            x = site.post(tokenwise(rule(net, site), x, site.branch(x)))
        return net.final(x)

    return run


# ------------------------------------------------------------------------------------------------ one stream


def add(net: Net, site: Site):
    """Vaswani et al. 2017: LN(x + F(x)); Xiong et al. 2020: x + F(LN(x)). The norms say which."""
    return lambda x, y: [a + b for a, b in zip(x, y, strict=True)]


def plain(net: Net, site: Site):
    return lambda x, y: y


def scaled(net: Net, site: Site):
    """He et al. 2016: λ x + F; Szegedy et al. 2016: x + τ F."""
    lam, tau = net.options.get("shortcut", 1.0), net.options.get("branch", 1.0)
    return lambda x, y: [lam * a + tau * b for a, b in zip(x, y, strict=True)]


def rezero(net: Net, site: Site):
    """Bachlechner et al. 2020: x + α F(x)."""
    alpha = site.numbers("a")
    return lambda x, y: [a + alpha * b for a, b in zip(x, y, strict=True)]


def layer_scale(net: Net, site: Site):
    """Touvron et al. 2021: x + diag(λ_1 ... λ_d) F(x)."""
    return lambda x, y: [a + g * b for a, b, g in zip(x, y, site.numbers("a"), strict=True)]


def deepnorm(net: Net, site: Site):
    """Wang et al. 2022: LN(α x + F(x)), α = (2 N)^¼ for N layers of two sublayers."""
    alpha = len(net.sites) ** 0.25
    return lambda x, y: [alpha * a + b for a, b in zip(x, y, strict=True)]


def highway(net: Net, site: Site):
    """Srivastava et al. 2015: T ⊙ F + C ⊙ x, coupled C = 1 - T; a preserving start doubles the sum."""

    def rule(x: Vector, y: Vector) -> Vector:
        T = gate(site, "transform", x)
        C = [1 - t for t in T] if net.options.get("coupled", True) else gate(site, "carry", x)
        gain = 1 if net.init == "paper" else 2
        return [gain * (t * b + c * a) for a, b, t, c in zip(x, y, T, C, strict=True)]

    return rule


def exclusive_gate(net: Net, site: Site):
    """He et al. 2016: (1 - g) x + g F."""

    def rule(x: Vector, y: Vector) -> Vector:
        gain = 1 if net.init == "paper" else 2
        return [gain * (g * b + (1 - g) * a) for a, b, g in zip(x, y, gate(site, "gate", x), strict=True)]

    return rule


def shortcut_gate(net: Net, site: Site):
    """He et al. 2016: (1 - g) x + F."""

    def rule(x: Vector, y: Vector) -> Vector:
        gain = 1 if net.init == "paper" else 2
        return [b + gain * (1 - g) * a for a, b, g in zip(x, y, gate(site, "gate", x), strict=True)]

    return rule


def concat(net: Net, site: Site):
    """Chen et al. 2017: a linear map of [x; F; x - F; x ⊙ F]."""
    W, b = site.numbers("weight"), site.numbers("shift")

    def rule(x: Vector, y: Vector) -> Vector:
        joined = x + y
        if net.options.get("enhance", True):
            joined = joined + [a - f for a, f in zip(x, y, strict=True)] + [a * f for a, f in zip(x, y, strict=True)]
        return affine(W, joined, b)

    return rule


def drop_path(net: Net, x: Tensor) -> Tensor:
    """Huang et al. 2016: survival q_l = 1 - (l / L) p of residual block l of L; one draw for each example."""
    x = net.embed(x)
    for l, site in enumerate(net.sites, start=1):
        q = 1 - net.options.get("p", 0.1) * l / len(net.sites)
        y = site.branch(x)
        if net.training:
            m = torch.empty((len(x), *[1] * (x.ndim - 1)), dtype=x.dtype).bernoulli_(q).flatten().tolist()
            y = torch.stack([row * kept / q for row, kept in zip(y, m, strict=True)])
        x = site.post(x + y)
    return net.final(x)


def b2t(net: Net, x: Tensor) -> Tensor:
    """Takase et al. 2022: y = LN(x + SA(x)); LN(x + y + FFN(y)), in the top layer without the x."""
    x = net.embed(x)
    for n, layer in enumerate(net.layers, start=1):
        y = x
        for i, site in enumerate(layer, start=1):
            total = y + site.branch(y)
            if i == len(layer) and len(layer) > 1 and n < len(net.layers):
                total = total + x
            y = site.post(total)
        x = y
    return net.final(x)


def ode(net: Net, x: Tensor) -> Tensor:
    """Li et al. 2022: Runge-Kutta steps of f(x) = layer(x) - x."""
    x = net.embed(x)
    method = net.options.get("method", "rk2")
    for layer in net.layers:

        def f(at: Tensor, layer: list[Site] = layer) -> Tensor:
            y = at
            for site in layer:
                y = site.post(y + site.branch(y))
            return y - at

        k1 = f(x)
        if method == "euler":
            x = x + k1
        elif method == "rk2":
            x = x + (k1 + f(x + k1)) / 2
        elif method == "rk4":
            k2 = f(x + k1 / 2)
            k3 = f(x + k2 / 2)
            k4 = f(x + k3)
            x = x + (k1 + 2 * k2 + 2 * k3 + k4) / 6
        else:
            raise KeyError(method)
    return net.final(x)


# ------------------------------------------------------------------------------------------------ many streams


def denseformer(net: Net, x: Tensor) -> Tensor:
    """Pagliardini et al. 2024: Y_i = Σ α_ij X_j, j ≤ i, j ≡ i mod k, after each p-th layer; X_{i+1} = B(Y_i)."""
    dilation, period = net.options.get("dilation", 1), net.options.get("period", 1)
    y = net.embed(x)
    X = [y]
    for i, layer in enumerate(net.layers, start=1):
        for site in layer:
            y = site.post(y + site.branch(y))
        X.append(y)
        if i % period == 0:
            alpha = layer[-1].numbers("a")
            chosen = [j for j in range(i + 1) if (i - j) % dilation == 0]
            assert len(alpha) == len(chosen)
            y = torch.zeros_like(y)
            for weight, j in zip(alpha, chosen, strict=True):
                y = y + weight * X[j]
    return net.final(y)


def hyper_connections(net: Net, x: Tensor) -> Tensor:
    """Zhu et al. 2024: h = A_mᵀ H; H_j ← Σ_i A_r[i, j] H_i + B_j F(h), with A and B of each token if dynamic."""
    n, dynamic = net.options.get("num_streams", 4), net.options.get("dynamic", False)
    H = [net.embed(x)] * n  # n tensors of (B T D)
    for site in net.sites:
        A_m, A_r, B = (site.numbers(name) for name in ("read_mix", "mix", "write_mix"))

        def weights(streams: tuple[Vector, ...], site: Site = site, A_m=A_m, A_r=A_r, B=B):
            if not dynamic:
                return A_m, A_r, B
            W, w = site.numbers("mix_weight"), site.numbers("write_weight")
            s_a, s_b = site.numbers("mix_scale"), site.numbers("write_scale")
            m, R, b = [], [], []
            for i, stream in enumerate(streams):
                state = layer_norm(stream, site.numbers("norm.weight"), site.numbers("norm.bias"))
                row = [math.tanh(sum(state[d] * W[d][c] for d in range(len(state)))) for c in range(n + 1)]
                m.append(A_m[i] + s_a * row[0])
                R.append([A_r[i][j] + s_a * row[1 + j] for j in range(n)])
                b.append(B[i] + s_b * math.tanh(sum(a * c for a, c in zip(state, w, strict=True))))
            return m, R, b

        def read(*streams: Vector, weights=weights) -> Vector:
            m, _, _ = weights(streams)
            return [sum(m[i] * streams[i][d] for i in range(n)) for d in range(len(streams[0]))]

        def write(j: int, weights=weights) -> Callable[..., Vector]:
            def rule(*given: Vector) -> Vector:
                *streams, y = given
                _, R, b = weights(tuple(streams))
                return [sum(R[i][j] * streams[i][d] for i in range(n)) + b[j] * y[d] for d in range(len(y))]

            return rule

        y = site.branch(tokenwise(read, *H))
        H = [site.post(tokenwise(write(j), *H, y)) for j in range(n)]
    total = sum(H[1:], H[0])
    return net.final(total if net.init == "paper" else total / n)


REFERENCES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "identity": once(add),
    "plain": once(plain),
    "post_ln": once(add),
    "pre_ln": once(add),
    "sub_ln": once(add),  # the norm inside the branch is part of f
    "b2t": b2t,
    "scaled": once(scaled),
    "rezero": once(rezero),
    "layer_scale": once(layer_scale),
    "deepnorm": once(deepnorm),
    "highway": once(highway),
    "exclusive_gate": once(exclusive_gate),
    "shortcut_gate": once(shortcut_gate),
    "concat": once(concat),
    "drop_path": drop_path,
    "denseformer": denseformer,
    "hyper_connections": hyper_connections,
    "ode": ode,
}

# What the options change; every scheme is also tested with its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "scaled": [{"shortcut": 0.7, "branch": 0.3}],
    "highway": [{"coupled": False}, {"bias": -1.0}],
    "exclusive_gate": [{"bias": 0.0}],
    "shortcut_gate": [{"bias": -1.0}],
    "concat": [{"enhance": False}],
    "drop_path": [{"p": 0.8}],
    "denseformer": [{"dilation": 2}, {"period": 2}, {"dilation": 2, "period": 3}],
    "hyper_connections": [{"dynamic": True}, {"num_streams": 2}, {"num_streams": 3, "dynamic": True}],
    "ode": [{"method": "euler"}, {"method": "rk4"}],
}

# How many parameters a scheme adds to L layers of two sites, of width D and of width I before the down projection.
PARAMETERS: dict[str, Callable[..., int]] = {
    "sub_ln": lambda L, D, I: 2 * L * (D + I),
    "rezero": lambda L, D, I: 2 * L,
    "layer_scale": lambda L, D, I: 2 * L * D,
    "highway": lambda L, D, I, bias=-2.0, coupled=True: (2 if coupled else 4) * L * (D * D + D),
    "exclusive_gate": lambda L, D, I, bias=-6.0: 2 * L * (D * D + D),
    "shortcut_gate": lambda L, D, I, bias=-6.0: 2 * L * (D * D + D),
    "concat": lambda L, D, I, enhance=True: 2 * L * ((4 if enhance else 2) * D * D + D),
    "denseformer": lambda L, D, I, dilation=1, period=1: sum(
        len(range(i, -1, -dilation)) for i in range(1, L + 1) if i % period == 0
    ),
    "hyper_connections": lambda L, D, I, num_streams=4, dynamic=False: (
        2 * L * (num_streams**2 + 2 * num_streams + (D * (num_streams + 2) + 2 + 2 * D if dynamic else 0))
    ),
}

# Where the papers have the norms: schemes that are about it, and those whose net from scratch is built so.
FIXED = {"post_ln": "post", "pre_ln": "pre", "sub_ln": "pre", "b2t": "post", "deepnorm": "post"}
PAPER = {
    "rezero": "none",
    "layer_scale": "pre",
    "exclusive_gate": "pre",
    "shortcut_gate": "pre",
    "hyper_connections": "pre",
}


def placement_of(scheme: str, init: str, native: str) -> str:
    """Where the norms act: "pre" (and at the end), "post" or "none"."""
    return FIXED.get(scheme) or (PAPER.get(scheme, native) if init == "paper" else native)


# ------------------------------------------------------------------------------------------------ three hosts


def host_net(family: str, twin: nn.Module, patched: nn.Module, given: dict[str, Tensor], placement: str):
    """A host as a `Net` and the stream it starts with.

    The sublayers are those of `twin`, an unpatched copy with the same weights; `patched` gives the scheme's
    parameters and the norms that the host did not have.
    """
    ids, real = given["input_ids"], given["attention_mask"].bool()
    tokens = range(ids.shape[1])
    if family == "bert":
        x, layers, own = twin.embeddings(input_ids=ids), twin.encoder.layer, patched.encoder.layer
        native, last = "post", None
        mask = additive(real, [[True for _ in tokens] for _ in tokens])
        parts = [_bert_parts(layer, mask) for layer in layers]
    elif family == "gpt2":
        x = twin.wte(ids) + twin.wpe(torch.arange(ids.shape[1]))
        layers, own, native, last = twin.h, patched.h, "pre", twin.ln_f
        mask = additive(real, [[j <= i for j in tokens] for i in tokens])
        parts = [_gpt2_parts(layer, mask) for layer in layers]
    elif family == "modernbert":
        x, layers, own = twin.embeddings(input_ids=ids), twin.layers, patched.layers
        native, last = "pre", twin.final_norm
        window = twin.config.local_attention // 2
        parts = []
        for layer, kind in zip(layers, twin.config.layer_types, strict=True):
            near = [[kind == "full_attention" or abs(i - j) <= window for j in tokens] for i in tokens]
            rotary = twin.rotary_emb(x, torch.arange(len(tokens))[None], kind)
            parts.append(_modernbert_parts(layer, additive(real, near), rotary))
    else:
        raise KeyError(family)

    built = []
    for layer, theirs in zip(parts, own, strict=True):
        row = []
        for name, (f, norm) in zip(("attn", "ffn"), layer, strict=True):
            extra = theirs.resformer
            scheme = getattr(extra, name)
            parameters = dict(scheme.named_parameters())

            def new(slot: str, extra: nn.Module = extra, name: str = name) -> nn.Module:
                return getattr(extra, f"{name}_{slot}_norm")

            site = Site(f, parameters)
            moved = isinstance(norm, nn.LayerNorm)  # ModernBERT's first layer has no norm to move
            if placement == native:
                setattr(site, native, norm)
            elif placement in ("pre", "post"):
                setattr(site, placement, norm if moved else new(placement))
            elif placement == "sandwich" and native == "post":
                site.pre, site.out = new("pre"), norm
            elif placement == "sandwich":
                site.pre, site.out = norm, new("out")
            row.append(site)
        built.append(row)
    final = nothing
    if placement in ("pre", "sandwich"):
        final = own[-1].resformer.final_norm if last is None else last
    return Net(built, final), x


def additive(real: Tensor, seen: list[list[bool]]) -> Tensor:
    """(B 1 T T): 0 where token i may look at token j, the least number where not."""
    allowed = torch.tensor(seen)[None] & real[:, None, :]
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)[
        :, None
    ]


def _bert_parts(layer: Any, mask: Tensor):
    attention, after = layer.attention, layer.attention.output
    yield lambda x: after.dropout(after.dense(attention.self(x, attention_mask=mask)[0])), after.LayerNorm
    yield lambda x: layer.output.dropout(layer.output.dense(layer.intermediate(x))), layer.output.LayerNorm


def _gpt2_parts(layer: Any, mask: Tensor):
    yield lambda x: layer.attn(x, attention_mask=mask)[0], layer.ln_1
    yield lambda x: layer.mlp(x), layer.ln_2


def _modernbert_parts(layer: Any, mask: Tensor, rotary: tuple[Tensor, Tensor]):
    yield lambda x: layer.attn(x, attention_mask=mask, position_embeddings=rotary)[0], layer.attn_norm
    yield lambda x: layer.mlp(x), layer.mlp_norm


OUTPUTS = {  # the projections that end a branch, from the layer: (attention, feed-forward)
    "bert": ("attention.output.dense", "output.dense"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
}
LAYERS = {"bert": "encoder.layer", "gpt2": "h", "modernbert": "layers"}


def insert_inner_norms(family: str, twin: nn.Module, patched: nn.Module) -> None:
    """Wang et al. 2022 (Magneto): a norm before the output projection of each sublayer of `twin`, by replacing it."""
    pairs = zip(twin.get_submodule(LAYERS[family]), patched.get_submodule(LAYERS[family]), strict=True)
    for layer, theirs in pairs:
        for path, name in zip(OUTPUTS[family], ("attn", "ffn"), strict=True):
            parent, _, leaf = path.rpartition(".")
            weight, bias = getattr(theirs.resformer, name).norm.parameters()

            def norm(x: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
                return tokenwise(lambda v: layer_norm(v, weight.tolist(), bias.tolist()), x)

            setattr(layer.get_submodule(parent), leaf, nn.Sequential(Call(norm), layer.get_submodule(path)))


class Call(nn.Module):
    def __init__(self, function: Map):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
