# SPDX-License-Identifier: Apache-2.0
"""Launches of a kernel whose arguments Triton has seen before.

For every launch Triton looks at each argument, to find what it compiled for such. That takes the
host longer than all else of a call, and longer than a short prefill takes the GPU. What it found is
kept here under all that it looks at, so that a launch with arguments that are alike goes straight
to the driver.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from gdn_portable.spec import Device

HOPPER = 90  # is the first that can start a kernel early
ALIGNMENT = 16  # bytes, of what Triton loads in whole vectors
MOST = 512  # that are kept: strides may be other ones in every step


class Launch:
    """A kernel with its options; a call launches it on the current device.

    The kernel's parameters are tensors, then sizes, then numbers, and OVERLAPS where it waits.
    """

    __slots__ = ("_asks_for_storage", "_kernel", "_known", "_last", "_options")

    def __init__(self, kernel: Any, device: Device, **options: Any) -> None:
        """Make it.

        Args:
            kernel: the function, behind ``triton.jit``.
            device: where.
            options: that Triton takes, beside those of every launch.
        """
        overlaps = device.kind == "cuda" and int(device.arch.removeprefix("sm")) >= HOPPER
        self._kernel = kernel
        # what Triton does by default is not the same in all versions
        self._options = {"enable_fp_fusion": True, **options}
        self._last: tuple[bool, ...] = ()
        if kernel.arg_names[-1] == "OVERLAPS":
            self._last = (overlaps,)
            self._options["OVERLAPS"] = overlaps
            if overlaps:
                # a keyword that only NVIDIA's compiler knows
                self._options["launch_pdl"] = True
        # AMD's compiler addresses what lies in less than 2 GiB another way
        self._asks_for_storage = device.kind == "rocm"
        self._known: dict[tuple[object, ...], Any] = {}

    def __call__(
        self,
        programs: int,
        tensors: tuple[Tensor | None, ...],
        sizes: tuple[int, ...],
        numbers: tuple[Any, ...],
    ) -> None:
        """Launch it.

        Args:
            programs: how many.
            tensors: the kernel's first arguments.
            sizes: those behind, of ``do_not_specialize``: they may change with every call.
            numbers: the rest: strides and constants.
        """
        # the interpreter has nothing to remember, and torch.compile launches on its own
        if not isinstance(self._kernel, JITFunction) or torch.compiler.is_compiling():
            self._kernel[(programs,)](*tensors, *sizes, *numbers, **self._options)
            return
        active = driver.active
        device = active.get_current_device()
        alike: list[object] = [device, numbers]
        for place, x in enumerate(tensors):
            if x is None:
                alike.append(None)
                continue
            alike.append(x.dtype)
            if x.data_ptr() % ALIGNMENT:
                alike.append(place)
            if self._asks_for_storage:
                alike.append(x.untyped_storage().nbytes() >> 31)
        alike += [size >> 31 for size in sizes]
        key = tuple(alike)
        kernel = self._known.get(key)
        if kernel is not None:
            stream = active.get_current_stream(device)
            kernel[(programs, 1, 1)](*tensors, *sizes, *numbers, *self._last, stream=stream)
            return
        kernel = self._kernel[(programs,)](*tensors, *sizes, *numbers, **self._options)
        if isinstance(kernel, CompiledKernel):
            if len(self._known) == MOST:
                self._known.clear()
            self._known[key] = kernel
