# SPDX-License-Identifier: Apache-2.0
"""Global memory: the tensors that a launch was given, and nothing else."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ci.amdgcn.errors import MemoryAccessError
from ci.amdgcn.waves import Array

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one tensor that a launch moved.

    Attributes:
        loaded: bytes that lanes asked for, every time.
        stored: bytes that lanes wrote, every time.
        unique_loaded: bytes that were loaded at least once, in words of 4.
        unique_stored: bytes that were written at least once, in words of 4.
    """

    loaded: int
    stored: int
    unique_loaded: int
    unique_stored: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Addresses from ``start`` up to ``end`` that a launch may use."""

    start: int
    end: int
    name: str


class Buffer:
    """The bytes of an extent, as arrays."""

    def __init__(self, extent: Extent) -> None:
        self.start, self.end, self.name = extent.start, extent.end, extent.name
        # words are aligned, so the views begin at or before the first byte
        self.base = extent.start & ~3
        size = extent.end - self.base
        memory = (ctypes.c_uint8 * size).from_address(self.base)
        self.octets: Array = np.ctypeslib.as_array(memory)
        self.shorts = self.octets[: size & ~1].view(u16)
        self.words = self.octets[: size & ~3].view(u32)
        self.loaded = self.stored = 0
        self._loaded_words = np.zeros((size + 3) // 4, np.bool_)
        self._stored_words = np.zeros((size + 3) // 4, np.bool_)

    def traffic(self) -> Traffic:
        """Return the bytes that were moved."""
        unique = (4 * int(np.count_nonzero(x)) for x in (self._loaded_words, self._stored_words))
        return Traffic(self.loaded, self.stored, *unique)

    def load(self, offsets: Array, size: int) -> list[Array]:
        """Return the words at offsets into the buffer, as uint32."""
        self.loaded += size * len(offsets)
        self._mark(self._loaded_words, offsets, size)
        if size == 1:
            return [self.octets[offsets].astype(u32)]
        if offsets_are_aligned(offsets, min(size, 4)):
            if size == 2:
                return [self.shorts[offsets >> 1].astype(u32)]
            first = offsets >> 2
            return [self.words[first + k if k else first] for k in range(size // 4)]
        octets = self.octets[offsets[:, None] + np.arange(size)]
        if size == 2:
            return [octets.view(u16)[:, 0].astype(u32)]
        return list(octets.view(u32).T)

    def store(self, offsets: Array, words: list[Array], size: int) -> None:
        """Write the words at offsets into the buffer; of equal ones the last stays."""
        self.stored += size * len(offsets)
        self._mark(self._stored_words, offsets, size)
        if size == 1:
            self.octets[offsets] = words[0].astype(u8)
        elif size == 2 and offsets_are_aligned(offsets, 2):
            self.shorts[offsets >> 1] = words[0].astype(u16)
        elif offsets_are_aligned(offsets, 4):
            for k, word in enumerate(words):
                self.words[(offsets >> 2) + k] = word
        else:
            octets = np.stack(words, axis=1).view(u8)[:, :size]
            self.octets[offsets[:, None] + np.arange(size)] = octets

    def note_update(self, offsets: Array, size: int) -> None:
        """Count bytes that are loaded and stored again."""
        self.loaded += size * len(offsets)
        self.stored += size * len(offsets)
        self._mark(self._loaded_words, offsets, size)
        self._mark(self._stored_words, offsets, size)

    @staticmethod
    def _mark(touched: Array, offsets: Array, size: int) -> None:
        first = offsets >> 2
        touched[first] = True
        for k in range(1, size // 4):
            touched[first + k] = True


def offsets_are_aligned(offsets: Array, size: int) -> bool:
    """Return whether all offsets are multiples of ``size``, a power of two."""
    return not (offsets & (size - 1)).any()


class GlobalMemory:
    """What is at which address; ``buffers`` are in order."""

    def __init__(self, extents: list[Extent]) -> None:
        self.buffers = [Buffer(extent) for extent in joined(extents)]
        self._starts = [buffer.start for buffer in self.buffers]

    def load(self, addresses: Array, size: int) -> list[Array]:
        """Return the ``size`` bytes at each of uint64 ``addresses``, as words."""
        pieces = list(self.find(addresses, size, "load"))
        if len(pieces) == 1:
            ((buffer, offsets, _),) = pieces
            return buffer.load(offsets, size)
        words: list[Array] = [np.zeros(len(addresses), u32) for _ in range(max(1, size // 4))]
        for buffer, offsets, chosen in pieces:
            for word, value in zip(words, buffer.load(offsets, size), strict=True):
                word[chosen] = value
        return words

    def store(self, addresses: Array, words: list[Array], size: int) -> None:
        """Write ``size`` bytes, given as words, to each of uint64 ``addresses``."""
        for buffer, offsets, chosen in self.find(addresses, size, "store"):
            buffer.store(offsets, [word[chosen] for word in words], size)

    def find(
        self, addresses: Array, size: int, what: str
    ) -> Iterator[tuple[Buffer, Array, Array | slice]]:
        """Yield each buffer that is used, the offsets into it, and which addresses those are.

        Raises:
            MemoryAccessError: an address is in no buffer.
        """
        if not len(addresses):
            return
        lowest, highest = int(addresses.min()), int(addresses.max())
        buffer = self._buffer_below(lowest)
        if buffer is not None and highest + size <= buffer.end:
            yield buffer, (addresses - u64(buffer.base)).view(np.int64), slice(None)
            return
        place = np.searchsorted(np.array(self._starts, u64), addresses, "right") - 1
        ends = np.array([buffer.end for buffer in self.buffers], u64)
        outside = (place < 0) | (addresses > ends[place] - u64(size))
        if outside.any():
            raise self._illegal(addresses[outside], size, what)
        for number in np.unique(place):
            buffer = self.buffers[number]
            chosen = np.flatnonzero(place == number)
            yield buffer, (addresses[chosen] - u64(buffer.base)).view(np.int64), chosen

    def _buffer_below(self, address: int) -> Buffer | None:
        place = bisect.bisect_right(self._starts, address) - 1
        return self.buffers[place] if place >= 0 else None

    def _illegal(self, addresses: Array, size: int, what: str) -> MemoryAccessError:
        address = int(addresses[0])
        nearest = min(self.buffers, key=lambda b: max(b.start - address, address - b.end, 0))
        length = nearest.end - nearest.start
        return MemoryAccessError(
            f"illegal {what} of {size} bytes at {address:#x}, by {len(addresses)} lanes: nearest "
            f"is {nearest.name}, {length} bytes, at offset {address - nearest.start}"
        )


def joined(extents: list[Extent]) -> list[Extent]:
    """Return extents in order, those that overlap as one."""
    found: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: (extent.start, -extent.end)):
        if found and extent.start < found[-1].end:
            last = found.pop()
            names = last.name.split("+")
            name = last.name if extent.name in names else f"{last.name}+{extent.name}"
            extent = Extent(last.start, max(last.end, extent.end), name)
        if extent.end > extent.start:
            found.append(extent)
    return found
