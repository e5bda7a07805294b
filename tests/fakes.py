# SPDX-License-Identifier: Apache-2.0
"""Backends for tests, made of the reference's kernels, and devices that need not be present."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from gdn_portable import Backend, ConvLayout, Device, GdnSpec, Kernel, Op, StateLayout, select
from gdn_portable.reference import BACKEND as REFERENCE

HOPPER = Device("cuda", "sm90", 0)
MI300 = Device("rocm", "gfx942", 0)
CPU = Device("cpu", "cpu")

Launcher = Callable[..., Any]

SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=4,
    head_k_dim=16,
    head_v_dim=8,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)


def reference_kernel(op: Op) -> Kernel:
    """Return the reference's declaration of ``op``."""
    return next(kernel for kernel in REFERENCE.kernels if kernel.op is op)


def kernel_of(op: Op, name: str, launch: Launcher) -> Kernel:
    """Declare ``launch`` as a kernel of ``op`` that takes anything."""

    def make(spec: GdnSpec, device: Device, *, deterministic: bool) -> Launcher:
        return launch

    return replace(reference_kernel(Op.GATING), op=op, name=name, target=make)


def in_canonical_layouts(kernel: Kernel) -> Kernel:
    """Restrict ``kernel`` to VK states and DIM_FIRST windows."""
    return replace(kernel, state_layouts=(StateLayout.VK,), conv_layouts=(ConvLayout.DIM_FIRST,))


def backend_of(*kernels: Kernel) -> Backend:
    """Return a table of ``kernels`` in front of the reference's."""
    return Backend(name="fake", devices=None, kernels=(*kernels, *REFERENCE.kernels))


def bare_backend_of(*kernels: Kernel) -> Backend:
    """Return a table of ``kernels``, with the reference's only for ops that have none of them."""
    served = {kernel.op for kernel in kernels}
    rest = (kernel for kernel in REFERENCE.kernels if kernel.op not in served)
    return Backend(name="fake", devices=None, kernels=(*kernels, *rest))


def install(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> str:
    """Make ``backend`` one of the built-in ones until the test ends, and return its name."""
    module = ModuleType(f"gdn_backend_{backend.name}")
    vars(module)["BACKEND"] = backend
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(select.BUILTIN, backend.name, f"{module.__name__}:BACKEND")
    return backend.name


def recorded_kernel(op: Op, calls: list[Op]) -> Kernel:
    """Declare the reference's ``op`` with every call noted in ``calls``."""

    def make(spec: GdnSpec, device: Device, *, deterministic: bool) -> Launcher:
        launch = reference_kernel(op).load(spec, device, deterministic=deterministic)

        def launch_recorded(*args: Any, **kwargs: Any) -> Any:
            calls.append(op)
            return launch(*args, **kwargs)

        return launch_recorded

    return replace(reference_kernel(op), name=f"recorded.{op.value}", target=make)
