"""The layout: imports run one way, tests -> bench -> smi -> kernels -> csrc, and never in a circle; files, folders and functions stay small.

Imports are read from the source and held file against file. One inside a function counts, one under `if TYPE_CHECKING` does not, nor does a module
that is loaded by a computed name (the dispatcher's versions). `import a.b` means the file of a.b alone, not a/__init__.py; `from a import b` means
the module a.b if there is one, else a/__init__.py; so does a module that a/__init__.py makes.
"""

import ast
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
PACKAGES = {"tests": "tests", "bench": "bench", "smi": "smi", "kernels": "smi.kernels", "csrc": "smi.csrc"}  # folder to module, importer first
FILES_IN_A_FOLDER, LINES_IN_A_FILE, LINES_IN_A_FUNCTION = 16, 400, 60
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}


@pytest.fixture(scope="module")
def graph():
    return imports(ROOT)


def test_no_import_circle(graph):
    found = circles(graph)
    assert not found, "\n".join(found)


def test_no_import_against_the_arrows(graph):
    found = against_arrows(graph)
    assert not found, "\n".join(found)


def test_what_is_taken_of_a_module_is_there():
    """ruff sees an undefined name, but neither a name that a module no longer has nor an attribute of one."""
    found = missing(ROOT)
    assert not found, "\n".join(found)


def test_sizes():
    found = too_large(ROOT)
    assert not found, "\n".join(found)


# What is checked: each function gives the violations, one line of text each.


def modules(root: Path) -> dict[str, str]:
    """Name of every module, and its file relative to `root`."""
    found = {}
    for folder, package in PACKAGES.items():
        for file in (root / folder).rglob("*.py"):
            parts = file.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = str(file.relative_to(root))
    return found


