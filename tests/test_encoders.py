"""build_encoder: an ordinary Hugging Face model of any depth, from equal weights for all schemes."""

import math

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
)

from resformer import build_encoder, schemes, unpatch


def test_it_is_an_ordinary_model(tmp_path):
    model = build_encoder(depth=5, width=24, scheme="hyper_connections", heads=3, vocab_size=30, num_streams=2)
    assert isinstance(model, BertModel)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (5, 24, 3)
    assert config.intermediate_size == 96
    assert model(torch.arange(8)[None]).last_hidden_state.shape == (1, 8, 24)
    heads = build_encoder(2, 16, vocab_size=30, num_labels=3, auto=AutoModelForSequenceClassification)
    assert heads(torch.arange(8)[None]).logits.shape == (1, 3)
    assert build_encoder(1, 16, vocab_size=30, auto=AutoModelForMaskedLM)(torch.arange(8)[None]).logits.shape[-1] == 30
    assert isinstance(unpatch(heads), BertForSequenceClassification)


def host_weights(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in unpatch(model).named_parameters()}


@pytest.mark.parametrize("name", list(schemes()))
def test_all_schemes_start_from_equal_host_weights(name):
    torch.manual_seed(0)
    expected = host_weights(build_encoder(2, 16, vocab_size=30, weight_init="xavier"))
    torch.manual_seed(0)
    found = host_weights(build_encoder(2, 16, name, vocab_size=30, weight_init="xavier"))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_weight_inits():
    def stds(weight_init):
        torch.manual_seed(0)
        model = build_encoder(2, 96, vocab_size=500, weight_init=weight_init, heads=2)
        layer = model.encoder.layer[1]
        words, places = model.embeddings.word_embeddings, model.embeddings.position_embeddings
        return [
            float(m.weight[1:].detach().std())
            for m in (layer.attention.self.query, layer.intermediate.dense, words, places)
        ]

    xavier = [math.sqrt(2 / (96 + 96)), math.sqrt(2 / (96 + 384)), 1.0, 0.3]
    torch.manual_seed(0)
    tied = build_encoder(1, 96, vocab_size=500, weight_init="xavier", heads=2, auto=AutoModelForMaskedLM)
    words = tied.get_input_embeddings().weight.detach()
    assert float(words[1:].std()) == pytest.approx(1.0, rel=0.05), "the tied head must not draw them again"
    assert not words[0].any(), "padding"
    assert stds("bert") == pytest.approx([0.02] * 4, rel=0.05)
    assert stds("xavier") == pytest.approx(xavier, rel=0.05)
    assert stds("width_scaled") == pytest.approx([0.02 * math.sqrt(768 / 96)] * 4, rel=0.05)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_any_length(length):
    model = build_encoder(1, 16, max_length=length, vocab_size=30)
    assert model(torch.zeros(1, length, dtype=torch.long)).last_hidden_state.shape == (1, length, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        ({"width": 0}, "width"),
        ({"depth": 2.0}, "depth"),
        ({"heads": 3}, r"heads must divide the width 16, got 3; allowed are \[1, 2, 4, 8, 16\]"),
        ({"weight_init": "xavir"}, "Did you mean 'xavier'"),
        ({"scheme": "deepnrm"}, "Did you mean 'deepnorm'"),
        ({"bias": 0}, "takes none"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(**({"depth": 2, "width": 16, "vocab_size": 30} | arguments))
