# SPDX-License-Identifier: Apache-2.0
"""The registers of waves that are at the same instruction, as arrays over waves and lanes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ci.amdgcn.assembly import EXEC

if TYPE_CHECKING:
    from ci.amdgcn.lds import Lds
    from ci.amdgcn.memory import GlobalMemory

Array: TypeAlias = npt.NDArray[Any]
Dtype: TypeAlias = type[np.generic]

LANES = 64
LANE = np.arange(LANES)
SCALARS = 128
# NaN as float32, and both its halves NaN as float16 and bfloat16; as an offset it is out of bounds
POISON = 0x7FFF7FFF


class _Vectors(dict[Dtype, list[Array]]):
    """Vector registers by type: ``vectors[np.float32][7]`` is v7, [waves, lanes], to be written.

    A type of 16 bits is the low half of each register.
    """

    def __init__(self, registers: Array) -> None:
        super().__init__()
        self._registers = registers

    def __missing__(self, dtype: Dtype) -> list[Array]:
        view = self._registers.view(dtype)
        self[dtype] = list(view if view.itemsize == 4 else view[..., ::2])
        return self[dtype]


class _Scalars(dict[Dtype, list[Array]]):
    """Scalar registers by type, [waves]; a type of 64 bits counts pairs: s[4:5] is number 2."""

    def __init__(self, registers: Array) -> None:
        super().__init__()
        self._registers = registers

    def __missing__(self, dtype: Dtype) -> list[Array]:
        view = self._registers.view(dtype)
        # the low half of a register where the type has 16 bits
        view = view[:, :: max(1, view.shape[1] // SCALARS)]
        self[dtype] = [view[:, i] for i in range(view.shape[1])]
        return self[dtype]


class Waves:
    """Some waves of a launch, all at instruction ``position``.

    Attributes:
        ids: [waves] numbers within the batch; waves of a workgroup are neighbours.
        workgroups: [waves] the workgroup's number within the batch.
        numbers: [waves] the wave's number within its workgroup.
        scc: [waves] the scalar condition code.
    """

    __slots__ = (
        "_active", "_all_active", "_scalar_file", "_vector_file", "ids", "lds", "memory",
        "numbers", "position", "scalars", "scc", "vectors", "workgroups",
    )  # fmt: skip

    def __init__(
        self,
        ids: Array,
        workgroups: Array,
        numbers: Array,
        vector_file: Array,
        scalar_file: Array,
        scc: Array,
        memory: GlobalMemory,
        lds: Lds,
        position: int = 0,
    ) -> None:
        self.ids, self.workgroups, self.numbers = ids, workgroups, numbers
        self._vector_file = vector_file  # [registers, waves, lanes]
        self._scalar_file = scalar_file  # [waves, registers]
        self.vectors = _Vectors(vector_file)
        self.scalars = _Scalars(scalar_file)
        self.scc = scc
        self.memory, self.lds, self.position = memory, lds, position
        self._active: Array | None = None
        self._all_active = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def active(self) -> Array:
        """Return which lanes EXEC enables, [waves, lanes]."""
        if self._active is None:
            mask = self.scalars[np.uint64][EXEC // 2]
            self._active = unpack(mask)
            self._all_active = bool(self._active.all())
        return self._active

    @property
    def all_active(self) -> bool:
        """Whether EXEC enables every lane of every wave."""
        return self._all_active if self._active is not None else bool(self.active.all())

    def block(self, first: int, count: int) -> Array:
        """Return consecutive vector registers, [count, waves, lanes], to be written."""
        return self._vector_file[first : first + count]

    def scalar_changed(self, register: int) -> None:
        """Forget what was derived from a scalar register."""
        if register >= EXEC:
            self._active = None

    def write_scalar(self, register: int, value: Array) -> None:
        """Set a scalar register."""
        self.scalars[np.uint32][register][...] = value
        self.scalar_changed(register)

    def write_mask(self, register: int, mask: Array) -> None:
        """Set a pair of scalar registers to one bit for each lane, 0 where a lane is disabled."""
        mask = self.active & mask
        self.scalars[np.uint64][register // 2][...] = pack(mask)
        self.scalar_changed(register)

    def mask(self, register: int) -> Array:
        """Return a pair of scalar registers as one bool for each lane."""
        return unpack(self.scalars[np.uint64][register // 2])

    def vector_pair(self, register: int) -> Array:
        """Return two vector registers as one uint64 for each lane."""
        low, high = self.vectors[np.uint32][register : register + 2]
        pair = np.empty((*low.shape, 2), np.uint32)
        pair[..., 0] = low
        pair[..., 1] = high
        return pair.view(np.uint64)[..., 0]

    def take(self, mask: Array, position: int) -> Waves:
        """Return a copy of some waves, at another instruction."""
        return Waves(
            self.ids[mask],
            self.workgroups[mask],
            self.numbers[mask],
            # indexing would choose a layout of its own, and rows have to be contiguous
            np.compress(mask, self._vector_file, axis=1),
            self._scalar_file[mask],
            self.scc[mask],
            self.memory,
            self.lds,
            position,
        )


def merge(groups: list[Waves]) -> Waves:
    """Return waves that are at the same instruction as one."""
    first = groups[0]
    return Waves(
        np.concatenate([group.ids for group in groups]),
        np.concatenate([group.workgroups for group in groups]),
        np.concatenate([group.numbers for group in groups]),
        np.concatenate([group._vector_file for group in groups], axis=1),
        np.concatenate([group._scalar_file for group in groups]),
        np.concatenate([group.scc for group in groups]),
        first.memory,
        first.lds,
        first.position,
    )


def unpack(masks: Array) -> Array:
    """Return the bits of uint64 [waves] as bool [waves, lanes]."""
    octets = np.ascontiguousarray(masks).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_)


def pack(mask: Array) -> Array:
    """Return bool [waves, lanes] as the bits of uint64 [waves]."""
    octets: Array = np.packbits(mask, axis=1, bitorder="little").view(np.uint64)
    return octets[:, 0]
