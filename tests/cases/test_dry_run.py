"""Kind: a dry run that looks at half of its inputs. It opens what the run would open, refuses what the run would, and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from commandline import Ptq, one_line
from tiny import make_model, write_text

SHORT = ("--nsamples", "4", "--seqlen", "16")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "model", num_hidden_layers=1)
    write_text(folder / "text.txt", 600)
    shutil.copytree(folder / "model", folder / "no-tokenizer")
    for file in (folder / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    (folder / "binary.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "bad.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    (folder / "file").write_text("in the way")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    "command, code, message",
    [
        ("model --calib wikitxt2", 2, "no text is called 'wikitxt2'; give builtin, wikitext2, c4, pile, or the path of a file or folder"),
        ("model --calib wikitxt2", 2, "; did you mean 'wikitext2'?"),
        ("model --calib nowhere.txt", 2, "text nowhere.txt does not exist"),
        ("model --calib binary.txt", 1, "binary.txt: not UTF-8"),
        ("model --calib bad.jsonl", 1, "bad.jsonl, line 2: no text in column 'text' but int"),
        ("model --calib empty", 2, "folder empty has no text"),
        ("model --calib text.txt --nsamples 100000", 2, "and 100000 are asked for; lower that number or --seqlen, or give more text"),
        ("model --calib wikitext2 --data-dir nowhere", 2, "data folder nowhere does not exist"),
        ("no-tokenizer --calib text.txt", 1, "no-tokenizer"),
        ("model --calib text.txt --output file/below/out", 1, "cannot write there"),
        ("model --calib text.txt --output file", 2, "file: is a file"),
        ("model --calib text.txt --output text.txt/out", 1, "cannot write there"),
        ("model --calib text.txt --output model", 2, "is the model itself"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(ptq: Ptq, at_work: Path, command: str, code: int, message: str) -> None:
    for dry in (("--dry-run",), ()):
        answer = ptq("quantize", *command.split(), *(() if "nsamples" in command else SHORT), *dry)
        assert answer.code == code, (dry, answer)
        assert message in one_line(answer), dry


def test_a_dry_run_says_where_it_would_write_and_writes_nothing(ptq: Ptq, at_work: Path) -> None:
    before = sorted(at_work.rglob("*"))
    answer = ptq("quantize", "model", "--calib", "text.txt", *SHORT, "--output", "new/folder/out", "--dry-run", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["output"] == "new/folder/out"
    assert sorted(at_work.rglob("*")) == before


def test_what_needs_no_calibration_reads_no_text_and_no_tokenizer(ptq: Ptq, at_work: Path) -> None:
    answer = ptq("quantize", "no-tokenizer", "--algo", "rtn", "--dry-run")
    assert answer.code == 0, answer.err
    assert "calibration" not in answer.out


def test_a_disk_without_room_is_told(ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(at_work)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    answer = ptq("quantize", "model", "--algo", "rtn", "--dry-run")
    assert answer.code == 1
    assert "0.00 GB are free; choose another --output" in one_line(answer)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    answer = ptq("quantize", at_work / "model", "--algo", "rtn", "--dry-run", "--output", tmp_path / "closed" / "out")
    assert answer.code == 1
    assert "cannot write there" in one_line(answer)


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--calib c4 --nsamples 5", "rtn looks at no calibration text, so calib, nsamples have no effect"),
        ("--no-sequential --seed 3", "rtn looks at no calibration text, so sequential, seed have no effect"),
        ("", ""),
        ("--abits 8 --act-scales static --calib text.txt --nsamples 4 --seqlen 16", ""),
    ],
)
def test_requests_about_calibration_without_calibration_are_noted(ptq: Ptq, at_work: Path, flags: str, told: str) -> None:
    answer = ptq("quantize", "model", "--algo", "rtn", "--dry-run", "--json", *flags.split())
    notes = [note for note in json.loads(answer.out)["notes"] if "no effect" in note]
    assert notes == ([told] if told else [])
