"""The loop over blocks: what it writes, in what memory, and what it refuses."""

import filecmp
import gc
import json
import os
import re
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import POSITIONS, make_model, token_ids, write_text
from transformers import T5Config

import ptqcli.pipeline.pipeline
from ptqcli.calibration.hidden import HiddenStates, beyond_budget, new_buffer
from ptqcli.calibration.statistics import Hessian
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.discovery import find_blocks
from ptqcli.model.kinds import kind_of
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.numerics.scheme import AUTO_GROUP, Scheme
from ptqcli.pipeline.block import WindowWork
from ptqcli.pipeline.output import Marker
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.prepare import plan_run
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.report import LOGS
from ptqcli.pipeline.texts import TextMaker
from ptqcli.plan import make_plan
from ptqcli.recipe import Override, Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.runtime import load_quantized


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    return tmp_path / "model"


def small(model, **changes):
    given = {"group_size": 32, "calib": str(model.parent / "text.txt"), "nsamples": 7, "seqlen": 48, **changes}
    return load_recipe(flags=given)


def same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names if name not in LOGS)


def test_two_runs_give_the_same_bytes_and_another_seed_does_not(model, tmp_path):
    quantize(model, small(model), tmp_path / "a")
    quantize(model, small(model), tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")
    quantize(model, small(model, seed=1), tmp_path / "c")
    assert not filecmp.cmp(tmp_path / "a" / "model.safetensors", tmp_path / "c" / "model.safetensors", shallow=False)


def test_a_small_activation_budget_changes_the_memory_and_not_the_bytes(model, tmp_path):
    quantize(model, small(model), tmp_path / "asleep", resources=Resources(batch_size=2))
    quantize(model, small(model), tmp_path / "again", resources=Resources(batch_size=2, activation_budget=0))
    assert same_files(tmp_path / "asleep", tmp_path / "again")


def test_the_later_of_two_overrides_wins_also_over_a_skip(model):
    overrides = (Override(r"layers\.0", skip=True), Override(r"layers\.0\.mlp\.down_proj", bits=8))
    _, plan = plan_run(model, small(model, overrides=overrides), Resources())
    schemes = {linear.name: linear.scheme.bits for linear in plan.linears if ".layers.0." in linear.name}
    assert schemes == {"model.layers.0.mlp.down_proj": 8}
    with pytest.raises(UsageError, match="either skip or change"):
        Override("x", skip=True, bits=8)


@torch.no_grad()
def test_a_float16_model_is_calibrated_in_float32_and_keeps_its_dtype(tmp_path):
    make_model(tmp_path / "model", dtype=torch.float16)
    write_text(tmp_path / "text.txt")
    quantize(tmp_path / "model", small(tmp_path / "model"), tmp_path / "out")
    assert Resources().calibration_dtype(torch.float16) == torch.float32
    reader = SafetensorsFolder(tmp_path / "out")
    assert {reader.dtype(name) for name in reader.names if "scale" in name or "norm" in name} == {torch.float16}
    assert torch.isfinite(load_quantized(tmp_path / "out")(torch.arange(9)[None]).logits).all()


def test_a_model_that_changes_hidden_states_between_blocks_is_refused(model, tmp_path, monkeypatch):
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def backwards(self, *args, **kwargs):
        straight = self.layers
        self.layers = torch.nn.ModuleList(reversed(list(straight)))
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.layers = straight

    monkeypatch.setattr(LlamaModel, "forward", backwards)
    with pytest.raises(PTQError, match="does not hand each block's output straight to the next"):
        quantize(model, small(model), tmp_path / "out")


def test_what_stands_in_the_way_is_not_removed(model, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(PTQError, match=r"out\.partial: is in the way and holds thesis\.txt"):
        quantize(model, small(model, algo="rtn"), tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


def test_a_file_in_the_place_of_the_growing_folder_is_named(model, tmp_path):
    (tmp_path / "out.partial").write_text("years of work")
    with pytest.raises(PTQError, match=r"out\.partial: is in the way and no folder"):
        quantize(model, small(model, algo="rtn"), tmp_path / "out")


def test_an_output_that_is_a_link_to_itself_is_refused(model, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="a link that leads back to itself"):
        quantize(model, small(model, algo="rtn"), tmp_path / "loop")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"])
def test_a_parameter_stored_as_integers_is_refused(name, tmp_path):
    make_model(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    save_file({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PTQError, match=f"tensor {name} is stored as torch.int8"):
        quantize(tmp_path / "model", small(tmp_path / "model", algo="rtn"), tmp_path / "out")


def test_the_room_on_disk_is_what_the_plan_says(model, tmp_path):
    most = 0

    class Watching(NoProgress):
        def block_done(self, index, count):
            nonlocal most
            most = max(most, sum(file.stat().st_size for file in tmp_path.glob("out.partial/*")))

    _, plan = plan_run(model, small(model), Resources())
    report = quantize(model, small(model), tmp_path / "out", progress=Watching())
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.bytes_after == pytest.approx(plan.bytes_after, rel=0.02)
    assert most + written <= 1.1 * plan.disk_bytes


def test_a_checkpoint_that_stays_in_shards_needs_room_for_itself_and_one_of_them(model, tmp_path, monkeypatch):
    for module in (ptqcli.estimate, ptqcli.checkpoint.writer):
        monkeypatch.setattr(module, "JOIN_BELOW", 0)
    recipe = small(model)
    skeleton, plan = plan_run(model, recipe, Resources())
    quantize(model, recipe, tmp_path / "out")
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    states = 2 * recipe.nsamples * recipe.seqlen * skeleton.config.hidden_size * 4  # with which a run goes on
    assert sum(sizes) + 0.9 * max(sizes) < plan.disk_bytes - states < sum(sizes) + 1.1 * max(sizes)
    assert load_quantized(tmp_path / "out")(torch.arange(9)[None]).logits.isfinite().all()


def test_activations_beyond_the_budget_lie_in_a_file_that_leaves_no_trace(tmp_path):
    two_buffers = 2 * 3 * 4 * 5 * 4
    assert not beyond_budget(two_buffers // 2, two_buffers)
    assert beyond_budget(two_buffers // 2, two_buffers - 1)
    states = HiddenStates(new_buffer((3, 4, 5), torch.float32, two_buffers - 1, tmp_path).fill_(1), two_buffers - 1, tmp_path)
    states.outputs[:] = 2
    states.outputs[1] = 7
    assert float(states.inputs.sum()) == 60, "work on a block leaves what it reads"
    states.advance()
    assert float(states.inputs.sum()) == 7 * 20 + 2 * 40
    assert not list(tmp_path.iterdir())


def test_sequential_calibrates_behind_the_quantized_layers(model, tmp_path):
    one = quantize(model, small(model, wbits=2), tmp_path / "sequential")
    other = quantize(model, small(model, wbits=2, sequential=False), tmp_path / "at-once")
    first = {layer.name: layer.relative_error for layer in one.layers if ".layers.0." in layer.name}
    second = {layer.name: layer.relative_error for layer in other.layers if ".layers.0." in layer.name}
    assert list(first) == list(second)
    q_proj, down_proj = next(iter(first)), list(first)[-1]
    assert first[q_proj] == second[q_proj]
    assert first[down_proj] != second[down_proj]


def test_each_part_of_a_block_runs_once_per_batch(model, tmp_path, monkeypatch):
    """Calibration asks nothing twice: with enough memory every linear of every block runs exactly once per batch."""
    calls = {}
    monkeypatch.setattr(TextMaker, "_known", lambda *_: None)  # the look at a few windows beforehand
    monkeypatch.setattr(Skeleton, "load_block", _counting_load(calls))
    quantize(model, small(model, nsamples=6), tmp_path / "out", resources=Resources(batch_size=2))
    assert set(calls.values()) == {3}
    assert len(calls) == 14


def _counting_load(calls):
    load = Skeleton.load_block

    def counting(self, index, device, dtype):
        block = load(self, index, device, dtype)
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                key = (index, name)
                module.register_forward_hook(lambda *_, key=key: calls.__setitem__(key, calls.get(key, 0) + 1))
        return block

    return counting


def test_the_hessian_is_the_sum_of_outer_products():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 9, 600, generator=generator) for _ in range(3)]
    hessian = Hessian.zeros(600, torch.device("cpu"))
    for batch in batches:
        hessian.add(batch)
    rows = torch.cat(batches).reshape(-1, 600).double()
    torch.testing.assert_close(hessian.matrix.double(), rows.T @ rows, rtol=1e-5, atol=1e-4)
    assert torch.equal(hessian.matrix, hessian.matrix.T)
    assert hessian.tokens == 54
    weight = torch.randn(5, 600, generator=generator)
    assert hessian.output_energy(weight) == pytest.approx(float((weight.double() @ rows.T).square().sum()), rel=1e-4)


def test_reported_errors_and_sizes_are_those_of_the_files(model, tmp_path):
    report = quantize(model, small(model, scale_search="mse"), tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "ptq_report.json").read_text())
    assert len(stored["layers"]) == len(report.layers) == 14
    assert "seconds" not in stored
    reader, before = SafetensorsFolder(tmp_path / "out"), SafetensorsFolder(model)
    assert report.bytes_after == reader.total_bytes
    assert report.bytes_before == before.total_bytes
    packed = [name for name in reader.names if ".weight_packed" in name or ".weight_scale" in name or ".weight_shape" in name]
    weights = sum(before.shape(f"{layer.name}.weight")[0] * before.shape(f"{layer.name}.weight")[1] for layer in report.layers)
    assert report.bits_per_weight == pytest.approx(sum(reader.nbytes(name) for name in packed) * 8 / weights)


def test_everything_that_is_not_quantized_is_carried_over(model, tmp_path):
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "notes.py").write_text("raise SystemExit")
    quantize(model, small(model, algo="rtn"), tmp_path / "out")
    before, after = SafetensorsFolder(model), SafetensorsFolder(tmp_path / "out")
    for name in before.names:
        if "norm" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(before.read(name), after.read(name))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "tokenizer.json", "generation_config.json", "config.json", "model.safetensors"} <= names
    assert "notes.py" not in names


def test_shards_have_an_index_and_load(model, tmp_path):
    quantize(model, small(model, algo="rtn"), tmp_path / "whole")
    quantize(model, small(model, algo="rtn"), tmp_path / "cut", resources=Resources(max_shard_bytes=40_000))
    assert (tmp_path / "cut" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 2
    ids = torch.arange(20)[None]
    assert torch.equal(load_quantized(tmp_path / "whole")(ids).logits, load_quantized(tmp_path / "cut")(ids).logits)


def test_overrides_skip_and_change_schemes(model, tmp_path):
    overrides = (Override("down_proj", bits=8, group_size=-1), Override(r"layers\.1\.self_attn", skip=True))
    report = quantize(model, small(model, overrides=overrides, ignore=("layers.0.self_attn.o_proj",)), tmp_path / "out")
    schemes = {layer.name: layer.scheme for layer in report.layers}
    assert schemes["model.layers.0.mlp.down_proj"] == "w8a16-row"
    assert schemes["model.layers.0.mlp.up_proj"] == "w4a16-g32"
    assert "model.layers.0.self_attn.o_proj" not in schemes
    assert not [name for name in schemes if "layers.1.self_attn" in name]
    assert torch.isfinite(load_quantized(tmp_path / "out")(torch.arange(9)[None]).logits).all()


REFUSALS = [
    ({"group_size": 48}, "does not divide the 64 input features of model.layers.0.self_attn.q_proj"),
    ({"overrides": (Override("no_such_layer", skip=True),)}, "matches no linear"),
    ({"ignore": ("no_such_layer",)}, "matches no linear"),
    ({"ignore": ("proj",)}, "nothing is left to quantize"),
    ({"overrides": (Override("q_proj", bits=8),)}, "run as one matrix by vLLM"),
    ({"ignore": ("gate_proj",)}, "mlp.gate_proj (left as it is) and model.layers.0.mlp.up_proj (w4a16-g32) read the same input"),
    ({"static_groups": False}, "static groups"),
    ({"seqlen": POSITIONS + 1}, f"longer than the model's {POSITIONS} positions"),
    ({"blocks": "model.nothing"}, "no such list of blocks"),
]


@pytest.mark.parametrize("changes, message", REFUSALS, ids=[message[-24:] for _, message in REFUSALS])
def test_what_cannot_work_is_refused_by_name_before_work_starts(model, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(SafetensorsFolder, "read", lambda self, name: pytest.fail(f"{name} was read"))
    with pytest.raises(UsageError, match=re.escape(message)):
        quantize(model, small(model, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"wbits": 9}, "9 bits"),
        ({"group_size": 0}, "group size 0"),
        ({"algo": "magic"}, "algorithm 'magic' is unknown"),
        ({"damp": -1.0}, "damp"),
        ({"scale_search": "best"}, "scale search"),
        ({"nsamples": 0}, "nsamples"),
        ({"seqlen": 1}, "seqlen"),
        ({"ignore": ("(",)}, "regular expression"),
        ({"format": "zip"}, "format"),
    ],
)
def test_a_recipe_refuses_values_that_do_not_exist(changes, message):
    with pytest.raises(UsageError, match=message):
        load_recipe(flags=changes)


def test_flags_win_over_the_recipe_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("algo: rtn\nwbits: 3\noverrides:\n  - pattern: down_proj\n    bits: 8\nignore: [gate]\n")
    recipe = load_recipe(file, {"wbits": 8})
    assert (recipe.algo, recipe.default_scheme) == ("rtn", Scheme(8, AUTO_GROUP))
    assert recipe.overrides == (Override("down_proj", bits=8),)
    assert recipe.ignore == ("gate",)


@pytest.mark.parametrize(
    "text, message",
    [
        ("wbit: 4", "unknown key 'wbit'"),
        ("wbits: four", "'wbits' must be int"),
        ("wbits: true", "'wbits' must be int"),
        ("symmetric: 1", "'symmetric' must be bool"),
        ("ignore: lm_head", "'ignore' must be a list"),
        ("overrides: [{bits: 8}]", "pattern is required"),
        ("overrides: [{pattern: a, bit: 8}]", "an override has the keys"),
        ("- a", "list of 'key: value' lines"),
        ("a: [", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        ("wbits: 4\nalgo: rtn\nwbits: 8", "'wbits' is given twice"),
        ("gptq: {damp: 0.1, damp: 0.2}", "'damp' is given twice"),
        ("ignore: [3]", "'ignore' must be a list of str"),
    ],
)
def test_a_broken_recipe_file_is_named_with_its_fault(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as raised:
        load_recipe(file)
    assert str(file) in str(raised.value)


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_a_checkpoint(model, tmp_path):
    quantize(model, small(model, algo="rtn"), tmp_path / "out")
    with pytest.raises(UsageError, match="already exists"):
        quantize(model, small(model), tmp_path / "out")
    quantize(model, small(model, algo="rtn", wbits=8), tmp_path / "out", overwrite=True)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="was not written by ptq quantize"):
        quantize(model, small(model, algo="rtn"), precious, overwrite=True)
    with pytest.raises(UsageError, match="is the model itself"):
        quantize(model, small(model), model, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_run_leaves_nothing_behind_and_keeps_the_old_checkpoint(model, tmp_path):
    class Interrupting(NoProgress):
        def block_done(self, index, count):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, small(model), tmp_path / "out", progress=Interrupting())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]
    quantize(model, small(model, algo="rtn"), tmp_path / "out")
    kept = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        quantize(model, small(model), tmp_path / "out", overwrite=True, progress=Interrupting())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == kept


def test_what_a_killed_run_has_left_is_replaced(model, tmp_path):
    left = tmp_path / "out.partial"
    left.mkdir()
    Marker(output="out", into=False, replaces=None).write(Directory(left))
    (left / "shard-00001.safetensors").write_bytes(b"half")
    quantize(model, small(model, algo="rtn"), tmp_path / "out")
    assert not left.exists()
    assert not list((tmp_path / "out").glob("shard-*"))


def test_two_runs_do_not_write_into_one_folder(model, tmp_path):
    class Second(NoProgress):
        def block_done(self, index, count):
            with pytest.raises(PTQError, match=r"out\.partial: another run is writing there"):
                quantize(model, small(model, algo="rtn"), tmp_path / "out")

    quantize(model, small(model, algo="rtn"), tmp_path / "out", progress=Second())
    load_quantized(tmp_path / "out")


def test_an_output_that_another_run_finishes_meanwhile_is_noticed_before_the_work(model, tmp_path):
    class Late(NoProgress):
        def planned(self, plan, output):
            quantize(model, small(model, algo="rtn"), tmp_path / "out")

    with pytest.raises(UsageError, match="already exists"):
        quantize(model, small(model, algo="rtn", wbits=8), tmp_path / "out", progress=Late())
    assert not (tmp_path / "out.partial").exists()


def test_an_output_that_is_a_link_stays_one(model, tmp_path):
    quantize(model, small(model, algo="rtn"), tmp_path / "target")
    (tmp_path / "out").symlink_to("target")
    quantize(model, small(model, algo="rtn", wbits=8), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 8


def test_inputs_that_are_not_finite_are_an_error_that_names_the_layer(model, tmp_path):
    make_model(tmp_path / "broken", dtype=torch.float32)
    weights = SafetensorsFolder(tmp_path / "broken")
    tensors = {name: weights.read(name) for name in weights.names}
    tensors["model.layers.1.input_layernorm.weight"][:] = 3e38  # what comes out of this norm no longer fits
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PTQError, match=r"model\.layers\.1\.self_attn\.q_proj: calibration inputs are not finite"):
        quantize(tmp_path / "broken", small(model), tmp_path / "out")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PTQError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN or infinity"):
        quantize(tmp_path / "broken", small(model), tmp_path / "out")


def test_a_quantized_model_is_not_quantized_again(model, tmp_path):
    quantize(model, small(model, algo="rtn"), tmp_path / "out")
    with pytest.raises(UsageError, match="quantized already"):
        quantize(tmp_path / "out", small(model, algo="rtn"), tmp_path / "twice")


def test_names_with_and_without_the_prefix_are_one(tmp_path):
    """Old checkpoints hold the bare base model's names; the weights read are the same."""
    make_model(tmp_path / "model", "gpt2")
    reader = SafetensorsFolder(tmp_path / "model")
    bare = {name.removeprefix("transformer."): reader.read(name) for name in reader.names}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()  # a buffer that old files carry
    save_file(bare, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    quantize(tmp_path / "model", Recipe(algo="rtn", group_size=32), tmp_path / "out")
    after = SafetensorsFolder(tmp_path / "out")
    assert "h.0.attn.c_attn.weight_packed" in after.names
    assert "h.0.attn.bias" in after.names
    load_quantized(tmp_path / "out")


def test_tensors_that_the_model_has_no_use_for_are_carried_over_and_named(model, tmp_path):
    reader = SafetensorsFolder(model)
    tensors = {name: reader.read(name) for name in reader.names}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # old Llama files carry it; the model computes it
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    _, plan = plan_run(model, small(model, algo="rtn"), Resources())
    assert any("copied as they are" in note and "layers.0.self_attn.rotary_emb.inv_freq" in note for note in plan.notes)
    quantize(model, small(model, algo="rtn"), tmp_path / "out")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in SafetensorsFolder(tmp_path / "out").names
    load_quantized(tmp_path / "out")


def test_a_tied_model_may_store_the_head_in_place_of_the_embedding(tmp_path):
    """Of tensors that share memory, safetensors' own ``save_model`` keeps the first name of the alphabet."""
    make_model(tmp_path / "model", tie_word_embeddings=True)
    quantize(tmp_path / "model", Recipe(algo="rtn", group_size=32), tmp_path / "one")
    reader = SafetensorsFolder(tmp_path / "model")
    tensors = {name.replace("model.embed_tokens", "lm_head"): reader.read(name) for name in reader.names}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    quantize(tmp_path / "model", Recipe(algo="rtn", group_size=32), tmp_path / "other")
    with torch.no_grad():
        logits = [load_quantized(tmp_path / name)(token_ids()).logits for name in ("one", "other")]
    assert torch.equal(*logits)


def test_blocks_are_found_or_asked_for():
    blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))
    rivals = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))
    model = torch.nn.Module()
    model.layers = blocks
    assert find_blocks(model) == "layers"
    model.others = rivals
    with pytest.raises(UsageError, match="several lists of blocks"):
        find_blocks(model)
    assert find_blocks(model, "others") == "others"
    with pytest.raises(UsageError, match="candidates are layers, others"):
        find_blocks(model, "layer")
    with pytest.raises(UsageError, match="no list of repeated blocks"):
        find_blocks(torch.nn.Linear(2, 2))


