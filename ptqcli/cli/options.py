"""Flags that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli import budget
from ptqcli.cli import completion
from ptqcli.errors import UsageError

if TYPE_CHECKING:
    import torch


class NamedPath(click.Path):
    """A path that is not empty: ``Path("")`` would be the working directory, and an unset variable of a shell is no wish for it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty; give a path", param, ctx)
        return super().convert(value, param, ctx)


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Bytes: a number with a unit, such as 8GiB, 500MB or 8G, or without one."""
    if value is None:
        return None
    try:
        return budget.parse_size(value)
    except UsageError as error:
        raise click.BadParameter(str(error), ctx, param) from error


data_dir_option = click.option(
    "--data-dir",
    type=NamedPath(),
    envvar="PTQ_DATA_DIR",
    show_envvar=True,
    metavar="FOLDER",
    shell_complete=completion.folder,
    help="Where to look for wikitext2, c4 and pile before the hub.",
)
KERNELS = ("auto", "triton", "torch", "reference")  # of ptqcli.runtime, whose import takes torch along; a test compares the two

device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda[:N]",
    shell_complete=completion.names(lambda: ("cpu", "cuda")),
    help="Where the arithmetic runs.",
)
kernel_option = click.option(
    "--kernel",
    type=click.Choice(KERNELS),
    default="auto",
    show_default=True,
    help="What packed weights are multiplied by; other than auto, a layer that cannot run on it is an error.",
)
processes_option = click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="one for each GPU; on the CPU 1",
    help="Processes of this machine that share the work; torchrun and accelerate launch start such on several machines, too.",
)
memory_option = click.option(
    "--memory",
    callback=parse_size,
    metavar="SIZE",
    show_default="what is free",
    help="What a process may take, such as 8GiB; activations beyond it live on disk, and what cannot fit is refused at once.",
)
activation_budget_option = click.option(
    "--activation-budget",
    type=click.FloatRange(min=0),
    metavar="GIB",
    show_default="what --memory leaves",
    help="Activations beyond this go to a file in the output folder.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; all else goes to stderr.")
log_format_option = click.option(
    "--log-format",
    type=click.Choice(("text", "json")),
    default="text",
    show_default=True,
    help="What is told meanwhile: words, or a JSON object a line on stderr; the folder gets a log of either kind.",
)
quiet_option = click.option("--quiet", is_flag=True, help="Show nothing but errors.")


def open_device(name: str) -> torch.device:
    """As that of ``ptqcli.resources``, whose import takes torch along."""
    from ptqcli import resources

    return resources.open_device(name)
