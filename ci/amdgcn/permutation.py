# SPDX-License-Identifier: Apache-2.0
"""Where a lane's value comes from, in instructions that move values between lanes (DPP)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ci.amdgcn.assembly import Instruction
from ci.amdgcn.waves import LANE, LANES, Array, Waves

_ROW = LANE & ~15  # first lane of a lane's row of 16
_IN_ROW = LANE & 15

Pattern = tuple[Array, Array | bool]  # source lanes, and which of them exist

NUMBERED: dict[str, Callable[[int], Pattern]] = {
    "row_shr": lambda n: (LANE - n, n <= _IN_ROW),
    "row_shl": lambda n: (LANE + n, _IN_ROW + n < 16),
    "row_ror": lambda n: (_ROW + ((_IN_ROW - n) & 15), True),
    "row_newbcast": lambda n: (_ROW + n, True),
    "row_bcast": lambda n: (_ROW - 1, LANE >= 16) if n == 15 else (np.full(LANES, 31), LANE >= 32),
    "wave_shr": lambda n: (LANE - n, n <= LANE),
    "wave_shl": lambda n: (LANE + n, LANE + n < LANES),
    "wave_ror": lambda n: ((LANE - n) % LANES, True),
    "wave_rol": lambda n: ((LANE + n) % LANES, True),
}
NAMED: dict[str, Array] = {
    "row_mirror": _ROW + 15 - _IN_ROW,
    "row_half_mirror": (LANE & ~7) + 7 - (LANE & 7),
}


def quad_permutation(choice: tuple[int, ...]) -> Array:
    """Return the source lanes of a permutation of each four lanes."""
    return (LANE & ~3) + np.array(choice)[LANE & 3]


@dataclass(frozen=True, slots=True)
class LanePermutation:
    """The lanes that an instruction reads and writes.

    Attributes:
        lanes: [lanes] the lane that each reads.
        exists: [lanes] whether there is such a lane.
        enabled: [lanes] whether the lane is written at all.
        fills: a lane without a source reads 0; otherwise it is not written.
    """

    lanes: Array
    exists: Array
    enabled: Array
    fills: bool

    def apply(self, waves: Waves, value: Array) -> Array:
        """Return uint32 [waves, lanes] with every lane's value from its source, or 0."""
        return np.where(self._found(waves), value.take(self.lanes, axis=1), np.uint32(0))

    def written(self, waves: Waves) -> Array:
        """Return which lanes are written, [waves, lanes]."""
        if self.fills:
            return waves.active & self.enabled
        return waves.active & self.enabled & self._found(waves)

    def _found(self, waves: Waves) -> Array:
        if waves.all_active:
            return self.exists
        found: Array = waves.active[:, self.lanes] & self.exists
        return found


def permutation(instruction: Instruction) -> LanePermutation:
    """Return what the modifiers of a DPP instruction say."""
    lanes, exists = _pattern(instruction)
    exists = np.broadcast_to(exists, (LANES,))
    rows = instruction.integer("row_mask", 15) >> (LANE >> 4)
    banks = instruction.integer("bank_mask", 15) >> ((LANE & 15) >> 2)
    return LanePermutation(
        lanes=np.where(exists, lanes, 0),
        exists=exists,
        enabled=(rows & banks & 1).astype(np.bool_),
        fills=bool(instruction.integer("bound_ctrl")),
    )


def _pattern(instruction: Instruction) -> Pattern:
    if "quad_perm" in instruction.modifiers:
        return quad_permutation(instruction.integers("quad_perm", ())), True
    for name, pattern in NUMBERED.items():
        if name in instruction.modifiers:
            return pattern(instruction.integer(name))
    for name, lanes in NAMED.items():
        if name in instruction.flags:
            return lanes, True
    raise instruction.unknown("dpp control")
