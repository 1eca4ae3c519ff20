"""Decoder families."""

from __future__ import annotations

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
