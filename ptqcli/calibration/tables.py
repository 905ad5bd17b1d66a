"""Parquet and Arrow files, and data sets saved by the ``datasets`` library, which are folders of Arrow files.

pyarrow believes what stands in a file unless it is told not to: it follows an offset that points out of its buffer, and the process dies
or reads what lies there. So every batch of rows is validated in full before a value of it is looked at. Nothing is mapped into memory,
since a file that is cut while it is read would end the process, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptqcli.errors import PTQError
from ptqcli.untrusted import read_json, shown

# How many rows of a Parquet file are read at once.
CHUNK_ROWS = 1_000


def text_columns(path: Path) -> dict[str, bool]:
    """The columns of a Parquet or Arrow file by name, and whether each holds strings. Raises, here and below, what pyarrow does."""
    from pyarrow import parquet

    schema = parquet.read_schema(str(path)) if path.suffix == ".parquet" else next(_arrow(path))
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise PTQError(f"{path}: has two columns called {shown(twice)}; rename one")
    return {field.name: _holds_strings(field.type) for field in schema}


def _holds_strings(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _holds_strings(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def column_values(path: Path, column: str) -> Iterator[object]:
    """The values of a column, read as they are asked for."""
    for batch in _parquet(path, column) if path.suffix == ".parquet" else _arrow_batches(path, column):
        batch.validate(full=True)
        yield from batch.column(0).to_pylist()


def saved_splits(folder: Path) -> list[str] | None:
    """The splits of a saved data set, each a folder of that name, or None for one that has none. Raises PTQError for damaged ones."""
    file = folder / "dataset_dict.json"
    if not file.is_file():
        return None
    splits = read_json(file).get("splits")
    if not isinstance(splits, list) or not splits or not all(_is_name(split) for split in splits):
        raise PTQError(f"{file}: splits is {shown(splits)}, not a list of folders beside it")
    return splits


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved data set without splits, in their order. Raises PTQError, naming the file, for damaged ones."""
    file = folder / "state.json"
    state = read_json(file)
    listed = state.get("_data_files")
    names: list[Any] = [entry.get("filename") if isinstance(entry, dict) else entry for entry in listed] if isinstance(listed, list) else []
    if not names or not all(_is_name(name) for name in names) or state.get("_indices_data_files"):
        raise PTQError(f"{file}: does not list Arrow files beside it; save the data set again")
    return [folder / name for name in names]


def _is_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


def _parquet(path: Path, column: str) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(str(path)) as file:
        yield from file.iter_batches(CHUNK_ROWS, columns=[column])


def _arrow_batches(path: Path, column: str) -> Iterator[Any]:
    batches = _arrow(path)
    next(batches)
    return (batch.select([column]) for batch in batches)


def _arrow(path: Path) -> Iterator[Any]:
    """The schema of an Arrow file of either layout, then its batches."""
    from pyarrow import ArrowInvalid, OSFile, ipc

    with OSFile(str(path)) as source:
        try:
            reader = ipc.open_stream(source)
        except ArrowInvalid:
            source.seek(0)
            reader = ipc.open_file(source)
            yield reader.schema
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
            return
        yield reader.schema
        yield from reader
