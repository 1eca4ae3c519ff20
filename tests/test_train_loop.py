"""The loop alone: steps, clipping, divergence, precision."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from training_fakes import TASK, tiny_bert, tiny_data, tiny_tokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from resformer.train.batches import encode, training_batches
from resformer.train.loop import make_accelerator, predict, train


def encoded():
    inputs = ("input_ids", "attention_mask")
    return encode(tiny_data()["train"], tiny_tokenizer(), TASK, max_length=64, inputs=inputs)


def run(model, batches, *, steps, lr=1e-2, precision="fp32", **options):
    accelerator = make_accelerator(precision)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr))
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return train(model, batches, optimizer, scheduler, steps=steps, accelerator=accelerator, **options)


class Line(nn.Module):
    """loss = mean of w x, whose gradient is the mean of x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return SequenceClassifierOutput(loss=(self.w * x).mean())


def line_batches(value=3.0, bad=None):
    step = 0
    while True:
        step += 1
        yield {"x": torch.full((4,), math.nan if step == bad else value)}


def test_steps_losses_rates_and_norms_are_those_of_plain_sgd():
    seen, windows = [], []
    history = run(Line(), line_batches(), steps=60, lr=0.1, clip=None, on_step=seen.append, on_window=windows.append)
    w, wanted = 2.0, []
    for step in range(60):
        wanted.append(3 * w)
        w -= 0.1 / (1 + step) * 3
    torch.testing.assert_close(history.losses, wanted, rtol=1e-5, atol=1e-5)
    assert not history.diverged
    assert [step.step for step in history.steps] == seen == list(range(1, 61))
    assert [len(window) for window in windows] == [25, 25, 10]
    assert [step.learning_rate for step in history.steps[:2]] == [0.1, 0.05]
    assert {round(step.grad_norm, 5) for step in history.steps} == {3.0}


def test_the_gradient_is_clipped():
    model = Line()
    history = run(model, line_batches(), steps=1, lr=1.0, clip=0.5)
    torch.testing.assert_close(model.w.item(), 2.0 - 0.5, rtol=1e-4, atol=0)
    assert history.steps[0].grad_norm == pytest.approx(3.0)  # before clipping


def test_a_loss_that_is_not_finite_ends_the_run():
    seen = []
    history = run(Line(), line_batches(bad=30), steps=1000, lr=1e-3, on_step=seen.append)
    assert history.diverged
    assert len(history.steps) == 30
    assert not math.isfinite(history.losses[-1])
    assert all(map(math.isfinite, history.losses[:-1]))
    assert seen[-1] == 50  # the end of the window


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps is 0"):
        run(Line(), line_batches(), steps=0)


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        make_accelerator("fp8")


def test_bf16_where_the_device_lacks_it_is_refused(monkeypatch):
    monkeypatch.setattr("resformer.train.loop.is_bf16_available", lambda: False)
    with pytest.raises(ValueError, match="precision='fp32'"):
        make_accelerator("bf16")


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32():
    found = set()
    model = tiny_bert()
    model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda module, x, y: found.add(y.dtype))
    history = run(model, training_batches(encoded(), 8, seed=0), steps=3, precision="bf16")
    assert found == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    fp32 = run(tiny_bert(), training_batches(encoded(), 8, seed=0), steps=3)
    torch.testing.assert_close(history.losses, fp32.losses, rtol=0.05, atol=0.05)


def test_predictions_are_in_the_order_of_the_data():
    split, model = encoded(), tiny_bert()
    found = predict(model, split, batch_size=7, accelerator=make_accelerator("fp32"))
    assert found.shape == (64, 2)
    for i in (0, 13, 63):
        batch = split.collate([i], multiple=1)
        torch.testing.assert_close(torch.from_numpy(found[i : i + 1]), model(**batch).logits.detach())
