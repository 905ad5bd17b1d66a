"""No package, though `import ptqcli` finds it first where the working directory holds a clone of that name.

Without this file Python would make an empty namespace of the clone's folder, and an editable installation would come too late to say
otherwise. The import is handed on to the package that is installed; where none is, it ends with what to do.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


def _installed() -> ModuleSpec:
    """Where the package is, as if this folder were not on the path. Raises ImportError if it is nowhere."""
    candidates = [(entry, Path(entry or ".", "ptqcli", "__init__.py")) for entry in sys.path]
    elsewhere = [entry for entry, file in candidates if not (file.is_file() and os.path.samefile(file, __file__))]
    for finder in sys.meta_path:
        spec = finder.find_spec("ptqcli", elsewhere if finder is PathFinder else None)
        if spec is not None and spec.origin is not None and Path(spec.origin).with_name("cli").is_dir():  # else another clone
            return spec
    clone = Path(__file__).resolve().parent
    raise ImportError(f"ptqcli is not installed, and {clone} is a clone of its repository, no package: pip install -e {clone}")


if __name__ == "ptqcli":
    spec = _installed()
    assert spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
