"""What Ctrl-C, SIGTERM and SIGHUP do: at first they end the process at once, and from when there is something to clean up they interrupt.

An exception out of a signal handler can come up in the middle of a library's import, and what is made of it there is a missing module, a
traceback or an abort. So there is none before it is needed, later it waits for the end of an import, and once there was one, whatever
fails is the interruption.
"""

from __future__ import annotations

import signal
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
RETRY_SECONDS = 0.1


class _State:
    ours = False  # whether this process runs the command line and nothing else
    interrupted = False


def end_at_once() -> None:
    """For the beginning of a process that is the command: the system ends it, as it does every program."""
    _State.ours = True
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored, as behind `&`
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def clean_up_first() -> None:
    """From now on a signal raises KeyboardInterrupt. What is ignored, as SIGHUP by nohup, stays so."""
    for number in (getattr(signal, name) for name in NAMES if _State.ours and hasattr(signal, name)):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)


def was_interrupted() -> bool:
    """Whether a signal has come since ``clean_up_first``."""
    return _State.interrupted


def stop_if_interrupted() -> None:
    """Raise KeyboardInterrupt once more if there was one: where Python cannot raise, as in a finalizer, it tells of it and goes on."""
    if _State.interrupted:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _State.interrupted = True
    if _is_importing(frame):
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)
        return
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
