"""What a step will take, against counts by hand and what training really allocates."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from resformer import build_encoder
from resformer.testing.hosts import checkpoint
from resformer.train.plan import plan

D, F, C, T, LAYERS, V = 16, 24, 3, 8, 2, 30
SIZES = {"vocab_size": V, "max_length": 32, "heads": 2, "ffn_ratio": F / D}
MIB = 2**20


def encoder(scheme="identity", auto=AutoModelForSequenceClassification, **changes):
    torch.manual_seed(0)
    return build_encoder(LAYERS, D, scheme, auto=auto, num_labels=C, **(SIZES | changes))


def of(model, **changes):
    return plan(model, **({"batch": 4, "length": T, "precision": "fp32"} | changes))


def tower():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def tower_loss(model, batch, length):
    return model(torch.ones(batch, length, 8)).mean()


def test_linear_layers_by_hand():
    found = plan(tower(), batch=5, length=7, precision="no", loss=tower_loss)
    numbers = 8 * 16 + 16 + 16 * 4 + 4
    assert found.parameters == found.non_embedding == found.trainable == numbers
    assert found.scheme == 0
    assert found.weights_mib == found.gradients_mib == 4 * numbers / MIB
    assert found.optimizer_mib == 2 * found.weights_mib
    assert found.activations_mib == 4 * 5 * 7 * (8 + 16) / MIB, "the input, and the output of the ReLU once"
    assert found.flops_per_token == 2 * (8 * 16 * 2 + 16 * 4 * 3), "the first has no gradient of its input"
    assert found.memory_mib == 4 * found.weights_mib + found.activations_mib
    assert plan(tower(), batch=5, length=7, precision="no", optimizer="sgd", loss=tower_loss).optimizer_mib == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_operations_of_a_bert_by_hand(attention):
    model = encoder()
    model.set_attn_implementation(attention)
    layer = 2 * T * (4 * D**2 + 2 * D * F) + 2 * 2 * T * T * D
    head = 2 * D * D + 2 * D * C  # pooler and classifier see one token
    assert of(model).flops_per_token == 3 * (LAYERS * layer + head) / T
    assert of(model, batch=9).flops_per_token == of(model).flops_per_token


def test_operations_are_about_six_a_parameter():
    model = build_encoder(2, 96, heads=2, vocab_size=V, max_length=64)
    found = of(model, length=64)
    attention = 3 * 2 * 2 * 2 * 64 * 96
    pooler = 96 * 96 + 96  # the states do not come from it
    assert found.flops_per_token - attention == pytest.approx(6 * (found.non_embedding - pooler), rel=0.02)


def test_parameters():
    model = encoder("rezero", auto=AutoModelForMaskedLM)
    found = of(model)
    assert found.scheme == LAYERS
    tables = (V + 32 + 2) * D
    layers = LAYERS * (4 * (D * D + D) + 2 * D * F + F + D + 4 * D)
    head = D * D + D + 2 * D + V  # its matrix is that of the words
    assert found.non_embedding == layers + 2 * D + head + found.scheme
    assert found.parameters == found.non_embedding + tables
    model.requires_grad_(False)
    model.cls.predictions.bias.requires_grad_(True)
    few = of(model)
    assert (few.trainable, few.gradients_mib) == (V, 4 * V / MIB)
    assert few.weights_mib == found.weights_mib


def test_optimizer_and_gradients_are_what_training_allocates():
    model = encoder("highway")
    found = of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, T, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    grads = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert found.gradients_mib >= grads / MIB
    states = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    unused = [p for p in model.parameters() if p.grad is None]
    assert found.optimizer_mib == (sum(v.nbytes for v in states) + sum(2 * p.nbytes for p in unused)) / MIB
    half = of(encoder("highway").bfloat16())
    assert half.gradients_mib == found.gradients_mib / 2


def test_activations():
    model = build_encoder(6, 32, vocab_size=V, heads=2, max_length=256)
    one, two = of(model, length=64, batch=2), of(model, length=64, batch=4)
    assert two.activations_mib == pytest.approx(2 * one.activations_mib, rel=0.01), "all but a few depend on the batch"
    bf16 = of(model, length=64, batch=4, precision="bf16")
    assert bf16.activations_mib < 0.9 * two.activations_mib
    assert bf16.weights_mib == two.weights_mib
    checkpoint(model)
    saved = of(model, length=64, batch=4)
    stream = 4 * 64 * 32 * 4 / MIB
    assert 6 * stream <= saved.activations_mib < 0.3 * two.activations_mib, "the input of each layer"
    assert saved.flops_per_token == two.flops_per_token, "what is computed again is not of the model"


def test_activations_are_given_back():
    model, outputs = tower(), []
    model[1].register_forward_hook(lambda *of_call: outputs.append(StorageWeakRef(of_call[2].untyped_storage())))
    plan(model, batch=5, length=7, precision="no", loss=tower_loss)
    assert outputs
    assert all(output.expired() for output in outputs), "ReLU keeps its own output"


def test_everything_is_left_as_it_was():
    model = encoder("pro_res").train()
    model.bert.encoder.layer[0].eval()
    model.bert.pooler.requires_grad_(False)
    for number, p in enumerate(model.parameters()):
        if number % 2 and p.requires_grad:
            p.grad = torch.full_like(p, number)
    before = (
        torch.get_rng_state(),
        [m.training for m in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [b.clone() for b in model.buffers()],
    )
    assert of(model) == of(model), "and measured twice it is the same"
    assert torch.equal(torch.get_rng_state(), before[0])
    assert [m.training for m in model.modules()] == before[1]
    assert all(torch.equal(v, before[2][k]) for k, v in model.state_dict().items())
    for p, grad in zip(model.parameters(), before[3], strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert all(map(torch.equal, model.buffers(), before[4]))


@pytest.mark.parametrize("family", ["roberta", "electra", "modernbert", "distilbert", "deberta_v2", "gpt2", "llama"])
def test_other_families(family):
    auto = AutoModelForCausalLM if family in ("gpt2", "llama") else AutoModelForMaskedLM
    found = of(encoder("rezero", family=family, auto=auto, max_length=T))
    assert found.activations_mib > 0
    assert found.flops_per_token > 6 * LAYERS * 4 * D * D
    assert found.scheme == LAYERS


def test_as_a_table():
    out = io.StringIO()
    Console(file=out, width=100).print(of(encoder("rezero")))
    text = " ".join(out.getvalue().split())
    assert "a step of 4 x 8 tokens, fp32, adamw, on cpu" in text
    assert "of the scheme 2" in text
    assert "activations 0." in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"length": 2.0}, "length must be a whole number"),
        ({"length": 33}, "length is 33, and this BertForSequenceClassification takes inputs of 32 tokens at most"),
        ({"precision": "bf17"}, "unknown precision 'bf17'. Did you mean 'bf16'"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'. Did you mean 'adamw'"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        of(encoder(), **changes)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="nothing would be trained"):
        of(encoder().requires_grad_(False))


def test_a_micro_batch_that_does_not_fit():
    model = encoder().eval()

    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    with pytest.raises(ValueError, match=r"4 x 8 tokens does not fit on cpu: CUDA out of memory.*accumulate gradients"):
        of(model, loss=too_much)
    assert not model.training
