"""The study file that is kept beside study.json, for who comes back to the folder. Stdlib only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resformer.files import write_text_atomically
from resformer.study.plan import Study

KEPT = "study-*.toml"


def as_toml(study: Study) -> str:
    """A study file that asks for this study, its defaults written out: what is None and what is looked up is not."""
    axes = asdict(study)
    settings, pretraining = axes.pop("settings"), axes.pop("pretraining")
    del axes["facts"]
    tables = [_lines({**axes, **settings})]
    if pretraining is not None:
        tables.append("[pretraining]\n" + _lines(pretraining))
    return "\n".join(tables)


def file_name(text: str) -> str:
    """Under which it is kept: the studies of a folder have different ones, and one that goes on has the same."""
    return KEPT.replace("*", hashlib.sha256(text.encode()).hexdigest()[:8])


def keep(folder: Path, text: str) -> None:
    """Write the file, if it is not there."""
    if not (path := folder / file_name(text)).exists():
        write_text_atomically(path, text)


def _lines(values: dict[str, Any]) -> str:
    """Of a table; numbers, truth values, lists and texts are written in TOML as they are in JSON."""
    given = {key: value for key, value in values.items() if value is not None and value != ()}
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in given.items())
