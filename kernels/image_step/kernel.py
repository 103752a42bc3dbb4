"""image_step in Triton: norms by a two-stage sum, then one pass that adds their gradient, applies Adam and clips.

The pass reads eight neighbours of every pixel, as they were before the step, while other programs are moving them. So with total variation it writes
the moved pixels elsewhere: to `out` where the caller brings it, otherwise to a temporary image, whose active pixels a copy brings back.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuned
from ..compile_case import CompileCase

PROGRAMS = 768  # of the sum's first stage: about the 6 that fit on each multiprocessor of an H200; fixed, so that all devices add in the same order
STRIP = (32, 32)  # rows, columns of a tile of whole images: 128-byte lines, and the usual widths are multiples of 32
ELEMENTS = 1024  # of a tile: eight a thread, two 16-byte loads in float32
WARPS = 4


@triton.jit
def pull(p_image, b_i, b_o, m):
    """Difference [BR, BE] between pixels and their neighbours at offsets b_o, 0 where there is none."""
    return b_i - tl.load(p_image + b_o, mask=m, other=b_i).to(tl.float32)


@triton.jit
def tv_gradient(p_image, b_i, b_o, b_y, b_x, m, w0, w1, w2, w3, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Gradient [BR, BE] of the norms, weighted by w, at pixels b_i with offsets b_o in an image [C, H, W]."""
    up, down = m & (b_y > 0), m & (b_y < HEIGHT - 1)
    left, right = b_x > 0, b_x < WIDTH - 1
    b_0 = pull(p_image, b_i, b_o - 1, m & left) + pull(p_image, b_i, b_o + 1, m & right)
    b_1 = pull(p_image, b_i, b_o - WIDTH, up) + pull(p_image, b_i, b_o + WIDTH, down)
    b_2 = pull(p_image, b_i, b_o - WIDTH - 1, up & left) + pull(p_image, b_i, b_o + WIDTH + 1, down & right)
    b_3 = pull(p_image, b_i, b_o - WIDTH + 1, up & right) + pull(p_image, b_i, b_o + WIDTH - 1, down & left)
    return w0 * b_0 + w1 * b_1 + w2 * b_2 + w3 * b_3


@triton.jit
def over_norm(p_norms, k: tl.constexpr, weight):
    """weight / norm k, and 0 where the norm is."""
    norm = tl.load(p_norms + k).to(tl.float32)
    return tl.where(norm > 0, weight / tl.where(norm > 0, norm, 1.0), 0.0)


