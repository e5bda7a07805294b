# SPDX-License-Identifier: Apache-2.0
"""Binds the ops of ``gdn_portable`` as on an AMD GPU, for CPU tensors."""

from __future__ import annotations

import dataclasses

from gdn_portable import Device, GdnOps, GdnSpec, bind


def bind_simulated(spec: GdnSpec, arch: str, *, deterministic: bool = False) -> GdnOps:
    """Return the ops for ``arch``, to be called on CPU tensors while it is simulated."""
    ops = bind(spec, Device("rocm", arch), backend="rocm", deterministic=deterministic)
    return dataclasses.replace(ops, device=Device("cpu", "cpu"))
