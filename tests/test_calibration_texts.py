"""Which texts ``--calib`` names, what auto becomes, and what a run says and keeps of them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from commandline import Ptq
from tiny import byte_tokenizer, make_model

import ptqcli
from ptqcli.calibration import corpora, general
from ptqcli.calibration.corpora import CORPORA
from ptqcli.calibration.familiar import Familiarity
from ptqcli.calibration.general import find_general
from ptqcli.calibration.sources import Share, read_calib
from ptqcli.errors import PTQError, UsageError
from ptqcli.pipeline import texts
from ptqcli.pipeline.prepare import open_skeleton
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.texts import TextMaker
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources

DEMO = Path(ptqcli.__file__).parent / "demo"
FOREIGN = "foreign to the model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Empty caches, a hub client that is not told to be offline, and the requests that reach it; none is answered."""
    import datasets

    asked: list[str] = []

    def ask(url: str, timeout: float) -> None:
        asked.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return asked


def maker(model: Path, data_dir: Path | None = None, **wanted: object) -> TextMaker:
    recipe = load_recipe(flags=wanted)
    skeleton = open_skeleton(model, recipe)
    return TextMaker(recipe=recipe, skeleton=skeleton, resources=Resources(), data_dir=data_dir, progress=NoProgress())


# How a list is written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c4", [("c4", None)]),
        ("c4:64", [("c4", 64)]),
        ("self:8", [("self", 8)]),
        ("c4:64,self:8", [("c4", 64), ("self", 8)]),
        (" c4:1 , builtin:2", [("c4", 1), ("builtin", 2)]),
        ("chats.jsonl:7", [("chats.jsonl:7", None)]),  # a column, as it always was
        ("chats.jsonl:7:64,c4:1", [("chats.jsonl:7", 64), ("c4", 1)]),
        ("chats.jsonl:64,c4:1", [("chats.jsonl", 64), ("c4", 1)]),
        ("a:5,b.txt", [("a:5,b.txt", None)]),  # a file of that very name
        ("a,b.jsonl:words", [("a,b.jsonl:words", None)]),
        ("a,b.jsonl:3", [("a,b.jsonl:3", None)]),
        ("missing.txt", [("missing.txt", None)]),
    ],
)
def test_lists_are_read(text: str, expected: list[tuple[str, int | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("chats.jsonl", "a:5,b.txt", "a,b.jsonl"):
        Path(name).write_text("x")
    assert [(share.source, share.windows) for share in read_calib(text)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "calib is empty"),
        ("c4:64,code.txt", "'code.txt' is not TEXT:WINDOWS"),
        ("c4,self", "'c4' is not TEXT:WINDOWS"),
        ("c4:0,self:8", "'c4:0' is not TEXT:WINDOWS"),
        ("c4:64,:8", "':8' is not TEXT:WINDOWS"),
        ("c4:64,", "'' is not TEXT:WINDOWS"),
        ("c4:-3,self:8", "'c4:-3' is not TEXT:WINDOWS"),
        ("c4:9999999999,self:8", "is not TEXT:WINDOWS"),
        ("c4:64,c4:8", "names c4 twice"),
        ("c4:64,auto:8", "auto chooses by itself"),
        ("auto:8", "auto chooses by itself"),
    ],
)
def test_what_is_no_list_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Recipe(calib=text)


def test_a_number_is_missing_in_a_list_that_begins_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("x")
    with pytest.raises(UsageError, match=r"'code\.txt' is not TEXT:WINDOWS"):
        read_calib("chats.jsonl:64,code.txt")


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        ("builtin:1,short.jsonl:3", r"short\.jsonl: the calibration text has \d+ tokens, enough for 0 windows .* lower that number"),
        ("short.jsonl:8", r"has no column '8' .* --nsamples 8 says how many windows"),
        ("short.txt:8", r"is no table and has no column '8'; leave it out; .* --nsamples 8 says how many windows"),
        ("short.txt:words", r"is no table and has no column 'words'; leave it out$"),
    ],
)
def test_errors_name_their_text(calib: str, message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.jsonl").write_text('{"text": "a b"}')
    Path("short.txt").write_text("a b")
    made = maker(model, calib=calib, seqlen=32)
    with pytest.raises(UsageError, match=message):
        made.make(made.choose(32), 32, rehearsal=True)


def test_windows_are_said_once() -> None:
    with pytest.raises(UsageError, match="leave nsamples out"):
        Recipe(calib="c4:64", nsamples=64)
    assert Recipe(calib="c4", nsamples=64).nsamples == 64


def test_windows_that_nobody_names() -> None:
    assert [Share(source).sized(None, 2048).windows for source in ("c4", "builtin", "self")] == [128, 128, 8]
    assert Share("self").sized(None, 100_000).windows == 1
    assert Share("self").sized(5, 2048).windows == 5
    assert Share("c4", 3).sized(None, 8).windows == 3


# Several texts


def test_shares_are_counted(model: Path, tmp_path: Path) -> None:
    """Each word of the two texts is in one of them only, so a window says which it is of."""
    (tmp_path / "a.txt").write_text("aaaa " * 2000)
    (tmp_path / "b.txt").write_text("bbbb " * 2000)
    calib = f"{tmp_path / 'a.txt'}:5,{tmp_path / 'b.txt'}:3"
    report = ptqcli.quantize(model, output=tmp_path / "out", calib=calib, seqlen=32, group_size=32)
    assert report.calibration is not None
    assert [(text.source, text.windows) for text in report.calibration.texts] == [
        (str(tmp_path / "a.txt"), 5),
        (str(tmp_path / "b.txt"), 3),
    ]
    assert all(text.loss is not None for text in report.calibration.texts)
    made = maker(model, calib=calib, seqlen=32, group_size=32)
    found = made.make(made.choose(32), 32, rehearsal=False)
    letters = [{chr(token) for token in window.tolist()} & {"a", "b"} for window in bytes_of(found.windows)]
    assert sorted("".join(letter) for letter in letters) == ["a"] * 5 + ["b"] * 3
    assert ["".join(letter) for letter in letters] != ["a"] * 5 + ["b"] * 3, "mixed, so that every excerpt has some of each"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "5 windows of 32 tokens from a.txt, 3 from b.txt" in card
    assert str(tmp_path) not in card


def bytes_of(windows: torch.Tensor) -> torch.Tensor:
    """Tokens of the byte tokenizer as the bytes that they stand for, where those are printable ASCII."""
    tokenizer = byte_tokenizer()
    table = torch.tensor([ord(tokenizer.decode([token])[:1] or "?") for token in range(257)])
    return table[windows]


# What auto becomes


def known(excess: float) -> Familiarity:
    return Familiarity(loss=3.0 + excess, expected=3.0, error=0.1)


def choose(made: TextMaker, monkeypatch: pytest.MonkeyPatch, excess: float) -> texts.PlannedTexts:
    monkeypatch.setattr(TextMaker, "_known_builtin", lambda self, share, seqlen: known(excess))
    return made.choose(64)


def test_auto_takes_the_builtin_text_where_the_model_is_at_home(model: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str]) -> None:
    chosen = choose(maker(model), monkeypatch, -0.1)
    assert chosen.shares == (Share("builtin", 128),)
    assert "auto is builtin" in chosen.notes[0]
    assert requests == [], "nobody is asked"


