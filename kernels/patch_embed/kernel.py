"""patch_embed in Triton: a GEMM whose left operand is gathered from the image, and its transpose, scattered to it.

    forward    tokens[b, P + j] = sum_k image[b, at(b, j, k)] weight[:, k] + bias + position[cell(b, j)],  tokens[b, s < P] = prefix[s]
    backward   grad_image[b, at(b, j, k)] = sum_d grad_tokens[b, P + j, d] weight[d, k],  0 where no (j, k) leads

`at` maps pixel k = (channel, row, column) of active patch j to the pixel of the still image that lies there after roll and flip; it is computed in
registers from `augmentation`, which stays on the device. It is injective, so the scatter needs no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuned
from ..compile_case import CompileCase
from ..hopper import TRITON, fence_copies, settled
from .sizes import LARGE_FROM

# Tiles: tokens BT, model dimensions BD, patch pixels BK, warps, stages. Forward sums over BK, backward over BD.
# large: the most that fits without spills (128 x 256 does not), because the gathered pixels are read again for every BD model dimensions. small: four
# times the programs, where large ones would not occupy every multiprocessor twice over. BK 32 forward: 16 gathered pixels a thread and stage keep the
# address arithmetic in registers. float32: GEMMs are IEEE, on no tensor core, so tiles are small. (from the compiler's report, not timed)
FORWARD_TILES = {"large": (128, 128, 32, 8, 4), "small": (64, 64, 32, 4, 4), "float32": (64, 64, 16, 8, 2)}
BACKWARD_TILES = {"large": (128, 64, 128, 8, 3), "small": (64, 64, 64, 4, 3), "float32": (64, 32, 64, 8, 2)}
if TRITON >= (3, 7):  # keeps the offsets of the pixels in registers: half as many results a thread, or it spills (compile gate of the newest Triton)
    BACKWARD_TILES = {"large": (64, 64, 128, 8, 3), "small": (64, 64, 64, 8, 3), "float32": (64, 32, 32, 8, 2)}


@triton.jit
def locate(
    p_index, p_aug, o_b, o_j, m_j, n,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr, USE_AUG: tl.constexpr,
):  # fmt: skip
    """Cells to which active patches o_j of images o_b move, y and x in the still image of their first pixels, and whether columns run backwards."""
    ROWS: tl.constexpr = HEIGHT // PATCH
    COLUMNS: tl.constexpr = WIDTH // PATCH
    # [BT]
    b_index = tl.load(p_index + o_b.to(tl.int64) * n + o_j, mask=m_j, other=0).to(tl.int32)
    b_row, b_column = b_index // COLUMNS, b_index % COLUMNS
    if USE_AUG:
        # modulo the image's sides first: offsets are then >= 0, where division truncates as it floors
        dy = ((tl.load(p_aug) % HEIGHT + HEIGHT) % HEIGHT).to(tl.int32)  # pixels
        dx = ((tl.load(p_aug + 1) % WIDTH + WIDTH) % WIDTH).to(tl.int32)  # pixels
        flip = tl.load(p_aug + 2) != 0
        b_row = (b_row + (2 * dy + PATCH) // (2 * PATCH)) % ROWS
        b_column = (b_column + (2 * dx + PATCH) // (2 * PATCH)) % COLUMNS
        b_y = (b_row * PATCH - dy + HEIGHT) % HEIGHT
        b_x = (b_column * PATCH - dx + WIDTH) % WIDTH
        b_cell = b_row * COLUMNS + tl.where(flip, COLUMNS - 1 - b_column, b_column)
    else:
        flip = False
        b_y, b_x, b_cell = b_row * PATCH, b_column * PATCH, b_index
    return b_cell, b_y, b_x, flip


@triton.jit
def pixel_offsets(b_y, b_x, flip, o_k, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr):
    """Offsets [BT, BK] within one image [C, H, W] of pixels o_k = (channel, row, column) of patches whose first pixel is at b_y, b_x."""
    # [BK]
    o_c, o_u, o_v = o_k // (PATCH * PATCH), o_k // PATCH % PATCH, o_k % PATCH
    o_v = tl.where(flip, PATCH - 1 - o_v, o_v)
    # [BT, BK]
    b_line = (b_y * WIDTH)[:, None] + (o_u * WIDTH)[None, :]
    b_line = tl.where(b_line >= HEIGHT * WIDTH, b_line - HEIGHT * WIDTH, b_line)
    b_at = b_x[:, None] + o_v[None, :]
    b_at = tl.where(b_at >= WIDTH, b_at - WIDTH, b_at)
    return (o_c * (HEIGHT * WIDTH))[None, :] + b_line + b_at


@triton.jit
def patch_embed_fwd(
    p_images, p_index, p_weight, p_bias, p_position, p_prefix, p_aug, p_tokens, batch, n, d,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr, PREFIX: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    USE_BIAS: tl.constexpr, USE_POSITION: tl.constexpr, USE_AUG: tl.constexpr,
):  # fmt: skip
    """images: [B, C, H, W]; index: [B, n]; weight: [d, K]; bias: [d]; position: [N, d]; prefix: [P, d]; aug: [3]; tokens: [B, P + n, d]."""
    K: tl.constexpr = CHANNELS * PATCH * PATCH
    tiles_d = tl.cdiv(d, BD)
    i_t, i_d = tl.program_id(0) // tiles_d, tl.program_id(0) % tiles_d  # neighbours share a token tile: its pixels come from L2
    # [BT] rows of tokens, prefix tokens among them: those read no pixel
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < batch * (PREFIX + n)
    o_b, o_s = o_t // (PREFIX + n), o_t % (PREFIX + n)
    m_j = m_t & (o_s >= PREFIX)
    b_cell, b_y, b_x, flip = locate(p_index, p_aug, o_b, o_s - PREFIX, m_j, n, HEIGHT, WIDTH, PATCH, USE_AUG)
    p_image = p_images + o_b.to(tl.int64) * (CHANNELS * HEIGHT * WIDTH)
    # [BD]
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < d
    # [BT, BD]
    b_t = tl.zeros([BT, BD], dtype=tl.float32)
    for i_k in range(0, K, BK):
        # [BK]
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        # [BT, BK]
        p_p = p_image[:, None] + pixel_offsets(b_y, b_x, flip, o_k, HEIGHT, WIDTH, PATCH)
        b_p = tl.load(p_p, mask=m_j[:, None] & m_k[None, :], other=0.0).to(p_weight.dtype.element_ty)
        # [BK, BD]
        b_w = tl.load(p_weight + o_d[None, :] * K + o_k[:, None], mask=m_d[None, :] & m_k[:, None], other=0.0)
        fence_copies(b_w)
        b_t = settled(tl.dot(b_p, b_w, b_t, input_precision="ieee"), b_w)
    m = m_t[:, None] & m_d[None, :]
    if USE_BIAS:
        b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_t += tl.where(m_j[:, None], b_bias[None, :], 0.0)
    if USE_POSITION:
        b_t += tl.load(p_position + b_cell[:, None] * d + o_d[None, :], mask=m_j[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    if PREFIX > 0:
        b_t += tl.load(p_prefix + o_s[:, None] * d + o_d[None, :], mask=(o_s < PREFIX)[:, None] & m, other=0.0).to(tl.float32)
    tl.store(p_tokens + o_t.to(tl.int64)[:, None] * d + o_d[None, :], b_t.to(p_tokens.dtype.element_ty), mask=m)


@triton.jit
def patch_embed_bwd(
    p_dtokens, p_index, p_weight, p_aug, p_dimages, batch, n, d,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PATCH: tl.constexpr, PREFIX: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, USE_AUG: tl.constexpr,
):  # fmt: skip
    """dtokens: [B, P + n, d]; index: [B, n]; weight: [d, K]; aug: [3]; dimages: [B, C, H, W], written only where an active patch reads."""
    K: tl.constexpr = CHANNELS * PATCH * PATCH
    tiles_k: tl.constexpr = (K + BK - 1) // BK
    i_t, i_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    # [BT] active patches
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < batch * n
    o_b, o_j = o_t // n, o_t % n
    _, b_y, b_x, flip = locate(p_index, p_aug, o_b, o_j, m_t, n, HEIGHT, WIDTH, PATCH, USE_AUG)
    p_row = p_dtokens + (o_b.to(tl.int64) * (PREFIX + n) + PREFIX + o_j) * d
    # [BK]
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    # [BT, BK]
    b_p = tl.zeros([BT, BK], dtype=tl.float32)
    for i_d in range(0, d, BD):
        # [BD]
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < d
        # [BT, BD]
        b_t = tl.load(p_row[:, None] + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0).to(p_weight.dtype.element_ty)
        # [BD, BK]
        b_w = tl.load(p_weight + o_d[:, None] * K + o_k[None, :], mask=m_d[:, None] & m_k[None, :], other=0.0)
        fence_copies(b_w)
        b_p = tl.dot(b_t, b_w, b_p, input_precision="ieee")
    # [BT, BK]
    p_p = (p_dimages + o_b.to(tl.int64) * (CHANNELS * HEIGHT * WIDTH))[:, None] + pixel_offsets(b_y, b_x, flip, o_k, HEIGHT, WIDTH, PATCH)
    tl.store(p_p, b_p.to(p_dimages.dtype.element_ty), mask=m_t[:, None] & m_k[None, :])


def unsupported(function: str, *args) -> str | None:
    """Why these arguments cannot run; None if they can."""
    tensor, index, weight = args[:3]
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {weight.dtype}"
    if function == "forward":
        prefix, pixels = 0 if args[5] is None else args[5].shape[0], tensor[:1].numel()
    else:
        prefix, pixels = args[5], weight.shape[1] // args[4] ** 2 * args[6] * args[7]
    largest = max(tensor.shape[0] * (prefix + index.shape[1]) + 128, weight.numel(), pixels)  # the last tile passes the end by less than 128
    return "it has 2^31 tokens, weights or pixels in one image, or more" if largest >= 2**31 else None


def tile(kernel: str, weight: Tensor, elements: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options of kernel "fwd" or "bwd" for a result of so many elements."""
    name = "float32" if weight.dtype == torch.float32 else "large" if elements >= LARGE_FROM else "small"
    built_in = (FORWARD_TILES if kernel == "fwd" else BACKWARD_TILES)[name]
    BT, BD, BK, warps, stages = tuned.tile("patch_embed", f"{kernel}/{name}", built_in, weight.device)
    return {"BT": BT, "BD": BD, "BK": BK}, {"num_warps": warps, "num_stages": stages}


