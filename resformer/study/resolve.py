"""What a study names is looked up, and what its runs depend on is measured, before any of them starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict

from resformer.checkpoint import read_config
from resformer.data.corpus import read_corpus
from resformer.data.glue import load_task
from resformer.data.tasks import TASKS
from resformer.encoders import build_encoder
from resformer.errors import unknown
from resformer.optim import scheme_parameters
from resformer.sizes import encoder_config, inner_width, layer_parameters, matched_width, outline
from resformer.spelling import parse_scheme
from resformer.study.plan import STATIC, Condition, Facts, Run, Study
from resformer.study.problems import Problems
from resformer.study.run import start
from resformer.study.settings import Settings
from resformer.train.loop import PRECISIONS
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
    rows, text = _rows(study, say, problems), None
    if study.pretraining is not None:
        with _collected(problems, "pretraining.corpus", list(study.pretraining.corpus)):
            text = read_corpus(study.pretraining.corpus).fingerprint
    if settings.model is None:
        resolved = _new(study, say, problems)
    else:
        resolved = _checkpoint(study, say, problems)
    problems.stop()
    return replace(resolved, facts=replace(resolved.facts, data=rows, corpus=text))


def _rows(study: Study, say: Say, problems: Problems) -> dict[str, str]:
    """The fingerprint of each task's data. A download happens here once, and not in every worker."""
    found = {}
    for task in study.tasks:
        with _collected(problems, "tasks" if task not in TASKS else "data", task):
            found[task] = fingerprint(load_task(task, study.settings.data, say=say))
    return found


def _new(study: Study, say: Say, problems: Problems) -> Study:
    """Of fresh weights: the widths of the depths, and the control that spends the parameters elsewhere."""
    settings = study.settings
    widths = {depth: settings.width for depth in study.depths}
    if (wanted := settings.match_parameters) is not None:
        with _collected(problems, "match_parameters", wanted):
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
    if any(problem.key == "match_parameters" for problem in problems.found):  # without widths nothing can be built
        return study
    added: dict[str, dict[int, int]] = {}  # scheme -> depth -> parameters that it adds
    for text in study.schemes:
        with _collected(problems, "schemes", text):
            added[text] = {depth: _added(text, depth, replace(settings, width=w)) for depth, w in widths.items()}
    if study.controls and STATIC not in (parse_scheme(text)[0] for text in study.schemes):
        try:
            for depth in study.depths:
                _added(STATIC, depth, replace(settings, width=widths[depth]))
            study = replace(study, schemes=(*study.schemes, STATIC))
        except ValueError as error:
            say(f"no control {STATIC}: {error}")
    if problems:
        return study
    wider = {}
    for depth, width in widths.items():
        assert study.baseline is not None
        most = max(added[text][depth] for text in added) - added[study.baseline][depth]
        wider[str(depth)] = round(most / _unit(depth, replace(settings, width=width)))
    if study.controls and not all(wider.values()):
        narrow = ", ".join(depth for depth, units in wider.items() if not units)
        say(f"no control with a wider feed-forward at depth {narrow}: no scheme adds as much as one unit takes")
    matched = {} if wanted is None else {str(depth): width for depth, width in widths.items()}
    return replace(study, facts=Facts(widths=matched, wider=wider))


def _checkpoint(study: Study, say: Say, problems: Problems) -> Study:
    """Of a given one: its depth, and what its files hold."""
    settings = study.settings
    assert settings.model is not None
    task = next((name for name in study.tasks if name in TASKS), None)
    for text in study.schemes if task else ():
        with _collected(problems, "schemes", text), torch.random.fork_rng(devices=[]):
            start(Run(Condition(text, 0, str(task)), 0, None, settings=settings), None, None)
    if study.controls:
        say("no control with a wider feed-forward, and no static_mix: a checkpoint has neither")
    with _collected(problems, "model", settings.model):
        depth = read_config(settings.model).num_hidden_layers
        if study.depths not in ((depth,), ()):
            raise ValueError(f"depths {list(study.depths)} of a checkpoint with {depth} layers; leave them out")
        study = replace(study, depths=(depth,), controls=False, facts=Facts(model=_files(settings.model)))
    return study


def _added(text: str, depth: int, settings: Settings) -> int:
    """The parameters that a scheme adds to a new model, which is built for that."""
    name, options = parse_scheme(text)
    if taken := options.keys() & OF_THE_ENCODER:
        raise ValueError(f"scheme {text!r} sets {min(taken)!r}, which is of the encoder and not of a scheme")
    with torch.random.fork_rng(devices=[]):
        model = build_encoder(
            depth=depth,
            width=settings.width,
            heads=settings.heads,
            family=settings.family,
            ffn_ratio=settings.ffn_ratio,
            vocab_size=8,
            max_length=8,
            scheme=name,
            init=settings.init or "paper",
            **options,
        )
    return sum(parameter.numel() for parameter in scheme_parameters(model))


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
def _collected(problems: Problems, key: str, value: Any) -> Iterator[None]:
    """Meanwhile a `ValueError`, or what cannot be read, is a problem of that key and value."""
    try:
        yield
    except (ValueError, OSError) as error:
        problems.say(key, value, str(error))
