"""Deep narrow encoders from a few numbers: ordinary Hugging Face models, patched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from resformer.drawing import fresh_seed, generator, name_in_host, seeded
from resformer.errors import unknown
from resformer.grouped import GroupedLinear, bottleneck, group_feed_forward
from resformer.host import find_host
from resformer.layer import find
from resformer.patching import patch
from resformer.sizes import encoder_config, inner_width, matched_width

WEIGHT_INITS = ("bert", "xavier", "width_scaled")


def build_encoder(
    depth: int,
    width: int | None = None,
    scheme: str = "identity",
    *,
    family: str = "bert",
    heads: int | None = None,
    ffn_ratio: float = 4.0,
    match_parameters: int | str | None = None,
    cardinality: int | None = None,
    vocab_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 512,
    dropout: float = 0.1,
    num_labels: int = 2,
    weight_init: str = "bert",
    init: str = "paper",
    placement: str | None = None,
    auto: Any = AutoModel,
    attention: str | None = None,
    verify: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """A model of any depth and width with a residual scheme in it, with fresh weights.

    Args:
        depth: layers. width: D. heads: by default one for each 64 channels.
        family: an encoder or a decoder, such as "bert", "electra", "modernbert", "gpt2"; not an encoder-decoder.
        ffn_ratio: inner width of the feed-forward over D. Gated ones (ModernBERT, Llama) have three matrices of it.
        match_parameters: in place of the width: that at which the layers have most nearly so many parameters, or as
            many as those of "24x128"; see `matched_width`. `resformer.describe` tells how nearly.
        cardinality: C, to make each feed-forward of a BERT the sum of C parallel bottlenecks D to w to w to D
            (ResNeXt), with w as near to the parameters of the plain one as whole numbers go; `resformer.describe` tells
            the difference.
        vocab_size: by default that of the tokenizer, without one 30522.
        tokenizer: its special tokens become those of the configuration.
        max_length: tokens of the longest input. dropout: the one of all places. num_labels: of a classifier.
        weight_init: how the host draws its weights, the same for all schemes: "bert", N(0, 0.02²); "xavier",
            Xavier-normal matrices, token embeddings N(0, 1), position and segment embeddings N(0, 0.3²);
            "width_scaled", N(0, 0.02² · 768 / D), which gives a narrow net the branch strength of BERT-base. It takes
            the place of what a family does otherwise (GPT-2 and ModernBERT scale by depth, as schemes do).
        init: "paper", the scheme's own start, or "preserve", the plain host at first.
        auto: `AutoModel`, `AutoModelForSequenceClassification` (with num_labels), `AutoModelForMaskedLM` ...; with
            `AutoModelForCausalLM` an encoder becomes a decoder.
        attention: the implementation of transformers, "eager" or "sdpa"; by default its own choice.
        placement, verify, options: as for `resformer.patch`.

    Each weight is drawn on the CPU from a generator of its own, whose seed follows from the weight's name and from one
    number of torch's global generator. After equal `torch.manual_seed` two models share every weight that has the same
    name, shape and distribution in both, whatever the scheme, the number of layers or the head; a scheme draws from a
    generator of the site where it stands. The global generator is afterwards at the same place for all models.

    Raises a ValueError for sizes below 1, heads that do not divide the width, a cardinality that leaves no channel to a
    transform, a family that is not known or not of one stack, a head that it has not, or a tokenizer that does not fit.
    """
    if weight_init not in WEIGHT_INITS:
        raise unknown("weight_init", weight_init, WEIGHT_INITS)
    if cardinality is not None and family != "bert":
        raise ValueError(f"cardinality is for family 'bert', got family {family!r}; leave one of them out")
    if (width is None) == (match_parameters is None):
        raise ValueError(f"give width or match_parameters, got width={width!r}, match_parameters={match_parameters!r}")
    match = None
    if match_parameters is not None:
        match = matched_width(depth, match_parameters, family=family, heads=heads, ffn_ratio=ffn_ratio)
        width = match.width
    assert width is not None
    scaled = weight_init == "width_scaled" and isinstance(width, int) and width > 0
    std = 0.02 * math.sqrt(768 / width) if scaled else 0.02
    config = encoder_config(
        family,
        depth,
        width,
        heads=heads,
        ffn_ratio=ffn_ratio,
        vocab_size=vocab_size,
        max_length=max_length,
        dropout=dropout,
        num_labels=num_labels,
        std=std,
        tokenizer=tokenizer,
    )
    if cardinality is not None:
        bottleneck(width, inner_width(width, ffn_ratio), cardinality)
    if match is not None:
        config.matched_parameters = match.wanted  # `describe` counts what there is of them
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None or type(config) not in mapping:
        raise ValueError(
            f"family {family!r} has no {getattr(auto, '__name__', auto)!s}; give an auto class of transformers that "
            f"knows {type(config).__name__}, such as {', '.join(_heads(type(config)))}"
        )
    if auto is AutoModelForCausalLM and getattr(config, "is_decoder", None) is False:  # else it sees what it is to tell
        config.is_decoder = True
    device, seed = torch.get_default_device(), fresh_seed()
    with seeded(seed, "model"):
        model = auto.from_config(config, **({"attn_implementation": attention} if attention else {}))
        if cardinality is not None:
            group_feed_forward(model, cardinality)
    pads = model.get_input_embeddings().padding_idx
    if tokenizer is not None and pads is not None and pads != tokenizer.pad_token_id:  # MPNet
        raise ValueError(
            f"family {family!r} takes token {pads} for padding, whatever its configuration says, and the tokenizer "
            f"pads with {tokenizer.pad_token_id}; train one that pads with number {pads}, or take another family"
        )
    _draw(model, _xavier(model) if weight_init == "xavier" else lambda module: std, seed)
    return patch(model.to(device), scheme, init=init, placement=placement, verify=verify, **options)


def _heads(config: type) -> list[str]:
    """The auto classes for text that have a model of this configuration."""
    names = ("", "ForSequenceClassification", "ForMaskedLM", "ForCausalLM")
    autos = [getattr(transformers, f"AutoModel{name}") for name in names]
    return [auto.__name__ for auto in autos if config in auto._model_mapping]


@torch.no_grad()
def _draw(model: PreTrainedModel, std: Callable[[Any], float], seed: int) -> None:
    """Matrices and tables from N(0, std²), each from the generator of its name, in float32 whatever their precision."""
    for name, module in _drawn(model):
        numbers = generator(seed, f"{name_in_host(model, name)}.weight")
        drawn = torch.empty(module.weight.shape, dtype=torch.float32, device="cpu")
        module.weight.copy_(drawn.normal_(std=std(module), generator=numbers))
        _clear(module)


def _xavier(model: PreTrainedModel) -> Callable[[Any], float]:
    """The standard deviation of each module's weight; of a fused projection, such as GPT-2's of queries, keys and
    values, each matrix has that which it had by itself."""
    host, words = find_host(model), model.get_input_embeddings()
    fused = {
        id(find(layer, projection.path)): projection.parts
        for stack in host.stacks
        for layer in stack.layers
        for site in stack.sites(layer)
        for projection in site.points.values()
    }

    def std(module: Any) -> float:
        if isinstance(module, nn.Embedding):
            return 1.0 if module is words else 0.3
        if isinstance(module, GroupedLinear):
            return module.weight.shape[-1] ** -0.5
        into, out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        return math.sqrt(2 / (into + out / fused.get(id(module), 1)))

    return std


def _drawn(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules whose matrices are drawn: not norms, tables that are computed, or heads tied to the embeddings."""
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            if module.weight.requires_grad:
                yield name, module
        elif isinstance(module, nn.Linear | Conv1D | GroupedLinear) and id(module.weight) not in tied:
            yield name, module


def _clear(module: Any) -> None:
    """Biases start at 0, and so does the embedding of padding."""
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    if getattr(module, "padding_idx", None) is not None:
        nn.init.zeros_(module.weight[module.padding_idx])
