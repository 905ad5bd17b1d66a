"""Encoders: padded texts, statistics of tokens alone, every algorithm, evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from commandline import Ptq, one_line
from dequantized import dequantized
from tiny import byte_tokenizer
from tokenizers import processors

import ptqcli
from ptqcli.calibration.padded import joined, marks, padded_windows, text_windows
from ptqcli.calibration.record import BlockCall, record_calls
from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.calibration.walk import CalibratedBlock
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation.encoders import MASKED, Labelled, measure_encoder, read_task
from ptqcli.model.kinds import PADDING, kind_of
from ptqcli.model.positions import most_tokens
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("BertConfig", {}),
    "BertModel": ("BertConfig", {}),
    "BertForSequenceClassification": ("BertConfig", {"num_labels": 3}),
    "RobertaForMaskedLM": ("RobertaConfig", {}),
    "DistilBertForMaskedLM": ("DistilBertConfig", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}),
    "ModernBertForMaskedLM": ("ModernBertConfig", {"local_attention": 16}),
    "DebertaV2ForMaskedLM": (
        "DebertaV2Config",
        {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"},
    ),
}
WITHOUT_SIZES = {"DistilBertConfig": {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}}


def tokenizer() -> Any:
    """Bytes, between the marks of an encoder's texts."""
    made = byte_tokenizer()
    made.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>"})
    template = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", made.cls_token_id), ("<sep>", made.sep_token_id)]
    )
    made.backend_tokenizer.post_processor = template
    return made


@torch.no_grad()
def make_encoder(folder: Path, name: str) -> Any:
    """A random model of the class ``name``, wide enough that its outputs depend on every layer, saved with a tokenizer."""
    config_name, changes = MODELS[name]
    sizes = {key: value for key, value in SIZES.items() if key not in WITHOUT_SIZES.get(config_name, set())}
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config_name)(**sizes, **changes)).float().eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.5 if "emb" in key else 1.5 / parameter.shape[1] ** 0.5)
        elif key.endswith("bias"):
            parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def write_rows(path: Path, count: int = 40) -> Path:
    """Texts of many lengths, one a row."""
    rows = [{"text": " ".join(f"{number} weighs {number * 7 % 31}" for number in range(row % 6 + 1))} for row in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def answer(model: Any) -> torch.Tensor:
    """What ``model`` gives first for two windows, of which one is short."""
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, attention_mask=mask)[0]
    return found


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # transformers 5.17, of DeBERTa
@pytest.mark.parametrize(
    ("name", "algo"),
    [
        ("BertForMaskedLM", "gptq"),
        ("BertForMaskedLM", "awq"),
        ("BertModel", "rtn"),
        ("BertForSequenceClassification", "gptq"),
        ("RobertaForMaskedLM", "awq+gptq"),
        ("DistilBertForMaskedLM", "gptq"),
        ("ModernBertForMaskedLM", "awq"),
        ("DebertaV2ForMaskedLM", "gptq"),
    ],
)
def test_an_encoder_is_quantized_and_loads_in_its_own_class(name: str, algo: str, tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "model", name)
    before, text = answer(model), str(write_rows(tmp_path / "text.jsonl"))
    ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", algo=algo, calib=text, nsamples=8, seqlen=40, group_size=16)
    packed: Any = ptqcli.load_quantized(tmp_path / "out")
    assert type(packed).__name__ == name
    truth = answer(dequantized(tmp_path / "out", model))
    torch.testing.assert_close(answer(packed), truth, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, truth, rtol=1e-2, atol=1e-2)
    if not name.startswith("ModernBert"):  # which fills weights that are not there any more when it loads; the plan says so
        loaded = getattr(transformers, name).from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(answer(loaded), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("algo", "more"), [("gptq", {"target": "original"}), ("autoround", {"iters": 40}), ("awq+gptq", {})])
