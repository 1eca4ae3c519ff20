"""build_encoder: an ordinary Hugging Face model of any depth, from equal weights for all schemes."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ModernBertForMaskedLM,
)
from transformers.pytorch_utils import Conv1D

from resformer import build_encoder, describe, families, from_pretrained, schemes, unpatch
from resformer.data.tokenizer import train_tokenizer
from resformer.sizes import longest_input

SINGLE = [name for name, family in families().items() if len(family.stacks) == 1 and family.config]
IDS = torch.arange(8)[None]


def tokenizer():
    return train_tokenizer(["a b c d e f g h i j k l m n o p"], max_length=16)


def test_it_is_an_ordinary_model(tmp_path):
    model = build_encoder(depth=5, width=24, scheme="hyper_connections", heads=3, vocab_size=30, num_streams=2)
    assert isinstance(model, BertModel)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (5, 24, 3)
    assert config.intermediate_size == 96
    assert build_encoder(1, 24, vocab_size=30, ffn_ratio=2.6).config.intermediate_size == 62
    assert model(torch.arange(8)[None]).last_hidden_state.shape == (1, 8, 24)
    heads = build_encoder(2, 16, vocab_size=30, num_labels=3, auto=AutoModelForSequenceClassification)
    assert heads(torch.arange(8)[None]).logits.shape == (1, 3)
    assert build_encoder(1, 16, vocab_size=30, auto=AutoModelForMaskedLM)(torch.arange(8)[None]).logits.shape[-1] == 30
    assert isinstance(unpatch(heads), BertForSequenceClassification)


def test_bert_is_what_transformers_makes_of_its_sizes():
    plain = BertModel(
        BertConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=1, intermediate_size=64, vocab_size=30)
    )
    built = unpatch(build_encoder(2, 16, vocab_size=30))
    assert built.config.to_dict() == plain.config.to_dict()
    assert [(name, p.shape) for name, p in built.state_dict().items()] == [
        (name, p.shape) for name, p in plain.state_dict().items()
    ]


# ------------------------------------------------------------------------------------------------------ families


@pytest.mark.parametrize("family", SINGLE)
def test_every_family_of_one_stack(family):
    """At its sizes, and for texts of `max_length` tokens to the last position."""
    model = build_encoder(3, 32, "pre_ln" if family == "bert" else "identity", family=family, heads=2, vocab_size=60,
                          max_length=12, dropout=0.25, ffn_ratio=2)  # fmt: skip
    assert type(model).__module__.startswith("transformers.")
    assert describe(model).title.startswith(f"{type(model).__name__}, family {family} ")
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 32, 2)
    assert longest_input(model) == 12
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    assert model(ids).last_hidden_state.shape == (2, 12, 32)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} <= {0.25}
    matrices = [p for layer in layers_of(model) for p in layer.parameters() if p.ndim == 2]
    assert {n for p in matrices for n in p.shape} <= {32, 64, 3 * 32, 2 * 64}, "heads of their own, fused projections"


def layers_of(model):
    return [module for module in model.modules() if hasattr(module, "resformer")]


@pytest.mark.parametrize("family", SINGLE)
@pytest.mark.parametrize("weight_init", ["bert", "width_scaled", "xavier"])
def test_weights_are_drawn_alike_in_all_families(family, weight_init):
    torch.manual_seed(0)
    model = build_encoder(2, 64, family=family, heads=2, vocab_size=400, max_length=40, weight_init=weight_init)
    words = model.get_input_embeddings()
    thirds = ("c_attn", "Wqkv", "query_key_value", "in_proj")  # q, k and v in one
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | Conv1D):
            into, out = weight.shape[::-1] if isinstance(module, nn.Linear) else weight.shape
            parts = 3 if name.endswith(thirds) else 2 if name.endswith("mlp.Wi") else 1
            xavier = math.sqrt(2 / (into + out / parts))
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.Embedding) and weight.requires_grad:
            xavier = 1.0 if module is words else 0.3
            if module.padding_idx is not None:
                assert not weight[module.padding_idx].any()
                weight = weight[torch.arange(len(weight)) != module.padding_idx]
        else:
            continue
        expected = {"bert": 0.02, "width_scaled": 0.02 * math.sqrt(12), "xavier": xavier}[weight_init]
        assert float(weight.detach().std()) == pytest.approx(expected, rel=5 / math.sqrt(weight.numel())), name


def test_norms_and_computed_tables_stay():
    for family, table in (
        ("roformer", "encoder.embed_positions.weight"),
        ("distilbert", "embeddings.LayerNorm.weight"),
    ):
        drawn = [build_encoder(1, 16, family=family, vocab_size=30, weight_init=init) for init in ("bert", "xavier")]
        assert torch.equal(*(model.state_dict()[table] for model in drawn))
    gemma = build_encoder(1, 16, family="gemma", vocab_size=30, weight_init="xavier")
    assert not gemma.norm.weight.any(), "Gemma's factor is 1 + weight"


@pytest.mark.parametrize("family", ["electra", "modernbert", "gpt2"])
def test_saved_and_loaded(tmp_path, family):
    model = build_encoder(2, 16, "rezero", family=family, vocab_size=30).eval()
    model.save_pretrained(tmp_path)
    found = from_pretrained(tmp_path, type(unpatch(build_encoder(1, 16, family=family, vocab_size=30))))
    assert torch.equal(found(IDS)[0], model(IDS)[0])


# ---------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "modernbert", "distilbert", "deberta_v2", "gpt2"])
def test_special_tokens_are_the_tokenizers(family):
    own = tokenizer()
    auto = AutoModelForCausalLM if family == "gpt2" else AutoModelForMaskedLM
    model = build_encoder(2, 16, family=family, tokenizer=own, max_length=16, auto=auto)
    config = model.config
    assert config.vocab_size == len(own) == model.get_input_embeddings().num_embeddings
    assert config.pad_token_id == own.pad_token_id == 0
    for name, number in config.to_dict().items():
        if name.endswith("token_id"):
            assert number == getattr(own, name), name
    batch = own(["a b c", "d " * 30], padding=True, truncation=True, return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert model(**batch, labels=batch["input_ids"]).loss.isfinite()
    padding = model.get_input_embeddings().padding_idx
    assert padding in (None, 0)


def test_vocabulary_without_a_tokenizer():
    model = build_encoder(1, 16, family="modernbert", vocab_size=100, auto=AutoModelForMaskedLM)
    assert isinstance(model, ModernBertForMaskedLM)
    assert (model.config.pad_token_id, model.config.cls_token_id) == (None, None), "50283 is not in this vocabulary"
    assert build_encoder(1, 16, family="roberta", vocab_size=100).config.pad_token_id == 1
    assert build_encoder(1, 16, tokenizer=tokenizer(), vocab_size=64).config.vocab_size == 64, "room for more"


# ------------------------------------------------------------------------------------------------------ weights


def host_weights(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in unpatch(model).named_parameters()}


@pytest.mark.parametrize("name", list(schemes()))
def test_all_schemes_start_from_equal_host_weights(name):
    torch.manual_seed(0)
    expected = host_weights(build_encoder(2, 16, vocab_size=30, weight_init="xavier"))
    torch.manual_seed(0)
    found = host_weights(build_encoder(2, 16, name, vocab_size=30, weight_init="xavier"))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_an_encoder_that_is_not_verified_is_the_same():
    torch.manual_seed(0)
    expected = build_encoder(2, 16, "highway", vocab_size=30).state_dict()
    torch.manual_seed(0)
    model = build_encoder(2, 16, "highway", vocab_size=30, verify=False)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert "not measured" in str(describe(model))


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


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        ({"width": 0}, "width must be a whole number of at least 1, got 0"),
        ({"width": -8, "weight_init": "width_scaled"}, "width must be a whole number of at least 1, got -8"),
        ({"width": 16.0}, "width must be a whole number"),
        ({"depth": 2.0}, "depth"),
        ({"heads": 0}, "heads must be a whole number of at least 1"),
        ({"heads": 3}, r"heads must divide the width 16, got 3; allowed are \[1, 2, 4, 8, 16\]"),
        ({"heads": 16, "family": "llama"}, "multiple of 2.*got 1 .*width that is a multiple of 32"),
        ({"ffn_ratio": 0}, "ffn_ratio must be a number above 0, got 0"),
        ({"ffn_ratio": math.inf}, "ffn_ratio"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"max_length": -1}, "max_length"),
        ({"num_labels": 0}, "num_labels"),
        ({"dropout": 1}, "dropout must be a number of at least 0 and below 1"),
        ({"weight_init": "xavir"}, "Did you mean 'xavier'"),
        ({"scheme": "deepnrm"}, "Did you mean 'deepnorm'"),
        ({"bias": 0}, "takes none"),
        ({"family": "modernbrt"}, "unknown family 'modernbrt'. Did you mean 'modernbert'"),
        ({"family": "t5"}, "'t5' is an encoder-decoder.*of one stack: .*bert.*give it to resformer.patch"),
        ({"family": "gpt2", "cardinality": 4}, "cardinality is for family 'bert', got family 'gpt2'"),
        ({"family": "gpt2", "auto": AutoModelForMaskedLM}, "no AutoModelForMaskedLM.*such as .*AutoModelForCausalLM"),
        ({"width": None}, "give width or match_parameters"),
        ({"match_parameters": 1000}, "give width or match_parameters"),
        ({"tokenizer": tokenizer(), "vocab_size": 20}, "vocab_size is 20, and the tokenizer has 21 tokens"),
        ({"tokenizer": tokenizer(), "vocab_size": None, "family": "mpnet"}, "takes token 1 for padding"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(**({"depth": 2, "width": 16, "vocab_size": 30} | arguments))


def test_a_tokenizer_that_does_not_pad():
    own = tokenizer()
    own.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*set tokenizer.pad_token"):
        build_encoder(2, 16, tokenizer=own)
    assert build_encoder(2, 16, tokenizer=own, family="gpt2").config.pad_token_id is None
