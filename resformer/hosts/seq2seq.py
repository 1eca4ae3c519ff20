"""Encoder-decoder families: two stacks, and cross-attention as a site of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resformer.hosts.family import Family, Projection, Site, Stack, register_family

SELF = {"attention_mask": "attention_mask", "past_key_values": "past_key_values"}


def clamp_where_infinite(x: Tensor) -> Tensor:
    """T5's way to train in float16."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    limit = torch.where(x.isinf().any(), largest - 1000, largest)
    return torch.clamp(x, min=-limit, max=limit)


def clamp_where_not_finite(x: Tensor) -> Tensor:
    """That of BART and Marian."""
    return clamp_always(x) if x.dtype == torch.float16 and not x.isfinite().all() else x


def clamp_always(x: Tensor) -> Tensor:
    """That of mBART and Pegasus."""
    limit = torch.finfo(x.dtype).max - 1000
    return torch.clamp(x, min=-limit, max=limit) if x.dtype == torch.float16 else x


# ------------------------------------------------------------------------------------------------ T5


def _t5_attention(name: str, path: str, inner: str, passes: dict[str, str], when: str = "") -> Site:
    """transformers takes the attentions that it shows from the module that also norms and adds."""
    return Site(
        name,
        calls=(path,),
        ends=f"{path}.dropout",
        norms={"pre": f"{path}.layer_norm"},
        passes=passes | {"past_key_values": "past_key_values"},
        extra=True,
        when=when,
        after=clamp_where_infinite,
        points={point: Projection(f"{path}.{inner}.{point}") for point in ("q", "k", "v", "o")},
    )


def _t5(layer: str, name: str, *, gated: bool, states: str, returns: tuple[tuple[str, int], ...]) -> Stack:
    last = "layer.2" if name == "decoder" else "layer.1"
    linear = ({"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}) | {"down": "wo"}
    own = {"attention_mask": "attention_mask", "position_bias": "position_bias"}
    theirs = {
        "attention_mask": "encoder_attention_mask",
        "position_bias": "encoder_decoder_position_bias",
        states: "encoder_hidden_states",
    }
    attention = _t5_attention("attn", "layer.0", "SelfAttention", own)
    cross = _t5_attention("cross", "layer.1", "EncDecAttention", theirs, "encoder_hidden_states")
    feed_forward = Site(
        "ffn",
        calls=(f"{last}.DenseReluDense", f"{last}.dropout"),
        norms={"pre": f"{last}.layer_norm"},
        after=clamp_where_infinite,
        points={point: Projection(f"{last}.DenseReluDense.{path}") for point, path in linear.items()},
    )
    return Stack(
        name=name,
        root=name,
        layer=f"transformers.models.{layer}",
        layers="block",
        final_norm="final_layer_norm",
        embeddings=("embed_tokens",),
        sites=(attention, cross, feed_forward) if name == "decoder" else (attention, feed_forward),
        returns=returns,
    )


def _t5_stacks(
    layer: str,
    *,
    gated: bool,
    states: str = "key_value_states",
    returns: tuple[tuple[str, int], ...] = (("attn", 1), ("cross", 1)),
) -> tuple[Stack, ...]:
    """`states`: what cross-attention calls the encoder's; `returns`: the position biases go to the next layer."""
    return tuple(_t5(layer, name, gated=gated, states=states, returns=returns) for name in ("encoder", "decoder"))


# ------------------------------------------------------------------------------------------------ BART


def _bart_attention(name: str, path: str, slot: str, passes: dict[str, str], when: str = "") -> Site:
    return Site(
        name,
        calls=(path, "dropout"),
        norms={slot: f"{path}_layer_norm"},
        passes=passes,
        extra=True,
        when=when,
        points={point: Projection(f"{path}.{point}_proj") for point in ("q", "k", "v")}
        | {"o": Projection(f"{path}.out_proj")},
    )


def _bart(
    model: str, slot: str, clamp: Callable[[Tensor], Tensor], *, learned_positions: bool, embed_norm: str = ""
) -> tuple[Stack, Stack]:
    """Encoder and decoder of a model of BART's line: `model` as in "bart.modeling_bart.Bart"."""

    def feed_forward(after: Callable[[Tensor], Tensor] | None) -> Site:
        return Site(
            "ffn",
            calls=("fc1", "activation_fn", "activation_dropout", "fc2", "dropout"),
            norms={slot: "final_layer_norm"},
            after=after,
            points={"up": Projection("fc1"), "down": Projection("fc2")},
        )

    def stack(name: str, *sites: Site) -> Stack:
        return Stack(
            name=name,
            root=name,
            layer=f"transformers.models.{model}{name.capitalize()}Layer",
            layers="layers",
            embed_norm=embed_norm,
            final_norm="layer_norm" if slot == "pre" else "",
            embeddings=("embed_tokens", "embed_positions") if learned_positions else ("embed_tokens",),
            heads=f"{name}_attention_heads",
            sites=sites,
        )

    cross = {
        "key_value_states": "encoder_hidden_states",
        "attention_mask": "encoder_attention_mask",
        "past_key_values": "past_key_values",
    }
    return (
        stack("encoder", _bart_attention("attn", "self_attn", slot, SELF), feed_forward(clamp)),
        stack(
            "decoder",
            _bart_attention("attn", "self_attn", slot, SELF),
            _bart_attention("cross", "encoder_attn", slot, cross, "encoder_hidden_states"),
            feed_forward(None),
        ),
    )


T5 = "t5.modeling_t5.T5Block"
GATED = {"feed_forward_proj": "gated-gelu"}
BART = _bart(
    "bart.modeling_bart.Bart", "post", clamp_where_not_finite, learned_positions=True, embed_norm="layernorm_embedding"
)
MBART = _bart(
    "mbart.modeling_mbart.MBart", "pre", clamp_always, learned_positions=True, embed_norm="layernorm_embedding"
)
MARIAN = _bart("marian.modeling_marian.Marian", "post", clamp_where_not_finite, learned_positions=False)
PEGASUS = _bart("pegasus.modeling_pegasus.Pegasus", "pre", clamp_always, learned_positions=False)
M2M_100 = _bart("m2m_100.modeling_m2m_100.M2M100", "pre", clamp_always, learned_positions=False)

register_family(
    Family("t5", _t5_stacks(T5, gated=False), only={"is_gated_act": False}, config="T5Config", note="T5 1.0, ungated")
)
register_family(
    Family(
        "t5_gated",
        _t5_stacks(T5, gated=True),
        only={"is_gated_act": True},
        config="T5Config",
        example=GATED,
        note="T5 1.1, Flan-T5",
    )
)
register_family(
    Family("mt5", _t5_stacks("mt5.modeling_mt5.MT5Block", gated=True), only={"is_gated_act": True}, config="MT5Config")
)
register_family(
    Family(
        "umt5",
        _t5_stacks("umt5.modeling_umt5.UMT5Block", gated=True, states="encoder_hidden_states", returns=()),
        only={"is_gated_act": True},
        config="UMT5Config",
    )
)
register_family(Family("bart", BART, config="BartConfig"))
register_family(Family("mbart", MBART, config="MBartConfig"))
register_family(Family("marian", MARIAN, config="MarianConfig"))
register_family(Family("pegasus", PEGASUS, config="PegasusConfig"))
register_family(Family("m2m_100", M2M_100, config="M2M100Config", note="NLLB as well"))
