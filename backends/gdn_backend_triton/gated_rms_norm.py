# SPDX-License-Identifier: Apache-2.0
"""The gated RMSNorm where nothing fuses it."""

from __future__ import annotations

from typing import NamedTuple

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
from gdn_backend_triton.maths import silu
from gdn_backend_triton.overlap import begin
from gdn_portable.interface import GatedRmsNorm
from gdn_portable.spec import Device, GdnSpec


class Tile(NamedTuple):
    """What a program owns."""

    elements: int  # heads times V
    warps: int


TILES = {
    # H200, HV = 32, V = 128: T = 8, 512, 2048 and 8192 take 1.0, 4.5, 13.5 and 48 us; by programs
    # of one warp and half as many elements, which cannot start fast enough, 1.1, 5.5, 21.0 and 82
    "cuda": Tile(1024, 4),
    "rocm": Tile(1024, 2),
}


@triton.jit
def norm_and_gate(x, gate, weight, eps, V: tl.constexpr, SILU: tl.constexpr):
    """Normalise rows [..., V] and gate them; a row of zeros stays zero whatever the gate holds."""
    mean = tl.sum(x * x, -1, keep_dims=True) / V
    gate = gate.to(tl.float32)
    gate = silu(gate) if SILU else tl.sigmoid(gate)
    y = x * tl.rsqrt(mean + eps) * weight.to(tl.float32) * gate
    return tl.where(mean == 0.0, 0.0, y)


@triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
def _gated_rms_norm(
    x, gate, weight, out, num_rows, eps, x_t, x_h, x_v, gate_t, gate_h, gate_v, out_t, out_h,
    out_v, weight_v, HV: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, SILU: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    row = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    t = (row // HV).to(tl.int64)[:, None]
    h = (row % HV).to(tl.int64)[:, None]
    v = tl.arange(0, V)[None, :]
    mask = (row < num_rows)[:, None]
    values = tl.load(x + t * x_t + h * x_h + v * x_v, mask=mask, other=0.0).to(tl.float32)
    gates = tl.load(gate + t * gate_t + h * gate_h + v * gate_v, mask=mask, other=0.0)
    y = norm_and_gate(values, gates, tl.load(weight + v * weight_v), eps, V, SILU)
    tl.store(out + t * out_t + h * out_h + v * out_v, y.to(out.dtype.element_ty), mask=mask)


def make_gated_rms_norm(spec: GdnSpec, device: Device, *, deterministic: bool) -> GatedRmsNorm:
    """Return the op: one program for a few heads, which reads and writes each value once."""
    HV, V, SILU = spec.num_v_heads, spec.head_v_dim, spec.gate_activation == "silu"
    tile = TILES.get(device.arch, TILES[device.kind])
    heads = tile.elements // V
    kernel = Launch(_gated_rms_norm, device, num_warps=tile.warps)

    def gated_rms_norm(
        x: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-6, out: Tensor | None = None
    ) -> Tensor:
        refuse_gradients(x)
        if gate.dim() == 2:
            gate = gate.unflatten(-1, (HV, V))
        if out is None:
            out = empty_like(x)
        rows = x.shape[0] * HV
        if rows:
            kernel(
                ceil_div(rows, heads), (x, gate, weight, out), (rows,),
                (eps, *x.stride(), *gate.stride(), *out.stride(), weight.stride(0), HV, V, heads,
                 SILU),
            )  # fmt: skip
        return out

    return gated_rms_norm
