"""Text that a model writes itself, against its own probabilities; how it is kept; and whether a text is foreign to a model."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import ARCHITECTURES, TOKENS, byte_tokenizer, make_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MambaConfig

from ptqcli.calibration import own_text_cache
from ptqcli.calibration.familiar import familiarity, looked_at
from ptqcli.calibration.own_text import Prompts, Sampling, cache_works, draw, go_on, prompts, write_tokens
from ptqcli.model.kinds import CAUSAL
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder, ModelInMemory
from ptqcli.model.whole import walked, whole

CPU = torch.device("cpu")
WORDS = 12
# The chi-square value with 11 degrees of freedom that chance exceeds once in a million times.
LIKELY = 50.0


class Chain(nn.Module):
    """A language model whose next token depends on the last one only, with known probabilities; its cache counts tokens.

    forgets: the cache is offered, and what is in it is not used, as a broken one would do.
    """

    def __init__(self, forgets: bool = False) -> None:
        super().__init__()
        self.table, self.forgets = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(3)) * 1.5, forgets

    def forward(self, input_ids: Tensor, past_key_values: int | None = None, use_cache: bool = False) -> SimpleNamespace:
        logits = self.table[input_ids]
        if self.forgets and past_key_values is not None:
            logits = logits.flip(-1)
        return SimpleNamespace(logits=logits, past_key_values=(past_key_values or 0) + input_ids.shape[1] if use_cache else None)


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    return ((counts - expected) ** 2 / expected).sum().item()


def ignore(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize(("temperature", "wrong"), [(1.0, 1.25), (0.7, 1.0)])
def test_draws_follow_the_probabilities_of_the_model(temperature: float, wrong: float) -> None:
    chain, generator = Chain(), torch.Generator().manual_seed(0)
    rows = go_on(chain, CAUSAL, torch.full((20_000, 1), 4), 2, temperature, generator)
    expected = torch.softmax(chain.table.double() / temperature, -1)
    assert chi_square(rows[:, 1], expected[4]) < LIKELY
    behind = rows[rows[:, 1] == rows[0, 1]]
    assert chi_square(behind[:, 2], expected[rows[0, 1]]) < LIKELY
    assert chi_square(rows[:, 1], torch.softmax(chain.table.double() / wrong, -1)[4]) > LIKELY, "another temperature must be found out"
    assert chi_square(rows[:, 1], expected[5]) > LIKELY, "and the probabilities of another context"


def test_a_draw_is_never_a_token_of_probability_zero() -> None:
    logits = torch.full((5_000, 9), -torch.inf)
    logits[:, [2, 5]] = torch.tensor([0.0, 1.0])
    assert set(draw(logits, 1.0, torch.Generator().manual_seed(0)).tolist()) == {2, 5}


def test_pieces_begin_with_words_of_the_vocabulary_at_equal_shares() -> None:
    tokenizer = byte_tokenizer()
    start = prompts(tokenizer, 257, None)
    assert start.first.tolist() == list(range(256)), "all but the special token"
    assert prompts(tokenizer, 100, None).first.tolist() == list(range(100)), "the model has no row for the others"
    [plain] = start.drawn(100_000, 0.5, torch.Generator().manual_seed(0))  # no template, so no chats
    assert abs(chi_square(plain[:, 0], torch.full((256,), 1 / 256)) - 255) < 6 * (2 * 255) ** 0.5
    assert len(plain) == 100_000
    assert plain.shape[1] == 1


def test_chats_begin_as_the_template_begins_a_users_message() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}"
    plain, chats = prompts(tokenizer, 257, 256).drawn(8, 0.25, torch.Generator().manual_seed(0))
    assert [tokenizer.decode(row[1:]) for row in chats] == ["[user]"] * 2
    assert len(plain) == 6
    assert plain[:, 0].tolist() == [256] * 6
    assert chats[:, 0].tolist() == [256] * 2, "behind the beginning of the sequence"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for m in messages %}{{ m.role }}{% endfor %}", "{{ messages[7].role }}"]
)
def test_a_template_without_a_place_for_a_message_gives_no_chats(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert prompts(tokenizer, 257, None).chat.tolist() == []


def written(model: nn.Module, seed: int = 0, count: int = 200, **how: float) -> Tensor:
    start = Prompts(first=torch.arange(10), chat=torch.tensor([10, 11]), bos=None, end=7)
    return write_tokens(model, CAUSAL, start, count, Sampling(**{"length": 16, "rows": 5, **how}), seed, CPU, ignore)  # type: ignore[arg-type]


def test_the_seed_decides_the_text() -> None:
    assert torch.equal(written(Chain()), written(Chain()))
    assert not torch.equal(written(Chain()), written(Chain(), seed=1))
    assert not torch.equal(written(Chain()), written(Chain(), temperature=1.1))


def test_pieces_are_joined_with_the_end_of_text() -> None:
    tokens = written(Chain(), count=17 * 8)
    pieces = tokens.view(8, 17)
    assert pieces[:, -1].tolist() == [7] * 8
    assert sorted((piece[0].item() == 10) for piece in pieces) == [False] * 6 + [True] * 2, "a quarter are chats"
    assert len(written(Chain(), count=100)) == 100


def test_a_model_without_a_working_cache_writes_the_same() -> None:
    assert cache_works(Chain(), CAUSAL, torch.tensor([1, 2]))
    assert not cache_works(Chain(forgets=True), CAUSAL, torch.tensor([1, 2]))
    assert torch.equal(written(Chain(forgets=True)), written(Chain()))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "gpt2", "bloom", "opt", "falcon", "gpt_neox"])
def test_real_models_write_the_same_with_and_without_cache(architecture: str, tmp_path: Path) -> None:
    assert architecture in ARCHITECTURES
    model = make_model(tmp_path, architecture)
    assert cache_works(model, CAUSAL, torch.tensor([3, 4]))
    with torch.no_grad():
        both = [
            go_on(model, CAUSAL, torch.arange(6)[:, None], 24, 1.0, torch.Generator().manual_seed(0), cached) for cached in (True, False)
        ]
    assert torch.equal(*both)


def test_a_model_that_keeps_a_state_elsewhere_writes_without() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, **TOKENS)).eval()
    assert not cache_works(model, CAUSAL, torch.tensor([3, 4]))
    assert len(written(model, count=40)) == 40


# The whole model


@pytest.mark.parametrize("context", [whole, walked])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_whole_model_is_that_of_transformers(context, architecture: str, tmp_path: Path) -> None:
    model, ids = make_model(tmp_path, architecture), torch.arange(20).view(2, 10)
    skeletons = [Skeleton(ModelFolder(tmp_path)), Skeleton(ModelInMemory(model, byte_tokenizer()))]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for skeleton in skeletons:
        with torch.no_grad(), context(skeleton, CPU, torch.float32) as loaded:
            torch.testing.assert_close(loaded(ids, use_cache=False).logits, model(ids).logits)
            absent = {name for name, parameter in loaded.named_parameters() if parameter.is_meta}
        assert bool(absent) == (context is walked), "a block's weights stay only where all do"
        assert all(parameter.is_meta for parameter in skeleton.model.parameters())
        assert not skeleton._kept
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# What is kept


def test_kept_text_is_read_and_what_is_not_the_text_is_not(tmp_path: Path) -> None:
    tokens = torch.arange(50)
    own_text_cache.store(tmp_path / "deep" / "cache", "a" * 64, tokens)
    [file] = (tmp_path / "deep" / "cache").iterdir()

    def kept() -> Tensor | None:
        return own_text_cache.load(tmp_path / "deep" / "cache", "a" * 64, 50, 50)

    assert torch.equal(kept(), tokens)  # type: ignore[arg-type]
    assert own_text_cache.load(file.parent, "b" * 64, 50, 50) is None
    assert own_text_cache.load(file.parent, "a" * 64, 49, 50) is None
    assert own_text_cache.load(file.parent, "a" * 64, 50, 49) is None, "a token that the model does not have"
    good = file.read_text()
    stored = json.loads(good)
    changes = [{"tokens": [*range(49), 0]}, {"tokens": "x"}, {"tokens": [True] * 50}, {"fingerprint": "b"}, {"tokens": [*range(49), -1]}]
    for changed in [*(json.dumps({**stored, **change}) for change in changes), "{", "[]", good[:-20], ""]:
        file.write_text(changed)
        assert kept() is None, changed
    own_text_cache.store(file.parent, "a" * 64, tokens)
    assert torch.equal(kept(), tokens)  # type: ignore[arg-type]
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing half written is left"


def test_the_fingerprint_is_of_files_and_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = own_text_cache.fingerprint(tmp_path, {"seed": 0})
    assert first == own_text_cache.fingerprint(tmp_path, {"seed": 0})
    assert first != own_text_cache.fingerprint(tmp_path, {"seed": 1})
    (tmp_path / "tokenizer.json").write_text("{}")
    assert first != own_text_cache.fingerprint(tmp_path, {"seed": 0})


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    own_text_cache.store(tmp_path / "file" / "cache", "a" * 64, torch.arange(3))
    assert own_text_cache.load(tmp_path / "file" / "cache", "a" * 64, 3, 9) is None


# Whether the model knows a text


def test_loss_and_expected_loss_are_those_of_float64() -> None:
    chain, windows = Chain(), torch.randint(WORDS, (6, 16), generator=torch.Generator().manual_seed(1))
    found = familiarity(chain, CAUSAL, windows)
    assert found is not None
    log_p = torch.log_softmax(chain.table.double(), -1)
    loss, expected = [], []
    for row in windows.tolist():
        pairs = list(pairwise(row[4:]))
        loss.append(-sum(log_p[a, b] for a, b in pairs) / len(pairs))
        expected.append(-sum((log_p[a].exp() * log_p[a]).sum() for a, _ in pairs) / len(pairs))
    assert found.loss == pytest.approx(float(sum(loss) / 6), rel=1e-5)
    assert found.expected == pytest.approx(float(sum(expected) / 6), rel=1e-5)
    assert found.error == pytest.approx((torch.stack(loss) - torch.stack(expected)).std().item() / 6**0.5, rel=1e-4)


def test_a_text_of_its_own_is_familiar_and_another_is_foreign() -> None:
    chain = Chain()
    own = written(chain, count=64 * 64, length=64, chats=0.0).view(64, 64)
    other = torch.randint(WORDS, (64, 64), generator=torch.Generator().manual_seed(1))
    mine, theirs = familiarity(chain, CAUSAL, own), familiarity(chain, CAUSAL, other)
    assert mine is not None
    assert abs(mine.loss - mine.expected) < 4 * mine.error
    assert not mine.foreign
    assert theirs is not None
    assert theirs.foreign
    assert not theirs.at_home
    assert familiarity(chain, CAUSAL, own[:1]) is None


def test_what_is_looked_at_is_a_small_part() -> None:
    assert looked_at(torch.zeros(128, 2048), 128 * 2048 // 8).shape == (32, 64)
    assert looked_at(torch.zeros(16, 512), 1024).shape == (16, 64)
    assert looked_at(torch.zeros(4, 32), 16).shape == (2, 32)
