"""``ptq convert``: the same numbers in another format, or a refusal by name; and what is lost where it is asked to round anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq, one_line
from packed import TOKENS
from tiny import make_model, write_text

import ptqcli
from ptqcli.checkpoint.gguf_file import GGUFFile
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import UsageError
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.pipeline.card import write_measured
from ptqcli.pipeline.output import check_output
from ptqcli.pipeline.report import LOGS, REPORT_NAME, read_report
from ptqcli.runtime import load_quantized

DEMO = Path(ptqcli.__file__).parent / "demo"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one model, in schemes that some formats hold and others do not."""
    folder = tmp_path_factory.mktemp("shop")
    make_model(folder / "model", attention_bias=True, dtype=torch.bfloat16)
    write_text(folder / "text.txt")
    for name, options in {
        "w4": {"wbits": 4, "group_size": 32},
        "w4-asym": {"wbits": 4, "group_size": 32, "symmetric": False},
        "w3": {"wbits": 3, "group_size": 32},
        "mixed": {"wbits": 4, "group_size": 32, "overrides": [{"pattern": "down_proj", "bits": 8}]},
        "adapted": {"wbits": 3, "group_size": 32, "adapter_rank": 4},
    }.items():
        ptqcli.quantize(
            folder / "model", output=folder / name, algo="rtn", calib=str(folder / "text.txt"), nsamples=2, seqlen=32, **options
        )
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Everything in a checkpoint but what tells of the run."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in (REPORT_NAME, "README.md", *LOGS)
    }


