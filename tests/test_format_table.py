"""The table of formats, one that another package brings, and the one way to open a quantized folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commandline import Answer, Ptq, one_line
from packed import STATIC, change_tensor, llama, random_model, w8a8, write_checkpoint
from torch import Tensor

import ptqcli.formats
from ptqcli.checkpoint.tensors import TensorSource
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import DEFAULT_FORMAT, FORMATS, Format, LinearSpec, Reader, find_format, format_of
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.prepare import plan_run
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
from ptqcli.runtime import load_quantized

W8 = Scheme(8, -1)


class Plain(Format):
    """A format as another package could bring it: whole bytes, a scale a row, a file of its own beside config.json."""

    name = "plain-bytes"
    packages: Mapping[str, str] = {}
    optional: tuple[str, ...] = ()
    codebooks = False

    def refusal(self, spec: LinearSpec) -> str | None:
        return None if spec.scheme == W8 else "plain-bytes holds 8 bits with a scale a row"

    def fused_refusal(self, group: Mapping[str, Scheme | None]) -> str | None:
        return None

    def joint_refusal(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> str | None:
        return None

    def stored_bytes(self, spec: LinearSpec) -> int:
        return spec.out_features * (spec.in_features + spec.scale_dtype.itemsize)

    def trial(self, classes: Sequence[torch.nn.Module], specs: Sequence[LinearSpec]) -> list[str]:
        return []

    def readers(self, specs: Sequence[LinearSpec], auto_class: str, tried: Sequence[str]) -> list[Reader]:
        return []

    def notes(self, specs: Sequence[LinearSpec]) -> list[str]:
        return ["plain-bytes: nothing else reads it"]

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        return f"{name}.bytes", f"{name}.row_scale"

    def held(self, weight: QuantizedWeight) -> QuantizedWeight:
        return weight

    def pack(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        return dict(zip(self.tensor_names(name, weight.scheme), (weight.codes, weight.scale), strict=True))

    def unpack(self, name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
        codes, scale = (read(stored) for stored in self.tensor_names(name, scheme))
        return QuantizedWeight(codes=codes, scale=scale, zero=torch.full(scale.shape, 128, dtype=torch.uint8), scheme=scheme)

    def describe(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {
            "config.json": {"quantization_config": {"quant_method": self.name}},
            "plain.json": {"linears": [spec.name for spec in specs]},
        }

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == self.name

    def schemes(self, config: Mapping[str, Any], tensors: TensorSource, linears: Mapping[str, str]) -> dict[str, Scheme]:
        stored = self.stored_linears(tensors.names)
        return {name: W8 for name in linears if name in stored}

    def stored_linears(self, names: Iterable[str]) -> list[str]:
        return [name.removesuffix(".bytes") for name in names if name.endswith(".bytes")]


PLAIN = Plain()


def install(monkeypatch: pytest.MonkeyPatch, **places: str) -> None:
    """Other packages' entry points, with underscores in the names for hyphens."""
    found = [EntryPoint(name.replace("_", "-"), place, "ptqcli.formats") for name, place in places.items()]
    monkeypatch.setattr(ptqcli.formats, "entry_points", lambda group: found if group == "ptqcli.formats" else [])


def test_every_built_in_format_is_what_the_table_says() -> None:
    assert DEFAULT_FORMAT in FORMATS
    for name in FORMATS:
        assert find_format(name).name == name
        assert isinstance(find_format(name), Format)


def test_a_format_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, plain_bytes=f"{__name__}:PLAIN")
    assert find_format("plain-bytes") is PLAIN
    assert format_of({"quant_method": "plain-bytes"}) is PLAIN
    assert format_of({"quant_method": DEFAULT_FORMAT}) is find_format(DEFAULT_FORMAT)


def test_an_unknown_format_is_refused_with_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, plain_bytes=f"{__name__}:PLAIN")
    with pytest.raises(UsageError, match=r"^format 'zip' is unknown; use compressed-tensors, .*, plain-bytes$"):
        find_format("zip")
    for config, method in (({"quant_method": "zip"}, "'zip'"), ({}, "None")):
        with pytest.raises(PTQError, match=f"quant_method {method} is not read; what is read: compressed-tensors, .*, plain-bytes$"):
            format_of(config)


