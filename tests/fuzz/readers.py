"""Everything that reads somebody else's file, with inputs that are right. A reader mutates one, writes it, reads it."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import json
import lzma
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mutate
import pyarrow
import torch
from packed import everything, llama, random_model, write_checkpoint
from pyarrow import parquet
from safetensors.torch import load, save
from tiny import byte_tokenizer

from ptqcli.adapters.files import adapter_files, read_adapter
from ptqcli.adapters.low_rank import LowRank
from ptqcli.calibration.files import read_path
from ptqcli.calibration.rows import Rows
from ptqcli.checkpoint.auxiliary import copy_auxiliary_files, load_tokenizer
from ptqcli.checkpoint.checksums import CHECKSUMS_NAME, _text, differences, read_checksums, write_checksums
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import MemoryTensors, SafetensorsFolder
from ptqcli.checkpoint.unfinished import JOURNAL, MARKER, unfinished_run
from ptqcli.cli import run
from ptqcli.errors import PTQError
from ptqcli.evaluation.harness_files import task_configs
from ptqcli.evaluation.task_files import read_questions
from ptqcli.formats import find_format, format_of
from ptqcli.formats.compressed_tensors import COMPRESSED_TENSORS
from ptqcli.formats.gguf import open_tensors
from ptqcli.model.config import build_on_meta, load_config, read_generation_config
from ptqcli.model.gguf import load_tokenizer as load_gguf_tokenizer
from ptqcli.numerics.ranges import MinMax
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import round_to_nearest
from ptqcli.patterns import found
from ptqcli.pipeline.journal import Committed
from ptqcli.pipeline.log import RunLog, read_log
from ptqcli.pipeline.output import Marker
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.report import LOG_JSON, FoldReport, LayerReport, Report
from ptqcli.recipe import Override, Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.runtime.load import load_quantized

LINEARS = [f"model.layers.{index}.{name}" for index in range(24) for name in ("self_attn.q_proj", "mlp.down_proj", "a" * 60)]
SCHEMES = {
    "packed": Scheme.parse("w3a16-g32-asym"),
    "integer": Scheme.parse("w8a8-static"),
    "outliers": Scheme.parse("w8a8-outliers6-static"),
}
TEXTS = ["One document.", "Two lines\nof another, with a comma.", "A third: é, \u4e2d.", ""]
RECIPE = """algo: awq+gptq
wbits: 4
group_size: 64
symmetric: false
calib: builtin
nsamples: 16
seed: 3
gptq: {damp: 0.1}
ignore: [lm_head, "layers.0.*down"]
overrides:
  - {pattern: down_proj, bits: 8}
  - {pattern: q_proj, skip: true}
"""


@dataclass(frozen=True)
class Reader:
    """share: of all inputs. names: one of them must stand in every refusal. call: writes a mutated input into a folder and reads it."""

    name: str
    share: int
    names: tuple[str, ...]
    call: Callable[[Path, mutate.Source], object]


class Originals:
    """What is mutated, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "packed").mkdir(parents=True)
        model = random_model(llama(layers=1))
        write_checkpoint(folder / "packed", model, everything(Scheme.parse("w4a16-g32")))
        self.config = json.loads((folder / "packed" / "config.json").read_text())
        byte_tokenizer().save_pretrained(folder / "packed")
        (folder / "packed" / "ptq_report.json").write_text(json.dumps(report()))
        (folder / "packed" / "generation_config.json").write_text(json.dumps(GENERATION))


GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
    "pad_token_id": 1,
    "temperature": 0.7,
    "top_k": 20,
    "do_sample": True,
    "max_length": 64,
}


def report() -> dict[str, Any]:
    layer = LayerReport(
        name="model.layers.0.mlp.down_proj", scheme="w4a16-g32", bits_per_weight=4.5, relative_error=0.1, never_activated=1, zero_groups=2,
        damp=0.1, damp_raised=True, outlier_columns=None, outlier_share=0.01,
    )  # fmt: skip
    fold = FoldReport(producer="a.norm", readers=("a.q", "a.k"), choices=(("awq", "0.5", 0.9),))
    whole = Report(
        source="model", recipe={**Recipe().stored()}, layers=[layer], skipped=[("x", "y")], bytes_before=10, bytes_after=5,
        bits_per_weight=4.5, error_kind="output", folds=[fold],
    )  # fmt: skip
    return {"ptqcli": "0.1", **json.loads(json.dumps(asdict(whole)))}