def numbers(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Codes, scales and zero points of every linear."""
    packed = open_checkpoint(folder)
    found = {name: packed.weight(name) for name in packed.schemes}
    return {name: (weight.scheme, weight.codes, weight.scale, weight.zero) for name, weight in found.items()}


@pytest.mark.parametrize(
    ("name", "to"), [("w4", "gptq"), ("w4", "gptq_v2"), ("w4-asym", "gptq_v2"), ("w3", "gptq"), ("w4", "awq"), ("w4-asym", "awq")]
)
def test_there_and_back_every_byte_is_what_it_was(shop: Path, tmp_path: Path, name: str, to: str) -> None:
    there = ptqcli.convert(shop / name, to, output=tmp_path / "there")
    back = ptqcli.convert(tmp_path / "there", "compressed-tensors", output=tmp_path / "back")
    again = ptqcli.convert(tmp_path / "back", to, output=tmp_path / "again")
    assert bytes_of(tmp_path / "back") == bytes_of(shop / name)
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "there")
    assert (there.errors, back.errors, again.errors) == ({}, {}, {})
    assert json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]["quant_method"] == to.removesuffix("_v2")


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_the_model_says_the_same(shop: Path, tmp_path: Path, to: str) -> None:
    ptqcli.convert(shop / "w4", to, output=tmp_path / "there")
    with torch.no_grad():
        before, after = (load_quantized(folder)(TOKENS).logits for folder in (shop / "w4", tmp_path / "there"))
    assert torch.equal(before, after)


def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        ptqcli.convert(shop / "w3", "awq", output=tmp_path / "there")
    assert "awq does not hold model.layers.0.self_attn.q_proj as it is" in str(caught.value)
    assert "--requantize SCHEME rounds such linears anew" in str(caught.value)
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(UsageError, match=r"awq does not hold .* in w8a16-g32 either: .*; name another scheme"):
        ptqcli.convert(shop / "w3", "awq", output=tmp_path / "there", requantize="w8a16-g32")
    with pytest.raises(UsageError, match="is compressed-tensors already; name another format with --to"):
        ptqcli.convert(shop / "w3", "compressed-tensors", output=tmp_path / "there")
    with pytest.raises(UsageError, match="format 'agptq' is unknown"):
        ptqcli.convert(shop / "w3", "agptq", output=tmp_path / "there")
    assert [*tmp_path.iterdir()] == []


def test_only_what_has_to_be_is_rounded_anew_and_its_loss_is_told(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="awq has one group size for all linears"):
        ptqcli.convert(shop / "mixed", "awq", output=tmp_path / "there", requantize="w4a16-g64")
    done = ptqcli.convert(shop / "mixed", "awq", output=tmp_path / "there", requantize="w4a16-g32")
    before, after = numbers(shop / "mixed"), numbers(tmp_path / "there")
    anew = {name for name in before if name.endswith("down_proj")}
    assert set(done.errors) == anew
    for name, (scheme, *tensors) in after.items():
        if name not in anew:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors, before[name][1:], strict=True))
            continue
        assert str(scheme) == "w4a16-g32"
        values = [open_checkpoint(folder).weight(name).dequantize(torch.float64) for folder in (shop / "mixed", tmp_path / "there")]
        assert done.errors[name] == pytest.approx(float((values[1] - values[0]).norm() / values[0].norm()), rel=1e-4)
    assert 0.01 < done.error < 0.2
    report = read_report(tmp_path / "there")
    assert report is not None
    assert report["converted"]["relative_errors"] == done.errors
    assert {layer["scheme"] for layer in report["layers"]} == {"w4a16-g32"}
    stored = sum(SafetensorsFolder(tmp_path / "there").nbytes(name) for name in SafetensorsFolder(tmp_path / "there").names)
    assert done.bytes_after == report["bytes_after"] == stored


def test_inspect_shows_both_errors_of_what_was_rounded_anew(ptq: Ptq, shop: Path, tmp_path: Path) -> None:
    done = ptqcli.convert(shop / "mixed", "awq", output=tmp_path / "there", requantize="w4a16-g32")
    shutil.copytree(shop / "mixed", tmp_path / "foreign")
    (tmp_path / "foreign" / REPORT_NAME).unlink()
    ptqcli.convert(tmp_path / "foreign", "awq", output=tmp_path / "of another program", requantize="w4a16-g32")
    ptqcli.convert(tmp_path / "there", "compressed-tensors", output=tmp_path / "and on")
    first = {layer["name"]: layer["relative_error"] for layer in read_report(shop / "mixed")["layers"]}  # type: ignore[index]
    for name, known in (("there", first), ("and on", first), ("of another program", {})):
        layers = json.loads(ptq("inspect", tmp_path / name, "--json").out)["layers"]
        assert {layer["name"]: layer["relative_error"] for layer in layers if "relative_error" in layer} == known
        assert {layer["name"]: layer["rounded_anew"] for layer in layers if layer.get("rounded_anew") is not None} == done.errors
        shown = [line for line in ptq("inspect", tmp_path / name).out.splitlines() if "then rounded anew" in line]
        assert len(shown) == 2
        assert f"at an error of {done.errors['model.layers.0.mlp.down_proj']:.4f} of its weights" in shown[0]


@pytest.mark.parametrize(
    "converted", [[], "gptq", {"relative_errors": []}, {"relative_errors": {"m": "0.1"}}, {"relative_errors": {"m": 1e999}}]
)
def test_a_report_that_tells_of_no_conversion_is_damaged(ptq: Ptq, shop: Path, tmp_path: Path, converted: Any) -> None:
    shutil.copytree(shop / "w4", tmp_path / "w4")
    report = read_report(shop / "w4")
    (tmp_path / "w4" / REPORT_NAME).write_text(json.dumps({**(report or {}), "converted": converted}))
    assert "which no report of ptq quantize says" in one_line(ptq("inspect", tmp_path / "w4"))


def test_the_card_tells_of_it_and_how_the_new_format_is_loaded(shop: Path, tmp_path: Path) -> None:
    ptqcli.convert(shop / "w4", "gptq", output=tmp_path / "there")
    card = (tmp_path / "there" / "README.md").read_text()
    assert "It was converted by ptqcli from compressed-tensors to gptq, every code, scale and zero point as it was." in card
    assert "- gptq\n" in card
    assert "- compressed-tensors\n" not in card
    assert "GPTQModel.load(" in card
    assert card.count("## Loading it") == 1
    assert "## Worst layers" in card
    ptqcli.convert(tmp_path / "there", "compressed-tensors", output=tmp_path / "back")
    card = (tmp_path / "back" / "README.md").read_text()
    assert card.count("converted by ptqcli") == 1
    assert "from gptq to compressed-tensors" in card


def test_a_checkpoint_of_another_program_gets_a_report_and_a_card(shop: Path, tmp_path: Path) -> None:
    ptqcli.convert(shop / "w4", "gptq", output=tmp_path / "there")
    for name in (REPORT_NAME, "README.md"):
        (tmp_path / "there" / name).unlink()
    ptqcli.convert(tmp_path / "there", "awq", output=tmp_path / "own")
    card = (tmp_path / "own" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "converted by ptqcli from gptq to awq" in card
    check_output(tmp_path / "own", None, overwrite=True)  # ours to replace
    ptqcli.convert(tmp_path / "there", "compressed-tensors", output=tmp_path / "own", overwrite=True)
    assert open_checkpoint(tmp_path / "own").format.name == "compressed-tensors"


def test_an_adapter_goes_along_with_codes_that_stay(shop: Path, tmp_path: Path) -> None:
    ptqcli.convert(shop / "adapted", "gptq", output=tmp_path / "there")
    with torch.no_grad():
        before, after = (load_quantized(folder, adapter=True)(TOKENS).logits for folder in (shop / "adapted", tmp_path / "there"))
    assert torch.equal(before, after)
    ptqcli.convert(shop / "adapted", "awq", output=tmp_path / "anew", requantize="w4a16-g32")
    assert not (tmp_path / "anew" / "adapter").exists()


def test_groups_that_move_stay_where_a_format_has_an_index(shop: Path, tmp_path: Path) -> None:
    options = {"calib": str(shop / "text.txt"), "nsamples": 4, "seqlen": 32, "gptq": {"static_groups": False}}
    ptqcli.quantize(shop / "model", output=tmp_path / "moving", algo="gptq", wbits=4, group_size=32, format="gptq", **options)
    assert any(open_checkpoint(tmp_path / "moving").weight(name).g_idx is not None for name in numbers(tmp_path / "moving"))
    with pytest.raises(UsageError, match=r"compressed-tensors does not hold model.layers.0.self_attn.q_proj as it is: .*groups"):
        ptqcli.convert(tmp_path / "moving", "compressed-tensors", output=tmp_path / "there")
    ptqcli.convert(tmp_path / "moving", "gptq_v2", output=tmp_path / "there")
    ptqcli.convert(tmp_path / "there", "gptq", output=tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "moving")
    done = ptqcli.convert(tmp_path / "moving", "compressed-tensors", output=tmp_path / "anew", requantize="w4a16-g32")
    assert done.error < 0.2
    assert set(done.errors) == {name for name, (scheme, *_) in numbers(tmp_path / "anew").items() if str(scheme) == "w4a16-g32"}


def test_an_interruption_leaves_nothing(shop: Path, tmp_path: Path) -> None:
    class Interrupts(ptqcli.pipeline.progress.NoProgress):  # type: ignore[misc, name-defined]
        def step(self, done: int, total: int, text: str) -> None:
            if done == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptqcli.convert(shop / "w4", "gptq", output=tmp_path / "there", progress=Interrupts())
    assert [*tmp_path.iterdir()] == []


def test_the_command(ptq: Ptq, shop: Path, tmp_path: Path) -> None:
    answer = ptq("convert", shop / "mixed", "--to", "awq", "--requantize", "w4a16-g32", "--output", tmp_path / "there")
    assert answer.code == 0, answer.err
    assert "compressed-tensors to awq" in answer.out
    assert "of the weights, mean over 2 linears rounded anew" in answer.out
    answer = ptq("convert", shop / "w4", "--to", "gptq", "--output", tmp_path / "json", "--json")
    said = json.loads(answer.out)
    assert (said["format"], said["relative_error"], said["linears"]) == ("gptq", None, 14)
    again = ptq("convert", shop / "w4", "--to", "gptq", "--output", tmp_path / "json")
    assert again.code == 2
    assert "already exists" in one_line(again)
    assert "model.layers.0.mlp.down_proj" in one_line(ptq("convert", shop / "mixed", "--to", "awq", "--output", tmp_path / "no"))
    assert "is not quantized" in one_line(ptq("convert", shop / "model", "--to", "awq", "--output", tmp_path / "no"))


def test_scales_that_the_format_stores_shorter_are_not_cut_without_a_word(tmp_path: Path) -> None:
    make_model(tmp_path / "model")  # float32
    ptqcli.quantize(tmp_path / "model", output=tmp_path / "w4", algo="rtn", wbits=4, group_size=32)
    with pytest.raises(UsageError, match="its scales are float32, and gptq stores float16, which does not hold them"):
        ptqcli.convert(tmp_path / "w4", "gptq", output=tmp_path / "there")
    done = ptqcli.convert(tmp_path / "w4", "gptq", output=tmp_path / "there", requantize="w4a16-g32")
    assert len(done.errors) == done.linears
    assert 0 < done.error < 2**-11, "the codes stay"


# What is measured, in the card


def test_numbers_go_into_the_card_once(ptq: Ptq, shop: Path, tmp_path: Path) -> None:
    ptqcli.convert(shop / "w4", "gptq", output=tmp_path / "there")
    before = (tmp_path / "there" / "README.md").read_text()
    for _ in range(2):
        answer = ptq("eval", tmp_path / "there", "--ppl", shop / "text.txt", "--seqlen", 32, "--write-card", "--json")
        assert answer.code == 0, answer.err
        card = (tmp_path / "there" / "README.md").read_text()
    [result] = json.loads(answer.out)["results"]
    row = (
        f"| text.txt | {result['tokens']:,} | {result['perplexity']:.4f} | {result['baseline_perplexity']:.4f} | {result['mean_kl']:.5f} |"
    )
    assert card.count("## Measured") == card.count(row) == 1
    assert str(tmp_path) not in card
    begin = card.index("## Measured")
    assert card[:begin] + card[card.index("## Worst layers") :] == before
    assert not (tmp_path / "there" / "README.md.tmp").exists()


@pytest.mark.parametrize("adapter", [False, True])
def test_what_was_measured_goes_where_codes_are_new_and_stays_where_they_stay(shop: Path, tmp_path: Path, adapter: bool) -> None:
    shutil.copytree(shop / "adapted", tmp_path / "measured")
    result = {"bos": False, "seqlen": 32, "stride": 32, "text": "text.txt", "tokens": 64, "perplexity": 77.125}
    write_measured(tmp_path / "measured", [result], adapter)
    ptqcli.convert(tmp_path / "measured", "gptq", output=tmp_path / "same")
    ptqcli.convert(tmp_path / "measured", "awq", output=tmp_path / "anew", requantize="w4a16-g32")
    same, anew = ((tmp_path / name / "README.md").read_text() for name in ("same", "anew"))
    titles = [line for line in same.splitlines() if line.startswith("## ")]
    measured = "## Measured, with its adapter" if adapter else "## Measured"
    assert titles == ["## Loading it", "## Its adapter", measured, "## Worst layers", "## Notes", "## Recipe"]
    assert "77.1250" in same
    assert [line for line in anew.splitlines() if line.startswith("## ")] == ["## Loading it", "## Notes", "## Recipe"]
    assert "77.1250" not in anew
    for card, name, scheme, tags in ((same, "same", "w3a16-g32", "gptq w3a16-g32"), (anew, "anew", "w4a16-g32", "awq w4a16-g32")):
        front, title = card.split("---\n")[1], card.split("\n# ")[1].splitlines()[0]
        report = read_report(tmp_path / name) or {}
        assert front.split("tags:\n")[1].splitlines() == [f"- {tag}" for tag in ("ptqcli", "quantized", "rtn", *tags.split())]
        assert title == f"model, {scheme}"
        assert f"| linears | {scheme} x 14 |" in card
        assert f"| bits per weight | {report['bits_per_weight']:.3f} in them, everything stored for them counted |" in card
        assert f"| size | {report['bytes_before'] / 1e6:,.1f} MB before, {report['bytes_after'] / 1e6:,.1f} MB after |" in card


def test_a_card_of_somebody_else_is_left_alone(ptq: Ptq, shop: Path, tmp_path: Path) -> None:
    ptqcli.convert(shop / "w4", "gptq", output=tmp_path / "there")
    (tmp_path / "there" / "README.md").write_text("# Mine\n")
    answer = ptq("eval", tmp_path / "there", "--ppl", shop / "text.txt", "--write-card")
    assert answer.code == 2
    assert "is no model card of ptqcli; leave --write-card out" in one_line(answer)
    assert (tmp_path / "there" / "README.md").read_text() == "# Mine\n"


# To GGUF and back


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the demo model, whose tokenizer is one that llama.cpp reads."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("demo")
    for name, symmetric in (("w4", True), ("w4-asym", False)):
        ptqcli.quantize(DEMO, output=folder / name, algo="rtn", wbits=4, group_size=32, symmetric=symmetric)
    return folder


def test_codes_go_to_gguf_and_back(ptq: Ptq, demo: Path, tmp_path: Path) -> None:
    for number, words in enumerate(
        [
            ("convert", demo / "w4", "--to", "gguf", "--output", tmp_path / "there.gguf"),
            ("convert", tmp_path / "there.gguf", "--to", "compressed-tensors", "--output", tmp_path / "back"),
            ("convert", tmp_path / "back", "--to", "gguf", "--output", tmp_path / "again.gguf"),
        ]
    ):
        answer = ptq(*words)
        assert answer.code == 0, answer.err
        if number != 1:
            assert "Q4_0 x 28" in answer.out
    first, second = (GGUFFile(tmp_path / f"{name}.gguf") for name in ("there", "again"))
    assert set(first.stored) == set(second.stored)
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.stored)
    before, after = numbers(demo / "w4"), numbers(tmp_path / "back")
    for name, (scheme, codes, scale, zero) in before.items():
        assert (scheme, scale.float().tolist()) == (after[name][0], after[name][2].float().tolist())
        assert torch.equal(codes, after[name][1])
        assert torch.equal(zero, after[name][3])


def test_a_plain_model_goes_to_gguf_in_a_mix(ptq: Ptq, demo: Path, tmp_path: Path) -> None:
    answer = ptq("convert", DEMO, "--to", "gguf", "--gguf-type", "q8_0", "--output", tmp_path / "model.gguf", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["types"] == {"F32": 9, "Q8_0": 29}
    exported = ptqcli.convert(DEMO, "gguf", output=tmp_path / "again.gguf", gguf_type="q8_0")
    assert exported.types == {"F32": 9, "Q8_0": 29}
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    with pytest.raises(UsageError, match="gguf_type goes with gguf, not with gptq"):
        ptqcli.convert(demo / "w4", "gptq", output=tmp_path / "no", gguf_type="q8_0")
    assert "GGUF type 'q9' is unknown" in one_line(ptq("convert", DEMO, "--to", "gguf", "--gguf-type", "q9"))


def test_what_cannot_be_a_gguf_file_or_come_from_one_is_told(ptq: Ptq, demo: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.gguf"
    taken.write_bytes(b"not ours")
    refused = ptq("convert", demo / "w4", "--to", "gguf", "--output", taken, "--overwrite")
    assert "was not written by ptqcli and will not be replaced" in one_line(refused)
    assert taken.read_bytes() == b"not ours"
    ours = tmp_path / "ours.gguf"
    beside = shutil.copytree(demo / "w4", tmp_path / "w4")
    assert ptq("convert", beside, "--to", "gguf", "--output", beside / "beside.gguf").code == 0
    assert ptq("inspect", beside, "--json").out == ptq("inspect", demo / "w4", "--json").out.replace(str(demo / "w4"), str(beside))
    assert ptq("convert", demo / "w4-asym", "--to", "gguf", "--output", ours).code == 0
    assert "already exists" in one_line(ptq("convert", demo / "w4", "--to", "gguf", "--output", ours))
    decoded = one_line(ptq("convert", ours, "--to", "gptq", "--output", tmp_path / "no"))
    assert "gptq holds integers with free scales, not blocks of q4_1" in decoded
    assert "--requantize SCHEME rounds such linears anew" in decoded
    assert ptq("convert", demo / "w4", "--to", "gguf", "--output", ours, "--overwrite").code == 0
    assert "is a GGUF file already" in one_line(ptq("convert", ours, "--to", "gguf"))
    assert "--gguf-type goes with --to gguf" in one_line(ptq("convert", demo / "w4", "--to", "gptq", "--gguf-type", "q8_0"))
    assert "--requantize does not go with --to gguf" in one_line(ptq("convert", demo / "w4", "--to", "gguf", "--requantize", "w4a16-g32"))
    assert "something.gguf" in one_line(ptq("convert", demo / "w4", "--to", "gguf", "--output", tmp_path / "folder"))