@triton.jit
def pixels_of_tile(
    p_index, n, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr,
    BR: tl.constexpr, BE: tl.constexpr, USE_INDEX: tl.constexpr,
):  # fmt: skip
    """Channel [BR, 1], row and column [BR, BE] of this program's pixels, their offsets in the image [C, H, W], which exist, and the image (int64).

    With an index a tile is BR pairs (patch, channel) by BE pixels of each; without, BR image rows by BE columns.
    """
    i_e, i_r, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_r, o_e = i_r * BR + tl.arange(0, BR), i_e * BE + tl.arange(0, BE)
    if USE_INDEX:
        # [BR]
        m_r = o_r < n * CHANNELS
        b_cell = tl.load(p_index + i_b * n + o_r // CHANNELS, mask=m_r, other=0).to(tl.int32)
        b_c = (o_r % CHANNELS)[:, None]
        # [BR, BE]
        b_y = (b_cell // (WIDTH // PATCH) * PATCH)[:, None] + (o_e // PATCH)[None, :]
        b_x = (b_cell % (WIDTH // PATCH) * PATCH)[:, None] + (o_e % PATCH)[None, :]
        m = m_r[:, None] & (o_e < PATCH * PATCH)[None, :]
    else:
        b_c = (o_r // HEIGHT)[:, None]
        # [BR, BE]
        b_y = (o_r % HEIGHT)[:, None] + tl.zeros([BR, BE], dtype=tl.int32)
        b_x = o_e[None, :] + tl.zeros([BR, BE], dtype=tl.int32)
        m = (o_r < CHANNELS * HEIGHT)[:, None] & (o_e < WIDTH)[None, :]
    b_o = (b_c * HEIGHT + b_y) * WIDTH + b_x
    return b_c, b_y, b_x, b_o, m, i_b


@triton.jit
def one_minus_exp(t):
    """1 - exp(t) for t <= 0, by its series where the difference would cancel."""
    s = tl.maximum(t, -0.5)
    series = -s * (1 + s / 2 * (1 + s / 3 * (1 + s / 4 * (1 + s / 5 * (1 + s / 6 * (1 + s / 7 * (1 + s / 8)))))))
    return tl.where(t > -0.5, series, 1 - tl.exp(t))


@triton.jit
def adam_step(
    p_images, p_grad, p_avg, p_avg_sq, p_out, p_step, p_low, p_high, p_index, p_norms, n, tv_weight, lr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, EPS: tl.constexpr,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr,
    BR: tl.constexpr, BE: tl.constexpr, USE_INDEX: tl.constexpr, USE_TV: tl.constexpr,
):  # fmt: skip
    """images, grad, avg, avg_sq, out: [B, C, H, W]; step: scalar; low, high: [C]; index: [B, n]; norms: [4]. Writes avg, avg_sq, out."""
    b_c, b_y, b_x, b_o, m, i_b = pixels_of_tile(p_index, n, CHANNELS, HEIGHT, WIDTH, PATCH, BR, BE, USE_INDEX)
    base = i_b * (CHANNELS * HEIGHT * WIDTH)
    # [BR, BE]
    b_i = tl.load(p_images + base + b_o, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(p_grad + base + b_o, mask=m, other=0.0).to(tl.float32)
    b_m = tl.load(p_avg + base + b_o, mask=m, other=0.0).to(tl.float32)
    b_v = tl.load(p_avg_sq + base + b_o, mask=m, other=0.0).to(tl.float32)
    if USE_TV:
        w0, w1 = over_norm(p_norms, 0, tv_weight), over_norm(p_norms, 1, tv_weight)
        w2, w3 = over_norm(p_norms, 2, tv_weight), over_norm(p_norms, 3, tv_weight)
        b_g += tv_gradient(p_images + base, b_i, b_o, b_y, b_x, m, w0, w1, w2, w3, HEIGHT, WIDTH)
    b_m = BETA1 * b_m + (1 - BETA1) * b_g
    b_v = BETA2 * b_v + (1 - BETA2) * b_g * b_g
    step = tl.load(p_step).to(tl.float32)
    b_hat = tl.sqrt(b_v / one_minus_exp(step * LOG_BETA2)) + EPS
    b_i -= lr / one_minus_exp(step * LOG_BETA1) * b_m / b_hat
    # [BR, 1]
    b_low = tl.load(p_low + b_c, mask=b_c < CHANNELS, other=0.0).to(tl.float32)
    b_high = tl.load(p_high + b_c, mask=b_c < CHANNELS, other=0.0).to(tl.float32)
    # [BR, BE]
    b_i = tl.clamp(b_i, b_low + tl.zeros_like(b_i), b_high + tl.zeros_like(b_i), propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_avg + base + b_o, b_m.to(p_avg.dtype.element_ty), mask=m)
    tl.store(p_avg_sq + base + b_o, b_v.to(p_avg_sq.dtype.element_ty), mask=m)
    tl.store(p_out + base + b_o, b_i.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def copy_pixels(
    p_from, p_to, p_index, n, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr,
    BR: tl.constexpr, BE: tl.constexpr, USE_INDEX: tl.constexpr,
):  # fmt: skip
    """from, to: [B, C, H, W]; index: [B, n]. Copies the active pixels."""
    _, _, _, b_o, m, i_b = pixels_of_tile(p_index, n, CHANNELS, HEIGHT, WIDTH, PATCH, BR, BE, USE_INDEX)
    b_o += i_b * (CHANNELS * HEIGHT * WIDTH)
    tl.store(p_to + b_o, tl.load(p_from + b_o, mask=m), mask=m)


@triton.jit
def tv_sums(p_images, p_sums, rows, programs, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):
    """images: [rows, W], rows = B C H; sums: [4, programs], the squared differences that each program met."""
    COLUMNS: tl.constexpr = (WIDTH + BE - 1) // BE
    i_p = tl.program_id(0)
    # [BR, BE]
    b_0, b_1 = tl.zeros([BR, BE], dtype=tl.float32), tl.zeros([BR, BE], dtype=tl.float32)
    b_2, b_3 = tl.zeros([BR, BE], dtype=tl.float32), tl.zeros([BR, BE], dtype=tl.float32)
    for i in range(i_p, tl.cdiv(rows, BR) * COLUMNS, programs):
        o_r = i // COLUMNS * BR + tl.arange(0, BR)
        o_x = i % COLUMNS * BE + tl.arange(0, BE)
        p_i = p_images + o_r.to(tl.int64)[:, None] * WIDTH + o_x[None, :]
        m = (o_r < rows)[:, None] & (o_x < WIDTH)[None, :]
        right, down = m & (o_x < WIDTH - 1)[None, :], m & (o_r % HEIGHT < HEIGHT - 1)[:, None]
        # [BR, BE]
        b_i = tl.load(p_i, mask=m, other=0.0).to(tl.float32)
        b_right = tl.load(p_i + 1, mask=right, other=0.0).to(tl.float32)
        b_down = tl.load(p_i + WIDTH, mask=down, other=0.0).to(tl.float32)
        b_both = tl.load(p_i + WIDTH + 1, mask=right & down, other=0.0).to(tl.float32)
        b_d0, b_d1 = tl.where(right, b_i - b_right, 0.0), tl.where(down, b_i - b_down, 0.0)
        b_d2, b_d3 = tl.where(right & down, b_i - b_both, 0.0), tl.where(right & down, b_down - b_right, 0.0)
        b_0 += b_d0 * b_d0
        b_1 += b_d1 * b_d1
        b_2 += b_d2 * b_d2
        b_3 += b_d3 * b_d3
    tl.store(p_sums + i_p, tl.sum(b_0))
    tl.store(p_sums + programs + i_p, tl.sum(b_1))
    tl.store(p_sums + 2 * programs + i_p, tl.sum(b_2))
    tl.store(p_sums + 3 * programs + i_p, tl.sum(b_3))


@triton.jit
def tv_roots(p_sums, p_norms, programs, BP: tl.constexpr):
    """sums: [4, programs]; norms: [4], the square roots of their totals."""
    o_k, o_p = tl.arange(0, 4), tl.arange(0, BP)
    # [4, BP]
    b_s = tl.load(p_sums + o_k[:, None] * programs + o_p[None, :], mask=(o_p < programs)[None, :], other=0.0)
    tl.store(p_norms + o_k, tl.sqrt(tl.sum(b_s, 1)))


@triton.jit
def tv_norms_bwd(
    p_images, p_norms, p_dnorms, p_dimages, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr
):
    """images, dimages: [B, C, H, W]; norms, dnorms: [4]."""
    _, b_y, b_x, b_o, m, i_b = pixels_of_tile(p_images, 0, CHANNELS, HEIGHT, WIDTH, 1, BR, BE, False)
    base = i_b * (CHANNELS * HEIGHT * WIDTH)
    w0, w1 = over_norm(p_norms, 0, tl.load(p_dnorms).to(tl.float32)), over_norm(p_norms, 1, tl.load(p_dnorms + 1).to(tl.float32))
    w2, w3 = over_norm(p_norms, 2, tl.load(p_dnorms + 2).to(tl.float32)), over_norm(p_norms, 3, tl.load(p_dnorms + 3).to(tl.float32))
    # [BR, BE]
    b_i = tl.load(p_images + base + b_o, mask=m, other=0.0).to(tl.float32)
    b_g = tv_gradient(p_images + base, b_i, b_o, b_y, b_x, m, w0, w1, w2, w3, HEIGHT, WIDTH)
    tl.store(p_dimages + base + b_o, b_g.to(p_dimages.dtype.element_ty), mask=m)


def unsupported(function: str, *args) -> str | None:
    """Why these arguments cannot run; None if they can."""
    images = args[0]
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args):
        return "it computes in float32, and one of the tensors is float64"
    if images.shape[0] >= 2**16 or images[:1].numel() >= 2**31 or images.shape[0] * images.shape[1] * images.shape[2] >= 2**31:
        return f"a batch of {tuple(images.shape)} has too many images, rows, or pixels in one image"
    index, patch_size = (args[7], args[8]) if function == "forward" else (None, 1)
    if max(tile("adam", images, index, patch_size)[0][1:]) >= 2**16:
        return f"{tuple(images.shape)} in patches of {patch_size} takes more programs than a grid's second dimension holds"
    return None


def tile(kernel: str, images: Tensor, index: Tensor | None, patch_size: int) -> tuple[tuple[int, int, int], dict[str, int], int]:
    """Grid, tile sizes and warps of a kernel that passes over the active pixels of images [B, C, H, W]."""
    batch, channels, height, width = images.shape
    if index is None:
        BR, BE, warps = tuned.tile("image_step", f"{kernel}/all", (*STRIP, WARPS), images.device)
        rows, elements = channels * height, width
    else:
        rows, elements = index.shape[1] * channels, patch_size**2
        most, warps = tuned.tile("image_step", f"{kernel}/p{patch_size}", (ELEMENTS, WARPS), images.device)
        BE = min(most, triton.next_power_of_2(elements))
        BR = most // BE
    return (triton.cdiv(elements, BE), triton.cdiv(rows, BR), batch), {"BR": BR, "BE": BE}, warps


def logarithm(beta: float) -> float:
    """log(beta), or a number whose exponential is 0 in float32."""
    return max(math.log(beta), -1e4) if beta > 0 else -1e4


def forward(
    images: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, low: Tensor, high: Tensor, index: Tensor | None, patch_size: int,
    norms: Tensor | None, tv_weight: float, lr: float, beta1: float, beta2: float, eps: float, out: Tensor | None,
) -> None:  # fmt: skip
    """One step, as in op.py: moments in place, pixels in place or to out."""
    if not images.numel() or (index is not None and not index.numel()):
        return
    grad, low, high = grad.contiguous(), low.contiguous(), high.contiguous()
    index, norms = None if index is None else index.contiguous(), None if norms is None else norms.contiguous()
    use_tv = tv_weight != 0
    target = out if out is not None else torch.empty_like(images) if use_tv else images
    grid, sizes, warps = tile("adam", images, index, patch_size)
    sizes |= dict(zip(("CHANNELS", "HEIGHT", "WIDTH"), images.shape[1:], strict=True)) | {"PATCH": patch_size, "USE_INDEX": index is not None}
    n, some_index = (0, step) if index is None else (index.shape[1], index)
    adam_step[grid](
        images, grad, exp_avg, exp_avg_sq, target, step, low, high, some_index, norms if use_tv else low, n, tv_weight, lr,
        BETA1=beta1, BETA2=beta2, LOG_BETA1=logarithm(beta1), LOG_BETA2=logarithm(beta2), EPS=eps, USE_TV=use_tv, **sizes, num_warps=warps,
    )  # fmt: skip
    if out is None and use_tv:
        copy_pixels[grid](target, images, some_index, n, **sizes, num_warps=warps)


def tv_norms(images: Tensor) -> Tensor:
    """The four norms, float32 [4]."""
    images = images.contiguous()
    norms = torch.zeros(4, dtype=torch.float32, device=images.device)
    if images.numel():
        height, width = images.shape[2:]
        (BR, BE), rows = STRIP, images.numel() // width
        programs = min(PROGRAMS, triton.cdiv(rows, BR) * triton.cdiv(width, BE))
        sums = torch.empty(4, programs, dtype=torch.float32, device=images.device)
        tv_sums[(programs,)](images, sums, rows, programs, HEIGHT=height, WIDTH=width, BR=BR, BE=BE, num_warps=WARPS)
        tv_roots[(1,)](sums, norms, programs, BP=triton.next_power_of_2(PROGRAMS), num_warps=WARPS)
    return norms


def tv_norms_backward(images: Tensor, norms: Tensor, grad_norms: Tensor) -> Tensor:
    """Gradient [B, C, H, W] of the images."""
    images = images.contiguous()
    grad = torch.empty_like(images)
    if images.numel():
        grid, sizes, warps = tile("tv_norms_bwd", images, None, 1)
        channels, height, width = images.shape[1:]
        tv_norms_bwd[grid](
            images, norms.contiguous(), grad_norms.contiguous(), grad, CHANNELS=channels, HEIGHT=height, WIDTH=width, **sizes, num_warps=warps
        )
    return grad


def compile_cases() -> list[CompileCase]:
    """Every kernel on float32 images of 224 x 224: whole images, and patches of all usual sizes."""
    image, hyper = {"CHANNELS": 3, "HEIGHT": 224, "WIDTH": 224}, {"BETA1": 0.5, "BETA2": 0.99, "EPS": 1e-8}
    hyper |= {"LOG_BETA1": logarithm(0.5), "LOG_BETA2": logarithm(0.99)}
    strip, f32 = {"BR": STRIP[0], "BE": STRIP[1]}, "*fp32"
    cases = []
    for patch in (0, 4, 8, 14, 16, 32):
        _, sizes, _ = tile("adam", torch.empty(1, 3, 224, 224, device="meta"), torch.empty(1, 46, device="meta") if patch else None, patch)
        name = f"p{patch}" if patch else "all"
        sizes |= image | {"PATCH": patch or 16, "USE_INDEX": patch > 0}
        types = {f"p_{x}": f32 for x in ("images", "grad", "avg", "avg_sq", "out", "low", "high", "norms")}
        types |= {"p_step": "*i32", "p_index": "*i32", "n": "i32", "tv_weight": "fp32", "lr": "fp32"}
        cases.append(CompileCase(f"image_step/adam/{name}", adam_step, types, sizes | hyper | {"USE_TV": True}, WARPS))
        types = {"p_from": f32, "p_to": f32, "p_index": "*i32", "n": "i32"}
        cases.append(CompileCase(f"image_step/copy/{name}", copy_pixels, types, sizes, WARPS))
    types, constants = {"p_images": f32, "p_sums": f32, "rows": "i32", "programs": "i32"}, {"HEIGHT": 224, "WIDTH": 224} | strip
    cases.append(CompileCase("image_step/tv_sums/strip", tv_sums, types, constants, WARPS, aligned=("rows", "programs")))
    types = {"p_sums": f32, "p_norms": f32, "programs": "i32"}
    cases.append(CompileCase("image_step/tv_roots/all", tv_roots, types, {"BP": triton.next_power_of_2(PROGRAMS)}, WARPS, aligned=("programs",)))
    types = {f"p_{x}": f32 for x in ("images", "norms", "dnorms", "dimages")}
    cases.append(CompileCase("image_step/tv_norms_bwd/strip", tv_norms_bwd, types, image | strip, WARPS))
    return cases
