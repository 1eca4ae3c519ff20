"""What is said of a run in result.json, whatever it trained on."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import HfApi
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resformer.files import finite, write_json_atomically, write_text_atomically
from resformer.layer import settings_of
from resformer.optim import scheme_parameters
from resformer.provenance import provenance
from resformer.train.card import model_card
from resformer.train.cost import peak_memory_mb
from resformer.train.flags import spiked
from resformer.train.job import Job, Outcome
from resformer.train.loop import WINDOW
from resformer.train.settings import Settings

VERSION = 1  # of result.json
LOWER = ("loss", "loss_mm", "perplexity", "unigram_loss", "context_free_loss")


def describe_run(outcome: Outcome, job: Job, model: PreTrainedModel, settings: Settings) -> dict[str, Any]:
    """Status, losses, score and metrics of the last evaluation, the best one, cost and provenance.

    `train_loss` is the mean of the last 25 steps, `loss_curve` [last step, mean loss] of each window of 25 steps; the
    window in which a run diverged is left out.
    """
    losses = [step.loss for step in outcome.steps]
    last = outcome.last if outcome.status == "ok" else None
    train_loss = fmean(losses[-WINDOW:]) if losses else None
    flags = ["gradient_spikes"] if spiked([step.grad_norm for step in outcome.steps]) else []
    if last is not None and train_loss is not None:
        flags += job.flags(last, train_loss)
    unit, each = job.units
    return {
        "version": VERSION,
        "config": job.config,
        "settings": asdict(settings),  # also what the outcome does not depend on
        "patched": settings_of(model),
        "status": outcome.status,
        "flags": flags,
        "notes": outcome.notes,
        "score": last.score if last else None,
        "metrics": last.metrics if last else {},
        "examples": last.counts if last else {},  # that they were measured on
        "higher_is_better": {name: name not in LOWER for name in last.metrics} if last else {},
        "best": outcome.best,
        "train_loss": train_loss,
        "loss_curve": _curve(losses),
        "cost": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "scheme_parameters": sum(parameter.numel() for parameter in scheme_parameters(model)),
            "steps": len(outcome.steps),
            "tokens": round(len(outcome.steps) * job.tokens),  # of text, padding left out
            "flops": 6 * _computing(model, job.predicted) * len(outcome.steps) * job.tokens,  # arXiv:2001.08361, (2.1)
            "seconds": outcome.seconds,  # of training, with evaluations on the way, over all sittings
            f"{unit}_per_second": len(outcome.steps) * each / outcome.seconds if outcome.seconds else None,
            "peak_memory_mb": peak_memory_mb(job.accelerator.device),
        },
        "provenance": provenance() | {"device": _device(job.accelerator), "processes": job.accelerator.num_processes},
    }


def finish(
    result: dict[str, Any],
    output: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    accelerator: Accelerator,
    save_model: bool,
    push_to: str | None = None,
) -> dict[str, Any]:
    """Write model/ with its card, if asked and the run ended well, and then result.json, by which a run is finished;
    nothing of a run that was stopped. Returns the result as it was written."""
    result = finite(result)
    saves = save_model and result["status"] == "ok"
    weights = _whole(model) if saves else None
    if accelerator.is_main_process and result["status"] != "stopped":
        if saves:
            model.save_pretrained(output / "model", state_dict=weights)
            tokenizer.save_pretrained(output / "model")
            settings, shape = settings_of(model), model.config
            card = model_card(
                result,
                base=result["config"].get("model"),
                host=f"{type(model).__name__}, {shape.num_hidden_layers} layers, width {shape.hidden_size}",
                scheme=settings["scheme"] if settings else None,
                command=shlex.join(["resformer", *sys.argv[1:]]) if Path(sys.argv[0]).name == "resformer" else None,
                name=output.name,
            )
            write_text_atomically(output / "model" / "README.md", card)
        write_json_atomically(output / "result.json", result)
        if push_to is not None and (output / "model").is_dir():
            HfApi().create_repo(push_to, exist_ok=True)
            HfApi().upload_folder(repo_id=push_to, folder_path=output / "model")
    accelerator.wait_for_everyone()
    return result


def _whole(model: PreTrainedModel) -> dict[str, Any] | None:
    """The weights of a model that is sharded over processes, on the main one; None where it is not sharded."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def merged(describe: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Both, if they agree; else a `ValueError`."""
    wrong = [
        f"{key} {value!r}, the run has {config[key]!r}"
        for key, value in describe.items()
        if config.get(key, value) != value
    ]
    if wrong:
        raise ValueError(f"describe contradicts the run: {'; '.join(wrong)}")
    return describe | config


def _computing(model: PreTrainedModel, predicted: float) -> float:
    """Parameters that are multiplied with a token, on average: not the tables of embeddings, and the matrix of logits
    only with the tokens that are predicted. Products of queries, keys and values are left out."""
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    head = model.get_output_embeddings()
    logits = [] if head is None else [head.weight]
    left_out = tables | {id(p) for p in logits}
    body = sum(p.numel() for p in model.parameters() if id(p) not in left_out)
    return body + predicted * sum(p.numel() for p in logits)


def _curve(losses: list[float]) -> list[list[float]]:
    windows = [(end, losses[end - WINDOW : end]) for end in range(WINDOW, len(losses) + 1, WINDOW)]
    if len(losses) % WINDOW:
        windows.append((len(losses), losses[-(len(losses) % WINDOW) :]))
    return [[end, fmean(window)] for end, window in windows if all(map(math.isfinite, window))]


def _device(accelerator: Accelerator) -> str:
    cuda = accelerator.device.type == "cuda"
    return torch.cuda.get_device_name(accelerator.device) if cuda else f"{accelerator.device.type}"
