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
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from ptqcli import __version__
from ptqcli.cli.signals import end_at_once, was_interrupted
from ptqcli.cli.streams import output_failure, protect_streams
from ptqcli.errors import PTQError, printable
from ptqcli.suggest import did_you_mean

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

# Command -> (module of this package, first line of its help). They stand here so that the list of commands needs no module.
COMMANDS = {
    "quantize": ("quantize", "Turn MODEL into a packed checkpoint folder."),
    "sensitivity": ("sensitivity", "Show what each scheme costs each group of MODEL's linears."),
    "eval": ("evaluate", "Measure how good CHECKPOINT is, beside the original."),
    "compare": ("compare", "Measure checkpoints on the same tokens, beside their model."),
    "bench": ("bench", "Measure how fast CHECKPOINT is, beside the original."),
    "tune": ("tune", "Find the smallest checkpoint of MODEL that keeps a goal."),
    "tune-scales": ("tune_scales", "Tune the scales of CHECKPOINT to the original, end to end."),
    "convert": ("convert", "Write CHECKPOINT in the format of another program."),
    "push": ("push", "Put CHECKPOINT into a repository of the hub."),
    "inspect": ("inspect", "Show what is in CHECKPOINT: schemes, sizes, per-layer error."),
    "generate": ("generate", "Let CHECKPOINT answer or continue TEXT."),
    "algorithms": ("algorithms", "List the parts of --algo with options, and the formats."),
    "recipes": ("recipes", "List the recipes that come along."),
    "doctor": ("doctor", "Tell what this machine can run, and what to install."),
    "completion": ("completion", "Print the script that completes words of ptq in a shell."),
}


@dataclass
class Session:
    """One command line at work.

    debug: what the flag said. result_kept: what was made lies in a folder, whoever reads the output. arguments: the words of the line.
    """

    debug: bool = False
    result_kept: bool = False
    arguments: tuple[str, ...] = ()


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{args[0]}'{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

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


def examples(*lines: str) -> str:
    """The end of a command's help: ``lines`` as they would be typed."""
    return "\b\nExamples:\n  " + "\n  ".join(lines)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "ptq quantize && ptq eval        # the demo model, then how good the result is",
        "ptq quantize ~/models/Llama-3.2-1B --algo gptq --wbits 4 --calib c4",
        "ptq COMMAND --help",
    ),
)
@click.option("--debug", is_flag=True, help="On failure, show the traceback too.")
@click.version_option(__version__, prog_name="ptq")
@click.pass_obj
def app(session: Session, debug: bool) -> None:
    """Post-training quantization of language models: a model in, a small packed checkpoint out, its quality measured."""
    session.debug = debug


def main() -> None:
    """Entry point of ``ptq`` and ``ptqcli``."""
    end_at_once()
    protect_streams()
    session = Session()
    sys.exit(run(sys.argv[1:], session) or _told_in_full(session))


def _told_in_full(session: Session) -> int:
    """The exit code of work that was done: 1, told, if its result was output and is lost. A reader who left early has had enough."""
    failure = output_failure()
    if failure is None or session.result_kept or isinstance(failure, ConnectionError):
        return 0
    _tell(session, f"error: standard output: {failure.strerror}; what was to be shown is lost")
    return 1


def run(arguments: Sequence[str], session: Session | None = None) -> int:
    """Run one command line and return its exit code; errors have been told on stderr by then."""
    session = session or Session()
    session.arguments = tuple(arguments)
    try:
        return _as_exit_code(app.main(list(arguments), prog_name="ptq", standalone_mode=False, obj=session))
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        help_wanted.show()
        return help_wanted.exit_code
    except click.Abort as error:
        return _interrupted(session, error.__cause__)
    except click.ClickException as error:
        _tell(session, f"error: {error.format_message()}{_where_to_read(error)}")
        return error.exit_code
    except PTQError as error:
        _tell(session, f"error: {error}")
        return error.exit_code
    except OSError as error:
        _tell(session, f"error: {_describe(error)}")
        return 1
    except MemoryError as error:
        return _out_of_memory(session, error)
    except Exception as error:  # noqa: BLE001  the last resort: a defect must end in one line, too
        if was_interrupted():
            return _interrupted(session, None)
        from ptqcli.resources import ran_out  # imports torch, which is only needed where something went wrong

        if ran_out(error):
            return _out_of_memory(session, error)
        _tell(session, f"internal error: {type(error).__name__}: {error}; run `ptq --debug ...` to see where")
        return 1


def _out_of_memory(session: Session, error: BaseException) -> int:
    said = f" ({str(error)[:200]})" if str(error) else ""
    advice = "give less at once (--batch-size, --seqlen, --nsamples) or another --device; `ptq quantize --dry-run` prints what a run needs"
    _tell(session, f"error: out of memory{said}; {advice}")
    return 1


def _interrupted(session: Session, cause: BaseException | None) -> int:
    """cause: may say what became of the work."""
    _tell(session, f"interrupted; {cause}" if str(cause or "") else "interrupted")
    return INTERRUPTED


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
