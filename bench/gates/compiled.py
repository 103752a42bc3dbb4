"""The compile gate: what the compiler makes of every shipped kernel, compared with a committed file. Needs no GPU.

    python -m bench.gates.compiled                 compile and print the table
    python -m bench.gates.compiled --check         exit 1 if a kernel spills, does not fit, or differs from bench/baseline/compile_gate.json
    python -m bench.gates.compiled --update        rewrite that file; with another Triton, compile_gate_newest.json beside it
    python -m bench.gates.compiled --only layer_norm linear_gelu
    python -m bench.gates.compiled --check --only attention --part 2/8 --jobs 1
    python -m bench.gates.compiled --small         exit 1 if a kernel spills or does not fit on sm_86, sm_89 or sm_120

Every Triton kernel in every tile configuration that ships (`compile_cases()` of each kernel.py) is compiled for sm_80, sm_90 and sm_100, and
where nvcc is found csrc/cuda/*.cu for sm_80 and sm_90a: "csrc", and "cutlass", for sm_90a, where CUTLASS's headers are found too. sm_86, sm_89 and
sm_120 take the configurations of sm_80 in 99 KiB of shared memory: these must fit, and are not compared.

Numbers are compared exactly with the compiler versions of the committed file: compile_gate.json for the Triton of constraints.txt,
compile_gate_newest.json for the newest when it was written. With other versions the differences are only reported. The same compilers make the same
code of the same source: of the kernels whose source the file holds `--check` compiles one in sixteen, with `--all` each. Where the machine code is
that of the file, so are the counts of its instructions: only other code is disassembled.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from zlib import crc32

from smi.console import print_table
from smi.files import write_text
from smi.kernels import versions
from smi.kernels.compile_case import SMALL, SMALLEST

from ..measuring.record import BASELINE, ROOT
from . import cubin, nvcc

COMMITTED = BASELINE / "compile_gate.json"  # of the Triton in constraints.txt; what nvcc compiles stands here alone
NEWEST = BASELINE / "compile_gate_newest.json"  # of the newest Triton
ARCHITECTURES = (80, 90, 100)
SAMPLE = 16  # one of so many kernels is compiled even where the committed file holds its source
CHEAP = ("layer_norm",)  # operations whose kernels compile in a minute
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_90a": 232448, "sm_100": 232448}  # bytes that one program may use
SHARED_LIMIT |= {f"sm_{architecture}": SMALLEST * 1024 for architecture in SMALL}
COLUMNS = {
    "registers": "regs", "stack": "stack B", "spill_ops": "spills", "shared": "smem B", "instructions": "instr", "mma": "tensor core",
    "loads_128": "ldg128", "loads_other": "ldg", "async_128": "cp128", "async_other": "cp", "bulk": "tma",
    "stores_128": "stg128", "stores_other": "stg",
}  # fmt: skip


Part = tuple[int, int]  # (i, n): the i-th of n parts, from 1


def in_part(name: str, part: Part | None) -> bool:
    """Whether a kernel belongs to a part: by its name, so that committed and compiled kernels are parted alike; what nvcc compiles by its files."""
    key = "/".join(name.split("/")[:2]) if nvcc.group_of(name) else name
    return part is None or crc32(key.encode()) % part[1] == part[0] - 1


def triton_cases(only: list[str] | None, part: Part | None = None) -> list:
    """The compile cases of all operations, or of those named."""
    cases = [
        case
        for operation in versions.OPERATIONS
        if versions.exists(operation, "triton") and (not only or operation in only)
        for case in versions.load(operation, "triton").compile_cases()
    ]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), f"two compile cases have the same name: {sorted({n for n in names if names.count(n) > 1})}"
    return [case for case in cases if in_part(case.name, part)]


def compile_triton(case, architecture: int, known: dict | None = None, always: bool = True) -> dict:
    """Facts of one kernel for one architecture. known: those of the committed file, which are returned where they are of this source and these
    options; always: not even then."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=case.kernel, signature=case.signature(), constexprs=case.constants, attrs=case.attributes())
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages} | ({"maxnreg": case.maxnreg} if case.maxnreg else {})
    digest = sha256(f"{source.hash()} {sorted(options.items())}".encode()).hexdigest()[:16]
    in_sample = sha256(f"{case.name} {architecture}".encode()).digest()[0] % SAMPLE == 0
    if known and known.get("source") == digest and not (always or in_sample):
        return known
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return cubin.facts(compiled.asm["cubin"], known) | {"shared": compiled.metadata.shared, "source": digest}


