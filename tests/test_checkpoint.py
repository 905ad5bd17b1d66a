"""Checkpoint folders: against the safetensors library in both directions, damaged files, and memory that stays flat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from ptqcli.checkpoint import writer as writer_module
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import INDEX_FILE, SINGLE_FILE, MemoryTensors, SafetensorsFolder
from ptqcli.checkpoint.writer import JOIN_BELOW, CheckpointWriter, safetensors_pieces, write_json
from ptqcli.errors import PTQError

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def sample_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t.{dtype}": torch.randn(3, 5, generator=generator).mul(3).to(dtype) for dtype in DTYPES}
    tensors["scalar"] = torch.tensor(7.0)
    tensors["empty"] = torch.empty(0, 4)
    tensors["strided"] = torch.randn(5, 128, generator=generator)[:1, 3]
    tensors["transposed"] = torch.randn(4, 6, generator=generator).T
    return tensors


def opened(folder: Path) -> Directory:
    folder.mkdir()
    return Directory(folder)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert tensor.shape == right[name].shape
        a, b = (t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for t in (tensor, right[name]))
        assert torch.equal(a, b), name


def read_all(folder: Path) -> dict[str, Tensor]:
    reader = SafetensorsFolder(folder)
    return {name: reader.read(name) for name in reader.names}


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """Of every dtype, with names that JSON has to escape."""
    tensors = {f'{name}.é"\\\x01': tensor.contiguous() for name, tensor in sample_tensors().items()}
    tensors |= {f"u.{dtype}": torch.ones(3, dtype=dtype) for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2)}
    assert b"".join(bytes(piece) for piece in safetensors_pieces(tensors)) == save(tensors, metadata={"format": "pt"})


def test_reads_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in sample_tensors().items()}
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    assert_same(tensors, read_all(tmp_path))
    reader = SafetensorsFolder(tmp_path)
    assert reader.names == tuple(sorted(tensors))
    assert reader.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    name = "t.torch.bfloat16"
    assert (reader.dtype(name), reader.shape(name), reader.nbytes(name)) == (torch.bfloat16, (3, 5), 30)


def test_the_safetensors_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = sample_tensors()
    writer = CheckpointWriter(Directory(tmp_path))
    names = sorted(tensors)
    writer.write({name: tensors[name] for name in names[:5]})
    writer.write({name: tensors[name] for name in names[5:]})
    assert writer.finish() == [tmp_path / SINGLE_FILE]
    assert_same(tensors, load_file(tmp_path / SINGLE_FILE))
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]


def test_tensors_of_a_model_in_memory(tmp_path: Path) -> None:
    """A model in memory and the same one on disk are alike, and a tensor that was read is nobody else's."""
    tensors = {**sample_tensors(), "parameter": torch.nn.Parameter(torch.ones(2, 3).T)}
    CheckpointWriter(Directory(tmp_path)).write(tensors)
    os.rename(tmp_path / "shard-00001.safetensors", tmp_path / SINGLE_FILE)
    memory, disk = MemoryTensors(tensors), SafetensorsFolder(tmp_path)
    assert (memory.names, memory.total_bytes) == (disk.names, disk.total_bytes)
    for name in memory.names:
        told = [(source.shape(name), source.dtype(name), source.nbytes(name)) for source in (memory, disk)]
        assert told[0] == told[1]
        read = memory.read(name)
        assert read.is_contiguous()
        assert not read.requires_grad
    assert_same({name: memory.read(name) for name in memory.names}, {name: disk.read(name) for name in disk.names})
    memory.read("parameter").zero_()
    assert tensors["parameter"].sum() == 6
    with pytest.raises(PTQError, match=r"holds no tensor b\.weight"):
        memory.shape("b.weight")


def test_the_same_parts_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = sample_tensors()
    for folder, backwards in (("one", False), ("two", True)):
        writer = CheckpointWriter(opened(tmp_path / folder), max_shard_bytes=150)
        names = sorted(tensors, reverse=backwards)
        writer.write({name: tensors[name] for name in names if "int" in name})
        writer.write({name: tensors[name] for name in names if "int" not in name})
        writer.finish()
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert len(one) > 3
    assert_same(tensors, read_all(tmp_path / "one"))


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "again": whole, "row": whole[1], "turned": whole.T, "parameter": torch.nn.Parameter(whole[2:])}
    writer = CheckpointWriter(Directory(tmp_path))
    writer.write(tensors)
    writer.finish()
    assert_same({name: tensor.detach() for name, tensor in tensors.items()}, load_file(tmp_path / SINGLE_FILE))


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((10,), float(i)) for i in range(7)}
    writer = CheckpointWriter(Directory(tmp_path), max_shard_bytes=100)  # 40 bytes each: two a file
    assert len(writer.write(tensors)) == 4
    paths = writer.finish()
    assert [path.name for path in paths] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([INDEX_FILE, *(path.name for path in paths)])
    index = json.loads((tmp_path / INDEX_FILE).read_bytes())
    assert index["metadata"] == {"total_size": 280}
    joined = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert_same(tensors, joined)
    assert_same(tensors, read_all(tmp_path))


