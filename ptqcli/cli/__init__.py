"""The ``ptq`` command: flags in, exit code out.

One file a command, imported only when that command is called, so that ``ptq --help`` need not wait for torch. Only this package
prints, exits, or reads the environment. Whatever fails ends in one line on stderr:

    0    done            1    the work failed
    2    the request cannot work as it was written
    130  interrupted

``ptq --debug COMMAND`` shows the traceback as well.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from ptqcli import __version__
from ptqcli.errors import PTQError, printable

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

# Command -> (module of this package, first line of its help). They stand here so that the list of commands needs no module.
COMMANDS = {
    "quantize": ("quantize", "Turn MODEL into a packed checkpoint folder."),
    "eval": ("evaluate", "Measure how good CHECKPOINT is, beside the original."),
    "bench": ("bench", "Measure how fast CHECKPOINT is, beside the original."),
    "inspect": ("inspect", "Show what is in CHECKPOINT: schemes, sizes, per-layer error."),
    "generate": ("generate", "Let CHECKPOINT continue TEXT."),
    "algorithms": ("algorithms", "List the parts of --algo with their options."),
    "recipes": ("recipes", "List the recipes that come along."),
    "doctor": ("doctor", "Tell what this machine can run, and what to install."),
}


@dataclass
class Session:
    """What the global flags said."""

    debug: bool = False


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command = importlib.import_module(f"ptqcli.cli.{module}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="On failure, show the traceback too.")
@click.version_option(__version__, prog_name="ptq")
@click.pass_obj
def app(session: Session, debug: bool) -> None:
    """Post-training quantization of language models: a model in, a small packed checkpoint out, its quality measured."""
    session.debug = debug


def main() -> None:
    """Entry point of ``ptq`` and ``ptqcli``."""
    _clean_up_when_told_to_end()
    _open_closed_streams()
    sys.exit(run(sys.argv[1:]))


def _clean_up_when_told_to_end() -> None:
    """Treat a polite request to end as Ctrl-C; by default Python would end at once and leave the half-written folder."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)


def _open_closed_streams() -> None:
    """Where a shell has closed stdout or stderr (``>&-``), Python has None and the next file would get its number: write to nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  for as long as the process lives


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors have been told on stderr by then."""
    session = Session()
    try:
        return _as_exit_code(app.main(list(arguments), prog_name="ptq", standalone_mode=False, obj=session))
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        help_wanted.show()
        return help_wanted.exit_code
    except click.Abort:
        _tell(session, "interrupted; no half-written file is left behind")
        return INTERRUPTED
    except click.ClickException as error:
        _tell(session, f"error: {error.format_message()}{_where_to_read(error)}")
        return error.exit_code
    except PTQError as error:
        _tell(session, f"error: {error}")
        return error.exit_code
    except OSError as error:
        _tell(session, f"error: {_describe(error)}")
        return 1
    except MemoryError:
        _tell(session, "error: out of memory; see the memory need that `ptq quantize --dry-run` prints")
        return 1
    except Exception as error:  # noqa: BLE001  the last resort: a defect must end in one line, too
        _tell(session, f"internal error: {type(error).__name__}: {error}; run `ptq --debug ...` to see where")
        return 1


def _as_exit_code(result: Any) -> int:
    """click hands back what the command returned (None), or the number that ``ctx.exit`` was given."""
    return result if isinstance(result, int) else 0


def _tell(session: Session, message: str) -> None:
    if session.debug:
        traceback.print_exc()
    print(printable(" ".join(message.split())), file=sys.stderr)


def _where_to_read(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see `{context.command_path} --help`)" if context is not None else ""


def _describe(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