@functools.cache
def originals(folder: Path) -> Originals:
    return Originals(folder)


# Weights


def index(folder: Path, random: mutate.Source) -> object:
    (folder / "1.safetensors").write_bytes(save({"a": torch.ones(2), "b": torch.ones(3)}))
    (folder / "2.safetensors").write_bytes(save({"c": torch.ones(2)}))
    value = {"metadata": {"total_size": 28}, "weight_map": {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_bytes(mutate.json_bytes(value, random))
    return read_all(folder)


def header(folder: Path, random: mutate.Source) -> object:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.arange(4), "d": torch.ones(0)}
    data = save(tensors)
    length = struct.unpack("<Q", data[:8])[0]
    if random.random() < 0.7:
        head = mutate.json_bytes(json.loads(data[8 : 8 + length]), random)
        wrong = random.choice((0, 0, 0, 0, 1, -1, 8, 2**40, 2**63)) * random.changes
        data = struct.pack("<Q", (len(head) + wrong) % 2**64) + head + data[8 + length :]
    else:
        data = mutate.raw_bytes(data, random)
    (folder / "model.safetensors").write_bytes(data)
    return read_all(folder)


def read_all(folder: Path) -> int:
    tensors = SafetensorsFolder(folder)
    for name in tensors.names:
        tensor = tensors.read(name)
        assert tuple(tensor.shape) == tensors.shape(name)
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
    return tensors.total_bytes


def gguf(folder: Path, random: mutate.Source) -> object:
    """A file of llama.cpp: mostly its header, which ends before the tensors, and the tokenizer that is made of it."""
    whole = (Path(__file__).parent.parent / "golden" / "ckpt" / "tiny-q4_0.gguf").read_bytes()
    header = 7_000
    data = mutate.raw_bytes(whole[:header], random) + whole[header:] if random.random() < 0.8 else mutate.raw_bytes(whole, random)
    (folder / "a.gguf").write_bytes(data)
    config, tensors = open_tensors(folder / "a.gguf")
    for name in tensors.names:
        assert tuple(tensors.read(name).shape) == tensors.shape(name)
    ids = load_gguf_tokenizer(tensors.file)("a")["input_ids"] if random.random() < 0.3 else None
    return config.hidden_size, tensors.stored_bytes(), ids


def packed(folder: Path, random: mutate.Source) -> object:
    kind = random.choice(list(SCHEMES))
    scheme = SCHEMES[kind]
    weight = round_to_nearest(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), scheme, torch.float32, MinMax())
    from dataclasses import replace

    from ptqcli.numerics.weight import OutlierColumns

    if kind == "integer":
        weight = replace(weight, input_scale=torch.ones(1))
    if kind == "outliers":
        weight = replace(weight, outliers=OutlierColumns(torch.tensor([1, 5], dtype=torch.int32), torch.ones(8, 2)))
    tensors = COMPRESSED_TENSORS.pack("m", weight)
    for _ in range(random.choice((1, 1, 2)) if random.changes else 0):
        name = random.choice(sorted(tensors))
        tensors[name] = wrong_tensor(tensors[name].clone(), random)
    (folder / "model.safetensors").write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    read = SafetensorsFolder(folder)
    result = COMPRESSED_TENSORS.unpack("m", read.read, scheme)
    assert bool((result.scale != 0).all())
    assert bool(torch.isfinite(result.dequantize()).all())
    return result


OTHER_FORMATS = (
    ("gptq", "w4a16-g32"),
    ("gptq_v2", "w3a16-g32-asym"),
    ("awq", "w4a16-g32-asym"),
    ("bitsandbytes", "nf4-g32"),
    ("bitsandbytes", "fp4-g64-double"),
    ("bitsandbytes", "w8a8"),
)