def test_auto_takes_a_corpus_of_the_data_folder(model: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str], tmp_path: Path) -> None:
    pile, c4 = (tmp_path / CORPORA[name]["calibration"].local[0] for name in ("pile", "c4"))
    for path, name in ((pile, "pile"), (c4, "c4")):
        path.write_bytes(b"x")
        assert choose(maker(model, tmp_path, nsamples=8), monkeypatch, 0.3).shares == (Share(name, 6), Share("self", 2))
        assert choose(maker(model, tmp_path, nsamples=1), monkeypatch, 0.3).shares == (Share(name, 1),)
    assert requests == []


def test_auto_takes_another_corpus_of_the_hubs_cache(
    model: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "hub" / f"datasets--{general.OTHERS[0].replace('/', '--')}" / "snapshots" / "1" / "data"
    folder.mkdir(parents=True)
    for name in ("test-0.jsonl", "train-0.jsonl", "info.json"):
        (folder / name).write_text('{"text": "x"}\n')
    assert choose(maker(model), monkeypatch, 0.3).shares == (Share(str(folder / "train-0.jsonl"), 96), Share("self", 32))
    assert requests == []


def test_auto_asks_the_hub_once_and_not_where_it_is_offline(monkeypatch: pytest.MonkeyPatch, requests: list[str]) -> None:
    assert find_general(None) is None
    assert len(requests) == 1
    assert "allenai/c4" in requests[0]
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    assert find_general(None) == ("c4", "on the hub")


def test_an_offline_run_makes_no_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through the hub client itself, whose sockets would be found."""
    import socket

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("a connection was tried"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
    assert not corpora.hub_answers("c4", "calibration")


def test_auto_lets_the_model_write_where_no_corpus_is(model: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str]) -> None:
    chosen = choose(maker(model), monkeypatch, 0.3)
    assert [share.source for share in chosen.shares] == ["self", "builtin"]
    assert chosen.windows == 16_384 // 64
    assert any("writes 12,288 tokens itself" in note for note in chosen.notes)


def test_a_corpus_stands_alone_where_the_model_cannot_write(
    model: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str], tmp_path: Path
) -> None:
    (tmp_path / CORPORA["c4"]["calibration"].local[0]).write_bytes(b"x")
    monkeypatch.setattr(texts, "free_bytes", lambda device: 1 << 20)
    chosen = choose(maker(model, tmp_path), monkeypatch, 0.3)
    assert chosen.shares == (Share("c4", 128),)
    assert "calib auto is c4, which is on this machine, alone: for the model to write it takes" in chosen.notes[0]


@pytest.mark.parametrize("calib", ["auto", "self"])
def test_what_does_not_fit_is_refused_before_the_work(
    calib: str, model: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str]
) -> None:
    monkeypatch.setattr(texts, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(UsageError, match=r"GiB of memory, of which 0\.0 are free; give .*--calib"):
        choose(maker(model, calib=calib), monkeypatch, 0.3)


def test_what_would_take_hours_is_done_only_if_it_is_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str]) -> None:
    monkeypatch.setattr(texts, "MOST_WORK", 1e6)
    with pytest.raises(UsageError, match=r"hours on a CPU .* give text of the kind that the model will see with --calib PATH"):
        choose(maker(model), monkeypatch, 0.3)
    assert choose(maker(model, calib="self"), monkeypatch, 0.3).windows == 256


def test_a_model_that_is_not_causal_writes_nothing(model: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str]) -> None:
    from dataclasses import replace

    made = maker(model, calib="self")
    made.skeleton.kind = replace(made.skeleton.kind, name="encoder", causal=False)
    with pytest.raises(UsageError, match=r"but encoder, which writes none; give a text with --calib"):
        made.choose(64)


def test_one_token_again_and_again_is_no_text() -> None:
    with pytest.raises(UsageError, match=r"little but token 5 \(60% of its text\)"):
        texts._check_text(torch.tensor([5] * 60 + list(range(6, 46))))
    texts._check_text(torch.tensor([5] * 50 + list(range(6, 56))))


# Runs


SHORT = {"seqlen": 32, "group_size": 32}


def test_self_is_the_same_again_and_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ptq: Ptq) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ["quantize", model, "--calib", "self:4", "--seqlen", "32", "--group-size", "32", "--output"]
    first = ptq(*command, tmp_path / "1")
    assert first.code == 0
    assert "the model writes 128 tokens" in first.err, first.err
    [kept] = (tmp_path / "cache" / "ptqcli").iterdir()
    again = ptq(*command, tmp_path / "2")
    assert "wrote before" in again.err
    text = json.loads(kept.read_text())
    kept.write_text(json.dumps({**text, "tokens": text["tokens"][::-1]}))
    third = ptq(*command, tmp_path / "3")
    assert "wrote before" not in third.err
    assert json.loads(kept.read_text()) == text, "a changed file is not believed, and is replaced"
    ptq(*command, tmp_path / "4", "--seed", "1")
    bytes_ = [(tmp_path / name / "model.safetensors").read_bytes() for name in "1234"]
    assert bytes_[0] == bytes_[1] == bytes_[2] != bytes_[3]
    stored = json.loads((tmp_path / "1" / "ptq_report.json").read_text())["calibration"]
    assert stored["texts"] == [{"source": "self", "windows": 4, "loss": None, "expected_loss": None}]
    assert stored["sampling"]["temperature"] == 1.0


def test_a_model_in_memory_writes_as_its_folder_does(tmp_path: Path) -> None:
    loaded = make_model(tmp_path / "model")
    ptqcli.quantize(tmp_path / "model", output=tmp_path / "1", calib="self:4", **SHORT)
    ptqcli.quantize(loaded, output=tmp_path / "2", tokenizer=byte_tokenizer(), calib="self:4", **SHORT)
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == (tmp_path / "2" / "model.safetensors").read_bytes()


def test_a_rehearsal_writes_nothing(model: Path, monkeypatch: pytest.MonkeyPatch, ptq: Ptq) -> None:
    monkeypatch.setattr(texts, "write_tokens", lambda *_: pytest.fail("the model wrote"))
    answer = ptq("quantize", model, "--calib", "self:4", "--seqlen", "32", "--group-size", "32", "--dry-run")
    assert answer.code == 0
    assert "writes 128 tokens itself beforehand" in answer.out, answer.err


def test_the_demo_model_is_at_home_in_the_builtin_text(ptq: Ptq, tmp_path: Path) -> None:
    answer = ptq("quantize", "--seqlen", "64", "--nsamples", "32", "--output", tmp_path / "out")
    assert answer.code == 0
    assert "calib auto is builtin" in answer.out, answer.err
    assert FOREIGN not in answer.err
    stored = json.loads((tmp_path / "out" / "ptq_report.json").read_text())["calibration"]
    [text] = stored["texts"]
    assert (text["source"], text["windows"]) == ("builtin", 32)
    assert 0 < text["loss"] < text["expected_loss"]
    assert "32 windows of 64 tokens from builtin" in (tmp_path / "out" / "README.md").read_text()
    assert "32 windows of builtin" in ptq("inspect", tmp_path / "out").out


def test_a_foreign_text_is_told_in_one_line(ptq: Ptq, tmp_path: Path) -> None:
    """Words of no language, which a model of documentation and code has not seen."""
    source, text = random.Random(0), tmp_path / "text.txt"
    text.write_text(" ".join("".join(source.choices("abdefghiklmnoprstuvz", k=5)) for _ in range(5000)))
    answer = ptq("quantize", "--calib", text, "--seqlen", "64", "--nsamples", "32", "--output", tmp_path / "out")
    assert answer.code == 0
    assert [line for line in answer.err.splitlines() if FOREIGN in line], answer.err
    stored = json.loads((tmp_path / "out" / "ptq_report.json").read_text())["calibration"]["texts"][0]
    assert stored["loss"] - stored["expected_loss"] > 1


def test_a_model_that_fails_is_told_where_it_writes_and_not_measured(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    made = maker(model, calib="self:2", seqlen=32)
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *_, **__: 1 / 0)
    assert made._known(torch.zeros(4, 32, dtype=torch.long)) is None
    with pytest.raises(PTQError, match=r"the model fails while it writes \(division by zero\); give a text with --calib"):
        made._write(Share("self", 2), 32)


def test_a_python_without_text_is_no_obstacle(model: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str]) -> None:
    def none(part: str) -> list[str]:
        raise PTQError("this Python carries too little text")

    monkeypatch.setattr(texts, "documents", lambda *_: none(""))
    assert maker(model).choose(64).shares == (Share("self", 256),)
