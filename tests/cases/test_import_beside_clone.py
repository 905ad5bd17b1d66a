"""Kind: the clone's folder and the package have one name. Where the working directory holds a clone named ptqcli, `import ptqcli` gives the
package that is installed, whichever way, and never an empty namespace; where none is installed, it says what to do."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = "import ptqcli; from ptqcli.errors import PTQError; print(ptqcli.__file__, ptqcli.__version__, PTQError.__module__)"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clone/ptqcli is the repository; editable, wheel and nothing are environments in which the package is installed so, or not at all."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "clone").mkdir()
    (folder / "clone" / "ptqcli").symlink_to(ROOT)
    built = {"editable": build("build_editable", folder), "wheel": build("build_wheel", folder), "nothing": None}
    for name, wheel in built.items():
        venv.create(folder / name, with_pip=False)
        (site,) = (folder / name).glob("lib/python*/site-packages")
        if wheel is not None:
            zipfile.ZipFile(wheel).extractall(site)  # all that pip does with a wheel that has no scripts of its own
    editables = importlib.util.find_spec("editables")  # which an editable installation takes along
    assert editables is not None
    assert editables.origin is not None
    (site,) = (folder / "editable").glob("lib/python*/site-packages")
    (site / "editables").symlink_to(Path(editables.origin).parent)
    return folder


def build(hook: str, folder: Path) -> Path:
    """The wheel that the build backend makes for pip."""
    folder = folder / hook
    folder.mkdir()
    code = f"import hatchling.build; print(hatchling.build.{hook}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    return folder / done.stdout.split()[-1]


def imported(place: Path, environment: str, folder: str, code: str = CODE) -> subprocess.CompletedProcess[str]:
    """``code`` in a new process whose working directory is ``folder``, which stands first on its path."""
    command = [str(place / environment / "bin" / "python"), "-c", code]
    return subprocess.run(command, cwd=place / folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("folder", ["clone", "wheel", "clone/ptqcli"])
@pytest.mark.parametrize("environment", ["editable", "wheel"])
def test_the_installed_package_is_found(place: Path, environment: str, folder: str) -> None:
    done = imported(place, environment, folder)
    assert (done.returncode, done.stderr) == (0, "")
    file, _, module = done.stdout.split()
    assert module == "ptqcli.errors"
    installed = environment == "wheel" and folder != "clone/ptqcli"  # in the clone itself its package comes first
    assert Path(file).resolve().is_relative_to(place / "wheel" if installed else ROOT / "ptqcli")


def test_an_import_that_cannot_work_says_what_to_do(place: Path) -> None:
    done = imported(place, "nothing", "clone")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: ptqcli is not installed, and {ROOT} is a clone of its repository, no package: pip install -e {ROOT}"
    )


def test_a_clone_of_another_name_is_no_package(place: Path) -> None:
    (place / "other").mkdir()
    (place / "other" / "ptqcli2").symlink_to(ROOT)
    done = imported(place, "wheel", "other", "import ptqcli2; print(hasattr(ptqcli2, 'quantize'))")
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_two_clones_do_not_send_each_other_round_in_circles(place: Path) -> None:
    (place / "second").mkdir()
    (place / "second" / "ptqcli").mkdir()
    (place / "second" / "ptqcli" / "__init__.py").write_bytes((ROOT / "__init__.py").read_bytes())
    done = imported(place, "nothing", "clone", f"import sys; sys.path.append({str(place / 'second')!r}); import ptqcli")
    assert "ptqcli is not installed" in done.stderr
