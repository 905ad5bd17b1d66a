"""Kind: a checkpoint that is no longer what was written, and nobody notices. Its SHA256SUMS finds every bit; what other programs wrote has
none, and there a reader's own checks are left, which name tensor and file."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq, one_line
from gguf_models import make_case
from packed import everything, llama, random_model, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import make_model, write_text

import ptqcli
from ptqcli.checkpoint.checksums import CHECKSUMS_NAME, differences, read_checksums
from ptqcli.errors import PTQError
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.report import LOGS
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources

FLIPS = 200
ALWAYS = {"README.md", "ptq_report.json", *LOGS, CHECKSUMS_NAME}  # not listed: card and report are changed later, logs are no two alike
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checksums")
    make_model(folder / "model", num_hidden_layers=1)
    write_text(folder / "text.txt")
    quantize(folder / "model", Recipe(algo="rtn", group_size=32), folder / "done", resources=Resources(max_shard_bytes=40_000))
    return folder


@pytest.fixture
def copy(room: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(room / "done", tmp_path / "copy"))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flips(folder: Path, count: int) -> list[tuple[str, int]]:
    """Bits of files, drawn by file first, so that small ones and headers have their share; half of a shard's are in its first 200 bytes."""
    chance, found = random.Random(0), []
    names = [*sorted(files(folder) - ALWAYS), CHECKSUMS_NAME]
    for _ in range(count):
        name = chance.choice(names)
        size = (folder / name).stat().st_size
        found.append((name, chance.randrange(8 * (min(size, 200) if chance.random() < 0.5 else size))))
    return found


