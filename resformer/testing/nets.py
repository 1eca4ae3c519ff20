"""A patched host or stack as a list of sublayers, for a scheme's update written a second time as a slow loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resformer.stack import ResidualStack
from resformer.swap import swapped
from resformer.testing import attention

Map = Callable[[Tensor], Tensor]


def nothing(x: Tensor) -> Tensor:
    return x


@dataclass
class Site:
    """One sublayer f, the norms that act around it, and the scheme's parameters and buffers there."""

    f: Map
    p: dict[str, Tensor] = field(default_factory=dict)
    pre: Map = nothing
    out: Map = nothing
    post: Map = nothing

    def branch(self, x: Tensor) -> Tensor:
        """out-norm · sublayer · pre-norm"""
        return self.out(self.f(self.pre(x)))

    def numbers(self, name: str) -> Any:
        """A parameter as plain Python numbers."""
        return self.p[name].double().tolist()

    def number(self, name: str) -> float:
        """A parameter that is one number."""
        return self.p[name].double().item()


@dataclass
class Net:
    """The layers, each a list of sites, between the norms on the embedding and at the end."""

    layers: list[list[Site]]
    final: Map = nothing
    embed: Map = nothing
    options: dict[str, Any] = field(default_factory=dict)
    init: str = "paper"
    training: bool = False
    real: Tensor | None = None  # (B T), which tokens are text; None: all

    @property
    def sites(self) -> list[Site]:
        return [site for layer in self.layers for site in layer]


Loop = Callable[[Net, Tensor], Tensor]  # the net, and what comes out of the embeddings (B T D) -> the net's output
Slots = Callable[[int, int, str], set[str]]  # (layer, of how many, "attn" or "ffn") -> which norms act
Inside = Callable[[str, Any, Any], None]  # (family, twin, patched): what a scheme does inside, done by hand in the twin


@dataclass(frozen=True)
class Reference:
    """A scheme's update as the paper has it, to compare with.

    loop    (net, x) -> the output, written from the equation, best in plain Python numbers
    slots   (init, kind of host) -> which norms act; without it they are those that patching chose
    inside  for schemes that act inside the sublayers
    """

    loop: Loop
    slots: Callable[[str, str], Slots] | None = None
    inside: Inside | None = None


def net_of_stack(stack: ResidualStack, init: str, options: dict[str, Any]) -> Net:
    sites = [
        Site(sublayer, scheme.state_dict(), **dict(norms.items()))  # type: ignore[operator]
        for sublayer, scheme, norms in zip(stack.sublayers, stack.schemes, stack.norms, strict=True)
    ]
    layers = [sites[i : i + stack.layer_size] for i in range(0, len(sites), stack.layer_size)]
    return Net(layers, stack.final_norm, stack.embed_norm, options, init, stack.training)


