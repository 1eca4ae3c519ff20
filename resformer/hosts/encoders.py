"""Encoder families."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from resformer.hosts.family import Family, Projection, Site, Stack, register_family

SELF = {"attention_mask": "attention_mask", "past_key_values": "past_key_values"}
CROSS = {
    "encoder_hidden_states": "encoder_hidden_states",
    "attention_mask": "encoder_attention_mask",
    "past_key_values": "past_key_values",
}


def _attention(
    root: str, passes: dict[str, str], *, slot: str = "post", norm: str = "output.LayerNorm", extra: bool = True
) -> Site:
    """Attention as BERT has it; `norm` is a path from `root`, the attention module."""
    cross = root == "crossattention"
    return Site(
        "cross" if cross else "attn",
        calls=(f"{root}.self", f"{root}.output.dense", f"{root}.output.dropout"),
        norms={slot: f"{root}.{norm}"},
        passes=passes,
        extra=extra,
        when="encoder_hidden_states" if cross else "",
        points={
            "q": Projection(f"{root}.self.query"),
            "k": Projection(f"{root}.self.key"),
            "v": Projection(f"{root}.self.value"),
            "o": Projection(f"{root}.output.dense"),
        },
    )


FFN = Site(
    "ffn",
    calls=("intermediate", "output.dense", "output.dropout"),
    norms={"post": "output.LayerNorm"},
    chunks="chunk_size_feed_forward",
    points={"up": Projection("intermediate.dense"), "down": Projection("output.dense")},
)
BERT = Stack(
    layer="transformers.models.bert.modeling_bert.BertLayer",
    layers="encoder.layer",
    embed_norm="embeddings.LayerNorm",
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings"),
    sites=(_attention("attention", SELF), _attention("crossattention", CROSS), FFN),
)
ROBERTA = replace(BERT, layer="transformers.models.roberta.modeling_roberta.RobertaLayer")
ELECTRA = replace(
    BERT, layer="transformers.models.electra.modeling_electra.ElectraLayer", embed_projection="embeddings_project"
)
XLM_ROBERTA = replace(BERT, layer="transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer")
CAMEMBERT = replace(BERT, layer="transformers.models.camembert.modeling_camembert.CamembertLayer")
ERNIE = replace(BERT, layer="transformers.models.ernie.modeling_ernie.ErnieLayer")
DATA2VEC_TEXT = replace(BERT, layer="transformers.models.data2vec.modeling_data2vec_text.Data2VecTextLayer")
BERT_GENERATION = replace(
    BERT,
    layer="transformers.models.bert_generation.modeling_bert_generation.BertGenerationLayer",
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
)

# BERT with its norms moved to the inputs.
ROBERTA_PRELAYERNORM = replace(
    BERT,
    layer="transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm.RobertaPreLayerNormLayer",
    final_norm="LayerNorm",
    sites=(
        _attention("attention", SELF, slot="pre", norm="LayerNorm"),
        _attention("crossattention", CROSS, slot="pre", norm="LayerNorm"),
        replace(
            FFN,
            calls=("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", "output.dropout"),
            norms={"pre": "intermediate.LayerNorm"},
        ),
    ),
)
SHOWN = {"output_attentions": "output_attentions"}  # of modules that are asked for their attentions
MEGATRON_BERT = Stack(
    layer="transformers.models.megatron_bert.modeling_megatron_bert.MegatronBertLayer",
    layers="encoder.layer",
    final_norm="encoder.ln",
    embeddings=BERT.embeddings,
    sites=(
        _attention("attention", SELF | SHOWN, slot="pre", norm="ln", extra=False),
        _attention("crossattention", CROSS | SHOWN, slot="pre", norm="ln", extra=False),
        replace(FFN, norms={"pre": "ln"}),
    ),
    returns=(("attn", 1), ("cross", 1)),
)

ROTARY = SHOWN | {"sinusoidal_pos": "sinusoidal_pos"}
ROFORMER = replace(
    BERT,
    layer="transformers.models.roformer.modeling_roformer.RoFormerLayer",
    embed_projection="embeddings_project",
    embeddings=("embeddings.word_embeddings", "embeddings.token_type_embeddings"),
    sites=(
        _attention("attention", SELF | ROTARY, extra=False),
        _attention("crossattention", CROSS | ROTARY, extra=False),
        FFN,
    ),
    returns=(("attn", 1), ("cross", 1)),
)

WINDOWED = {
    name: name
    for name in ("attention_mask", "is_index_masked", "is_index_global_attn", "is_global_attn", "output_attentions")
}
LONGFORMER = replace(
    BERT,
    layer="transformers.models.longformer.modeling_longformer.LongformerLayer",
    sites=(
        replace(
            _attention("attention", WINDOWED, extra=False),
            points={
                "q": Projection("attention.self.query", also=("attention.self.query_global",)),
                "k": Projection("attention.self.key", also=("attention.self.key_global",)),
                "v": Projection("attention.self.value", also=("attention.self.value_global",)),
                "o": Projection("attention.output.dense"),
            },
        ),
        FFN,
    ),
    returns=(("attn", 1), ("attn", 2)),
    by_layer=("attention_window",),
    real=lambda given: ~given["is_index_masked"],
)

MPNET = Stack(
    layer="transformers.models.mpnet.modeling_mpnet.MPNetLayer",
    layers="encoder.layer",
    embed_norm="embeddings.LayerNorm",
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
    sites=(
        Site(
            "attn",
            calls=("attention.attn", "attention.dropout"),
            norms={"post": "attention.LayerNorm"},
            passes=SHOWN | {"attention_mask": "attention_mask", "position_bias": "position_bias"},
            points={name: Projection(f"attention.attn.{name}") for name in ("q", "k", "v", "o")},
        ),
        replace(FFN, chunks=""),
    ),
    returns=(("attn", 1),),
)

NOMIC_BERT = Stack(
    layer="transformers.models.nomic_bert.modeling_nomic_bert.NomicBertLayer",
    layers="layers",
    embed_norm="embeddings.LayerNorm",
    embeddings=("embeddings.word_embeddings", "embeddings.token_type_embeddings"),
    sites=(
        Site(
            "attn",
            calls=("self_attn", "post_attention_dropout"),
            norms={"post": "post_attention_layernorm"},
            passes={"attention_mask": "attention_mask", "position_embeddings": "position_embeddings"},
            extra=True,
            points={name: Projection(f"self_attn.{name}_proj") for name in ("q", "k", "v", "o")},
        ),
        Site(
            "ffn",
            calls=("mlp", "post_mlp_dropout"),
            norms={"post": "post_mlp_layernorm"},
            points={name: Projection(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
        ),
    ),
)

DISTILBERT = Stack(
    layer="transformers.models.distilbert.modeling_distilbert.TransformerBlock",
    layers="transformer.layer",
    embed_norm="embeddings.LayerNorm",
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
    sites=(
        Site(
            "attn",
            calls=("attention",),
            norms={"post": "sa_layer_norm"},
            passes={"attention_mask": "attention_mask"},
            extra=True,
            points={
                "q": Projection("attention.q_lin"),
                "k": Projection("attention.k_lin"),
                "v": Projection("attention.v_lin"),
                "o": Projection("attention.out_lin"),
            },
        ),
        Site(
            "ffn",
            calls=("ffn",),
            norms={"post": "output_layer_norm"},
            points={"up": Projection("ffn.lin1"), "down": Projection("ffn.lin2")},
        ),
    ),
)

MODERNBERT = Stack(
    layer="transformers.models.modernbert.modeling_modernbert.ModernBertEncoderLayer",
    layers="layers",
    embed_norm="embeddings.norm",
    embeddings=("embeddings.tok_embeddings",),
    final_norm="final_norm",
    sites=(
        Site(
            "attn",
            calls=("attn",),
            norms={"pre": "attn_norm"},
            passes={"attention_mask": "attention_mask", "position_embeddings": "position_embeddings"},
            extra=True,
            points={
                "q": Projection("attn.Wqkv", 0, 3),
                "k": Projection("attn.Wqkv", 1, 3),
                "v": Projection("attn.Wqkv", 2, 3),
                "o": Projection("attn.Wo"),
            },
        ),
        Site(
            "ffn",
            calls=("mlp",),
            norms={"pre": "mlp_norm"},
            points={
                "gate": Projection("mlp.Wi", 0, 2),
                "up": Projection("mlp.Wi", 1, 2),
                "down": Projection("mlp.Wo"),
            },
        ),
    ),
)

register_family(Family("bert", (BERT,), config="BertConfig"))
register_family(Family("roberta", (ROBERTA,), config="RobertaConfig"))
register_family(Family("electra", (ELECTRA,), config="ElectraConfig"))
register_family(Family("distilbert", (DISTILBERT,), config="DistilBertConfig"))
register_family(
    Family("modernbert", (MODERNBERT,), config="ModernBertConfig", note="the first layer's attention has no pre-norm")
)
register_family(Family("xlm_roberta", (XLM_ROBERTA,), config="XLMRobertaConfig"))
register_family(Family("camembert", (CAMEMBERT,), config="CamembertConfig"))
register_family(Family("ernie", (ERNIE,), config="ErnieConfig"))
register_family(Family("data2vec_text", (DATA2VEC_TEXT,), config="Data2VecTextConfig"))
register_family(Family("bert_generation", (BERT_GENERATION,), config="BertGenerationConfig"))
register_family(Family("roberta_prelayernorm", (ROBERTA_PRELAYERNORM,), config="RobertaPreLayerNormConfig"))
register_family(Family("megatron_bert", (MEGATRON_BERT,), config="MegatronBertConfig"))
register_family(Family("roformer", (ROFORMER,), config="RoFormerConfig"))
register_family(Family("longformer", (LONGFORMER,), config="LongformerConfig"))
register_family(
    Family("mpnet", (MPNET,), config="MPNetConfig", note="transformers has no gradient checkpointing for it")
)
register_family(Family("nomic_bert", (NOMIC_BERT,), config="NomicBertConfig"))

# ---------------------------------------------------------------------- layers that are shared, or return more


def _albert_order(config: Any) -> list[int]:
    """AlbertTransformer calls one group for each of its `num_hidden_layers`, and a group all its layers in turn."""
    inner, runs = config.inner_group_num, config.num_hidden_layers
    groups = [int(i / (runs / config.num_hidden_groups)) for i in range(runs)]
    return [group * inner + layer for group in groups for layer in range(inner)]


ALBERT = Stack(
    layer="transformers.models.albert.modeling_albert.AlbertLayer",
    layers="encoder.albert_layer_groups.*.albert_layers",
    order=_albert_order,
    embed_norm="embeddings.LayerNorm",
    embed_projection="encoder.embedding_hidden_mapping_in",
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings"),
    sites=(
        Site(
            "attn",
            calls=("attention",),
            ends="attention.output_dropout",
            norms={"post": "attention.LayerNorm"},
            passes={"attention_mask": "attention_mask"},
            extra=True,
            points={
                "q": Projection("attention.query"),
                "k": Projection("attention.key"),
                "v": Projection("attention.value"),
                "o": Projection("attention.dense"),
            },
        ),
        Site(
            "ffn",
            calls=("ffn", "activation", "ffn_output"),
            norms={"post": "full_layer_layer_norm"},
            chunks="chunk_size_feed_forward",
            points={"up": Projection("ffn"), "down": Projection("ffn_output")},
        ),
    ),
)


def _deberta_real(given: dict[str, Any]) -> Tensor:
    """The mask is 1 where both of two tokens are text, (B 1 T T)."""
    return given["attention_mask"][:, 0].diagonal(dim1=-2, dim2=-1) > 0


def _deberta(version: str, points: dict[str, Projection], between: dict[str, int]) -> Stack:
    passed = ("attention_mask", "output_attentions", "query_states", "relative_pos", "rel_embeddings")
    attention = _attention("attention", dict(zip(passed, passed, strict=True)), extra=False)
    points |= {"o": Projection("attention.output.dense")}
    return replace(
        BERT,
        layer=f"transformers.models.{version}Layer",
        sites=(replace(attention, points=points), replace(BERT.sites[-1], chunks="")),
        returns=(("attn", 1),),
        real=_deberta_real,
        between=between,
    )


DEBERTA_V2 = _deberta(
    "deberta_v2.modeling_deberta_v2.DebertaV2",
    {
        "q": Projection("attention.self.query_proj"),  # where keys of distances share them, these count as keys as well
        "k": Projection("attention.self.key_proj"),
        "v": Projection("attention.self.value_proj"),
    },
    {"encoder.conv": 0},
)
# q and k are not named, nor is the bias of v: biases are added after the fused projection, where no hook can follow
DEBERTA = _deberta(
    "deberta.modeling_deberta.Deberta", {"v": Projection("attention.self.in_proj", 2, 3, by_head=True)}, {}
)

register_family(Family("albert", (ALBERT,), config="AlbertConfig", note="one set of weights for all depths"))
register_family(Family("deberta_v2", (DEBERTA_V2,), config="DebertaV2Config"))
register_family(Family("deberta", (DEBERTA,), config="DebertaConfig"))
