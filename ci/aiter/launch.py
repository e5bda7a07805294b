# SPDX-License-Identifier: Apache-2.0
"""Launches of machine code that Triton did not make."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from torch import Tensor

from ci.amdgcn import Order, execution, program
from ci.amdgcn.driver import extents_of
from ci.amdgcn.execution import Grid
from ci.amdgcn.memory import Extent, GlobalMemory


def launch(
    text: str,
    packed: bytes,
    tensors: Mapping[str, Tensor],
    grid: tuple[int, int, int],
    waves: int,
) -> None:
    """Run a kernel.

    Args:
        text: its assembly.
        packed: its arguments as it reads them.
        tensors: all that it may access.
        grid: workgroups.
        waves: of a workgroup.
    """
    storage = ctypes.create_string_buffer(packed, len(packed) + 8)
    address = ctypes.addressof(storage)
    arguments = Extent(address, address + len(packed), "arguments")
    execution.run(
        program.load(text),
        GlobalMemory([arguments, *extents_of(tensors)]),
        Grid(grid, waves),
        arguments=address,
        lds_size=0,
        order=Order.LOCK_STEP,
    )
