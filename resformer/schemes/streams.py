"""Schemes with several streams in place of one."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from resformer.schemes import mixing
from resformer.schemes.base import Branch, Norm, Place, Scheme, Stream, count, flag, register, scalar
from resformer.schemes.fast import fast, through

Streams = tuple[Tensor]
KEPT, KEPT_BY_TOKEN = 4, 2  # every so many sites keep their streams for the backward pass, which makes the others


@register("hyper_connections")
class HyperConnections(Scheme):
    """S copies of the stream; each site learns what it reads, how the copies mix and where it writes.

    read Σ_i m_i H_i; H_j ← Σ_i R_ij H_i + w_j F(read)

    Parameters  m: (S), R: (S S), w: (S) for each site; dynamic: also W: (D S+1), v: (D), two scales, a norm (2 D)
    Init        m = one-hot at (site mod S), R = I, w = 1, W = v = 0, scales 0.01. paper: the readout is the sum, and
                the weights of the output projections o and down are divided by the square root of S; preserve: the
                readout is the mean, which needs no final norm
    Options     num_streams=4 (S), dynamic=False: add scale · tanh(N(H) W) to [m R] and scale · tanh(N(H) v) to w
    Reference   Zhu et al. 2024, arXiv:2409.19606
    Differs     the paper scales the initial output projections "by a factor of" the square root of S, for the standard
                deviation of the output (section 4): read as a division. With it and the sum the net does not start as
                the pre-LN net, which the other initial values alone would. The paper lets weight decay act on W and v;
                `param_groups` decays nothing of a scheme
    """

    preserves = ("post", "pre")
    placement = "pre"

    def __init__(self, place: Place, *, init: str = "preserve", num_streams: int = 4, dynamic: bool = False):
        super().__init__(place, init=init)
        self.num_streams, self.dynamic = count("num_streams", num_streams), flag("dynamic", dynamic)
        eye = torch.eye(num_streams)
        self.read_mix = nn.Parameter(eye[place.index % num_streams].clone())
        self.mix = nn.Parameter(eye)
        self.write_mix = nn.Parameter(torch.ones(num_streams))
        if dynamic:
            self.norm = nn.LayerNorm(place.width)
            self.mix_weight = nn.Parameter(torch.zeros(place.width, num_streams + 1))
            self.write_weight = nn.Parameter(torch.zeros(place.width))
            self.mix_scale = scalar(0.01)
            self.write_scale = scalar(0.01)

    def start(self, h: Tensor) -> Stream:
        if self.dynamic:
            return (repeat(h, "... D -> ... S D", S=self.num_streams),)
        return (repeat(h, "... D -> S ... D", S=self.num_streams).movedim(0, -2),)  # as `mixing` has them in memory

    def step(self, s: Streams, branch: Branch, norm: Norm) -> Stream:
        (h,) = s
        if self.dynamic:
            made = mixing.again(h) if self.place.index % KEPT_BY_TOKEN else None
            h, m, r, w = self.moved(h, made)
            self.show(m=m, mix=r, w=w)
            h, x = mixing.read_by_token(h, m, made)
            return (norm(mixing.mix_by_token(h, r, w, branch(x), made)),)
        made = mixing.again(h) if self.place.index % KEPT else None
        self.show(m=self.read_mix, mix=self.mix.mT, w=self.write_mix)
        h, x = mixing.read(h, self.read_mix, made)
        return (norm(mixing.mix(h, self.mix.mT, self.write_mix, branch(x), made)),)

    def moved(self, h: Tensor, made: mixing.Again | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h, m (... S), R (... R S) and w (... S) of each token: of N(H) W is N, a shift and a factor, taken last."""
        weight = torch.cat([self.mix_weight.mT, self.write_weight[None]])  # (S+2 D)
        h, z, square = mixing.project(h, weight * self.norm.weight, made, True)
        shift = (weight * self.norm.bias).sum(-1).view(-1, *(1,) * square.ndim)
        u = torch.tanh(z * torch.rsqrt(square / h.shape[-1] + self.norm.eps) + shift)  # (S+2 ... S)
        move = self.mix_scale * u[:-1]
        r = self.mix.mT + move[1:].movedim(0, -2)
        return h, self.read_mix + move[0], r, self.write_mix + self.write_scale * u[-1]

    def formula(self) -> str:
        token = ", with m, R and w moved by scale · tanh of each token's streams" if self.dynamic else ""
        return self.card()["equation"] + token

    def finish(self, s: Streams, norm: Norm) -> Tensor:
        return norm(s[0].sum(-2) if self.init == "paper" else s[0].mean(-2))

    def edits(self) -> dict[str, float]:
        return dict.fromkeys(("o", "down"), self.num_streams**-0.5) if self.init == "paper" else {}