def forward(
    images: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    augmentation: Tensor | None,
    patch_size: int,
) -> Tensor:
    """Tokens [B, P + n, d] as in op.py."""
    batch, channels, height, width = images.shape
    n, d = index.shape[1], weight.shape[0]
    count = 0 if prefix is None else prefix.shape[0]
    tokens = torch.empty(batch, count + n, d, dtype=weight.dtype, device=images.device)
    rows = batch * (count + n)
    if rows:
        sizes, options = tile("fwd", weight, rows * d)
        images, index, weight = images.contiguous(), index.contiguous(), weight.contiguous()
        bias, position, prefix, augmentation = (None if x is None else x.contiguous() for x in (bias, position, prefix, augmentation))
        absent = weight  # any pointer: its flag keeps it from being read
        patch_embed_fwd[(triton.cdiv(rows, sizes["BT"]) * triton.cdiv(d, sizes["BD"]),)](
            images, index, weight, absent if bias is None else bias, absent if position is None else position, absent if prefix is None else prefix,
            index if augmentation is None else augmentation, tokens, batch, n, d,
            CHANNELS=channels, HEIGHT=height, WIDTH=width, PATCH=patch_size, PREFIX=count, **sizes,
            USE_BIAS=bias is not None, USE_POSITION=position is not None, USE_AUG=augmentation is not None, **options,
        )  # fmt: skip
    return tokens


