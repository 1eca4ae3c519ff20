"""One pre-training run: a model, a corpus of packed samples, a folder with the result."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resformer.data.corpus import read_corpus
from resformer.data.masking import EVALUATION, mask_batch
from resformer.data.packing import Packed, order
from resformer.data.shards import fingerprint, tokenize_corpus
from resformer.errors import unknown
from resformer.sizes import longest_input
from resformer.train import checks
from resformer.train.batches import divide
from resformer.train.cost import reset_peak_memory
from resformer.train.flags import text_flags
from resformer.train.loop import Part, make_accelerator
from resformer.train.masked_head import find_head, pick, picking
from resformer.train.numbers import check_positive
from resformer.train.progress import progress_bar
from resformer.train.result import describe_run, finish, merged
from resformer.train.run import Evaluation, Job, run
from resformer.train.settings import Settings

OBJECTIVES = ("mlm", "clm")
MASKED = 0.15  # of the tokens of a sample


@dataclass(frozen=True)
class Text:
    """Packed samples, and what becomes of them as a function of seed, epoch and number alone."""

    packed: Packed
    samples: range  # of `packed`
    objective: str
    seed: int
    hide: Callable[..., tuple[np.ndarray, np.ndarray]] | None  # of masked language modelling
    picks: bool = False  # whether labels are given with their positions

    def batch(self, chosen: np.ndarray, epoch: int) -> dict[str, Tensor]:
        """Samples number `chosen` (B) as "input_ids" (B T) and "labels"."""
        numbers = np.asarray(self.samples)[chosen]
        ids = self.packed.batch(numbers)
        if self.hide is None:
            return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids)}
        inputs, labels = self.hide(ids, numbers, seed=self.seed, epoch=epoch)
        given = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
        return pick(given) if self.picks else given

    def batches(self, settings: Settings, begin: int, rank: int, processes: int) -> Iterator[list[Part]]:
        """This process's parts of the batches from step `begin` on; the last samples of an epoch, that fill no batch,
        are left out."""
        size = settings.batch_size
        steps = len(self.samples) // size
        for epoch in count(begin // steps):
            row = order(len(self.samples), self.seed, epoch)
            for step in range(begin % steps, steps):
                chosen = row[step * size : (step + 1) * size]
                parts = divide(chosen, rank, processes, settings.micro_batch_size)
                yield [(self.batch(one, epoch), part) for one, part in parts]
            begin = 0


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
    tell(f"{found.tokens:,} tokens of {found.documents:,} documents in {shards}{', as before' * found.reused}")
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

    The metrics are "loss", in nats a predicted token, its "perplexity", and "unigram_loss": that of the frequencies of
    the training text, which a model that uses no context cannot beat. The score is minus the loss. Returns what is in
    result.json. Raises `ValueError`, before any work, for what does not fit.
    """
    settings = settings or Settings()
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    checks.check_trackers(settings.track)
    _check_model(model, tokenizer, packed, objective)
    train, held = _split(packed, held_out, settings.batch_size)
    if tokens is not None:
        check_positive(tokens=tokens)
        if settings.steps is not None or settings.seconds is not None:
            raise ValueError("tokens is a length of the run, and so are steps and seconds; give one of them")
        settings = replace(settings, steps=max(1, round(tokens / (settings.batch_size * packed.length))))
    torch.set_float32_matmul_precision(settings.matmul_precision)
    accelerator = make_accelerator(settings.precision)
    epoch = len(train[1]) // settings.batch_size
    given = {
        "objective": objective,
        "length": packed.length,
        "samples": len(train[1]),
        "held_out": len(held[1]),
        "corpus_sha256": packed.shards.index["corpus"],
        "tokenizer_sha256": packed.shards.index["tokenizer"],
    }
    config = merged(describe or {}, given | settings.resolved(epoch))
    checks.check_output(output := Path(output), config, overwrite=overwrite)

    hide = partial(_hide, tokenizer) if objective == "mlm" else None
    text = Text(*train, objective, settings.seed, hide)
    head = None
    if hide is not None:
        probe = Text(*train, objective, settings.seed, hide).batch(np.arange(2), 0)
        head = find_head(model, {name: tensor.to(model.device) for name, tensor in probe.items()})
        text = Text(*train, objective, settings.seed, hide, picks=head is not None)
    special = np.asarray(tokenizer.all_special_ids if objective == "mlm" else (), dtype=np.int64)  # never predicted
    unseen = Text(*held, objective, settings.seed, hide, picks=head is not None)
    job = Job(
        epoch=epoch,
        batches=partial(text.batches, settings),
        first=lambda: Text(*train, objective, settings.seed, hide).batch(np.arange(settings.batch_size), 0),
        evaluate=partial(_evaluate, unseen, settings.batch_size, _unigram_loss(text, unseen, special), accelerator),
        units=("tokens", settings.batch_size * packed.length),
        tokens=float(settings.batch_size * packed.length),
    )
    reset_peak_memory(accelerator.device)
    with picking(model, head) if head is not None else nullcontext():
        outcome = run(
            model,
            job,
            output,
            config,
            settings,
            accelerator=accelerator,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    result = describe_run(outcome, job, config, model, accelerator)
    if outcome.status == "ok":
        vocabulary = model.config.vocab_size
        result["flags"] += text_flags(result["metrics"], train_loss=result["train_loss"], vocabulary=vocabulary)
    return finish(result, output, model, tokenizer, accelerator=accelerator, save_model=save_model, push_to=push_to)


Samples = tuple[Packed, range]


def _split(packed: Packed, held_out: Packed | int, batch_size: int) -> tuple[Samples, Samples]:
    """What is trained on and what is held out, each as samples of packed text."""
    if isinstance(held_out, Packed):
        train, held = (packed, range(len(packed))), (held_out, range(len(held_out)))
        if held_out.length != packed.length:
            raise ValueError(f"held-out samples have {held_out.length} tokens, those of training {packed.length}")
    else:
        check_positive(held_out=held_out)
        train = packed, range(len(packed) - held_out)
        held = packed, range(max(0, len(packed) - held_out), len(packed))
    if len(train[1]) < batch_size:
        raise ValueError(
            f"the corpus has {len(packed)} samples of {packed.length} tokens, with {len(held[1])} held out: too few "
            f"for one batch of {batch_size}; give more text, shorter samples or a smaller batch"
        )
    return train, held


def _check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, packed: Packed, objective: str) -> None:
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
    if positions is not None and packed.length > positions:
        raise ValueError(f"samples have {packed.length} tokens, and the model takes {positions}; give shorter ones")