@register("mhc")
class MHC(Scheme):
    """Manifold-constrained hyper-connections: the streams mix by a doubly stochastic matrix of each token.

    read = p H; H ← R H + wᵀ F(read), p = σ(z_1), w = 2 σ(z_2), R = Sinkhorn(exp z_3), z = a RMS(vec H) φ + b

    Parameters  φ: (S D S+S+S²), b: (S+S+S²), a: (3) for each site. The first site, whose streams are still equal, and
                the last, whose streams are only summed after it, have R = I and nothing for it: a doubly stochastic
                matrix does nothing there (where no norm follows the add)
    Init        φ = 0, a = 0.01. paper: b_1 = 3 at (site mod S) and -3 elsewhere, b_2 = 0, b_3 = 6 I - 3, and the
                readout is the sum; preserve: b_1 = -ln(S - 1), so that p = 1 / S, b_2 = 1 ... -1, so that w differs by
                stream with the mean 1 (with equal streams R would never learn), b_3 as in the paper, and the readout
                is the mean
    Options     num_streams=4 (S, at least 2), iterations=20 (of Sinkhorn: columns, then rows)
    Reference   Xie et al. 2025, arXiv:2512.24880
    Differs     the paper's first version gives a = 0.01 only; b and φ = 0 are as an implementation (PaddleFleet) quotes
                its appendix A.6. Readout and start are hyper-connections', which the paper builds on. The eps of RMS
                is 1e-6 (paper: 1e-20). The paper has R at the first and the last site too
    """

    preserves = ("pre",)
    placement = "pre"

    def __init__(self, place: Place, *, init: str = "preserve", num_streams: int = 4, iterations: int = 20):
        super().__init__(place, init=init)
        self.num_streams = count("num_streams", num_streams, low=2)  # one has nothing to mix
        self.iterations = count("iterations", iterations)
        n = num_streams
        if init == "paper":
            read, write = torch.full((n,), -3.0), torch.zeros(n)
            read[place.index % n] = 3.0
        else:
            read, write = torch.zeros(n), torch.tensor([1 - 2 * i / (n - 1) for i in range(n)])
        self.base = 0.0 if init == "paper" else -math.log(n - 1)  # of b_1; exact in any precision of the parameters
        parts = [read, write] if place.opens or place.closes else [read, write, (6 * torch.eye(n) - 3).flatten()]
        self.sizes = [len(part) for part in parts]
        self.weight = nn.Parameter(torch.zeros(n * place.width, sum(self.sizes)))
        self.shift = nn.Parameter(torch.cat(parts))
        self.scale = nn.Parameter(torch.full((len(parts),), 0.01))

    def start(self, h: Tensor) -> Stream:
        return (repeat(h, "... D -> ... S D", S=self.num_streams),)

    def step(self, s: Streams, branch: Branch, norm: Norm) -> Stream:
        (h,) = s
        made = mixing.again(h) if self.place.index % KEPT_BY_TOKEN else None
        h, z, power = mixing.project(h, self.weight.mT.contiguous(), made)  # the few coefficients, in full precision
        z = z * torch.rsqrt(power / len(self.weight) + 1e-6)
        ones = (1,) * power.ndim
        logits = [
            a * part + b.view(-1, *ones)
            for a, part, b in zip(self.scale, z.split(self.sizes), self.shift.split(self.sizes), strict=True)
        ]  # each (S ...) or (S*S ...)
        p, w = torch.sigmoid(logits[0] + self.base).movedim(0, -1), 2 * torch.sigmoid(logits[1]).movedim(0, -1)
        self.show(p=p, w=w)
        h, x = mixing.read_by_token(h, p, made)
        y = branch(x)
        if len(logits) == 3:
            square = rearrange(logits[2], "(R S) ... -> R S ...", S=self.num_streams)
            r = doubly_stochastic(square, self.iterations).movedim((0, 1), (-2, -1))
            self.show(mix=r)
            return (norm(mixing.mix_by_token(h, r, w, y, made)),)
        return (norm(h + einsum(w.to(h.dtype), y, "... R, ... D -> ... R D")),)

    def finish(self, s: Streams, norm: Norm) -> Tensor:
        return norm(s[0].sum(-2) if self.init == "paper" else s[0].mean(-2))


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """(... R S) -> its exponential with columns and rows scaled in turn to sum to 1.

    In logarithms, which no logit overflows. Rows come last: they sum to 1 exactly, so that equal streams stay equal.
    """
    for _ in range(iterations):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


