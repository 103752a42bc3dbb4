"""One kernel in one shipped tile configuration, as the compile gate and the ahead-of-time tests compile it."""

from dataclasses import dataclass
from typing import Any

SMALL = (86, 89, 120)  # architectures
SMALLEST = 99  # KiB of shared memory that a block gets there, the least of the architectures that are compiled for


@dataclass(frozen=True)
class CompileCase:
    """name: "operation/kernel/configuration", unique. types: Triton type of every runtime argument, for example {"p_x": "*bf16", "d": "i32"}.
    constants: value of every constexpr argument. aligned: names of arguments that are multiples of 16, pointers besides (what the launcher sees for
    the shapes of the usual models). architectures: capabilities times 10 for which this configuration ships, None for all but SMALL, which take what
    sm_80 takes where SMALLEST suffices. shared: KiB that a block must get. maxnreg: registers of a thread at most."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    aligned: tuple[str, ...] = ()
    architectures: tuple[int, ...] | None = None
    shared: int = SMALLEST
    maxnreg: int | None = None

    def signature(self) -> dict[str, str]:
        """All arguments of the kernel in order, constants marked as such."""
        return {name: self.types.get(name, "constexpr") for name in self.kernel.arg_names}

    def attributes(self) -> dict[tuple[int], list[list]]:
        """Divisibility by 16 of the pointers and of `aligned`, in Triton's form."""
        names = self.kernel.arg_names
        sure = [n for n, kind in self.types.items() if kind.startswith("*") or n in self.aligned]
        return {(names.index(n),): [["tt.divisibility", 16]] for n in sure}
