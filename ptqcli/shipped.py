"""The recipes that come with the package, taken by name. In a wheel they lie in ``ptqcli/configs``, in a checkout beside the package."""

from __future__ import annotations

from pathlib import Path

from ptqcli.errors import UsageError
from ptqcli.suggest import did_you_mean

SUFFIXES = (".yaml", ".yml")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file, in alphabetical order."""
    package = Path(__file__).parent
    folder = next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), None)
    return {} if folder is None else {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(text: str) -> Path:
    """The file that ``text`` means: a path if it looks like one or exists, otherwise the name of a shipped recipe.

    Raises UsageError, with names that are close, for a name that is none.
    """
    if not text:
        raise UsageError("the recipe's name is empty; give a name of `ptq recipes` or a YAML file")
    path = Path(text)
    if path.name != text or path.suffix in SUFFIXES or path.exists():
        return path
    known = shipped_recipes()
    if text in known:
        return known[text]
    files = [file.name for suffix in SUFFIXES for file in Path().glob(f"*{suffix}")]
    advice = did_you_mean(text, [*known, *files]) or "; `ptq recipes` lists them"
    raise UsageError(f"recipe '{text}' is neither a file nor one of those that come along{advice}")


def first_comment(file: Path) -> str:
    """What the first comment of a recipe says, in its first line; empty if the file begins otherwise."""
    line = file.read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""
