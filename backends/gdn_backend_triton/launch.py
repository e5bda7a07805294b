# SPDX-License-Identifier: Apache-2.0
"""What every launcher does before it launches."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from gdn_portable.backend import Launcher, MakeLauncher
from gdn_portable.errors import InputError
from gdn_portable.spec import Device, GdnSpec


def refuse_gradients(x: Tensor) -> None:
    """Raise where autograd would record the call: the kernels have no backward.

    Raises:
        InputError: gradients are on and ``x`` requires one.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "an input requires a gradient and the kernels have none: needs torch.no_grad(), or "
            'bind(..., backend="reference") to train'
        )


def lazily(path: str) -> MakeLauncher:
    """Return what makes the launcher at ``"module:function"``; the module is imported at bind.

    Triton launches on the current device: where the bound device has a number, the launcher makes
    it the current one.
    """
    module, _, function = path.partition(":")

    def make(spec: GdnSpec, device: Device, *, deterministic: bool) -> Launcher:
        maker: MakeLauncher = getattr(importlib.import_module(module), function)
        launcher = maker(spec, device, deterministic=deterministic)
        return launcher if device.index is None else _on_device(launcher, device.index)

    return make


def _on_device(launcher: Launcher, index: int) -> Launcher:
    @functools.wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Any:
        if torch.cuda.current_device() == index:
            return launcher(*args, **kwargs)
        with torch.cuda.device(index):
            return launcher(*args, **kwargs)

    return launch