def net_of_host(
    family: str,
    twin: Any,
    patched: Any,
    given: dict[str, Tensor],
    wanted: Slots | None = None,
    inside: Inside | None = None,
) -> tuple[Net, Tensor]:
    """A patched BERT, GPT-2 or ModernBERT without a head as a `Net`, and the stream that it starts with.

    The sublayers are those of `twin`, an unpatched host of the same shape, which takes the weights of `patched`; the
    scheme's parameters, and the norms that the host did not have, come from `patched`. `wanted` says which norms act;
    without it they are those that patching chose.
    """
    own_weights = patched.state_dict()
    twin.load_state_dict({key: own_weights[key] for key in twin.state_dict()})  # weight edits included
    for path, module in twin.named_modules():
        if hasattr(module, "eps"):
            module.eps = patched.get_submodule(path).eps
    if inside:
        inside(family, twin, patched)
    ids, real = given["input_ids"], given["attention_mask"].bool()
    tokens = range(ids.shape[1])
    if family == "bert":
        x, layers, own = twin.embeddings(input_ids=ids), twin.encoder.layer, patched.encoder.layer
        native, last = "post", None
        mask = _additive(real, [[True for _ in tokens] for _ in tokens])
        parts = [_bert_parts(layer, mask) for layer in layers]
    elif family == "gpt2":
        x = twin.wte(ids) + twin.wpe(torch.arange(ids.shape[1]))
        layers, own, native, last = twin.h, patched.h, "pre", twin.ln_f
        mask = _additive(real, [[j <= i for j in tokens] for i in tokens])
        parts = [_gpt2_parts(layer, mask) for layer in layers]
    elif family == "modernbert":
        x, layers, own = twin.embeddings(input_ids=ids), twin.layers, patched.layers
        native, last = "pre", twin.final_norm
        window = twin.config.local_attention // 2
        parts = []
        for layer, kind in zip(layers, twin.config.layer_types, strict=True):
            near = [[kind == "full_attention" or abs(i - j) <= window for j in tokens] for i in tokens]
            rotary = twin.rotary_emb(x, torch.arange(len(tokens))[None], kind)
            parts.append(_modernbert_parts(layer, _additive(real, near), rotary))
    else:
        raise KeyError(family)

    built, slots = [], set()
    for n, (layer, theirs) in enumerate(zip(parts, own, strict=True)):
        row = []
        for name, (f, norm) in zip(("attn", "ffn"), layer, strict=True):
            extra = theirs.resformer
            here = wanted(n, len(own), name) if wanted else _slots(patched, theirs, name)
            slots |= here
            act = here & {"pre", "out", "post"}
            norms: dict[str, Any] = {}
            if isinstance(norm, nn.LayerNorm) and act:  # ModernBERT's first layer has no norm to move
                norms[native if native in act else min(act)] = norm
            elif native in act:
                norms[native] = getattr(extra, f"{name}_{native}_norm", nothing)
            for slot in act - set(norms):
                norms[slot] = getattr(extra, f"{name}_{slot}_norm")
            row.append(Site(f, getattr(extra, name).state_dict(), **norms))
        built.append(row)
    final = nothing
    if "final" in slots:
        final = own[-1].resformer.final_norm if last is None else last
    embed = own[0].resformer.embed_norm if "embed" in slots and family == "gpt2" else nothing
    return Net(built, final, embed, real=real), x


def _slots(patched: Any, layer: Any, name: str) -> set[str]:
    bypassed = any(swapped(m, "norm") for m in patched.modules())
    owns = hasattr(layer.resformer, "final_norm") or hasattr(layer, "resformer_readout")
    native = any(hasattr(patched, path) for path in ("ln_f", "final_norm"))
    final = {"final"} if owns or (native and not bypassed) else set()
    return set(layer.resformer.acts[name]) | final


def _additive(real: Tensor, seen: list[list[bool]]) -> Tensor:
    """(B 1 T T): 0 where token i may look at token j, the least number where not."""
    allowed = torch.tensor(seen)[None] & real[:, None, :]
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)[
        :, None
    ]


def _bert_parts(layer: Any, mask: Tensor) -> Iterator[tuple[Map, Any]]:
    after = layer.attention.output
    host = lambda x: after.dropout(after.dense(layer.attention.self(x, attention_mask=mask)[0]))
    yield attention.bert(layer, mask, host), after.LayerNorm
    yield lambda x: layer.output.dropout(layer.output.dense(layer.intermediate(x))), layer.output.LayerNorm


def _gpt2_parts(layer: Any, mask: Tensor) -> Iterator[tuple[Map, Any]]:
    yield attention.gpt2(layer, mask, lambda x: layer.attn(x, attention_mask=mask)[0]), layer.ln_1
    yield lambda x: layer.mlp(x), layer.ln_2


def _modernbert_parts(layer: Any, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Iterator[tuple[Map, Any]]:
    host = lambda x: layer.attn(x, attention_mask=mask, position_embeddings=rotary)[0]
    yield attention.modernbert(layer, mask, host, rotary), layer.attn_norm
    yield lambda x: layer.mlp(x), layer.mlp_norm