_cases: list = []  # what the worker processes, which are forks, compile by its place in this list
_known: dict[str, dict] = {}  # the committed facts
_always: list[bool] = [True]  # whether what they hold is compiled too


def compile_work(work: tuple[int | Path, int | str]) -> dict[str, dict]:
    """Facts by name for the case at a place of `_cases` or a file of csrc, for one architecture."""
    what, architecture = work
    if isinstance(what, Path):
        return nvcc.compile_one(what, architecture, {name: on[architecture] for name, on in _known.items() if architecture in on})
    case = _cases[what]
    return {case.name: compile_triton(case, architecture, _known.get(case.name, {}).get(f"sm_{architecture}"), _always[0])}


def ships_for(case) -> tuple[int, ...]:
    """The architectures for which a case is compiled."""
    held = case.architectures or ARCHITECTURES
    return (*held, *(SMALL if 80 in held and case.shared <= SMALLEST else ()))


def compile_all(
    cases: list, sources: list[Path], known: dict[str, dict], jobs: int | None, among: tuple[int, ...] = ARCHITECTURES, always: bool = True
) -> dict[str, dict]:
    """{name: {architecture: facts}} of Triton cases, for architectures among some, and files of csrc, in `jobs` processes, by default one for each
    processor."""
    _cases[:] = cases
    _known.clear()
    _known.update(known)
    _always[:] = [always]
    work: list = [(i, a) for i, case in enumerate(cases) for a in ships_for(case) if a in among]
    work += [(source, architecture) for source in sources for architecture in nvcc.architectures(source)]
    kernels: dict[str, dict] = {case.name: {} for case in cases}
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        for done, ((_, architecture), found) in enumerate(zip(work, pool.map(compile_work, work), strict=True), 1):
            for name, facts in found.items():
                kernels.setdefault(name, {})[architecture if isinstance(architecture, str) else f"sm_{architecture}"] = facts
            progress(f"{done}/{len(work)} {next(iter(found), '')}")
    return {name: found for name, found in kernels.items() if found}


def progress(text: str) -> None:
    """Show what is being compiled, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def committed_for(triton: str | None) -> tuple[Path, dict]:
    """The file that a Triton is held against, and what it says, what nvcc compiles included."""
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {"versions": {}, "kernels": {}}
    if triton == committed["versions"].get("triton", triton):
        return COMMITTED, committed
    newest = json.loads(NEWEST.read_text()) if NEWEST.exists() else {"versions": {}, "kernels": {}}
    by_nvcc = {name: v for name, v in committed["kernels"].items() if nvcc.group_of(name)}
    return NEWEST, {"versions": committed["versions"] | newest["versions"], "kernels": newest["kernels"] | by_nvcc}


def measure(only: list[str] | None, part: Part | None = None, committed: dict | None = None, jobs: int | None = None, always: bool = True) -> dict:
    """All facts: {"versions": {compiler: version}, "kernels": {name: {architecture: facts}}}. committed: earlier ones, to spare work. always: compile
    also what they hold already, by the same compilers."""
    versions, sources = cubin.compiler_versions(), []
    for group in nvcc.GROUPS:
        if only and group not in only:
            continue
        if nvcc.found(group):
            versions |= nvcc.versions(group)
            sources += [source for source in nvcc.sources(group) if in_part(nvcc.prefix(source), part)]
        else:
            print(f"{group} is not compiled: there is no nvcc, or there are no headers of CUTLASS")
    known = committed or {"versions": {}, "kernels": {}}
    always = always or any(known["versions"].get(name) != version for name, version in cubin.compiler_versions().items())
    kernels = compile_all(triton_cases(only, part), sources, known["kernels"], jobs, always=always)
    progress("")
    return {"versions": versions, "kernels": kernels}


def measure_small(only: list[str] | None, part: Part | None = None, jobs: int | None = None, least: int = 0) -> dict:
    """The facts of Triton's kernels for SMALL. least: leave out what takes less shared memory on sm_80, by the committed file."""
    committed = json.loads(COMMITTED.read_text())["kernels"]
    cases = [case for case in triton_cases(only, part) if committed.get(case.name, {}).get("sm_80", {}).get("shared", least) >= least]
    kernels = compile_all(cases, [], {}, jobs, SMALL)
    progress("")
    return {"versions": cubin.compiler_versions(), "kernels": kernels}


