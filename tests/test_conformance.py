# SPDX-License-Identifier: Apache-2.0
"""The conformance suite passes on the reference, and fails on kernels that break the contract."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdn_portable import (
    ConvLayout,
    GdnOps,
    GdnSpec,
    PrefillMetadata,
    StateLayout,
    StatePool,
    bind,
)
from gdn_portable.testing import Case, cases

SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=6,
    head_k_dim=16,
    head_v_dim=8,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
SPECS = {
    "bf16": SPEC,
    "fp16, fp16 state": dataclasses.replace(
        SPEC, dtype=torch.float16, state_dtype=torch.float16, num_v_heads=2
    ),
    "fp32, other layouts": dataclasses.replace(
        SPEC,
        dtype=torch.float32,
        state_layout=StateLayout.KV,
        conv_layout=ConvLayout.LEN_FIRST,
    ),
    "bf16 state, width 3, K = V": dataclasses.replace(
        SPEC, state_dtype=torch.bfloat16, conv_width=3, head_v_dim=16, activation=None
    ),
}
CASES = [(f"{name}: {case.name}", case) for name, spec in SPECS.items() for case in cases(spec)]


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_the_reference_passes_every_case(case: Case) -> None:
    case.check(bind(case.spec, "cpu"))


def _replaced(ops: GdnOps, **launchers: Callable[..., Any]) -> GdnOps:
    return dataclasses.replace(ops, **launchers)


def _case(name: str) -> Case:
    return next(case for case in cases(SPEC) if case.name == name)


def test_a_kernel_with_a_wrong_scale_fails() -> None:
    case = _case("rule of decode")
    wrong = bind(dataclasses.replace(case.spec, scale=0.26), "cpu")

    with pytest.raises(AssertionError, match="output is off by"):
        case.check(_replaced(bind(case.spec, "cpu"), recurrent_decode=wrong.recurrent_decode))


def test_a_kernel_that_takes_padding_for_the_last_slot_fails() -> None:
    case = _case("rule of decode")
    ops = bind(case.spec, "cpu", check=False)

    def wraps(*args: Any, state_indices: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        wrapped = torch.where(state_indices < 0, state_indices + 24, state_indices)
        return ops.recurrent_decode(*args, state_indices=wrapped, **kwargs)

    with pytest.raises(AssertionError):
        case.check(_replaced(ops, recurrent_decode=wraps))


def test_a_kernel_that_writes_a_slot_nobody_named_fails() -> None:
    case = _case("conv of prefill")
    ops = bind(case.spec, "cpu", check=False)

    def scribbles(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = ops.conv1d_prefill(*args, **kwargs)
        kwargs["conv_state"][2] = 0
        return out

    with pytest.raises(AssertionError, match=r"conv_state\[\[2\]\] was written"):
        case.check(_replaced(ops, conv1d_prefill=scribbles))


def test_a_kernel_that_leaves_padding_rows_unwritten_fails() -> None:
    case = _case("conv of decode")
    ops = bind(case.spec, "cpu", check=False)

    def forgets(*args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        result = ops.conv1d_update(*args, **kwargs)
        out[0] = result[0]
        return out

    with pytest.raises(AssertionError, match="has NaN"):
        case.check(_replaced(ops, conv1d_update=forgets))


def test_a_kernel_that_leaves_next_to_nothing_in_a_padding_row_fails() -> None:
    case = _case("rule of decode")
    ops = bind(case.spec, "cpu", check=False)

    def smears(*args: Any, state_indices: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out = ops.recurrent_decode(*args, state_indices=state_indices, **kwargs)
        out[state_indices < 0] = 1e-30
        return out

    with pytest.raises(AssertionError, match="output is not zero where the oracle is"):
        case.check(_replaced(ops, recurrent_decode=smears))


def test_a_kernel_that_skips_the_state_of_an_empty_sequence_fails() -> None:
    case = _case("rule of prefill to other slots")
    ops = bind(case.spec, "cpu", check=False)

    def skips(*args: Any, metadata: Any, **kwargs: Any) -> torch.Tensor:
        empty = metadata.cu_seqlens.diff() == 0
        target = torch.where(empty, -1, metadata.out_state_indices)
        metadata = dataclasses.replace(metadata, out_state_indices=target)
        return ops.chunk_prefill(*args, metadata=metadata, **kwargs)

    with pytest.raises(AssertionError, match="state has NaN"):
        case.check(_replaced(ops, chunk_prefill=skips))


def test_a_kernel_with_a_truncated_series_for_the_inverse_fails() -> None:
    case = _case("rule of prefill of one token repeated")
    ops = bind(case.spec, "cpu", check=False)

    def neumann(*args: Any, **kwargs: Any) -> torch.Tensor:
        solve = torch.linalg.solve_triangular

        def series(A: torch.Tensor, B: torch.Tensor, **_: Any) -> torch.Tensor:
            lower, total, term = A.tril(-1), B, B
            for _ in range(8):
                term = -lower @ term
                total = total + term
            return total

        torch.linalg.solve_triangular = series
        try:
            return ops.chunk_prefill(*args, **kwargs)
        finally:
            torch.linalg.solve_triangular = solve

    with pytest.raises(AssertionError):
        case.check(_replaced(ops, chunk_prefill=neumann))


@pytest.mark.parametrize("strong", [-1e2, -1e4, -torch.inf])
def test_one_strong_decay_does_not_blur_the_weak_ones_beside_it(strong: float) -> None:
    spec = dataclasses.replace(SPEC, dtype=torch.float32, num_k_heads=1, num_v_heads=1)
    ops, generator = bind(spec, "cpu"), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, 1, n, generator=generator) for n in (16, 16, 8))
    g, beta = torch.full((40, 1), -1e-3), torch.rand(40, 1, generator=generator)
    g[10] = strong
    whole, split = (StatePool.allocate(spec, 1, "cpu") for _ in range(2))

    def prefill(pool: StatePool, tokens: slice) -> torch.Tensor:
        rows = (x[tokens] for x in (q, k, v, g, beta))
        metadata = PrefillMetadata(torch.tensor([0, len(q[tokens])]), torch.tensor([0]))
        return ops.chunk_prefill(*rows, pool.state, metadata=metadata)

    out = prefill(whole, slice(0, 40))
    prefill(split, slice(0, 11))
    split_out = prefill(split, slice(11, 40))

    torch.testing.assert_close(out[11:], split_out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.state, split.state, rtol=1e-5, atol=1e-6)
