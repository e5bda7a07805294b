# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels round to bfloat16, on simulated GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

triton = pytest.importorskip("triton")
from gdn_backend_triton.maths import rounded  # noqa: E402
from triton import language as tl  # noqa: E402

if TYPE_CHECKING:
    from ci.amdgcn import Simulator

N = 512
INFINITY, NAN, LARGEST = 0x7F800000, 0x7FC00000, 0x7F7FFFFF


@triton.jit
def _round(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, rounded(tl.load(x + i), y.dtype.element_ty))


def _numbers() -> torch.Tensor:
    """Return floats of all sizes and signs; a quarter of them lies between two bfloat16."""
    rng = torch.Generator().manual_seed(0)
    bits = torch.randint(INFINITY, (N // 2,), generator=rng)
    bits[: N // 8] = bits[: N // 8] & ~0xFFFF | 0x8000
    bits[-4:] = torch.tensor([0, INFINITY, NAN, LARGEST])
    return torch.cat([bits, bits - 2**31]).int().view(torch.float32)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_bfloat16_is_the_nearest_and_on_gfx942_ties_go_away_from_zero(
    amd_gpu: Simulator, arch: str
) -> None:
    x, y = _numbers(), torch.empty(N, dtype=torch.bfloat16)
    bits, nearest = x.view(torch.int32), x.bfloat16().view(torch.int16)
    is_tie = bits & 0xFFFF == 0x8000

    _round[(1,)](x, y, N)

    away = torch.where(is_tie, bits + 0x8000 >> 16, nearest).short()
    expected = away if arch == "gfx942" else nearest
    is_number = ~x.isnan()
    assert torch.equal(y.isnan(), ~is_number)
    assert torch.equal(y.view(torch.int16)[is_number], expected[is_number])
    assert not torch.equal(away, nearest)
