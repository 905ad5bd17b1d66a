"""``ptq completion``: the script that lets a shell complete words of ``ptq``, and what it is offered for them.

The script runs ``ptq`` each time that the tab key is pressed, so nothing here may import torch: flags that only parts have are not
offered, since they are known when the parts are imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from ptqcli.cli import examples
from ptqcli.errors import PTQError
from ptqcli.suggest import did_you_mean

SHELLS = {
    "bash": 'eval "$(ptq completion bash)"          # in ~/.bashrc',
    "zsh": 'eval "$(ptq completion zsh)"           # in ~/.zshrc, behind compinit',
    "fish": "ptq completion fish | source           # in ~/.config/fish/config.fish",
}
VARIABLE = "_PTQ_COMPLETE"  # which click looks for
MOST_ENTRIES = 2000  # of a folder that is looked at
CONFIG_BYTES = 1 << 20  # of a config.json that is looked at

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


@click.command(epilog=examples(*SHELLS.values()))
@click.argument("shell", metavar="|".join(SHELLS), shell_complete=lambda ctx, param, incomplete: _items(SHELLS, incomplete))
def command(shell: str) -> None:
    """Print the script that completes words of ptq in a shell."""
    found = get_completion_class(shell) if shell in SHELLS else None
    if found is None:
        raise click.BadParameter(f"'{shell}' is not one of {', '.join(SHELLS)}{did_you_mean(shell, SHELLS)}", param_hint="SHELL")
    try:
        click.echo(found(click.Command("ptq"), {}, "ptq", VARIABLE).source())
    except OSError as error:  # click asks bash for its version
        raise PTQError(f"{shell} cannot be run: {error.strerror}; install it, or choose another shell") from error


def names(words: Callable[[], Iterable[str]]) -> Complete:
    """Completes one of ``words()``."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _items(words(), incomplete)

    return complete


def texts(part: str) -> Complete:
    """Completes a name of a text that has this part (calibration, evaluation) or a text file; where neither is near, any path."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from ptqcli.calibration.corpora import CORPORA
        from ptqcli.calibration.files import is_text_file

        chosen = ("auto", "self") if part == "calibration" else ()
        named = (*chosen, "builtin", *(name for name, parts in CORPORA.items() if part in parts))
        files = (path for path, entry in _entries(incomplete) if is_text_file(entry.name))
        return _items([*named, *files], incomplete) or [CompletionItem(incomplete, type="file")]

    return complete


def task(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes a file of questions, a task file or a folder; where there is none, any path."""
    entries = (path for path, entry in _entries(incomplete) if entry.is_dir() or entry.name.endswith((".jsonl", ".json", ".yaml")))
    return _items(entries, incomplete) or [CompletionItem(incomplete, type="file")]


def algorithm(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes the last part of parts joined by +, which ends with a solver."""
    from ptqcli.algorithms import parts

    before, plus, word = incomplete.rpartition("+")
    table, named = parts(), before.split("+")
    if any(name in table and table[name].is_solver for name in named):
        return []
    return [CompletionItem(f"{before}{plus}{name}") for name in table if name.startswith(word) and name not in named]


def recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes the name of a recipe that comes along, or a YAML file."""
    from ptqcli.shipped import SUFFIXES, shipped_recipes

    files = (path for path, entry in _entries(incomplete) if entry.name.endswith(SUFFIXES))
    return _items([*shipped_recipes(), *files], incomplete) or [CompletionItem(incomplete, type="file")]


def scheme(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes a name of a scheme that is often wanted."""
    from ptqcli.numerics.scheme import usual_schemes

    return _items(usual_schemes(), incomplete)


def folder(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Leaves it to the shell to complete any folder."""
    return [CompletionItem(incomplete, type="dir")]


def model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes a folder that holds a model which is not quantized yet; where there is none, any folder."""
    return _model_folders(incomplete, packed=False)


def checkpoint(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes a folder that holds a quantized checkpoint; where there is none, any folder."""
    return _model_folders(incomplete, packed=True)


def _model_folders(incomplete: str, packed: bool) -> list[CompletionItem]:
    folders = [path for path, entry in _entries(incomplete) if _is_packed(Path(entry.path)) is packed]
    return _items(folders, incomplete) or [CompletionItem(incomplete, type="dir")]


def _is_packed(folder: Path) -> bool | None:
    """Whether the model in ``folder`` is quantized; None where there is no model."""
    try:
        with (folder / "config.json").open("rb") as file:
            return b'"quantization_config"' in file.read(CONFIG_BYTES)
    except OSError:
        return None


def _entries(incomplete: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """What lies where a path that begins with ``incomplete`` would lie, as it would be written."""
    folder = os.path.dirname(incomplete)
    try:
        with os.scandir(Path(folder).expanduser()) as entries:
            found = sorted(islice(entries, MOST_ENTRIES), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in found:
        yield os.path.join(folder, entry.name), entry


def _items(words: Iterable[str], incomplete: str) -> list[Any]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]
