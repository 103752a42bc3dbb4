"""The C++ for the CPU under sanitizers: `make sanitize`, or python -m bench.gates.sanitizers [address|thread].

address: AddressSanitizer and UndefinedBehaviorSanitizer over the tests of the C++, Python being the host. thread: ThreadSanitizer over a recorded
pass in a driver with threads of its own (csrc/sanitize), because PyTorch's are not instrumented; and the same driver under the other two. Exit code 1
where one of them, or a test, finds something. Needs g++ with its sanitizers.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from smi.csrc import host

ROOT = Path(__file__).parents[2]
TESTS = [
    *(f"tests/kernels/{name}" for name in ("layers", "test_cpp_calls.py", "test_attention_in_pairs.py", "test_attention_eager.py")),
    *(f"tests/smi/{name}" for name in ("engine/test_fused.py", "engine/test_wrappers.py")),
]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python's own
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def run_tests(arguments: list[str]) -> int:
    """The tests of the C++ with every access checked; PyTorch's memory too, which comes from the sanitizer's allocator."""
    compiler = host.compiler()
    if compiler is None:
        sys.exit("sanitizers need g++, which is not on the PATH")
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    os.environ["SMI_SANITIZE"] = "address,undefined"
    for library in (host.CPU, host.AUTOGRAD):
        library.compile(compiler)  # here, where the compiler is not run under its own sanitizer
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(found), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow", *TESTS, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def run_driver(sanitizers: str) -> int:
    """The recorded pass in threads of the driver's own."""
    compiler = host.compiler()
    if compiler is None:
        sys.exit("sanitizers need g++, which is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "recorded_pass"
        sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "csrc/sanitize/recorded_pass.cpp"]
        flags = ["-std=c++20", "-O1", "-march=native", "-pthread", *host.sanitizer_flags(sanitizers)]
        subprocess.run([compiler, *flags, *map(str, sources), "-o", str(made)], check=True)
        still = [tool, "-R"] if (tool := shutil.which("setarch")) else []  # gcc 12's ThreadSanitizer needs addresses that are not randomised much
        done = subprocess.run([*still, str(made)], env={**os.environ, **OPTIONS})
    print(f"{sanitizers}: {'clean' if done.returncode == 0 else 'FAILED'}")
    return done.returncode


def main(arguments: list[str]) -> int:
    """All, or what the first argument names; further ones go to pytest."""
    which = arguments[:1] or ["address", "thread"]
    failed = 0
    if "thread" in which:
        failed |= run_driver("thread") | run_driver("address,undefined")
    if "address" in which:
        failed |= run_tests(arguments[1:])
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
