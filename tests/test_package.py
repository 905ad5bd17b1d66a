"""The wheel: what is in it, and that it works where there is no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ptqcli

ROOT = Path(__file__).parent.parent
DEMO_FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
SOURCES = {"ptqcli": ROOT / "ptqcli", "ptq_kernels": ROOT / "kernels" / "ptq_kernels"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The wheel's contents as a folder to import from."""
    folder = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_installed(installed: Path, code: str) -> str:
    """What ``code`` prints when the wheel stands before everything else and the working directory is not the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_and_nothing_else(wheel: Path) -> None:
    expected = {f"{name}/{file.relative_to(folder).as_posix()}" for name, folder in SOURCES.items() for file in folder.rglob("*.py")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ptqcli", "ptq_kernels"}


def test_the_demo_model_and_the_licence_come_along(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"ptqcli/demo/{name}" for name in DEMO_FILES} <= names
    assert {f"ptqcli/configs/{file.name}" for file in (ROOT / "configs").glob("*.yaml")} <= names
    assert "ptqcli/py.typed" in names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_an_editable_install_brings_no_folder_that_hides_the_package(tmp_path: Path) -> None:
    code = f"import hatchling.build; print(hatchling.build.build_editable({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    names = set(zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist())
    assert not any(name.startswith(("ptqcli/", "ptq_kernels/")) for name in names)


def test_it_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 13_000_000


def test_imports_come_from_the_wheel(installed: Path) -> None:
    files = run_installed(installed, "import ptqcli, ptq_kernels; print(ptqcli.__file__); print(ptq_kernels.__file__)")
    assert files.split() == [str(installed / name / "__init__.py") for name in SOURCES]


@pytest.mark.slow
def test_every_module_imports_on_its_own(installed: Path) -> None:
    code = (
        "import importlib, pkgutil, ptqcli, ptq_kernels\n"
        "for package in (ptqcli, ptq_kernels):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name); print(module.name)\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    modules = run_installed(installed, code).split()
    assert {"ptqcli.cli.quantize", "ptqcli.pipeline", "ptqcli.runtime", "ptq_kernels.reference"} <= set(modules)


@pytest.mark.slow
def test_the_demo_model_is_found_without_a_checkout(installed: Path) -> None:
    code = "from ptqcli.cli import run; raise SystemExit(run(['quantize', '--dry-run', '--json']))"
    assert json.loads(run_installed(installed, code))["linears"]


@pytest.mark.slow
def test_recipes_are_taken_by_name_without_a_checkout(installed: Path) -> None:
    code = "from ptqcli.cli import run; raise SystemExit(run(['quantize', '--recipe', 'w3a16-gptq', '--dry-run', '--json']))"
    assert {linear["scheme"] for linear in json.loads(run_installed(installed, code))["linears"]} == {"w3a16-g128"}
    files = run_installed(installed, "from ptqcli.shipped import shipped_recipes as s; print(*s().values(), sep='\\n')").splitlines()
    assert {Path(file) for file in files} == set((installed / "ptqcli" / "configs").glob("*.yaml")) != set()


def test_no_module_hides_a_public_name() -> None:
    """Importing ``ptqcli.NAME`` puts the module where the function of that name was."""
    modules = {path.stem for path in (ROOT / "ptqcli").iterdir()}
    assert not modules & set(ptqcli.__all__)