def check_small(measured: dict) -> int:
    """Print what spills or does not fit; the exit code."""
    wrong = faults(measured)
    print("\n".join(wrong) or f"{len(measured['kernels'])} kernel configurations fit without spills on sm_{', sm_'.join(map(str, SMALL))}")
    return int(bool(wrong))


def as_text(versions: dict, kernels: dict) -> str:
    """JSON with one line per kernel and architecture, so that a change is a line of the diff."""

    def lines(architectures: dict) -> str:
        return ",\n".join(f'   "{architecture}": {json.dumps(facts)}' for architecture, facts in architectures.items())

    body = ",\n".join(f'  "{name}": {{\n{lines(kernels[name])}\n  }}' for name in sorted(kernels))
    return f'{{\n "versions": {json.dumps(versions)},\n "kernels": {{\n{body}\n }}\n}}\n'


def faults(measured: dict) -> list[str]:
    """What no shipped configuration may do, whatever the committed file says."""
    found = []
    for name, architectures in measured["kernels"].items():
        for architecture, facts in architectures.items():
            if facts["stack"] or facts.get("spill_ops"):
                found.append(f"{name} {architecture}: spills, {facts['stack']} bytes of stack, {facts.get('spill_ops', 0)} local loads and stores")
            if facts["shared"] > SHARED_LIMIT[architecture]:
                found.append(f"{name} {architecture}: {facts['shared']} bytes of shared memory, {SHARED_LIMIT[architecture]} at most fit")
    return found


def could_compile(name: str, measured: dict) -> bool:
    """Whether what compiles a kernel was there: nvcc for csrc, CUTLASS's headers too for cutlass."""
    return {None: True, "csrc": "nvcc" in measured["versions"], "cutlass": "cutlass" in measured["versions"]}[nvcc.group_of(name)]


def differences(measured: dict, committed: dict, only: list[str] | None, part: Part | None = None) -> list[tuple[str, str, str, object, object]]:
    """(kernel, architecture, fact, committed, now) for everything that is not equal, the digest of the code aside."""

    def concerns(name: str) -> bool:
        return could_compile(name, measured) and in_part(name, part) and (not only or name.split("/")[0] in only)

    changed = []
    old, new = ({name: v for name, v in side["kernels"].items() if concerns(name)} for side in (committed, measured))
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, {}), new.get(name, {})
        for architecture in sorted(before.keys() | after.keys()):
            a, b = before.get(architecture, {}), after.get(architecture, {})
            facts = sorted((a.keys() | b.keys()) - {"code", "source"})
            changed += [(name, architecture, fact, a.get(fact), b.get(fact)) for fact in facts if a.get(fact) != b.get(fact)]
    return changed


def show(measured: dict) -> None:
    """Print the table of all facts."""

    def cell(value: object) -> object:
        return (" ".join(f"{k} {v}" for k, v in value.items()) or "-") if isinstance(value, dict) else "" if value is None else value

    rows = [
        [name, architecture, *(cell(facts.get(key)) for key in COLUMNS)]
        for name, architectures in measured["kernels"].items()
        for architecture, facts in architectures.items()
    ]
    print_table("compiled kernels: " + ", ".join(f"{k} {v}" for k, v in measured["versions"].items()), ["kernel", "arch", *COLUMNS.values()], rows)


