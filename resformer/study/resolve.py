"""What a study names is looked up, and what its runs depend on is measured, before any of them starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from resformer.checkpoint import read_config
from resformer.data.corpus import read_corpus
from resformer.data.glue import load_task
from resformer.data.tasks import TASKS
from resformer.data.tokenizer import train_tokenizer
from resformer.encoders import build_encoder
from resformer.errors import unknown
from resformer.optim import scheme_parameters
from resformer.sizes import encoder_config, inner_width, layer_parameters, matched_width, outline
from resformer.spelling import parse_scheme
from resformer.study.plan import STATIC, Condition, Facts, Study
from resformer.study.pretraining import Pretraining
from resformer.study.problems import Problems
from resformer.study.run import HELD_OUT, fresh_model, prepare_text, shortened, subwords, without_slice
from resformer.study.settings import Settings
from resformer.train.load import load_model
from resformer.train.loop import PRECISIONS
from resformer.train.pretrain import split_samples
from resformer.train.schedule import factor

Say = Callable[[str], None]
OF_THE_ENCODER = signature(build_encoder).parameters.keys() - {"placement"}


def resolve(study: Study, say: Say | None = None) -> Study:
    """The study with its `Facts`, its controls among the schemes, and the depth of its checkpoint.

    Every scheme is built at every depth, since nothing knows better what can be built. Raises `Problems` for all tasks,
    schemes, settings and data that will not do. `say` is told where data were found, and what was left out.
    """
    say = say or (lambda text: None)
    problems = Problems()
    settings = study.settings
    with _collected(problems, "precision", settings.precision):
        if settings.precision not in PRECISIONS:
            raise unknown("precision", settings.precision, PRECISIONS)
    with _collected(problems, "schedule", settings.schedule):
        factor(settings.schedule, steps=100, warmup=settings.warmup)
    rows = _rows(study, say, problems)
    text = None if study.pretraining is None else _text(study.pretraining, problems)
    if settings.model is None:
        resolved = _new(study, say, problems)
    else:
        resolved = _checkpoint(study, say, problems)
    problems.stop()
    return replace(resolved, facts=replace(resolved.facts, data=rows, corpus=text))


def _rows(study: Study, say: Say, problems: Problems) -> dict[str, str]:
    """The fingerprint of each task's data. A download happens here once, and not in every worker."""
    found, settings = {}, study.settings
    for task in study.tasks:
        with _collected(problems, "data" if task in TASKS and settings.data else "tasks", task):
            data = load_task(task, settings.data, say=say)
            found[task] = fingerprint(data)
            if len(study.learning_rates) > 1:
                key = "tasks" if settings.train_size is None else "train_size"
                with _collected(problems, key, getattr(settings, key, task)):
                    without_slice(shortened(data, settings.train_size), TASKS[task])
    return found


def _text(given: Pretraining, problems: Problems) -> str | None:
    """The fingerprint of the text that encoders are trained on, which has to be enough for that."""
    table = "pretraining"
    with _collected(problems, f"{table}.schedule", given.schedule, f"[{table}] "):
        factor(given.schedule, steps=100, warmup=given.warmup)
    with _collected(problems, f"{table}.corpus", given.corpus[0], f"[{table}] "):
        found = read_corpus(given.corpus).fingerprint
        with _collected(problems, f"{table}.vocabulary", given.vocabulary, f"[{table}] "):
            subwords(given.corpus, given.vocabulary)
            with _collected(problems, f"{table}.length", given.length, f"[{table}] "):
                packed = prepare_text(given)[1]
                with _collected(problems, f"{table}.batch_size", given.batch_size, f"[{table}] "):
                    split_samples(packed, HELD_OUT, given.batch_size)
        return found
    return None


def _new(study: Study, say: Say, problems: Problems) -> Study:
    """Of fresh weights: the widths of the depths, and the control that spends the parameters elsewhere."""
    settings = study.settings
    heads: list[Any] = [AutoModelForSequenceClassification, *([AutoModelForMaskedLM] * (study.pretraining is not None))]
    hosts = Problems()
    with _collected(hosts, "family", settings.family):
        for auto in heads:
            _build("identity", 1, Settings(family=settings.family), auto)
    widths = dict.fromkeys(study.depths, settings.width)
    if not hosts and settings.match_parameters is not None:
        with _collected(hosts, "match_parameters", settings.match_parameters):
            widths = _matched(study, say)
    if not hosts:
        key = "width" if settings.heads is None else "heads"
        with _collected(hosts, key, getattr(settings, key)):
            for width in sorted(set(widths.values())):
                _build("identity", 1, replace(settings, width=width))
    if hosts:  # the schemes are looked at in another
        problems.found += hosts.found
        settings = Settings()
        widths = dict.fromkeys(widths, settings.width)
    added: dict[str, dict[int, int]] = {}  # scheme -> depth -> parameters that it adds
    for text in study.schemes:
        with _collected(problems, "schemes", text):
            added[text] = {depth: _added(text, depth, replace(settings, width=w)) for depth, w in widths.items()}
    if problems:
        return study
    if study.controls and STATIC not in (parse_scheme(text)[0] for text in study.schemes):
        try:
            for depth, width in widths.items():
                _added(STATIC, depth, replace(settings, width=width))
            study = replace(study, schemes=(*study.schemes, STATIC))
        except ValueError as error:
            say(f"no control {STATIC}: {error}")
    wider = {}
    for depth, width in widths.items():
        assert study.baseline is not None
        most = max(added[text][depth] for text in added) - added[study.baseline][depth]
        wider[str(depth)] = round(most / _unit(depth, replace(settings, width=width)))
    if study.controls and not all(wider.values()):
        narrow = ", ".join(depth for depth, units in wider.items() if not units)
        say(f"no control with a wider feed-forward at depth {narrow}: no scheme adds as much as one unit takes")
    matched = {} if settings.match_parameters is None else {str(depth): width for depth, width in widths.items()}
    return replace(study, facts=Facts(widths=matched, wider=wider))


