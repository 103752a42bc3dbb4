"""Attention on the CPU: batched products over blocks of heads that stay in the cache.

Every step is one stock operation over a block of images and heads, in float32, into memory that each thread keeps from call to call. The number of
tokens is padded to a multiple of the vector width, because products and softmax of 47 tokens take twice as long as of 48; padding keys get weight
zero, padding queries are never read. bench/NOTES.md says what was measured.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

VECTOR = 8  # floats
BLOCK = 1 << 18  # floats of scores held at a time: 1 MB
KEPT = 4  # workspaces that a thread keeps

_kept = threading.local()


class Workspace:
    """Float32 memory for one block of images and heads, as every step reads and writes it; rows from n on stay zero in `given`."""

    def __init__(self, images: int, heads: int, n: int, width: int):
        rows = -(-n // VECTOR) * VECTOR
        tokens = torch.zeros(7, images, heads, rows, width)
        self.given, self.found = tokens[:4, ..., :n, :], tokens[4:, ..., :n, :]  # q, k, v, dO; dq, dk, dv: [., images, heads, n, width]
        self.q, self.k, self.v, self.do, self.dq, self.dk, self.dv = tokens.flatten(1, 2)  # [images * heads, rows, width] each
        self.p, self.ds = torch.zeros(2, images * heads, rows, rows)
        self.kt, self.vt, self.pt, self.dst = (x.transpose(1, 2) for x in (self.k, self.v, self.p, self.ds))
        self.by_image = self.p.view(images, heads, rows, rows)
        self.past = self.p[..., n:]
        self.top, self.total = torch.zeros(2, images * heads, rows, 1)
        self.lse = self.top.view(images, heads, rows)[..., :n]
        self.arange = torch.arange(rows)

    def scores(self, shift: Tensor | None, scale: float, lengths: Tensor | None) -> Tensor:
        """scale q k^T + shift [., rows, 1], -inf for keys that are not real."""
        torch.baddbmm(self.p if shift is None else shift, self.q, self.kt, beta=0 if shift is None else 1, alpha=scale, out=self.p)
        if lengths is None:
            self.past.fill_(float("-inf"))
        else:
            self.by_image.masked_fill_((self.arange >= lengths[:, None])[:, None, None], float("-inf"))
        return self.p


def workspace(images: int, heads: int, n: int, width: int) -> Workspace:
    """This thread's memory of that size."""
    kept, key = _kept.__dict__, (images, heads, n, width)
    if key not in kept:
        while len(kept) >= KEPT:
            kept.pop(next(iter(kept)))
        with torch.inference_mode(False):
            kept[key] = Workspace(*key)
    return kept[key]


def blocks(batch: int, heads: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of images and heads whose scores make a block: whole images while one fits, else some heads of one."""
    images = max(1, min(batch, BLOCK // (heads * n * n)))
    some = heads if heads * n * n <= BLOCK else min(heads, max(torch.get_num_threads(), BLOCK // (n * n)))
    for i in range(0, batch, images):
        for h in range(0, heads, some):
            yield slice(i, min(i + images, batch)), slice(h, min(h + some, heads))


def rows_named(index: Tensor, rows: int) -> Tensor:
    """Rows of the flattened token buffer [B * rows, ...] that index [B, n] names: int64 [B * n]."""
    return (index + torch.arange(0, index.shape[0] * rows, rows, dtype=index.dtype)[:, None]).flatten().long()


def taken(qkv: Tensor, index: Tensor | None) -> Tensor:
    """The tokens to attend among, [B, n, 3, H, D]."""
    if index is None:
        return qkv
    return qkv.reshape(-1, *qkv.shape[2:]).index_select(0, rows_named(index, qkv.shape[1])).view(*index.shape, *qkv.shape[2:])


def past(lengths: Tensor, n: int) -> Tensor:
    """Which tokens [B, n] are not real."""
    return torch.arange(n) >= lengths[:, None]


def unsupported(function: str, *args) -> str | None:
    qkv = args[0 if function == "forward" else 1]
    return "it computes in float32, these are float64" if qkv.dtype == torch.float64 else None


@torch.no_grad()
def forward(qkv: Tensor, index: Tensor | None, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse as in op.py."""
    x = taken(qkv, index)
    batch, n, _, heads, width = x.shape
    out = x.new_empty(batch, n, heads, width)
    lse = x.new_empty(batch, heads, n, dtype=torch.float32)
    packed, merged = x.permute(2, 0, 3, 1, 4), out.transpose(1, 2)
    for images, some in blocks(batch, heads, n):
        w = workspace(images.stop - images.start, some.stop - some.start, n, width)
        w.given[:3].copy_(packed[:, images, some])
        p = w.scores(None, scale, None if lengths is None else lengths[images])
        torch.amax(p, -1, keepdim=True, out=w.top)
        p.sub_(w.top).exp_()
        torch.sum(p, -1, keepdim=True, out=w.total)
        torch.bmm(p, w.v, out=w.dq).div_(w.total)
        merged[images, some] = w.found[0]
        w.top.add_(w.total.log_())
        lse[images, some] = w.lse
    if lengths is not None:
        out.masked_fill_(past(lengths, n)[..., None, None], 0)
    return out.flatten(2), lse


@torch.no_grad()
def backward(grad: Tensor, qkv: Tensor, index: Tensor | None, lengths: Tensor | None, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Gradient of qkv. P is recomputed from lse; out is not needed, the softmax gradient sums P dP itself."""
    x = taken(qkv, index)
    batch, n, _, heads, width = x.shape
    grad = grad.unflatten(-1, (heads, width))
    if lengths is not None:  # a query that is not real: no gradient, and a weight of exp(-inf) to every key
        unreal = past(lengths, n)
        grad, lse = grad.masked_fill(unreal[..., None, None], 0), lse.masked_fill(unreal[:, None], float("inf"))
    dx = torch.empty(x.shape, dtype=x.dtype)
    packed, pulled, found = x.permute(2, 0, 3, 1, 4), grad.transpose(1, 2), dx.permute(2, 0, 3, 1, 4)
    for images, some in blocks(batch, heads, n):
        w = workspace(images.stop - images.start, some.stop - some.start, n, width)
        w.given[:3].copy_(packed[:, images, some])
        w.given[3].copy_(pulled[images, some])
        torch.neg(lse[images, some], out=w.lse)
        p = w.scores(w.top, scale, None if lengths is None else lengths[images]).exp_()
        torch.bmm(w.pt, w.do, out=w.dv)
        torch.bmm(w.do, w.vt, out=w.ds)
        torch.ops.aten._softmax_backward_data.out(w.ds, p, -1, torch.float32, grad_input=w.ds)
        torch.baddbmm(w.dq, w.ds, w.k, beta=0, alpha=scale, out=w.dq)
        torch.baddbmm(w.dk, w.dst, w.q, beta=0, alpha=scale, out=w.dk)
        found[:, images, some] = w.found
    if index is None:
        return dx
    rows = rows_named(index, qkv.shape[1])
    return dx.new_zeros(qkv.shape).flatten(0, 1).index_copy_(0, rows, dx.flatten(0, 1)).view(qkv.shape)
