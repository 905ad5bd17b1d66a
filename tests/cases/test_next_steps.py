"""Kind: a result that does not say what to do with it. After the work stand the lines that a person types next, with what must be installed
first and the version that the scheme needs; a model card in the folder tells the same to whoever finds it there."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commandline import Ptq
from tiny import make_model, write_text
from transformers import PreTrainedModel

from ptqcli.cli import run
from ptqcli.cli.console import path_text
from ptqcli.formats import LinearSpec, find_format
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.card import CARD_NAME

FORMAT = find_format("compressed-tensors")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the hub's cache holds it, with a card of its own; the same one elsewhere; a text."""
    folder = tmp_path_factory.mktemp("next")
    snapshot = folder / "models--some-owner--some--model" / "snapshots" / "0123abc"
    make_model(snapshot, dtype=torch.bfloat16)
    (snapshot / CARD_NAME).write_text(
        "---\nlicense: other\nlicense_name: 'some-licence'\ntags:\n- text\nevil: [&a a, *a]\n---\nlicense: mit\n"
    )
    shutil.copytree(snapshot, folder / "model")
    write_text(folder / "text.txt", words=500)
    return folder


def quantized(workshop: Path, target: Path, *flags: str, model: str = "model") -> Path:
    line = ["quantize", str(workshop / model), "--output", str(target), "--quiet", *(flags or ("--algo", "rtn", "--group-size", "32"))]
    assert run(line) == 0
    return target


def front_matter(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / CARD_NAME).read_text().split("---\n")[1])


def spec(scheme: str, kind: str = "Linear", shape: tuple[int, int] = (256, 256)) -> LinearSpec:
    return LinearSpec(
        name="layer", scheme=Scheme.parse(scheme), out_features=shape[0], in_features=shape[1], scale_dtype=torch.bfloat16, kind=kind
    )


@pytest.mark.parametrize(
    ("schemes", "needs"),
    [
        # What vLLM's source says: 4 and 8 bits in the groups of its Marlin kernels always, all else from Humming on.
        (["w4a16-g128"], "vllm"),
        (["w4a16-g32-asym"], "vllm"),
        (["w8a16-row", "w4a16-g64"], "vllm"),
        (["w8a8"], "vllm"),
        (["w8a8-static"], "vllm"),
        (["w4a8"], "vllm"),
        (["w3a16-g128"], "vllm>=0.25"),
        (["w4a16-g128", "w2a16-g64"], "vllm>=0.25"),
        (["w4a16-g16"], "vllm>=0.25"),
        (["w2a16-g64-asym"], "vllm>=0.33"),
        (["w8a16-g64-asym"], "vllm>=0.33"),
        (["w8a8-act-tensor"], None),
        (["w3a8"], None),
        (["w8a8-outliers6"], None),
    ],
)
def test_vllm(schemes: list[str], needs: str | None) -> None:
    specs = [spec(scheme) for scheme in schemes]
    (reader,) = [reader for reader in FORMAT.readers(specs, "AutoModelForCausalLM", []) if reader.name == "vLLM"]
    notes = " ".join(FORMAT.notes(specs))
    if needs is None:
        assert reader.refusal is not None
        assert reader.refusal in notes
        return
    assert (reader.refusal, reader.needs, reader.code_for("a b")) == (None, (needs,), "vllm serve 'a b'")
    version = needs.partition(">=")[2]
    assert re.findall(r"vLLM reads it from (\S+) on", notes) == ([version] if version else [])


@pytest.mark.parametrize(
    ("specs", "tried", "expands"),
    [
        ([spec("w4a16-g128")], [], False),
        ([spec("w8a8"), spec("w4a16-g128")], [], False),
        ([spec("w4a16-g128-asym")], [], True),
        ([spec("w4a16-g128")], ["the class does not take packed weights"], True),
        ([spec("w4a16-g128-asym"), spec("w4a16-g64-asym")], [], None),
        ([spec("w4a16-g128", kind="Conv1D")], [], None),
        ([spec("w8a8-outliers6")], [], None),
    ],
)
def test_transformers(specs: list[LinearSpec], tried: list[str], expands: bool | None) -> None:
    (reader,) = [reader for reader in FORMAT.readers(specs, "AutoModelForCausalLM", tried) if reader.name == "transformers"]
    assert (reader.refusal is not None) == (expands is None)
    if expands is not None:
        assert ("CompressedTensorsConfig(dequantize=True)" in reader.code) == expands


def test_shapes_that_fast_kernels_refuse() -> None:
    def noted(scheme: str, out_features: int, in_features: int) -> bool:
        return any("not multiples of" in note for note in FORMAT.notes([spec(scheme, shape=(out_features, in_features))]))

    assert not noted("w4a16-g64", 64, 128)
    assert noted("w4a16-g64", 64, 192)
    assert noted("w4a16-g64", 96, 128)
    assert not noted("w8a8", 16, 32)
    assert noted("w8a8", 24, 32)


