"""One pre-training run: a model, a corpus of packed samples, a folder with the result."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resformer.data.corpus import read_corpus
from resformer.data.masking import EVALUATION
from resformer.data.packing import Packed
from resformer.data.shards import fingerprint, tokenize_corpus
from resformer.errors import unknown
from resformer.sizes import longest_input
from resformer.train import checks
from resformer.train.cost import reset_peak_memory
from resformer.train.flags import text_flags
from resformer.train.job import Evaluation, Job
from resformer.train.loop import make_accelerator
from resformer.train.masked_head import find_head, picking
from resformer.train.numbers import check_positive
from resformer.train.progress import progress_bar
from resformer.train.result import describe_run, finish, merged
from resformer.train.run import run
from resformer.train.settings import Settings
from resformer.train.text import SHARE, Text, context_free_loss, frequencies, unigram_loss

OBJECTIVES = ("mlm", "clm")


def pack(
    corpus: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    objective: str,
    *,
    shards: Path | None = None,
    column: str = "text",
    tell: Callable[[str], None] = lambda text: None,
) -> Packed:
    """Samples of `length` tokens of a corpus, tokenised once: into the folder `shards`, or into the user's cache.

    `tell` is given a line about where the tokens are, and whether they were there already. Raises `ValueError` as
    `read_corpus` and `tokenize_corpus` do.
    """
    if shards is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        known = f"{read_corpus(corpus, column=column).fingerprint[:12]}-{fingerprint(tokenizer)[:12]}-{column}"
        shards = cache / "resformer" / "shards" / known
    with progress_bar(0, shown=True, what="tokenising", seconds=1) as update:
        found = tokenize_corpus(
            corpus,
            tokenizer,
            shards,
            column=column,
            progress=lambda documents, tokens: update(completed=documents, note=f"{tokens:,} tokens"),
        )
    tell(f"{found.tokens:,} tokens of {found.documents:,} documents, in {shards}{' as before' * found.reused}")
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id) if objective == "mlm" else None
    if ends is not None and None in ends:
        raise ValueError("the tokenizer has no cls or no sep token, which samples of masked text begin and end with")
    return Packed(found, length, ends)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packed: Packed,
    output: Path,
    settings: Settings | None = None,
    *,
    objective: str = "mlm",
    held_out: Packed | int = 512,
    tokens: int | None = None,
    resume: str = "auto",
    overwrite: bool = False,
    save_model: bool = True,
    push_to: str | None = None,
    progress: bool = True,
    describe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train `model` on packed samples of text, measure its loss on held-out ones, write `output/result.json`.

    Args:
        model: with the head of the objective, patched or not; trained in place.
        packed: the samples; `settings.batch_size` counts them.
        objective: "mlm", masked language modelling (15 % of the tokens, dynamic masks); "clm", causal.
        held_out: samples of other text; or how many of the last ones of `packed` are held out.
        tokens: the length of the run, in place of epochs and steps; tokens of the samples, masked or not.
        resume, overwrite: see `resformer.train.run.run`.
        push_to: a repository of the hub to which the model goes, OWNER/NAME; None: nothing leaves this machine.
        describe: further entries of `result["config"]`.

    Which tokens are masked follows from the seed, the epoch and the sample alone: equal for all schemes, on any number
    of processes, and for a run that was resumed. The masks of evaluation are always the same. The head computes the
    masked tokens alone, where the model computes the same that way (checked at the start).

    The metrics are "loss", in nats a predicted token, its "perplexity", and what it is to be measured by:
    "unigram_loss", of the frequencies of the training text, and of masked text "context_free_loss", of the best guess
    from a token's own place (which 2 times in 10 is no mask), below which no model comes without context. The score is
    minus the loss. Returns what is in result.json. Raises `ValueError`, before any work, for what does not fit.
    """
    settings = settings or Settings()
    checks.check_hub_name(push_to)
    checks.check_folder(output := Path(output), overwrite=overwrite)
    checks.check_resume(resume, overwrite=overwrite)
    job = pretraining(
        model, tokenizer, packed, settings, objective=objective, held_out=held_out, tokens=tokens, describe=describe
    )
    reset_peak_memory(job.accelerator.device)
    outcome = run(model, job, output, settings, resume=resume, overwrite=overwrite, progress=progress)
    result = describe_run(outcome, job, model, settings)
    return finish(result, output, model, tokenizer, accelerator=job.accelerator, save_model=save_model, push_to=push_to)


