"""A small configuration of every family: to test with, and to see whether a family still describes its models."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig

from resformer.hosts.family import families

WIDTH, HEADS, FFN, VOCAB, TOKENS = 16, 2, 20, 32, 7  # FFN is no multiple of WIDTH: a mix-up of the two cannot pass

# Every family takes what it knows of these.
SIZES = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "hidden_dim": FFN,  # DistilBERT
    "n_inner": FFN,  # GPT-2
    "d_kv": WIDTH // HEADS,  # T5
    "d_ff": FFN,
    "encoder_ffn_dim": FFN,  # BART
    "decoder_ffn_dim": FFN,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "ffn_dim": FFN,  # OPT
    "num_key_value_heads": 1,  # Llama and its kin: half as many as heads
    "head_dim": WIDTH // HEADS,  # their default is that of the large models
    "embedding_size": 12,  # ELECTRA, which then projects to the width
    "vocab_size": VOCAB,
    "max_position_embeddings": 24,
    "layer_norm_eps": 1e-5,  # BERT and its kin: large enough that a factor that forgets it is seen
    "rotary_dim": 4,  # GPT-J: half of a head
    "rms_norm_eps": 1e-5,
    "local_attention": 6,  # ModernBERT: a window smaller than the texts
    "sliding_window": 3,  # Mistral, Gemma; in ModernBERT half of its window
    "attention_window": 4,  # Longformer, likewise; it fills the texts up to a multiple
    "relative_attention": True,  # DeBERTa, whose attention goes by distance in all released models
    "pos_att_type": ["p2c", "c2p"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}


def tiny_config(family: str, *, layers: int = 2, dropout: float = 0.0, **changes: Any) -> PretrainedConfig:
    """A small configuration of a family, from its configuration class alone."""
    spec = families()[family]
    make = getattr(transformers, spec.config)
    known = make()
    sizes = {name: size for name, size in SIZES.items() if hasattr(known, name)}  # a cache reads any `sliding_window`
    depth = {"num_hidden_layers": layers}
    if len(spec.stacks) > 1:  # of two depths: a mix-up cannot pass; caches want the encoder's the larger
        depth = {"num_hidden_layers": layers + 1, "decoder_start_token_id": 2}
        depth |= {name: layers for name in ("num_decoder_layers", "decoder_layers") if hasattr(known, name)}
    config = make(**(sizes | depth | dict(spec.only) | dict(spec.example) | changes))
    for name in list(config.to_dict()):
        if "drop" in name:
            setattr(config, name, dropout)
    return config
