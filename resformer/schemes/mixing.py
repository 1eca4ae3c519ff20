"""Reading from several streams, mixing them and writing to them, in few passes over memory.

h (... S D) are the streams. With one mixture for all tokens (m, R, w) they lie stream after stream in memory, with one
for each token (`by_token`) token after token; another order is right too, and copied first. Parts that do not depend on
tokens come as m (S), R (R S), w (R), those that do as m (... S), R (... R S), w (... R), with H ← R H.

What a mixture made need not be kept for the backward pass: `again(h)` says how it was made, and it is made again there.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from einops import einsum
from torch import Tensor

from resformer.schemes.fast import fast, through, unrounded


class Again:
    """Streams that are not kept for the backward pass, but made again from what the mixture before them keeps.

    They are held from the first who asks to the last: other streams, made from them, and both ends of a site. Where the
    mixture has its turn before that, as when a loss of lower layers alone comes first, they are made while it can.
    """

    def __init__(self, mixture: Any):
        self.mixture = mixture  # the node of the graph that made them
        self.found: Tensor | None = None
        self.over = False  # whether nobody asks any more
        mixture.asked.append(ref(self))  # weak: those who ask hold this, and this holds the mixture

    def __call__(self) -> Tensor:
        if torch.is_grad_enabled():  # to differentiate twice, the way there belongs to the graph
            return self.mixture.make(self.mixture)
        if self.found is None:
            self.found = self.mixture.make(self.mixture)
        return self.found


def _last_chance(ctx: Any) -> None:
    """Before the backward pass of a mixture, after which its tensors may be gone."""
    if torch.is_grad_enabled():  # then what is asked for belongs to the graph, which stays
        return
    for asked in ctx.asked:
        if (made := asked()) and not made.over:
            made()


def again(h: Tensor) -> Again | None:
    """How these streams can be made again; None if they must be kept, as those that no mixture made."""
    return Again(h.grad_fn) if fast() and hasattr(h.grad_fn, "make") else None


def _alike(h: Tensor, y: Tensor, made: Again | None) -> tuple[Tensor, Tensor, Again | None]:
    """Both in the wider precision of the two, as a sum would be: T5 in fp16 has branches that end in fp32."""
    dtype = torch.promote_types(h.dtype, y.dtype)
    return h.to(dtype), y.to(dtype), made if h.dtype == dtype else None


def _keep(ctx: Any, h: Tensor, made: Again | None, *others: Tensor) -> None:
    ctx.made, ctx.unpacked, ctx.asked = made, None, []
    ctx.save_for_backward(*others, *(() if made else (h,)))


def _kept(ctx: Any, *, more: bool = False) -> tuple[Tensor, ...]:
    """The streams, then the others. They stay unpacked while `more` will be asked: checkpointing unpacks once."""
    tensors, versions = (ctx.saved_tensors, None) if ctx.unpacked is None else ctx.unpacked
    now = [tensor._version for tensor in tensors]
    if versions not in (None, now):  # as autograd says when it unpacks
        raise RuntimeError("a tensor that is needed for a gradient was changed in place since part of it was taken")
    ctx.unpacked = (tensors, now) if more else None
    if ctx.made:
        return ctx.made(), *tensors
    *others, h = tensors
    return h, *others


def _kept_last(ctx: Any) -> tuple[Tensor, ...]:
    """`_kept` of what a site does first, and its backward pass last: the streams need no longer be held."""
    found = _kept(ctx)
    _over(ctx)
    return found


def _over(ctx: Any) -> None:
    if ctx.made:
        ctx.made.found, ctx.made.over = None, True


# ------------------------------------------------------------------------------------- one mixture for all tokens


@unrounded
def read(h: Tensor, m: Tensor, made: Again | None = None) -> tuple[Tensor, Tensor]:
    """h, and Σ_i m_i H_i; what comes after uses that h."""
    m = m.to(h.dtype)
    return _Read.apply(h, m, made) if fast() else _read(h, m)


@unrounded
def mix(h: Tensor, r: Tensor, w: Tensor, y: Tensor, made: Again | None = None) -> Tensor:
    """H ← R H + w y"""
    h, y, made = _alike(h, y, made)
    r, w = r.to(h.dtype), w.to(h.dtype)
    return _Mix.apply(h, r, w, y, made) if fast() else _mix(h, r, w, y)


def _read(h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    return h, einsum(m, h, "S, ... S D -> ... D")


def _mix(h: Tensor, r: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return einsum(r, h, "R S, ... S D -> ... R D") + einsum(w, y, "R, ... D -> ... R D")


def _flat(h: Tensor) -> Tensor:
    """(... S D) -> (S N), where N counts tokens and channels."""
    return h.movedim(-2, 0).reshape(h.shape[-2], -1)


def _streams(flat: Tensor, y: Tensor) -> Tensor:
    """(S N) -> (... S D), for y (... D)."""
    return flat.view(len(flat), *y.shape).movedim(0, -2)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, m: Tensor, made: Again | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        _keep(ctx, h, made, m)
        x = h.new_empty(*h.shape[:-2], h.shape[-1])  # no view, so that a branch may change it in place
        torch.mv(_flat(h).mT, m, out=x.view(-1))
        return h, x

    @staticmethod
    @unrounded
    def backward(ctx: Any, to_h: Tensor | None, to_x: Tensor | None) -> Any:
        if to_x is None:
            _over(ctx)
            return to_h, None, None
        h, m = _kept_last(ctx)
        if torch.is_grad_enabled():
            return *through(_read, (h, m), to_h, to_x), None
        x = to_x.reshape(-1)
        dh = torch.outer(m, x) if to_h is None else torch.addr(_flat(to_h), m, x)
        return _streams(dh, to_x), torch.mv(_flat(h), x), None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, r: Tensor, w: Tensor, y: Tensor, made: Again | None) -> Tensor:
        _keep(ctx, h, made, r, w, y)
        ctx.make = _Mix.make
        return _mixed(h, r, w, y)

    @staticmethod
    def make(ctx: Any) -> Tensor:
        return (_mix if torch.is_grad_enabled() else _mixed)(*_kept(ctx, more=True))

    @staticmethod
    @unrounded
    def backward(ctx: Any, grad: Tensor) -> Any:
        _last_chance(ctx)
        h, r, w, y = _kept(ctx)
        if torch.is_grad_enabled():
            return *through(_mix, (h, r, w, y), grad), None
        g = _flat(grad)
        return (
            _streams(r.mT @ g, y),
            g @ _flat(h).mT,
            torch.mv(g, y.reshape(-1)),
            torch.mv(g.mT, w).view(y.shape),
            None,
        )


def _mixed(h: Tensor, r: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return _streams((r @ _flat(h)).addr_(w, y.reshape(-1)), y)


# --------------------------------------------------------------------------------------- a mixture for each token


@unrounded
def project(
    h: Tensor, weight: Tensor, made: Again | None = None, centred: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """h, its products with the rows of `weight` (K C), as (K *rows), and the rows' sums of squares (*rows).

    The rows are of C channels: (... S) of them where C = D, and (...) where C = S D, of all streams of a token. In
    single precision at least. `centred`: of rows less their means, as LayerNorm has them. What comes after uses
    that h.
    """
    weight = weight.to(torch.promote_types(h.dtype, torch.float32))
    return _Project.apply(h, weight, centred, made) if fast() else _project(h, weight, centred)


@unrounded
def read_by_token(h: Tensor, m: Tensor, made: Again | None = None) -> tuple[Tensor, Tensor]:
    """`read`, with m (... S)."""
    m = m.to(h.dtype).contiguous()
    return _ReadByToken.apply(h, m, made) if fast() else _read_by_token(h, m)


@unrounded
def mix_by_token(h: Tensor, r: Tensor, w: Tensor, y: Tensor, made: Again | None = None) -> Tensor:
    """`mix`, with R (... R S) and w (... R)."""
    h, y, made = _alike(h, y, made)
    r, w = r.to(h.dtype).contiguous(), w.to(h.dtype).contiguous()
    return _MixByToken.apply(h, r, w, y, made) if fast() else _mix_by_token(h, r, w, y)


def _project(h: Tensor, weight: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = _rows(h, weight, centred)
    return h, einsum(weight, x, "K C, ... C -> K ..."), x.square().sum(-1)


def _read_by_token(h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    return h, einsum(m, h, "... S, ... S D -> ... D")


def _mix_by_token(h: Tensor, r: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return einsum(r, h, "... R S, ... S D -> ... R D") + einsum(w, y, "... R, ... D -> ... R D")


def _rows(h: Tensor, weight: Tensor, centred: bool) -> Tensor:
    """(... S D) -> (... S D) or (... S*D), as many channels as weight has."""
    x = h if weight.shape[-1] == h.shape[-1] else h.flatten(-2)
    x = x.to(weight.dtype)
    return x - x.mean(-1, keepdim=True) if centred else x


def _tokens(x: Tensor, last: int) -> Tensor:
    """(... and the `last` dimensions) -> (tokens, ...)"""
    return x.reshape(-1, *x.shape[x.ndim - last :])


class _Project(torch.autograd.Function):
    """The few rows of weight stand on the left, where libraries of matrix products are fast with few."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, centred: bool, made: Again | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        _keep(ctx, h, made, weight)
        ctx.centred = centred
        x = _rows(h, weight, centred)
        z = weight @ _tokens(x, 1).mT
        return h, z.view(len(weight), *x.shape[:-1]), torch.linalg.vector_norm(x, dim=-1).square_()

    @staticmethod
    @unrounded
    def backward(ctx: Any, to_h: Tensor | None, to_z: Tensor | None, to_square: Tensor | None) -> Any:
        h, weight = _kept_last(ctx)
        if torch.is_grad_enabled():
            found = through(lambda h, w: _project(h, w, ctx.centred), (h, weight), to_h, to_z, to_square)
            return *found, None, None
        if to_z is None and to_square is None:
            return to_h, None, None, None
        x = _tokens(_rows(h, weight, ctx.centred), 1)
        dh = torch.zeros_like(x) if to_h is None else to_h.reshape(x.shape).to(x.dtype)
        dweight = None
        if to_square is not None:
            dh = torch.addcmul(dh, x, 2 * to_square.reshape(-1, 1))
        if to_z is not None:
            z = to_z.reshape(len(weight), -1)
            dweight = z @ x
            # of centred rows only the centred weights matter
            weight = weight - weight.mean(-1, keepdim=True) if ctx.centred else weight
            # what was made just now can be added to in place
            dh = torch.addmm(dh, z.mT, weight) if to_square is None else dh.addmm_(z.mT, weight)
        return dh.view(h.shape).to(h.dtype), dweight, None, None


