"""`ptq quantize --target-bits` and `--target-size`, and `ptq sensitivity`: from the request to the checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq, one_line
from gguf_models import make_case
from mixtures import MIXTURES
from safetensors import safe_open
from test_encoders import make_encoder
from tiny import ARCHITECTURES, byte_tokenizer, make_model, token_ids, write_text
from transformers import AutoModelForCausalLM

import ptqcli
from ptqcli.cli.sensitivity import PICTURES
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import find_format
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.pipeline import budget
from ptqcli.pipeline.report import read_report
from ptqcli.sensitivity import picture
from ptqcli.sensitivity.kl import KL
from ptqcli.sensitivity.table import SensitivityTable, read_table

CANDIDATES = "w2g32,w3g32,w4g32,w8"  # of a model in float32: 3, 4, 5 and 8.5 bits with their scales
SHORT: dict[str, Any] = {"nsamples": 6, "seqlen": 32}
FLAGS = ("--calib", "text.txt", "--nsamples", "6", "--seqlen", "32", "--candidates", CANDIDATES)
DEMO = Path(ptqcli.__file__).parent / "demo"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "model")
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ptqcli"


def quantized(workshop: Path, output: Path, **changes: Any) -> Any:
    asked = {"algo": "rtn", "calib": str(workshop / "text.txt"), "candidates": CANDIDATES, **SHORT, **changes}
    return ptqcli.quantize(workshop / "model", output=output, **asked)


def tensor_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("bits", [3.4, 4.2, 5.0])
def test_the_average_keeps_the_target(workshop: Path, tmp_path: Path, bits: float) -> None:
    report = quantized(workshop, tmp_path / "out", target_bits=bits)
    assert bits - 0.4 < report.bits_per_weight <= bits
    assert report.bits_per_weight == pytest.approx(report.allocation.bits)
    assert len({layer.scheme for layer in report.layers}) > 1


def test_the_size_keeps_the_target_to_the_byte(workshop: Path, tmp_path: Path) -> None:
    some = quantized(workshop, tmp_path / "first", target_bits=4.0)
    assert some.bytes_after == tensor_bytes(tmp_path / "first")
    exact = quantized(workshop, tmp_path / "exact", target_size=some.bytes_after)
    assert tensor_bytes(tmp_path / "exact") == some.bytes_after
    less = quantized(workshop, tmp_path / "less", target_size=some.bytes_after - 1)
    assert tensor_bytes(tmp_path / "less") < some.bytes_after
    assert less.allocation.expected_loss > exact.allocation.expected_loss


def test_what_cannot_be_kept_names_the_smallest(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "measure_all", None)  # it is refused before anything is measured
    with pytest.raises(UsageError, match=r"a target of 2 bits cannot be kept: the smallest .* is 3\.\d+ bits a weight") as error:
        quantized(workshop, tmp_path / "out", target_bits=2)
    smallest = re.findall(r"is (\d\.\d+) bits", str(error.value))[0]
    with pytest.raises(
        UsageError, match=r"a target of 1,000 bytes cannot be kept: the smallest .* is [\d,]+ bytes, of which [\d,]+ are not"
    ):
        quantized(workshop, tmp_path / "out", target_size=1000)
    assert float(smallest) == pytest.approx(3, abs=0.03)  # shapes are stored, too
    assert not (tmp_path / "out").exists()


def test_a_mixed_checkpoint_loads_in_transformers(workshop: Path, tmp_path: Path) -> None:
    report = quantized(workshop, tmp_path / "out", target_bits=4.6, algo="gptq")
    schemes = {layer.name: layer.scheme for layer in report.layers}
    assert len(set(schemes.values())) > 1
    for block in (0, 1):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        assert len({schemes[f"{attention}.{name}_proj"] for name in "qkv"}) == 1
        assert len({schemes[f"{mlp}.{name}_proj"] for name in ("gate", "up")}) == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(schemes)  # exact names, each once
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    ids = token_ids()
    with torch.no_grad():
        ours = ptqcli.load_quantized(tmp_path / "out", dtype=torch.float32)(ids).logits
        assert torch.allclose(model(ids).logits, ours, atol=1e-4)
    chosen = find_format("compressed-tensors")
    assert chosen.fused_refusal({name: open_checkpoint(tmp_path / "out").schemes[name] for name in list(schemes)[:3]}) is None


def test_the_report_tells_how_it_came_about(workshop: Path, tmp_path: Path) -> None:
    report = quantized(workshop, tmp_path / "out", target_bits=5.0, sensitivity="kl")
    stored = read_report(tmp_path / "out")
    assert stored is not None
    told = stored["allocation"]
    assert (told["target"], told["method"], told["unit"], told["kept"]) == ("5 bits", "kl", "nats a token", None)
    assert told["candidates"] == ["w2a16-g32", "w3a16-g32", "w4a16-g32", "w8a16"]
    assert {each["scheme"] for each in told["uniform"]} == {"w2a16-g32", "w3a16-g32"}
    assert told["divergence"] < min(each["divergence"] for each in told["uniform"])
    chosen = {name: group["scheme"] for group in told["groups"] for name in [group["name"].partition("|")[0]]}
    written = {layer["name"]: layer["scheme"] for layer in stored["layers"]}
    assert all(written[name].startswith(scheme) for name, scheme in chosen.items())
    assert report.allocation.verdict() in (tmp_path / "out" / "README.md").read_text()
    wrong = json.loads((tmp_path / "out" / "ptq_report.json").read_text())
    wrong["allocation"]["groups"][0]["losses"] = "none"
    (tmp_path / "out" / "ptq_report.json").write_text(json.dumps(wrong))
    with pytest.raises(PTQError, match="allocation is"):
        read_report(tmp_path / "out")


def table_of(workshop: Path, file: Path, change: Any = None) -> SensitivityTable:
    """A table of the model, changed and written."""
    table = ptqcli.measure_sensitivity(workshop / "model", "output", candidates=CANDIDATES, calib=str(workshop / "text.txt"), **SHORT)
    if change is not None:
        change(table)
    table.write(file)
    return table


def test_mixed_schemes_that_are_worse_are_not_shipped(workshop: Path, tmp_path: Path) -> None:
    """The table says the opposite of what is true, so that most bits go where they are needed least."""

    def turned(table: SensitivityTable) -> None:
        for number, group in enumerate(table.groups):
            group.losses["output"][:] = [8.0, 7.9, 7.8, 0.0] if number % 2 else [0.0, 1e-9, 1e-9, 1e-9]

    table_of(workshop, tmp_path / "wrong.json", turned)
    report = quantized(workshop, tmp_path / "out", target_bits=5.6, sensitivity=str(tmp_path / "wrong.json"))
    assert {layer.scheme for layer in report.layers} == {"w4a16-g32"}
    assert report.allocation.kept == "w4a16-g32"
    assert "w4a16-g32 is written for all linears, NOT the mixed schemes" in report.allocation.verdict()
    assert report.bits_per_weight <= 5.6


def test_a_table_in_a_file_takes_the_place_of_measuring(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table_of(workshop, tmp_path / "table.json")
    measured = quantized(workshop, tmp_path / "one", target_bits=4.2, sensitivity="output")
    monkeypatch.setattr(budget, "measure_all", None)
    read = quantized(workshop, tmp_path / "other", target_bits=4.2, sensitivity=str(tmp_path / "table.json"))
    assert read.layers == measured.layers
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "other" / "model.safetensors").read_bytes()


def other_linears(table: SensitivityTable) -> None:
    table.groups[0].linears[0] = "model.layers.0.self_attn.x_proj"


def other_candidates(table: SensitivityTable) -> None:
    table.candidates[0] = "w5a16-g32"


def other_sizes(table: SensitivityTable) -> None:
    table.groups[0].losses["output"][1] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_linears, "is not of the linears that are to be quantized here (model.layers.0.self_attn.q_proj)"),
        (other_candidates, "has the candidates w5a16-g32,w3a16-g32,w4a16-g32,w8a16, not w2a16-g32,"),
        (other_sizes, "output tells of other candidates than it can have in this format"),
    ],
)
def test_a_table_of_something_else_is_refused(workshop: Path, tmp_path: Path, change: Any, message: str) -> None:
    table_of(workshop, tmp_path / "table.json", change)
    with pytest.raises(PTQError, match=re.escape(message)):
        quantized(workshop, tmp_path / "out", target_bits=4.2, sensitivity=str(tmp_path / "table.json"))


def test_the_same_request_gives_the_same_bytes(workshop: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantized(workshop, tmp_path / name, target_bits=4.2)
    for file in sorted(path.name for path in (tmp_path / "one").iterdir() if not path.name.startswith("ptq_log")):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_model_in_memory_takes_a_budget(workshop: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(workshop / "model", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked: dict[str, Any] = {"algo": "rtn", "calib": str(workshop / "text.txt"), "candidates": CANDIDATES, "target_bits": 4.2, **SHORT}
    ptqcli.quantize(model, tokenizer=byte_tokenizer(), output=tmp_path / "memory", **asked)
    ptqcli.quantize(workshop / "model", output=tmp_path / "folder", **asked)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "folder"))
    assert one == other
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_overrides_are_kept_and_counted(workshop: Path, tmp_path: Path) -> None:
    report = quantized(
        workshop,
        tmp_path / "out",
        target_bits=5.0,
        overrides=[{"pattern": "o_proj", "bits": 8}, {"pattern": r"layers\.0\.mlp", "skip": True}],
    )
    schemes = {layer.name: layer.scheme for layer in report.layers}
    assert {scheme for name, scheme in schemes.items() if "o_proj" in name} == {"w8a16-g64"}
    assert not any("layers.0.mlp" in name for name in schemes)
    assert not any("o_proj" in group.name for group in report.allocation.groups)
    assert report.bits_per_weight <= 5.0
    with pytest.raises(UsageError, match="no linear is left to choose a scheme for"):
        quantized(workshop, tmp_path / "all", target_bits=5.0, overrides=[{"pattern": "proj", "bits": 8}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "awq", "candidates": "w4g32,w4g64"}, "a budget mixes schemes: awq has one group size for all linears"),
        ({"format": "awq"}, "awq holds 4-bit weights"),
        ({"format": "awq", "candidates": None}, "awq holds 4-bit weights"),
        ({"candidates": "w4g48,w5g48", "target_bits": 6}, ""),
        ({"candidates": "w4,q6_k"}, "not blocks of q6_k"),
        ({"nsamples": 1}, "nsamples 1 is too few for a budget"),
    ],
)
def test_what_does_not_go_with_a_budget(workshop: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if not message:  # groups of 48 become 32
        assert {layer.scheme for layer in quantized(workshop, tmp_path / "out", **changes).layers} <= {"w4a16-g32", "w5a16-g32"}
        return
    with pytest.raises(UsageError, match=message):
        quantized(workshop, tmp_path / "out", **{"target_bits": 5.0, **changes})


def test_usual_candidates_are_those_that_the_format_holds(workshop: Path, tmp_path: Path) -> None:
    report = quantized(workshop, tmp_path / "out", target_bits=4.8, candidates=None, format="gptq")
    assert report.allocation.candidates == ["w2a16-g64", "w3a16-g128", "w4a16-g128", "w8a16"]
    with pytest.raises(UsageError, match=r"candidate w5a16-g32: .* not 5; give .* leave it out of --candidates"):
        quantized(workshop, tmp_path / "no", target_bits=4.8, candidates="w4g32,w5g32,w8", format="gptq")


def test_blocks_of_a_gguf_file_are_mixed_like_any_scheme(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_case(tmp_path / "model", "llama", monkeypatch, hidden_size=256, intermediate_size=320)
    report = ptqcli.quantize(
        tmp_path / "model",
        output=tmp_path / "out",
        algo="rtn",
        format="gguf",
        target_bits=4.9,
        calib=str(workshop / "text.txt"),
        **SHORT,
    )
    schemes = {layer.name.rpartition(".")[2]: layer.scheme for layer in report.layers}
    assert report.bits_per_weight <= 4.9
    assert schemes["down_proj"] in ("w4a16-g32", "q5_0", "w8a16-g32")  # 320 columns hold no super-blocks


def test_experts_of_a_block_have_one_scheme(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "mixtral", MIXTURES["mixtral"])
    make_model(tmp_path / "model", "mixtral")
    report = ptqcli.quantize(
        tmp_path / "model",
        output=tmp_path / "out",
        algo="rtn",
        target_bits=4.0,
        candidates=CANDIDATES,
        calib=str(workshop / "text.txt"),
        **SHORT,
    )
    for block in (0, 1):
        assert len({layer.scheme for layer in report.layers if f"layers.{block}.mlp.experts" in layer.name}) == 1
    assert len({layer.scheme for layer in report.layers}) > 1


def test_an_encoder_takes_a_budget(workshop: Path, tmp_path: Path) -> None:
    make_encoder(tmp_path / "model", "BertForMaskedLM")
    report = ptqcli.quantize(
        tmp_path / "model",
        output=tmp_path / "out",
        algo="rtn",
        target_bits=4.4,
        candidates=CANDIDATES,
        calib=str(workshop / "text.txt"),
        **SHORT,
    )
    assert (report.allocation.method, report.bits_per_weight <= 4.4) == ("output", True)
    with pytest.raises(UsageError, match="use --sensitivity output"):
        ptqcli.quantize(
            tmp_path / "model", output=tmp_path / "no", target_bits=4.4, sensitivity="kl", calib=str(workshop / "text.txt"), **SHORT
        )


# The command line


def test_a_dry_run_shows_the_table_and_the_run_takes_what_it_found(ptq: Ptq, at_work: Path, cache: Path) -> None:
    shown = ptq("quantize", "model", "--algo", "rtn", "--target-bits", "4.2", "--output", "dry", "--dry-run", *FLAGS)
    assert shown.code == 0, shown.err
    assert "Schemes for 4.2 bits; losses by gradient, nats a token" in shown.out
    assert re.search(r"layers\.0\.self_attn\.q_proj\|k_proj\|v_proj +w\da16", shown.out)
    assert not list(at_work.glob("dry*"))
    assert [path.name[:14] for path in cache.iterdir()] == ["sensitivities-"]
    as_json = json.loads(ptq("quantize", "model", "--algo", "rtn", "--target-bits", "4.2", "--dry-run", "--json", *FLAGS).out)
    assert as_json["allocation"]["target"] == "4.2 bits"
    made = ptq("quantize", "model", "--algo", "rtn", "--target-bits", "4.2", "--json", *FLAGS)
    report = json.loads(made.out)
    assert report["output"] == "model-rtn-4.2bit"
    assert report["allocation"] == as_json["allocation"]  # the seconds, too
    shutil.rmtree("model-rtn-4.2bit")


def test_an_ended_run_goes_on(ptq: Ptq, at_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("quantize", "model", "--algo", "rtn", "--target-bits", "4.2", "--sensitivity", "kl", "--output", tmp_path / "out", *FLAGS)
    loss, asked = KL._loss, []

    def failing(*arguments: Any) -> float:
        asked.append(arguments)
        if len(asked) == 10:
            raise PTQError("the machine is gone")
        return loss(*arguments)

    monkeypatch.setattr(KL, "_loss", staticmethod(failing))
    assert "the machine is gone" in one_line(ptq(*line))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.sensitivities.json"]
    again = ptq(*line)
    assert again.code == 0, again.err
    assert len(asked) == 10 + 8 * 4 - 2 * 4
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_sensitivity_shows_writes_and_draws(ptq: Ptq, at_work: Path) -> None:
    line = ("sensitivity", "model", "--sensitivity", "all", "--output", "losses.json", *FLAGS)
    answer = ptq(*line, "--plot", "losses.svg")
    assert answer.code == 0, answer.err
    for method in ("gradient", "kl", "hawq", "output"):
        assert f"Losses by {method}," in answer.out
        assert re.search(rf"time of {method} +[\d.]+ s on \d windows of 32 tokens", answer.out)
    assert re.search(r"gradient, kl +0\.9", answer.out)
    assert (at_work / "losses.svg").read_text().startswith("<?xml")
    table = read_table(at_work / "losses.json")
    assert table.methods == ["gradient", "kl", "hawq", "output"]
    assert "already exists; give --overwrite" in one_line(ptq(*line))
    assert "--plot losses.svg: already exists" in one_line(ptq("sensitivity", "model", "--plot", "losses.svg", *FLAGS))
    found = json.loads(ptq("sensitivity", "model", "--sensitivity", "kl", "--json", *FLAGS).out)
    assert found["groups"][3]["losses"]["kl"] == table.groups[3].losses["kl"]
    again = ptq(*line, "--overwrite", "--plot", "losses.png")
    assert again.code == 0, again.err
    assert (at_work / "losses.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("sensitivity model --sensitivity guess", 2, "sensitivity 'guess' is unknown; use gradient, kl, hawq or output"),
        ("sensitivity model --sensitivity kl,kl", 2, "sensitivity 'kl' is named twice"),
        ("sensitivity model --sensitivity x.json", 2, "is a file, and here they are measured"),
        ("sensitivity model --output losses.txt", 2, "losses are written as .json"),
        ("sensitivity model --output nowhere/losses.json", 1, "there is no folder nowhere"),
        ("sensitivity model --output model/config.json --overwrite", 1, "holds no sensitivities"),
        ("sensitivity model --plot losses.jpg", 2, "only PNG and SVG is written"),
        ("sensitivity model --candidates w4", 2, "give 2 to 16 schemes"),
        ("sensitivity model --processes 2", 2, "leave --processes out"),
        ("quantize model --target-bits 3.5 --wbits 4", 2, "leave wbits out"),
        ("quantize model --target-bits 5 --sensitivity nowhere.json --candidates w2g32,w8", 1, "nowhere.json: cannot be read"),
        ("quantize model --target-bits x", 2, "'x' is not a valid float"),
    ],
)
def test_requests_that_cannot_work(ptq: Ptq, at_work: Path, line: str, code: int, message: str) -> None:
    answer = ptq(*line.split(), *(() if "--wbits" in line else ("--calib", "text.txt", "--nsamples", "4", "--seqlen", "16")))
    assert message in one_line(answer)
    assert answer.code == code


def test_only_config_json_is_not_enough(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    shutil.copy(at_work / "model" / "config.json", tmp_path)
    answer = ptq("quantize", tmp_path, "--target-bits", "4.2", "--dry-run", *FLAGS)
    assert "a budget is shared out by what rounding the weights costs, and only config.json is there" in one_line(answer)


def test_what_stands_twice_says_the_same() -> None:
    assert PICTURES == picture.SUFFIXES


@pytest.mark.slow  # about a minute
def test_mixed_bits_beat_uniform_ones_of_their_size_on_other_text(tmp_path: Path) -> None:
    asked = {"calib": "builtin", "nsamples": 32, "seqlen": 256, "dtype": torch.float32}
    text = Path(__file__).parent.parent / "docs" / "how-it-is-built.md"  # the calibration is of another kind

    def kl(name: str, **request: Any) -> tuple[float, float]:
        report = ptqcli.quantize(DEMO, output=tmp_path / name, **asked, **request)
        [result] = ptqcli.evaluate(tmp_path / name, text, baseline=DEMO, seqlen=256)
        assert result.mean_kl is not None
        return report.bits_per_weight, result.mean_kl

    for algo in ("rtn", "gptq"):
        bits, uniform = kl(f"{algo}-uniform", algo=algo, scheme="w3a16-g128")
        for target, gain in ((bits, 1.0), (3.5, 0.6)):
            mixed_bits, mixed = kl(f"{algo}-{target}", algo=algo, target_bits=target)
            assert mixed_bits <= target
            assert mixed < gain * uniform
