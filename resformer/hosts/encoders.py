"""Encoder families."""

from __future__ import annotations

from dataclasses import replace

from resformer.hosts.family import Family, Projection, Site, Stack, register_family


def _attention(name: str, root: str, passes: dict[str, str], when: str = "") -> Site:
    return Site(
        name,
        calls=(f"{root}.self", f"{root}.output.dense", f"{root}.output.dropout"),
        norms={"post": f"{root}.output.LayerNorm"},
        passes=passes,
        extra=True,
        when=when,
        points={
            "q": Projection(f"{root}.self.query"),
            "k": Projection(f"{root}.self.key"),
            "v": Projection(f"{root}.self.value"),
            "o": Projection(f"{root}.output.dense"),
        },
    )


BERT = Stack(
    layer="transformers.models.bert.modeling_bert.BertLayer",
    layers="encoder.layer",
    embed_norm="embeddings.LayerNorm",
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings"),
    sites=(
        _attention("attn", "attention", {"attention_mask": "attention_mask", "past_key_values": "past_key_values"}),
        _attention(
            "cross",
            "crossattention",
            {
                "encoder_hidden_states": "encoder_hidden_states",
                "attention_mask": "encoder_attention_mask",
                "past_key_values": "past_key_values",
            },
            when="encoder_hidden_states",
        ),
        Site(
            "ffn",
            calls=("intermediate", "output.dense", "output.dropout"),
            norms={"post": "output.LayerNorm"},
            chunks="chunk_size_feed_forward",
            points={"up": Projection("intermediate.dense"), "down": Projection("output.dense")},
        ),
    ),
)
ROBERTA = replace(BERT, layer="transformers.models.roberta.modeling_roberta.RobertaLayer")
ELECTRA = replace(BERT, layer="transformers.models.electra.modeling_electra.ElectraLayer")

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
            points={"up": Projection("mlp.Wi"), "down": Projection("mlp.Wo")},  # up: gate and value, fused
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