@torch.no_grad()
def test_what_stands_behind_a_short_text_counts_nowhere(
    algo: str, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever hidden states a block gives there, the codes are the same; the twin, whose tokens differ, has others."""
    make_encoder(tmp_path / "model", "BertForMaskedLM")
    text = str(write_rows(tmp_path / "text.jsonl"))
    request = {"algo": algo, "calib": text, "nsamples": 8, "seqlen": 40, "group_size": 16, **more}
    run = BlockCall.run

    def noisy(places: bool) -> Any:
        def disturbed(call: BlockCall, block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            behind = run(call, block, hidden)
            mask = next(
                (value for value in (*call.args, *call.kwargs.values()) if isinstance(value, torch.Tensor) and value.dim() == 4), None
            )
            seen = (
                torch.ones(behind.shape[:2], dtype=torch.bool) if mask is None else mask[:, 0, 0].bool()
            )  # of windows without padding none
            return behind + 3 * (seen if places else ~seen).unsqueeze(-1)

        return disturbed

    codes = []
    for number, disturbed in enumerate((None, noisy(False), noisy(True))):
        if disturbed is not None:
            monkeypatch.setattr(BlockCall, "run", disturbed)
        ptqcli.quantize(tmp_path / "model", output=tmp_path / str(number), **request)
        reader = SafetensorsFolder(tmp_path / str(number))
        codes.append({name: reader.read(name) for name in reader.names if "layer.1." in name and name.endswith("weight_packed")})
    assert len(codes[0]) == 6
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    assert not all(torch.equal(codes[0][name], codes[2][name]) for name in codes[0])


def test_texts_stand_alone_between_their_marks() -> None:
    words = tokenizer()
    cls, sep = words.cls_token_id, words.sep_token_id
    assert marks(words) == ([cls], [sep])
    windows = list(text_windows(["abc", " ", "abcdefgh"], words, 7))
    plain = [words(text, add_special_tokens=False)["input_ids"] for text in ("abc", "abcde", "fgh")]
    assert windows == [[cls, *ids, sep] for ids in plain]
    assert marks(byte_tokenizer()) == ([], [])
    with pytest.raises(UsageError, match="no room for text"):
        list(text_windows(["abc"], words, 2))


def test_windows_are_padded_and_drawn_alike_every_time() -> None:
    docs = ["a" * length for length in range(1, 12)]
    windows = padded_windows(docs, tokenizer(), 5, 40, seed=3)
    assert torch.equal(windows, padded_windows(docs, tokenizer(), 5, 40, seed=3))
    assert not torch.equal(windows, padded_windows(docs, tokenizer(), 5, 40, seed=4))
    for row in windows.tolist():
        text = [token for token in row if token != PADDING]
        assert row == text + [PADDING] * (len(row) - len(text))
    assert joined([windows, windows[:, :3]]).shape == (10, windows.shape[1])
    with pytest.raises(UsageError, match="gives 11 windows of at most 40 tokens, and 12 are asked for"):
        padded_windows(docs, tokenizer(), 12, 40, seed=3)


@pytest.mark.parametrize("budget", [1 << 30, 0])
@torch.no_grad()
def test_statistics_are_those_of_tokens_alone(budget: int, tmp_path: Path) -> None:
    """The Hessian of padded windows in a batch is the sum of those of the texts, each run by itself by transformers."""
    model = make_encoder(tmp_path, "BertForMaskedLM")
    rows = [[5, 9, 11, 200], [7, 8], [33, 34, 35, 36, 37, 38, 39]]
    windows = joined([torch.tensor([row]) for row in rows])
    skeleton = Skeleton(ModelFolder(tmp_path))
    recording = record_calls(skeleton, windows, 2, CPU, torch.float32, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    block = skeleton.load_block(0, CPU, torch.float32)
    states = recording.hidden
    walk = CalibratedBlock(
        block, skeleton.shapes[0].stages, recording.calls[0], recording.batches, states, states.clone(), CPU, budget, real=recording.real
    )
    needs = StatisticsRequest(hessian=True, magnitudes=True, samples=True, sums=True)
    found = {walk.stages[stage]: statistics for stage, statistics in walk.sequential(needs)}
    seen: dict[str, list[torch.Tensor]] = {}
    first = model.bert.encoder.layer[0]
    for local in [stage[0] for stage in walk.stages]:
        first.get_submodule(local).register_forward_pre_hook(
            lambda _module, args, local=local: seen.setdefault(local, []).append(args[0][0])
        )
    for row in rows:
        model(input_ids=torch.tensor([row]))
    for stage, statistics in found.items():
        x = torch.cat(seen[stage[0]]).double()  # [tokens, in]
        assert statistics.tokens == len(x) == 13
        assert statistics.hessian is not None
        torch.testing.assert_close(statistics.hessian.matrix.double(), x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.sums.double(), x.sum(0), rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
        assert statistics.sampled().shape == x.shape
    with_padding = CalibratedBlock(
        block, walk.stages, recording.calls[0], recording.batches, states, states.clone(), CPU, budget
    )  # the twin that must differ
    assert next(with_padding.sequential(needs))[1].tokens == 3 * 7


def test_the_class_that_config_json_names_decides(tmp_path: Path) -> None:
    config = transformers.BertConfig(architectures=["BertForSequenceClassification"])
    assert (kind_of(config).auto_class, kind_of(config).causal) == ("BertForSequenceClassification", False)
    assert kind_of(transformers.BertConfig()).auto_class == "BertForMaskedLM"
    assert kind_of(transformers.BertConfig(architectures=["LlamaModel"])).auto_class == "BertForMaskedLM"
    assert kind_of(transformers.BertConfig(architectures=["BertLMHeadModel"])).causal
    assert kind_of(transformers.BertConfig(is_decoder=True)).causal
    assert not kind_of(transformers.ModernBertConfig()).causal
    assert kind_of(transformers.LlamaConfig(architectures=["LlamaForCausalLM"])).auto_class == "AutoModelForCausalLM"


def test_positions_behind_a_row_for_padding_are_not_counted(tmp_path: Path) -> None:
    assert most_tokens(make_encoder(tmp_path / "roberta", "RobertaForMaskedLM")) == 64 - 2
    assert most_tokens(make_encoder(tmp_path / "bert", "BertModel")) == 64


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertModel"])
@torch.no_grad()
def test_masked_perplexity_and_cosine_are_those_of_the_formulas(name: str, tmp_path: Path) -> None:
    model, words = make_encoder(tmp_path / "model", name), tokenizer()
    other = getattr(transformers, name).from_pretrained(tmp_path / "model").eval()
    other.base_model.encoder.layer[1].output.dense.weight.mul_(0.5)
    rows = list(
        text_windows([json.loads(line)["text"] for line in write_rows(tmp_path / "text.jsonl", 9).read_text().split("\n")], words, 40)
    )
    [found] = measure_encoder(other, {"text": rows}, words, 40, model)
    generator, loss, count, cosines = torch.Generator().manual_seed(0), 0.0, 0, []
    for row in rows:
        drawn = torch.rand(len(row), generator=generator)
        inside = drawn[1:-1]
        hidden = [place for place in range(1, len(row) - 1) if drawn[place] <= max(MASKED, float(inside.min()))]
        ids = torch.tensor([row])
        if name == "BertForMaskedLM":
            masked = ids.clone()
            masked[0, hidden] = words.mask_token_id
            log_p = other(input_ids=masked).logits[0].log_softmax(-1).double()
            loss -= float(sum(log_p[place, row[place]] for place in hidden))
            count += len(hidden)
        means = [each.base_model(input_ids=ids).last_hidden_state[0].double().mean(0) for each in (model, other)]
        cosines.append(float(F.cosine_similarity(*means, dim=0)))
    assert found.embedding_cosine == pytest.approx(sum(cosines) / len(cosines), rel=1e-5)
    assert found.lowest_cosine == pytest.approx(min(cosines), rel=1e-5)
    assert found.embedding_cosine is not None
    assert found.embedding_cosine < 0.9999
    if name == "BertModel":
        assert found.masked_perplexity is None
        return
    assert found.masked == count
    assert found.masked_perplexity == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert found.baseline_masked_perplexity != found.masked_perplexity


def test_accuracy_on_labelled_texts(tmp_path: Path) -> None:
    model, words = make_encoder(tmp_path / "model", "BertForSequenceClassification"), tokenizer()
    texts = [f"text {number} of {number * number}" for number in range(12)]
    with torch.no_grad():
        likeliest = [int(model(**words(text, return_tensors="pt")).logits.argmax()) for text in texts]
    labels = [(label + (number % 4 == 0)) % 3 for number, label in enumerate(likeliest)]  # a quarter is wrong
    file = tmp_path / "task.jsonl"
    file.write_text(
        "\n".join(
            json.dumps({"text": text, "label": f"LABEL_{label}" if label else label}) for text, label in zip(texts, labels, strict=True)
        )
    )
    task = read_task(file, words, model.config, 40)
    [found] = measure_encoder(model, {}, words, 40, tasks={"task": task})
    assert found.accuracy == pytest.approx(0.75)
    for wrong in ('{"text": "a", "label": 3}', '{"text": "a", "label": "good"}', '{"text": 1, "label": 1}', '"a"'):
        file.write_text(wrong)
        with pytest.raises(PTQError, match=r"line 1: is not .* with a label of 0 to 2 or a name such as LABEL_0 but"):
            read_task(file, words, model.config, 40)
    bare = make_encoder(tmp_path / "bare", "BertForMaskedLM")
    with pytest.raises(UsageError, match="has no head that gives a text a label"):
        list(measure_encoder(bare, {}, words, 40, tasks={"task": Labelled([[5, 6]], [1])}))


def test_the_command_line_of_encoders(ptq: Ptq, tmp_path: Path) -> None:
    make_encoder(tmp_path / "model", "BertForSequenceClassification")
    text, task = write_rows(tmp_path / "text.jsonl"), tmp_path / "task.jsonl"
    task.write_text('{"text": "one two", "label": 1}\n{"text": "three", "label": "LABEL_0"}')
    out = tmp_path / "out"
    options = ("--algo", "gptq", "--group-size", "16", "--nsamples", "8", "--seqlen", "40", "--calib", text, "--output", out)
    said = ptq("quantize", tmp_path / "model", *options)
    assert said.code == 0
    assert "ptq generate" not in said.out + said.err + (out / "README.md").read_text()
    facts = json.loads(ptq("eval", out, "--ppl", text, "--task", task, "--json").out)
    assert facts["conditions"]["sha256_of"] == "SHA256SUMS"
    found = facts["results"]
    assert set(found[0]) == {"text", "tokens", "windows", "seqlen", "embedding_cosine", "lowest_cosine"}
    assert 0.9 < found[0]["embedding_cosine"] < 1
    assert found[1]["accuracy"] in (0.0, 0.5, 1.0)
    assert {"accuracy", "baseline_accuracy"} <= set(found[1])
    for line, says in (
        (("generate", out, "text"), "is an encoder, which writes no text; measure it with ptq eval"),
        (("bench", out, "--only", "model"), "is an encoder, which makes no tokens that could be timed"),
        (("bench", tmp_path / "model"), "only the kernels of a quantized one are"),
        (("eval", out, "--ppl", text, "--stride", "4"), "measured without --write-card, --stride and --bos"),
        (("eval", out, "--ppl", text, "--task", tmp_path / "none.jsonl"), "none.jsonl: no such file"),
        (("quantize", tmp_path / "model", "--calib", "self", "--algo", "gptq", "--output", tmp_path / "x"), "encoder, which writes none"),
        (("quantize", tmp_path / "model", "--finish", "kl", "--calib", text, "--output", tmp_path / "x"), "and the encoder has none"),
    ):
        answer = ptq(*line)
        assert says in one_line(answer)
        assert answer.code == 2