def check(measured: dict, committed: dict, only: list[str] | None, part: Part | None = None) -> int:
    """Print what is wrong or changed; the exit code."""
    wrong = faults(measured)
    for line in wrong:
        print(line)
    changed = differences(measured, committed, only, part)
    same = all(committed["versions"].get(name) == version for name, version in measured["versions"].items())
    if changed:
        print_table("changed against the committed file", ["kernel", "arch", "fact", "committed", "now"], changed)
        if not same:
            print(f"not held against it: compilers are {measured['versions']}, the file's are {committed['versions']}")
        else:
            print("if this is meant, look at the numbers and run python -m bench.gates.compiled --update")
    else:
        print(f"{len(measured['kernels'])} kernel configurations are as committed")
    return 1 if wrong or (changed and same) else 0


def update(measured: dict, path: Path, committed: dict, only: list[str] | None, part: Part | None) -> None:
    """Rewrite a committed file: what was compiled now, and of what it had the rest, for example csrc where there is no nvcc."""

    def compiled(name: str) -> bool:
        return could_compile(name, measured) and in_part(name, part) and (not only or name.split("/")[0] in only)

    kernels = {name: v for name, v in committed["kernels"].items() if not compiled(name)} | measured["kernels"]
    versions = committed["versions"] | measured["versions"]
    if path == NEWEST:
        kernels = {name: v for name, v in kernels.items() if not nvcc.group_of(name)}
        versions = {name: version for name, version in versions.items() if name in cubin.compiler_versions()}
    write_text(path, as_text(versions, kernels))
    print(f"wrote {path}")


def check_compiled(full: bool) -> int:
    """The compile gate in a process of its own, in which Triton compiles instead of interpreting; 1 if it fails."""
    if importlib.util.find_spec("triton") is None:
        print("compile gate: not run, triton is not installed")
        return 0
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    failed = False
    for what in ("--check", "--small"):
        command = [sys.executable, "-m", "bench.gates.compiled", what, *(["--all"] if full else ["--only", *CHEAP])]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(f"compile gate: {(done.stdout.strip() or done.stderr.strip()[-2000:])}")
        failed = failed or done.returncode != 0
    return int(failed)


def part_of(text: str) -> Part:
    """ "2/8" as (2, 8)."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise ValueError
    return i, n


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--check", action="store_true", help="compare with the committed file, exit 1 on a difference")
    made.add_argument("--update", action="store_true", help="rewrite the committed file")
    made.add_argument("--small", action="store_true", help="sm_86, sm_89 and sm_120 instead: exit 1 if a kernel spills or does not fit")
    made.add_argument("--least", type=int, default=0, metavar="BYTES", help="of --small: what takes at least so much shared memory on sm_80")
    made.add_argument("--only", nargs="+", metavar="OPERATION", choices=(*versions.OPERATIONS, *nvcc.GROUPS), help="these, csrc, cutlass")
    made.add_argument("--part", type=part_of, metavar="I/N", help="the I-th of N parts of the configurations")
    made.add_argument("--all", action="store_true", help="of --check: compile also what the committed file holds already, by its source")
    made.add_argument("--jobs", type=int, metavar="N", help="processes; by default one for each processor")
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser().error("TRITON_INTERPRET=1 is set: interpreted kernels are not compiled, unset it")
    if options.small:
        return check_small(measure_small(options.only, options.part, options.jobs, options.least))
    path, committed = committed_for(cubin.compiler_versions()["triton"])
    measured = measure(options.only, options.part, committed, options.jobs, always=options.all or not options.check)
    if options.update:
        update(measured, path, committed, options.only, options.part)
    if options.check:
        return check(measured, committed, options.only, options.part)
    show(measured)
    return 1 if faults(measured) else 0


if __name__ == "__main__":
    sys.exit(main())
