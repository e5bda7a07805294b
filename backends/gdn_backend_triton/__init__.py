# SPDX-License-Identifier: Apache-2.0
"""Kernels in Triton, one source for NVIDIA and AMD: every op, and the three fused steps.

On AMD these are the backend, on NVIDIA what every other kernel has to beat.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util

import torch

from gdn_backend_triton.launch import lazily
from gdn_portable.backend import Backend, Kernel
from gdn_portable.spec import Device, GdnSpec, Op

ARCHS = ("sm90", "sm100", "sm103", "sm120", "gfx942", "gfx950")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128, 256)
CONV_WIDTHS = (2, 3, 4)
# ROCm builds of torch bring Triton under names of their own
DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")
OLDEST = (3, 6)


def installed_triton() -> tuple[str, str] | None:
    """Return the distribution that Triton is from, and its version."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name, importlib.metadata.version(name)
    return None


def is_before(version: str, other: tuple[int, int]) -> bool:
    """Return whether a version is older than another's first two numbers."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) < other


def triton_is_missing() -> str | None:
    """Return why Triton cannot be used, without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    found = installed_triton()
    if found is None:
        return f"module 'triton' is from none of {', '.join(DISTRIBUTIONS)}"
    name, version = found
    if is_before(version, OLDEST):
        return f"{name} is {version}, needs {OLDEST[0]}.{OLDEST[1]} or newer"
    return None


def shapes_are_unfit(spec: GdnSpec, device: Device) -> str | None:
    """Return why a layer's shapes do not fit the tiles."""
    head_dims = (spec.head_k_dim, spec.head_v_dim)
    if not set(head_dims) <= set(HEAD_DIMS):
        return f"head dims (K, V) are {head_dims}, needs powers of two from 16 to 256"
    if spec.conv_width not in CONV_WIDTHS:
        return f"conv_width is {spec.conv_width}, needs 2 to 4"
    if spec.conv_state_dtype not in FLOATS:
        return f"conv dtype is {spec.conv_state_dtype}, needs {' or '.join(map(str, FLOATS))}"
    return None


def _kernel(op: Op, target: str) -> Kernel:
    return Kernel(
        op=op,
        name=f"triton.{op.value}",
        target=lazily(f"gdn_backend_triton.{target}"),
        probe=triton_is_missing,
        devices=("cuda", "rocm"),
        archs=ARCHS,
        dtypes=FLOATS,
        state_dtypes=FLOATS,
        head_dims=None,
        state_layouts=None,
        conv_layouts=None,
        refuse=shapes_are_unfit,
    )


KERNELS = (
    _kernel(Op.CONV1D_PREFILL, "conv1d:make_conv1d_prefill"),
    _kernel(Op.CONV1D_UPDATE, "conv1d:make_conv1d_update"),
    _kernel(Op.CONV1D_VERIFY, "conv1d_verify:make_conv1d_verify"),
    _kernel(Op.GATING, "gating:make_gating"),
    _kernel(Op.CHUNK_PREFILL, "chunk_prefill:make_chunk_prefill"),
    _kernel(Op.RECURRENT_DECODE, "decode:make_recurrent_decode"),
    _kernel(Op.MTP_VERIFY, "mtp_verify:make_mtp_verify"),
    _kernel(Op.MTP_COMMIT, "mtp_commit:make_mtp_commit"),
    _kernel(Op.GATED_RMS_NORM, "gated_rms_norm:make_gated_rms_norm"),
    _kernel(Op.PLAN_PREFILL, "prefill_step:make_plan_prefill"),
    _kernel(Op.PREFILL_STEP, "prefill_step:make_prefill_step"),
    _kernel(Op.DECODE_STEP, "decode:make_decode_step"),
    _kernel(Op.VERIFY_STEP, "verify_step:make_verify_step"),
)
BACKEND = Backend(name="triton", devices=("cuda", "rocm"), kernels=KERNELS)
