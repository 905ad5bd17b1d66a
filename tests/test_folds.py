"""The folds of 14 architectures against a known list, and blocks made to mislead the search."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from tiny import ARCHITECTURES, advance, in_memory, make_model, token_ids
from torch import nn
from torch.nn import functional

from ptqcli.calibration.record import record_calls
from ptqcli.model.linears import is_linear, linear_weight
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.numerics.ranges import MinMax
from ptqcli.transforms.folded import BOUND, FoldedBlock, verified
from ptqcli.transforms.folds import Fold, FoldSearch, divide, find_folds
from ptqcli.transforms.residual import residual_writers

CPU = torch.device("cpu")

HIDDEN, MLP, HEADS, HEAD = 64, 128, 4, 16


def whole(size):
    """Channels in their order."""
    return torch.arange(size)


# v of 2 heads, each for 2 query heads; v in a fused linear that lies as [q | k | v] or, head by head, as [q k v]; of one head for all.
GROUPED = torch.arange(2 * HEAD).view(2, 1, HEAD).expand(2, 2, HEAD).flatten()
BEHIND_QK = 2 * HIDDEN + torch.arange(HIDDEN)
IN_EACH_HEAD = torch.arange(3 * HIDDEN).view(HEADS, 3, HEAD)[:, 2].flatten()
ONE_FOR_ALL = torch.arange((HEADS + 1) * HEAD, (HEADS + 2) * HEAD).repeat(HEADS)

QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
LLAMA = [
    ("input_layernorm", QKV, whole(HIDDEN)),
    ("self_attn.v_proj", "self_attn.o_proj", GROUPED),
    ("post_attention_layernorm", "mlp.gate_proj mlp.up_proj", whole(HIDDEN)),
    ("mlp.up_proj", "mlp.down_proj", whole(MLP)),
]
GEMMA = [(producer.replace("post_attention", "pre_feedforward"), *rest) for producer, *rest in LLAMA]

KNOWN = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "stablelm": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "olmo2": [LLAMA[1], LLAMA[3]],
    "phi3": [
        ("input_layernorm", "self_attn.qkv_proj", whole(HIDDEN)),
        ("self_attn.qkv_proj", "self_attn.o_proj", HIDDEN + 2 * HEAD + GROUPED),
        ("post_attention_layernorm", "mlp.gate_up_proj", whole(HIDDEN)),
        ("mlp.gate_up_proj", "mlp.down_proj", MLP + whole(MLP)),
    ],
    "opt": [
        ("self_attn_layer_norm", QKV, whole(HIDDEN)),
        ("self_attn.v_proj", "self_attn.out_proj", whole(HIDDEN)),
        ("final_layer_norm", "fc1", whole(HIDDEN)),
        ("fc1", "fc2", whole(MLP)),
    ],
    "gpt2": [
        ("ln_1", "attn.c_attn", whole(HIDDEN)),
        ("attn.c_attn", "attn.c_proj", BEHIND_QK),
        ("ln_2", "mlp.c_fc", whole(HIDDEN)),
    ],
    "gpt_neox": [
        ("input_layernorm", "attention.query_key_value", whole(HIDDEN)),
        ("attention.query_key_value", "attention.dense", IN_EACH_HEAD),
        ("post_attention_layernorm", "mlp.dense_h_to_4h", whole(HIDDEN)),
    ],
    "bloom": [
        ("input_layernorm", "self_attention.query_key_value", whole(HIDDEN)),
        ("self_attention.query_key_value", "self_attention.dense", IN_EACH_HEAD),
        ("post_attention_layernorm", "mlp.dense_h_to_4h", whole(HIDDEN)),
    ],
    "falcon": [
        ("input_layernorm", "self_attention.query_key_value mlp.dense_h_to_4h", whole(HIDDEN)),
        ("self_attention.query_key_value", "self_attention.dense", ONE_FOR_ALL),
    ],
}
# Parameters of norms: what is added to them before they are divided.
OFFSETS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), (("weight", 0.0),)),
    **dict.fromkeys(("gemma2", "gemma3"), (("weight", 1.0),)),
    **dict.fromkeys(("stablelm", "opt", "gpt2", "gpt_neox", "bloom", "falcon"), (("weight", 0.0), ("bias", 0.0))),
}


@dataclass(frozen=True)
class Probed:
    """A loaded float32 block, what was found in it without its weights, and a function that runs it on a few tokens."""

    block: nn.Module
    found: FoldSearch
    run: object


def cast(value, dtype):
    """``value`` with its floating tensors as ``dtype``."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    return value


