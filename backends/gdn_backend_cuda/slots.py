# SPDX-License-Identifier: Apache-2.0
"""The padding law for kernels that have none: slots that they may be given, rows they left wrong.

A row of padding is given the index ``absent``, and what it must not write goes to ``scratch``;
afterwards its outputs are made zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from gdn_backend_triton.launch import STEP_SIZES, STEP_TENSORS, ceil_div
from gdn_backend_triton.launches import Launch
from gdn_backend_triton.taps import strides
from torch import Tensor

from gdn_portable.errors import InputError
from gdn_portable.spec import Device

BLOCK = 256
# exp of a + dt_bias overflows from 88.8 on, and FlashInfer multiplies the infinity by 0; what is
# cut off decays by e^-80 times the head's rate and more
MOST = tl.constexpr(80.0)
ALIGNMENT = 32  # bytes


@triton.jit(
    do_not_specialize=(*STEP_SIZES, "absent", "scratch"),
    do_not_specialize_on_alignment=STEP_TENSORS,
)
def _place(
    a, dt_bias, state_indices, out_state_indices, num_accepted, bounded, read, write, live,
    numel, absent, scratch, a_t, a_h, dt_bias_h, indices_b, indices_p, out_indices_b, accepted_b,
    HV: tl.constexpr, P: tl.constexpr, TABLE: tl.constexpr, PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    head = i % HV
    row = (i // HV).to(tl.int64)
    sequence = row // P
    draft = row % P
    x = tl.load(a + row * a_t + head * a_h, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + head * dt_bias_h, mask=mask, other=0.0).to(tl.float32)
    tl.store(bounded + i, tl.minimum(x, MOST - bias).to(bounded.dtype.element_ty), mask=mask)

    leads = mask & (head == 0)
    column = tl.zeros([BLOCK], tl.int64)
    if num_accepted is not None:
        accepted = tl.load(num_accepted + sequence * accepted_b, mask=leads, other=0).to(tl.int64)
        column = tl.minimum(tl.maximum(accepted - 1, 0), P - 1)
    at = state_indices + sequence * indices_b
    source = tl.load(at + column * indices_p, mask=leads, other=PAD).to(tl.int64)
    is_live = source > PAD
    first = leads & (draft == 0)
    tl.store(read + sequence, tl.where(is_live, source, absent), mask=first)
    tl.store(live + sequence, is_live.to(tl.int8), mask=first)
    if write is not None:
        if TABLE:
            target = tl.load(at + draft * indices_p, mask=leads, other=PAD).to(tl.int64)
        else:
            at = out_state_indices + sequence * out_indices_b
            target = tl.load(at, mask=leads, other=PAD).to(tl.int64)
        target = tl.where(is_live & (target > PAD), target, scratch)
        tl.store(write + row, target, mask=leads)


@triton.jit(do_not_specialize=STEP_SIZES)
def _finish(
    o, out, live, out_t, out_h, out_v, HV: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    HEADS: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    is_live = tl.load(live + row // P) != 0
    if is_live and not COPIES:
        return
    v = tl.arange(0, V)[None, :]
    for first in range(0, HV, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        inside = head < HV
        value = tl.zeros([HEADS, V], o.dtype.element_ty)
        if is_live:
            value = tl.load(o + (row * HV + head) * V + v, mask=inside, other=0.0)
        at = out + row * out_t + head * out_h + v * out_v
        tl.store(at, value.to(out.dtype.element_ty), mask=inside)


class Around(NamedTuple):
    """The launches around FlashInfer's."""

    place: Launch
    finish: Launch

    @classmethod
    def of(cls, device: Device) -> Around:
        """Make them for a device."""
        return cls(Launch(_place, device, num_warps=4), Launch(_finish, device, num_warps=4))


class Placed:
    """Slots and gates of a batch, as FlashInfer may be given them."""

    __slots__ = ("_around", "a", "live", "read", "write")

    def __init__(
        self,
        a: Tensor,
        dt_bias: Tensor,
        state_indices: Tensor,
        around: Around,
        *,
        drafts: int,
        pad: int,
        absent: int,
        scratch: int,
        out_state_indices: Tensor | None = None,
        num_accepted: Tensor | None = None,
        wide: bool = False,
    ) -> None:
        """Make them, in one launch.

        Args:
            a: [T, HV]; bounded where softplus would overflow.
            dt_bias: [HV].
            state_indices: [B], or a slot table [B, P].
            around: the launches.
            drafts: P, rows of a sequence.
            pad: an index at or below it is padding.
            absent: what padding reads.
            scratch: what padding writes.
            out_state_indices: [B] or None.
            num_accepted: [B], which column of a slot table is read.
            wide: whether slots read are int64; those written never are.
        """
        T, HV = a.shape
        B, table = T // drafts, state_indices.dim() == 2

        def integers(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(count, dtype=dtype, device=a.device)

        self.a = torch.empty((T, HV), dtype=a.dtype, device=a.device)
        self.read = integers(B, torch.int64 if wide else torch.int32)
        self.live = integers(B, torch.int8)
        self.write = integers(T) if table or out_state_indices is not None else None
        self._around = around
        around.place(
            ceil_div(T * HV, BLOCK),
            (a, dt_bias, state_indices, out_state_indices, num_accepted, self.a, self.read,
             self.write, self.live),
            (T * HV, absent, scratch),
            (*a.stride(), dt_bias.stride(0), state_indices.stride(0),
             state_indices.stride(1) if table else 0, *strides(out_state_indices, 1),
             *strides(num_accepted, 1), HV, drafts, table, pad, BLOCK),
        )  # fmt: skip

    @property
    def targets(self) -> Tensor:
        """Return the slots that are written, where any are."""
        if self.write is None:
            raise InputError("needs a slot table, or out_state_indices")
        return self.write

    def finish(self, o: Tensor, out: Tensor, drafts: int) -> None:
        """Write zeros to rows of padding, and the others of ``o`` to ``out`` where they differ."""
        T, HV, V = out.shape
        self._around.finish(
            T, (o, out, self.live), (), (*out.stride(), HV, V, drafts, 8, o is not out)
        )


def aligned(x: Tensor) -> Tensor:
    """Return ``x`` if its rows can be loaded 32 bytes at a time, else a copy that can."""
    itemsize = x.element_size()
    apart = (stride * itemsize % ALIGNMENT for stride in x.stride()[:-1])
    if x.data_ptr() % ALIGNMENT or x.stride(-1) != 1 or any(apart):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def packed(x: Tensor) -> Tensor:
    """Return ``x`` if it is contiguous and aligned, else a copy that is."""
    if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def kernel_output(out: Tensor | None, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a kernel writes: ``out`` where it is as wanted, else new memory like ``v``."""
    fits = out is not None and out.dtype is dtype and out.is_contiguous()
    if fits and out is not None and out.data_ptr() % ALIGNMENT == 0:
        return out
    return torch.empty(v.shape, dtype=dtype, device=v.device)
