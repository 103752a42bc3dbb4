"""PTX text, parsed: the registers, parameters, shared variables and instructions of one kernel. What an instruction does is in the other modules."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

TYPES = {f"{k}{n}": np.dtype(f"{c}{n // 8}") for k, c in (("s", "i"), ("u", "u"), ("b", "u")) for n in (8, 16, 32, 64)}
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "bf16": np.dtype("u2"), "pred": np.dtype("?")}
TYPES |= {"bf16x2": np.dtype("u4"), "f16x2": np.dtype("u4"), "tf32": np.dtype("u4")}
LAST = ("bra", "ret", "exit", "bar", "barrier")  # end a segment
ENTRY = r"\.visible \.entry ({name})\s*\((.*?)\)\s*([^{{]*?)^\{{\s*\n(.*?)^\}}"
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.ptr)?(?:\s+\.(?!align)\w+)*(?:\s+\.align\s+\d+)?\s+([\w$]+)(?:\[(\d+)\])?")
VARIABLE = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")


class Fault(Exception):
    """The program did what no program may."""


@dataclass
class Instruction:
    """One statement: `@%p1 ld.global.b32 %r1, [%rd1];` has guard "%p1", op "ld", mods ["global", "b32"] and two operands."""

    text: str
    line: int
    guard: str | None
    negated: bool
    op: str
    mods: list[str]
    operands: list[str]
    run: Callable | None = None  # (block, mask of its threads); set when the program is linked

    @property
    def type(self) -> str:
        return self.mods[-1]

    @property
    def is_barrier(self) -> bool:
        """Whether all threads of the block wait here for each other."""
        return self.op in ("bar", "barrier") and "warp" not in self.mods

    @property
    def in_shared(self) -> bool:
        """Whether it loads from or stores to shared memory, of its own block where it says so."""
        return "shared" in self.mods or "shared_cta" in self.mods

    def __str__(self) -> str:
        return f"line {self.line}: {self.text[:90]}"


@dataclass
class Parameter:
    """A kernel's parameter: a number, or a struct of `bytes` bytes."""

    name: str
    kind: str
    bytes: int


@dataclass
class Program:
    """One kernel. threads: of a block, None where the text leaves it to the launch. segments: lists of instructions that run without a stop, only the
    last of which may be a branch, a barrier or the end. labels: segment by label. variables: offset in shared memory by name; None: dynamic."""

    name: str
    parameters: list[Parameter]
    threads: int | None
    registers: dict[str, np.dtype] = field(default_factory=dict)
    segments: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    variables: dict[str, int | None] = field(default_factory=dict)
    static_bytes: int = 0

    def instructions(self) -> list[Instruction]:
        return [step for segment in self.segments for step in segment]


def parse(text: str, name: str | None = None) -> Program:
    """The kernel of this name, or the first. Raises ValueError where there is none."""
    head = re.search(ENTRY.format(name=re.escape(name) if name else r"[\w$]+"), text, re.S | re.M)
    if not head:
        raise ValueError(f"the text has no kernel {name or ''}; its kernels are {', '.join(names(text)) or 'none'}")
    found, parameters, limits, body = head.groups()
    threads = re.search(r"\.reqntid (\d+)", limits)
    made = Program(
        found,
        [Parameter(name, kind, int(count or TYPES[kind].itemsize)) for kind, name, count in PARAMETER.findall(parameters)],
        int(threads[1]) if threads else None,
    )
    for align, variable, count in VARIABLE.findall(text[: head.start()]) + VARIABLE.findall(body):
        _add_variable(made, variable, int(align), count)
    first = text[: head.start(4)].count("\n") + 1
    for label, statement, line in _statements(body, first):
        if label:
            _add_label(made, label)
        else:
            _add_statement(made, statement, line)
    return made


def names(text: str) -> list[str]:
    """Names of the kernels in a text, in its order."""
    return re.findall(r"\.visible \.entry ([\w$]+)", text)


def _statements(body: str, first: int):
    """(label, "", line) or ("", statement, line) in order; statements may span lines or share one, and braces around inline assembly fall away."""
    pending, start = "", 0
    for number, raw in enumerate(body.splitlines(), first):
        line = raw.split("//")[0].strip()
        if line.startswith((".loc", ".file", ".pragma")):
            continue
        if label := re.match(r"([$\w]+):$", line):
            yield label[1], "", number
            continue
        start = start if pending else number
        pending = f"{pending} {line}".strip()
        while ";" in pending:
            statement, pending = (part.strip() for part in pending.split(";", 1))
            yield "", statement if statement.startswith("@") else statement.lstrip("{}").strip(), start
        if pending in ("{", "}"):
            pending = ""


def _add_variable(program: Program, name: str, align: int, count: str) -> None:
    if not count:
        program.variables[name] = None
        return
    program.static_bytes = -(-program.static_bytes // align) * align
    program.variables[name] = program.static_bytes
    program.static_bytes += int(count)


def _add_label(program: Program, name: str) -> None:
    if program.segments[-1]:
        program.segments.append([])
    program.labels[name] = len(program.segments) - 1


def _add_statement(program: Program, text: str, line: int) -> None:
    if text.startswith(".reg"):
        kind, declared = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        for name in map(str.strip, declared.split(",")):
            many = re.match(r"(.*)<(\d+)>", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                program.registers[each] = TYPES[kind]
        return
    if not text or text.startswith("."):
        return
    guard = re.match(r"@(!?)(\S+)\s+(.*)", text, re.S)
    name, _, rest = re.match(r"(\S+)(\s*)(.*)", guard[3] if guard else text, re.S).groups()
    op, *mods = name.replace("::", "_").split(".")
    program.segments[-1].append(Instruction(text, line, guard and guard[2], bool(guard and guard[1]), op, mods, _operands(rest)))
    if op in LAST and "warp" not in mods:
        program.segments.append([])


def _operands(text: str) -> list[str]:
    """Split at commas that no brace or bracket encloses."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]
