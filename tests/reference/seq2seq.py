"""T5 and BART written out from their weights: biases of distance, masks, both stacks and what joins them, in loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference.decoders import rms_norm
from reference.net import Map, Net, Site, Vector, affine, layer_norm, nothing, tokenwise

Weights = dict[str, Tensor]
Loop = Callable[[Net, Tensor], Tensor]
NATIVE = {"t5": "pre", "bart": "post"}
LAYERS = {"t5": "block", "bart": "layers"}
ATTENTION = {
    "t5": {"attn": "layer.0.SelfAttention.{}", "cross": "layer.1.EncDecAttention.{}"},
    "bart": {"attn": "self_attn.{}_proj", "cross": "encoder_attn.{}_proj"},
}
OUT = {"t5": "o", "bart": "out"}


def linear(weights: Weights, path: str) -> Callable[[Vector], Vector]:
    weight, bias = weights[f"{path}.weight"].tolist(), weights.get(f"{path}.bias")
    return lambda x: affine(weight, x, None if bias is None else bias.tolist())


@dataclass
class Attention:
    """Softmax over the tokens that are seen, head by head; `memory`: the encoder's output, in cross-attention."""

    family: str
    weights: Weights  # of this layer
    path: str
    heads: int
    seen: Callable[[int, int, int], bool]  # text, token that looks, token that is looked at
    bias: Callable[[int, int, int], float]  # head, and the two tokens
    memory: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        q = self.split("q", x)
        k, v = (self.split(point, x if self.memory is None else self.memory) for point in "kv")
        rows = []
        for b in range(len(q)):
            for i in range(len(q[b])):
                row: Vector = []
                for h in range(self.heads):
                    at = [j for j in range(len(k[b])) if self.seen(b, i, j)]
                    scores = [sum(a * c for a, c in zip(q[b][i][h], k[b][j][h], strict=True)) for j in at]
                    if self.family == "bart":  # T5's have no scale
                        scores = [score / math.sqrt(len(q[b][i][h])) for score in scores]
                    parts = [math.exp(s + self.bias(h, i, j)) for s, j in zip(scores, at, strict=True)]
                    size = len(v[b][0][h])
                    row += [sum(p * v[b][j][h][d] for p, j in zip(parts, at, strict=True)) / sum(parts)
                            for d in range(size)]  # fmt: skip
                rows.append(row)
        mixed = torch.tensor(rows, dtype=torch.float64).reshape(*x.shape[:2], -1)
        return map_tokens(linear(self.weights, self.path.format(OUT[self.family])), mixed)

    def split(self, point: str, x: Tensor) -> Any:
        """text, token, head, channel"""
        y = map_tokens(linear(self.weights, self.path.format(point)), x)
        return y.unflatten(-1, (self.heads, -1)).tolist()