def other_formats(folder: Path, random: mutate.Source) -> object:
    format_, scheme = random.choice([(find_format(name), Scheme.parse(scheme)) for name, scheme in OTHER_FORMATS])
    exact = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    tensors = format_.pack("m", round_to_nearest(exact, scheme, format_.scale_dtype(torch.float16, scheme), MinMax()))
    for _ in range(random.choice((1, 1, 2)) if random.changes else 0):
        name = random.choice(sorted(tensors))
        tensors[name] = wrong_tensor(tensors[name].clone(), random)
    (folder / "model.safetensors").write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    result = format_.unpack("m", SafetensorsFolder(folder).read, scheme)
    assert bool((result.scale != 0).all())
    assert bool(torch.isfinite(result.dequantize()).all())
    return result


def wrong_tensor(tensor: torch.Tensor, random: mutate.Source) -> torch.Tensor:
    deed = random.randrange(6)
    if deed == 0:
        return tensor.to(random.choice((torch.int64, torch.float64, torch.bool, torch.int32, torch.float16, torch.int8, torch.uint8)))
    if deed == 1:
        rows = torch.atleast_1d(tensor)
        return random.choice((rows[:-1], rows.flatten(), tensor.unsqueeze(0), rows[:0], rows.repeat(2, *[1] * (rows.dim() - 1))))
    if deed == 2 and tensor.is_floating_point() and tensor.numel():
        value = random.choice((float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-45, 3e38))
        tensor.view(-1)[random.randrange(tensor.numel())] = value
    elif tensor.numel():
        bits = tensor.contiguous().view(torch.uint8).view(-1)
        bits[random.randrange(bits.numel())] ^= 1 << random.randrange(8)
    return tensor


def checkpoint(folder: Path, random: mutate.Source) -> object:
    source = originals(folder.parent / "originals").folder / "packed"
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(source / file, folder / file)
    file = folder / random.choice(("config.json", "model.safetensors", "model.safetensors"))
    file.write_bytes(mutate.raw_bytes(file.read_bytes(), random))
    with torch.no_grad():
        logits = load_quantized(folder)(torch.arange(1, 5).unsqueeze(0)).logits
    assert logits.shape[:2] == (1, 4)
    return logits


def adapter(folder: Path, random: mutate.Source) -> object:
    corrections = {f"model.layers.{index}.mlp.up_proj": LowRank(torch.ones(2, 8), torch.ones(6, 2)) for index in range(2)}
    for name, pieces in adapter_files(corrections, transposed=False):
        (folder / name).write_bytes(b"".join(bytes(piece) for piece in pieces))
    deed = random.randrange(3)
    if deed == 0:
        file = folder / "adapter_config.json"
        file.write_bytes(mutate.json_bytes(json.loads(file.read_bytes()), random))
    elif deed == 1:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(mutate.raw_bytes(file.read_bytes(), random))
    elif random.changes:
        tensors = load((folder / "adapter_model.safetensors").read_bytes())
        name = random.choice(sorted(tensors))
        tensors[name] = wrong_tensor(tensors[name].clone(), random)
        (folder / "adapter_model.safetensors").write_bytes(save({key: value.contiguous() for key, value in tensors.items()}))
    found = read_adapter(folder)
    for low_rank in found.values():
        assert low_rank.A.shape[0] == low_rank.B.shape[1]
        assert bool(torch.isfinite(low_rank.A).all() and torch.isfinite(low_rank.B).all())
    return found


# JSON beside them


def config(folder: Path, random: mutate.Source) -> object:
    value = {key: entry for key, entry in originals(folder.parent / "originals").config.items() if key != "quantization_config"}
    (folder / "config.json").write_bytes(mutate.json_bytes(value, random))
    read = load_config(folder)
    assert read._attn_implementation is None
    return build_on_meta(read, 20)


