"""Number formats and the layouts of matrix fragments and shared-memory descriptors (PTX ISA, warp-level and warpgroup-level matrix instructions).

In all fragments a lane is 4 g + t: g, one of 8, says the row (of B: the column), t, one of 4, the pair of columns."""

from functools import lru_cache

import numpy as np

SWIZZLE = {0: 0, 1: 3, 2: 2, 3: 1}  # mode of a descriptor: how many address bits from bit 4 are XORed with those from bit 7


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def as_floats(bits: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns as float32."""
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def halves(x: np.ndarray, bf16: bool) -> np.ndarray:
    """uint32 [...] as the pair of floats it holds, low half first: float32 [..., 2]."""
    return as_floats(np.ascontiguousarray(x)[..., None].view(np.uint16), "bf16" if bf16 else "f16")


def pack(x: np.ndarray, bf16: bool) -> np.ndarray:
    """The inverse: float32 [..., 2] as uint32 [...]."""
    bits = round_bf16(x) if bf16 else x.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(bits).view(np.uint32)[..., 0]


# ---- 8x8 matrices of 16 bits


def to_registers(tiles: np.ndarray, transposed: bool) -> np.ndarray:
    """uint16 [warps, count, 8, 8] as registers: uint32 [lanes, count]."""
    tiles = tiles.swapaxes(2, 3) if transposed else tiles
    pairs = np.ascontiguousarray(tiles).view(np.uint32)  # [warps, count, g, t]
    return pairs.transpose(0, 2, 3, 1).reshape(-1, tiles.shape[1])


def of_registers(registers: np.ndarray, transposed: bool) -> np.ndarray:
    count = registers.shape[1]
    pairs = registers.reshape(-1, 8, 4, count).transpose(0, 3, 1, 2)
    tiles = np.ascontiguousarray(pairs).view(np.uint16)
    return np.ascontiguousarray(tiles.swapaxes(2, 3) if transposed else tiles)


# ---- fragments of mma and wgmma


def a_tile(registers: np.ndarray, kind: str) -> np.ndarray:
    """A: uint32 [lanes, 4] as float64 [warps, 16, K]. Registers alternate between the rows g and g + 8, then go on to the next columns."""
    if kind == "tf32":
        x = (registers & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 8, 4, 2, 2)  # g t, half of the columns, half of the rows
        return x.transpose(0, 4, 1, 3, 2).reshape(-1, 16, 8).astype(np.float64)
    x = halves(registers, kind == "bf16").reshape(-1, 8, 4, 2, 2, 2)  # g t, half of the columns, half of the rows, one of the pair
    return x.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16).astype(np.float64)


def b_tile(registers: np.ndarray, kind: str) -> np.ndarray:
    """B: uint32 [lanes, 2] as float64 [warps, K, 8]."""
    if kind == "tf32":
        x = (registers & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 8, 4, 2)
        return x.transpose(0, 3, 2, 1).reshape(-1, 8, 8).astype(np.float64)
    x = halves(registers, kind == "bf16").reshape(-1, 8, 4, 2, 2)  # g t, half of the rows, one of the pair
    return x.transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8).astype(np.float64)


def c_tile(registers: np.ndarray) -> np.ndarray:
    """C: float32 [lanes, 4] as float64 [warps, 16, 8]."""
    return registers.reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8).astype(np.float64)


def of_c_tile(tile: np.ndarray) -> np.ndarray:
    return tile.astype(np.float32).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)


def wide_tile(registers: np.ndarray) -> np.ndarray:
    """Accumulators of wgmma: float32 [lanes, N / 2] as float64 [groups, 64, N]; each warp has 16 rows."""
    n = 2 * registers.shape[1]
    x = registers.reshape(-1, 4, 8, 4, n // 8, 2, 2)  # group, warp, g, t, eight columns, half of the rows, one of the pair
    return x.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, 64, n).astype(np.float64)


def of_wide_tile(tile: np.ndarray) -> np.ndarray:
    n = tile.shape[2]
    x = tile.astype(np.float32).reshape(-1, 4, 2, 8, n // 8, 4, 2)
    return np.ascontiguousarray(x.transpose(0, 1, 3, 5, 4, 2, 6).reshape(-1, n // 2))


@lru_cache(4096)
def described(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """Shared addresses of the elements [rows, 16] of a wgmma operand of 16-bit numbers, rows being M or N. transposed: rows are contiguous."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise NotImplementedError("a base offset in a matrix descriptor")
    bits = SWIZZLE[descriptor >> 62]
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    width = 16 << bits  # bytes of a swizzled row
    if transposed:
        if bits:
            place = row % (width // 2) * 2 + row // (width // 2) * leading + k % 8 * width + k // 8 * stride
        else:
            place = row % 8 * 2 + row // 8 * stride + k % 8 * 16 + k // 8 * leading
    elif bits:
        place = row % 8 * width + row // 8 * stride + k * 2
    else:
        place = row % 8 * 16 + row // 8 * stride + k % 8 * 2 + k // 8 * leading
    place = place + start
    return place ^ ((place >> 7 & (1 << bits) - 1) << 4)