def runner(call, hidden):
    """What runs a block as ``call`` says, in any dtype."""

    def run(block, dtype):
        return replace(call, args=cast(call.args, dtype), kwargs=cast(dict(call.kwargs), dtype)).run(block, hidden.to(dtype, copy=True))

    return run


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
@torch.no_grad()
def probed(architecture, tmp_path_factory):
    """Both blocks of a tiny model whose norms multiply by something."""
    folder = tmp_path_factory.mktemp(architecture)
    make_model(folder, architecture)
    skeleton = Skeleton(ModelFolder(folder))
    recording = record_calls(skeleton, token_ids(12), 2, CPU, torch.float32, in_memory)
    blocks = []
    for index in range(2):
        run = runner(recording.calls[index][0], recording.hidden.clone())
        found = find_folds(skeleton.blocks[index], run)
        block = skeleton.load_block(index, CPU, torch.float32)
        advance(skeleton, recording, index, block)
        for parameter in block.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(3)))
        blocks.append(Probed(block, found, run))
    return blocks


def scales(fold, seed=0, low=0.3, high=3.0):
    return torch.empty(fold.width).uniform_(low, high, generator=torch.Generator().manual_seed(seed))


def folded(block, run, stored=None):
    """``block`` for its folds to be scaled; nothing in it is quantized."""
    return FoldedBlock(block, [], {}, {}, stored or block.get_parameter, lambda twin: run(twin, torch.float32), MinMax())


@torch.no_grad()
def change(probed, folds):
    """Relative change of the block's output by ``folds`` with random scales."""
    block = folded(probed.block, probed.run)
    expected = block.output()
    for seed, fold in enumerate(folds):
        block.scale(fold, scales(fold, seed))
    return float((block.output() - expected).norm() / expected.norm())


def test_folds_are_the_known_ones(architecture, probed):
    for block in probed:
        found = [(fold.producer, " ".join(fold.readers), fold.channel.tolist()) for fold in block.found.folds]
        assert found == [(producer, readers, channel.tolist()) for producer, readers, channel in KNOWN[architecture]]
        assert not block.found.rejected
        for fold in block.found.folds:
            producer = block.block.get_submodule(fold.producer)
            if is_linear(producer):
                assert (fold.offsets, fold.width) == ((), len(linear_weight(producer)))
            else:
                assert (fold.offsets, fold.width) == (OFFSETS[architecture], HIDDEN)


WRITERS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "stablelm"), ("self_attn.o_proj", "mlp.down_proj")),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    **dict.fromkeys(("gemma2", "gemma3", "olmo2"), ()),  # a norm stands between their linears and the residual stream
}


def test_what_writes_into_the_residual_stream_is_known(architecture, probed):
    for block in probed:
        found = residual_writers(block.block, block.run)
        assert tuple(found) == WRITERS[architecture]
        assert found == {name: pytest.approx(1) for name in found}


