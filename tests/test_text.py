"""Where text comes from and how it is cut, against texts written out by hand."""

from __future__ import annotations

import bz2
import csv
import gc
import gzip
import io
import json
import logging
import lzma
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ptqcli.calibration import builtin, corpora, files, text
from ptqcli.calibration.text import calibration_windows, documents, evaluation_ids
from ptqcli.errors import PTQError, UsageError

WIKITEXT = Path(__file__).parents[2] / "shared/data/wikitext-2-raw"

RAW = " \n = Title = \n \n First line . \n Second line\u2028still second . \n \n"
# What the datasets library gives for that file: a line with its newline, or "" for a blank one.
ROWS = ["", " = Title = \n", "", " First line . \n", " Second line\u2028still second . \n", ""]
JOINED = "\n\n = Title = \n\n\n\n\n First line . \n\n\n Second line\u2028still second . \n\n\n"


# Texts that a reader which guesses types, drops "missing" ones or cuts at other line ends would change.
TRICKY = ['one, "two"', "2020-01-01 00:00:00", "NA", "null", "", "12", "a\u2028b\x85c\x0bd", "😀 \\ é", "tail\n\n", " x\ty "]
PACKINGS = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:20], mtime=0) + gzip.compress(data[20:], mtime=0),
    ".bz2": lambda data: bz2.compress(data[:20]) + bz2.compress(data[20:]),
    ".xz": lambda data: lzma.compress(data[:20]) + lzma.compress(data[20:]),
    ".zst": lambda data: pa.compress(data[:20], codec="zstd", asbytes=True) + pa.compress(data[20:], codec="zstd", asbytes=True),
}


def words(first: int, last: int) -> str:
    return " ".join(f"w{number}" for number in range(first, last))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word number n is token n, the end of text is token 10000."""
    vocab = {f"w{number}": number for number in range(10_000)} | {"<eos>": 10_000, "<bos>": 10_001, "<unk>": 10_002}
    words_to_ids = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_to_ids, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Empty caches, no network. Returns the folder of the two caches."""
    import datasets
    import huggingface_hub

    caches = tmp_path / "caches"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(caches / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", caches / "datasets")
    return caches


@pytest.fixture
def unclosed(request: pytest.FixtureRequest) -> Iterator[None]:
    """For a test that does not read a CSV file to its end: pandas, as ``datasets`` calls it, leaves closing it to the collector."""
    request.node.add_marker(pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"))
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[str | None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), path)
    return path


def fails(error: type[PTQError], source: Path | str, part: builtin.Part = "evaluation", data_dir: Path | None = None) -> str:
    """The one line of the error that reading this source raises; its class must be exactly the one given."""
    with pytest.raises(PTQError) as caught:
        documents(str(source), part, data_dir)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files


def test_a_text_file_is_one_document_with_unix_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree é\n".encode())
    assert documents(str(tmp_path / "a.txt"), "calibration") == ["one\ntwo\nthree é\n"]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_json_lines_plain_and_compressed(tmp_path: Path, kind: str, packing: str) -> None:
    rows = [{"id": 7, "text": text, "more": {"a": text}} for text in TRICKY]
    lines = ["", *map(json.dumps, rows[:5]), " ", *(json.dumps(row, ensure_ascii=False) for row in rows[5:])]
    path = tmp_path / f"a{kind}{packing}"
    path.write_bytes(PACKINGS[packing]("\r\n".join(lines).encode()))
    assert documents(str(path), "evaluation") == [json.loads(line)["text"] for line in lines if line.strip()] == TRICKY


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path: Path, packing: str, indent: int | None) -> None:
    array = "\ufeff\n" + json.dumps([{"n": 1, "text": text} for text in TRICKY], indent=indent) + "\n"
    path = tmp_path / f"a.json{packing}"
    path.write_bytes(PACKINGS[packing](array.encode()))
    assert documents(str(path), "evaluation") == TRICKY


def test_json_rows_may_differ_in_what_is_not_text(tmp_path: Path) -> None:
    """Also far behind the 10 MB by which ``datasets`` settles the columns of JSON."""
    rows = [{"text": "2020-01-01", "n": 1}, {"n": "x", "text": "b"}, *[{"text": "x" * 100_000}] * 120, {"late": [1], "text": "c"}]
    assert documents(str(write_jsonl(tmp_path / "a.jsonl", rows)), "evaluation") == [row["text"] for row in rows]