def map_tokens(rule: Callable[[Vector], Vector], x: Tensor) -> Tensor:
    """As `tokenwise`, to another width."""
    rows = [rule(v) for v in x.reshape(-1, x.shape[-1]).tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(*x.shape[:-1], -1)


def distance_bias(table: Tensor, config: Any, *, causal: bool) -> Callable[[int, int, int], float]:
    """Raffel et al. 2020: a learned number for each head and bucket of j - i, exact when near, logarithmic when far."""
    values = table.tolist()
    buckets, farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance

    def bucket(i: int, j: int) -> int:
        half = buckets if causal else buckets // 2
        first = 0 if causal or j <= i else half
        distance = max(i - j, 0) if causal else abs(j - i)
        exact = half // 2
        if distance < exact:
            return first + distance
        far = exact + int(math.log(distance / exact) / math.log(farthest / exact) * (half - exact))
        return first + min(far, half - 1)

    return lambda h, i, j: values[bucket(i, j)][h]


def feed_forward(family: str, weights: Weights, causal: bool) -> Map:
    if family == "t5":
        inner = f"layer.{2 if causal else 1}.DenseReluDense"
        up, down = linear(weights, f"{inner}.wi"), linear(weights, f"{inner}.wo")
        return lambda x: tokenwise(lambda v: down([max(0.0, a) for a in up(v)]), x)
    up, down = linear(weights, "fc1"), linear(weights, "fc2")
    return lambda x: tokenwise(lambda v: down([a / 2 * (1 + math.erf(a / math.sqrt(2))) for a in up(v)]), x)


def norm(family: str, weights: Weights, path: str, config: Any) -> Map:
    weight = weights[f"{path}.weight"]
    if family == "t5":
        return rms_norm(weight, config.layer_norm_epsilon, 0.0)
    bias = weights[f"{path}.bias"].tolist()
    return lambda x: tokenwise(lambda v: layer_norm(v, weight.tolist(), bias), x)


def norms_of(family: str, causal: bool) -> dict[str, str]:
    """Site -> its norm."""
    if family == "t5":
        names = ("attn", "cross", "ffn") if causal else ("attn", "ffn")
        return {name: f"layer.{n}.layer_norm" for n, name in enumerate(names)}
    cross = {"cross": "encoder_attn_layer_norm"} if causal else {}
    return {"attn": "self_attn_layer_norm"} | cross | {"ffn": "final_layer_norm"}


def embedded(family: str, weights: Weights, stack: str, ids: Tensor, config: Any) -> Tensor:
    table = weights["shared.weight"].tolist()
    rows = [[table[token] for token in text] for text in ids.tolist()]
    if family == "t5":
        return torch.tensor(rows, dtype=torch.float64)
    places = weights[f"{stack}.embed_positions.weight"].tolist()
    rows = [[[a + b for a, b in zip(v, places[i + 2], strict=True)] for i, v in enumerate(text)] for text in rows]
    return norm(family, weights, f"{stack}.layernorm_embedding", config)(torch.tensor(rows, dtype=torch.float64))


def net_of_stack(
    family: str,
    stack: str,
    weights: Weights,
    patched: Any,
    source: Tensor,
    real: Tensor,
    wanted: Callable[[int, int, str], set[str]],
    memory: Tensor | None = None,
) -> Net:
    """A stack with these weights of the host; `source`: (B T), which tokens of the source are text, `real`: of its own.

    Of `patched` it takes the configuration, the scheme's parameters and the weights of norms that were made for it.
    """
    config, causal = patched.config, stack == "decoder"
    root, heads = getattr(patched, stack), config.num_attention_heads
    layers = getattr(root, LAYERS[family])
    bias = lambda h, i, j: 0.0
    own_bias = bias
    if family == "t5":
        table = weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        own_bias = distance_bias(table, config, causal=causal)

    def sees(b: int, i: int, j: int) -> bool:
        return bool(real[b, j]) and (j <= i or not causal)

    rows: list[list[Site]] = []
    slots: set[str] = set()
    for n, theirs in enumerate(layers):
        prefix = f"{stack}.{LAYERS[family]}.{n}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        made = theirs.resformer.state_dict()
        row = []
        for name, path in norms_of(family, causal).items():
            f: Map = feed_forward(family, own, causal)
            if name == "attn":
                f = Attention(family, own, ATTENTION[family][name], heads, sees, own_bias)
            elif name == "cross":
                f = Attention(family, own, ATTENTION[family][name], heads, lambda b, i, j: bool(source[b, j]), bias,
                              memory)  # fmt: skip
            here = wanted(n, len(layers), name)
            slots |= here
            acts, norms, free = here - {"final", "embed"}, {}, True
            for slot in sorted(acts, key=lambda slot: slot != NATIVE[family]):  # the host's norm, moved if need be
                norms[slot] = norm(family, *((own, path) if free else (made, f"{name}_{slot}_norm")), config)
                free = False
            row.append(Site(f, getattr(theirs.resformer, name).state_dict(), **norms))
        rows.append(row)
    final = nothing
    if "final" in slots and family == "t5":
        final = norm(family, weights, f"{stack}.final_layer_norm", config)
    elif "final" in slots:
        final = norm(family, layers[-1].resformer.state_dict(), "final_norm", config)
    return Net(rows, final)


def run(
    family: str,
    weights: Weights,
    patched: Any,
    given: dict[str, Tensor],
    wanted: Callable[[int, int, str], set[str]],
    loop: Loop,
) -> tuple[Tensor, Tensor]:
    """What both stacks give, the encoder's first."""
    source, target = given["attention_mask"].bool(), given["decoder_attention_mask"].bool()
    net = net_of_stack(family, "encoder", weights, patched, source, source, wanted)
    memory = loop(net, embedded(family, weights, "encoder", given["input_ids"], patched.config))
    net = net_of_stack(family, "decoder", weights, patched, source, target, wanted, memory)
    return memory, loop(net, embedded(family, weights, "decoder", given["decoder_input_ids"], patched.config))