def pretraining(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packed: Packed,
    settings: Settings,
    *,
    objective: str = "mlm",
    held_out: Packed | int = 512,
    tokens: int | None = None,
    describe: dict[str, Any] | None = None,
) -> Job:
    """What `pretrain` runs, with all its checks."""
    check_pretraining(
        model, tokenizer, settings, objective=objective, length=packed.length, tokens=tokens, held_out=held_out
    )
    train, held = split_samples(packed, held_out, settings.batch_size)
    size, each = settings.batch_size, settings.batch_size * packed.length
    epoch = len(train[1]) // size
    length_of_run = settings if tokens is None else replace(settings, steps=max(1, round(tokens / each)))
    given = {
        "objective": objective,
        "length": packed.length,
        "samples": len(train[1]),
        "held_out": len(held[1]),
        "corpus_sha256": packed.shards.index["corpus"],
        "validation_sha256": held[0].shards.index["corpus"],
        "tokenizer_sha256": packed.shards.index["tokenizer"],
    }
    masked = objective == "mlm"
    text, unseen = (Text(*samples, tokenizer, masked, settings.seed) for samples in (train, held))
    head = None
    if masked:
        probe = text.batch(np.arange(2), 0)
        head = find_head(model, send_to_device(probe, model.device))
    if not unseen.counts(np.arange(len(held[1]))).any():
        raise ValueError(
            f"no token of the {len(held[1])} held-out samples can be predicted: the tokenizer knows none; "
            "give other text, or train a tokenizer on it"
        )
    seen = frequencies(text)
    floors = {"unigram_loss": unigram_loss(seen, unseen)}
    if masked:
        floors["context_free_loss"] = context_free_loss(seen, unseen)
    torch.set_float32_matmul_precision(settings.matmul_precision)
    accelerator = make_accelerator(settings.precision)
    picking_text, picking_unseen = (replace(one, picks=head is not None) for one in (text, unseen))
    return Job(
        config=merged(describe or {}, given | length_of_run.resolved(epoch)),
        accelerator=accelerator,
        epoch=epoch,
        batches=partial(picking_text.batches, size, settings.micro_batch_size),
        first=lambda: next(text.batches(size, None, 0, 0, 1))[0][0],
        evaluate=partial(_evaluate, picking_unseen, size, floors, accelerator),
        flags=partial(_flags, model.config.vocab_size),
        units=("tokens", each),
        tokens=float(each),
        heaviest=lambda n: picking_text.batch(np.arange(n), 0),
        predicted=1.0 if head is None else SHARE,
        around=partial(picking, model, head) if head is not None else nullcontext,
    )


def check_pretraining(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    objective: str,
    length: int,
    tokens: int | None,
    held_out: Packed | int,
) -> None:
    """What can be told before there are samples: `ValueError` for a model, a tokenizer or a length that do not fit."""
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    checks.check_trackers(settings.track)
    if not isinstance(held_out, Packed):
        check_positive(held_out=held_out)
    if tokens is not None:
        check_positive(tokens=tokens)
        if settings.steps is not None or settings.seconds is not None:
            raise ValueError("tokens is a length of the run, and so are steps and seconds; give one of them")
    _check_model(model, tokenizer, length, objective)


Samples = tuple[Packed, range]


def split_samples(packed: Packed, held_out: Packed | int, batch_size: int) -> tuple[Samples, Samples]:
    """What is trained on and what is held out, each as samples of packed text."""
    if isinstance(held_out, Packed):
        train, held = (packed, range(len(packed))), (held_out, range(len(held_out)))
        if held_out.length != packed.length:
            raise ValueError(f"held-out samples have {held_out.length} tokens, those of training {packed.length}")
    else:
        train = packed, range(len(packed) - held_out)
        held = packed, range(max(0, len(packed) - held_out), len(packed))
    if len(train[1]) < batch_size:
        out = len(held_out) if isinstance(held_out, Packed) else held_out
        raise ValueError(
            f"the corpus has {len(packed)} samples of {packed.length} tokens, with {out} to be held out: too few "
            f"for one batch of {batch_size}; give more text, shorter samples or a smaller batch"
        )
    return train, held


def _check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, objective: str) -> None:
    name = type(model).__name__
    suffixes = {"mlm": ("ForMaskedLM",), "clm": ("LMHeadModel", "ForCausalLM")}[objective]
    if not name.endswith(suffixes):
        raise ValueError(
            f"objective {objective!r} trains a model that ends in {' or '.join(suffixes)}, and this is a {name}; load "
            f"it with AutoModelFor{'MaskedLM' if objective == 'mlm' else 'CausalLM'}"
        )
    if objective == "mlm" and tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, which masked language modelling needs; set mask_token")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, {name} has {model.config.vocab_size}; use the tokenizer that "
            "belongs to the model"
        )
    positions = longest_input(model)
    if positions is not None and length > positions:
        raise ValueError(f"samples have {length} tokens, and the model takes {positions}; give shorter ones")
    if objective == "clm" and not _is_causal(model):
        raise ValueError(
            f"objective 'clm' predicts each token from those before it, and this {name} sees those after it as well; "
            "set is_decoder=True in its configuration, take a decoder such as family 'gpt2', or objective 'mlm'"
        )


@torch.no_grad()
def _is_causal(model: PreTrainedModel) -> bool:
    """Whether a token changes nothing before it."""
    training = model.training
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device) % model.config.vocab_size
    logits = model.eval()(input_ids=ids).logits[:, :3]
    model.train(training)
    return torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def _evaluate(text: Text, size: int, floors: dict[str, float], accelerator: Accelerator, model: Any) -> Evaluation:
    """The mean loss over the predicted tokens of the held-out samples, each once."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for start in range(0, len(text.samples), size):
        chosen = np.arange(start, min(start + size, len(text.samples)))
        tokens = text.counts(chosen).sum()
        ((batch, part),) = text.parts(chosen, EVALUATION, accelerator.process_index, accelerator.num_processes, None)
        batch = send_to_device(batch, accelerator.device)
        weight = part * tokens  # 0 where there are fewer samples than processes
        sums += torch.stack([model(**batch).loss.double() * weight, torch.full_like(sums[0], weight)])
    total, tokens = accelerator.reduce(sums, "sum").tolist()
    loss = total / tokens
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **floors}
    return Evaluation(-loss, metrics, {"held_out": len(text.samples)})


def _flags(vocabulary: int, last: Evaluation, train_loss: float) -> list[str]:
    return text_flags(last.metrics, train_loss=train_loss, vocabulary=vocabulary)