@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz"])
def test_csv(tmp_path: Path, packing: str) -> None:
    rows = io.StringIO()
    csv.writer(rows).writerows([["n", "text"], *enumerate([*TRICKY, "two\r\nlines\rthree"])])
    data = ("\ufeff" + rows.getvalue()).encode()
    path = tmp_path / f"a.csv{packing}"
    path.write_bytes(PACKINGS[packing](data))
    [_, *cells] = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    assert documents(str(path), "evaluation") == [cell.replace("\r\n", "\n").replace("\r", "\n") for _, cell in cells]
    assert cells[-1][1] == "two\r\nlines\rthree"


@pytest.mark.parametrize("packing", PACKINGS)
def test_compressed_text_and_names_with_signs_of_patterns(tmp_path: Path, packing: str) -> None:
    for name in ("a[1]*?.txt", "a[1]*?.raw"):
        (tmp_path / f"{name}{packing}").write_bytes(PACKINGS[packing](RAW.replace("\n", "\r\n").encode()))
    assert documents(str(tmp_path / f"a[1]*?.txt{packing}"), "evaluation") == [RAW]
    assert documents(str(tmp_path / f"a[1]*?.raw{packing}"), "evaluation") == [JOINED]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_and_arrow_rows(tmp_path: Path, kind: pa.DataType) -> None:
    rows = TRICKY * 500
    table = pa.table({"n": list(range(len(rows))), "body": pa.array(rows, kind), "more": [[1.5]] * len(rows)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1_700)
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=1_300)
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "a.arrow", "file.arrow"):
        assert documents(str(tmp_path / name), "evaluation") == rows == table["body"].to_pylist()


def damaged_after_the_front(kind: str, path: Path) -> None:
    """A file of 60 MB, as long as it is not compressed, that nobody can read to its end."""
    texts = [f"{number} " + "x" * 1000 for number in range(60_000)]
    table = pa.table({"text": texts})
    if kind == ".parquet":
        pq.write_table(table, path, row_group_size=5_000, compression="none", use_dictionary=False)
    elif kind == ".arrow":
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table, max_chunksize=5_000)
    elif kind == ".csv":
        path.write_text("text\n" + "".join(f"{text}\n" for text in texts))
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        path.write_bytes({"": str.encode, ".gz": lambda data: gzip.compress(data.encode(), 1, mtime=0)}[kind.removeprefix(".jsonl")](lines))
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.seek(size // 2)
        file.write(b"\xff" * (size // 4))


@pytest.mark.usefixtures("unclosed")
@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".csv", ".parquet", ".arrow"])
def test_of_a_large_file_only_the_front_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a{kind}"
    damaged_after_the_front(kind, path)
    texts = files.read_file(path, 2_000)
    assert [text.split()[0] for text in texts] == [str(number) for number in range(2_000)]
    assert f"a{kind}" in fails(PTQError, path)


def test_the_only_text_column_is_the_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"n": 1, "content": "hello"}])
    assert documents(str(path), "evaluation") == ["hello"]


