"""Files copied because nothing forbids it: only those that a reader wants by name go along, and a folder with an adapter is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
from commandline import Ptq, one_line
from tiny import make_model

from ptqcli.checkpoint.auxiliary import AUXILIARY_FILES, auxiliary_files, belongs_to_a_checkpoint, copy_auxiliary_files, left_out
from ptqcli.checkpoint.directory import Directory
from ptqcli.errors import PTQError
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.report import LOGS
from ptqcli.recipe import Recipe

PLAIN = Recipe(algo="rtn", group_size=32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_model(tmp_path / "model", num_hidden_layers=1)
    return tmp_path / "model"


# What else lies in real model folders, and what it would say of the result
MISLEADING = {
    "adapter_config.json.bak": "an adapter",
    "quant_config.json": "already quantized, says an old AWQ reader",
    "quantize_config.json": "already quantized, says an old GPTQ reader",
    "hf_quant_config.json": "already quantized, says vLLM",
    "model_index.json": "a pipeline of diffusers",
    "params.json": "weights in Mistral's own form",
    "consolidated.safetensors": "weights in Mistral's own form",
    "pytorch_model.bin.index.json": "pickled weights",
    "model.safetensors.index.fp8.json": "other weights",
    "trainer_state.json": "a training to be resumed",
    "training_args.json": "a training to be resumed",
    "modeling_own.py": "code",
    "results.json": "figures of the original",
    "notes.txt": "notes",
    "generation_config_old.json": "nothing",
    "1_Pooling/pytorch_model.bin": "a pickle",
    "onnx/model.onnx": "another format",
    "additional_chat_templates/notes.md": "nothing",
    ".gitattributes": "a repository",
}
WANTED = {
    "tokenizer.model": "a vocabulary", "vocab.json": "{}", "merges.txt": "a b", "qwen.tiktoken": "ranks", "tekken.json": "{}",
    "chat_template.jinja": "{{ messages }}", "additional_chat_templates/tool_use.jinja": "{{ tools }}", "added_tokens.json": "{}",
    "preprocessor_config.json": "{}", "processor_config.json": "{}", "video_preprocessor_config.json": "{}",
    "modules.json": "a sentence encoder", "config_sentence_transformers.json": "{}", "sentence_bert_config.json": "{}",
    "1_Pooling/config.json": "how it pools", "2_Dense/config.json": "its last layer", "2_Dense/model.safetensors": "that one's weights",
    "LICENSE": "terms", "LICENSE.md": "terms", "NOTICE.txt": "terms", "USE_POLICY.md": "terms",
}  # fmt: skip


def test_only_known_files_go_along(model: Path, tmp_path: Path) -> None:
    own = {path.name for path in model.iterdir()}
    quantize(model, PLAIN, tmp_path / "before")
    for name, content in {**MISLEADING, **WANTED}.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
    for overwrite in (False, True):  # what is written can be replaced
        quantize(model, PLAIN, tmp_path / "out", overwrite=overwrite)
        found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert found == {*own, *WANTED, "ptq_report.json", "README.md", "SHA256SUMS", *LOGS}
        assert {name: (tmp_path / "out" / name).read_text() for name in WANTED} == WANTED
    named = {"onnx/" if name.startswith("onnx/") else name for name in MISLEADING if not name.startswith(".")}
    written_anew = {"quantize_config.json"}  # of some formats
    assert set(left_out(model)) == named - written_anew


def test_every_vocabulary_of_transformers_goes_along(tmp_path: Path) -> None:
    """The names that its tokenizers look for stand in its sources."""
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}
    for source in Path(transformers.__file__).parent.rglob("tokenization*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", source.read_text(encoding="utf-8"), re.DOTALL):
            names |= set(re.findall(r':\s*"([^"]+)"', table))
    assert len(names) > 20
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "model" / name).write_text(name)
    copy_auxiliary_files(tmp_path / "model", auxiliary_files(tmp_path / "model"), Directory(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_the_names_of_files_that_are_written_are_known() -> None:
    """Or a finished checkpoint could not be replaced. A pattern does not reach into folders."""
    assert all(belongs_to_a_checkpoint(name.replace("[0-9]", "1").replace("*", "x")) for name in AUXILIARY_FILES)
    assert not any(belongs_to_a_checkpoint(name) for name in ("LICENSE/thesis", "a/tokenizer.json", "thesis.tmp", "x.safetensors"))


# Adapters


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_folder_with_an_adapter_is_refused_with_the_lines_that_merge_it(ptq: Ptq, model: Path, tmp_path: Path, name: str) -> None:
    """transformers would load it onto the base, with peft installed; quantized is the base alone."""
    (model / name).write_text(json.dumps({"base_model_name_or_path": str(model)}))
    for line in (
        ("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", tmp_path / "out"),
        ("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", tmp_path / "out", "--dry-run"),
        ("eval", model, "--ppl", "builtin"),
        ("inspect", model),
        ("generate", model, "text"),
    ):
        answer = ptq(*line)
        assert f"{model}: holds an adapter ({name}); merge it into the weights" in one_line(answer)
        merge = f"AutoPeftModelForCausalLM.from_pretrained('{model}').merge_and_unload().save_pretrained('{model}-merged')"
        assert merge in one_line(answer)
        assert answer.code == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_nothing_but_an_adapter_is_told_the_same(ptq: Ptq, model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    (model / "config.json").unlink()
    assert "holds an adapter (adapter_config.json)" in one_line(ptq("quantize", model))


def test_an_adapter_put_beside_a_checkpoint_is_noticed(ptq: Ptq, model: Path, tmp_path: Path) -> None:
    quantize(model, PLAIN, tmp_path / "out")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in one_line(ptq("generate", tmp_path / "out", "text"))


def test_an_adapter_that_appears_during_the_run_does_not_go_along(model: Path, tmp_path: Path) -> None:
    from ptqcli.pipeline.progress import NoProgress

    class Late(NoProgress):
        def block_done(self, index: int, count: int) -> None:
            (tmp_path / "out.partial" / "adapter_config.json").write_text("{}")

    with pytest.raises(PTQError, match="holds an adapter"):
        quantize(model, PLAIN, tmp_path / "out", progress=Late())
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_saves_what_its_tokenizer_has(model: Path, tmp_path: Path) -> None:
    import ptqcli

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    ptqcli.quantize(loaded, PLAIN, output=tmp_path / "out", tokenizer=tokenizer)
    saved = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "tool_use.jinja"} <= saved
