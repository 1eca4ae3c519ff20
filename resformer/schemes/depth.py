"""Schemes that look back: what a layer reads is made of more than the last state."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from resformer.schemes.base import Branch, Norm, Place, Scheme, Stream, count, flag, register, scalar
from resformer.schemes.sums import attended, weighted

History = tuple[Tensor, ...]


@register("denseformer")
class DenseFormer(Scheme):
    """Depth-weighted average: after a layer, a learned mixture of all layer outputs so far.

    x ← Σ_j a_ij X_j, j ≤ i, where X_0 is the embedding and X_i the output of layer i

    Parameters  a_i: (i + 1) after layer i; L (L + 3) / 2 in all with dilation and period 1
    Init        a_ii = 1 and 0 elsewhere: the host, bit for bit, with either init
    Options     dilation=1: only every k-th earlier output, counted back from i; period=1: only after every p-th layer
    Reference   Pagliardini et al. 2024, arXiv:2402.02622
    """

    preserves: ClassVar[tuple[str, ...]] = ("post", "pre")

    def __init__(self, place: Place, *, init: str = "preserve", dilation: int = 1, period: int = 1):
        super().__init__(place, init=init)
        self.dilation, self.period = count("dilation", dilation), count("period", period)
        self.a: Any = None
        layer = place.layer + 1  # outputs are numbered from 1; 0 is the embedding
        if place.last and layer % self.period == 0:
            self.a = self.weights(layer // self.dilation + 1)

    def weights(self, sources: int) -> Any:
        return nn.Parameter(torch.eye(sources)[-1])

    def start(self, h: Tensor) -> Stream:
        return h, h  # the stream proper, then the history X_0 ...

    def read(self, s: History) -> Tensor:
        return s[0]

    def write(self, s: History, y: Tensor, norm: Norm) -> Stream:
        x, history = norm(s[0] + y), s[1:]
        if not self.place.last:
            return x, *history
        history = (*history, x)
        if self.a is not None:
            x = weighted(self.a, history[::-1][:: self.dilation][::-1])  # X_i, X_i-k, X_i-2k ..., oldest first
        return x, *history

    def finish(self, s: History, norm: Norm) -> Tensor:
        return norm(s[0])


@register("static_mix")
class StaticMix(DenseFormer):
    """DenseFormer with weights that are drawn once and never learned: the control that costs as much.

    x ← Σ_j a_ij X_j, j ≤ i, a_i drawn uniformly and divided by its sum

    Parameters  none; a_i are constants that follow from the seed, the layer and the number of layers
    Init        none
    Options     seed=0; dilation=1 and period=1 as in denseformer (larger than the depth, they leave the host as it is)
    Reference   a control for arXiv:2402.02622 (denseformer), in no paper
    """

    preserves = ()

    def __init__(self, place: Place, *, init: str = "preserve", seed: int = 0, dilation: int = 1, period: int = 1):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"option 'seed' must be a whole number in [0, 2^63), got {seed!r}")
        self.seed = seed  # before the weights are made
        super().__init__(place, init=init, dilation=dilation, period=period)

    def weights(self, sources: int) -> Any:
        generator, layers = torch.Generator("cpu").manual_seed(self.seed), self.place.layers
        table = torch.rand(layers, layers + 1, generator=generator, dtype=torch.float64, device="cpu")
        row = table[self.place.layer, :sources]
        return tuple((row / row.sum()).tolist())  # not a buffer: nothing to load, cast or move


@register("dlcl")
class DLCL(Scheme):
    """Dynamic linear combination of layers: each layer reads a learned mixture of all normed outputs before it.

    x ← Σ_k W_lk N'_k(y_k), k ≤ l, after layer l with output y_l; the embedding y_0 is not normed

    Parameters  W_l: (l + 1) after layer l, W_00: (1) on the embedding; N'_l: a LayerNorm (2 D) for each layer
    Init        paper: W_lk = 1 / (l + 1), the mean; N' = LayerNorm at (1, 0); pre-LN inside the layers
    Options     none
    Reference   Wang et al. 2019, arXiv:1906.01787
    Differs     the pre-norm variant only; the paper's post-norm one mixes first and norms the sum
    """

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        if place.opens:
            self.open = scalar(1.0)
        if place.last:
            sources = place.layer + 2
            self.a = nn.Parameter(torch.full((sources,), 1 / sources))
            self.norm = nn.LayerNorm(place.width)

    def norms(self) -> set[str]:
        return {"pre", "final"}

    def start(self, h: Tensor) -> Stream:
        return self.open * h, h

    def read(self, s: History) -> Tensor:
        return s[0]

    def write(self, s: History, y: Tensor, norm: Norm) -> Stream:
        x, history = s[0] + y, s[1:]
        if not self.place.last:
            return x, *history
        history = (*history, self.norm(x))
        return weighted(self.a, history), *history

    def finish(self, s: History, norm: Norm) -> Tensor:
        return norm(s[0])


@register("attn_residual")
class AttnResidual(Scheme):
    """Attention over depth: a sublayer reads a softmax mixture of the embedding and all branch outputs so far.

    h = Σ_i a_i v_i, a = softmax_i(w · RMS(v_i)), v_0 the embedding; v ← (v, F(h))

    Parameters  w: (D) one query a site, but for the first, which sees the embedding alone; one for the readout
    Init        w = 0, the mean of the sources; preserve: the mixture is multiplied by their number, which is the sum
                that a pre-LN host carries, also where the embedding is small beside the eps of a norm
    Options     blocks=None: all outputs; or into how many blocks of layers to divide the stack (the paper takes about
                8; at most one for each layer): sources are then the sums of finished blocks and of the one at hand
    Reference   Kimi Team 2026, arXiv:2603.15031
    Differs     the keys' RMS norm has no gain of its own, which would only multiply w. Blocks are as equal as whole
                layers allow; the paper's last block takes what the division leaves
    """

    preserves = ("pre",)
    placement = "pre"

    def __init__(self, place: Place, *, init: str = "preserve", blocks: int | None = None):
        super().__init__(place, init=init)
        self.blocks = None if blocks is None else count("blocks", blocks)

        def block(layer: int) -> int:
            return layer * (self.blocks or place.layers) // place.layers

        opens_block = place.first and (place.layer == 0 or block(place.layer) != block(place.layer - 1))
        self.opens_source = blocks is None or opens_block
        self.query = None if place.opens else nn.Parameter(torch.zeros(place.width))
        self.last_query = nn.Parameter(torch.zeros(place.width)) if place.closes else None

    def formula(self) -> str:
        gain = "n " if self.init == "preserve" else ""
        blocks = min(self.blocks or 0, self.place.layers)
        sources = f"for n sources: the sums of {blocks} blocks so far" if blocks else "for n sources"
        return f"h = {gain}Σ_i a_i v_i, a = softmax_i(w · RMS(v_i)) {sources}; v ← (v, F(h))"

    def start(self, h: Tensor) -> Stream:
        return (h,)

    def read(self, s: History) -> Tensor:
        return s[0] if self.query is None else self.attend(self.query, s)

    def write(self, s: History, y: Tensor, norm: Norm) -> Stream:
        y = norm(y)
        return (*s, y) if self.opens_source else (*s[:-1], s[-1] + y)

    def finish(self, s: History, norm: Norm) -> Tensor:
        if self.last_query is not None:
            return norm(self.attend(self.last_query, s))
        total = sum(s[1:], s[0])  # shown as the hidden state of a layer; no site reads it
        return norm(total if self.init == "preserve" else total / len(s))

    def attend(self, query: Tensor, sources: History) -> Tensor:
        h, a = attended(query, sources, float(len(sources)) if self.init == "preserve" else 1.0)
        self.show(a=a)
        return h


@register("depth_lstm")
class DepthLSTM(Scheme):
    """An LSTM over depth: its steps are the sublayers, its input their outputs, its hidden state the stream.

    x ← σ(o) ⊙ c, c ← σ(f) ⊙ c + σ(i) ⊙ tanh(g), [i f o g] = N'(W [F(x); x] + b)

    Parameters  W: (4D 2D), b: (4D), N': gain and shift (4D) for each site; the cell c rides in the stream
    Init        paper: W Xavier-uniform, b = 0, N' at (1, 0) but a forget gate that starts open, at σ(1); c starts as
                the embedding; the host's norms are left out, N' stands for them
    Options     none
    Reference   Xu et al. 2020, arXiv:2007.06257
    Differs     the cell (one norm over all gates, no tanh on the way out) is the authors' public recurrent cell, whose
                norm has an eps of its own; that the forget gate starts open, how c starts and that sites share no
                weights could not be checked in the paper. Its last form also computes g by the layer's feed-forward
                net, which here stays a sublayer
    """

    placement = "none"

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        d = place.width
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(4 * d, 2 * d)))
        self.b, self.gain = nn.Parameter(torch.zeros(4 * d)), nn.Parameter(torch.ones(4 * d))
        self.shift = nn.Parameter(torch.zeros(4 * d).index_fill(0, torch.arange(d, 2 * d), 1.0))

    def start(self, h: Tensor) -> Stream:
        return h, h

    def read(self, s: History) -> Tensor:
        return s[0]

    def write(self, s: History, y: Tensor, norm: Norm) -> Stream:
        x, c = s
        z = functional.linear(torch.cat([y, x], dim=-1), self.weight, self.b)
        i, f, o, g = functional.layer_norm(z, z.shape[-1:], self.gain, self.shift).chunk(4, dim=-1)
        self.show(i=torch.sigmoid(i), f=torch.sigmoid(f), o=torch.sigmoid(o))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return norm(torch.sigmoid(o) * c), c

    def finish(self, s: History, norm: Norm) -> Tensor:
        return norm(s[0])


@register("laurel")
class LAuReL(Scheme):
    """Learned augmented residual: weights on both sides, a low-rank map beside the identity, earlier states.

    x ← α F(x) + β (x + Σ_j g_j B A x_j), x_j the state j sites back, j < previous; [α β] = 2 softmax(w)

    Parameters  for each site w: (2) with weights (RW), A: (r D), B: (D r) with a rank (LR), g: (previous) with earlier
                states (PA); the first sites have fewer states behind them, and a g for each
    Init        A_ji = 1 / sqrt(r D) where i mod r = j, else 0, and B = 0, as in the paper's language models; w = 0, so
                α = β = 1; g = 1, or 0 without a rank: the plain residual
    Options     weights=True; rank=4 (r; the paper has 4 to 64; 0: no low-rank map); previous=0 (how many states, x
                itself the first; 0: only x, without a g)
    Reference   Menghani et al. 2025, arXiv:2411.07501, equations 1 to 6
    Differs     the paper bounds α and β by "softmax or sigmoid" and leaves their start open; the factor 2 makes it the
                plain residual; nor does it say how g starts. The states of a site share B A, and x is kept in every
                combination of the parts
    """

    preserves = ("post", "pre")

    def __init__(self, place: Place, *, init: str = "preserve", weights: bool = True, rank: int = 4, previous: int = 0):
        super().__init__(place, init=init)
        self.weights = flag("weights", weights)
        self.rank, self.previous = count("rank", rank, low=0), count("previous", previous, low=0)
        if not (weights or rank or previous):
            raise ValueError(
                "scheme 'laurel' is the plain residual with weights=False, rank=0 and previous=0; set one of them"
            )
        d = place.width
        self.w = nn.Parameter(torch.zeros(2)) if weights else None
        if rank > d:
            raise ValueError(f"option 'rank' must be at most the width {d}, got {rank!r}")
        self.A = nn.Parameter(torch.eye(rank).repeat(1, d)[:, :d] / math.sqrt(rank * d)) if rank else None
        self.B = nn.Parameter(torch.zeros(d, rank)) if rank else None
        states = min(previous, place.index + 1)
        self.g = nn.Parameter(torch.full((states,), 1.0 if rank else 0.0)) if previous else None

    def formula(self) -> str:
        map_, one = ("B A ", " + B A x") if self.rank else ("", "")
        kept = f"x + Σ_j g_j {map_}x_j, j < {self.previous}" if self.previous else f"x{one}"
        return f"x ← α F(x) + β ({kept}), [α β] = 2 softmax(w)" if self.weights else f"x ← F(x) + {kept}"

    def start(self, h: Tensor) -> Stream:
        return (h,)  # x, then the states before it, newest first

    def read(self, s: History) -> Tensor:
        return s[0]

    def write(self, s: History, y: Tensor, norm: Norm) -> Stream:
        x = s[0]
        extra = x if self.g is None else weighted(self.g, s)
        if self.A is not None and self.B is not None:
            x = x + functional.linear(functional.linear(extra, self.A), self.B)
        elif self.g is not None:
            x = x + extra
        if self.w is not None:
            a, b = 2 * self.w.softmax(0)
            self.show(α=a, β=b)
            y, x = a * y, b * x
        return norm(x + y), *s[: max(self.previous - 1, 0)]

    def finish(self, s: History, norm: Norm) -> Tensor:
        return norm(s[0])


@register("value_residual")
class ValueResidual(Scheme):
    """Value residual learning: the attention of every layer also sees the values of the first one.

    x ← x + F(x), its values V ← a V_1 + b V after the first layer

    Parameters  a, b: (1) for each attention but the first
    Init        paper: a = b = 1/2; preserve: a = 0, b = 1, the host unchanged
    Options     none
    Reference   Zhou et al. 2024, arXiv:2410.17897
    Differs     a and b are learned, which is the paper's variant; its plain form leaves them at 1/2
    """

    preserves = ("post", "pre")
    points = ("values",)
    carries = True  # the first values

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        self.attends = place.name in ("attn", "both")
        self.opens = self.attends and place.layer == 0
        if self.attends and not self.opens:
            self.a = scalar(0.5 if init == "paper" else 0.0)
            self.b = scalar(0.5 if init == "paper" else 1.0)

    def step(self, s: Any, branch: Branch, norm: Norm) -> Stream:
        if not self.attends:
            return norm(s[0] + branch(s[0])), s[1]
        if self.opens:
            seen: list[Tensor] = []

            def record(v: Tensor) -> Tensor:
                seen.append(v)
                return v

            return norm(s + branch(s, values=record)), seen[0]
        x, first = s
        return norm(x + branch(x, values=lambda v: self.a * self.same(first, v) + self.b * v)), first

    def same(self, first: Tensor, v: Tensor) -> Tensor:
        """V_1, if it has a value for each of V."""
        if first.shape != v.shape:
            raise ValueError(
                f"scheme 'value_residual' needs equal values in all layers, got {tuple(first.shape)} in the first and "
                f"{tuple(v.shape)} here (batch, heads, tokens, channels); patch a range of equal layers, or pass "
                "use_cache=False where only some layers attend within a window and the cache forgets their older values"
            )
        return first

    def finish(self, s: Any, norm: Norm) -> Tensor:
        return norm(s[0])
