"""JSON that is valid only to a parser, and counts that are believed before they are compared: one line that names the file, at once.

Row 35. Deep nesting, numbers of thousands of digits, half surrogate pairs, values of another type, 100,000 layers, a million tensors. Each
file is tried with each kind of value, since what reads it differs: this program, transformers, or the Rust code of tokenizers.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from commandline import Ptq, one_line
from packed import everything, llama, random_model, write_checkpoint
from tiny import byte_tokenizer, make_model

from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError
from ptqcli.model.config import build_on_meta, load_config, read_generation_config
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.report import read_report
from ptqcli.runtime.models import load_tokenizer
from ptqcli.untrusted import read_json


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, random_model(llama(layers=1)), everything(Scheme.parse("w4a16-g32")))
    byte_tokenizer().save_pretrained(folder)
    report = {
        "source": None,
        "ptqcli": "1",
        "recipe": {"algo": "rtn"},
        "layers": [],
        "bytes_before": 10,
        "folds": [],
        "error_kind": "weight",
    }
    (folder / "ptq_report.json").write_text(json.dumps(report))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


# As text, since no encoder of JSON would write most of them.
WHOLE = {
    "not json": "{",
    "nested": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "brackets": "[" * 100_000,
    "a list": "[1]",
    "a number": "3",
    "digits": '{"a": ' + "9" * 5_000 + "}",
    "not utf-8": "\udcff",
}
READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": load_config,
    "generation_config.json": read_generation_config,
    "ptq_report.json": read_report,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
    "model.safetensors.index.json": SafetensorsFolder,
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("file", READERS)
def test_a_file_that_is_no_object(copy: Path, file: str, kind: str) -> None:
    if file == "model.safetensors.index.json":
        (copy / "model.safetensors").unlink()
    (copy / file).write_bytes(WHOLE[kind].encode("utf-8", "surrogateescape"))
    with pytest.raises(PTQError) as caught:
        READERS[file](copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000


VALUES = [
    "[" * 90 + "]" * 90, "9" * 4_000, '"\\ud800"', "NaN", "-1", "1e999", "null", "[]", '{"a": 1}', '"x"', "true", "[[1]]", "3.5",
]  # fmt: skip
KEYS = [
    ("config.json", "model_type"), ("config.json", "architectures"), ("config.json", "hidden_size"), ("config.json", "num_hidden_layers"),
    ("config.json", "max_position_embeddings"), ("config.json", "dtype"), ("config.json", "rope_parameters"),
    ("config.json", "quantization_config"), ("ptq_report.json", "layers"), ("ptq_report.json", "folds"), ("ptq_report.json", "recipe"),
    ("ptq_report.json", "bytes_before"), ("ptq_report.json", "source"), ("ptq_report.json", "error_kind"),
]  # fmt: skip


def refusal(folder: Path) -> str:
    """What is said of the report in ``folder``, "" if it is read."""
    try:
        read_report(folder)
    except PTQError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("file", "key"), KEYS)
def test_a_value_of_another_type_does_not_break_inspect(ptq: Ptq, copy: Path, file: str, key: str) -> None:
    whole = json.loads((copy / file).read_text())
    for value in VALUES:
        (copy / file).write_text(json.dumps({**whole, key: "@"}).replace('"@"', value))
        if file == "ptq_report.json" and (said := refusal(copy)):  # what is refused needs no whole command
            assert str(copy / file) in said
            continue
        answer = ptq("inspect", copy)
        assert answer.code in (0, 1, 2), answer
        if answer.code:
            assert str(copy) in one_line(answer) or "quantization_config" in one_line(answer), (value, answer)


@pytest.mark.parametrize("key", ["eos_token_id", "suppress_tokens", "temperature", "top_k", "max_length", "num_beams", "do_sample"])
@pytest.mark.parametrize("value", ['"x"', "{}", '[["x"]]', "[" * 70 + "]" * 70, '"\\ud800"'])
def test_a_value_of_another_type_in_generation_config(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"{key}": {value}}}')
    with pytest.raises(PTQError, match=r"generation_config\.json"):
        read_generation_config(tmp_path)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", {"model": 3}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}),
        ("tokenizer.json", {"added_tokens": [{"id": 2**40, "content": "x"}]}),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
        ("tokenizer_config.json", {"eos_token": [1]}),
        ("tokenizer_config.json", {"auto_map": 3}),
    ],
)
def test_a_broken_tokenizer(copy: Path, file: str, change: dict[str, Any]) -> None:
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **change}))
    with pytest.raises(PTQError, match="cannot load a tokenizer") as caught:
        load_tokenizer(copy)
    assert str(copy) in str(caught.value)


# Counts


def test_layers_that_no_file_holds(copy: Path, tmp_path: Path, ptq: Ptq) -> None:
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 100_000}))
    assert "asks for more than 1000 modules, far more than the tensors of the file can fill" in one_line(ptq("inspect", copy))
    make_model(tmp_path / "plain", num_hidden_layers=1)
    values = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 100_000, "layer_types": None}))
    with pytest.raises(PTQError, match="asks for more than 1000 modules"):
        Skeleton(ModelFolder(tmp_path / "plain"))


@pytest.mark.parametrize(("architecture", "key"), [("GPTNeoConfig", "max_position_embeddings"), ("GPTJConfig", "n_positions")])
def test_positions_whose_tables_fill_the_memory(architecture: str, key: str) -> None:
    sizes = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
    smaller = {"n_embd": 64, "n_layer": 1, "n_head": 2, "rotary_dim": 16}
    config = getattr(transformers, architecture)(**(sizes if architecture == "GPTNeoConfig" else smaller), **{key: 500})
    build_on_meta(config, 20)
    setattr(config, key, 10**8)
    with pytest.raises(PTQError, match=r"asks for constants of [0-9]+ MiB, as no model has"):
        build_on_meta(config, 20)


def test_many_layers_that_a_file_does_hold(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    config.num_hidden_layers = 100
    assert len(list(build_on_meta(config, 100 * 12).modules())) > 1_000


def test_a_million_tensors(tmp_path: Path) -> None:
    entry = b'"model.layers.%07d.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    header = b"{" + b"".join(entry % number for number in range(1_000_000))[:-1] + b"}"
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(PTQError, match=r"model\.safetensors: the headers of the checkpoint have more than 48 MiB"):
        SafetensorsFolder(tmp_path)


def test_a_name_that_is_a_book(tmp_path: Path) -> None:
    header = json.dumps({"x" * 100_000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(PTQError, match=r"has a name of 100000 characters"):
        SafetensorsFolder(tmp_path)


def test_real_json_is_read(tmp_path: Path) -> None:
    value = {"a": [{"b": [1, 2.5, None, True, "é\u4e2d\U0001f600"]}], "c": 10**30, "deep": json.loads("[" * 50 + "]" * 50)}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == value
