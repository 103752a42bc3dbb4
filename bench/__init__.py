"""What is claimed, measured. Runs from the repository's root also where the package is not installed."""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

try:
    import_module("smi.kernels")
except ModuleNotFoundError as error:
    if error.name != "smi.kernels" and error.name != "smi":
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "smi"]:
        del sys.modules[name]
    root = Path(__file__).parents[1]  # not installed: kernels/ and csrc/ lie beside smi/
    spec = spec_from_file_location("smi", root / "smi" / "__init__.py", submodule_search_locations=[str(root / "smi"), str(root)])
    sys.modules["smi"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["smi"])