OTHER_ENTRIES: list[dict[str, Any]] = [
    {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "checkpoint_format": "gptq_v2",
        "dynamic": {"+:.*q_proj$": {"bits": 8, "sym": False}, r"-:^model\.layers\.7": {}},
    },
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"]},
    {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": ["lm_head"]},
]  # fmt: skip


def quantization(folder: Path, random: mutate.Source) -> object:
    entry = random.choice([originals(folder.parent / "originals").config["quantization_config"], *OTHER_ENTRIES])
    (folder / "config.json").write_bytes(mutate.json_bytes(entry, random))
    from ptqcli.untrusted import read_json

    entry = read_json(folder / "config.json")
    stored = MemoryTensors({f"{name}.{leaf}": torch.zeros(1) for name in LINEARS[:2] for leaf in ("qweight", "SCB")})
    schemes = format_of(entry).schemes(entry, stored, {name: name for name in LINEARS})
    assert set(schemes) <= set(LINEARS)
    return schemes


def tokenizer(folder: Path, random: mutate.Source) -> object:
    source = originals(folder.parent / "originals").folder / "packed"
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(source / file, folder / file)
    file = folder / random.choice(("tokenizer.json", "tokenizer_config.json"))
    file.write_bytes(mutate.json_bytes(json.loads(file.read_bytes()), random))
    return load_tokenizer(folder, load_config(folder))


def generation(folder: Path, random: mutate.Source) -> object:
    (folder / "generation_config.json").write_bytes(mutate.json_bytes(GENERATION, random))
    return read_generation_config(folder)


def inspect(folder: Path, random: mutate.Source) -> object:
    """The command itself, as what it shows of a report is read nowhere else."""
    source = originals(folder.parent / "originals").folder / "packed"
    for file in ("config.json", "model.safetensors"):
        shutil.copy(source / file, folder / file)
    (folder / "ptq_report.json").write_bytes(mutate.json_bytes(report(), random))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as told:
        code = run(["inspect", str(folder)])
    if code:
        message = told.getvalue().strip()
        if not message.startswith("error: "):
            raise AssertionError(message)
        raise PTQError(message)
    assert "\x1b" not in out.getvalue()
    return out


# What this tool writes, and reads again


def checksums(folder: Path, random: mutate.Source) -> object:
    """The list is read, and the folder compared with it, whatever it names."""
    source = originals(folder.parent / "originals").folder / "packed"
    copied = Directory(folder)
    copy_auxiliary_files(source, ["config.json", "model.safetensors", "tokenizer.json"], copied)
    write_checksums(copied)
    copied.close()
    file = folder / CHECKSUMS_NAME
    file.write_bytes(mutate.raw_bytes(file.read_bytes(), random))
    listed = read_checksums(folder)
    assert listed is not None
    found = list(differences(folder, listed))
    assert not random.changes or found or file.read_bytes() == _text(listed)
    return found


def journal(folder: Path, random: mutate.Source) -> object:
    """How far a run has come, as the next one reads it, and as any other command tells of it."""
    layers = [LayerReport(**layer) for layer in report()["layers"]]
    folds = [FoldReport(producer="a.norm", readers=("a.q", "a.k"), choices=(("awq", "0.5", 0.9),))]
    shards = [("shard-00001.safetensors", {"a": 8, "b": 12})]
    files = {"shard-00001.safetensors": "0" * 64, "activations-behind-00002.safetensors": "f" * 64}
    committed = Committed(
        asked={"recipe wbits": 4, "batch size": 8},
        blocks=2,
        count=4,
        all_written=False,
        shards=shards,
        files=files,
        layers=layers,
        folds=folds,
        halved_at=[1],
    )
    opened = Directory(folder)
    try:
        committed.write(opened)
        Marker(output="out", into=False, replaces=None).write(opened)
        value = json.loads((folder / JOURNAL).read_bytes())
        data = mutate.json_bytes(value, random) if random.random() < 0.8 else mutate.raw_bytes((folder / JOURNAL).read_bytes(), random)
        (folder / JOURNAL).write_bytes(data)
        told = unfinished_run(folder)
        assert told is not None
        assert told.isprintable()
        assert len(told) < 1_000
        read = Committed.read(opened)
        assert read is not None
        assert all(Path(name).name == name for name in read.files)
        assert read == committed, "a change that keeps its form would be believed"
        return read
    finally:
        opened.close()


def marker(folder: Path, random: mutate.Source) -> object:
    """Of a working folder: what it says settles what may be removed."""
    opened = Directory(folder)
    try:
        Marker(output="out", into=False, replaces=(1, 2)).write(opened)
        value = json.loads((folder / MARKER).read_bytes())
        data = mutate.json_bytes(value, random) if random.random() < 0.8 else mutate.raw_bytes((folder / MARKER).read_bytes(), random)
        (folder / MARKER).write_bytes(data)
        assert unfinished_run(folder)
        read = Marker.read(opened, "out")
        if read is None:
            raise PTQError(f"{MARKER}: is none")
        assert read.output == "out"
        return read
    finally:
        opened.close()


def log(folder: Path, random: mutate.Source) -> object:
    """No line of a log is refused, and nothing depends on one; only what is no file would be."""
    telling = RunLog(NoProgress(), "model", torch.device("cpu"))
    opened = Directory(folder)
    with telling.kept_in(opened):
        for text in ("one", "two"):
            telling.phase(text)
        telling.block_started(0, 2)
        telling.note(LayerReport(**report()["layers"][0]))
        telling.block_done(0, 2)
    opened.close()
    lines = (folder / LOG_JSON).read_bytes().splitlines()
    chosen = random.randrange(len(lines))
    line = lines[chosen]
    lines[chosen] = mutate.json_bytes(json.loads(line), random) if random.random() < 0.7 else mutate.raw_bytes(line, random)
    (folder / LOG_JSON).write_bytes(b"\n".join(lines) + b"\n")
    past = read_log(folder)
    assert past is not None
    assert all(0 <= value < 1e15 for layer in past.layers.values() for value in layer.values())
    if random.changes:
        raise PTQError(f"{LOG_JSON}: read")  # the count of what is refused is to be more than none
    return past


# Requests


def recipe(folder: Path, random: mutate.Source) -> object:
    (folder / "recipe.yaml").write_bytes(
        mutate.text(RECIPE, random).encode("utf-8", "surrogatepass") if random.random() < 0.7 else mutate.raw_bytes(RECIPE.encode(), random)
    )
    return load_recipe(folder / "recipe.yaml")


def overrides(folder: Path, random: mutate.Source) -> object:
    patterns = [mutate.text(random.choice(("down_proj", "layers\\.[0-9]+", "^(?!.*q_proj)", "(q|k)_proj$")), random) for _ in range(3)]
    request = load_recipe(None, {"ignore": patterns[:2], "overrides": [Override(patterns[2], bits=8)]})
    hits = found(request.patterns, LINEARS)
    return {pattern: sorted(names) for pattern, names in hits.items()}


QUESTIONS = [
    {"question": "What do bees make?", "choices": ["milk", "honey"], "answer": 1},
    {"context": "Which?", "choices": {"text": ["Mars", "Pluto"], "label": ["A", "B"]}, "answerKey": "A"},
    {"prompt": "The capital of France is", "answer": ["Paris", "paris"], "max_new_tokens": 5},
]
TASK = """task: mine
dataset_path: json
dataset_kwargs: {data_files: rows.jsonl}
output_type: multiple_choice
doc_to_text: "{% for each in choices %}{{ loop.index }}. {{ each.strip() }}{% endfor %}"
doc_to_choice: "{{ choices['text'] }}"
generation_kwargs: {until: ["x"], do_sample: false}
metric_list:
  - {metric: acc, aggregation: mean}
"""


def questions(folder: Path, random: mutate.Source) -> object:
    row = random.choice(QUESTIONS)
    written = json.dumps(row).encode()
    line = mutate.json_bytes(row, random).replace(b"\n", b" ") if random.random() < 0.7 else mutate.raw_bytes(written, random)
    (folder / "rows.jsonl").write_bytes(line)
    return [asdict(question) for question in read_questions(folder / "rows.jsonl")]


def task_file(folder: Path, random: mutate.Source) -> object:
    (folder / "rows.jsonl").write_text(json.dumps(QUESTIONS[0]))
    changed = (
        mutate.text(TASK, random).encode("utf-8", "surrogatepass") if random.random() < 0.7 else mutate.raw_bytes(TASK.encode(), random)
    )
    (folder / "task.yaml").write_bytes(changed)
    return [sorted(map(str, config)) for config in task_configs(folder / "task.yaml")]


# Text


def _jsonl() -> bytes:
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()


def _json() -> bytes:
    return json.dumps([{"text": text, "n": 1} for text in TEXTS]).encode()


def _table() -> pyarrow.Table:
    return pyarrow.table({"text": TEXTS * 8, "n": list(range(len(TEXTS) * 8))})


def _parquet() -> bytes:
    parquet.write_table(_table(), sink := pyarrow.BufferOutputStream())
    return sink.getvalue().to_pybytes()


def _arrow() -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, _table().schema) as stream:
        stream.write_table(_table())
    return sink.getvalue().to_pybytes()


