"""Schemes that follow the steps of training: moved by hand, saved, compiled, and in the training loop."""

import copy

import pytest
import torch
from torch import nn
from training_fakes import TASK, tiny_bert, tiny_data, tiny_tokenizer
from transformers import AutoModel

import resformer
from resformer import ResidualStack
from resformer.schedule import progress
from resformer.testing.hosts import batch, checkpoint, tiny_host
from resformer.train.batches import encode, training_batches
from resformer.train.finetune import finetune
from resformer.train.loop import make_accelerator, windows
from resformer.train.settings import Settings


def patched(name="branch_norm", family="bert", **options):
    return resformer.patch(tiny_host(family), name, init="paper", **options)


def alphas(model) -> list[float]:
    return [buffer.item() for name, buffer in model.named_buffers() if name.endswith(".alpha")]


def test_branch_norm_goes_from_norms_alone_to_post_ln():
    given = batch(padded=True)
    model, host = patched(warmup=100), tiny_host("bert")
    assert alphas(model) == [0.0] * 4
    x = host.embeddings(given["input_ids"])
    for layer in host.encoder.layer:
        x = layer.output.LayerNorm(layer.attention.output.LayerNorm(x))
    torch.testing.assert_close(model(**given).last_hidden_state, x)
    for step, value in ((0, 0.0), (25, 0.25), (100, 1.0), (101, 1.0)):
        assert resformer.set_progress(model, step) is None
        assert alphas(model) == pytest.approx([value] * 4)
        assert progress(model) == min(step, 100)
    assert torch.equal(model(**given).last_hidden_state, host(**given).last_hidden_state)
    resformer.set_progress(model, 50)  # back as well: the caller's word counts
    assert alphas(model) == [0.5] * 4


def test_pro_res_opens_the_layers_in_turn():
    model = patched("pro_res", "gpt2", warmup=10)
    resformer.set_progress(model, 10)
    assert alphas(model) == [1, 1, 0.5, 0.5]
    assert progress(model) == 10
    resformer.set_progress(model, 15)
    assert progress(model) == 15
    resformer.set_progress(model, 400)
    assert alphas(model) == [1] * 4
    assert progress(model) == 20


def test_half_precision_follows_too():
    """A count of steps would stop at 256 in bf16."""
    model = resformer.patch(tiny_host("bert", dtype=torch.bfloat16), "branch_norm", init="paper")
    seen = []
    for step in (0, 1, 255, 300, 1000, 3000, 4000):
        resformer.set_progress(model, step)
        seen.append(alphas(model)[0])
        assert progress(model) == pytest.approx(step, rel=2**-7)
    assert seen == sorted(set(seen))
    assert (seen[0], seen[-1]) == (0, 1)


def test_it_is_saved_and_loaded(tmp_path):
    model = patched(warmup=4000)
    resformer.set_progress(model, 1000)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float64, torch.bfloat16):
        found = resformer.from_pretrained(tmp_path, AutoModel, dtype=dtype)
        assert alphas(found) == [0.25] * 4
        assert {buffer.dtype for name, buffer in found.named_buffers() if name.endswith("alpha")} == {dtype}
        assert progress(found) == 1000
    stack = ResidualStack([nn.Linear(4, 4)] * 2, 4, "pro_res")
    resformer.set_progress(stack, 500)
    other = ResidualStack([nn.Linear(4, 4)] * 2, 4, "pro_res")
    other.load_state_dict(stack.state_dict())
    assert progress(other) == 500


def test_a_compiled_model_follows_without_a_new_graph():
    torch._dynamo.reset()
    model = patched("pro_res", warmup=10)
    run = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    run(**batch())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (1, 7, 30):
            resformer.set_progress(model, step)
            resformer.set_progress(run, step)  # through the wrapper
            found, expected = run(**batch()).last_hidden_state, model(**batch()).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_forward_moves_nothing():
    model = patched(warmup=10).train()
    resformer.set_progress(model, 3)
    checkpoint(model, {"use_reentrant": False})
    for _ in range(3):
        model(**batch()).last_hidden_state.sum().backward()
    assert progress(model) == 3


@pytest.mark.parametrize("step", [-1, 1.0, True, None, "3"])
def test_wrong_steps_are_refused(step):
    model = patched()
    with pytest.raises(ValueError, match="whole number of at least 0"):
        resformer.set_progress(model, step)
    assert alphas(model) == [0.0] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rezero", r"scheme 'rezero' \(init='preserve'\) has no schedule; .*: branch_norm, pro_res"),
        ("branch_norm", r"scheme 'branch_norm' \(init='preserve', warmup=4000\) has no schedule"),
        (None, "this BertModel without a scheme has no schedule"),
    ],
)
def test_models_without_a_schedule_are_refused(name, message):
    model = tiny_host("bert")
    if name:
        resformer.patch(model, name)
    assert progress(model) is None
    with pytest.raises(ValueError, match=message):
        resformer.set_progress(model, 1)


# ------------------------------------------------------------------------------------------------ training


def test_the_loop_counts_steps_that_were_taken():
    split = encode(tiny_data()["train"], tiny_tokenizer(), TASK, max_length=64, inputs=("input_ids", "attention_mask"))
    model = resformer.patch(tiny_bert(), "branch_norm", init="paper", warmup=10)
    seen: list[float] = []
    model.register_forward_pre_hook(lambda *_: seen.append(alphas(model)[0]))
    accelerator = make_accelerator("fp32")
    for steps in (3, 2, 8):  # each run goes on where the one before ended
        wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-3))
        batches = training_batches(split, 8, seed=0)
        for _ in windows(wrapped, batches, optimizer, lambda step: None, steps=steps, accelerator=accelerator):
            pass
    assert seen == pytest.approx([min(1.0, step / 10) for step in range(13)])
    assert alphas(model)[0] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fine_tuning_warms_up(tmp_path, precision):
    model = resformer.patch(tiny_bert(), "pro_res", init="paper", warmup=4)
    settings = Settings(steps=6, batch_size=8, learning_rate=3e-3, precision=precision)
    result = finetune(model, tiny_tokenizer(), TASK, tiny_data(), tmp_path, settings, progress=False)
    assert result["status"] == "ok"
    assert alphas(model) == [1, 1, 0.75, 0.75]
    loaded = resformer.from_pretrained(tmp_path / "model", type(tiny_bert()))
    assert alphas(loaded) == [1, 1, 0.75, 0.75]
