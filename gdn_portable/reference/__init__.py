# SPDX-License-Identifier: Apache-2.0
"""The ops in eager PyTorch: the contract's text, the oracle of every kernel, the CPU backend.

Any torch device, any strides, float32 inside (float64 where the spec names it), under autocast as
well. Outputs are differentiable in activations and parameters; states are constants. No op asks a
GPU for a value.
Every function is an op of :mod:`gdn_portable.interface` with the spec in front, and takes states
as [slots, HV, V, K] and [slots, D, L].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gdn_portable.backend import Backend, Kernel
from gdn_portable.reference.conv1d import conv1d_prefill, conv1d_update
from gdn_portable.reference.decode import recurrent_decode
from gdn_portable.reference.math import gated_rms_norm, gating
from gdn_portable.reference.prefill import chunk_prefill, plan_prefill
from gdn_portable.reference.verify import conv1d_verify, mtp_commit, mtp_verify
from gdn_portable.spec import Device, GdnSpec, Op

AUTOCASTS = {"cpu": "cpu", "cuda": "cuda", "rocm": "cuda", "xpu": "xpu", "mps": "mps"}
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _kernel(op: Op, function: Callable[..., Any]) -> Kernel:
    def make(spec: GdnSpec, device: Device, *, deterministic: bool) -> Callable[..., Any]:
        launch: Callable[..., Any] = partial(function, spec)
        if device.kind in AUTOCASTS:
            # under it products would be of its dtype
            launch = torch.autocast(AUTOCASTS[device.kind], enabled=False)(launch)
        return launch

    return Kernel(
        op=op,
        name=f"reference.{op.value}",
        target=make,
        probe=None,
        devices=None,
        archs=None,
        dtypes=FLOATS,
        state_dtypes=FLOATS,
        head_dims=None,
        state_layouts=None,
        conv_layouts=None,
    )


BACKEND = Backend(
    name="reference",
    devices=None,
    kernels=(
        _kernel(Op.CONV1D_PREFILL, conv1d_prefill),
        _kernel(Op.CONV1D_UPDATE, conv1d_update),
        _kernel(Op.CONV1D_VERIFY, conv1d_verify),
        _kernel(Op.GATING, gating),
        _kernel(Op.CHUNK_PREFILL, chunk_prefill),
        _kernel(Op.RECURRENT_DECODE, recurrent_decode),
        _kernel(Op.MTP_VERIFY, mtp_verify),
        _kernel(Op.MTP_COMMIT, mtp_commit),
        _kernel(Op.GATED_RMS_NORM, gated_rms_norm),
        _kernel(Op.PLAN_PREFILL, plan_prefill),
    ),
)