class _ReadByToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, m: Tensor, made: Again | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        _keep(ctx, h, made, m)
        x = h.new_empty(*h.shape[:-2], h.shape[-1])  # no view, so that a branch may change it in place
        torch.bmm(_tokens(m, 1)[:, None], _tokens(h, 2), out=_tokens(x, 1)[:, None])
        return h, x

    @staticmethod
    @unrounded
    def backward(ctx: Any, to_h: Tensor | None, to_x: Tensor | None) -> Any:
        if to_x is None:
            return to_h, None, None
        h, m = _kept(ctx)
        if torch.is_grad_enabled():
            return *through(_read_by_token, (h, m), to_h, to_x), None
        dm = torch.bmm(_tokens(to_x, 1)[:, None], _tokens(h, 2).mT).view(m.shape)
        m, to_x = m[..., None], to_x[..., None, :]
        return m * to_x if to_h is None else torch.addcmul(to_h, m, to_x), dm, None


class _MixByToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, r: Tensor, w: Tensor, y: Tensor, made: Again | None) -> Tensor:
        _keep(ctx, h, made, r, w, y)
        ctx.make = _MixByToken.make
        return _mixed_by_token(h, r, w, y)

    @staticmethod
    def make(ctx: Any) -> Tensor:
        return (_mix_by_token if torch.is_grad_enabled() else _mixed_by_token)(*_kept(ctx, more=True))

    @staticmethod
    @unrounded
    def backward(ctx: Any, grad: Tensor) -> Any:
        _last_chance(ctx)
        h, r, w, y = _kept(ctx)
        if torch.is_grad_enabled():
            return *through(_mix_by_token, (h, r, w, y), grad), None
        g = _tokens(grad, 2)
        return (
            torch.bmm(_tokens(r, 2).mT.contiguous(), g).view(h.shape),
            torch.bmm(g, _tokens(h, 2).mT).view(r.shape),
            torch.bmm(_tokens(y, 1)[:, None], g.mT).view(w.shape),
            torch.bmm(_tokens(w, 1)[:, None], g).view(y.shape),
            None,
        )


def _mixed_by_token(h: Tensor, r: Tensor, w: Tensor, y: Tensor) -> Tensor:
    mixed = torch.bmm(_tokens(r, 2), _tokens(h, 2)).view(*r.shape[:-1], h.shape[-1])
    return mixed.addcmul_(w[..., None], y[..., None, :])
