# SPDX-License-Identifier: Apache-2.0
"""aiter's convolution of one token, held to the contract of ``conv1d_update``.

Its prefill kernels are not adapted: see ``docs/rocm.md``.
"""

from __future__ import annotations

from gdn_backend_triton.launch import empty_like, refuse_gradients
from torch import Tensor

from gdn_backend_rocm.aiter_decode import padded_to_negative
from gdn_backend_rocm.aiter_source import Function
from gdn_portable.errors import UnsupportedCallError
from gdn_portable.interface import Conv1dUpdate
from gdn_portable.spec import Device, GdnSpec

CAUSAL_CONV1D_UPDATE = Function(
    module="ops.causal_conv1d_update",
    name="causal_conv1d_update",
    parameters=(
        "x", "conv_state", "weight", "bias", "out", "use_silu", "cache_seqlens",
        "conv_state_indices", "pad_slot_id",
    ),
    since="v0.1.17",
)  # fmt: skip
CONV_WIDTHS = (2, 3, 4)
# it multiplies slots and strides in 32 bits, without a sign
MOST_ELEMENTS = 2**32


def window_is_unfit(spec: GdnSpec, device: Device) -> str | None:
    """Return what the declaration cannot say."""
    if spec.conv_width not in CONV_WIDTHS:
        return f"conv_width is {spec.conv_width}, needs 2 to 4"
    if spec.conv_state_len != spec.conv_width - 1:
        return (
            f"conv_window is {spec.conv_window}, needs conv_width - 1: the kernel keeps a "
            "window's history in its last columns"
        )
    if spec.conv_state_dtype != spec.dtype:
        return f"conv dtype is {spec.conv_state_dtype}, needs that of the activations"
    return None


def make_causal_conv1d_update(
    spec: GdnSpec, device: Device, *, deterministic: bool
) -> Conv1dUpdate:
    """Return the op, in place only."""
    update = CAUSAL_CONV1D_UPDATE.load()
    pad, silu = spec.pad_slot, spec.activation == "silu"

    def conv1d_update(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_state: Tensor,
        *,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        refuse_gradients(x)
        if out_state_indices is not None:
            raise UnsupportedCallError("out_state_indices is given: the kernel works in place")
        if bias is not None and bias.dtype is not weight.dtype:
            raise UnsupportedCallError(
                f"bias has dtype {bias.dtype}, needs {weight.dtype} like weight"
            )
        if conv_state.shape[0] * conv_state.stride(0) >= MOST_ELEMENTS:
            raise UnsupportedCallError(
                f"conv_state spans {conv_state.shape[0]} slots of {conv_state.stride(0)} elements, "
                f"needs less than {MOST_ELEMENTS} in all"
            )
        B = x.shape[0]
        if out is None:
            out = empty_like(x)
        if not B:
            return out
        slots = padded_to_negative(state_indices[:B], pad).clamp(min=-1).contiguous()
        y = out if out.dtype is x.dtype else empty_like(x)
        update(
            x=x.unsqueeze(-1), conv_state=conv_state, weight=weight,
            bias=weight.new_empty(0) if bias is None else bias, out=y.unsqueeze(-1), use_silu=silu,
            cache_seqlens=slots.new_empty(0), conv_state_indices=slots, pad_slot_id=-1,
        )  # fmt: skip
        y.masked_fill_((slots < 0)[:, None], 0)  # rows that it leaves as they were
        return y if y is out else out.copy_(y)

    return conv1d_update
