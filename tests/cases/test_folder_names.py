"""Kind: names that leave out what differs. The default output folder says the scheme of the linears and the options of the algorithm.

Two runs that write different numbers have different names, or the second is refused with what differs between the two requests.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commandline import Ptq, one_line
from tiny import make_model, write_text

SHORT = ("--calib", "text.txt", "--nsamples", "2", "--seqlen", "16")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "model", num_hidden_layers=1)
    write_text(folder / "text.txt")
    (folder / "other.txt").write_text((folder / "text.txt").read_text()[::-1])
    return folder


def named(answer: object) -> str:
    found = re.search(r"^output +(.+)$", answer.out + answer.err, flags=re.MULTILINE)  # type: ignore[attr-defined]
    assert found, answer
    return found[1]


@pytest.mark.parametrize(
    "flags, name",
    [
        ("", "model-gptq-w4a16"),  # widths of 64 and 128 columns, so groups of either
        ("--group-size 64", "model-gptq-w4a16-g64"),
        ("--group-size 64 --asym", "model-gptq-w4a16-g64-asym"),
        ("--group-size 64 --scale-search minmax", "model-gptq-w4a16-g64-scale-search-minmax"),
        ("--group-size 64 --scale-search auto", "model-gptq-w4a16-g64"),
        ("--group-size 64 --scale-search mse", "model-gptq-w4a16-g64-scale-search-mse"),
        ("--group-size 64 --damp 0.1 --no-act-order", "model-gptq-w4a16-g64-damp-0.1-no-act-order"),
        ("--algo awq --no-awq-clip --group-size 64", "model-awq-w4a16-g64-no-awq-clip"),
        ("--algo smoothquant --smooth-alpha auto", "model-smoothquant-w8a8-smooth-alpha-auto"),
        ("--algo smoothquant --smooth-level O3", "model-smoothquant-w8a8-tensor-static"),
        ("--group-size 64 --override down_proj:bits=8", "model-gptq-w4a16-g64-mixed"),
        ("--override down_proj:bits=8,asym", "model-gptq-w4a16-mixed"),
        ("--group-size 64 --ignore down_proj", "model-gptq-w4a16-g64-mixed"),
    ],
)
def test_what_differs_is_in_the_name(ptq: Ptq, at_work: Path, flags: str, name: str) -> None:
    assert named(ptq("quantize", "model", "--dry-run", *SHORT, *flags.split())) == name


@pytest.mark.parametrize(
    "flags, told",
    [
        (("--calib", "other.txt", "--nsamples", "2", "--seqlen", "16"), 'calib "text.txt", not "other.txt"'),
        ((*SHORT, "--seed", "1", "--no-sequential"), "sequential true, not false; seed 0, not 1"),
        ((*SHORT[:2], "--nsamples", "3", "--seqlen", "32", "--seed", "2", "--no-sequential"), "and 1 more"),
    ],
)
def test_the_same_name_from_another_request_is_refused_with_what_differs(
    ptq: Ptq, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "other.txt"):
        (tmp_path / name).symlink_to(workshop / name)
    command = ("quantize", workshop / "model", "--group-size", "64")
    assert ptq(*command, *SHORT).code == 0
    same = one_line(ptq(*command, *SHORT))
    assert "already exists; choose another --output" in same
    other = ptq(*command, *flags)
    assert other.code == 2
    assert "already exists, from another request" in one_line(other)
    assert told in one_line(other)
    assert ptq(*command, *flags, "--overwrite").code == 0


@pytest.mark.parametrize("inside", ["", "below"])
def test_from_inside_the_model_folder_the_output_is_beside_it(
    ptq: Ptq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    make_model(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "model" / inside).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "model" / inside)
    before = sorted((tmp_path / "model").iterdir())
    assert ptq("quantize", ".." if inside else ".", "--algo", "rtn").code == 0
    assert (tmp_path / "model-rtn-w4a16" / "config.json").is_file()
    assert sorted((tmp_path / "model").iterdir()) == before


def test_a_damaged_report_in_the_way_is_told(ptq: Ptq, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model-rtn-w4a16"
    folder.mkdir()
    for recipe in ("[]", '{"options": 3}', '{"options": {"rtn": 4}}', "null"):
        (folder / "ptq_report.json").write_text(f'{{"source": null, "ptqcli": "0", "layers": [], "recipe": {recipe}}}')
        answer = ptq("quantize", workshop / "model", "--algo", "rtn")
        assert answer.code in (1, 2), answer
        assert re.search("already exists, from another request|no report of ptq quantize", one_line(answer))