def test_lines_that_a_person_types_next(ptq: Ptq, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"transformers": "5.23.0", "compressed-tensors": "0.17.0", "vllm": "0.30.0"}
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed.get(name) or known(name))
    shown = ptq("quantize", workshop / "model", "--algo", "rtn", "--wbits", "3", "--group-size", "32", "--output", tmp_path / "o t").out
    folder = f"'{tmp_path}/o t'"
    assert re.search(f"measure it +ptq eval {re.escape(folder)}\n", shown)
    assert re.search(f'let it speak +ptq generate {re.escape(folder)} "text"\n', shown)
    python = re.escape(f'model = AutoModelForCausalLM.from_pretrained("{tmp_path}/o t")')
    assert re.search(f"in transformers +{python}   # first: pip install 'compressed-tensors>=0.18'\n", shown)
    assert re.search(f"in vLLM +vllm serve {re.escape(folder)}\n", shown)


def test_a_folder_whose_name_begins_with_a_dash_is_no_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_text(Path("-small")) == path_text(tmp_path / "-small") == "./-small"
    assert path_text(tmp_path / "small") == "small"


def test_the_extra_has_what_transformers_needs() -> None:
    (extra,) = re.findall(r"^transformers = (\[.*?\])", (Path(__file__).parents[2] / "pyproject.toml").read_text(), flags=re.MULTILINE)
    (reader,) = [reader for reader in FORMAT.readers([spec("w3a16-g128")], "AutoModelForCausalLM", []) if reader.name == "transformers"]
    assert reader.needs == ("transformers", *json.loads(extra))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("flags", [("--algo", "rtn", "--group-size", "32"), ("--algo", "rtn", "--group-size", "32", "--asym")])
def test_the_card_tells_code_that_works(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    folder = quantized(workshop, tmp_path / "out", *flags)
    card = (folder / CARD_NAME).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    found: dict[str, object] = {}
    exec(code.replace("path/to/this/folder", str(folder)), found)
    assert isinstance(found["model"], PreTrainedModel)
    assert "ptq eval path/to/this/folder" in card


def test_the_card_says_what_was_done(workshop: Path, tmp_path: Path) -> None:
    flags = ("--nsamples", "4", "--seqlen", "32", "--seed", "7", "--calib", str(workshop / "text.txt"), "--group-size", "32")
    folder = quantized(workshop, tmp_path / "out", *flags, "--ignore", "q_proj|k_proj|v_proj", "--wbits", "3")
    card = (folder / CARD_NAME).read_text()
    for line in (
        "| algorithm | gptq |",
        "| linears | w3a16-g32 x 8 |",
        "| calibration | 4 windows of 32 tokens from text.txt, seed 7 |",
        "`model.layers.0.self_attn.q_proj` (ignored)",
        "| made with | ptqcli ",
        "In vLLM (`pip install 'vllm>=0.25'`):",
        "By relative output error",
    ):
        assert line in card
    assert yaml.safe_load(re.sub("^    ", "", card.partition("## Recipe\n\n")[2], flags=re.MULTILINE))["wbits"] == 3
    assert len(re.findall(r"^\| `model\.layers", card, flags=re.MULTILINE)) == 5


def test_the_front_matter_is_what_the_hub_wants(workshop: Path, tmp_path: Path) -> None:
    from_hub = quantized(workshop, tmp_path / "hub", model="models--some-owner--some--model/snapshots/0123abc")
    local = quantized(workshop, tmp_path / "local")
    tags = ["ptqcli", "quantized", "compressed-tensors", "rtn", "w4a16-g32"]
    carried = {"license": "other", "license_name": "some-licence"}
    assert front_matter(local) == {"library_name": "transformers", **carried, "tags": tags}
    base = {"base_model": "some-owner/some--model", "base_model_relation": "quantized"}
    assert front_matter(from_hub) == {**base, "library_name": "transformers", **carried, "tags": tags}


def test_the_card_is_the_same_wherever_it_is_made(workshop: Path, tmp_path: Path) -> None:
    flags = ("--nsamples", "2", "--seqlen", "32", "--group-size", "32", "--calib")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(workshop / "model", elsewhere / "model")
    shutil.copy(workshop / "text.txt", elsewhere)
    first = quantized(workshop, tmp_path / "a", *flags, str(workshop / "text.txt"))
    second = quantized(elsewhere, tmp_path / "b", *flags, str(elsewhere / "text.txt"))
    assert (first / CARD_NAME).read_bytes() == (second / CARD_NAME).read_bytes()
    assert not re.search(r"/(tmp|home|root|work)\b", (first / CARD_NAME).read_text())


def test_a_checkpoint_with_its_card_is_replaced(workshop: Path, tmp_path: Path) -> None:
    folder = quantized(workshop, tmp_path / "out")
    quantized(workshop, folder, "--algo", "rtn", "--wbits", "8", "--group-size", "32", "--overwrite")
    assert "w8a16-g32" in (folder / CARD_NAME).read_text()
