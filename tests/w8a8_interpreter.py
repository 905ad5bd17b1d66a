"""Runs the int8 kernels in Triton's interpreter and prints nothing; ``test_w8a8.py`` and ``test_llm_int8.py`` start it as a process.

The interpreter is chosen when triton is imported, once for a process, so that these checks cannot share pytest's. Every buffer that the
kernels are given is poisoned first: what they read without having written it, or do not write, shows.

    python w8a8_interpreter.py CHECK...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from ptq_kernels import int8_product, llm_int8, quantize_rows, reference, w8a8
from ptq_kernels.tile_config import TileConfig, tables_for
from torch import Tensor

torch.set_num_threads(1)

PLAIN = TileConfig(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2)
LEFT = TileConfig(block_m=32, block_n=64, block_k=64, num_warps=4, num_stages=2, weight_left=True)
BULK = TileConfig(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=2, tma=True)
# M, N, K: every batch asked for, sizes that no tile divides; and the configuration that each is run with. An interpreted
# program takes some ten milliseconds and there is one a token, so that not everything is tried with everything, and least with MANY.
CASES = (
    (1, 96, 704, LEFT),
    (2, 33, 96, PLAIN),
    (3, 51, 97, BULK),  # 97 columns: the copy engine cannot, so this is the masked path
    (16, 64, 128, LEFT),
    (17, 35, 129, PLAIN),
    (17, 65, 144, BULK),
    (64, 70, 208, LEFT),
    (300, 37, 80, BULK),
)
MANY = 64
TOLERANCE = 4e-3


def poison() -> None:
    """Fills all memory that torch hands out uninitialised with NaN or a large integer."""
    plain = Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = plain(self, *size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 113)

    Tensor.new_empty = new_empty  # type: ignore[method-assign]


class Case:
    """A layer and an input for it, with outliers in some columns."""

    def __init__(self, M: int, N: int, K: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed + M * N * K)
        self.x = torch.randn(M, K, generator=generator)
        self.stored = torch.tensor([1, K // 2, K - 1], dtype=torch.int32)
        self.x[M // 2, 1] = -30.0
        self.x[0, K // 3] = 25.0
        self.x = self.x.to(dtype)
        self.codes = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
        self.scale = torch.rand(N, generator=generator) / 100 + 1e-3
        self.bias = torch.randn(N, generator=generator).to(dtype)
        self.scale[1::2] *= -1
        weight = self.codes.double() * self.scale.double()[:, None]
        self.outlier_weight = (weight[:, self.stored.long()] + 0.01 * torch.randn(N, 3, generator=generator)).to(dtype)


def error(got: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; NaN where anything was left unwritten."""
    return float((got.double() - truth).norm() / truth.norm())