CSV = b'text,n\n"One, two",1\n"three ""four""\nfive",2\nsix,3\n'
KINDS: dict[str, Callable[[], bytes]] = {
    "txt": lambda: "\n".join(TEXTS).encode(),
    "raw": lambda: b" = A = \n\n Text . \n",
    "jsonl": _jsonl,
    "json": _json,
    "csv": lambda: CSV,
    "parquet": _parquet,
    "arrow": _arrow,
    "jsonl.gz": lambda: gzip.compress(_jsonl(), mtime=0),
    "txt.bz2": lambda: bz2.compress(_jsonl()),
    "json.xz": lambda: lzma.compress(_json()),
    "jsonl.zst": lambda: pyarrow.compress(_jsonl(), "zstd", asbytes=True),
    "csv.gz": lambda: gzip.compress(CSV, mtime=0),
}


def calibration(kind: str, folder: Path, random: mutate.Source) -> object:
    path = folder / f"a.{kind}"
    if kind in ("jsonl", "json") and random.random() < 0.5:
        path.write_bytes(mutate.json_bytes({"text": "a", "n": 1} if kind == "jsonl" else [{"text": "a"}, {"text": "b"}], random))
    else:
        path.write_bytes(mutate.raw_bytes(KINDS[kind](), random))
    return documents(path)


