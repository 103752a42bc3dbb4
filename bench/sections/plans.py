"""What is measured on a GPU, in the order of its worth: a run that is cut leaves out the last. Limits are seconds."""

from smi.kernels import versions

from .runner import Section

HERE = "bench.sections"
EVERY = tuple(versions.OPERATIONS)

# One command of at most ten minutes, on a machine that may not be there again.
FIRST = (
    Section("versions", 25, f"{HERE}.machine:run"),
    Section("checks", 95, f"{HERE}.checks:run", EVERY),
    Section("verdicts", 60, f"{HERE}.verdicts:run"),
    Section("steps", 75, f"{HERE}.timed:steps"),
    Section("engine", 60, f"{HERE}.engine:run"),
    Section("profiles", 25, f"{HERE}.timed:profiles"),
    Section("whole", 45, f"{HERE}.timed:whole"),
    Section("calls", 35, f"{HERE}.timed:calls"),
    Section("attention", 35, f"{HERE}.timed:attention"),
    Section("sanitizer", 40, f"{HERE}.machine:sanitizer"),
    Section("compiled", 65, f"{HERE}.timed:compiled"),
)

# All that the result files of a GPU hold, for a machine of one's own.
ALL = (
    Section("versions", 25, f"{HERE}.machine:run"),
    Section("verdicts", 150, f"{HERE}.verdicts:run"),
    Section("steps", 75, f"{HERE}.timed:steps"),
    Section("profiles", 25, f"{HERE}.timed:profiles"),
    Section("whole", 45, f"{HERE}.timed:whole"),
    Section("operations", 100, f"{HERE}.timed:operations"),
    Section("memory", 50, f"{HERE}.timed:memory"),
    Section("more-whole", 80, f"{HERE}.timed:more_whole"),
    Section("more-steps", 150, f"{HERE}.timed:more_steps"),
    Section("compiled-operations", 80, f"{HERE}.timed:compiled_operations"),
    Section("compiled", 120, f"{HERE}.timed:compiled"),
)
OF_OPERATIONS = ("versions", "verdicts", "operations", "compiled-operations")  # what --only OPERATION leaves of ALL
