"""Kind: a model is asked as a program would ask it, not as a person does. A chat model sees its chat template, and only what every model
takes: token ids and the mask. Special tokens are no words. The text may come from standard input; one JSON object carries the answer."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from commandline import Ptq, one_line
from tiny import byte_tokenizer, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptqcli.errors import printable

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and message['content'] == 'no' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% if message['content'] == 'divide' %}{{ 1 / 0 }}{% endif %}"
    "<|end|>{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant: {% endif %}"
)
TOKENS = 6


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain: no template, and a generation_config.json that asks for several continuations. chat: a template, and a tokenizer that
    returns token_type_ids. silent: says nothing but its end token."""
    folder = tmp_path_factory.mktemp("chat")
    make_model(folder / "plain")
    make_model(folder / "chat")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "chat")
    settings = folder / "chat" / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | names))
    usual = folder / "plain" / "generation_config.json"
    usual.write_text(json.dumps(json.loads(usual.read_text()) | {"num_beams": 3, "num_return_sequences": 2}))
    silent = make_model(folder / "silent", "gpt2", eos_token_id=None)
    with torch.no_grad():
        silent.transformer.ln_f.weight.zero_()
        silent.transformer.ln_f.bias.copy_(silent.transformer.wte.weight[256])
    silent.save_pretrained(folder / "silent")
    return folder


def continuation(folder: Path, prompt: str) -> str:
    """The likeliest TOKENS tokens behind ``prompt``, taken one by one, without what is special."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + TOKENS and ids[0, -1] != 256:
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return tokenizer.decode([int(token) for token in ids[0, start:] if token != 256])


def ask(ptq: Ptq, *arguments: str) -> dict[str, object]:
    answer = ptq("generate", *arguments, "--max-new-tokens", TOKENS, "--json")
    assert (answer.code, answer.err) == (0, "")
    return json.loads(answer.out)


def test_the_tokenizer_returns_what_the_model_does_not_take(at_work: Path) -> None:
    assert "token_type_ids" in AutoTokenizer.from_pretrained("chat")("hello")


@pytest.mark.parametrize("system", [None, "be brief"])
def test_a_chat_model_sees_its_template(ptq: Ptq, at_work: Path, system: str | None) -> None:
    found = ask(ptq, "chat", "hello", *(() if system is None else ("--system", system)))
    prompt = f"{'' if system is None else '<|end|>system: be brief' + chr(10)}<|end|>user: hello\n<|end|>assistant: "
    assert found["answer"] == continuation(at_work / "chat", prompt)
    assert found["chat"] is True
    assert found["prompt_tokens"] == len(prompt.replace("<|end|>", "|"))


@pytest.mark.parametrize("arguments", [("chat", "hello", "--raw"), ("plain", "hello")])
def test_a_text_is_continued(ptq: Ptq, at_work: Path, arguments: tuple[str, ...]) -> None:
    found = ask(ptq, *arguments)
    assert found["answer"] == continuation(at_work / arguments[0], "hello")
    assert (found["chat"], found["prompt_tokens"]) == (False, 5)


def shown(text: str) -> str:
    return printable(text, keep="\n\t") + "\n"


def test_words_for_people(ptq: Ptq, at_work: Path) -> None:
    """In a chat the answer alone, otherwise the text and what follows it."""
    answered, continued = (
        ptq("generate", "chat", "hello", "--max-new-tokens", TOKENS),
        ptq("generate", "plain", "hello", "--max-new-tokens", TOKENS),
    )
    assert answered.out == shown(continuation(at_work / "chat", "<|end|>user: hello\n<|end|>assistant: "))
    assert continued.out == shown("hello" + continuation(at_work / "plain", "hello"))


def test_special_tokens_are_no_words(ptq: Ptq, at_work: Path) -> None:
    found = ask(ptq, "silent", "hello")
    assert (found["new_tokens"], found["answer"]) == (TOKENS, "")
    assert ptq("generate", "silent", "hello").out == "hello\n"


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_standard_input(ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    found = ask(ptq, "plain", *arguments)
    assert (found["text"], found["answer"]) == ("hello", continuation(at_work / "plain", "hello"))


def binary() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")


@pytest.mark.parametrize(
    ("stdin", "arguments", "code", "says"),
    [
        (io.StringIO(""), ("plain",), 2, "the text is empty"),
        (None, ("plain",), 2, "no text is given"),
        (binary(), ("plain", "-"), 1, "standard input: is not utf-8 text"),
        (None, ("plain", "\udcff"), 2, "the text is not UTF-8"),
        (None, ("plain", "hello", "--system", "be brief"), 2, "plain: has no chat template"),
        (None, ("chat", "hello", "--raw", "--system", "be brief"), 2, "--raw and --system exclude each other"),
        (None, ("chat", "divide"), 1, "does not take this conversation: division by zero; give --raw"),
        (None, ("chat", "hello", "--system", "no"), 1, "does not take this conversation: no system here; give --raw"),
    ],
)
def test_what_cannot_be_asked(
    ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch, stdin: io.TextIOBase | None, arguments: tuple[str, ...], code: int, says: str
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    answer = ptq("generate", *arguments)
    assert says in one_line(answer)
    assert answer.code == code
