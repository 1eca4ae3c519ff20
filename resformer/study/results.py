"""What a study left on disk, read back: runs finished, failed, and not finished. Stdlib only.

A study's folder holds study.json (the studies run into it, their commands and versions), a study file for each of
them, and runs/<id>/{config.json, log.txt, train.jsonl, result.json | error.json}; of a run that is finished,
result.json is enough.
"""

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from resformer.files import write_json_atomically
from resformer.provenance import provenance
from resformer.study.kept import as_toml, keep
from resformer.study.plan import Condition, Run, Study
from resformer.study.pretraining import Encoder
from resformer.study.settings import Settings

VERSION = 1  # of study.json and result.json
STUDY = "study.json"
MISSING = "is missing"
HALVED = "micro_batch_halved"  # flag of a run whose memory did not hold its batch: not quite what it is compared with
PAYLOAD = (
    "status", "score", "train_loss", "flags", "metrics", "loss_curve", "diagnostics", "cost", "provenance",
    "patched", "examples",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One run as it stands on disk. What a run that is not finished lacks is None or empty."""

    directory: Path
    config: dict[str, Any]  # the run's fields, flat: see `Run.config`
    status: str  # "ok" | "diverged" | "failed" (it raised, or its process died) | "unfinished"
    score: float | None = None  # of the task, on validation; None if diverged
    train_loss: float | None = None  # mean of the last steps
    flags: list[str] = field(default_factory=list)  # machine names of what to notice
    metrics: dict[str, float] = field(default_factory=dict)
    loss_curve: list[list[float]] = field(default_factory=list)  # [step, mean loss of the window ending there]
    diagnostics: dict[str, Any] = field(default_factory=dict)  # at initialisation
    cost: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    patched: dict[str, Any] | None = None  # how its model was patched: host, scheme, init, placement, layers, options
    examples: dict[str, int] = field(default_factory=dict)  # how many it was scored on, by split
    micro_batch_size: int | None = None  # examples at once, where memory did not hold the batch; then `HALVED` is set
    error: str | None = None  # why the run failed, in a line
    traceback: str | None = None
    problem: str | None = None  # why a result.json that is there does not count

    @property
    def finished(self) -> bool:
        """Whether the run has a valid result; a run that diverged has."""
        return self.status in ("ok", "diverged")


def open_study(output: Path, study: Study, command: str | None = None, file: str | None = None) -> None:
    """Make the folder, or take up the study in it, and record in study.json what is to be run, with what.

    The text of the study file is kept beside it; None: one that asks for the same is written. Raises `ValueError` if
    `output` holds something else than a study, and then changes nothing.
    """
    if not output.exists():
        output.mkdir(parents=True, exist_ok=True)
    made_with = provenance()
    started = made_with.pop("finished")
    # Through JSON and back, so that tuples compare equal to the lists that are read.
    entry = json.loads(json.dumps({"study": asdict(study), "command": command, "provenance": made_with}))
    add_entries(output, [{**entry, "started": started}])
    keep(output, as_toml(study) if file is None else file)


def check_output(output: Path) -> None:
    """Raise `ValueError` if this is no folder to write a study into: a file, one that holds something else, or a study
    that cannot be read. One with runs and no study.json is: that is how a damaged one is mended."""
    choose = "choose a new or empty folder, or one that holds a study"
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {str(output)!r} is a file; {choose}")
    theirs = output.is_dir() and any(output.iterdir()) and not any(output.glob("runs/*/config.json"))
    if theirs and not (output / STUDY).is_file():
        raise ValueError(f"output {str(output)!r} holds no study (no {STUDY}); {choose}")
    for entry in read_study(output) if (output / STUDY).is_file() else ():
        Study.read(entry["study"] if isinstance(entry, dict) and isinstance(entry.get("study"), dict) else {})


def add_entries(output: Path, entries: list[dict[str, Any]]) -> None:
    """Add to the study.json of a study, or of an empty folder, those that it does not have, whenever they started."""
    with _alone(output):  # the shards of a study are all started at once
        check_output(output)
        known = read_study(output) if (output / STUDY).is_file() else []
        united = list(known)
        for entry in entries:
            if not any({**other, "started": None} == {**entry, "started": None} for other in united):
                united.append(entry)
        if len(united) > len(known):
            united.sort(key=lambda entry: str(entry.get("started")))
            write_json_atomically(output / STUDY, {"version": VERSION, "studies": united})


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Meanwhile no other process is in here; where a file system has no locks, there may be."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read_study(output: Path) -> list[dict[str, Any]]:
    """What was run into the folder, oldest first: {"study", "command", "provenance", "started"}.

    Raises `ValueError` if the folder does not hold a study.
    """
    output = Path(output)
    path = output / STUDY
    if not path.is_file():
        what = "is no folder" if output.exists() else "does not exist"
        what = f"holds no study (no {STUDY})" if output.is_dir() else what
        raise ValueError(f"{str(output)!r} {what}; give the folder of a study, the --output of its `resformer compare`")
    content, problem = _load(path)
    if problem is None and not (isinstance(content.get("studies"), list) and content["studies"]):
        problem = "lists no studies"
    if problem:
        raise ValueError(
            f"{str(path)!r} {problem}; remove it, and start `resformer compare` with the study file beside it into the "
            "same folder: the runs there are not lost"
        )
    return content["studies"]


def read_results(output: Path) -> list[Result]:
    """Every run of the study, finished or not, in the order of their ids.

    A result.json that is cut off, is no result, has another version or is of another run than its folder is never
    counted: its run is "unfinished" and `problem` says why. A folder without a readable configuration is left out with
    a warning that names it. Raises `ValueError` if `output` does not hold a study.
    """
    read_study(output)
    directories = sorted(path for path in (Path(output) / "runs").glob("*") if path.is_dir())
    results = []
    for directory in directories:
        result = read_result(directory)
        if result.config:
            results.append(result)
        else:
            warnings.warn(f"run {directory.name}: no readable config.json, left out", stacklevel=2)
    return results


def read_result(directory: Path) -> Result:
    """The run in one directory; `config` is empty if that cannot be read."""
    config, _ = _load(directory / "config.json", version=None)
    payload, problem = _load(directory / "result.json")
    if problem is None:
        problem = _fault(payload) or _foreign(payload["config"], directory.name)
    if problem is None:
        named = {name: payload[name] for name in PAYLOAD if name in payload}
        if micro := payload.get("settings", {}).get("micro_batch_size"):
            named |= {"micro_batch_size": micro, "flags": [*named.get("flags", ()), HALVED]}
        return Result(directory, {**config, **payload["config"]}, **named)
    if problem == MISSING:
        problem = None
        error, unreadable = _load(directory / "error.json", version=None)
        if unreadable is None:
            text = str(error.get("error", "unknown"))
            return Result(directory, config, "failed", error=text, traceback=error.get("traceback"))
    else:
        problem = f"result.json {problem}"
    return Result(directory, config, "unfinished", problem=problem)


def finished(directory: Path) -> bool:
    """Whether the run has a valid result.json: the one thing that says that it is done."""
    return read_result(directory).finished


def _load(path: Path, version: int | None = VERSION) -> tuple[dict[str, Any], str | None]:
    """The object in a file, or an empty one and what is wrong with the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_json)
    except FileNotFoundError:
        return {}, MISSING
    except (OSError, ValueError) as error:
        return {}, f"cannot be read ({type(error).__name__}: {error})"
    if not isinstance(content, dict):
        return {}, "holds no JSON object"
    if version is not None and content.get("version") != version:
        return {}, f"has version {content.get('version')!r}, this resformer reads {version}"
    return content, None