def _hide(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, samples: np.ndarray, *, seed: int, epoch: int):
    return mask_batch(
        ids,
        samples,
        seed=seed,
        epoch=epoch,
        vocab_size=len(tokenizer),
        mask_id=tokenizer.mask_token_id,
        special=np.asarray(tokenizer.all_special_ids),
        share=MASKED,
    )


@torch.no_grad()
def _evaluate(text: Text, batch_size: int, unigram: float, accelerator: Accelerator, model: Any) -> Evaluation:
    """The mean loss over the predicted tokens of the held-out samples, each once."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for start in range(0, len(text.samples), batch_size):
        chosen = np.arange(start, min(start + batch_size, len(text.samples)))
        ((own, part),) = divide(chosen, accelerator.process_index, accelerator.num_processes, None)
        batch = {name: tensor.to(accelerator.device) for name, tensor in text.batch(own, EVALUATION).items()}
        weight = part * len(chosen)  # 0 where there are fewer samples than processes
        sums += torch.stack([model(**batch).loss.double() * weight, torch.full_like(sums[0], weight)])
    total, samples = accelerator.reduce(sums, "sum").tolist()
    loss = total / samples
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "unigram_loss": unigram}
    return Evaluation(-loss, metrics, {"held_out": int(samples)})


def _unigram_loss(train: Text, held: Text, special: np.ndarray, most: int = 4096) -> float:
    """Nats a held-out token under the frequencies of training (of at most so many samples), one more than are seen."""

    def counts(text: Text) -> np.ndarray:
        samples: Sequence[int] = text.samples[:: max(1, len(text.samples) // most)]
        found = np.zeros(0, dtype=np.int64)
        for i in samples:
            here = np.bincount(text.packed[i])
            found = np.pad(found, (0, max(0, len(here) - len(found))))
            found[: len(here)] += here
        return found

    seen, unseen = counts(train), counts(held)
    size = max(len(seen), len(unseen))
    kept = np.setdiff1d(np.arange(size), special)
    seen, unseen = (np.pad(one, (0, size - len(one)))[kept] for one in (seen, unseen))
    frequencies = (seen + 1) / (seen + 1).sum()
    return float(-(unseen * np.log(frequencies)).sum() / unseen.sum())
