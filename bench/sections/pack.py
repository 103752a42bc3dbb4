"""What is made before and carried to a machine that has no network and is lent for minutes: `make gpu-pack`.

    python -m bench.sections.pack                        gpu-pack/: commit, the CUDA libraries for sm_90a, Triton's cache for sm_90
    python -m bench.sections.pack --earlier FOLDER       and what an earlier call brought back, so that the next one goes on with it

Everything is checked there: commit and libraries by the digest of the sources, the cache by Triton's own key. What does not fit is left out, and is
made there instead, which takes longer. Run it with the Python and the Triton that the machine has: Triton's key depends on them (docs/gpu.md).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..measuring import code
from . import outputs

FOLDER = code.ROOT / Path(code.PACKED).parent
CACHE, KEY, EARLIER = "triton", "triton-key.json", "earlier"
LIBRARIES = {"attention": "attention_forward", "linear": "linear_gelu_gradient"}  # of csrc/build.py, and an operation that each has
MOST_BYTES = 64 << 20  # with the working tree
ARCHITECTURE = "9.0a"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], metavar="FOLDER", help="files that earlier calls brought back")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args(arguments)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    outputs.write_bytes(code.ROOT / code.PACKED, json.dumps(code.commit() | {"digest": code.digest()}).encode())
    for number, folder in enumerate(options.earlier):
        shutil.copy(folder / outputs.PROGRESS, FOLDER / f"{EARLIER}-{number}.jsonl")
    for name in LIBRARIES:
        print(f"library of {name}: {build_library(name)}")
    print(f"Triton's cache: {warm_cache(options.jobs)}")
    size = total_bytes()
    print(f"{size / 2**20:.1f} MiB with the working tree, {MOST_BYTES >> 20} at most")
    return int(size > MOST_BYTES)


def total_bytes() -> int:
    """Of the working tree as it travels, and of the pack."""
    listed = code.git("ls-files", "--cached", "--others", "--exclude-standard") or ""
    files = [code.ROOT / name for name in listed.splitlines()]
    return sum(path.stat().st_size for path in (*files, *FOLDER.rglob("*")) if path.is_file())


def earlier() -> list[Path]:
    """Progress that was carried along."""
    return sorted(FOLDER.glob(f"{EARLIER}-*.jsonl"))


# ---- the libraries


def library_of(name: str) -> tuple[Any, Path]:
    """The library of that name, and where it is carried."""
    from smi.csrc import build

    found = next(library for library in build.LIBRARIES if library.name == name)
    return found, FOLDER / f"{found.module}.abi3.so"


def build_library(name: str) -> str:
    """Compile it; what became of it, in words."""
    from smi.csrc import build

    library, target = library_of(name)
    reason = build.why_not(library)
    if reason:
        return f"left out: {reason}"
    build.compile_library(target, ARCHITECTURE, library)
    return f"{target.stat().st_size / 2**20:.1f} MiB for {ARCHITECTURE}"


def place_library(name: str) -> str:
    """Put a carried library where the package looks for an installed one, if it was made of these sources and can be loaded."""
    from smi.csrc import build

    library, carried = library_of(name)
    if build.installed(library).exists():
        return "installed"
    if not carried.exists():
        return "none carried: built on first use"
    if code.packed()["commit"] == "unknown" or json.loads((code.ROOT / code.PACKED).read_text())["digest"] != code.digest():
        return "carried, but made of other sources: built on first use"
    load = f"import torch; torch.ops.load_library({str(carried)!r}); torch.ops.smi_cuda.{LIBRARIES[name]}"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    if done.returncode:
        return f"carried, but cannot be loaded ({(done.stderr.strip().splitlines() or ['?'])[-1][:200]}): built on first use"
    from smi.csrc.cache import replace_file

    replace_file(build.installed(library), lambda temporary: shutil.copyfile(carried, temporary))
    return "carried"


# ---- Triton's cache


def warm_cache(jobs: int) -> str:
    """Compile the kernels of the engine's calls for sm_90, under the keys that the launchers will ask for; what became of it, in words."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(FOLDER / CACHE), "TRITON_STORE_BINARY_ONLY": "1"}
    command = [sys.executable, "-m", "bench.sections.warm", "--jobs", str(jobs)]
    done = subprocess.run(command, cwd=code.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(FOLDER / CACHE, ignore_errors=True)
        return f"left out: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    for source in (FOLDER / CACHE).rglob("*.source"):
        source.unlink()  # Triton asks for none
    outputs.write_bytes(FOLDER / KEY, json.dumps(triton_key()).encode())
    return done.stdout.strip().splitlines()[-1]


def triton_key() -> dict[str, str]:
    """On what the names of all files in Triton's cache depend beside the kernel: Triton's own files with its compiler, ptxas, the environment."""
    import hashlib

    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key as own_key

    settings = {name: value for name, value in get_cache_invalidating_env_vars().items() if value not in (None, "", "0", "false")}
    return {
        "triton": hashlib.sha256(own_key().encode()).hexdigest(),
        "ptxas": make_backend(GPUTarget("cuda", 90, 32)).hash(),
        "environment": json.dumps(settings, sort_keys=True),
    }


def place_cache() -> str:
    """Copy the carried kernels into Triton's cache where they have this Triton's key. Paths in the cache are absolute: they are written anew."""
    carried, target = FOLDER / CACHE, os.environ.get("TRITON_CACHE_DIR")
    if not carried.exists() or not target:
        return "none carried: compiled on first use"
    made, here = json.loads((FOLDER / KEY).read_text()), triton_key()
    other = [name for name in here if made[name] != here[name]]
    if other:
        return f"carried, but {' and '.join(other)} differ here: compiled on first use"
    count = 0
    for folder in carried.iterdir():
        to = Path(target) / folder.name
        if to.exists():
            continue
        partial = to.with_name(f"{to.name}.tmp")
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        for group in partial.glob("__grp__*.json"):
            paths = json.loads(group.read_text())["child_paths"]
            group.write_text(json.dumps({"child_paths": {name: str(to / name) for name in paths}}))
        partial.replace(to)
        count += 1
    return f"carried, {count} kernels"


if __name__ == "__main__":
    sys.exit(main())