def flipped(codes: Tensor, column: int | None = None) -> Tensor:
    """``codes`` with one sign bit flipped, in the middle or in ``column``."""
    changed = codes.clone()
    changed[changed.shape[0] // 2, changed.shape[1] // 2 if column is None else column] ^= -128
    return changed


def flipped_sign(weight: Tensor) -> Tensor:
    """``weight`` with the sign of one value in column 0 flipped."""
    changed = weight.clone()
    changed[len(weight) // 2, 0] *= -1
    return changed


def padded(codes: Tensor) -> Tensor:
    """``codes`` [M, K] with rows of zeros up to a multiple of 16, as ``quantize_rows`` leaves them."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % 16))


def again(
    quantized: quantize_rows.Quantized,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    config: TileConfig,
    split_k: int = 1,
    slots: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The product alone, of tokens that are quantized already."""
    x = quantized.codes
    out = x.new_empty((len(x), len(codes)), dtype=dtype)
    plan = int8_product.plan("w8a8" if slots is None else "llm_int8", x, codes, replace(config, split_k=split_k))
    if plan.counters is not None:
        plan.counters.zero_()
    int8_product.product(quantized, codes, scale, bias, out, plan, slots, outlier_weight)
    return out


def check_quantize() -> None:
    """Codes and scales are the reference's bits, in every dtype, with rows of zeros, tiny rows and a poisoned end of row."""
    for dtype, (M, K) in product((torch.float16, torch.bfloat16, torch.float32), ((1, 31), (5, 96), (3, 4099))):
        x = Case(M, 1, K, dtype).x
        x[M // 2 :: 2] = 0
        x[-1] *= 1e-6
        for per_token, input_scale in ((True, None), (False, None), (False, torch.tensor([0.01]))):
            counters = torch.full((8,), 7, dtype=torch.int32)
            got = quantize_rows.quantize(x, per_token, input_scale, counters)
            scale = reference.activation_scale(x.float(), per_token) if input_scale is None else input_scale
            codes = torch.round(x.float() / scale).clamp(-128, 127).to(torch.int8)
            assert torch.equal(got.scale, scale.flatten() if input_scale is None else scale.expand(M)), (dtype, M, K)
            assert torch.equal(got.codes[:, :K], codes), (dtype, M, K)
            assert not got.codes[:, K:].any()
            assert not counters.any()


def check_nan() -> None:
    """A value that is not finite makes its whole token not finite, and no other."""
    for value, K in product((float("nan"), float("inf"), -float("inf")), (64, 4099)):
        case = Case(3, 32, K)
        case.x[1, K - 5] = value
        for scale, per_token in ((None, True), (torch.tensor([0.05]), False)):
            out = w8a8.launch(case.x, case.codes, case.scale, scale, per_token, config=replace(PLAIN, split_k=1))
            assert out.isfinite().all(dim=1).tolist() == [True, False, True], (value, K, scale)


def check_integers() -> None:
    """Sums are exact, a flipped code shows: float32 out with scales of 1, and fewer columns than make a sum too large for it."""
    for M, N, K, config in CASES:
        case = Case(M, N, K, torch.float32)
        x = torch.randint(-128, 128, case.x.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))
        one = torch.ones(1)
        exact = x.long() @ case.codes.long().t()
        for split_k in (1, 3):
            quantized = quantize_rows.Quantized(codes=padded(x), scale=one)
            assert torch.equal(again(quantized, case.codes, one, None, config, split_k).long(), exact), (M, N, K, config, split_k)
        assert not torch.equal(again(quantized, flipped(case.codes), one, None, config, 1).long(), exact)


def check_extremes() -> None:
    """A long row of the largest products, of both signs: sums beyond what float32 holds exactly."""
    x = torch.full((2, 4096), -128.0)
    codes = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(1, 4096)
    codes[1, 0] = 126
    one = torch.ones(1)
    out = w8a8.launch(
        x, codes, one, one, False, None, TileConfig(block_m=16, block_n=32, block_k=1024, num_warps=4, num_stages=2, split_k=2)
    )
    exact = torch.full((2, 4096), -128) @ codes.long().t()
    assert torch.equal(out, exact.float())


def check_w8a8() -> None:
    """Every kind of scale, configuration and split against float64 and, bit for bit, against the reference."""
    for M, N, K, config in CASES:
        case = Case(M, N, K)
        variants: tuple[tuple[Tensor | None, bool, Tensor, Tensor | None, int], ...] = (
            (None, True, case.scale, None, 3),
            (None, False, case.scale[:1], case.bias, 1),
            (torch.tensor([0.05]), False, case.scale.half(), None, 2),
            (None, True, case.scale, case.bias, 1),
        )
        for input_scale, per_token, scale, bias, split_k in variants[-1:] if M > MANY else variants:
            out = w8a8.launch(case.x, case.codes, scale, input_scale, per_token, bias, replace(config, split_k=split_k))
            expected = reference.int8_linear(case.x, case.codes, scale, input_scale, per_token, bias)
            assert torch.equal(out, expected), (M, N, K, config, split_k)
            truth = exact_w8a8(case.x, case.codes, scale, input_scale, per_token, bias)
            assert error(out, truth) < TOLERANCE, (M, N, K, config, split_k)
        quantized = quantize_rows.quantize(case.x, per_token, input_scale, None)
        assert torch.equal(again(quantized, case.codes, scale, bias, config, 3, dtype=case.x.dtype), expected)
        wrong = again(quantized, flipped(case.codes), scale, bias, config, dtype=case.x.dtype)
        assert not torch.equal(wrong, expected)
        assert error(wrong, truth) > TOLERANCE, (M, N, K, error(wrong, truth))


def exact_w8a8(x: Tensor, codes: Tensor, scale: Tensor, input_scale: Tensor | None, per_token: bool, bias: Tensor | None) -> Tensor:
    """In float64, but for the scale and the rounding of activations, which are float32 by definition."""
    step = reference.activation_scale(x.float(), per_token) if input_scale is None else input_scale
    quantized = torch.round(x.float() / step).clamp(-128, 127).double()
    exact = (quantized @ codes.double().t()) * step.double() * scale.double()
    return exact if bias is None else exact + bias.double()


def check_bfloat16() -> None:
    """bf16 in, float32 out; the interpreter rounds to bf16 in another way than hardware, so that the last cast is not shown."""
    case = Case(5, 40, 96, torch.bfloat16)
    quantized = quantize_rows.quantize(case.x, True, None, None)
    out = torch.full((5, 40), float("nan"))
    int8_product.product(quantized, case.codes, case.scale.bfloat16(), case.bias, out, int8_product.Plan(PLAIN))
    assert torch.equal(out, reference.int8_linear(case.x.float(), case.codes, case.scale.bfloat16(), bias=case.bias.float()))


def check_strides() -> None:
    """Batches, and inputs whose rows are apart or whose columns are."""
    case = Case(12, 33, 96)
    expected = reference.int8_linear(case.x, case.codes, case.scale)
    wide = torch.full((12, 100), float("nan"), dtype=torch.float16)
    wide[:, :96] = case.x
    for x in (wide[:, :96], case.x.t().contiguous().t()):
        assert torch.equal(w8a8.launch(x, case.codes, case.scale, config=PLAIN), expected)
    batch = w8a8.launch(case.x.view(3, 4, 96), case.codes, case.scale, config=PLAIN)
    assert torch.equal(batch, expected.view(3, 4, 33))
    assert w8a8.launch(case.x[:0], case.codes, case.scale, config=PLAIN).shape == (0, 33)


def check_shipped() -> None:
    """Every configuration of every table, with K split as it would be, on sizes with a remainder everywhere.

    The interpreter runs one kernel after the other and knows no early launch.
    """
    shipped = {
        replace(entry.config, pdl=False)
        for kernel in ("w8a8", "llm_int8")
        for capability in (90, 80)
        for entry in tables_for(kernel, "", capability)[0]
    }
    for configs, K in (sorted(shipped, key=repr), 336), ([int8_product.SMALL], 323):
        M, N = max(config.block_m for config in configs) + 3, max(config.block_n for config in configs) + 5
        case = Case(M, N, K)
        truth = exact_llm_int8(case.x, case.codes, case.scale, case.stored, case.outlier_weight, 6.0, True, None)
        slots = llm_int8.outlier_slots(case.stored, K)
        whole = quantize_rows.split(case.x, case.stored, slots, 6.0, True, None)
        assert whole.outliers is not None
        for config in configs:
            m, n = config.block_m + 3, config.block_n + 5
            part = replace(whole, codes=whole.codes[:m], scale=whole.scale[:m], outliers=whole.outliers[:m])
            weight = case.outlier_weight[:n]
            out = again(part, case.codes[:n], case.scale[:n], None, config, 2 if config.ctas_per_sm else 1, slots, weight)
            assert error(out, truth[:m, :n]) < TOLERANCE, config


def check_llm_int8() -> None:
    """Fixed columns and a threshold, one scale a token and for all, stored columns and not, against float64."""
    for M, N, K, config in CASES:
        case = Case(M, N, K)
        slots = llm_int8.outlier_slots(case.stored, K)
        variants: tuple[tuple[float | None, bool, Tensor, Tensor | None, int], ...] = (
            (None, False, case.scale[:1], None, 2),
            (6.0, False, case.scale, case.bias, 1),
            (2.5, True, case.scale[:1], case.bias, 1),
            (None, True, case.scale, case.bias, 3),
        )
        for threshold, per_token, scale, bias, split_k in variants[-1:] if M > MANY else variants:
            layer = (scale, case.stored, case.outlier_weight, threshold, per_token, bias)
            truth = exact_llm_int8(case.x, case.codes, *layer)
            out = llm_int8.launch(case.x, case.codes, *layer, config=replace(config, split_k=split_k))
            assert error(out, truth) < TOLERANCE, (M, N, K, config, threshold, error(out, truth))
        truth = exact_llm_int8(case.x, case.codes, case.scale, case.stored, case.outlier_weight, 6.0, True, None)
        quantized = quantize_rows.split(case.x, case.stored, slots, 6.0, True, None)
        for codes, weight, right in (
            (case.codes, case.outlier_weight, True),
            (flipped(case.codes, K // 3), case.outlier_weight, False),
            (case.codes, flipped_sign(case.outlier_weight), False),
        ):
            out = again(quantized, codes, case.scale, None, config, 3 if right else 1, slots, weight, case.x.dtype)
            assert (error(out, truth) < TOLERANCE) is right, (M, N, K, right, error(out, truth))


def exact_llm_int8(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    index: Tensor,
    outlier_weight: Tensor,
    threshold: float | None,
    per_token: bool,
    bias: Tensor | None,
) -> Tensor:
    """By loops over columns in float64."""
    stored = {column: position for position, column in enumerate(index.tolist())}
    K = [k for k in range(x.shape[1]) if (k in stored if threshold is None else bool((x[:, k].double().abs() > threshold).any()))]
    rest = x.clone()
    rest[:, K] = 0
    exact = exact_w8a8(rest, codes, scale, None, per_token, bias)
    for column in K:
        kept = outlier_weight[:, stored[column]] if column in stored else (codes[:, column].float() * scale.float()).to(x.dtype)
        exact += x[:, column].double()[:, None] * kept.double()[None, :]
    return exact


def check_llm_int8_integers() -> None:
    """The codes, scales, list and buffer that the product is given, for few tokens and for many."""
    shapes = ((1, 97), (3, 96), (8, 31), (9, 300), (2, 4200), (12, 4200))
    # With more than 128 tokens two words of flags are joined.
    for (M, K), threshold in (*product(shapes, (None, 2.5, 6.0, 1e5)), ((131, 40), 2.5)):
        case = Case(M, 1, K)
        slots = llm_int8.outlier_slots(case.stored, K)
        above = (case.x.abs() > threshold).any(dim=0).nonzero().flatten() if threshold else case.stored.long()
        for per_token in (True,) if M > 128 else (True, False):
            got = quantize_rows.split(case.x, case.stored, slots, threshold, per_token, None)
            rest = case.x.float().index_fill(1, above, 0)
            scale = reference.activation_scale(rest, per_token)
            assert torch.equal(got.scale, scale.flatten())
            assert torch.equal(got.codes[:, :K], torch.round(rest / scale).clamp(-128, 127).to(torch.int8))
            assert not got.codes[:, K:].any()
            assert got.outliers is not None
            assert torch.equal(got.outliers[:, : len(above)], case.x[:, above])
            assert got.outliers[:, len(above) :].isnan().all()
            if threshold:
                assert got.columns is not None
                assert got.count is not None
                assert got.count.item() == len(above)
                assert torch.equal(got.columns[: len(above)].long(), above)


def check_column_flags() -> None:
    """However many the tokens are, at most eight rows of flags, which joined are the columns with outliers."""
    for M, rows in ((9, 1), (129, 2), (1024, 8), (1025, 5), (2049, 5)):
        x = Case(M, 1, 70).x
        x[-1, 69] = 30  # the last token's last column
        flags = quantize_rows._column_flags(x, 6.0)
        assert flags.source is not None
        assert flags.rows == len(flags.source) == rows
        bits = (flags.source[:, :, None] >> torch.arange(32, dtype=torch.int32)) & 1
        assert torch.equal(bits.any(dim=0).flatten()[:70], (x.abs() > 6).any(dim=0))
        assert not bits.any(dim=0).flatten()[70:].any()


def check_llm_int8_without_outliers() -> None:
    """With no column split off it is W8A8 bit for bit; with all of them it is a 16-bit product."""
    case = Case(17, 40, 96)
    none = (case.stored[:0], case.outlier_weight[:, :0])
    expected = reference.int8_linear(case.x, case.codes, case.scale, bias=case.bias)
    for threshold in (None, 1e5):
        out = llm_int8.launch(case.x, case.codes, case.scale, *none, threshold, bias=case.bias, config=PLAIN)
        assert torch.equal(out, expected)
    out = llm_int8.launch(case.x, case.codes, case.scale, *none, 1e-8, bias=case.bias, config=PLAIN)
    expected = reference.llm_int8_linear(case.x, case.codes, case.scale, *none, 1e-8, bias=case.bias)
    assert error(out, expected.double()) < 1e-3


def check_threshold_is_compared_in_the_dtype_of_x() -> None:
    """6.1 in float16 is 6.1016: not above itself."""
    case = Case(2, 32, 64)
    case.x[0, 7] = 6.1
    layer = (case.codes, case.scale, case.stored, case.outlier_weight, 6.1)
    assert torch.equal(llm_int8.launch(case.x, *layer, config=PLAIN), llm_int8.launch(case.x, *layer, config=replace(PLAIN, block_k=64)))
    assert error(llm_int8.launch(case.x, *layer, config=PLAIN), reference.llm_int8_linear(case.x, *layer).double()) < 1e-3


if __name__ == "__main__":
    poison()
    for name in sys.argv[1:]:
        check: Callable[[], None] = globals()[f"check_{name}"]
        check()
