"""A recipe file as it is written: YAML, of which only what a recipe needs is taken."""

from __future__ import annotations

from pathlib import Path

from ptqcli.errors import PTQError, UsageError
from ptqcli.yaml_file import read_yaml

# A line for each of 3,000 linears. YAML takes seconds for a MB.
MOST_RECIPE_BYTES = 256 << 10


def read_recipe_file(file: Path) -> dict[str, object]:
    """The keys of a recipe file and their values. Raises UsageError for a file that cannot be read, is too long, or is no mapping."""
    try:
        values = read_yaml(file, MOST_RECIPE_BYTES)
    except PTQError as error:
        raise UsageError(str(error)) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{file}: a recipe is a list of 'key: value' lines; see configs/ for examples")
    return values
