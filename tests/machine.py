# SPDX-License-Identifier: Apache-2.0
"""Waves of the simulator of AMD GPUs, to execute single instructions on."""

from __future__ import annotations

import numpy as np

from ci.amdgcn import program
from ci.amdgcn.assembly import EXEC
from ci.amdgcn.lds import Lds
from ci.amdgcn.memory import Extent, GlobalMemory
from ci.amdgcn.waves import LANES, SCALARS, Array, Waves

LDS_BYTES = 8192


def waves_of(count: int, memory: Array | None = None) -> Waves:
    """Return waves with anything in their registers, and all lanes enabled.

    Args:
        count: how many, of one workgroup.
        memory: bytes that they may access.
    """
    random, ids = np.random.default_rng(1), np.arange(count)
    vectors = random.integers(0, 1 << 32, (16, count, LANES), np.uint32)
    scalars = random.integers(0, 1 << 32, (count, SCALARS), np.uint32)
    scalars[:, EXEC : EXEC + 2] = 0xFFFFFFFF
    extents = []
    if memory is not None:
        extents.append(Extent(memory.ctypes.data, memory.ctypes.data + memory.nbytes, "memory"))
    lds = Lds(1, LDS_BYTES, 1, detects_races=False)
    workgroups = np.zeros_like(ids)
    return Waves(ids, workgroups, ids, vectors, scalars, ids % 2 == 0, GlobalMemory(extents), lds)


def execute(line: str, waves: Waves) -> None:
    """Execute one instruction."""
    text = f"\t.type k,@function\nk:\n\t{line}\n\ts_endpgm\n"
    with np.errstate(all="ignore"):
        for step in program.load(text).blocks[0].execute:
            step(waves)


def place(letter: str, first: int, bits: int) -> str:
    """Return registers that hold so many bits."""
    count = -(-bits // 32)
    return f"{letter}{first}" if count <= 1 else f"{letter}[{first}:{first + count - 1}]"
