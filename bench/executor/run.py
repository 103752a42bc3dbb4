"""Executes works for an architecture and judges them by the project's error rule."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from smi.kernels import comparison
from smi.kernels.compile_case import CompileCase

from ..gates.compiled import triton_cases
from . import csrc
from .interposer import Record, executed
from .operations import Work, works


@dataclass
class Outcome:
    """One work done. wrong: why it is not right, one line each; empty if it is."""

    work: Work
    architecture: int
    errors: list[comparison.Error]
    record: Record
    wrong: list[str]

    def __str__(self) -> str:
        errors = ", ".join(f"{e.name} {e.error:.1e} of {e.allowed:.1e}" for e in self.errors)
        verdict = "wrong" if self.wrong else "right"
        size = f"{self.record.blocks} blocks, {self.record.instructions} instructions, {self.record.seconds:.1f} s"
        return "\n    ".join([f"{verdict} sm_{self.architecture} {self.work.name}: {errors or 'no result'}; {size}", *self.wrong])


def cases_for(operation: str, architecture: int) -> list[CompileCase]:
    """An operation's compile cases that ship for an architecture."""
    return [case for case in triton_cases([operation]) if architecture in (case.architectures or (architecture,))]


def execute(work: Work, architecture: int, cases: list[CompileCase]) -> Outcome:
    """Run it; nothing it meets in the program is raised. cases: programs to take, each launch's own where none is given."""
    with executed(architecture, cases) as record, work.chosen():
        errors, wrong = judged(lambda: comparison.compare("triton", work.example, work.dtype)[0])
    wrong += sorted(set(record.reports))
    if cases and not wrong:
        wrong += [f"{name} was not launched" for name in work.cases if name not in record.launches]
    return Outcome(work, architecture, errors, record, wrong)


def execute_csrc(work: Work, texts: dict[int, str]) -> Outcome:
    """The same of csrc's attention. texts: its PTX by compiled width."""
    machine = csrc.Attention(texts)
    with machine.in_place():
        errors, wrong = judged(lambda: comparison.compare("cuda", work.example, work.dtype)[0])
    return Outcome(work, csrc.ARCHITECTURE, errors, machine.record, wrong + sorted(set(machine.record.reports)))


def judged(compare: Callable[[], list[comparison.Error]]) -> tuple[list[comparison.Error], list[str]]:
    """Errors, and what is wrong with them or kept them from being known: a Fault, or what is not modelled."""
    with torch.random.fork_rng(devices=[]), unwritten_is_nan():
        torch.manual_seed(1)
        try:
            errors = compare()
        except Exception as error:
            return [], [f"{type(error).__name__}: {error}"]
    return errors, [f"{e.name} has the error {e.error:.1e}, {e.allowed:.1e} is allowed" for e in errors if not e.passes]


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Within it memory that is allocated and not written holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then fills it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def chosen_works(operation: str, architecture: int, half: bool) -> tuple[list[Work], list[CompileCase]]:
    """What there is to execute of an operation, in float16 instead of bf16 if `half`, and its compile cases."""
    cases = cases_for(operation, architecture)
    found = works(operation, cases)
    return [work.in_half() for work in found if work.dtype == torch.bfloat16] if half else found, cases
