# SPDX-License-Identifier: Apache-2.0
"""The kernels for AMD GPUs: Triton's serve, and aiter's stand behind them for those who name one.

The order is the policy. aiter's functions are exact only with the care that the adapters take, or
not quite, and none was timed beside ours: they are able, not first, until they are named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from gdn_backend_triton import KERNELS as TRITON_KERNELS
from gdn_backend_triton.launch import lazily

from gdn_backend_rocm.aiter_conv1d import CAUSAL_CONV1D_UPDATE, window_is_unfit
from gdn_backend_rocm.aiter_decode import (
    FLYDSL_GDR_DECODE,
    GDR_DECODE_PACKED_BF16,
    flydsl_is_unfit,
    packed_is_unfit,
)
from gdn_backend_rocm.aiter_prefill import prefill_is_missing
from gdn_portable.backend import Backend, Kernel
from gdn_portable.spec import Device, GdnSpec, Op, StateLayout

# CDNA3: MI300A, MI300X, MI308X, MI325X; CDNA4: MI350X, MI355X
ARCHS = ("gfx942", "gfx950")
# why others are refused, by what their names start with
UNTRIED = {
    "gfx90a": "no kernel was compiled, simulated or run for the MI200 series",
    "gfx10": "RDNA has waves of 32 lanes and no MFMA; tiles are for waves of 64",
    "gfx11": "RDNA has waves of 32 lanes and no MFMA; tiles are for waves of 64",
    "gfx12": "RDNA has waves of 32 lanes and no MFMA; tiles are for waves of 64",
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def arch_is_untried(device: Device) -> str | None:
    """Return why an architecture is not served."""
    reasons = (why for start, why in UNTRIED.items() if device.arch.startswith(start))
    return next(reasons, None)


def _triton(kernel: Kernel) -> Kernel:
    """Restrict a shared kernel to AMD's GPUs."""
    unfit = kernel.refuse

    def refuse(spec: GdnSpec, device: Device) -> str | None:
        return arch_is_untried(device) or (unfit(spec, device) if unfit else None)

    return replace(kernel, devices=("rocm",), archs=ARCHS, refuse=refuse)


def _aiter(
    op: Op,
    name: str,
    target: str,
    probe: Callable[[], str | None],
    *,
    archs: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    state_dtypes: tuple[torch.dtype, ...] | None,
    head_dims: tuple[tuple[int, int], ...] | None,
    state_layouts: tuple[StateLayout, ...] | None,
    refuse: Callable[[GdnSpec, Device], str | None] | None,
) -> Kernel:
    return Kernel(
        op=op,
        name=f"aiter.{name}",
        target=lazily(f"gdn_backend_rocm.{target}"),
        probe=probe,
        devices=("rocm",),
        archs=archs,
        dtypes=dtypes,
        state_dtypes=state_dtypes,
        head_dims=head_dims,
        state_layouts=state_layouts,
        conv_layouts=None,
        refuse=refuse,
    )


AITER_KERNELS = (
    _aiter(
        Op.RECURRENT_DECODE,
        "flydsl_gdr_decode",
        "aiter_decode:make_flydsl_gdr_decode",
        FLYDSL_GDR_DECODE.missing,
        archs=ARCHS,
        dtypes=(BF16, FP16),
        state_dtypes=(BF16, FP32),
        head_dims=((128, 128),),
        state_layouts=(StateLayout.VK,),
        refuse=flydsl_is_unfit,
    ),
    _aiter(
        Op.RECURRENT_DECODE,
        "gdr_decode_packed_bf16",
        "aiter_decode:make_gdr_decode_packed_bf16",
        GDR_DECODE_PACKED_BF16.missing,
        archs=("gfx950",),
        dtypes=(BF16,),
        state_dtypes=(BF16,),
        head_dims=((128, 128),),
        state_layouts=(StateLayout.VK,),
        refuse=packed_is_unfit,
    ),
    _aiter(
        Op.CONV1D_UPDATE,
        "causal_conv1d_update",
        "aiter_conv1d:make_causal_conv1d_update",
        CAUSAL_CONV1D_UPDATE.missing,
        archs=ARCHS,
        dtypes=(BF16, FP16, FP32),
        state_dtypes=None,
        head_dims=None,
        state_layouts=None,
        refuse=window_is_unfit,
    ),
    *(
        _aiter(
            op,
            name,
            target,
            prefill_is_missing,
            archs=ARCHS,
            dtypes=(BF16,),
            state_dtypes=(BF16, FP32),
            head_dims=((128, 128),),
            state_layouts=None,
            refuse=None,
        )
        for op, name, target in (
            (
                Op.CHUNK_PREFILL,
                "chunk_gated_delta_rule_opt_vk",
                "aiter_prefill:make_chunk_prefill",
            ),
            (Op.PLAN_PREFILL, "plan_prefill", "aiter_prefill:make_plan_prefill"),
        )
    ),
)
KERNELS = (*map(_triton, TRITON_KERNELS), *AITER_KERNELS)
BACKEND = Backend(name="rocm", devices=("rocm",), kernels=KERNELS)