def statements(tree: ast.AST):
    """Import statements at any depth, without those that only a type checker executes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from statements(ast.Module(node.orelse, []))
        else:
            yield from statements(node)


def imports(root: Path) -> dict[str, dict[str, str]]:
    """For every file the files that it imports, each with the statement that does, as "file:line imports module"."""
    found, graph = modules(root), {}
    for name, file in found.items():
        graph[file] = {}
        package = name.split(".") if file.endswith("__init__.py") else name.split(".")[:-1]
        for node in statements(ast.parse((root / file).read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                base = ".".join([*package[: len(package) + 1 - node.level if node.level else 0], *filter(None, [node.module])])
                targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in found else base for alias in node.names]
            for target in targets:
                module = target
                while module not in found and "." in module:  # smi.losses is made by smi/__init__.py
                    module = module.rpartition(".")[0]
                if module in found:
                    graph[file].setdefault(found[module], f"{file}:{node.lineno} imports {target}")
    return graph


def missing(root: Path) -> list[str]:
    """Names imported from a module of ours, and attributes taken of one, that it does not have."""
    known, found = modules(root), []
    for name, file in known.items():
        package = name.split(".") if file.endswith("__init__.py") else name.split(".")[:-1]
        tree, taken = ast.parse((root / file).read_text()), {}
        for node in statements(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = ".".join([*package[: len(package) + 1 - node.level if node.level else 0], *filter(None, [node.module])])
            for alias in node.names if base in known else ():
                if f"{base}.{alias.name}" in known:
                    taken[alias.asname or alias.name] = f"{base}.{alias.name}"
                elif not hasattr(import_module(base), alias.name):
                    found.append(f"{file}:{node.lineno} imports {alias.name} from {base}, which has none")
        bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        for node in ast.walk(tree):
            of = taken.get(node.value.id) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else None
            if of and node.value.id not in bound and not hasattr(import_module(of), node.attr):
                found.append(f"{file}:{node.lineno} takes {node.attr} of {of}, which has none")
    return found


def circles(graph: dict[str, dict[str, str]]) -> list[str]:
    """A shortest circle through every import that lies on one, each set of files once: its statements in order."""
    found = {}
    for start, targets in graph.items():
        for target in targets:
            paths, queue = {target: [start, target]}, [target]
            while queue and start not in paths:
                file = queue.pop(0)
                for following in graph[file]:
                    if following not in paths:
                        paths[following] = [*paths[file], following]
                        queue.append(following)
            if start in paths:
                steps = zip(paths[start], paths[start][1:], strict=False)
                found.setdefault(frozenset(paths[start]), ", ".join(graph[importer][imported] for importer, imported in steps))
    return sorted(found.values())


def against_arrows(graph: dict[str, dict[str, str]]) -> list[str]:
    rank = list(PACKAGES).index
    return [
        f"{statement}, against {Path(target).parts[0]} -> {Path(file).parts[0]}"
        for file, targets in graph.items()
        for target, statement in targets.items()
        if rank(Path(target).parts[0]) < rank(Path(file).parts[0])
    ]


def too_large(root: Path) -> list[str]:
    """Folders, files and functions outside tests/ above the limits. Triton kernels may be of any length."""
    found, in_folder = [], defaultdict(int)
    files = [file for folder in PACKAGES if folder != "tests" for file in (root / folder).rglob("*") if file.suffix in CODE]
    for file in sorted([*files, *root.glob("*.py")]):
        name, text = file.relative_to(root), file.read_text()
        if (lines := len(text.splitlines())) > LINES_IN_A_FILE:
            found.append(f"{name}: {lines} lines")
        if file.suffix != ".py":
            continue
        in_folder[str(name.parent)] += file.name != "__init__.py"
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            if (lines := node.end_lineno - node.lineno + 1) > LINES_IN_A_FUNCTION:
                found.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    return found + [f"{folder}/: {count} Python files" for folder, count in in_folder.items() if count > FILES_IN_A_FOLDER]


# The check itself, on made-up trees.


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return root


def test_circle_is_named_with_file_and_line(tmp_path):
    planted = {
        "smi/__init__.py": "",
        "smi/a.py": "from .rooms import b\n",
        "smi/rooms/__init__.py": "",
        "smi/rooms/b.py": "import os\n\ndef later():\n    from ..c import value\n    return value\n",
        "smi/c.py": "import smi.a\nvalue = 1\n",
        "smi/d.py": "from . import a\n",
    }
    assert circles(imports(tree(tmp_path, planted))) == [
        "smi/a.py:1 imports smi.rooms.b, smi/rooms/b.py:4 imports smi.c, smi/c.py:1 imports smi.a",
    ]


def test_a_name_of_the_package_is_an_import_of_its_init(tmp_path):
    planted = {
        "smi/engine/__init__.py": "from .fused import step\n",
        "smi/engine/fused.py": "from .. import engine\nfrom smi.engine.made import VALUE\n",
    }
    assert circles(imports(tree(tmp_path, planted))) == [
        "smi/engine/__init__.py:1 imports smi.engine.fused, smi/engine/fused.py:1 imports smi.engine"
    ]


def test_modules_of_one_package_are_no_circle(tmp_path):
    planted = {
        "smi/__init__.py": "from .engine.fused import step\n",
        "smi/engine/__init__.py": "from .fused import step\n",
        "smi/engine/fused.py": "import smi.engine.dtype\nfrom . import dtype\nfrom smi.engine import dtype\n",
        "smi/engine/dtype.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .fused import step\n",
    }
    assert circles(imports(tree(tmp_path, planted))) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("kernels/a.py", "import torch\nfrom smi.models import vit\n", "kernels/a.py:2 imports smi.models.vit, against smi -> kernels"),
        ("csrc/a.py", "from ..kernels import dispatch\n", "csrc/a.py:1 imports smi.kernels.dispatch, against kernels -> csrc"),
        ("smi/a.py", "def f():\n    import bench.run\n", "smi/a.py:2 imports bench.run, against bench -> smi"),
        ("bench/a.py", "from tests.help import small\n", "bench/a.py:1 imports tests.help, against tests -> bench"),
    ],
)
def test_wrong_arrow_is_named_with_file_and_line(tmp_path, file, source, message):
    others = {"smi/models/vit.py": "", "kernels/dispatch.py": "", "bench/run.py": "", "tests/help.py": ""}
    assert against_arrows(imports(tree(tmp_path, others | {file: source}))) == [message]


def test_arrows_point_at_what_lies_below(tmp_path):
    below = "import smi.csrc.build\nfrom smi.kernels import dispatch\nfrom smi import models\nimport bench.run\n"
    files = {"tests/test_a.py": below, "smi/models.py": "from .kernels import dispatch\n", "kernels/dispatch.py": "from ..csrc import build\n"}
    files |= {"csrc/build.py": "", "bench/run.py": "from smi import models\n"}
    graph = imports(tree(tmp_path, files))
    assert against_arrows(graph) == []
    assert set(graph["tests/test_a.py"]) == {"csrc/build.py", "kernels/dispatch.py", "smi/models.py", "bench/run.py"}


def test_sizes_above_the_limits_are_named(tmp_path):
    function = "def long():\n" + "    pass\n" * LINES_IN_A_FUNCTION
    files = {f"bench/case_{number}.py": "" for number in range(FILES_IN_A_FOLDER + 1)}
    files |= {"bench/__init__.py": "", "smi/a.py": "import triton\n" + function, "kernels/a.py": f"@triton.jit\n{function}"}
    files |= {"csrc/cpu/a.cpp": "\n" * (LINES_IN_A_FILE + 1), "smi/page.html": "\n" * (LINES_IN_A_FILE + 1), "tests/test_a.py": function}
    assert too_large(tree(tmp_path, files)) == ["csrc/cpu/a.cpp: 401 lines", "smi/a.py:2 long: 61 lines", "bench/: 17 Python files"]


def test_what_a_module_does_not_have_is_named(tmp_path):
    planted = {
        "smi/__init__.py": "",
        "smi/errors.py": "",
        "bench/a.py": "from smi import invert, upside_down\nfrom smi import errors\n\nraise errors.InputError(errors.Nothing)\n",
    }
    assert missing(tree(tmp_path, planted)) == [
        "bench/a.py:1 imports upside_down from smi, which has none",
        "bench/a.py:4 takes Nothing of smi.errors, which has none",
    ]
