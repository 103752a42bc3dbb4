"""Compiles the Triton kernels of the engine's calls for a GPU that is not here, into Triton's cache, under the keys that its launchers ask for there.

The launchers themselves run, on "meta" tensors, as far as Triton's compiler: signature, constants, divisibility and options are theirs. A name in
the cache depends on them, on the kernel's source with that of the functions it calls and its line, on Triton's files (libtriton among them: it is
another for every Python), on the version of ptxas and the architecture, on the hash of libdevice, and on the environment variables that Triton lists
(`get_cache_invalidating_env_vars`). Neither the GPU nor its driver is asked.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context

import torch
from torch import Tensor

from smi.kernels import versions
from smi.kernels.verification import DTYPES

from ..cases import suites
from .calls import Call, build_vit, record

ARCHITECTURE = 90
DEPTH = 3  # blocks: all of a model's are alike, but for the last one


class Target:
    """A driver that names a GPU and launches nothing. architecture: compute capability times 10."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compile_only(architecture: int = ARCHITECTURE) -> list:
    """From now on this process compiles Triton kernels for an architecture and launches none; the list that it returns gets those it compiled."""
    import triton
    from triton.runtime.jit import JITFunction, MockTensor

    plain, compiled = JITFunction.run, []

    def run(self, *args, grid, warmup, **options):
        def mock(arg):
            return MockTensor(arg.dtype) if isinstance(arg, Tensor) else arg

        compiled.append(plain(self, *map(mock, args), grid=grid, warmup=True, **{name: mock(arg) for name, arg in options.items()}))

    triton.runtime.driver.set_active(Target(architecture))
    JITFunction.run = run
    return compiled


def all_calls() -> Iterator[Call]:
    """The calls of the measured steps and of every stage of the PRI run, in the order of their worth."""
    batch, stages = suites.GPU_BATCHES[suites.BASE], suites.stage_counts()
    steps = [(model, batch, n, torch.bfloat16) for n in (suites.PATCHES, suites.final_smi()) for model in (suites.BASE, suites.TINY)]
    steps += [(suites.BASE, 18, n, torch.bfloat16) for n in stages["PRI v=7"]] + [(suites.BASE, 8, n, torch.bfloat16) for n in stages["SMI"]]
    steps += [(suites.TINY, 8, suites.final_smi(), dtype) for dtype in DTYPES]
    for model, images, active, dtype in steps:
        yield from record(build_vit(model, torch.device("meta"), torch.float32, depth=DEPTH), images, active, dtype)


def compile_part(place: tuple[int, int]) -> tuple[int, list[str]]:
    """Compile every n-th call from the i-th on: how many kernels, and what failed."""
    first, step = place
    compiled, failed = compile_only(), []
    for call in islice(all_calls(), first, None, step):
        try:
            getattr(versions.load(call.operation, "triton"), call.function)(*call.args)
        except Exception as error:  # that kernel is compiled on the device, or fails there too
            failed.append(f"{call.name}: {type(error).__name__}: {error}")
    return len({kernel.hash for kernel in compiled}), failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    jobs = parser.parse_args().jobs
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(compile_part, [(i, jobs) for i in range(jobs)]))
    failed = [line for _, lines in parts for line in lines]
    for line in failed:
        print(f"not compiled: {line}", file=sys.stderr)
    print(f"{sum(count for count, _ in parts)} kernels for sm_{ARCHITECTURE}, {len(failed)} not compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
