# SPDX-License-Identifier: Apache-2.0
"""Log decay and write strength where nothing fuses them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_backend_triton.launch import (
    STEP_SIZES,
    STEP_TENSORS,
    ceil_div,
    empty_like,
    refuse_gradients,
)
from gdn_backend_triton.launches import Launch
from gdn_backend_triton.maths import gates
from gdn_backend_triton.overlap import begin
from gdn_portable.interface import Gating
from gdn_portable.spec import Device, GdnSpec

BLOCK = 256


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _gating(
    a, b, A_log, dt_bias, g, beta, numel, a_t, a_h, b_t, b_h, A_log_h, dt_bias_h,
    HV: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    t = i // HV
    h = i % HV
    g_t, beta_t = gates(
        tl.load(a + t * a_t + h * a_h, mask=mask, other=0.0),
        tl.load(b + t * b_t + h * b_h, mask=mask, other=0.0),
        tl.load(A_log + h * A_log_h),
        tl.load(dt_bias + h * dt_bias_h),
    )
    tl.store(g + i, g_t, mask=mask)
    tl.store(beta + i, beta_t, mask=mask)


def make_gating(spec: GdnSpec, device: Device, *, deterministic: bool) -> Gating:
    """Return the op."""
    HV = spec.num_v_heads
    kernel = Launch(_gating, device, num_warps=2)

    def gating(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
        refuse_gradients(a)
        g = empty_like(a, torch.float32)
        beta = empty_like(a, torch.float32)
        if a.numel():
            kernel(
                ceil_div(a.numel(), BLOCK), (a, b, A_log, dt_bias, g, beta), (a.numel(),),
                (*a.stride(), *b.stride(), A_log.stride(0), dt_bias.stride(0), HV, BLOCK),
            )  # fmt: skip
        return g, beta

    return gating
