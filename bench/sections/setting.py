"""What the sections of a GPU's measurement share: device, sizes, the rows' first columns. A rehearsal does the same in small on the CPU."""

from dataclasses import dataclass

import timm
import torch

from smi.kernels import versions

from ..cases import suites
from ..measuring import ceilings as ceilings_module
from ..measuring import inversions, record, rows_file
from ..measuring.ceilings import Ceilings, ceilings_by_dtype
from .worker import Work


@dataclass(frozen=True)
class Sizes:
    """batch: images. few: active patches of the sparse case. trajectories, division, images, iterations: of the PRI run."""

    batch: int = suites.GPU_BATCHES[suites.BASE]
    few: int = suites.final_smi()
    trajectories: int = 18
    division: int = 7
    images: int = 126
    iterations: int = suites.ITERATIONS


SMALL = Sizes(batch=2, few=5, trajectories=1, division=4, images=4, iterations=28)
SMALL_MODEL = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}  # 16 patches


@dataclass(frozen=True)
class Setting:
    device: torch.device
    sizes: Sizes
    rehearsal: bool
    about: dict  # the first columns of every row
    file: str  # for rows: a name in the folder of the files, or a path

    def synchronize(self) -> None:
        """Wait for the device; raises where it answers no more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def settle(work: Work) -> Setting:
    """Device and sizes for a section. Every case of it ends with a look whether the device still answers."""
    rehearsal = work.options["device"] == "cpu"
    if rehearsal:
        shrink()
    device = torch.device("cpu") if rehearsal else torch.device("cuda", torch.cuda.current_device())
    about = record.run_environment(device) | {"run": work.progress.call, "section": work.section}
    path = record.results_file(about["device"])
    file = str(path) if work.options.get("rows_in_results") else path.name
    found = Setting(device, SMALL if rehearsal else Sizes(), rehearsal, about, file)
    work.alive = found.synchronize
    return found


def shrink() -> None:
    """In this process: small models, short runs, little measuring."""
    create = timm.create_model
    timm.create_model = lambda name, **options: create(name, **(SMALL_MODEL | options))
    ceilings_module.CPU_SIZES.update(elements=1 << 12, side=32)
    inversions.ITERATIONS = SMALL.iterations


def ceilings(work: Work, setting: Setting) -> dict[str, Ceilings]:
    """Those that the first section measured, else measured now."""
    for row in reversed(rows_file.read(work.folder / setting.file)):
        if row["kind"] == "ceilings" and row["run"] == work.progress.call:
            return {name: Ceilings(*values) for name, values in row["ceilings"].items()}
    return ceilings_by_dtype(setting.device)


def step_case(setting: Setting, model: str, active: int | None, sides: tuple[str, ...] = suites.TWO_SIDES) -> suites.StepCase:
    return suites.StepCase(model, setting.sizes.batch, active, sides)


def step_cases(setting: Setting, sides: tuple[str, ...] = suites.TWO_SIDES) -> dict[str, suites.StepCase]:
    """The key steps by name: DeiT-Base with all patches and few, DeiT-Tiny with few."""
    few = setting.sizes.few
    cases = [step_case(setting, model, active, sides) for model, active in ((suites.BASE, None), (suites.BASE, few), (suites.TINY, few))]
    return {case.name: case for case in cases}


def fast_versions(operation: str, setting: Setting) -> list[str]:
    """The GPU versions of an operation; in a rehearsal those that run on the CPU."""
    return [version for version in (("stock", "cpu") if setting.rehearsal else versions.NEEDS_VERDICT) if versions.exists(operation, version)]