def test_every_file_that_carries_the_model_is_listed(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After quantize with and without adapter and GGUF, convert and tune-scales; as `sha256sum` has it, too."""
    recipe: dict[str, Any] = {"group_size": 32, "calib": str(room / "text.txt"), "nsamples": 4, "seqlen": 16}
    ptqcli.quantize(room / "model", output=tmp_path / "adapter", algo="gptq", adapter_rank=4, **recipe)
    make_case(tmp_path / "merging", "llama", monkeypatch)
    ptqcli.quantize(tmp_path / "merging", output=tmp_path / "gguf", algo="rtn", format="gguf", group_size=32)
    ptqcli.quantize(room / "model", output=tmp_path / "finished", algo="rtn", finish="kl", **recipe)
    ptqcli.convert(room / "done", "gptq", output=tmp_path / "converted", requantize="w4a16-g32")
    ptqcli.tune_scales(room / "done", output=tmp_path / "tuned", calib=str(room / "text.txt"), nsamples=4, seqlen=16, steps=1)
    for name in ("adapter", "gguf", "finished", "converted", "tuned", str(room / "done")):
        folder = tmp_path / name
        listed = read_checksums(folder)
        assert listed is not None, name
        assert listed.keys() == files(folder) - ALWAYS, name
        answer = subprocess.run(["sha256sum", "-c", "--strict", CHECKSUMS_NAME], cwd=folder, capture_output=True, text=True)
        assert (answer.returncode, answer.stdout.count(": OK\n"), answer.stderr) == (0, len(listed), ""), name
        assert list(differences(folder, listed)) == [], name
        report = json.loads((folder / "ptq_report.json").read_text())
        assert CHECKSUMS_NAME in report["files"], "else it would not be replaced"
    assert {"adapter/adapter_model.safetensors", "config.json", "tokenizer.json"} <= (read_checksums(tmp_path / "adapter") or {}).keys()


def test_every_one_of_200_bits_that_flip_is_found(ptq: Ptq, copy: Path) -> None:
    """A flip in the list itself is known by its form, or by a file that is not as it says."""
    seen = set()
    for name, bit in flips(copy, FLIPS):
        flip(copy / name, bit)
        answer = ptq("inspect", copy, "--verify")
        assert (answer.code, "is not sound" in one_line(answer)) == (1, True), (name, bit)
        if name != CHECKSUMS_NAME:
            assert f"{name}: does not have the SHA-256 with which it was written" in answer.out.splitlines(), bit
        flip(copy / name, bit)
        seen.add(name)
    assert len(seen) > 6, "the model has shards, an index, a config, a tokenizer"
    assert ptq("inspect", copy, "--verify").code == 0


def cut(folder: Path) -> str:
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes()[:-1])
    return "config.json: has "


def gone(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json: is missing"


def a_folder(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    return "tokenizer.json: is no file"


def added(folder: Path) -> str:
    save_file({"x": torch.ones(1)}, folder / "more.safetensors")
    return "more.safetensors: is not in SHA256SUMS: it was added later"


@pytest.mark.parametrize("harm", [cut, gone, a_folder, added], ids=lambda harm: harm.__name__)
def test_each_difference_is_one_line(ptq: Ptq, copy: Path, harm: Callable[[Path], str]) -> None:
    told = harm(copy)
    answer = ptq("inspect", copy, "--verify")
    assert (answer.code, sum(line.startswith(told) for line in answer.out.splitlines())) == (1, 1)
    told_again = ptq("inspect", copy, "--verify", "--json")
    result = json.loads(told_again.out)
    assert (told_again.code, result["sound"], len(result["differences"])) == (1, False, 1)


def test_a_sound_checkpoint_is_called_so(ptq: Ptq, copy: Path) -> None:
    answer = ptq("inspect", copy, "--verify")
    assert answer.code == 0
    assert "all as written" in answer.out
    result = json.loads(ptq("inspect", copy, "--verify", "--json").out)
    assert (result["sound"], result["differences"], result["flaws"]) == (True, [], [])
    assert result["files"] == len(files(copy) - ALWAYS)


def test_card_and_report_may_change(ptq: Ptq, copy: Path) -> None:
    (copy / "README.md").write_text("measured since")
    (copy / "notes.txt").write_text("mine")
    assert ptq("inspect", copy, "--verify").code == 0


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "0" * 64 + "  config.json\n", "# 1 bytes\n" + "0" * 64 + "  ../model/config.json\n", "\x00" * 100]
)
def test_a_list_that_is_none_is_named(ptq: Ptq, copy: Path, text: str) -> None:
    (copy / CHECKSUMS_NAME).write_text(text)
    answer = ptq("inspect", copy, "--verify")
    assert answer.code == 1
    assert f"{CHECKSUMS_NAME}: is damaged, or was not written by ptqcli" in answer.out


def test_names_outside_are_refused_whoever_wrote_them(copy: Path) -> None:
    text = (copy / CHECKSUMS_NAME).read_text().replace("  config.json", "  ../done/config.json")
    (copy / CHECKSUMS_NAME).write_text(text)
    with pytest.raises(PTQError, match="is damaged"):
        read_checksums(copy)


def test_memory_does_not_grow_with_the_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptqcli.checkpoint.checksums.PIECE", 1000)
    told: list[int] = []
    listed = read_checksums(copy) or {}
    assert list(differences(copy, listed, lambda _, count: told.append(count))) == []
    assert max(told) == 1000
    assert sum(told) == sum(each.bytes for each in listed.values())


# What has no checksums: other programs' checkpoints, and models that are not quantized


def change(file: Path, name: str, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(file)
    tensors[name] = act(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[-1] = torch.nan
    return tensor


def test_a_checkpoint_without_checksums_says_so_and_is_read(ptq: Ptq, copy: Path) -> None:
    (copy / CHECKSUMS_NAME).unlink()
    answer = ptq("inspect", copy, "--verify")
    assert answer.code == 0
    assert re_words(answer.out, "checksums none: no SHA256SUMS is here")
    names = [name for path in copy.glob("*.safetensors") for name in load_file(path)]
    scale = next(name for name in names if name.endswith("weight_scale"))
    for name in (scale, "model.norm.weight"):
        file = next(path for path in copy.glob("*.safetensors") if name in load_file(path))
        change(file, name, with_nan)
    answer = ptq("inspect", copy, "--verify")
    assert answer.code == 1
    for name in (scale, "model.norm.weight"):
        (line,) = [line for line in answer.out.splitlines() if name in line]
        assert "holds NaN or infinity" in line
        assert ".safetensors" in line
    assert "(2 flaws)" in one_line(answer)


def re_words(text: str, words: str) -> bool:
    return words in " ".join(text.split())


def test_a_plain_model_is_read_too(ptq: Ptq, room: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(room / "model", tmp_path / "model"))
    assert ptq("inspect", model, "--verify").code == 0
    change(model / "model.safetensors", "lm_head.weight", with_nan)
    answer = ptq("inspect", model, "--verify")
    assert answer.code == 1
    assert "model.safetensors: tensor lm_head.weight holds NaN or infinity" in answer.out


def test_shapes_and_missing_tensors_are_named(ptq: Ptq, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_model(llama(layers=1)), everything(Scheme.parse("w4a16-g32-asym")))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    tensors["model.layers.0.self_attn.q_proj.bias"] = tensors["model.layers.0.self_attn.q_proj.bias"][:-1].clone()
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    answer = ptq("inspect", tmp_path, "--verify")
    for name in ("model.norm.weight is stored as [127]", "q_proj.bias is stored as [127]", "is stored for model.layers.0.input_layernorm"):
        assert name in answer.out
    assert "(3 flaws)" in one_line(answer)
