"""Flags that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    envvar="PTQ_DATA_DIR",
    show_envvar=True,
    metavar="FOLDER",
    help="Where to look for wikitext2, c4 and pile before the hub.",
)
device_option = click.option(
    "--device", default="cpu", show_default=True, metavar="cpu|cuda[:N]", help="Where the arithmetic runs."
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; all else goes to stderr.")
quiet_option = click.option("--quiet", is_flag=True, help="Show nothing but errors.")