PEAK = """
import json, sys
from pathlib import Path
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.report import LOGS
from ptqcli.pipeline.prepare import plan_run
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
cheap = {"gptq": {"scale_search": "minmax"}}
recipe = Recipe(wbits=8, group_size=-1, calib=sys.argv[2], nsamples=4, seqlen=64, ignore=("down_proj",), options=cheap)
report = quantize(Path(sys.argv[1]), recipe, Path(sys.argv[3]))
print(report.peak_memory_bytes)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    text, peaks = write_text(tmp_path / "text.txt"), {}
    for depth in (4, 26):
        make_model(tmp_path / str(depth), hidden_size=256, intermediate_size=4096, num_hidden_layers=depth)
        arguments = [str(tmp_path / str(depth)), str(text), str(tmp_path / f"{depth}-out")]
        # Large blocks straight from the system and back: what the run holds, not what glibc happens to keep of it.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        command = [sys.executable, "-c", PEAK, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks[depth] = int(done.stdout)
    weights = {depth: SafetensorsFolder(tmp_path / str(depth)).total_bytes for depth in peaks}
    assert weights[26] - weights[4] > 0.4 * peaks[4], "the models must differ by much more than the tolerance"
    assert abs(peaks[26] - peaks[4]) < 0.1 * peaks[4], peaks


@pytest.mark.parametrize("options", [{}, {"sequential": False}])
@pytest.mark.parametrize("algo", ["gptq", "smoothquant+gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_a_finished_block_is_gone_before_the_next_is_loaded(algo, options, tmp_path, monkeypatch):
    make_model(tmp_path / "model", num_hidden_layers=4)
    alive, seen = [], []

    class Watched(WindowWork):
        def __init__(self, *args):
            seen.append(sum(reference() is not None for reference in alive))
            alive.append(weakref.ref(self))
            super().__init__(*args)

    monkeypatch.setattr(ptqcli.pipeline.pipeline, "WindowWork", Watched)
    recipe = Recipe(
        algo=algo, wbits=4, abits=16, group_size=32, nsamples=4, seqlen=32, calib=str(write_text(tmp_path / "t.txt")), **options
    )
    gc.disable()  # memory must not wait for it
    try:
        quantize(tmp_path / "model", recipe, tmp_path / "out")
    finally:
        gc.enable()
    assert seen == [0, 0, 0, 0]


def test_a_scheme_can_be_assigned_to_each_linear(model):
    """As an allocation of bits will do it: by path, whatever the recipe says, but for what the recipe leaves alone."""
    skeleton = Skeleton(ModelFolder(model))
    eight, skipped = Scheme(8, 64), "model.layers.0.mlp.down_proj"
    assigned = {site.name: eight for site in skeleton.linears if site.local.startswith("mlp") and site.block == 0}
    plan = make_plan(small(model, overrides=(Override(skipped, skip=True),)), skeleton, Resources(), assigned)
    expected = {site.name: eight if site.name in assigned else Scheme(4, 32) for site in skeleton.linears if site.name != skipped}
    assert {linear.name: linear.scheme for linear in plan.linears} == expected
    assert [name for name, _ in plan.skipped] == [skipped]
    with pytest.raises(UsageError, match=r"model\.layers\.9\.mlp\.up_proj, which is no linear"):
        make_plan(small(model), skeleton, Resources(), {"model.layers.9.mlp.up_proj": eight})
    with pytest.raises(UsageError, match="read the same input"):
        make_plan(small(model), skeleton, Resources(), {"model.layers.1.self_attn.k_proj": eight})


def test_the_plan_names_what_servers_run_as_one_matrix(model):
    _, plan = plan_run(model, small(model), Resources())
    groups = [tuple(name.removeprefix("model.layers.1.") for name in group) for group in plan.fused_groups if ".layers.1." in group[0]]
    assert groups == [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]


def test_another_kind_of_model_is_refused():
    with pytest.raises(PTQError, match="a model of type t5 is an encoder with a decoder, which is not supported"):
        kind_of(T5Config())