def test_a_constant_before_the_sum_is_found_and_another_sum_is_no_stream():
    class Block(nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.norm, self.down = nn.LayerNorm(8), nn.Linear(8, 8)
            self.combine = forward

        def forward(self, x):
            return self.combine(x, self.down(self.norm(x)))

    def found(combine):
        block = Block(combine)
        return residual_writers(block, lambda twin, dtype: twin(on_random_tokens_of(8, dtype)))

    assert found(lambda x, y: x + 0.22 * y) == {"down": pytest.approx(0.22)}
    for combine in (lambda x, y: 0.5 * x + y, lambda x, y: x * y, lambda x, y: x + y.tanh(), lambda x, y: y):
        assert found(combine) == {}


def on_random_tokens_of(features, dtype):
    return torch.randn(2, 5, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_loaded_blocks_have_the_same_folds_and_all_are_verified(probed):
    for block in probed:
        loaded = find_folds(block.block, block.run)
        kept = verified(block.block, loaded, block.run)
        assert not kept.rejected
        for found in (loaded, kept):
            assert [fold.producer for fold in found.folds] == [fold.producer for fold in block.found.folds]


def test_folding_leaves_the_output_unchanged(probed):
    for block in probed:
        for fold in block.found.folds:
            assert change(block, [fold]) <= BOUND
        assert change(block, block.found.folds) <= BOUND


def test_a_wrong_channel_or_a_forgotten_reader_changes_it(probed):
    for block in probed:
        for fold in block.found.folds:
            channel = fold.channel.clone()
            channel[0] = channel[-1]
            wrong = [replace(fold, channel=channel)]
            wrong += [replace(fold, readers=tuple(other for other in fold.readers if other != reader)) for reader in fold.readers]
            for bad in wrong:
                assert change(block, [bad]) > BOUND
            left = verified(block.block, FoldSearch(tuple(wrong), ()), block.run)
            assert not left.folds
            assert all("changes the block's output" in reason for _, reason in left.rejected)


def test_what_is_proved_is_what_transforms_use(probed, monkeypatch):
    """A fault in ``FoldedBlock.scale``, here a reader that it forgets, shows in the proof."""
    scale = FoldedBlock.scale
    monkeypatch.setattr(FoldedBlock, "scale", lambda self, fold, scales: scale(self, replace(fold, readers=fold.readers[1:]), scales))
    for block in probed:
        left = verified(block.block, block.found, block.run)
        assert not left.folds
        assert [producer for producer, _ in left.rejected] == [fold.producer for fold in block.found.folds]


@torch.no_grad()
def test_scales_are_taken_back_to_the_last_bit(probed):
    for block in probed:
        scaled, copies = folded(block.block, block.run), dict(copy.deepcopy(block.block).named_parameters())
        expected = scaled.output()
        for _ in range(2):
            for fold in block.found.folds:
                scaled.scale(fold, scales(fold))
            assert not torch.equal(scaled.output(), expected)
            scaled.undo()
            assert torch.equal(scaled.output(), expected)
        assert not scaled.rewritten()
        scaled.release()
        assert all(torch.equal(parameter, copies[name]) for name, parameter in block.block.named_parameters())


@pytest.mark.parametrize("architecture", ["llama", "gemma3"], indirect=True)
@torch.no_grad()
def test_a_rounded_norm_folds_exactly(probed):
    """A norm is stored in bfloat16; its readers take over the scale that the rounding left."""
    for block in probed:
        for fold in (fold for fold in block.found.folds if fold.offsets):
            twin = copy.deepcopy(block.block)
            norm = twin.get_submodule(fold.producer)
            norm.weight.copy_(norm.weight.bfloat16())
            expected = block.run(copy.deepcopy(twin).double(), torch.float64)
            wanted = scales(fold)
            name, offset, before = f"{fold.producer}.weight", dict(fold.offsets)["weight"], norm.weight
            stored = {**dict(twin.named_parameters()), name: before.bfloat16()}
            scaled = folded(twin, block.run, stored.__getitem__)
            scaled.scale(fold, wanted)
            scaled.release()
            assert torch.equal(norm.weight, norm.weight.bfloat16().float())
            effective = ((before.double() + offset) / (norm.weight.double() + offset)).float()
            assert not torch.equal(effective, wanted)
            torch.testing.assert_close(effective, wanted, rtol=2**-8 if offset == 0 else 2**-5, atol=0)
            error = (block.run(copy.deepcopy(twin).double(), torch.float64) - expected).norm() / expected.norm()
            assert error < 2e-7
            for reader in fold.readers:  # the twin: had they taken the scale that was asked for
                twin.get_submodule(reader).weight.mul_(fold.spread(wanted) / fold.spread(effective))
            error = (block.run(twin.double(), torch.float64) - expected).norm() / expected.norm()
            assert error > 1e-5


@torch.no_grad()
def test_channels_that_a_norm_sets_to_zero_are_left_alone(probed):
    for block in probed:
        for fold in (fold for fold in block.found.folds if fold.offsets):
            twin = replace(block, block=copy.deepcopy(block.block))
            for name, offset in fold.offsets:
                twin.block.get_submodule(fold.producer).get_parameter(name)[5:9] = -offset
            scaled = folded(twin.block, twin.run)
            scaled.scale(fold, scales(fold))
            for reader in fold.readers:
                moved = scaled.weight(reader) != linear_weight(twin.block.get_submodule(reader))
                assert not moved[:, 5:9].any()
                assert moved[:, 9:].any(dim=0).all()
            assert change(twin, [fold]) <= BOUND
            assert [kept.producer for kept in verified(twin.block, FoldSearch((fold,), ()), twin.run).folds] == [fold.producer]


def test_divide_follows_the_first_parameter_that_is_not_zero():
    parameters = {"weight": torch.tensor([3.0, 0.0, 0.0, -1e-7], dtype=torch.float16), "bias": torch.tensor([1.0, 5.0, 0.0, 0.0]).half()}
    new, scale = divide(parameters, (("weight", 0.0), ("bias", 0.0)), torch.tensor([0.7, 0.7, 0.7, 4.0]))
    assert scale[0] == 3.0 / new["weight"][0].double()
    assert new["bias"][0] == (1 / scale[0]).half()
    assert scale[1] == 5.0 / new["bias"][1].double()
    assert new["weight"][1:3].eq(0).all()
    assert new["bias"][2] == 0
    assert scale[2] == 1
    assert scale[3] == 1  # a fourth of it would be zero in float16
    assert new["weight"][3] == parameters["weight"][3]


def test_largest_and_spread_go_between_columns_and_channels():
    fold = Fold(producer="v", readers=("o",), channel=torch.tensor([2, 2, -1, 0]), width=4)
    assert fold.spread(torch.tensor([5.0, 6.0, 7.0, 8.0])).tolist() == [7, 7, 1, 5]
    assert fold.largest(torch.tensor([1.0, 3.0, 9.0, 4.0])).tolist() == [4, 0, 3, 0]
    assert fold.folded().tolist() == [True, False, True, False]


class Block(nn.Module):
    """norm -> gate, up -> act(gate) * up -> down, beside a residual; what follows changes one thing of it."""

    def __init__(self, activation=functional.silu):
        super().__init__()
        torch.manual_seed(0)
        self.activation = activation
        self.norm = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.mlp(self.norm(x))

    def mlp(self, y):
        return self.down(self.activation(self.gate(y)) * self.up(y))


class Router(nn.Module):
    """Not a linear, although it multiplies with a matrix."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8))

    def forward(self, y):
        return (y @ self.weight.t()).softmax(dim=-1)


class Routed(Block):
    def __init__(self):
        super().__init__()
        self.router = Router()

    def forward(self, x):
        y = self.norm(x)
        return x + self.mlp(y) * self.router(y)[..., :1]


class RoutedByRawParameter(Block):
    def __init__(self):
        super().__init__()
        self.route = nn.Parameter(torch.randn(8))

    def forward(self, x):
        y = self.norm(x)
        return x + self.mlp(y) * (y @ self.route).sigmoid().unsqueeze(-1)


class RoutedBySign(Block):
    """Sends the tokens on one side of a plane through a linear of their own."""

    def __init__(self):
        super().__init__()
        self.route = nn.Parameter(torch.randn(8))
        self.own = nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        chosen = y @ self.route > 0
        x = x + self.mlp(y)
        x[chosen] += self.own(y[chosen])
        return x


class Clamped(Block):
    def mlp(self, y):
        return self.down(functional.silu(self.gate(y)) * self.up(y).clamp(-30, 30))


class Joined(Block):
    """The reader gets the channels turned round, behind others that are no multiples of them."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(24, 8)

    def mlp(self, y):
        return self.down(torch.cat([functional.silu(self.gate(y)), self.up(y).flip(-1)], dim=-1))


class NormInResidual(Block):
    def forward(self, x):
        y = self.norm(x)
        return y + self.mlp(y)


class NormTwice(Block):
    def forward(self, x):
        y = self.norm(x)
        return self.norm(x + self.mlp(y))


class Twice(Block):
    def __init__(self):
        super().__init__()
        del self.gate

    def mlp(self, y):
        return self.down(self.up(y)) + self.down(self.up(y) * 2)


class Reversed(Block):
    """The second reader gets the channels in another order."""

    def mlp(self, y):
        return self.down(functional.silu(self.gate(y)) * self.up(y.flip(-1)))


class Idle(Block):
    """Has a linear for tokens that the probe does not hold."""

    def mlp(self, y):
        chosen = y[..., 0] > 1e9
        y = super().mlp(y)
        return y + self.idle(y) if chosen.any() else y

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(8, 8)


class WithoutCall(Block):
    """Multiplies with a weight without calling its module."""

    def forward(self, x):
        return super().forward(x) + functional.linear(self.norm(x), self.gate.weight)[..., :8]


class NoScale(nn.LayerNorm):
    """A norm that does not hand its scale on."""

    def forward(self, x):
        return functional.layer_norm(x * self.weight, (8,))


class Keyword(Block):
    """Calls by keyword, changes results in place, and returns a tuple."""

    def forward(self, x):
        y = self.norm(input=x)
        y += 0
        gate = self.gate(input=y)
        up = self.up(y)
        up *= functional.silu(gate)
        return (x + self.down(up),)


def on_random_tokens(block, dtype):
    """The output of one of the blocks above."""
    output = block(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)).to(dtype))
    return output[0] if isinstance(output, tuple) else output


