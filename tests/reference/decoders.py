"""Llama and Gemma 2 written out from their weights: angles, windows, shared keys, norms and gates in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reference.net import Map, Net, Site, Vector, affine, nothing, tokenwise

Rule = Callable[[Vector], Vector]
Weights = dict[str, Tensor]
NATIVE = {"llama": "pre", "gemma2": "sandwich"}
NORMS = {  # where the host has its norms, by site and slot
    "llama": {"attn": {"pre": "input_layernorm"}, "ffn": {"pre": "post_attention_layernorm"}},
    "gemma2": {
        "attn": {"pre": "input_layernorm", "out": "post_attention_layernorm"},
        "ffn": {"pre": "pre_feedforward_layernorm", "out": "post_feedforward_layernorm"},
    },
}


def same(v: Any) -> Any:
    return v


def rms_norm(weight: Tensor, eps: float, offset: float) -> Map:
    """x / √(mean x² + eps) ⊙ (offset + w)"""
    gains = [offset + w for w in weight.tolist()]

    def rule(x: Vector) -> Vector:
        size = math.sqrt(sum(a * a for a in x) / len(x) + eps)
        return [a / size * g for a, g in zip(x, gains, strict=True)]

    return lambda x: tokenwise(rule, x)


@dataclass
class Attention:
    """Causal attention whose heads share keys and values in groups, by hand."""

    weights: Weights
    config: Any
    real: Tensor  # (B T)
    window: int | None  # of how many tokens, its own among them
    rules: dict[str, Rule] = field(default_factory=dict)  # what a scheme does at q, k, v and o

    def __call__(self, x: Tensor) -> Tensor:
        return self.with_values(x, same)

    def with_values(self, x: Tensor, change: Callable[[Any], Any]) -> Tensor:
        q, k, v = (self.heads(point, x) for point in "qkv")
        v = change(v)
        shared, size = len(q[0]) // len(k[0]), len(q[0][0][0])
        rows = []
        for b, text in enumerate(x):
            for i in range(len(text)):
                row: Vector = []
                for h in range(len(q[b])):
                    keys, values, turned = k[b][h // shared], v[b][h // shared], self.turn(q[b][h][i], i)
                    near = range(0 if self.window is None else max(0, i - self.window + 1), i + 1)
                    at = [j for j in near if self.real[b, j]]
                    scores = [self.score(turned, self.turn(keys[j], j)) for j in at]
                    total = sum(math.exp(s) for s in scores)
                    parts = [math.exp(s) / total for s in scores]
                    row += [sum(p * values[j][d] for p, j in zip(parts, at, strict=True)) for d in range(size)]
                rows.append(row)
        mixed = torch.tensor(rows, dtype=torch.float64).reshape(*x.shape[:2], -1)
        return self.project("o", tokenwise(self.rules.get("o", same), mixed))

    def project(self, point: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"self_attn.{point}_proj.weight"].T

    def heads(self, point: str, x: Tensor) -> Any:
        """batch, head, token, channel"""
        y = tokenwise(self.rules.get(point, same), self.project(point, x))
        return y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2).tolist()

    def turn(self, x: Vector, token: int) -> Vector:
        """Pairs (i, i + half) turned by token · 10000^(-i / half), which hosts keep in single precision."""
        half = len(x) // 2
        angles = [token * float(1 / torch.tensor(10000.0) ** (torch.tensor(i) / half)) for i in range(half)]
        first = [x[i] * math.cos(a) - x[i + half] * math.sin(a) for i, a in enumerate(angles)]
        return first + [x[i + half] * math.cos(a) + x[i] * math.sin(a) for i, a in enumerate(angles)]

    def score(self, q: Vector, k: Vector) -> float:
        dot = sum(a * b for a, b in zip(q, k, strict=True))
        if self.config.model_type == "llama":
            return dot / math.sqrt(len(q))
        cap = self.config.attn_logit_softcapping
        return cap * math.tanh(dot / math.sqrt(self.config.query_pre_attn_scalar) / cap)


def gated(weights: Weights, family: str, rules: dict[str, Rule]) -> Map:
    """W_down (act(W_gate x) ⊙ W_up x)"""
    gate, up, down = (weights[f"mlp.{point}_proj.weight"].tolist() for point in ("gate", "up", "down"))

    def act(a: float) -> float:
        if family == "llama":
            return a / (1 + math.exp(-a))
        return a / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))

    def rule(x: Vector) -> Vector:
        inner = [act(a) * b for a, b in zip(affine(gate, x), affine(up, x), strict=True)]
        return affine(down, rules.get("down", same)(inner))

    return lambda x: tokenwise(rule, x)


def net_of_decoder(
    family: str,
    weights: Weights,
    patched: Any,
    given: dict[str, Tensor],
    wanted: Callable[[int, int, str], set[str]],
    rules: Callable[[dict[str, Tensor], str], Rule] | None = None,
) -> tuple[Net, Tensor]:
    """The net with these weights of the host, and the stream that it starts with.

    Of `patched` it takes the configuration, the scheme's parameters and the weights of norms that were made for it.
    `rules` says of a scheme that acts inside the sublayers (parameters of a site, point) -> what it does there.
    """
    config, offset = patched.config, float(family == "gemma2")
    ids, real = given["input_ids"], given["attention_mask"].bool()
    x = functional.embedding(ids, weights["embed_tokens.weight"]) * (math.sqrt(config.hidden_size) if offset else 1)
    norm = lambda weight: rms_norm(weight, config.rms_norm_eps, offset)
    layers, slots = [], set()
    for n, theirs in enumerate(patched.layers):
        prefix = f"layers.{n}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        window = config.sliding_window if offset and n % 2 == 0 else None
        row = []
        for name, native in NORMS[family].items():
            p = getattr(theirs.resformer, name).state_dict()
            at = {point: rules(p, point) for point in (("q", "k", "v", "o") if name == "attn" else ("down",))
                  if rules and point in getattr(theirs.resformer, name).points}  # fmt: skip
            f = Attention(own, config, real, window, at) if name == "attn" else gated(own, family, at)
            here = wanted(n, len(patched.layers), name)
            slots |= here
            acts = here - {"final", "embed"}
            free = [f"{path}.weight" for slot, path in native.items() if slot not in acts]
            norms = {}
            for slot in sorted(acts):
                made = f"{name}_{slot}_norm"
                if slot in native:
                    norms[slot] = norm(own[f"{native[slot]}.weight"])
                else:  # a norm of the host that moves, or where there is none a new one
                    norms[slot] = norm(own[free.pop(0)] if free else getattr(theirs.resformer, made).weight)
            row.append(Site(f, p, **norms))
        layers.append(row)
    final = norm(weights["norm.weight"]) if "final" in slots else nothing
    embed = norm(patched.layers[0].resformer.embed_norm.weight) if "embed" in slots else nothing
    return Net(layers, final, embed, real=real), x
