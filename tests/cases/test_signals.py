"""Signals in the first seconds: a handler that raises during foreign imports; and what is cleaned up behind later ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import make_model

from ptqcli.cli import signals
from ptqcli.cli.quantize_report import QuantizeProgress

MAIN = "from ptqcli.cli import main; main()"
MOMENTS = ((0.3, signal.SIGINT), (0.8, signal.SIGTERM), (1.6, signal.SIGHUP), (2.6, signal.SIGINT), (4.0, signal.SIGTERM))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    make_model(folder, num_hidden_layers=1)
    return folder


def test_a_signal_at_any_moment_ends_the_command_without_a_word_of_python(model: Path, tmp_path: Path) -> None:
    """Five processes, each told to end at another moment of the imports or of the work behind them."""
    running = []
    for index in range(len(MOMENTS)):
        line = ["quantize", str(model), "--algo", "rtn", "--group-size", "32", "--output", str(tmp_path / str(index)), "--quiet"]
        # main() is reached before the signal: what Python itself does while it starts is not ours.
        code = f"import sys; from ptqcli.cli import main; sys.stdout.write('.'); sys.stdout.flush(); {MAIN}"
        running.append(subprocess.Popen([sys.executable, "-c", code, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for process in running:
        assert process.stdout is not None
        process.stdout.read(1)
    start = time.monotonic()
    for process, (moment, number) in zip(running, MOMENTS, strict=True):
        time.sleep(max(0.0, start + moment - time.monotonic()))
        process.send_signal(number)
    for index, process in enumerate(running):
        _, told = process.communicate(timeout=300)
        out = tmp_path / str(index)
        assert process.returncode in (-MOMENTS[index][1], 130, 0), told
        assert told.strip() in ("", *(f"interrupted{more}" for more in ("", "; nothing of it is left on disk", f"; {out} is complete")))
        assert not out.with_name(f"{index}.partial").exists()
        assert out.exists() == (process.returncode == 0 or "complete" in told)


@pytest.fixture
def _kept() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals._State.ours = signals._State.interrupted = False


@pytest.mark.usefixtures("_kept")
def test_handlers_are_the_systems_until_there_is_something_to_clean_up() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.end_at_once()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    signals.clean_up_first()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signals.was_interrupted()


@pytest.mark.usefixtures("_kept")
def test_what_is_ignored_stays_ignored() -> None:
    """SIGHUP by nohup, SIGINT by a shell that starts a job in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signals.end_at_once()
    signals.clean_up_first()
    assert {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)} == {signal.SIG_IGN}


@pytest.mark.usefixtures("_kept")
def test_a_program_that_imports_the_package_keeps_its_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signals.clean_up_first()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("_kept")
def test_an_interruption_waits_for_the_end_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library's lazy imports do, the module makes something else of whatever is raised in it."""
    (tmp_path / "foreign.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    done = sum(range(1000))\n"
        "except BaseException as error:\n"
        "    raise ImportError('a missing module') from error\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signals.end_at_once()
    signals.clean_up_first()
    import foreign

    assert foreign.done == sum(range(1000))
    with pytest.raises(KeyboardInterrupt):
        time.sleep(10)


@pytest.mark.usefixtures("_kept")
def test_an_interruption_that_python_could_not_raise_is_raised_again() -> None:
    """In a finalizer it would be printed and forgotten."""
    signals._State.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        QuantizeProgress.layer_done(object(), "a layer", 0.0)  # type: ignore[arg-type]
