"""What other packages take for the same: x-transformers, and hyper-connections around BERT's own sublayers."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmark.nets import Subject, loss_of_logits, stock
from benchmark.steps import compare, stock_subject
from benchmark.suite import Bench, Row, Size, Suite, Values

STREAMS = 4


def x_transformer(size: Size, **options: Any) -> nn.Module:
    """An encoder of x-transformers of the shape of BERT's, with BERT's head."""
    from x_transformers import Encoder, TransformerWrapper

    config, head = (bert := stock(size)).config, bert.cls
    head.predictions.decoder.weight = nn.Parameter(head.predictions.decoder.weight.detach().clone())  # not tied: apart
    model = TransformerWrapper(
        num_tokens=size.vocabulary,
        max_seq_len=size.length,
        emb_dropout=size.dropout,
        to_logits=head,
        attn_layers=Encoder(
            dim=size.width,
            depth=size.depth,
            heads=config.num_attention_heads,
            attn_dim_head=size.width // config.num_attention_heads,
            attn_dropout=size.dropout,
            attn_sublayer_dropout=size.dropout,  # where BERT has them: on what a branch gives
            ff_sublayer_dropout=size.dropout,
            **options,
        ),
    )
    head.predictions.decoder.weight = model.token_emb.emb.weight  # as BERT ties it
    return model


class Attention(nn.Module):
    """BERT's attention with its output projection and dropout, after a norm."""

    def __init__(self, layer: Any):
        super().__init__()
        self.norm, self.attention, self.output = (
            layer.attention.output.LayerNorm,
            layer.attention.self,
            layer.attention.output,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.output.dropout(self.output.dense(self.attention(self.norm(x))[0]))


class FeedForward(nn.Module):
    """BERT's feed-forward with its dropout, after a norm."""

    def __init__(self, layer: Any):
        super().__init__()
        self.inner, self.output = layer.intermediate, layer.output
        self.norm = self.output.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        return self.output.dropout(self.output.dense(self.inner(self.norm(x))))


class Connected(nn.Module):
    """BERT's sublayers, pre-LN, joined by the package hyper-connections; `disable` is its plain residual."""

    def __init__(self, size: Size, functions: Any, **options: Any):
        super().__init__()
        bert = stock(size)
        connect, self.expand, self.reduce = functions(STREAMS, dim=size.width, **options)
        branches = [part(layer) for layer in bert.bert.encoder.layer for part in (Attention, FeedForward)]
        self.embeddings, self.head = bert.bert.embeddings, bert.cls
        self.sites = nn.ModuleList(connect(branch=branch, layer_index=i) for i, branch in enumerate(branches))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.expand(self.embeddings(input_ids=ids))
        for site in self.sites:
            x = site(x)
        return self.head(self.norm(self.reduce(x)))


def connected(size: Size, *, manifold: bool = False, **options: Any) -> nn.Module:
    import hyper_connections

    functions = "get_init_and_expand_reduce_stream_functions"
    kind = hyper_connections.mHC if manifold else hyper_connections.HyperConnections
    return Connected(size, getattr(kind, functions), **options)


def measure(row: Row, bench: Bench) -> Values:
    """Against the package's own plain residual, and against transformers' BERT."""
    model, options, plain = row.given

    def make(options: dict[str, Any], bench: Bench) -> Subject:
        return Subject(model(bench.size, **options), bench, loss_of_logits)

    return compare(partial(make, options), {"": partial(make, plain), " / HF": stock_subject}, bench)


def _x(name: str, *, asked: bool = False, note: str = "", **options: Any) -> Row:
    return Row(name, given=(x_transformer, options, {}), note=note, asked=asked)


def _hyper(name: str, **options: Any) -> Row:
    return Row(name, given=(connected, options, {"disable": True}))


SUITE = Suite(
    "peers",
    "a training step (forward, backward, AdamW) of other packages' residuals against their own plain default, and "
    "against the BERT of transformers; xt: x-transformers, whose plain default is pre-LN; hc: the package "
    "hyper-connections around the sublayers of that BERT, pre-LN, 4 streams",
    ("time", "saved", "time / HF", "saved / HF"),
    (
        _x("xt default", note="against a second copy of itself: the noise"),
        _x("xt scale_residual", scale_residual=True),
        _x("xt use_layerscale", use_layerscale=True),
        _x("xt gate_residual", gate_residual=True, note="a GRU cell a site"),
        _x("xt integrate_layers", integrate_layers=True, note="LIMe: depth-weighted views for q, k and v"),
        _x(
            "xt num_residual_streams=4",
            num_residual_streams=STREAMS,
            note="as mhc, 5 iterations",
        ),
        _x(
            "xt attn_aggregated_residuals",
            asked=True,
            attn_aggregated_residuals=True,
            note="takes more than 11 GB, so it is measured with --only",
        ),
        _hyper("hc plain", disable=True),
        _hyper("hc dynamic"),
        _hyper("hc mHC", manifold=True),
    ),
    measure,
    more=("FLOP", "FLOP / HF", "ms", "saved MiB", "peak MiB", "parameters"),
    packages=("x_transformers", "hyper_connections"),
)
