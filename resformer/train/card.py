"""The model card of a run: README.md beside the saved weights, in the form that the hub reads."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from resformer.data.layouts import official
from resformer.data.metrics import METRICS
from resformer.data.tasks import TASKS
from resformer.schemes import schemes
from resformer.train.flags import FLAGS

SPLITS = {"_mm": "validation_mismatched"}  # by the ending of a metric's name
HUB_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}  # ours -> the hub's
OBJECTIVES = {  # of a run's config -> the hub's name of the task, the class that loads the model
    "mlm": ("fill-mask", "AutoModelForMaskedLM"),
    "clm": ("text-generation", "AutoModelForCausalLM"),
    None: ("text-classification", "AutoModelForSequenceClassification"),
}
ELSEWHERE = {  # entries of the config that are no hyper-parameters
    "model", "task", "scheme", "init", "placement", "family", "depth", "width", "train_file", "validation_file",
}  # fmt: skip
HUB_ID = re.compile(r"\w[\w.-]+(/[\w.-]+)?")


def model_card(
    result: Mapping[str, Any],
    *,
    base: str | None = None,
    host: str | None = None,
    scheme: str | None = None,
    command: str | None = None,
    name: str = "model",
    path: str = "path/to/this/folder",
) -> str:
    """The text of README.md: front matter in YAML, then what the model is, its data, its settings, its results, how to
    load it, and what it was made with. What `result` lacks is left out.

    result    of `finetune` or a pre-training run: config, metrics, score, flags, cost, provenance ...
    base      hub id or folder of what was trained; None: `config["model"]`, without which it is from scratch
    host      what the model is, such as "BertForSequenceClassification, 6 layers, width 384"
    scheme    that the model carries; None: `config["scheme"]`
    command   that made it
    name      of the model, for the hub's table of results
    path      from which the example loads it
    """
    config = dict(result.get("config") or {})
    base = base or config.get("model")
    config["scheme"] = scheme or config.get("scheme")
    settings = {key: value for key, value in config.items() if key not in ELSEWHERE and value is not None}
    sections = {
        "Model": _model(config, base, host),
        "Data": _data(config),
        "Settings": _table(("setting", "value"), settings),
        "Results": _results(result),
        "How to load it": _loading(config, path),
        "Made with": _provenance(result, command),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"---\n{_front_matter(result, config, base, name)}\n---\n\n# {_plain(name)}\n\n{body}\n"


def _front_matter(result: Mapping[str, Any], config: Mapping[str, Any], base: str | None, name: str) -> str:
    task = TASKS.get(config.get("task", ""))
    task_type, _ = OBJECTIVES.get(config.get("objective"), OBJECTIVES[None])
    published = task is not None and not task.builtin
    data = official(task).hub if task is not None and published else None
    found = {}
    for key, metric in (result.get("metrics") or {}).items():
        kind, split = key, task.splits[0] if task else "validation"
        for ending, other in SPLITS.items():
            if key.endswith(ending):
                kind, split = key.removesuffix(ending), other
        number = _number(metric)
        if number is not None and (kind in METRICS or kind == "perplexity"):
            found[key] = (HUB_METRICS.get(kind, kind), split, number)
    dataset = str(config.get("task") or "text")
    return ModelCardData(
        library_name="transformers",
        tags=["resformer", *([config["scheme"].partition(":")[0]] if config.get("scheme") else [])],
        pipeline_tag=task_type,
        base_model=base if base is not None and HUB_ID.fullmatch(base) and not Path(base).exists() else None,
        datasets=[data] if data else None,
        metrics=list(dict.fromkeys(kind for kind, _, _ in found.values())) or None,
        model_name=name if found else None,  # the hub wants results under a name
        eval_results=[
            EvalResult(
                task_type=task_type,
                dataset_type=data or dataset,
                dataset_name=dataset,
                dataset_config=dataset if data else None,
                dataset_split=split,
                metric_type=kind,
                metric_name=key,
                metric_value=number,
            )
            for key, (kind, split, number) in found.items()
        ]
        or None,
    ).to_yaml()


def _model(config: Mapping[str, Any], base: str | None, host: str | None) -> str:
    built = {key: config[key] for key in ("family", "depth", "width") if config.get(key) is not None}
    made = host or ", ".join(f"{key} {value}" for key, value in built.items())
    lines = [
        f"- host: {_code(made)}" if made else "",
        f"- trained from: {_code(base)}" if base else "- trained from scratch",
    ]
    if scheme := config.get("scheme"):
        lines.append(
            f"- residual scheme: {_code(scheme)}" + (f", init {_code(i)}" if (i := config.get("init")) else "")
        )
        if placement := config.get("placement"):
            lines.append(f"- norms: {_code(placement)}")
        if known := schemes().get(scheme.partition(":")[0]):
            card = known.card()
            lines.append(
                f"\n{_plain(card['summary'])}\n\n```text\n{card['equation']}\n```\n\n{_plain(card['reference'])}"
            )
    else:
        lines.append("- residual connections: the host's own")
    return "\n".join(line for line in lines if line)


def _data(config: Mapping[str, Any]) -> str:
    files = [Path(str(config[key])).name for key in ("train_file", "validation_file") if config.get(key)]
    if files:
        return f"The user's own files {' and '.join(map(_code, files))}."
    if (task := TASKS.get(config.get("task", ""))) is not None:
        return f"{_code(task.name)}: {_plain(task.summary)} ({_plain(task.reference)})."
    return f"{_code(config['task'])}." if config.get("task") else ""


def _results(result: Mapping[str, Any]) -> str:
    parts = []
    if result.get("status") not in (None, "ok"):
        parts.append(f"The run ended as {_code(result['status'])}.")
    rows = {key: metric for key, metric in (result.get("metrics") or {}).items() if _number(metric) is not None}
    for key in ("score", "train_loss"):
        if _number(result.get(key)) is not None:
            rows[key] = result[key]
    parts.append(_table(("metric", "value"), {key: f"{_number(metric):.4f}" for key, metric in rows.items()}))
    parts += [f"- **{_plain(flag)}**: {_plain(FLAGS.get(flag, 'flagged'))}" for flag in result.get("flags") or ()]
    return "\n\n".join(part for part in parts if part)


def _loading(config: Mapping[str, Any], path: str) -> str:
    _, auto = OBJECTIVES.get(config.get("objective"), OBJECTIVES[None])
    if config.get("scheme"):
        lines = [
            "import resformer",
            f"from transformers import {auto}",
            f"model = resformer.from_pretrained({json.dumps(path)}, {auto})",
        ]
    else:
        lines = [f"from transformers import {auto}", f"model = {auto}.from_pretrained({json.dumps(path)})"]
    return _fenced("\n".join(lines), "python")


def _provenance(result: Mapping[str, Any], command: str | None) -> str:
    made = dict(result.get("provenance") or {})
    commit, dirty = made.pop("git", None), made.pop("dirty", None)
    if commit:
        made["commit"] = f"{commit}{' with changes' if dirty else ''}"
    made |= {key: value for key, value in (result.get("cost") or {}).items() if not isinstance(value, dict | list)}
    parts = [_table(("", "value"), {key: value for key, value in made.items() if value is not None})]
    return "\n\n".join(part for part in [_fenced(command, "bash") if command else "", *parts] if part)


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> str:
    """Markdown; nothing for no rows."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(header)} |", "|---|---|"]
    for key, value in rows.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"| {_cell(key)} | {_cell(shown)} |")
    return "\n".join(lines)


def _number(metric: Any) -> float | None:
    """A metric's value, given alone or as `{"value": ...}`; None if it is none, or not finite."""
    value = metric.get("value") if isinstance(metric, Mapping) else metric
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _plain(text: Any) -> str:
    """On one line, with all that Markdown and HTML would take as theirs escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(str(text).split()))


def _code(text: Any) -> str:
    """A code span on one line, in more backticks than it holds."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _cell(text: Any) -> str:
    """A code span in a table, where a bar ends the cell even within code."""
    return _code(text).replace("|", "\\|")


def _fenced(text: str, language: str) -> str:
    """A code block, in a longer fence than any that it holds."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"
