"""Units: each stored tensor is read once a run, and each shard is written once."""

from collections import Counter

import pytest
import torch
from tiny import make_model, write_text
from variants import some_slow

from ptqcli.checkpoint import writer
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe_loading import load_recipe

ALGORITHMS = {
    "rtn": {"algo": "rtn"},
    "gptq": {"algo": "gptq"},
    "gptq at once": {"algo": "gptq", "sequential": False},
    "awq+gptq": {"algo": "awq+gptq"},
    "smoothquant auto+gptq": {"algo": "smoothquant+gptq", "smooth_alpha": "auto", "abits": 8, "wbits": 8, "group_size": -1},
    "llm-int8": {"algo": "llm-int8", "outliers": "static", "group_size": -1},
    "obq": {"algo": "obq"},
}


def recipe_for(folder, **changes):
    text = write_text(folder / "text.txt")
    return load_recipe(flags={"group_size": 32, "nsamples": 4, "seqlen": 32, "calib": str(text), **changes})


@pytest.fixture
def reads(monkeypatch):
    """How often each stored tensor has been read."""
    counts = Counter()
    read = SafetensorsFolder.read

    def counting(self, name):
        counts[name] += 1
        return read(self, name)

    monkeypatch.setattr(SafetensorsFolder, "read", counting)
    return counts


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "dtype": torch.bfloat16}], ids=["untied", "tied, bfloat16"])
@pytest.mark.parametrize("algorithm", some_slow(ALGORITHMS, every=2))
def test_each_stored_tensor_is_read_once(algorithm, changes, tmp_path, reads):
    """And once more, before that, to see whether the model knows the calibration text."""
    make_model(tmp_path / "model", **changes)
    recipe = recipe_for(tmp_path, **ALGORITHMS[algorithm])
    quantize(tmp_path / "model", recipe, tmp_path / "out")
    stored = SafetensorsFolder(tmp_path / "model").names
    assert reads == Counter(dict.fromkeys(stored, 1 if recipe.algo == "rtn" else 2))


def test_a_second_read_would_be_counted(tmp_path, reads):
    make_model(tmp_path / "model")
    skeleton = Skeleton(ModelFolder(tmp_path / "model"))
    name = skeleton.linears[0].name + ".weight"
    assert skeleton.read(name) is skeleton.read(name)
    assert reads[skeleton.stored_name(name)] == 1
    skeleton.release(skeleton.units[0])
    skeleton.read(name)
    assert reads[skeleton.stored_name(name)] == 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom"])
def test_every_stored_tensor_is_in_one_unit(architecture, tmp_path):
    make_model(tmp_path, architecture)
    skeleton = Skeleton(ModelFolder(tmp_path))
    units = [skeleton.before, *skeleton.units, skeleton.after]
    assert sorted(name for unit in units for name in unit.stored) == sorted(SafetensorsFolder(tmp_path).names)
    embedding = skeleton.model.get_input_embeddings().weight
    [name] = [name for name, parameter in skeleton.model.named_parameters() if parameter is embedding]
    assert skeleton.stored_name(name) in skeleton.before.stored
    assert all(name in unit.stored for unit in skeleton.units for name in unit.stored)
    late = {"llama": "model.norm.weight", "gpt2": "ln_f.weight", "opt": "final_layer_norm.weight", "bloom": "ln_f.weight"}
    assert any(stored.endswith(late[architecture]) and ".0." not in stored for stored in skeleton.after.stored)


def folder_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("algo", ["rtn", "gptq"])
def test_the_disk_holds_at_most_the_output_and_one_shard(algo, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "JOIN_BELOW", 0)
    make_model(tmp_path / "model", num_hidden_layers=8)
    peaks, put = [], writer._put

    def watching(folder, name, pieces):
        put(folder, name, pieces)
        peaks.append(folder_bytes(folder.path))

    monkeypatch.setattr(writer, "_put", watching)
    quantize(tmp_path / "model", recipe_for(tmp_path, algo=algo), tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 10
    output, largest = folder_bytes(tmp_path / "out"), max(shard.stat().st_size for shard in shards)
    assert output > 5 * largest, "twice the output would pass otherwise"
    assert max(peaks) <= 1.1 * (output + largest)


def test_a_shard_keeps_its_bytes(tmp_path, monkeypatch):
    """What is written for a unit is what stands there at the end, under another name."""
    monkeypatch.setattr(writer, "JOIN_BELOW", 0)
    make_model(tmp_path / "model")
    written, put = [], writer._put

    def watching(folder, name, pieces):
        put(folder, name, pieces)
        if name.endswith(".safetensors"):
            written.append(((folder.path / name).read_bytes(), (folder.path / name).stat().st_ino))

    monkeypatch.setattr(writer, "_put", watching)
    quantize(tmp_path / "model", recipe_for(tmp_path), tmp_path / "out")
    final = [(file.read_bytes(), file.stat().st_ino) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert final == written
