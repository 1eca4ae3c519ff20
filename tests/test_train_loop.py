"""The loop alone: steps, clipping, divergence, precision."""

import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from training_fakes import TASK, tiny_bert, tiny_data, tiny_tokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from resformer.train.batches import encode, training_batches
from resformer.train.loop import make_accelerator, predict, windows


def encoded():
    inputs = ("input_ids", "attention_mask")
    return encode(tiny_data()["train"], tiny_tokenizer(), TASK, max_length=64, inputs=inputs)


def run(model, batches, *, steps, lr=1e-2, precision="fp32", looks=None, **options):
    """The steps taken."""
    accelerator = make_accelerator(precision)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr))

    def set_rate(step):
        for group in optimizer.param_groups:
            group["lr"] = lr / (1 + step)

    parts = (batch if isinstance(batch, list) else [(batch, 1.0)] for batch in batches)
    taken = []
    for window in windows(model, parts, optimizer, set_rate, steps=steps, accelerator=accelerator, **options):
        taken += window
        if looks is not None:
            looks.append(len(window))
    return taken


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
    seen, looks = [], []
    steps = run(Line(), line_batches(), steps=60, lr=0.1, clip=None, on_step=seen.append, looks=looks)
    w, wanted = 2.0, []
    for step in range(60):
        wanted.append(3 * w)
        w -= 0.1 / (1 + step) * 3
    torch.testing.assert_close([step.loss for step in steps], wanted, rtol=1e-5, atol=1e-5)
    assert [step.step for step in steps] == seen == list(range(1, 61))
    assert looks == [25, 25, 10]
    assert [step.learning_rate for step in steps[:2]] == [0.1, 0.05]
    assert {round(step.grad_norm, 5) for step in steps} == {3.0}


def test_it_goes_on_from_a_step():
    model, seen = Line(), []
    steps = run(model, line_batches(), steps=40, begin=10, lr=0.1, clip=None, on_step=seen.append)
    assert [step.step for step in steps] == seen == list(range(11, 41))
    assert steps[0].learning_rate == 0.1 / 11


def test_parts_add_up_to_the_batch():
    """Of unequal sizes, each with its share; the gradient is that of the mean over all."""
    model = Line()
    whole = [({"x": torch.tensor([1.0, 2.0, 6.0])}, 1.0)]
    parts = [({"x": torch.tensor([1.0])}, 1 / 3), ({"x": torch.tensor([2.0, 6.0])}, 2 / 3)]
    one, two = Line(), model
    first = run(one, iter([whole]), steps=1, clip=None)
    second = run(two, iter([parts]), steps=1, clip=None)
    assert first[0].loss == pytest.approx(second[0].loss) == 2.0 * 3.0
    assert first[0].grad_norm == pytest.approx(second[0].grad_norm) == 3.0
    assert one.w.item() == pytest.approx(two.w.item())


def test_dropout_draws_from_seed_step_and_process_alone(monkeypatch):
    class Dropped(Line):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x))

    def losses(seed, rank, begin=0):
        monkeypatch.setattr(Accelerator, "process_index", rank)
        batches = iter([{"x": 2.0 ** torch.arange(20)}] * 3)  # the sum of what is left tells what was dropped
        return [step.loss for step in run(Dropped(), batches, steps=3, lr=0.0, seed=seed, begin=begin)]

    drawn = [losses(seed, rank) for seed in (0, 1) for rank in (0, 1)]
    assert len(set(itertools.chain(*drawn))) == 12
    assert losses(1, 1) == drawn[3]
    assert losses(1, 1, begin=1) == drawn[3][1:]


def test_the_gradient_is_clipped():
    model = Line()
    steps = run(model, line_batches(), steps=1, lr=1.0, clip=0.5)
    torch.testing.assert_close(model.w.item(), 2.0 - 0.5, rtol=1e-4, atol=0)
    assert steps[0].grad_norm == pytest.approx(3.0)  # before clipping


def test_a_loss_that_is_not_finite_ends_the_run():
    seen = []
    steps = run(Line(), line_batches(bad=30), steps=1000, lr=1e-3, on_step=seen.append)
    assert len(steps) == 30
    assert not math.isfinite(steps[-1].loss)
    assert all(math.isfinite(step.loss) for step in steps[:-1])
    assert seen[-1] == 50  # the end of the window


def test_batches_that_end_too_soon_are_an_error():
    with pytest.raises(RuntimeError, match="ended after step 2 of 5"):
        run(Line(), itertools.islice(line_batches(), 2), steps=5, look=lambda step: True)


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
    steps = run(model, training_batches(encoded(), 8, seed=0), steps=3, precision="bf16")
    assert found == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    fp32 = run(tiny_bert(), training_batches(encoded(), 8, seed=0), steps=3)
    torch.testing.assert_close([s.loss for s in steps], [s.loss for s in fp32], rtol=0.05, atol=0.05)


def test_predictions_are_in_the_order_of_the_data():
    split, model = encoded(), tiny_bert()
    found = predict(model, split, batch_size=7, accelerator=make_accelerator("fp32"))
    assert found.shape == (64, 2)
    for i in (0, 13, 63):
        batch = split.collate([i], multiple=1)
        torch.testing.assert_close(torch.from_numpy(found[i : i + 1]), model(**batch).logits.detach())