class Disk:
    """Watches a folder: the most that its files took together, asked whenever a file is forced to disk, renamed or removed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.peak, self.inodes = folder, 0, set()
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "unlink")):
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def look(*arguments: Any, **named: Any) -> Any:
            files = [path.stat() for path in self.folder.iterdir() if ".safetensors" in path.name and "index" not in path.name]
            self.peak = max(self.peak, sum(file.st_size for file in files))
            self.inodes |= {file.st_ino for file in files}
            return call(*arguments, **named)

        return look


def test_a_shard_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve shards of 8 MB, too much for one file: no more room is needed than they take, and no file is made but theirs."""
    disk = Disk(tmp_path, monkeypatch)
    writer = CheckpointWriter(Directory(tmp_path))
    for number in range(12):
        writer.write({f"t.{number}": torch.full((2 << 20,), float(number))})
    paths = writer.finish()
    assert disk.peak == sum(path.stat().st_size for path in paths) > JOIN_BELOW
    assert disk.inodes == {path.stat().st_ino for path in paths}
    assert len(paths) == 12


def test_a_small_checkpoint_becomes_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, monkeypatch)
    writer = CheckpointWriter(Directory(tmp_path))
    for number in range(3):
        writer.write({f"t.{number}": torch.full((1 << 18,), float(number))})
    (path,) = writer.finish()
    assert [path] == [tmp_path / SINGLE_FILE] == list(tmp_path.iterdir())
    assert disk.peak == pytest.approx(2 * path.stat().st_size, rel=0.01)
    assert [float(load_file(path)[f"t.{number}"][-1]) for number in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(("join_below", "count"), [(24, 3), (25, 1)])
def test_where_joining_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, join_below: int, count: int) -> None:
    monkeypatch.setattr(writer_module, "JOIN_BELOW", join_below)
    writer = CheckpointWriter(Directory(tmp_path))
    for name in "abc":
        writer.write({name: torch.zeros(2)})
    assert len(writer.finish()) == count


def test_one_large_shard_is_renamed_and_needs_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "JOIN_BELOW", 0)
    writer = CheckpointWriter(Directory(tmp_path))
    writer.write({"a": torch.zeros(5)})
    assert writer.finish() == [tmp_path / SINGLE_FILE] == list(tmp_path.iterdir())


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    writer = CheckpointWriter(Directory(tmp_path), max_shard_bytes=10)
    writer.write({"a": torch.zeros(100), "b": torch.zeros(1)})
    assert len(writer.finish()) == 2


def test_a_name_written_twice_is_refused(tmp_path: Path) -> None:
    writer = CheckpointWriter(Directory(tmp_path))
    writer.write({"a": torch.zeros(1)})
    with pytest.raises(PTQError, match="tensor a was written twice"):
        writer.write({"a": torch.zeros(1)})


def test_a_folder_that_holds_weights_is_refused(tmp_path: Path) -> None:
    CheckpointWriter(Directory(tmp_path)).write({"a": torch.zeros(1)})
    with pytest.raises(PTQError, match=r"already holds shard-00001\.safetensors"):
        CheckpointWriter(Directory(tmp_path))