def _fault(payload: dict[str, Any]) -> str | None:
    """What keeps a result from being counted, or None."""
    if not isinstance(payload.get("config"), dict):
        return "has no config"
    if payload.get("status") not in ("ok", "diverged"):
        return f"has status {payload.get('status')!r}, not 'ok' or 'diverged'"
    if payload["status"] == "ok" and not isinstance(payload.get("score"), int | float):
        return f"has score {payload.get('score')!r}, not a number"
    if not isinstance(payload.get("train_loss"), int | float | None):
        return f"has train_loss {payload['train_loss']!r}, not a number"
    kinds = {"flags": list, "loss_curve": list, "metrics": dict, "diagnostics": dict, "cost": dict, "settings": dict}
    for name, kind in kinds.items():
        if not isinstance(payload.get(name, kind()), kind):
            return f"has no {name}"
    return None


def run_id(config: Mapping[str, Any]) -> str | None:
    """The id of the run or encoder that has this configuration, whatever else is in it; None if it is of none."""
    if "objective" in config:
        try:
            return Encoder.read(config).id
        except (KeyError, TypeError, ValueError):
            return None
    run = run_of(config)
    return None if run is None else run.id


def run_of(config: Mapping[str, Any]) -> Run | None:
    """The run that has this configuration, whatever else is in it; None if it is of none."""
    names = {one.name for one in fields(Settings)} & config.keys()
    if "epochs" in names:
        names -= {"steps"}  # so many they came to
    own = {one.name for one in fields(Run)} & config.keys()
    try:
        condition = Condition(**{one.name: config[one.name] for one in fields(Condition) if one.name in config})
        settings = Settings(**{name: config[name] for name in names})
        run = Run(condition, **{name: config[name] for name in own}, settings=settings)
        run.id  # noqa: B018  what has no id is no run
    except (TypeError, ValueError, AttributeError):
        return None
    return run


def _foreign(config: dict[str, Any], name: str) -> str | None:
    """What keeps a result from being that of the run which its folder is named after, or None."""
    found = run_id(config)
    if found == name:
        return None
    return "is of no run that this resformer knows" if found is None else f"is of another run, {found}"


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
