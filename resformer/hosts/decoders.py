"""Decoder families."""

from __future__ import annotations

from collections.abc import Mapping

from resformer.hosts.family import Family, Projection, Site, Stack, register_family

GPT2_STACK = Stack(
    name="decoder",
    layer="transformers.models.gpt2.modeling_gpt2.GPT2Block",
    layers="h",
    final_norm="ln_f",
    embeddings=("wte", "wpe"),
    sites=(
        Site(
            "attn",
            calls=("attn",),
            norms={"pre": "ln_1"},
            passes={
                "past_key_values": "past_key_values",
                "attention_mask": "attention_mask",
                "use_cache": "use_cache",
            },
            extra=True,
            points={
                "q": Projection("attn.c_attn", 0, 3),
                "k": Projection("attn.c_attn", 1, 3),
                "v": Projection("attn.c_attn", 2, 3),
                "o": Projection("attn.c_proj"),
            },
        ),
        Site(
            "cross",
            calls=("crossattention",),
            norms={"pre": "ln_cross_attn"},
            passes={
                "past_key_values": "past_key_values",
                "attention_mask": "attention_mask",
                "encoder_hidden_states": "encoder_hidden_states",
                "encoder_attention_mask": "encoder_attention_mask",
            },
            when="encoder_hidden_states",
            points={
                "q": Projection("crossattention.q_attn"),
                "k": Projection("crossattention.c_attn", 0, 2),
                "v": Projection("crossattention.c_attn", 1, 2),
                "o": Projection("crossattention.c_proj"),
            },
        ),
        Site(
            "ffn",
            calls=("mlp",),
            norms={"pre": "ln_2"},
            points={"up": Projection("mlp.c_fc"), "down": Projection("mlp.c_proj")},
        ),
    ),
)

register_family(Family("gpt2", (GPT2_STACK,), config="GPT2Config"))


def _llama(layer: str, attn: Mapping[str, str], ffn: Mapping[str, str]) -> Stack:
    """Llama and its kin, which differ in where their norms stand."""
    given = ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings")
    return Stack(
        name="decoder",
        layer=f"transformers.models.{layer}",
        layers="layers",
        final_norm="norm",
        embeddings=("embed_tokens",),
        sites=(
            Site(
                "attn",
                calls=("self_attn",),
                norms=attn,
                passes={name: name for name in given},
                extra=True,
                points={point: Projection(f"self_attn.{point}_proj") for point in ("q", "k", "v", "o")},
            ),
            Site(
                "ffn",
                calls=("mlp",),
                norms=ffn,
                points={point: Projection(f"mlp.{point}_proj") for point in ("gate", "up", "down")},
            ),
        ),
    )


PRE = {"attn": {"pre": "input_layernorm"}, "ffn": {"pre": "post_attention_layernorm"}}
OUT = {"attn": {"out": "post_attention_layernorm"}, "ffn": {"out": "post_feedforward_layernorm"}}
SANDWICH = {
    "attn": {"pre": "input_layernorm", "out": "post_attention_layernorm"},
    "ffn": {"pre": "pre_feedforward_layernorm", "out": "post_feedforward_layernorm"},
}

LLAMA = _llama("llama.modeling_llama.LlamaDecoderLayer", **PRE)
MISTRAL = _llama("mistral.modeling_mistral.MistralDecoderLayer", **PRE)
QWEN2 = _llama("qwen2.modeling_qwen2.Qwen2DecoderLayer", **PRE)
QWEN3 = _llama("qwen3.modeling_qwen3.Qwen3DecoderLayer", **PRE)
SMOLLM3 = _llama("smollm3.modeling_smollm3.SmolLM3DecoderLayer", **PRE)
GEMMA = _llama("gemma.modeling_gemma.GemmaDecoderLayer", **PRE)
GEMMA2 = _llama("gemma2.modeling_gemma2.Gemma2DecoderLayer", **SANDWICH)
GEMMA3 = _llama("gemma3.modeling_gemma3.Gemma3DecoderLayer", **SANDWICH)
OLMO2 = _llama("olmo2.modeling_olmo2.Olmo2DecoderLayer", **OUT)
OLMO3 = _llama("olmo3.modeling_olmo3.Olmo3DecoderLayer", **OUT)


def _opt(slot: str, final_norm: str = "") -> Stack:
    return Stack(
        name="decoder",
        root="decoder",
        layer="transformers.models.opt.modeling_opt.OPTDecoderLayer",
        layers="layers",
        final_norm=final_norm,
        embeddings=("embed_tokens", "embed_positions"),
        sites=(
            Site(
                "attn",
                calls=("self_attn", "dropout"),
                norms={slot: "self_attn_layer_norm"},
                passes={name: name for name in ("past_key_values", "position_ids", "attention_mask")},
                extra=True,
                points={
                    "q": Projection("self_attn.q_proj"),
                    "k": Projection("self_attn.k_proj"),
                    "v": Projection("self_attn.v_proj"),
                    "o": Projection("self_attn.out_proj"),
                },
            ),
            Site(
                "ffn",
                calls=("fc1", "activation_fn", "fc2", "dropout"),
                norms={slot: "final_layer_norm"},
                points={"up": Projection("fc1"), "down": Projection("fc2")},
            ),
        ),
    )


register_family(Family("llama", (LLAMA,), config="LlamaConfig"))
register_family(Family("mistral", (MISTRAL,), config="MistralConfig"))
register_family(Family("qwen2", (QWEN2,), config="Qwen2Config"))
register_family(Family("qwen3", (QWEN3,), config="Qwen3Config"))
register_family(Family("smollm3", (SMOLLM3,), config="SmolLM3Config"))
register_family(Family("gemma", (GEMMA,), config="GemmaConfig"))
register_family(Family("gemma2", (GEMMA2,), config="Gemma2Config", note="norms around each sublayer"))
register_family(Family("gemma3", (GEMMA3,), config="Gemma3TextConfig", note="text models; norms around each sublayer"))
register_family(Family("olmo2", (OLMO2,), config="Olmo2Config", note="norms on what the sublayers give, not before"))
register_family(Family("olmo3", (OLMO3,), config="Olmo3Config", note="norms on what the sublayers give, not before"))
register_family(
    Family("opt", (_opt("pre", "final_layer_norm"),), only={"do_layer_norm_before": True}, config="OPTConfig")
)
register_family(
    Family("opt_post", (_opt("post"),), only={"do_layer_norm_before": False}, config="OPTConfig", note="opt-350m")
)
