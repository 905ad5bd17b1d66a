"""Layers joined into one: what the parts return, when the joined layer runs, and that a change in between is noticed."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from layers import random_inputs, random_layer
from ptq_kernels import JoinedLinear, ReferenceWeightOnly
from torch import Tensor, nn

SIZES = (32, 16, 16)


class Counted(ReferenceWeightOnly):
    """A layer that counts its runs."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


def joined() -> tuple[Counted, list[nn.Module]]:
    codes, scale, _, _ = random_layer(sum(SIZES), 64, 4, 32)
    layer = Counted(codes, scale, None, 4, 32)
    return layer, JoinedLinear(layer, SIZES).parts()


def inputs(seed: int = 0) -> Tensor:
    return random_inputs(2, 3, 64, seed=seed)


def test_parts_return_their_outputs_of_one_run() -> None:
    layer, parts = joined()
    x = inputs()
    expected = ReferenceWeightOnly.forward(layer, x).split(SIZES, dim=-1)
    for _ in range(2):
        for part, columns in zip(parts, expected, strict=True):
            assert part.out_features == columns.shape[-1]
            assert torch.equal(part(x), columns)
    assert layer.runs == 2


def test_another_tensor_runs_by_itself() -> None:
    layer, (q, k, v) = joined()
    x, other = inputs(), inputs(1)
    assert not torch.equal(q(x), q(other))
    assert torch.equal(k(x), ReferenceWeightOnly.forward(layer, x)[..., 32:48])
    assert torch.equal(v(other.clone()), ReferenceWeightOnly.forward(layer, other)[..., 48:])


def test_a_tensor_that_was_written_to_is_another() -> None:
    layer, (q, k, _) = joined()
    x = inputs()
    q(x)
    x.mul_(2)
    assert torch.equal(k(x), ReferenceWeightOnly.forward(layer, x)[..., 32:48])
    assert layer.runs == 2


def test_a_part_that_is_called_twice_runs_again() -> None:
    layer, (q, k, _) = joined()
    x = inputs()
    q(x)
    first = k(x)
    assert torch.equal(k(x), first)
    assert layer.runs == 2


def test_in_inference_mode_it_runs_once_too() -> None:
    layer, parts = joined()
    with torch.inference_mode():
        x = inputs().mul_(2)
        found = [part(x) for part in parts]
    assert layer.runs == 1
    assert torch.equal(torch.cat(found, dim=-1), ReferenceWeightOnly.forward(layer, x))


def test_nothing_is_kept_once_all_have_theirs() -> None:
    _, parts = joined()
    x = inputs()
    for part in parts:
        part(x)
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None


def test_the_weights_are_there_once() -> None:
    model = nn.Module()
    _, (model.q, model.k, model.v) = joined()
    assert [name for name, _ in model.named_buffers()] == ["q.joined.linear.packed", "q.joined.linear.scale"]
    twin = copy.deepcopy(model).double()
    assert twin.k._joined[0] is twin.q.joined
    x = inputs()
    assert torch.equal(twin.k(x.double()), ReferenceWeightOnly.forward(twin.q.joined.linear, x.double())[..., 32:48])


def test_compiled_whole_it_runs_once() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, (self.q, self.k, self.v) = joined()

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x)[..., :16] * self.k(x) + self.v(x)

    block = Block()
    x = inputs()
    expected = block(x)
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(sum(node.target is torch.nn.functional.linear for node in graph.graph.nodes))
        return graph

    torch.compile(block, fullgraph=True, backend=count)(x)
    assert graphs == [1]
    assert torch.allclose(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-5)


def test_sizes_must_add_up() -> None:
    layer, _ = joined()
    with pytest.raises(ValueError, match=r"sizes \[32, 16\] do not add up to the 64 outputs"):
        JoinedLinear(layer, (32, 16))