def search(block):
    """What is found and verified in ``block``, as {producer: readers}, and what was rejected."""
    found = verified(block, find_folds(block, on_random_tokens), on_random_tokens)
    return {fold.producer: fold.readers for fold in found.folds}, dict(found.rejected)


NORM, UP = {"norm": ("gate", "up")}, {"up": ("down",)}


@pytest.mark.parametrize(
    "block, folds, rejected",
    [
        (Block(), NORM | UP, {}),
        (Block(torch.relu), NORM | UP, {"gate": "down has its inputs scaled by up"}),
        (Block(lambda gate: torch.relu(gate) ** 2), NORM | UP, {"gate": "down depends on it in another way"}),
        (Keyword(), NORM | UP, {}),
        (Joined(), NORM | UP, {}),
        (Routed(), UP, {"norm": "router depends on it and is not a linear"}),
        (RoutedByRawParameter(), UP, {"norm": "returns depends on it in another way"}),
        (RoutedBySign(), UP, {"norm": "the block takes another path"}),
        (Clamped(), NORM, {"up": "down depends on it in another way"}),
        (NormInResidual(), UP, {"norm": "returns depends on it in another way"}),
        (NormTwice(), UP, {"norm": "runs more than once"}),
        (Twice(), {}, {"norm": "up depends on it and is not a linear that runs once", "up": "runs more than once"}),
        (Reversed(), UP, {"norm": "gate, up read the same channels in different orders"}),
        (Idle(), {}, {"block": "idle did not run"}),
        (WithoutCall(), {}, {"block": "uses the weight of a linear without calling"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_else_reads_a_producer_forbids_its_fold(block, folds, rejected):
    found, reasons = search(block)
    assert found == folds
    assert reasons.keys() == rejected.keys()
    for producer, reason in rejected.items():
        assert reason in reasons[producer]


def test_columns_that_are_not_read_have_no_channel():
    fold = find_folds(Joined(), on_random_tokens).folds[1]
    assert fold.channel.tolist() == [-1] * 12 + list(range(11, -1, -1))


def test_a_norm_without_parameters_to_divide_is_not_folded():
    block = Block()
    block.norm = NoScale(8)
    found, reasons = search(block)
    assert found == UP
    assert reasons == {"norm": "dividing its parameters does not divide its output"}


def test_the_search_is_repeatable_and_leaves_the_block_alone():
    block = Routed()
    before = copy.deepcopy(block.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert search(block) == search(block)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert not any(module._forward_hooks for module in block.modules())