def test_raw_wikitext_has_the_rows_of_the_datasets_library(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_bytes(RAW.replace("\n", "\r\n").encode())
    assert documents(str(tmp_path / "wiki.test.raw"), "evaluation") == [JOINED]
    assert "\n\n".join(ROWS) == JOINED


@pytest.mark.usefixtures("unclosed")
@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", b"ok \xff", PTQError, "a.txt: not UTF-8 (0xff at byte 3); convert it to UTF-8"),
        ("a.txt", b" \n\n", PTQError, "a.txt: the text is empty"),
        ("a.jsonl", b'{"text": "a \\ud800 b"}', PTQError, "a.jsonl, line 1: half a surrogate pair"),
        ("a.jsonl", b'{"text": ' * 100_000, PTQError, "a.jsonl, line 1: too many brackets"),
        ("a.json", b"[" * 100_000, PTQError, "a.json: too many brackets"),
        ("a.jsonl", b"", PTQError, "a.jsonl: the text is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', PTQError, "a.jsonl, line 2: not valid JSON (Expecting value, column"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', PTQError, "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', PTQError, "a.jsonl, line 2: no text in column 'text' but int"),
        ("a.jsonl", b'{"text": null}\n{"text": null}\n', PTQError, "a.jsonl: the text is empty"),
        ("a.jsonl", b'{"text": "x"}\n["x"]\n', PTQError, "a.jsonl, line 2: not a JSON object"),
        ("a.json", b'[{"text": "x"},\n"x"]\n', PTQError, "a.json, row 2: not a JSON object"),
        ("a.json", b'\n[\n{"text": "x"},\n{"text" "y"}]\n', PTQError, "a.json: not valid JSON (Expecting ':' delimiter, line 4, column 9)"),
        ("a.json", b'[{"text": "x"},\n{"text": true}]\n', PTQError, "a.json, row 2: no text in column 'text' but bool"),
        ("a.json", b"[]", PTQError, "a.json: the text is empty"),
        ("a.json", b'[{"text": "\xe9"}]', PTQError, "a.json: not UTF-8 (0xe9 at byte 11)"),
        (
            "a.jsonl",
            b'{"id": "x", "messages": [{"role": "user", "content": "y"}]}',
            PTQError,
            "column 'messages' holds chats, which are written out by a tokenizer",
        ),
        ("a.jsonl", b'{"a": "x", "b": "y", "n": 1}\n', PTQError, "(columns: a, b, n); name it 'text'"),
        ("a.jsonl", b'{"n": 1}\n', PTQError, "(columns: n); name it 'text'"),
        ("a.jsonl.gz", b"no gzip", PTQError, "a.jsonl.gz cannot be read ("),
        ("a.parquet", b"no parquet, but long enough to look for a footer", PTQError, "a.parquet cannot be read ("),
        ("a.parquet", b"", PTQError, "a.parquet cannot be read ("),
        ("a.arrow", b"no arrow", PTQError, "a.arrow cannot be read ("),
        ("a.csv", b"", PTQError, "a.csv cannot be read (No columns to parse from file); correct it, or"),
        ("a.csv", b"text\n", PTQError, "a.csv: the text is empty"),
        ("a.csv", b"text\nx\n\xff\n", PTQError, "a.csv: not UTF-8 (0xff); convert it to UTF-8"),
        (
            "a.csv",
            b"text\nx\ny, z\n",
            PTQError,
            "a.csv cannot be read (Error tokenizing data. C error: Expected 1 fields in line 3",
        ),
        ("a.csv", b"text\nx, y\n", PTQError, "a.csv: rows have more cells than there are column names; put texts with commas into"),
        ("a.csv", b"a,b\nx,y\n", PTQError, "a.csv: which column holds the text is not clear (columns: a, b)"),
        ("a.csv.gz", gzip.compress(b"text\n" + b"x\n" * 100, mtime=0)[:-12], PTQError, "a.csv.gz cannot be read ("),
        ("a.txt.xz", lzma.compress(b"x" * 100)[:-12], PTQError, "a.txt.xz cannot be read ("),
        ("a.txt.xz", lzma.compress(b"x" * 100)[:6] + bytes(50), PTQError, "a.txt.xz cannot be read ("),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 50, PTQError, "a.jsonl.gz cannot be read ("),
        ("a.jsonl.zst", b"no zstd", PTQError, "a.jsonl.zst cannot be read ("),
        ("a.rst", b"x", UsageError, "a.rst is of a kind that is not read; give one of .txt .md "),
        ("a::b.csv", b"x", UsageError, "a::b.csv cannot be opened, as datasets takes '::' for a file inside another one; rename it"),
        ("a.csv.zst", b"x", UsageError, "a.csv.zst is of a kind that is not read; give one of .txt "),
        ("a.parquet.gz", b"x", UsageError, "a.parquet.gz is of a kind that is not read; give one of .txt "),
    ],
)
def test_a_file_that_does_not_work(tmp_path: Path, name: str, content: bytes, error: type[PTQError], message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in fails(error, tmp_path / name)


def test_truncated_files(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "a.parquet", ROWS).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-20])
    assert "a.parquet cannot be read (" in fails(PTQError, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 100, mtime=0)[:-12])
    assert "a.jsonl.gz cannot be read (" in fails(PTQError, tmp_path / "a.jsonl.gz")