def saved(folder: Path, random: mutate.Source) -> object:
    """A folder as ``datasets`` saves it."""
    (folder / "train").mkdir()
    files = {
        "dataset_dict.json": json.dumps({"splits": ["train"]}).encode(),
        "train/state.json": json.dumps({"_data_files": [{"filename": "data.arrow"}], "_split": "train"}).encode(),
        "train/data.arrow": _arrow(),
    }
    changed = random.choice(list(files))
    for name, data in files.items():
        if name == changed:
            data = mutate.raw_bytes(data, random) if name.endswith("arrow") else mutate.json_bytes(json.loads(data), random)
        (folder / name).write_bytes(data)
    return documents(folder)


def documents(path: Path) -> list[str]:
    texts = read_path(path, "calibration", Rows())
    assert texts
    assert all(isinstance(text, str) and text.encode() is not None for text in texts)
    return texts


READERS = [
    Reader("safetensors index", 8, ("index.json", "safetensors"), index),
    Reader("safetensors header", 12, ("model.safetensors", "/"), header),
    Reader("GGUF file", 8, ("a.gguf",), gguf),
    Reader("packed tensors", 10, ("m.", "m:", "safetensors"), packed),
    Reader("packed tensors of other formats", 6, ("m.", "m:", "safetensors"), other_formats),
    Reader("whole checkpoint", 1, ("/", "quantization_config"), checkpoint),
    Reader("adapter", 4, ("adapter_config.json", "adapter_model.safetensors", "/"), adapter),
    Reader("config.json", 6, ("config.json", "/"), config),
    Reader("quantization_config", 12, ("quantization_config", "config.json"), quantization),
    Reader("tokenizer", 2, ("tokenizer", "config.json"), tokenizer),
    Reader("generation_config", 8, ("generation_config.json",), generation),
    Reader("report (ptq inspect)", 2, ("ptq_report.json",), inspect),
    Reader("checksums", 4, (CHECKSUMS_NAME,), checksums),
    Reader("journal", 6, (JOURNAL,), journal),
    Reader("marker", 2, (MARKER,), marker),
    Reader("log", 4, (LOG_JSON,), log),
    Reader("recipe", 6, ("recipe.yaml", "pattern", "regular expression", "override", "group size", "nsamples", "seed", "'"), recipe),
    Reader("overrides", 10, ("pattern", "regular expression", "override"), overrides),
    Reader("questions", 6, ("rows.jsonl",), questions),
    Reader("task file", 6, ("task.yaml",), task_file),
    *(Reader(f"calibration .{kind}", 2 if "csv" in kind else 4, (f"a.{kind}",), functools.partial(calibration, kind)) for kind in KINDS),
    Reader("calibration folder", 4, ("/",), saved),
]
