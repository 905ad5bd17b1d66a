"""Rotations: orthogonal, Hadamard where one is known, the same by seed."""

import pytest
import torch

from ptqcli.transforms.hadamard import Rotation, paley, random_rotation

# Widths of models and heads. Of 26 and 1 no Hadamard matrix exists; the odd parts 37 and 29 have none of Paley's first kind nearby.
EVEN = {1: 1, 2: 1, 64: 1, 128: 1, 96: 12, 576: 72, 896: 224, 960: 60, 1536: 12, 2560: 20, 2880: 180}
UNEVEN = [26, 74, 9, 58]


def dense(rotation):
    """Q, by what it makes of the unit vectors."""
    return rotation.apply(torch.eye(rotation.size))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def is_orthogonal(matrix):
    return torch.allclose(matrix @ matrix.t(), torch.eye(len(matrix), dtype=matrix.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [*EVEN, *UNEVEN])
def test_a_rotation_is_orthogonal_and_even_where_a_hadamard_matrix_is_known(size):
    rotation = random_rotation(size, seeded(3))
    matrix = dense(rotation)
    assert matrix.dtype == torch.float64
    assert is_orthogonal(matrix)
    even = torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5), rtol=1e-12, atol=0)
    assert even == (size in EVEN)
    assert len(rotation.base) == EVEN.get(size, size // (size & -size))


def test_what_is_applied_is_the_kronecker_product():
    """Against Sylvester's matrix built up as his definition does, and torch's product."""
    rotation = random_rotation(96, seeded(0))
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < 96 // 12:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    expected = torch.diag(rotation.signs) @ torch.kron(sylvester / 8**0.5, rotation.base)
    torch.testing.assert_close(dense(rotation), expected, rtol=0, atol=1e-14)
    rows = torch.randn(3, 5, 96, generator=seeded(1))
    torch.testing.assert_close(rotation.apply(rows), rows.double() @ expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("q", [3, 7, 11, 19, 23])
def test_paleys_matrices_are_hadamard(q):
    matrix = paley(q)
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.t(), (q + 1) * torch.eye(q + 1, dtype=torch.float64))


def test_one_flipped_sign_shows():
    """The twin of the tests before: neither Paley's matrix nor a base survives it."""
    matrix = paley(11)
    matrix[3, 4] *= -1
    assert not is_orthogonal(matrix / 12**0.5)
    assert not is_orthogonal(dense(Rotation(torch.ones(12, dtype=torch.float64), matrix / 12**0.5)))


@pytest.mark.parametrize("size", [64, 576, 26])
def test_the_seed_settles_the_rotation(size):
    first, again, other = (dense(random_rotation(size, seeded(seed))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