def test_no_config_json_tells_of_a_format_that_is_one_file() -> None:
    assert find_format("gguf").one_file
    with pytest.raises(PTQError, match="quant_method 'gguf' is not read"):
        format_of({"quant_method": "gguf"})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no_such_package.formats:PLAIN", "of the package no_such_package cannot be loaded: ModuleNotFoundError: No module named"),
        ("ptqcli.formats:NO_SUCH", "of the package ptqcli cannot be loaded: AttributeError: .*NO_SUCH"),
        ("ptqcli.formats:DEFAULT_FORMAT", "of the package ptqcli: ptqcli.formats:DEFAULT_FORMAT lacks a method or attribute"),
    ],
)
def test_a_broken_format_fails_only_when_it_is_used(monkeypatch: pytest.MonkeyPatch, place: str, message: str) -> None:
    install(monkeypatch, broken=place, plain_bytes=f"{__name__}:PLAIN")
    assert find_format("plain-bytes") is PLAIN
    assert format_of({"quant_method": "plain-bytes"}) is PLAIN
    with pytest.raises(PTQError, match=f"^format 'broken' {message}"):
        find_format("broken")
    with pytest.raises(PTQError, match=f"quant_method 'zip' is not read; .*; format 'broken' {message}"):
        format_of({"quant_method": "zip"})


def test_a_name_that_two_packages_claim_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, compressed_tensors=f"{__name__}:PLAIN")
    with pytest.raises(PTQError, match=f"more than one package: ptqcli, {__name__}; uninstall"):
        find_format("compressed-tensors")


def test_a_format_of_another_package_holds_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Planned, written and read back, and run, by code that knows nothing of it."""
    install(monkeypatch, plain_bytes=f"{__name__}:PLAIN")
    original = tiny.make_model(tmp_path / "model")
    recipe = Recipe(algo="rtn", wbits=8, group_size=-1, options={"rtn": {"scale_search": "minmax"}}, format="plain-bytes")
    _, plan = plan_run(tmp_path / "model", recipe, Resources())
    assert plan.notes == ("plain-bytes: nothing else reads it",)
    with pytest.raises(UsageError, match="q_proj: plain-bytes holds 8 bits with a scale a row"):
        plan_run(tmp_path / "model", replace(recipe, group_size=32), Resources())
    report = quantize(tmp_path / "model", recipe, tmp_path / "out")
    assert report.bytes_after == plan.bytes_after
    packed = open_checkpoint(tmp_path / "out")
    assert packed.format is PLAIN
    assert json.loads((tmp_path / "out" / "plain.json").read_text()) == {"linears": list(packed.schemes)}
    name = "model.layers.1.mlp.down_proj"
    assert packed.nbytes(name) == PLAIN.stored_bytes(packed.spec(name)) == 64 * (128 + 4)
    weight = original.get_submodule(name).weight.data
    assert (packed.weight(name).dequantize() - weight).abs().max() <= weight.abs().max() / 255 * 1.01
    ids = tiny.token_ids()
    with torch.no_grad():
        assert (load_quantized(tmp_path / "out")(ids).logits - original(ids).logits).abs().max() < 0.5


class Unsigned(Plain):
    """The same for a reader that takes positive scales only."""

    name = "unsigned-bytes"

    def refusal(self, spec: LinearSpec) -> str | None:
        return "unsigned-bytes holds positive scales only; give --no-signed" if spec.signed_scales else super().refusal(spec)


UNSIGNED = Unsigned()


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_format_without_negative_scales_refuses_signed_grids_by_name(
    monkeypatch: pytest.MonkeyPatch, ptq: Ptq, tmp_path: Path, solver: str
) -> None:
    """And with the flag that it names it gets none, read back and counted."""
    install(monkeypatch, unsigned_bytes=f"{__name__}:UNSIGNED", plain_bytes=f"{__name__}:PLAIN")
    tiny.make_model(tmp_path / "model")

    def quantized(format: str, *flags: str) -> Answer:
        words = f"--algo {solver} --wbits 8 --group-size -1 --nsamples 2 --seqlen 16 --format {format} --output".split()
        return ptq("quantize", tmp_path / "model", *words, tmp_path / format, *flags)

    refused = quantized("unsigned-bytes")
    assert refused.code == 2
    assert one_line(refused).endswith("q_proj: unsigned-bytes holds positive scales only; give --no-signed")
    assert quantized("unsigned-bytes", "--no-signed").code == quantized("plain-bytes").code == 0
    positive, signed = (
        torch.cat([packed.weight(name).scale.flatten() for name in packed.schemes]) > 0
        for packed in (open_checkpoint(tmp_path / "unsigned-bytes"), open_checkpoint(tmp_path / "plain-bytes"))
    )
    assert positive.all()
    assert 0.3 < signed.float().mean() < 0.7


# Opening a folder.


def some_schemes(name: str) -> Scheme | None:
    if name == "lm_head" or "o_proj" in name:
        return None
    return w8a8(STATIC) if "down" in name else Scheme(4, 32, symmetric=False)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Scheme]]:
    """A checkpoint of two schemes and linears left alone, its model with the dequantized weights, the schemes."""
    folder, model = tmp_path_factory.mktemp("packed"), random_model(llama(torch.bfloat16))
    return folder, model, write_checkpoint(folder, model, some_schemes)


def test_everything_of_a_checkpoint_is_told(packed_folder: tuple[Path, Any, dict[str, Scheme]]) -> None:
    folder, model, schemes = packed_folder
    opened = open_checkpoint(folder)
    assert opened.format.name == DEFAULT_FORMAT
    assert opened.schemes == schemes
    for name in schemes:
        matrix, spec = model.get_submodule(name).weight, opened.spec(name)
        assert (spec.name, spec.scheme, spec.kind) == (name, schemes[name], "Linear")
        assert (spec.out_features, spec.in_features) == matrix.shape
        assert spec.scale_dtype == torch.bfloat16
        assert torch.equal(opened.weight(name).dequantize(), matrix)
        assert opened.nbytes(name) == opened.format.stored_bytes(spec)
    plain = opened.plain()
    expected = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in schemes}
    assert plain.keys() == expected
    assert all(torch.equal(opened.tensors.read(stored), model.get_parameter(name)) for name, stored in plain.items())
    assert {parameter.device.type for parameter in opened.model.parameters()} == {"meta"}
    biases = sum(tensor.nbytes for name, tensor in model.named_parameters() if name.endswith(".bias") and name not in plain)
    assert opened.tensors.total_bytes == biases + sum(map(opened.tensors.nbytes, plain.values())) + sum(map(opened.nbytes, schemes))


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def targets(config: dict[str, Any]) -> list[str]:
    """Names of the first group's linears."""
    found: list[str] = config["quantization_config"]["config_groups"]["group_0"]["targets"]
    return found


