# SPDX-License-Identifier: Apache-2.0
"""Runs the machine code that Triton emits for AMD GPUs, on a CPU.

    with simulated("gfx942") as gpu:
        kernel[grid](x, y)                 # CPU tensors
    print(gpu.launches[-1].counts)

See ``docs/amd-simulator.md``.
"""

from ci.amdgcn.conformance import bind_simulated
from ci.amdgcn.driver import Launch, Simulator, simulated
from ci.amdgcn.errors import (
    EndlessLoopError,
    LdsAccessError,
    LdsRaceError,
    MemoryAccessError,
    SimulationError,
    UnknownInstructionError,
    UnsupportedLaunchError,
)
from ci.amdgcn.execution import Counts, Order
from ci.amdgcn.memory import Traffic

__all__ = [
    "Counts",
    "EndlessLoopError",
    "Launch",
    "LdsAccessError",
    "LdsRaceError",
    "MemoryAccessError",
    "Order",
    "SimulationError",
    "Simulator",
    "Traffic",
    "UnknownInstructionError",
    "UnsupportedLaunchError",
    "bind_simulated",
    "simulated",
]
