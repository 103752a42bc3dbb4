"""The ratios of another commit, measured here and now by its own bench/ and smi/."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ..measuring.record import ROOT

# Runs a checkout's own bench and smi, whatever is installed: an editable install would bring in the other checkout's kernels.
FROM_CHECKOUT = """\
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path.insert(0, {root!r})
sys.argv = ["bench.check", *{arguments!r}]
runpy.run_module("bench.check", run_name="__main__")
"""


def ratios_at(commit: str) -> dict:
    """The ratios of another commit to its own baselines, measured now in a worktree of it."""
    with tempfile.TemporaryDirectory() as folder:
        tree, results = Path(folder) / "tree", Path(folder) / "baseline"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), commit], check=True, capture_output=True)
        try:
            code = FROM_CHECKOUT.format(root=str(tree), arguments=["--ratios", "--quick", "--update", "--baseline", str(results)])
            done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"the ratios of {commit} could not be measured: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
            (made,) = results.glob("cpu-*.json")
            return json.loads(made.read_text())["cases"]
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False, capture_output=True)