def test_a_parquet_row_without_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["x", None, "y"])
    assert documents(str(path), "evaluation") == ["x", "y"]


def test_a_parquet_file_without_a_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["x"], "b": ["y"], "n": [1]}), tmp_path / "a.parquet")
    assert "(columns: a, b, n); name it 'text'" in fails(PTQError, tmp_path / "a.parquet")


@pytest.mark.slow
def test_nothing_is_written_and_nobody_is_asked_for_a_local_file(tmp_path: Path) -> None:
    """In a process of its own, whose home is empty and which may not connect to anything. The built-in text does without datasets."""
    data = tmp_path / "data"
    table = pa.table({"text": TRICKY})
    data.mkdir()
    (data / "a.txt").write_text("x")
    (data / "a.csv.gz").write_bytes(gzip.compress(b"text\nx\n", mtime=0))
    write_jsonl(data / "a.jsonl", [{"text": "x"}])
    pq.write_table(table, data / "a.parquet")
    with pa.ipc.new_stream(str(data / "a.arrow"), table.schema) as stream:
        stream.write_table(table)
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    code = (
        "import socket, sys\n"
        "from pathlib import Path\n"
        "def refuse(self, address): raise SystemExit(f'connects to {address}')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "from ptqcli.calibration.text import documents\n"
        "documents('builtin', 'calibration')\n"
        "assert 'datasets' not in sys.modules\n"
        "for path in Path(sys.argv[1]).iterdir(): print(len(documents(str(path), 'evaluation')))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", code, str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["1", "1", "1", "10", "10"]
    assert done.stderr == ""
    assert [*home.iterdir(), *temporary.iterdir()] == []


@pytest.mark.usefixtures("unclosed")
def test_datasets_is_quiet_while_it_reads_and_as_before_after(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    # What the environment of the test run says does not count.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(datasets.utils.tqdm, "HF_DATASETS_DISABLE_PROGRESS_BARS", None, raising=False)
    datasets.enable_progress_bars()
    # From 17 files on, the library shows a bar.
    datasets.Dataset.from_dict({"text": TRICKY * 2}).save_to_disk(str(tmp_path / "saved"), num_shards=17)
    (tmp_path / "a.csv").write_bytes(b"text\n\xff\n")
    verbosity = datasets.utils.logging.get_verbosity()
    capfd.readouterr()
    assert documents(str(tmp_path / "saved"), "evaluation") == TRICKY * 2
    fails(PTQError, tmp_path / "a.csv")
    assert capfd.readouterr() == ("", "")
    assert datasets.utils.logging.get_verbosity() == verbosity < logging.CRITICAL
    assert not datasets.are_progress_bars_disabled()


# Folders


def test_a_folder_of_files_is_read_by_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", [{"text": "two"}])
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    (tmp_path / "README.md").write_text("not text to read")
    assert documents(str(tmp_path), "calibration") == ["one", "two"]


def test_a_folder_of_csv_and_one_with_files_that_describe_the_others(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text\none\n")
    (tmp_path / "test.csv").write_text("text\ntwo\n")
    assert documents(str(tmp_path), "calibration") == ["one"]
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert "has text files of several kinds" in fails(UsageError, tmp_path)
    (tmp_path / "a.txt").write_text("mine")
    assert documents(str(tmp_path), "calibration") == ["mine"]


@pytest.mark.parametrize(("part", "expected"), [("calibration", ["a", "b"]), ("evaluation", ["c"])])
def test_a_folder_with_splits_in_the_file_names(tmp_path: Path, part: builtin.Part, expected: list[str]) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", ["a"])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", ["b"])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", ["c"])
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", ["d"])
    assert documents(str(tmp_path), part) == expected


def test_a_split_counts_only_if_every_file_names_one(tmp_path: Path) -> None:
    write_parquet(tmp_path / "unit-test.parquet", ["a"])
    write_parquet(tmp_path / "chapter.parquet", ["b"])
    assert documents(str(tmp_path), "evaluation") == ["b", "a"]


def test_a_folder_that_does_not_work(tmp_path: Path) -> None:
    (tmp_path / "notes.rst").write_text("x")
    assert f"folder {tmp_path} has no text" in fails(UsageError, tmp_path)
    (tmp_path / "a.txt").write_text("x")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}])
    assert "has text files of several kinds (a.txt, ...); name one file" in fails(UsageError, tmp_path)