def test_a_dtype_without_a_name_is_refused_before_a_file_appears(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match="complex64"):
        CheckpointWriter(Directory(tmp_path)).write({"c": torch.zeros(1, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_nothing_passes_for_a_checkpoint_before_finish(tmp_path: Path) -> None:
    CheckpointWriter(Directory(tmp_path)).write({"a": torch.zeros(1)})
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(PTQError, match=f"neither {SINGLE_FILE}"):
        SafetensorsFolder(tmp_path)


def test_write_json_replaces_nothing(tmp_path: Path) -> None:
    path, folder = tmp_path / "config.json", Directory(tmp_path)
    with pytest.raises(TypeError):
        write_json(folder, path.name, {"b": object()})
    write_json(folder, path.name, {"b": 1, "a": ["ü"]})
    with pytest.raises(FileExistsError, match=r"config\.json"):
        write_json(folder, path.name, {})
    folder.remove("config.json.tmp")
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": 1, "a": ["ü"]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match="nowhere is not a folder"):
        SafetensorsFolder(tmp_path / "nowhere")
    with pytest.raises(PTQError, match=f"neither {SINGLE_FILE} nor {INDEX_FILE}"):
        SafetensorsFolder(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(PTQError, match=r"pytorch_model\.bin.*never opened; convert"):
        SafetensorsFolder(tmp_path)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / SINGLE_FILE)
    with pytest.raises(PTQError, match=r"holds no tensor b\.weight"):
        SafetensorsFolder(tmp_path).read("b.weight")


def with_header(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(begin: int, end: int, dtype: str = "F32", shape: object = (2,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "empty": (b"", "header too small"),
    "short": (b"\x01\x02", "header too small"),
    "header longer than the file": ((1000).to_bytes(8, "little") + b"{}", "invalid header length"),
    "random": (bytes(range(200, 256)) * 4, "header too large"),
    "not json": (with_header(b"{]", b""), "invalid JSON"),
    "not utf-8": (with_header(b"\xff\xfe\xfa", b""), "invalid UTF-8"),
    "a list": (with_header([], b""), "invalid JSON"),
    "truncated body": (with_header({"a": entry(0, 8)}, b"1234567"), "not fully covered"),
    "long body": (with_header({"a": entry(0, 8)}, b"123456789"), "not fully covered"),
    "a hole": (with_header({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "invalid offset for tensor `b`"),
    "an overlap": (with_header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "invalid offset for tensor `b`"),
    "wrong length": (with_header({"a": entry(0, 12)}, bytes(12)), "invalid shape, data type, or offset"),
    "negative": (with_header({"a": entry(0, 8, shape=(-2,))}, bytes(8)), "invalid JSON.*`-2`"),
    "no shape": (with_header({"a": {"dtype": "F32"}}, b""), "missing field `shape`"),
    "a number": (with_header({"a": 3}, b""), "invalid JSON"),
    "unknown dtype": (with_header({"a": entry(0, 1, "F4", [2])}, b"1"), "dtype F4"),
    "dtype of a wrong type": (with_header({"a": {**entry(0, 8), "dtype": []}}, bytes(8)), "invalid JSON"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, kind: str) -> None:
    content, message = DAMAGED[kind]
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(PTQError, match=message) as caught:
        SafetensorsFolder(tmp_path)
    assert str(tmp_path / SINGLE_FILE) in str(caught.value)
    assert kind == "unknown dtype" or "is truncated or no safetensors file; download or write it again" in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_INDEXES = {
    "not json": (b"{", "is not valid JSON"),
    "no map": (b"{}", "is not a safetensors index"),
    "a list": (b'{"weight_map": []}', "is not a safetensors index"),
    "not a name": (b'{"weight_map": {"a": 3}}', "is not a safetensors index"),
    "a missing file": (b'{"weight_map": {"a": "gone.safetensors"}}', r"'gone\.safetensors', which is missing"),
    "another folder": (b'{"weight_map": {"a": "../x.safetensors"}}', "not a file name in the same folder"),
    "a missing tensor": (b'{"weight_map": {"z": "here.safetensors"}}', "tensor z in here.safetensors"),
}


@pytest.mark.parametrize("kind", BAD_INDEXES)
def test_a_bad_index_is_named(tmp_path: Path, kind: str) -> None:
    content, message = BAD_INDEXES[kind]
    (tmp_path / INDEX_FILE).write_bytes(content)
    save_file({"a": torch.zeros(1)}, tmp_path / "here.safetensors")
    with pytest.raises(PTQError, match=message) as caught:
        SafetensorsFolder(tmp_path)
    assert str(tmp_path / INDEX_FILE) in str(caught.value)


def test_a_file_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / SINGLE_FILE)
    reader = SafetensorsFolder(tmp_path)
    content = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(content[:-8])
    with pytest.raises(PTQError, match="tensor a cannot be read any more; has the file changed"):
        reader.read("a")


MEMORY_PROBE = """
import sys, psutil, torch
import os
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.checkpoint.writer import CheckpointWriter
folder, count = sys.argv[1], int(sys.argv[2])
os.mkdir(folder)
resident = psutil.Process().memory_info
before = peak = resident().rss
writer = CheckpointWriter(Directory(folder))
for i in range(count):
    writer.write({f"t.{i}": torch.full((2 << 20,), float(i))})
    peak = max(peak, resident().rss)
writer.finish()
peak = max(peak, resident().rss)
reader = SafetensorsFolder(folder)
for i in range(count):
    assert reader.read(f"t.{i}")[-1] == i
    peak = max(peak, resident().rss)
print((peak - before) >> 20)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Twelve tensors of 8 MB written and read take no more than two of them."""
    # glibc keeps freed blocks below a threshold that it raises as it goes; held fixed, resident memory shows what lives.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}

    def growth(count: int) -> int:
        command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path / str(count)), str(count)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return int(run.stdout)

    few, many = growth(2), growth(12)
    assert many < few + 8, (few, many)
