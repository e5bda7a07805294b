# SPDX-License-Identifier: Apache-2.0
"""Calls that kernels once got wrong, found by drawing calls at random; on a simulated AMD GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from gdn_portable import GdnSpec, PrefillMetadata
from gdn_portable.spec import Op
from gdn_portable.testing import Case

if TYPE_CHECKING:
    from ci.amdgcn import Simulator

K = V = 16


def _check(gpu: Simulator, op: Op, spec: GdnSpec, **arguments: Any) -> None:
    from ci.amdgcn import bind_simulated

    Case(op.value, op, spec, arguments).check(bind_simulated(spec, gpu.arch))


def _spec(dtype: torch.dtype) -> GdnSpec:
    return GdnSpec(
        num_k_heads=1,
        num_v_heads=1,
        head_k_dim=K,
        head_v_dim=V,
        dtype=dtype,
        state_dtype=torch.float32,
    )


def _prefill(dtype: torch.dtype, g: Tensor) -> dict[str, Any]:
    """Return a call of ``chunk_prefill`` for one sequence that starts from a state."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, len(g), 1, K, generator=generator).to(dtype)
    return {
        "q": q,
        "k": k,
        "v": v,
        "g": g[:, None],
        "beta": torch.rand(len(g), 1, generator=generator),
        "state": torch.randn(1, 1, V, K, generator=generator),
        "metadata": PrefillMetadata(torch.tensor([0, len(g)]), torch.tensor([0])),
    }


@pytest.mark.parametrize("strong", [slice(0, 32), slice(0, 64, 2)], ids=["before", "between"])
def test_weak_decays_stay_exact_beside_strong_ones_of_their_chunk(
    amd_gpu: Simulator, strong: slice
) -> None:
    g = torch.full((64,), -0.3)
    g[strong] = -50

    _check(amd_gpu, Op.CHUNK_PREFILL, _spec(torch.float32), **_prefill(torch.float32, g))


def test_a_zero_key_beside_a_large_value_leaves_a_half_precision_state_finite(
    amd_gpu: Simulator,
) -> None:
    call = _prefill(torch.float16, torch.full((20,), -0.1))
    call["k"][5] = 0
    call["v"][5] = 1000

    _check(amd_gpu, Op.CHUNK_PREFILL, _spec(torch.float16), **call)
