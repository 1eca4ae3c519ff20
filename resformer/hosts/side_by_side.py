"""Decoder families with attention and the feed-forward side by side, and the sequential variant of GPT-NeoX.

Models that add the two one after the other, (x + a) + m (Cohere, parallel StableLM), are not here: x + (a + m), which
is what a scheme joins, rounds otherwise.
"""

from __future__ import annotations

from dataclasses import replace

from resformer.hosts.family import Family, Projection, Site, Stack, parallel, register_family

GIVEN = ("attention_mask", "position_ids", "use_cache", "position_embeddings")

NEOX_ATTENTION = Site(
    "attn",
    calls=("attention", "post_attention_dropout"),
    norms={"pre": "input_layernorm"},
    passes={name: name for name in (*GIVEN, "layer_past")},
    extra=True,
    points={
        "q": Projection("attention.query_key_value", 0, 3, by_head=True),
        "k": Projection("attention.query_key_value", 1, 3, by_head=True),
        "v": Projection("attention.query_key_value", 2, 3, by_head=True),
        "o": Projection("attention.dense"),
    },
)
NEOX_FEED_FORWARD = Site(
    "ffn",
    calls=("mlp", "post_mlp_dropout"),
    norms={"pre": "post_attention_layernorm"},
    points={"up": Projection("mlp.dense_h_to_4h"), "down": Projection("mlp.dense_4h_to_h")},
)
NEOX_SEQUENTIAL = Stack(
    name="decoder",
    layer="transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXLayer",
    layers="layers",
    final_norm="final_layer_norm",
    embeddings=("embed_in",),
    sites=(NEOX_ATTENTION, NEOX_FEED_FORWARD),
)
NEOX_NORMS = {"pre": "input_layernorm", "pre_ffn": "post_attention_layernorm"}
NEOX = replace(NEOX_SEQUENTIAL, sites=(parallel(NEOX_ATTENTION, NEOX_FEED_FORWARD, norms=NEOX_NORMS),))

PHI = Stack(
    name="decoder",
    layer="transformers.models.phi.modeling_phi.PhiDecoderLayer",
    layers="layers",
    final_norm="final_layernorm",
    embeddings=("embed_tokens",),
    sites=(
        parallel(
            Site(
                "attn",
                calls=("self_attn", "resid_dropout"),
                passes={name: name for name in (*GIVEN, "past_key_values")},
                extra=True,
                points={
                    "q": Projection("self_attn.q_proj"),
                    "k": Projection("self_attn.k_proj"),
                    "v": Projection("self_attn.v_proj"),
                    "o": Projection("self_attn.dense"),
                },
            ),
            Site(
                "ffn",
                calls=("mlp", "resid_dropout"),
                points={"up": Projection("mlp.fc1"), "down": Projection("mlp.fc2")},
            ),
            norms={"pre": "input_layernorm"},
        ),
    ),
)

GPTJ = Stack(
    name="decoder",
    layer="transformers.models.gptj.modeling_gptj.GPTJBlock",
    layers="h",
    final_norm="ln_f",
    embeddings=("wte",),
    sites=(
        parallel(
            Site(
                "attn",
                calls=("attn",),
                passes={
                    name: name
                    for name in ("layer_past", "attention_mask", "position_ids", "use_cache", "output_attentions")
                },
                points={
                    "q": Projection("attn.q_proj"),
                    "k": Projection("attn.k_proj"),
                    "v": Projection("attn.v_proj"),
                    "o": Projection("attn.out_proj"),
                },
            ),
            Site("ffn", calls=("mlp",), points={"up": Projection("mlp.fc_in"), "down": Projection("mlp.fc_out")}),
            norms={"pre": "ln_1"},
        ),
    ),
    returns=(("attn", 1),),
)

register_family(
    Family(
        "gpt_neox",
        (NEOX,),
        only={"use_parallel_residual": True},
        config="GPTNeoXConfig",
        note="attention and feed-forward side by side: one site a layer",
    )
)
register_family(
    Family("gpt_neox_sequential", (NEOX_SEQUENTIAL,), only={"use_parallel_residual": False}, config="GPTNeoXConfig")
)
register_family(
    Family("phi", (PHI,), config="PhiConfig", note="attention and feed-forward side by side: one site a layer")
)
register_family(
    Family("gptj", (GPTJ,), config="GPTJConfig", note="attention and feed-forward side by side: one site a layer")
)
