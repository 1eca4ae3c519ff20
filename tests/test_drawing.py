"""Each weight follows from the seed and its own name: nets that are compared share what they have in common."""

import itertools
import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
)
from transformers.pytorch_utils import Conv1D

from resformer import build_encoder, families, from_pretrained, patch, unpatch
from resformer.drawing import fresh_seed, generator, seeded
from resformer.patching import _describes

SINGLE = [name for name, family in families().items() if len(family.stacks) == 1 and family.config]
SCHEMES = ["rezero", "post_ln", "hyper_connections", "concat", "exclusive_gate"]
DRAWING = ["concat", "dense_concat", "projection", "gru_gate", "depth_lstm", "se_gate"]
HEADS = [AutoModel, AutoModelForSequenceClassification, AutoModelForMaskedLM, AutoModelForCausalLM]


def build(depth=2, scheme="identity", *, seed=0, **given):
    torch.manual_seed(seed)
    return build_encoder(depth, 16, scheme, **{"vocab_size": 30, "max_length": 12, "heads": 2} | given)


def weights(model) -> dict[str, torch.Tensor]:
    """By their names in the body; those that are tied by each of their names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name.removeprefix(f"{model.base_model_prefix}."): p.detach() for name, p in named}


def random(model) -> dict[str, torch.Tensor]:
    """Of the weights those that were drawn."""
    return {name: p for name, p in weights(model).items() if p.ndim > 1 and not is_table(p)}


def is_table(p) -> bool:
    """Zeros, ones and the like: few values."""
    return len(p.unique()) < min(8, p.numel())


def assert_shared(one, other, *, at_least):
    """All weights that two models have in common by name are equal bits."""
    one, other = weights(one), weights(other)
    common = one.keys() & other.keys()
    assert len(common) >= at_least
    assert [name for name in sorted(common) if not torch.equal(one[name], other[name])] == []


# --------------------------------------------------------------------------------------------------- generators


def test_the_numbers_of_a_name():
    """Recorded runs are continued with the very weights they began with: the rule must not change."""
    assert generator(7, "embeddings.word_embeddings.weight").initial_seed() == 3317535046413535046
    names = [generator(seed, name).initial_seed() for seed in (0, 1, 11) for name in ("a", "b", "1 a")]
    assert len(set(names)) == len(names)


def test_seeded_code_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    with seeded(3, "a"):
        first = torch.rand(4)
        assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), expected)
    assert torch.equal(first, torch.rand(4, generator=generator(3, "a")))
    with torch.device("meta"), seeded(3, "a"):
        assert nn.Linear(2, 2).weight.is_meta, "outlines of models stay without values"


def test_a_fresh_seed_is_one_number_of_the_global_generator():
    torch.manual_seed(5)
    first, second = fresh_seed(), fresh_seed()
    torch.manual_seed(5)
    with torch.device("meta"):
        assert fresh_seed() == first != second


# ------------------------------------------------------------------------------------------------ what is shared


@pytest.mark.parametrize("weight_init", ["bert", "xavier", "width_scaled"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_share_the_host_and_depths_the_lower_layers(scheme, weight_init):
    plain = unpatch(build(2, weight_init=weight_init))
    found = unpatch(build(3, scheme, weight_init=weight_init))
    assert_shared(plain, found, at_least=len(weights(plain)))


@pytest.mark.parametrize("scheme", DRAWING)
def test_schemes_draw_alike_at_the_same_site(scheme):
    shallow, deep = build(2, scheme), build(4, scheme)
    assert_shared(shallow, deep, at_least=len(weights(shallow)) - 3)  # less a final norm and dense_concat's readout
    drawn = [p for name, p in random(deep).items() if ".resformer." in name]
    assert len(drawn) >= 8, "at each site"
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


@pytest.mark.parametrize("family", SINGLE)
def test_in_all_families_and_with_any_head(family):
    """Nothing that a family draws is left to the order of its modules."""
    plain = unpatch(build(2, family=family))
    for auto in HEADS[1:]:
        if type(plain.config) in auto._model_mapping:
            deeper = unpatch(build(3, family=family, auto=auto))
            lost = [name for name in weights(plain) if "pool" in name]  # of nets with another head
            assert_shared(plain, deeper, at_least=len(weights(plain)) - len(lost))


def test_heads_and_feed_forwards_in_parts():
    one, two = (build(d, auto=AutoModelForMaskedLM, cardinality=4, seed=3) for d in (1, 2))
    assert_shared(unpatch(one), unpatch(two), at_least=len(weights(one)))
    plain, parts = weights(unpatch(build(1))), weights(unpatch(build(1, cardinality=4)))
    same = {name for name, p in plain.items() if p.shape == parts[name].shape}
    assert all(torch.equal(plain[name], parts[name]) for name in same)
    other = ("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight")
    assert plain.keys() - same == {f"encoder.layer.0.{name}" for name in other}


def test_patching_a_given_host_draws_by_site_as_well():
    def patched(depth, seed=0):
        host = BertModel(BertConfig(num_hidden_layers=depth, hidden_size=16, num_attention_heads=2, vocab_size=30))
        torch.manual_seed(seed)
        drawn = random(patch(host, "concat", init="paper"))
        return [p for name, p in drawn.items() if ".resformer." in name]

    shallow, deep, other = patched(2), patched(3), patched(2, seed=1)
    assert len(shallow) == 4
    assert all(torch.equal(a, b) for a, b in zip(shallow, deep, strict=False))
    assert not any(torch.equal(a, b) for a, b in zip(shallow, other, strict=True))


# ----------------------------------------------------------------------------------------------- what is not


def test_no_two_weights_are_equal():
    drawn = list(random(build(3, "concat")).values())
    assert len(drawn) > 20
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_other_seeds_draw_other_weights():
    one, other = random(build(2, "concat", seed=0)), random(build(2, "concat", seed=1))
    assert len(one) > 15
    assert not any(torch.equal(p, other[name]) for name, p in one.items())


def test_models_made_one_after_the_other_differ():
    first = random(build(1, "concat"))
    second = random(build_encoder(1, 16, "concat", vocab_size=30, max_length=12, heads=2))
    assert not any(torch.equal(p, second[name]) for name, p in first.items())


def test_the_global_generator_stands_at_one_place_after_all_models():
    def after(*given, **options):
        build(*given, **options)
        return torch.get_rng_state()

    expected = after()
    torch.manual_seed(0)
    assert not torch.equal(torch.get_rng_state(), expected), "the next model is another"
    for given in (*((3, name) for name in (*SCHEMES, *DRAWING)), (1,)):
        assert torch.equal(after(*given), expected), given
    for options in ({"family": "gpt2"}, {"cardinality": 4}, {"auto": AutoModelForMaskedLM}, {"weight_init": "xavier"}):
        assert torch.equal(after(**options), expected), options


def test_loading_draws_nothing_that_is_kept(tmp_path):
    build(1, "concat").save_pretrained(tmp_path)
    _describes.cache_clear()  # the first time looks closer
    expected = torch.get_rng_state()
    for _ in range(2):
        from_pretrained(tmp_path, BertModel)
        assert torch.equal(torch.get_rng_state(), expected)


# ------------------------------------------------------------------------------------------------ distributions


def formerly(model, weight_init, std):
    """Weights as one generator drew them for all."""
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std if weight_init != "xavier" else 1.0 if module is words else 0.3)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight.data[module.padding_idx])
        elif isinstance(module, nn.Linear | Conv1D):
            parts = 3 if name.endswith(("c_attn", "Wqkv")) else 2 if name.endswith("mlp.Wi") else 1
            into, out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
            if weight_init != "xavier":
                nn.init.normal_(module.weight, std=std)
            elif parts > 1:
                nn.init.normal_(module.weight, std=math.sqrt(2 / (into + out / parts)))
            else:
                nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


@pytest.mark.parametrize("weight_init", ["bert", "xavier", "width_scaled"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert", "deberta_v2"])
def test_each_weight_has_the_distribution_it_had(family, weight_init):
    torch.manual_seed(0)
    sizes = {"family": family, "heads": 2, "vocab_size": 300, "max_length": 40, "weight_init": weight_init}
    found = unpatch(build_encoder(2, 48, **sizes, auto=AutoModelForSequenceClassification))
    plain = AutoModelForSequenceClassification.from_config(found.config)
    former = dict(formerly(plain, weight_init, 0.08 if weight_init == "width_scaled" else 0.02).named_parameters())
    for name, p in found.named_parameters():
        p, before = p.detach().double(), former[name].detach().double()
        if not before.std() > 0:
            assert torch.equal(p, before), name
            continue
        n = p.numel()
        assert float(p.std()) == pytest.approx(float(before.std()), rel=5 / math.sqrt(n)), name
        assert abs(float(p.mean())) < 5 * float(before.std()) / math.sqrt(n), name
        assert torch.equal((p == 0).nonzero(), (before == 0).nonzero()), f"{name}: padding"


def test_without_values_there_is_nothing_to_patch():
    with torch.device("meta"), pytest.raises(ValueError, match="no weights yet"):
        build(1)


def test_another_precision_rounds_the_same_numbers():
    expected = weights(build(2, "concat"))
    torch.set_default_dtype(torch.float64)
    try:
        found = weights(build(2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in found.values()} == {torch.float64}
    assert all(torch.equal(p, expected[name].double()) for name, p in found.items() if ".resformer." not in name)