def test_saved_datasets(tmp_path: Path) -> None:
    import datasets

    train = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "n": [1, 2, 3]}).select([2, 0])
    validation = datasets.Dataset.from_dict({"text": ["d"]})
    train.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict(train=train, validation=validation).save_to_disk(str(tmp_path / "splits"))
    assert documents(str(tmp_path / "single"), "evaluation") == ["c", "a"]
    assert documents(str(tmp_path / "splits"), "calibration") == ["c", "a"]
    assert documents(str(tmp_path / "splits"), "evaluation") == ["d"]


def test_saved_datasets_that_do_not_work(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": [" "]})
    data.save_to_disk(str(tmp_path / "empty"))
    datasets.DatasetDict(one=data, two=data).save_to_disk(str(tmp_path / "splits"))
    assert "the text is empty" in fails(PTQError, tmp_path / "empty")
    assert "has the splits one, two, none for evaluation" in fails(UsageError, tmp_path / "splits")
    (tmp_path / "empty/state.json").write_text("{")
    assert f"{tmp_path / 'empty' / 'state.json'}: is not valid JSON (" in fails(PTQError, tmp_path / "empty")


# Names


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    known = "give builtin, wikitext2, c4, pile, or the path of a file or folder"
    assert fails(UsageError, "wikitex2") == f"no text is called 'wikitex2'; {known}; did you mean 'wikitext2'?"
    assert fails(UsageError, "zzz") == f"no text is called 'zzz'; {known}"
    assert fails(UsageError, tmp_path / "a.txt") == f"text {tmp_path / 'a.txt'} does not exist; {known}"


def test_builtin_is_the_built_in_corpus() -> None:
    assert documents("builtin", "evaluation") == builtin.documents("evaluation")


def test_a_name_wins_over_a_folder_of_that_name(no_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4/a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert "text of c4 is not in the Hugging Face cache" in fails(PTQError, "c4")
    assert documents("./c4", "evaluation") == ["mine"]


@pytest.mark.parametrize("name", ["wiki.test.raw", "wikitext-2-raw/wiki.test.raw"])
def test_wikitext_from_a_raw_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(RAW, encoding="utf-8")
    assert documents("wikitext2", "evaluation", tmp_path) == [JOINED]


@pytest.mark.parametrize("name", ["wikitext-2-raw-v1/test-00000-of-00001.parquet", "test.parquet"])
def test_wikitext_from_parquet(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / name, ROWS)
    assert documents("wikitext2", "evaluation", tmp_path) == [JOINED]


def test_wikitext_never_calibrates_on_the_test_split(no_hub: Path, tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(RAW, encoding="utf-8")
    message = fails(PTQError, "wikitext2", "calibration", tmp_path)
    assert f"the calibration text of wikitext2 is not in {tmp_path} (which has only its evaluation text)" in message
    (tmp_path / "wiki.train.raw").write_text(" train \n")
    assert documents("wikitext2", "calibration", tmp_path) == [" train \n"]


def test_c4_reads_documents_from_the_front(tmp_path: Path) -> None:
    rows = [{"text": f"document {number}", "url": "u"} for number in range(1200)]
    shard = tmp_path / "en/c4-validation.00000-of-00008.json.gz"
    shard.parent.mkdir()
    shard.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert documents("c4", "evaluation", tmp_path) == [row["text"] for row in rows[:1100]]
    write_jsonl(tmp_path / "c4-train.00000-of-01024.jsonl", rows[:3])
    assert len(documents("c4", "calibration", tmp_path)) == 3


def test_pile_is_for_calibration_only(tmp_path: Path) -> None:
    (tmp_path / "val.jsonl.zst").write_bytes(pa.compress(b'{"text": "x", "meta": {}}\n', codec="zstd", asbytes=True))
    assert documents("pile", "calibration", tmp_path) == ["x"]
    message = fails(UsageError, "pile", "evaluation", tmp_path)
    assert message == "pile has no evaluation text; use builtin, wikitext2, c4 or a path"


def test_a_data_folder_that_does_not_exist(tmp_path: Path) -> None:
    message = fails(UsageError, "wikitext2", "evaluation", tmp_path / "none")
    assert message == f"data folder {tmp_path / 'none'} does not exist; correct --data-dir or PTQ_DATA_DIR"


def test_wikitext_from_the_cache_of_the_hub(no_hub: Path) -> None:
    repo, commit = no_hub / "hub/datasets--Salesforce--wikitext", "0" * 40
    write_parquet(repo / "snapshots" / commit / "wikitext-2-raw-v1/test-00000-of-00001.parquet", ROWS)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    assert documents("wikitext2", "evaluation") == [JOINED]


def test_wikitext_from_the_cache_of_the_datasets_library(no_hub: Path) -> None:
    folder = no_hub / "datasets/Salesforce___wikitext/wikitext-2-raw-v1/0.0.0/abc"
    folder.mkdir(parents=True)
    table = pa.table({"text": ROWS})
    with pa.ipc.new_stream(str(folder / "wikitext-test.arrow"), table.schema) as stream:
        stream.write_table(table)
    assert documents("wikitext2", "evaluation") == [JOINED]


def test_what_is_missing_offline_says_how_to_get_it(no_hub: Path) -> None:
    assert fails(PTQError, "wikitext2") == (
        "the evaluation text of wikitext2 is not in the Hugging Face cache, and the hub did not give it (HF_HUB_OFFLINE is set); "
        "put wiki.test.raw into a folder and name that by --data-dir or PTQ_DATA_DIR, "
        "or run: hf download Salesforce/wikitext wikitext-2-raw-v1/test-00000-of-00001.parquet --repo-type dataset"
    )
    assert "en/c4-train.00000-of-01024.json.gz" in fails(PTQError, "c4", "calibration")
    assert "mit-han-lab/pile-val-backup val.jsonl.zst" in fails(PTQError, "pile", "calibration")


@pytest.mark.slow
def test_without_a_network_the_error_comes_soon(tmp_path: Path) -> None:
    """Without asking again and again. In a process of its own, because the hub client reads its address once."""
    code = "from ptqcli.calibration.text import documents; documents('c4', 'evaluation')"
    # Nothing listens on port 9 of this machine.
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=500)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ptqcli.errors.PTQError: the evaluation text of c4 is not in the Hugging Face cache, and the hub did not")
    assert "Retrying" not in done.stderr


def test_every_known_corpus_has_one_way_to_get_it() -> None:
    for parts in corpora.CORPORA.values():
        for file in parts.values():
            assert Path(file.local[0]).name == file.local[0]
            assert file.file.endswith((".parquet", ".json.gz", ".jsonl.zst"))


@pytest.mark.skipif(not (WIKITEXT / "wiki.test.raw").is_file(), reason="no WikiText-2 test split in ../shared/data")
def test_the_real_wikitext_test_split() -> None:
    [joined] = documents("wikitext2", "evaluation", WIKITEXT)
    lines = (WIKITEXT / "wiki.test.raw").read_text(encoding="utf-8").split("\n")[:-1]
    assert joined == "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)
    assert len(joined.split()) == 241_211


# Calibration windows


def test_windows_come_from_the_text_without_overlap(tokenizer: PreTrainedTokenizerFast) -> None:
    docs = [words(100 * number, 100 * number + 37 + number) for number in range(60)]
    windows = calibration_windows(docs, tokenizer, nsamples=20, seqlen=16, seed=1)
    assert windows.dtype == torch.int64
    assert windows.shape == (20, 16)
    tokens = windows[windows != 10_000].tolist()
    assert len(set(tokens)) == len(tokens)
    for row in windows.tolist():
        for this, following in pairwise(row):
            # A document goes on, ends, or begins after an end.
            ends = following == 10_000 and this == this // 100 * 100 + 36 + this // 100
            assert following == this + 1 or ends or (this == 10_000 and following % 100 == 0)


def test_windows_depend_on_the_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    docs = [words(100 * number, 100 * number + 90) for number in range(60)]
    first, again, other = (calibration_windows(docs, tokenizer, 8, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_all_windows_of_the_text_can_be_had(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = calibration_windows([words(0, 63)], tokenizer, nsamples=8, seqlen=8, seed=3)
    # 63 words and the end of the text.
    assert sorted(windows.flatten().tolist()) == [*range(63), 10_000]


def test_windows_without_an_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    windows = calibration_windows([words(0, 8), " \n", words(8, 16)], bare, nsamples=2, seqlen=8, seed=0)
    assert sorted(windows.flatten().tolist()) == list(range(16))


def test_too_little_text_for_the_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError) as caught:
        calibration_windows([words(0, 20), words(20, 29)], tokenizer, nsamples=4, seqlen=10, seed=0)
    assert str(caught.value) == (
        "the calibration text has 31 tokens, enough for 3 windows of 10, and 4 are asked for; "
        "lower that number or --seqlen, or give more text"
    )
    with pytest.raises(UsageError, match="0 windows of 10 tokens cannot be cut"):
        calibration_windows(["w1"], tokenizer, nsamples=0, seqlen=10, seed=0)


@pytest.mark.parametrize("documents_in_text", [1, 500])
def test_a_large_text_is_not_tokenized_whole(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, documents_in_text: int
) -> None:
    characters = 0
    encode = PreTrainedTokenizerFast.__call__

    def counting(self: PreTrainedTokenizerFast, batch: list[str], **options: object) -> object:
        nonlocal characters
        characters += sum(map(len, batch))
        return encode(self, batch, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    docs = ["\n".join([words(0, 100)] * (20_000 // documents_in_text))] * documents_in_text
    windows = calibration_windows(docs, tokenizer, nsamples=2, seqlen=64, seed=0)
    assert windows.shape == (2, 64)
    assert 0 < characters <= text.PIECES_PER_CALL * text.PIECE_CHARACTERS < sum(map(len, docs)) / 2


def test_a_long_document_is_cut_after_lines_and_loses_nothing() -> None:
    line = "x" * 999 + "\n"
    pieces = list(text._pieces(line * 200))
    assert "".join(pieces) == line * 200
    assert all(piece.endswith("\n") and len(piece) <= text.PIECE_CHARACTERS for piece in pieces)
    assert [len(piece) for piece in text._pieces("x" * 70_000)] == [65_536, 70_000 - 65_536]


# Evaluation ids


def test_evaluation_joins_documents_with_blank_lines_and_leaves_special_tokens_to_the_windows(tmp_path: Path) -> None:
    letters = {letter: number for number, letter in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    byte_level = Tokenizer(models.BPE(vocab=letters, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bytes_to_ids = PreTrainedTokenizerFast(tokenizer_object=byte_level, bos_token="<s>")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "c"}])
    ids = evaluation_ids(str(path), bytes_to_ids)
    assert ids.dtype == torch.int64
    assert bytes_to_ids.convert_ids_to_tokens(ids.tolist()) == ["a", "b", "Ċ", "Ċ", "c"]


def test_a_text_longer_than_the_model_brings_no_warning(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "model_max_length", 8)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    (tmp_path / "a.txt").write_text(words(0, 100))
    assert evaluation_ids(str(tmp_path / "a.txt"), tokenizer).tolist() == list(range(100))
    assert not caplog.records
    tokenizer(words(0, 100))
    assert "longer than the specified maximum" in caplog.text


def test_no_token_of_a_tokenizer_is_assumed() -> None:
    """Short texts fill a window together, with the end-of-text token behind each where the tokenizer has one."""
    with_end, bare = byte_tokenizer(), byte_tokenizer()
    bare.eos_token = bare.bos_token = bare.pad_token = None
    texts = ["ab", "ab", "ab", "ab"]
    a, b = bare("ab", add_special_tokens=False)["input_ids"]
    assert calibration_windows(texts, bare, 1, 8, 0).tolist() == [[a, b] * 4]
    assert calibration_windows(texts, with_end, 1, 12, 0).tolist() == [[a, b, with_end.eos_token_id] * 4]
