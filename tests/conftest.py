"""Set-up that every test shares: no network, one thread, the quick files first."""

from __future__ import annotations

import os
from pathlib import Path

# Before any test imports a Hugging Face library: they read it once, at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("PTQ_DATA_DIR", None)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import pytest
import torch
from commandline import Answer, Ptq
from hypothesis import settings

QUICK_FILES = ("test_architecture.py", "test_scheme.py", "test_configs.py")

# The same examples in every run, and no deadline: the machine may be busy.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
# On tensors this small a second thread waits more than it works; it makes the suite several times slower on a busy machine.
torch.set_num_threads(1)


@pytest.fixture
def ptq(capsys: pytest.CaptureFixture[str]) -> Ptq:
    """Runs one command line in this process."""

    def call(*arguments: str | Path) -> Answer:
        from ptqcli.cli import run

        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def at_work(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is the folder that the file's own ``workshop`` made."""
    monkeypatch.chdir(workshop)
    return workshop


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick files first and slow tests last, so that most failures show within seconds."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, item.path.name not in QUICK_FILES))