def backward(
    grad_tokens: Tensor,
    index: Tensor,
    weight: Tensor,
    augmentation: Tensor | None,
    patch_size: int,
    prefix: int,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient [B, C, H, W] of the images, in dtype."""
    batch, (n, d) = grad_tokens.shape[0], (index.shape[1], weight.shape[0])
    channels = weight.shape[1] // patch_size**2
    every = n * patch_size**2 == height * width  # all patches active: each pixel is written, none needs zeroing
    make = torch.empty if every else torch.zeros
    images = make(batch, channels, height, width, dtype=dtype, device=grad_tokens.device)
    rows = batch * n
    if rows:
        sizes, options = tile("bwd", weight, rows * weight.shape[1])
        grad_tokens, index, weight = grad_tokens.contiguous(), index.contiguous(), weight.contiguous()
        patch_embed_bwd[(triton.cdiv(rows, sizes["BT"]) * triton.cdiv(weight.shape[1], sizes["BK"]),)](
            grad_tokens, index, weight, index if augmentation is None else augmentation.contiguous(), images, batch, n, d,
            CHANNELS=channels, HEIGHT=height, WIDTH=width, PATCH=patch_size, PREFIX=prefix, **sizes,
            USE_AUG=augmentation is not None, **options,
        )  # fmt: skip
    return images


def compile_cases() -> list[CompileCase]:
    """Both kernels in every tile: float32 pixels of 224 x 224 in patches of 16, with everything fused; patches of 14 where registers are scarcest."""
    image = {"CHANNELS": 3, "HEIGHT": 224, "WIDTH": 224, "PREFIX": 1, "USE_AUG": True}
    integers = {"batch": "i32", "n": "i32", "d": "i32"}
    cases = []
    for name, patch in (("large", 16), ("small", 16), ("float32", 16), ("large", 14), ("float32", 14)):
        kind = "*fp32" if name == "float32" else "*bf16"
        inputs = {"p_index": "*i32", "p_weight": kind, "p_aug": "*i32"} | integers
        types = inputs | {"p_images": "*fp32", "p_bias": kind, "p_position": kind, "p_prefix": kind, "p_tokens": kind}
        BT, BD, BK, warps, stages = FORWARD_TILES[name]
        constants = image | {"PATCH": patch, "BT": BT, "BD": BD, "BK": BK, "USE_BIAS": True, "USE_POSITION": True}
        cases.append(CompileCase(f"patch_embed/fwd/{name}-p{patch}", patch_embed_fwd, types, constants, warps, stages, aligned=("d",)))
        types = inputs | {"p_dtokens": kind, "p_dimages": "*fp32"}
        BT, BD, BK, warps, stages = BACKWARD_TILES[name]
        constants = image | {"PATCH": patch, "BT": BT, "BD": BD, "BK": BK}
        cases.append(CompileCase(f"patch_embed/bwd/{name}-p{patch}", patch_embed_bwd, types, constants, warps, stages, aligned=("d",)))
    return cases
