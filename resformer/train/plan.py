"""What a training step will take, measured before training: parameters, memory, operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from resformer.errors import unknown
from resformer.optim import scheme_parameters
from resformer.sizes import check_whole, longest_input

AUTOCAST = {"fp32": None, "no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # weights stay as they are
STATES = {"adamw": 2, "sgd": 0}  # numbers that an optimizer keeps for each that it trains
MIB = 2**20

Loss = Callable[[Any, int, int], Tensor]  # (model, examples, tokens) -> loss


@dataclass(frozen=True)
class Plan:
    """What one process holds and computes in a step, of micro-batches of `batch` inputs of `length` tokens."""

    batch: int
    length: int  # tokens of each input
    precision: str
    optimizer: str
    device: str
    parameters: int  # tied ones once
    non_embedding: int  # those outside of tables of embeddings, and so without a head that is tied to one
    scheme: int  # those that patching added
    trainable: int
    weights_mib: float  # with buffers
    gradients_mib: float
    optimizer_mib: float
    activations_mib: float  # what the forward of a micro-batch keeps for its backward, measured
    flops_per_token: float  # of matrix products, forward and backward, a multiplication and an addition each 1, counted

    @property
    def memory_mib(self) -> float:
        """All of it together; on top come what a layer needs only meanwhile, and what the libraries take."""
        return self.weights_mib + self.gradients_mib + self.optimizer_mib + self.activations_mib

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = f"a step of {self.batch} x {self.length} tokens, {self.precision}, {self.optimizer}, on {self.device}"
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="dim")
        table.add_column(justify="right")
        table.add_column(style="dim")
        table.add_row("parameters", f"{self.parameters:,}", f"{self.trainable:,} of them trained")
        table.add_row("  non-embedding", f"{self.non_embedding:,}")
        table.add_row("  of the scheme", f"{self.scheme:,}")
        table.add_row("weights", f"{self.weights_mib:,.1f} MiB")
        table.add_row("gradients", f"{self.gradients_mib:,.1f} MiB")
        table.add_row("optimizer", f"{self.optimizer_mib:,.1f} MiB")
        table.add_row("activations", f"{self.activations_mib:,.1f} MiB", "measured on one micro-batch")
        table.add_row("memory", f"{self.memory_mib:,.1f} MiB", "and what a layer needs meanwhile")
        table.add_row("operations", f"{self.flops_per_token:.3g} a token", "of matrix products, forward and backward")
        yield table


def plan(
    model: nn.Module, *, batch: int, length: int, precision: str, optimizer: str = "adamw", loss: Loss | None = None
) -> Plan:
    """Measure a training step of a model, on the device where it is, without training it.

    Args:
        batch: inputs of a micro-batch, of one process. length: tokens of each.
        precision: "fp32" (or "no"), "bf16" or "fp16"; by autocast, so weights, gradients and the optimizer's numbers
            are of the precision that the model has.
        loss: (model, batch, length) -> the loss of a micro-batch, where it is not `model_loss`, as of a masked language
            model whose head computes the masked tokens alone.

    One forward of a micro-batch in training mode gives the activations: what autograd keeps, each storage once, without
    the weights. A forward and backward of one input in evaluation mode, so without dropout and checkpointing, give the
    operations: elementwise ones are not counted. Weights, gradients, modes, buffers and random states are left as they
    were. Raises a ValueError for sizes below 1, names that are not known, a model without anything to train, and a
    micro-batch that does not fit on the device.
    """
    check_whole(batch=batch, length=length)
    if precision not in AUTOCAST:
        raise unknown("precision", precision, AUTOCAST)
    if optimizer not in STATES:
        raise unknown("optimizer", optimizer, STATES)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad; nothing would be trained")
    longest = longest_input(model) if isinstance(model, PreTrainedModel) else None
    if longest is not None and length > longest:
        raise ValueError(
            f"length is {length}, and this {type(model).__name__} takes inputs of {longest} tokens at most"
        )
    loss = loss or model_loss
    device = trainable[0].device
    dtype = AUTOCAST[precision]
    autocast = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    gradients = _bytes(trainable)
    try:
        with _unchanged(model, device), autocast:
            activations = _activations(model, lambda: loss(model.train(), batch, length))
            flops = _flops(lambda: loss(model.eval(), 1, length), trainable)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a micro-batch of {batch} x {length} tokens does not fit on {device}: {str(error).splitlines()[0]} Take "
            "fewer examples a micro-batch and accumulate gradients, shorter inputs, or gradient checkpointing"
        ) from error
    return Plan(
        batch=batch,
        length=length,
        precision=precision,
        optimizer=optimizer,
        device=str(device),
        parameters=sum(p.numel() for p in model.parameters()),
        non_embedding=sum(p.numel() for p in model.parameters() if id(p) not in tables),
        scheme=sum(p.numel() for p in scheme_parameters(model)),
        trainable=sum(p.numel() for p in trainable),
        weights_mib=_bytes([*model.parameters(), *model.buffers()]) / MIB,
        gradients_mib=gradients / MIB,
        optimizer_mib=STATES[optimizer] * gradients / MIB,
        activations_mib=activations / MIB,
        flops_per_token=flops / length,
    )


def model_loss(model: Any, batch: int, length: int) -> Tensor:
    """The loss of a model on a batch of full-length inputs, with a label for each input, or each token if it gives
    logits for each; of a model without a head the mean of its states."""
    device = next(model.parameters()).device
    ids = torch.arange(batch * length, device=device).view(batch, length) % (model.config.vocab_size - 1) + 1
    pad = model.config.pad_token_id  # any other token in its place
    ids = ids.masked_fill(ids == pad, 1 if pad != 1 else 2) if pad is not None else ids
    given = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if not hasattr(given, "logits"):
        return given[0].float().mean()
    logits = given.logits.flatten(0, -2).float()
    return nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=device))


def _activations(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of a forward, besides what the model has anyway."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # Its storage is kept, so that the address is not given to another. The tensor itself would keep the operation
        # whose output it is, and that in turn the tensor: never freed.
        return tensor.detach()

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    del result
    return sum(kept.values())


def _flops(loss: Callable[[], Tensor], trainable: list[nn.Parameter]) -> int:
    # the counter knows matrix products, and only some of the fused kernels of attention
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.autograd.grad(loss(), trainable, allow_unused=True)  # leaves what the parameters hold as it is
    return counter.get_total_flops()


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Modes, buffers and random states of a model are afterwards as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def _bytes(tensors: list[Any]) -> int:
    """Of all storages, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
