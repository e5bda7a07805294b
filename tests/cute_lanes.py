# SPDX-License-Identifier: Apache-2.0
"""The instructions of the CuTe kernels for the lanes of a block, in NumPy.

A value is an array with an entry for every lane. Products of the tensor core take warps of 32.
Lanes run in lockstep, which shows no race. Addresses are those of tensors on a CPU, whose memory is
read and written where it is, and nothing outside of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]


class Space:
    """Bytes from an address on, of which those in ``regions`` may be used."""

    def __init__(self, data: Array, base: int, regions: Sequence[tuple[int, int]]) -> None:
        self.data = data
        self.base = base
        self.starts, self.ends = np.array(sorted(regions), np.int64).T

    @classmethod
    def shared(cls, size: int) -> Space:
        """Return new memory of NaN."""
        return cls(np.full(size, 0xFF, np.uint8), 0, [(0, size)])

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Space:
        """Return the memory that these tensors lie in."""
        storages = [tensor.untyped_storage() for tensor in tensors]
        regions = sorted({(s.data_ptr(), s.data_ptr() + len(s)) for s in storages if len(s)})
        base, end = regions[0][0], max(end for _, end in regions)
        memory = (ctypes.c_uint8 * (end - base)).from_address(base)
        return cls(np.frombuffer(memory, np.uint8), base, regions)

    def at(self, address: Array, size: int) -> Array:
        """Return which bytes ``size`` bytes from each address on are."""
        region = np.searchsorted(self.starts, address, "right") - 1
        assert (address % size == 0).all(), "an address is not aligned"
        assert (region >= 0).all() and (address + size <= self.ends[region]).all(), "out of bounds"
        return (address - self.base)[:, None] + np.arange(size)


class Lanes:
    """The functions of ``gdn_backend_cuda.cute_replay.ptx``; ``lanes`` of them run at a time."""

    def __init__(self, memory: Space, shared: Space) -> None:
        self.memory = memory
        self.space = shared
        self.lanes = 32

    def _array(self, x: Any, kind: Any) -> Array:
        return np.broadcast_to(np.asarray(x, kind), (self.lanes,))

    def _load(self, space: Space, address: Any, kind: Any) -> Array:
        at = space.at(self._array(address, np.int64), np.dtype(kind).itemsize)
        return np.ascontiguousarray(space.data[at]).view(kind)[:, 0]

    def _put(self, space: Space, address: Any, x: Any, kind: Any, condition: Any = True) -> None:
        where = self._array(condition, bool)
        x = np.ascontiguousarray(self._array(x, kind)[where])
        at = space.at(self._array(address, np.int64)[where], x.itemsize)
        space.data[at] = x[:, None].view(np.uint8).reshape(at.shape)

    def select(self, condition: Any, yes: Any, no: Any) -> Array:
        return np.where(condition, yes, no)

    def zero(self) -> Array:
        return np.zeros(self.lanes, np.float32)

    def one(self) -> Array:
        return np.ones(self.lanes, np.float32)

    def no_bits(self) -> Array:
        return np.zeros(self.lanes, np.uint32)

    def number(self, x: float) -> Array:
        return np.full(self.lanes, x, np.float32)

    def wide(self, x: Any) -> Array:
        return self._array(x, np.int64)

    def shared_words(self, address: Any, count: int) -> tuple[Array, ...]:
        assert (self._array(address, np.int64) % (4 * count) == 0).all()
        return tuple(self._load(self.space, address + 4 * n, np.uint32) for n in range(count))

    def shared_u16(self, address: Any) -> Array:
        return self._load(self.space, address, np.uint16).astype(np.uint32)

    def shared_float(self, address: Any) -> Array:
        return self._load(self.space, address, np.float32)

    def put_words(self, address: Any, words: Sequence[Any]) -> None:
        assert (self._array(address, np.int64) % (4 * len(words)) == 0).all()
        for n, word in enumerate(words):
            self._put(self.space, address + 4 * n, word, np.uint32)

    def put_u16(self, address: Any, word: Any) -> None:
        self._put(self.space, address, _low(word), np.uint16)

    def put_float_if(self, condition: Any, address: Any, x: Any) -> None:
        self._put(self.space, address, x, np.float32, condition)

    def global_u16(self, address: Any) -> Array:
        return self._load(self.memory, address, np.uint16).astype(np.uint32)

    def global_words(self, address: Any) -> tuple[Array, ...]:
        assert (self._array(address, np.int64) % 8 == 0).all()
        return tuple(self._load(self.memory, address + 4 * n, np.uint32) for n in range(2))

    def global_float(self, address: Any) -> Array:
        return self._load(self.memory, address, np.float32)

    def store_u16_if(self, condition: Any, address: Any, word: Any) -> None:
        self._put(self.memory, address, _low(word), np.uint16, condition)

    def store_word_if(self, condition: Any, address: Any, word: Any) -> None:
        self._put(self.memory, address, word, np.uint32, condition)

    def store_words_if(self, condition: Any, address: Any, words: Sequence[Any]) -> None:
        assert (self._array(address, np.int64) % 16 == 0).all()
        for n, word in enumerate(words):
            self._put(self.memory, address + 4 * n, word, np.uint32, condition)

    def store_float_if(self, condition: Any, address: Any, x: Any) -> None:
        self._put(self.memory, address, x, np.float32, condition)

    def as_float(self, word: Any) -> Array:
        return np.ascontiguousarray(word).view(np.float32)

    def as_word(self, x: Any) -> Array:
        return np.ascontiguousarray(self._array(x, np.float32)).view(np.uint32)

    def low_bf16(self, word: Any) -> Array:
        return self.as_float((word << np.uint32(16)).astype(np.uint32))

    def high_bf16(self, word: Any) -> Array:
        return self.as_float(word & np.uint32(0xFFFF0000))

    def low_half(self, kind: str, word: Any) -> Array:
        if kind == "bfloat16":
            return self.low_bf16(word)
        return np.ascontiguousarray(_low(word)).view(np.float16).astype(np.float32)

    def high_half(self, kind: str, word: Any) -> Array:
        return self.low_half(kind, word >> np.uint32(16))

    def pair(self, low: Any, high: Any) -> Any:
        return low | (high << np.uint32(16))

    def _rounded(self, x: Any) -> Array:
        bits = self.as_word(x)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)

    def round_halves(self, kind: str, low: Any, high: Any) -> Any:
        if kind == "bfloat16":
            return self.pair(self._rounded(low), self._rounded(high))
        low, high = (self._array(x, np.float32).astype(np.float16) for x in (low, high))
        return self.pair(*(x.view(np.uint16).astype(np.uint32) for x in (low, high)))

    def upper_halves(self, low: Any, high: Any) -> tuple[Array, Array, Array]:
        word = (self.as_word(low) >> np.uint32(16)) | (self.as_word(high) & np.uint32(0xFFFF0000))
        return word, low - self.low_bf16(word), high - self.high_bf16(word)

    def _product(self, a: Any, b: Any, c: Any, depth: int, kind: str) -> tuple[Array, ...]:
        """Place the operands as the PTX manual's tables of fragments do, and multiply."""
        lane = np.arange(self.lanes)
        warp, g, t = lane // 32, lane % 32 // 4, lane % 4
        A = np.zeros((self.lanes // 32, 16, depth), np.float64)
        B = np.zeros((self.lanes // 32, depth, 8), np.float64)
        for n, word in enumerate(a):
            row, column = g + 8 * (n % 2), 2 * t + 8 * (n // 2)
            A[warp, row, column] = self.low_half(kind, word)
            A[warp, row, column + 1] = self.high_half(kind, word)
        for n, word in enumerate(b):
            row = 2 * t + 8 * n
            B[warp, row, g] = self.low_half(kind, word)
            B[warp, row + 1, g] = self.high_half(kind, word)
        C = A @ B
        return tuple(
            (C[warp, g + 8 * (n // 2), 2 * t + n % 2] + c[n]).astype(np.float32) for n in range(4)
        )

    def product16(self, a: Any, b: Any, c: Any, kind: str = "bfloat16") -> tuple[Array, ...]:
        return self._product(a, b, c, 16, kind)

    def product8(self, a: Any, b: Any, c: Any) -> tuple[Array, ...]:
        return self._product(a, (b,), c, 8, "bfloat16")

    def exp2(self, x: Any) -> Any:
        return np.exp2(x)

    def exp(self, x: Any) -> Any:
        return np.exp(x)

    def log(self, x: Any) -> Any:
        return np.log(x)

    def reciprocal_root(self, x: Any) -> Array:
        return (1 / np.sqrt(x.astype(np.float64))).astype(np.float32)

    def add(self, x: Any, y: Any) -> Any:
        return x + y

    def shuffle(self, x: Any, lane: Any) -> Array:
        return self._array(x, np.asarray(x).dtype)[self._array(lane, np.int64)]

    def here(self, x: Any) -> Any:
        return x

    def sync_warp(self) -> None:
        """Do nothing: lanes are in step."""


def _low(word: Any) -> Any:
    return (word & np.uint32(0xFFFF)).astype(np.uint16)
