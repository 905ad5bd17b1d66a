"""The built-in text: what every Python installation carries, read from the running one, so that nothing is downloaded.

Three sources, in English and Python:

    topics      the language reference that ``help()`` shows, ``pydoc_data.topics``
    sources     the ``.py`` files of the standard library, with the docstrings inside them
    docstrings  of the modules that are written in C and compiled into every interpreter

It is split before anything is trained or calibrated: a module (a package with all its files, or a topic) belongs to the
evaluation part when a hash of its name falls in the lowest 6 %. The hash depends on nothing else, so the same module stands
in the same part in every Python version. A module and its twin (``decimal``, ``_decimal``, ``_pydecimal``) share a name for
this purpose. Documents come in the order of a hash of their names, so that any first stretch of them is a mixture.

Left out: tests, tables of character codes and what installations often lack (EXCLUDED), so that two installations of one version have
the same text as far as possible; docstrings that show an address in memory; ``pydoc_data`` as a source file,
because it holds the topics of both parts.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

from ptqcli.errors import PTQError

Part = Literal["calibration", "evaluation"]

EVALUATION_SHARE = 0.06
# Chosen once among a handful so that the evaluation part has a mixture of topics, code and prose, and no large package.
SPLIT_SALT = "ptqcli"
SMALLEST_CORPUS = 2_000_000  # characters; a complete installation has over 7 million

EXCLUDED = frozenset((
    "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "tkinter", "turtledemo",
    "site-packages", "__pycache__",
))  # fmt: skip
# Compiled into every CPython, so importing them loads no file and has no effect.
C_MODULES = (
    "_codecs", "_collections", "_functools", "_io", "_operator", "_signal", "_stat", "_string", "_symtable", "_thread", "_weakref",
    "atexit", "builtins", "errno", "faulthandler", "gc", "itertools", "marshal", "time",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text. module: the name that decides the part. name: unique, decides the order."""

    module: str
    name: str
    text: str


def documents(part: Part) -> list[str]:
    """Texts of one part, in an order that depends on their names only.

    Raises PTQError when this Python carries too little text, as one without library sources does.
    """
    corpus = read_corpus()
    if sum(len(document.text) for document in corpus) < SMALLEST_CORPUS:
        raise PTQError(
            "this Python carries too little text for the built-in corpus (its library has no source files); give a text with --calib PATH"
        )
    calibration = [document.text for document in corpus if part_of(document.module) == "calibration"]
    if part == "calibration":
        return calibration
    seen = set(calibration)
    evaluation = [document.text for document in corpus if part_of(document.module) == "evaluation"]
    return [text for text in evaluation if text not in seen]


def part_of(module: str) -> Part:
    """The part to which a module or topic belongs, by name alone."""
    share = int(_digest(f"{SPLIT_SALT}/{module}")[:8], 16) / 2**32
    return "evaluation" if share < EVALUATION_SHARE else "calibration"


@cache
def read_corpus() -> tuple[Document, ...]:
    """All documents of the running Python that have any text, both parts, in their final order."""
    found = [*_topics(), *_sources(Path(sysconfig.get_path("stdlib"))), *_docstrings()]
    return tuple(sorted((document for document in found if document.text.strip()), key=lambda one: _digest(one.name)))


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _twin_name(module: str) -> str:
    """``_pydecimal``, ``_decimal`` and ``decimal`` hold much the same text and must not be parted."""
    return module.removeprefix("_py") if module.startswith("_py") else module.lstrip("_")


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:  # slimmed installations drop it
        return
    for name, text in topics.items():
        yield Document(f"topic {name}", f"topic {name}", text)


def _sources(library: Path) -> Iterator[Document]:
    for module in sorted(sys.stdlib_module_names - EXCLUDED):
        single = library / f"{module}.py"
        files = [single] if single.is_file() else sorted((library / module).rglob("*.py"))
        for file in files:
            name = file.relative_to(library)
            if EXCLUDED.isdisjoint(name.parts):
                yield Document(_twin_name(module), name.as_posix(), _read_source(file))


def _read_source(file: Path) -> str:
    with tokenize.open(file) as lines:  # obeys the file's own declaration of its encoding
        return lines.read()


def _docstrings() -> Iterator[Document]:
    for name in sorted(set(C_MODULES) & set(sys.builtin_module_names)):
        module = importlib.import_module(name)
        yield Document(_twin_name(name), f"docstrings {name}", "\n\n".join(_docstrings_of(module)))


def _docstrings_of(module: ModuleType) -> list[str]:
    """Docstrings of a module, its functions and classes, and the methods that those define, each headed by its name."""
    found = {module.__name__: inspect.getdoc(module)}
    for name, member in sorted(vars(module).items()):
        if not callable(member) or getattr(member, "__module__", None) != module.__name__:
            continue
        found[name] = inspect.getdoc(member)
        if inspect.isclass(member):
            methods = [attribute for attribute in sorted(vars(member)) if not attribute.startswith("_")]
            found |= {f"{name}.{attribute}": inspect.getdoc(getattr(member, attribute)) for attribute in methods}
    return [f"{name}\n{text}" for name, text in found.items() if text and " at 0x" not in text]
