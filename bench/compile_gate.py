"""The compile gate: what the compiler makes of every shipped kernel, compared with a committed file. Needs no GPU.

    python -m bench.compile_gate                 compile and print the table
    python -m bench.compile_gate --check         exit 1 if a kernel spills, does not fit, or differs from bench/results/compile_gate.json
    python -m bench.compile_gate --update        rewrite that file
    python -m bench.compile_gate --only layer_norm linear_gelu

Every Triton kernel in every tile configuration that ships (`compile_cases()` of each kernel.py) is compiled for sm_80, sm_90 and sm_100, and
csrc/*.cu for sm_80 and sm_90a where nvcc is found. Numbers are compared exactly with the compiler versions of the committed file; with other
versions the differences are only reported.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from smi.kernels import dispatch

from . import cubin, nvcc
from .files import write_text
from .table import print_table

RESULTS = Path(__file__).parent / "results" / "compile_gate.json"
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_90a": 232448, "sm_100": 232448}  # bytes that one program may use
COLUMNS = {
    "registers": "regs", "stack": "stack B", "spill_ops": "spills", "shared": "smem B", "instructions": "instr", "mma": "tensor core",
    "loads_128": "ldg128", "loads_other": "ldg", "async_128": "cp128", "async_other": "cp", "bulk": "tma",
    "stores_128": "stg128", "stores_other": "stg",
}  # fmt: skip


def triton_cases(only: list[str] | None) -> list:
    """The compile cases of all operations, or of those named."""
    cases = [
        case
        for operation in dispatch.OPERATIONS
        if dispatch.exists(operation, "triton") and (not only or operation in only)
        for case in dispatch.load(operation, "triton").compile_cases()
    ]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), f"two compile cases have the same name: {sorted({n for n in names if names.count(n) > 1})}"
    return cases


def compile_triton(case, architecture: int) -> dict:
    """Facts of one kernel for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=case.kernel, signature=case.signature(), constexprs=case.constants, attrs=case.attributes())
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return cubin.facts(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


_cases: list = []  # what the worker processes, which are forks, compile by its place in this list


def compile_place(work: tuple[int, int]) -> dict:
    place, architecture = work
    return compile_triton(_cases[place], architecture)


def compile_cases(cases: list) -> dict[str, dict]:
    """{name: {architecture: facts}}, on all processors."""
    _cases[:] = cases
    work = [(i, a) for i, case in enumerate(cases) for a in case.architectures or ARCHITECTURES]
    kernels: dict[str, dict] = {case.name: {} for case in cases}
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        for done, ((place, architecture), facts) in enumerate(zip(work, pool.map(compile_place, work), strict=True), 1):
            kernels[cases[place].name][f"sm_{architecture}"] = facts
            progress(f"{done}/{len(work)} {cases[place].name}")
    return kernels


def progress(text: str) -> None:
    """Show what is being compiled, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def measure(only: list[str] | None) -> dict:
    """All facts: {"versions": {compiler: version}, "kernels": {name: {architecture: facts}}}."""
    kernels = compile_cases(triton_cases(only))
    progress("")
    versions = cubin.compiler_versions()
    if not only or "csrc" in only:
        if nvcc.found():
            versions["nvcc"] = nvcc.version()
            kernels |= nvcc.compile_all()
        else:
            print("csrc is not compiled: there is no nvcc")
    return {"versions": versions, "kernels": kernels}


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


def differences(measured: dict, committed: dict, only: list[str] | None) -> list[tuple[str, str, str, object, object]]:
    """(kernel, architecture, fact, committed, now) for everything that is not equal."""

    def concerns(name: str) -> bool:
        return (not only or name.split("/")[0] in only) and (not name.startswith("csrc/") or "nvcc" in measured["versions"])

    changed = []
    old, new = ({name: v for name, v in side["kernels"].items() if concerns(name)} for side in (committed, measured))
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, {}), new.get(name, {})
        for architecture in sorted(before.keys() | after.keys()):
            a, b = before.get(architecture, {}), after.get(architecture, {})
            changed += [(name, architecture, fact, a.get(fact), b.get(fact)) for fact in sorted(a.keys() | b.keys()) if a.get(fact) != b.get(fact)]
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


def check(measured: dict, committed: dict, only: list[str] | None) -> int:
    """Print what is wrong or changed; the exit code."""
    wrong = faults(measured)
    for line in wrong:
        print(line)
    changed = differences(measured, committed, only)
    same = all(committed["versions"].get(name) == version for name, version in measured["versions"].items())
    if changed:
        print_table("changed against the committed file", ["kernel", "arch", "fact", "committed", "now"], changed)
        if not same:
            print(f"not held against it: compilers are {measured['versions']}, the file's are {committed['versions']}")
        else:
            print("if this is meant, look at the numbers and run python -m bench.compile_gate --update")
    else:
        print(f"{len(measured['kernels'])} kernel configurations are as in {RESULTS.name}")
    return 1 if wrong or (changed and same) else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed file, exit 1 on a difference")
    parser.add_argument("--update", action="store_true", help="rewrite the committed file")
    parser.add_argument("--only", nargs="+", metavar="OPERATION", help="these operations, or csrc")
    options = parser.parse_args(arguments)
    if options.only and (unknown := set(options.only) - {*dispatch.OPERATIONS, "csrc"}):
        parser.error(f"no such operation: {', '.join(sorted(unknown))}; there are {', '.join(dispatch.OPERATIONS)} and csrc")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels are not compiled, unset it")
    measured = measure(options.only)
    committed = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"versions": {}, "kernels": {}}
    if options.update:
        kept = {name: v for name, v in committed["kernels"].items() if options.only and name.split("/")[0] not in options.only}
        write_text(RESULTS, as_text(committed["versions"] | measured["versions"], kept | measured["kernels"]))
        print(f"wrote {RESULTS}")
    if options.check:
        return check(measured, committed, options.only)
    show(measured)
    return 1 if faults(measured) else 0


if __name__ == "__main__":
    sys.exit(main())
