"""Scan of sm_90 machine code for a fault of ptxas: a register that a wgmma in flight still reads, or will write, is used before the wait.

    python -m bench.executor.machine_code [OPERATION ...]     every shipped kernel; exit code 1 if one has the fault

The scan follows the text and goes through loops twice; nothing is executed.
"""

import re
import sys
import tempfile
from collections import Counter

from ..gates import cubin

Code = list[tuple[int, str]]  # address and instruction


def disassemble(binary: bytes) -> Code:
    """The instructions of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return instructions(cubin.run(cubin.tool("cuobjdump"), "-sass", file.name))


def instructions(text: str) -> Code:
    """Those of a disassembly."""
    return [(int(m[1], 16), m[2].strip()) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]


def registers_written(op: str) -> int:
    """How many registers an instruction writes, from the first it names."""
    if op.startswith("LDSM"):
        return int(op[-1]) if op[-1] in "24" else 1
    return 4 if ".128" in op else 2 if ".64" in op or ".WIDE" in op else 1


class Scan:
    """hazards: lines of text. counts: wgmma by where A is, and waits."""

    def __init__(self, code: Code):
        self.hazards: list[str] = []
        self.counts: Counter[str] = Counter()
        self._groups: list[tuple[dict, dict]] = []  # of wgmma in flight, oldest first: registers read and written, and by what
        self._open: tuple[dict, dict] = ({}, {})
        for address, line in code:
            self._step(address, line)
            back = re.match(r"(?:@!?U?P\d+ +)?BRA (0x[0-9a-f]+)", line)
            if back and int(back[1], 16) < address:
                counts = self.counts.copy()
                for again in code:
                    if int(back[1], 16) <= again[0] <= address:
                        self._step(*again)
                self.counts = counts
        self.hazards = list(dict.fromkeys(self.hazards))

    def _in_flight(self, i: int) -> dict[int, str]:
        return {register: by for group in [*self._groups, self._open] for register, by in group[i].items()}

    def _step(self, address: int, line: str) -> None:
        line = re.sub(r"^@!?U?P\d+\s+", "", line)
        op, _, rest = line.partition(" ")
        where = f"{address:04x} {line}"
        if op.startswith("WARPGROUP.DEPBAR"):
            self._wait(int(line.split(",")[-1], 16))
        elif op.startswith("HGMMA"):
            self._multiply(where, op, [x.strip() for x in rest.split(",")], "gsb0" in line)
        else:
            self._other(where, op, rest)

    def _wait(self, left: int) -> None:
        self.counts["waits that leave some" if left else "waits for all"] += 1
        self._groups = self._groups[max(0, len(self._groups) - left) :]

    def _multiply(self, where: str, op: str, operands: list[str], commits: bool) -> None:
        reading, writing = self._in_flight(0), self._in_flight(1)
        n, first = int(re.search(r"64x(\d+)x", op)[1]), int(operands[0][1:])
        target = range(first, first + n // 2)
        left = re.match(r"R(\d+)", operands[1])
        self.counts["A in registers" if left else "A in shared memory"] += 1
        self.hazards += [f"{where} writes R{r}, which {reading[r]} reads" for r in target if r in reading]
        if left:
            used = range(int(left[1]), int(left[1]) + 4)
            self.hazards += [f"{where} reads R{r}, which {writing[r]} writes" for r in used if r in writing]
            self._open[0].update(dict.fromkeys(used, where))
        self._open[1].update(dict.fromkeys(target, where))
        if commits:
            self._groups, self._open = [*self._groups, self._open], ({}, {})

    def _other(self, where: str, op: str, rest: str) -> None:
        reading, writing = self._in_flight(0), self._in_flight(1)
        touched = {int(r) for r in re.findall(r"\bR(\d+)", rest)}
        self.hazards += [f"{where} uses R{r}, which {writing[r]} writes" for r in touched if r in writing]
        target = re.match(r"R(\d+)", rest)
        if target and not op.startswith(("ST", "RED")):
            written = range(int(target[1]), int(target[1]) + registers_written(op))
            self.hazards += [f"{where} writes R{r}, which {reading[r]} reads" for r in written if r in reading]


def main(operations: list[str]) -> int:
    from .compiling import build_case
    from .run import cases_for

    found, kernels = 0, 0
    for operation in operations:
        for case in cases_for(operation, 90):
            scan = Scan(disassemble(build_case(case, 90).binary))
            kernels += any(name.startswith("A in") for name in scan.counts)
            if scan.hazards:
                found += 1
                print(case.name, f"{len(scan.hazards)} hazards:", *scan.hazards[:3], sep="\n    ", flush=True)
    print(f"{kernels} kernels have wgmma, {found} have hazards")
    return 1 if found else 0


if __name__ == "__main__":
    from smi.kernels import versions

    sys.exit(main(sys.argv[1:] or list(versions.OPERATIONS)))