Q_PROJ = "model.layers.0.self_attn.q_proj"
UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not quantized": (
        lambda folder: change_config(folder, lambda config: config.pop("quantization_config")),
        "config.json has no quantization_config, so the model is not quantized",
    ),
    "another method": (
        lambda folder: change_config(folder, lambda config: config["quantization_config"].update(quant_method="hqq")),
        "quant_method 'hqq' is not read; what is read: compressed-tensors",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "no codes": (
        lambda folder: change_tensor(folder, lambda t: t.pop(f"{Q_PROJ}.weight_packed")),
        f"holds no tensor {Q_PROJ}.weight_packed",
    ),
    "a stray tensor": (
        lambda folder: change_tensor(folder, lambda t: t.update({f"{Q_PROJ}.weight_g_idx": torch.zeros(128, dtype=torch.int32)})),
        f"nothing in the model takes the tensor {Q_PROJ}.weight_g_idx",
    ),
    "not stored quantized": (
        lambda folder: change_tensor(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{Q_PROJ}.weight")]),
        f"config.json says that {Q_PROJ} is quantized, but {Q_PROJ}.weight_packed is not stored",
    ),
    "no scheme": (
        lambda folder: change_config(folder, lambda config: targets(config).remove(Q_PROJ)),
        f"{Q_PROJ}.weight is stored quantized, but config.json gives it no scheme",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_quantized_checkpoint_is_refused_when_it_is_opened(tmp_path: Path, kind: str) -> None:
    damage, message = UNREADABLE[kind]
    write_checkpoint(tmp_path, random_model(llama()), some_schemes)
    open_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(PTQError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_matrix_of_another_size_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_model(llama()), some_schemes)
    change_tensor(tmp_path, lambda t: t[f"{Q_PROJ}.weight_shape"].copy_(torch.tensor([128, 120])))
    with pytest.raises(PTQError, match=Q_PROJ):
        open_checkpoint(tmp_path).weight(Q_PROJ)
