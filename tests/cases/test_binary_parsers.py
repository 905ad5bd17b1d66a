"""Arrow and Parquet files whose bytes are not what their header says: one line that names the file, and the process lives.

Row 28. pyarrow follows offsets without looking where they point. Here a process of its own reads files of which one number was changed,
since what would fail is the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ptqcli.calibration.files import read_file, read_path
from ptqcli.calibration.rows import Rows
from ptqcli.errors import PTQError

TEXTS = [f"text number {number}" for number in range(8)]


def arrow_bytes(column: pa.Array, file: bool = False) -> bytes:
    table, sink = pa.table({"text": column}), pa.BufferOutputStream()
    with (pa.ipc.new_file if file else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def with_offset(data: bytes, offset: int) -> bytes:
    """The second offset of the strings, 13, replaced; that of the first text's end, and its beginning, are 13 and 0."""
    before = (0).to_bytes(4, "little") + (13).to_bytes(4, "little")
    assert data.count(before) == 1
    return data.replace(before, before[:4] + offset.to_bytes(4, "little", signed=True))


@pytest.mark.parametrize("file", [False, True])
def test_an_offset_that_points_elsewhere(tmp_path: Path, file: bool) -> None:
    for number, offset in enumerate((2**31 - 1, 10**9, 200, -1, -(2**31))):
        (tmp_path / f"{number}.arrow").write_bytes(with_offset(arrow_bytes(pa.array(TEXTS), file), offset))
    code = (
        "import sys, pathlib; from ptqcli.calibration.files import read_file; from ptqcli.errors import PTQError\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: read_file(path); print('read', path)\n"
        "    except PTQError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [str(tmp_path / f"{number}.arrow") for number in range(5)]
    assert all("cannot be read (" in line for line in lines)


def not_text(kind: pa.DataType) -> pa.Array:
    return pa.array([b"right", b"\xff\xfe wrong"], pa.binary() if kind == pa.string() else pa.large_binary()).view(kind)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_strings_that_are_not_utf8(tmp_path: Path, kind: pa.DataType) -> None:
    (tmp_path / "a.arrow").write_bytes(arrow_bytes(not_text(kind)))
    pq.write_table(pa.table({"text": not_text(kind)}), tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        with pytest.raises(PTQError, match=f"{name} cannot be read .*(?i:utf-?8)"):
            read_file(tmp_path / name)


def test_a_saved_data_set_is_read_by_the_same_reader(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    (tmp_path / "a.arrow").write_bytes(arrow_bytes(pa.array(TEXTS)))
    assert read_path(tmp_path, "calibration", Rows()) == TEXTS
    (tmp_path / "a.arrow").write_bytes(arrow_bytes(not_text(pa.string())))
    with pytest.raises(PTQError, match=r"a\.arrow cannot be read"):
        read_path(tmp_path, "calibration", Rows())


@pytest.mark.parametrize("name", ["../a.arrow", "/etc/passwd", "", "..", 3, None])
def test_a_saved_data_set_names_files_of_its_own_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (tmp_path / "a.arrow").write_bytes(arrow_bytes(pa.array(TEXTS)))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(PTQError, match=r"state\.json: does not list Arrow files beside it"):
        read_path(folder, "calibration", Rows())
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(PTQError, match=r"dataset_dict\.json: splits is"):
        read_path(folder, "calibration", Rows())


@pytest.mark.parametrize("ending", [".arrow", ".parquet"])
@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.dictionary(pa.int8(), pa.large_string())])
def test_strings_in_other_layouts_are_strings(tmp_path: Path, ending: str, kind: pa.DataType) -> None:
    path = tmp_path / f"texts{ending}"
    column = pa.array(TEXTS).cast(kind)
    if ending == ".parquet":
        pq.write_table(pa.table({"text": column}), path)
    else:
        path.write_bytes(arrow_bytes(column))
    assert read_file(path) == TEXTS


def test_runs_of_one_string(tmp_path: Path) -> None:
    (tmp_path / "texts.arrow").write_bytes(
        arrow_bytes(pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["a", "b"])))
    )
    assert read_file(tmp_path / "texts.arrow") == ["a", "a", "b"]


@pytest.mark.parametrize("ending", [".arrow", ".parquet"])
def test_two_columns_of_one_name(tmp_path: Path, ending: str) -> None:
    path, table = tmp_path / f"texts{ending}", pa.table([pa.array(TEXTS), pa.array(TEXTS[::-1])], names=["text", "text"])
    if ending == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(PTQError, match=f"{path}: has two columns called 'text'"):
        read_file(path)


def test_a_text_column_that_holds_something_else(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([1, 2]), "n": pa.array([3, 4])}), tmp_path / "texts.parquet")
    with pytest.raises(PTQError, match=r"its column 'text' holds no strings \(columns: text, n\)"):
        read_file(tmp_path / "texts.parquet")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_cells_that_other_characters_separate(tmp_path: Path, separator: str) -> None:
    (tmp_path / "texts.csv").write_text(f"text{separator}n\na text{separator}1\n")
    with pytest.raises(PTQError, match="whose cells are not separated by commas"):
        read_file(tmp_path / "texts.csv")