def doubly_stochastic(logits: Tensor, iterations: int) -> Tensor:
    """`sinkhorn` of (R S ...), whose last dimensions count tokens."""
    return _Sinkhorn.apply(logits, iterations) if fast() else _doubly_stochastic(logits, iterations)


def _doubly_stochastic(logits: Tensor, iterations: int) -> Tensor:
    return sinkhorn(logits.movedim((0, 1), (-2, -1)), iterations).movedim((-2, -1), (0, 1))


class _Sinkhorn(torch.autograd.Function):
    """Keeps the logits alone, and scales the exponentials, after a first time in logarithms.

    After it no sum is small: each row and each column has an entry of at least 1 / S², for they are divided in turn by
    sums of at most S, and each had one of at least 1 / S when it was itself scaled. So nothing is divided by zero.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations = iterations
        return _scaled(logits, iterations)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (logits,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *through(lambda z: _doubly_stochastic(z, ctx.iterations), (logits,), grad), None
        p, sums, columns = _scaled(logits, ctx.iterations)
        to_log = grad.contiguous() * p  # else all that follows has the strides of grad, which is tokens first
        for dim, total in reversed(sums):  # of log p' = log p - log Σ p
            to_log.addcmul_(p, to_log.sum(dim, keepdim=True), value=-1)
            p.mul_(total)
        to_log.addcmul_(p, to_log.sum(1, keepdim=True), value=-1)
        to_log.addcmul_(columns, to_log.sum(0, keepdim=True), value=-1)
        return to_log, None


def _scaled(logits: Tensor, iterations: int) -> tuple[Tensor, list[tuple[int, Tensor]], Tensor]:
    """What `sinkhorn` gives; the sums by which it was divided, in order, but for the first of columns and rows, and
    what it was between these."""
    columns = logits.log_softmax(0)
    p = columns.log_softmax(1).exp()
    sums = []
    for _ in range(iterations - 1):
        for dim in (0, 1):
            total = p.sum(dim, keepdim=True)
            p.div_(total)
            sums.append((dim, total))
    return p, sums, columns.exp()


@register("frac_connections")
class FracConnections(Scheme):
    """Hyper-connections across M fractions of the stream's channels, in place of copies: no wider stream.

    read_k = Σ_i Y_ik H_i; H_j ← Σ_i A_ij H_i + b_j F(read)_j

    Parameters  Y: (M M), A: (M M), b: (M) for each site; dynamic: also W: (D/M 2M), v: (D/M), two scales and a norm
                (2 D/M)
    Init        Y = A = I, b = 1, W = v = 0, scales 0.01: the plain residual, with either init
    Options     num_fractions=4 (M, a divisor of D), dynamic=False: add scale · tanh(N(H) W) to [Y A] and
                scale · tanh(N(H) v) to b
    Reference   Zhu et al. 2025, arXiv:2503.14125
    Differs     the paper lets weight decay act on W and v; `param_groups` decays nothing of a scheme
    """

    preserves = ("post", "pre")
    placement = "pre"

    def __init__(self, place: Place, *, init: str = "preserve", num_fractions: int = 4, dynamic: bool = False):
        super().__init__(place, init=init)
        self.num_fractions, self.dynamic = count("num_fractions", num_fractions), flag("dynamic", dynamic)
        if place.width % num_fractions:
            raise ValueError(f"option 'num_fractions' must divide the width {place.width}, got {num_fractions}")
        size = place.width // num_fractions
        self.read_mix = nn.Parameter(torch.eye(num_fractions))
        self.mix = nn.Parameter(torch.eye(num_fractions))
        self.write_mix = nn.Parameter(torch.ones(num_fractions))
        if dynamic:
            self.norm = nn.LayerNorm(size)
            self.mix_weight = nn.Parameter(torch.zeros(size, 2 * num_fractions))
            self.write_weight = nn.Parameter(torch.zeros(size))
            self.mix_scale = scalar(0.01)
            self.write_scale = scalar(0.01)

    def step(self, s: Tensor, branch: Branch, norm: Norm) -> Tensor:
        h = rearrange(s, "... (M C) -> ... M C", M=self.num_fractions)
        read: Tensor = self.read_mix
        mix: Tensor = self.mix
        write: Tensor = self.write_mix
        if self.dynamic:
            state = self.norm(h)
            move_read, move_mix = (self.mix_scale * torch.tanh(state @ self.mix_weight)).chunk(2, dim=-1)
            read, mix = read + move_read, mix + move_mix
            write = write + self.write_scale * torch.tanh(state @ self.write_weight)
        self.show(Y=read, mix=mix.mT, b=write)
        y = branch((read.mT @ h).flatten(-2))
        y = rearrange(y, "... (M C) -> ... M C", M=self.num_fractions)
        return norm((mix.mT @ h + write[..., None] * y).flatten(-2))

    def formula(self) -> str:
        token = ", with Y, A and b moved by scale · tanh of each token's fractions" if self.dynamic else ""
        return self.card()["equation"] + token


@register("reversible")
class Reversible(Scheme):
    """Two streams that update each other in turn: every state can be computed from the one after it.

    x ← x + F(x'), where x and x' are the two streams in turn: x_1 and x_2 at one site, x_2 and x_1 at the next

    Parameters  none
    Init        x_1 = x_2 = the embedding; the readout is the mean of the two
    Options     none
    Reference   Gomez et al. 2017, arXiv:1707.04585; Kitaev et al. 2020 (Reformer), arXiv:2001.04451
    Differs     the streams are averaged at the end, where the Reformer concatenates them, which the width of a head
                forbids. Activations are kept as usual: `invert` gives them back, but no memory is saved. With a norm
                after the add (post-LN) a site cannot be inverted. Where a layer has other than two sites, or skips
                one, the sites that run take turns
    """

    placement = "pre"

    def start(self, h: Tensor) -> Stream:
        return h, h  # the stream that the next site writes, then the one that it reads

    def step(self, s: tuple[Tensor, Tensor], branch: Branch, norm: Norm) -> Stream:
        x, other = s
        return other, norm(x + branch(other))

    def invert(self, s: tuple[Tensor, Tensor], branch: Branch) -> Stream:
        """The stream before a site from the stream after it, where no norm follows the add."""
        other, y = s
        return y - branch(other), other

    def finish(self, s: tuple[Tensor, Tensor], norm: Norm) -> Tensor:
        return norm((s[0] + s[1]) / 2)
