# SPDX-License-Identifier: Apache-2.0
"""What the simulator finds wrong with a kernel, or cannot do."""

from __future__ import annotations


class SimulationError(RuntimeError):
    """Something is wrong with a kernel; says in which kernel and instruction."""

    kernel = ""
    instruction = ""

    def locate(self, kernel: str, line: int, instruction: str) -> None:
        """Name the place, once."""
        if not self.kernel:
            self.kernel, self.instruction = kernel, instruction
            self.args = (f"{self.args[0]}\n  in {kernel}, line {line}: {instruction}",)


class UnknownInstructionError(SimulationError):
    """An instruction, operand or modifier that the simulator does not implement."""


class MemoryAccessError(SimulationError):
    """A load, store or atomic outside every tensor that the kernel was given."""


class LdsAccessError(SimulationError):
    """A misaligned access of shared memory (LDS), or one past its end."""


class LdsRaceError(SimulationError):
    """Two waves use the same bytes of shared memory, one to write, and no barrier is between."""


class EndlessLoopError(SimulationError):
    """A kernel did not end within the instructions it may take."""


class UnsupportedLaunchError(SimulationError):
    """A launch that the simulator cannot carry out."""
