# SPDX-License-Identifier: Apache-2.0
"""aiter's kernels of one decode step, held to the contract of ``recurrent_decode``.

Both take int32 slots in which any negative number is padding, and gates and biases in the
activations' dtype: a float32 ``dt_bias`` is refused, as rounding it would move every decay.
"""

from __future__ import annotations

import torch
from gdn_backend_triton.launch import empty_like, refuse_deferred, refuse_gradients
from torch import Tensor

from gdn_backend_rocm.aiter_source import Function
from gdn_portable.errors import UnsupportedCallError
from gdn_portable.interface import RecurrentDecode
from gdn_portable.metadata import DeferredUpdates
from gdn_portable.spec import Device, GdnSpec

FLYDSL_GDR_DECODE = Function(
    module="ops.flydsl.linear_attention_kernels",
    name="flydsl_gdr_decode",
    parameters=(
        "query", "key", "value", "a", "b", "dt_bias", "A_log", "indices", "state", "out",
        "use_qk_l2norm", "need_shuffle_state", "read_indices", "write_indices",
    ),
    since="v0.1.20",
    libraries=("flydsl",),
)  # fmt: skip
GDR_DECODE_PACKED_BF16 = Function(
    module="ops.gdr_decode_packed_bf16",
    name="gdr_decode_packed_bf16",
    parameters=("mixed_qkv", "a", "b", "dt_bias", "A_log", "indices", "state", "out"),
    since="v0.1.20",
)
PACKED_HEADS = (8, 32)
VECTOR_BYTES = 16


def scale_is_another(spec: GdnSpec, device: Device) -> str | None:
    """Return why a kernel whose scale is a constant cannot serve."""
    if spec.q_scale == spec.head_k_dim**-0.5:
        return None
    return f"scale is {spec.scale}, needs K ** -0.5, a constant of the kernel"


def flydsl_is_unfit(spec: GdnSpec, device: Device) -> str | None:
    """Return what the declaration of ``flydsl_gdr_decode`` cannot say."""
    if spec.dtype is torch.float16 and spec.state_dtype is torch.bfloat16:
        # it rounds the state to the activations' dtype and stores the bits as the state's
        return "float16 activations with a bfloat16 state, which the kernel stores as float16"
    return scale_is_another(spec, device)


def packed_is_unfit(spec: GdnSpec, device: Device) -> str | None:
    """Return what the declaration of ``gdr_decode_packed_bf16`` cannot say."""
    heads = (spec.num_k_heads, spec.num_v_heads)
    if heads != PACKED_HEADS:
        return f"heads (H, HV) are {heads}, needs {PACKED_HEADS}"
    if not spec.qk_l2norm:
        return "qk_l2norm is False, and the kernel always normalises"
    return scale_is_another(spec, device)


def padded_to_negative(slots: Tensor, pad_slot: int) -> Tensor:
    """Return slots as int32, every padded one negative."""
    if pad_slot != -1:
        slots = torch.where(slots <= pad_slot, -1, slots)
    return slots.to(torch.int32)


def make_flydsl_gdr_decode(
    spec: GdnSpec, device: Device, *, deterministic: bool
) -> RecurrentDecode:
    """Return the op; it compiles once for every tuple of strides that it is given.

    A padded ``out_state_indices`` alone would skip the output as well, so it is sent to the
    scratch slot.
    """
    decode = FLYDSL_GDR_DECODE.load(deterministic=deterministic)
    pad, scratch = spec.pad_slot, spec.scratch_slot

    def recurrent_decode(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        *,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        deferred: DeferredUpdates | None = None,
        num_deferred: Tensor | None = None,
        flush: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(q)
        refuse_deferred(deferred)
        _check_dtypes(q, k=k, v=v, a=a, b=b, dt_bias=dt_bias)
        if state.stride(-1) != 1 or state.data_ptr() % VECTOR_BYTES:
            raise UnsupportedCallError(
                f"state has strides {state.stride()} at address {state.data_ptr()}, needs K "
                f"contiguous and a multiple of {VECTOR_BYTES}"
            )
        B = v.shape[0]
        source = target = padded_to_negative(state_indices[:B], pad)
        if out_state_indices is not None:
            if scratch is None:
                raise UnsupportedCallError("out_state_indices is given, needs a scratch_slot")
            target = out_state_indices[:B]
            target = torch.where(target <= pad, scratch, target).to(torch.int32)
        if out is None:
            out = empty_like(v)
        if not B:
            return out
        fits = out.is_contiguous() and out.dtype is q.dtype
        y = out if fits else empty_like(v)
        decode(
            query=q.unsqueeze(1), key=k.unsqueeze(1), value=v.unsqueeze(1), a=a.unsqueeze(1),
            b=b.unsqueeze(1), dt_bias=dt_bias, A_log=A_log, indices=source, state=state,
            out=y.unsqueeze(1), use_qk_l2norm=spec.qk_l2norm, need_shuffle_state=False,
            read_indices=source, write_indices=target,
        )  # fmt: skip
        y.masked_fill_((source < 0)[:, None, None], 0)  # rows that it leaves as they were
        return out if fits else out.copy_(y)

    return recurrent_decode


def make_gdr_decode_packed_bf16(
    spec: GdnSpec, device: Device, *, deterministic: bool
) -> RecurrentDecode:
    """Return the op, in place only. It rounds beta to bfloat16, which the contract does not."""
    decode = GDR_DECODE_PACKED_BF16.load()
    pad = spec.pad_slot

    def recurrent_decode(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        *,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        deferred: DeferredUpdates | None = None,
        num_deferred: Tensor | None = None,
        flush: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(q)
        refuse_deferred(deferred)
        _check_dtypes(q, k=k, v=v, a=a, b=b, dt_bias=dt_bias)
        if out_state_indices is not None:
            raise UnsupportedCallError("out_state_indices is given: the kernel works in place")
        B = v.shape[0]
        if out is None:
            out = empty_like(v)
        if not B:
            return out
        fits = out.is_contiguous() and out.dtype is q.dtype
        y = out if fits else empty_like(v)
        decode(
            mixed_qkv=packed(q, k, v), a=a, b=b, dt_bias=dt_bias, A_log=A_log,
            indices=padded_to_negative(state_indices[:B], pad), state=state, out=y.unsqueeze(1),
        )  # fmt: skip
        return out if fits else out.copy_(y)

    return recurrent_decode


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return [B, D] with q, k and v side by side: the tensor they are views of, or a copy."""
    rows = [x.flatten(1) for x in (q, k, v)]
    ends = [x.data_ptr() + x.shape[1] * x.element_size() for x in rows]
    starts, pitches = [x.data_ptr() for x in rows], {x.stride() for x in rows}
    if len(pitches) == 1 and starts[1:] == ends[:2] and rows[0].stride(1) == 1:
        width = sum(x.shape[1] for x in rows)
        return rows[0].as_strided((q.shape[0], width), rows[0].stride())
    return torch.cat(rows, dim=1)


def _check_dtypes(q: Tensor, **others: Tensor) -> None:
    for name, x in others.items():
        if x.dtype is not q.dtype:
            raise UnsupportedCallError(f"{name} has dtype {x.dtype}, needs {q.dtype} like q")