def _matched(study: Study, say: Say) -> dict[int, int]:
    """The width of each depth that has the parameters wanted."""
    settings, widths = study.settings, {}
    wanted = settings.match_parameters or ""
    for depth in study.depths:
        match = matched_width(
            depth,
            int(wanted) if wanted.isdigit() else wanted,
            family=settings.family,
            heads=settings.heads,
            ffn_ratio=settings.ffn_ratio,
        )
        widths[depth] = match.width
        say(f"depth {depth}: {match}")
    return widths


def _checkpoint(study: Study, say: Say, problems: Problems) -> Study:
    """Of a given one: its depth, and what its files hold."""
    model, task = study.settings.model, next((name for name in study.tasks if name in TASKS), next(iter(TASKS)))
    assert model is not None
    load = partial(load_model, model, AutoModelForSequenceClassification, task=TASKS[task])
    wrong = Problems()
    with _collected(wrong, "model", model), torch.random.fork_rng(devices=[]):
        load()
        patched = getattr(config := read_config(model), "resformer", None)
        if patched and patched["scheme"] != "identity":
            raise ValueError(
                f"model {model!r} is patched with {patched['scheme']!r} already, and a study patches it with each of "
                "its schemes; give an unpatched one (resformer.unpatch, then save_pretrained)"
            )
        depth = config.num_hidden_layers
        if study.depths not in ((depth,), ()):
            said = f"depths {list(study.depths)} of a checkpoint with {depth} layers; leave them out"
            problems.say("depths", study.depths[0], said)
        facts = Facts(model=_files(model))
    for text in study.schemes:
        with _collected(problems, "schemes", text), torch.random.fork_rng(devices=[]):
            name, options = parse_scheme(text)
            if wrong:
                _added(text, 1, Settings())  # in a model that can be read
            else:
                load(scheme=name, init=study.settings.init or "preserve", options=options)
    problems.found += wrong.found
    if problems:
        return study
    if study.controls:
        say("no control with a wider feed-forward, and no static_mix: a checkpoint has neither")
    return replace(study, depths=(depth,), controls=False, facts=facts)


def _added(text: str, depth: int, settings: Settings) -> int:
    """The parameters that a scheme adds to a new model, which is built for that."""
    if taken := parse_scheme(text)[1].keys() & OF_THE_ENCODER:
        raise ValueError(f"scheme {text!r} sets {min(taken)!r}, which is of the encoder and not of a scheme")
    return sum(parameter.numel() for parameter in scheme_parameters(_build(text, depth, settings)))


def _build(
    scheme: str, depth: int, settings: Settings, auto: Any = AutoModelForSequenceClassification
) -> PreTrainedModel:
    """A new model as the runs have it, but for its vocabulary."""
    shape = Condition(scheme, depth, task="")
    with torch.random.fork_rng(devices=[]):
        return fresh_model(shape, settings, 0, _words(), auto, settings.max_length)


@cache
def _words() -> PreTrainedTokenizerBase:
    return train_tokenizer(["word"])


def _unit(depth: int, settings: Settings) -> int:
    """The parameters that one more unit takes in the feed-forward of every layer."""

    def count(inner: int) -> int:
        ratio = inner / settings.width
        shape = encoder_config(settings.family, depth, settings.width, heads=1, ffn_ratio=ratio)
        return layer_parameters(outline(shape))

    inner = inner_width(settings.width, settings.ffn_ratio)
    return count(inner + 1) - count(inner)


def fingerprint(data: DatasetDict) -> str:
    """SHA-256 of the rows of all splits, in their order."""
    digest = hashlib.sha256()
    for name, split in data.items():
        for column in split.column_names:
            digest.update(f"\n{name} {column} {len(split)}\n".encode())
            for batch in split.select_columns(column).iter(10_000):
                digest.update("\0".join(map(str, batch[column])).encode())
    return digest.hexdigest()


def _files(model: str) -> str:
    """SHA-256 of the files of a checkpoint, or its commit on the hub."""
    folder = Path(model)
    if not folder.is_dir():
        return str(read_config(model)._commit_hash)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _collected(problems: Problems, key: str, value: Any, before: str = "") -> Iterator[None]:
    """Meanwhile a `ValueError`, or what cannot be read, is a problem of that key and value."""
    try:
        yield
    except (ValueError, OSError) as error:
        problems.say(key, value, f"{before}{error}")
