# SPDX-License-Identifier: Apache-2.0
"""Loads and stores of the simulator against AMD's pseudocode: which bytes go where."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("tinygrad.runtime.autogen.amd.cdna.str_pcode")

from ci.amdgcn.lds_instructions import READS, WRITES
from ci.amdgcn.memory_instructions import LOADS, STORES
from ci.amdgcn.waves import LANES, Array, Waves
from tests.machine import LDS_BYTES, execute, place, waves_of
from tests.pseudocode import Cells, Int, Register, pseudocodes, run

TEXTS = pseudocodes()
VERBS = ("read", "write")
DATA, DATA2, ADDRESS, RESULT = 8, 12, 4, 0  # vector registers
SHARED = [
    *(f"ds_read_{name}" for name in READS),
    *(f"ds_write_{name}" for name in WRITES),
    *(f"ds_{verb}2{far}_b{bits}" for verb, far, bits in product(VERBS, ("", "st64"), (32, 64))),
]
GLOBAL = [
    f"{kind}_{verb}_{name}"
    for kind in ("buffer", "global", "flat")
    for verb, accesses in (("load", LOADS), ("store", STORES))
    for name in accesses
]
SCALAR = [f"s_load_dword{count}" for count in ("", "x2", "x4", "x8", "x16")]
FAR = 48  # an offset, where the pseudocode has it
BLOCK = 32  # bytes from a lane's place to the next


def bits_of(name: str) -> int:
    """Return how much a register gets or gives at most."""
    parts = re.findall(r"DATA\[(\d+) :", TEXTS[name])
    return max([32, *(int(high) + 1 for high in parts)])


def registers(waves: Waves, first: int, lane: int) -> Register:
    """Return four registers of one lane as one."""
    words = waves.block(first, 4)[:, 0, lane].tolist()
    return Register(sum(int(word) << 32 * k for k, word in enumerate(words)))


def starts(name: str) -> Array:
    """Return places of memory in no order, one for each lane, so that no two write the same."""
    # the two places of one lane are 128 elements apart
    step = int(name.rpartition("_b")[2]) // 8 if "st64" in name else BLOCK
    return np.random.default_rng(2).permutation(LANES).astype(np.uint32) * step


def expected(name: str, waves: Waves, memory: Array, **names: Any) -> tuple[Array, list[int]]:
    """Return memory, and the result registers, after every lane has run the pseudocode."""
    cells, results = Cells(memory.tobytes()), []
    for lane, start in enumerate(starts(name).tolist()):
        result = registers(waves, RESULT, lane)
        source = registers(waves, DATA, lane)
        addresses = dict.fromkeys(
            ("CalcDsAddr", "CalcGlobalAddr", "CalcFlatAddr", "CalcBufferAddr"),
            lambda *_, start=start: Int(start),
        )
        shared = {"RETURN_DATA": result, "DATA": source, "DATA2": registers(waves, DATA2, lane)}
        others = dict.fromkeys(("VADDR", "SRSRC", "SOFFSET", "SADDR"), Int(0))
        data = {"VDATA": result if "load" in name else source}
        names |= {"MEM": cells, "ADDR": Int(start), "OFFSET": names.get("OFFSET", Int(0))}
        run(TEXTS[name], {**names, **addresses, **shared, **data, **others})
        results.append(int(result))
    return np.frombuffer(bytes(cells), np.uint8), results


@pytest.mark.parametrize("name", SHARED)
def test_shared_memory_is_accessed_as_the_pseudocode_says(name: str) -> None:
    waves = waves_of(1)
    memory = np.random.default_rng(0).integers(0, 256, LDS_BYTES, np.uint8)
    for start in range(0, LDS_BYTES, 4 * LANES):
        at = (start + 4 * np.arange(LANES, dtype=np.uint32))[None]
        word = memory[start : start + 4 * LANES].view(np.uint32)
        waves.lds.store(waves, at, [word], 4)
    waves.vectors[np.uint32][ADDRESS][0] = starts(name)
    bits, is_pair = bits_of(name), re.match(r"ds_\w+2(st64)?_b", name) is not None
    has_offset = "OFFSET" in TEXTS[name] and not is_pair
    operands = [f"v{ADDRESS}", place("v", DATA, bits)]
    if "read" in name:
        operands = [place("v", RESULT, bits), f"v{ADDRESS}"]
    elif is_pair:
        operands.append(place("v", DATA2, bits))
    tail = " offset0:1 offset1:3" if is_pair else f" offset:{FAR}" if has_offset else ""
    offsets = {"OFFSET0": Int(1), "OFFSET1": Int(3), "OFFSET": Int(FAR)}
    after, results = expected(name, waves, memory, **offsets)

    execute(f"{name} {', '.join(operands)}{tail}", waves)

    found = []
    for start in range(0, LDS_BYTES, 4 * LANES):
        at = (start + 4 * np.arange(LANES, dtype=np.uint32))[None]
        found += waves.lds.load(waves, at, 4)
    assert np.concatenate(found).tolist() == after.view(np.uint32).tolist()
    assert [int(registers(waves, RESULT, lane)) for lane in range(LANES)] == results


@pytest.mark.parametrize("name", GLOBAL)
def test_global_memory_is_accessed_as_the_pseudocode_says(name: str) -> None:
    random = np.random.default_rng(0)
    memory = random.integers(0, 256, LANES * BLOCK, np.uint8)
    waves, bits = waves_of(1, memory), bits_of(name)
    data = place("v", RESULT if "load" in name else DATA, bits)
    if name.startswith("buffer"):
        waves.scalars[np.uint64][2][...] = memory.ctypes.data
        waves.scalars[np.uint32][6][...] = memory.nbytes
        waves.vectors[np.uint32][ADDRESS][0] = starts(name)
        line = f"{name} {data}, v{ADDRESS}, s[4:7], 0 offen"
    else:
        addresses = starts(name).astype(np.uint64) + np.uint64(memory.ctypes.data)
        waves.vectors[np.uint32][ADDRESS][0] = addresses & np.uint64(0xFFFFFFFF)
        waves.vectors[np.uint32][ADDRESS + 1][0] = addresses >> np.uint64(32)
        address = place("v", ADDRESS, 64)
        operands = [data, address] if "load" in name else [address, data]
        line = f"{name} {', '.join(operands)}" + ", off" * name.startswith("global")
    after, results = expected(name, waves, memory)

    execute(line, waves)

    assert memory.tolist() == after.tolist()
    assert [int(registers(waves, RESULT, lane)) for lane in range(LANES)] == results


@pytest.mark.parametrize("name", SCALAR)
def test_scalars_are_loaded_as_the_pseudocode_says(name: str) -> None:
    memory = np.random.default_rng(0).integers(0, 256, 128, np.uint8)
    waves = waves_of(1, memory)
    waves.scalars[np.uint64][1][...] = memory.ctypes.data
    bits = 32 * int(name.rpartition("x")[2] or 1) if "x" in name else 32
    names = {
        "MEM": Cells(memory.tobytes()),
        "CalcScalarGlobalAddr": lambda *_: Int(8),
        "SDATA": Register(),
        **dict.fromkeys(("SBASE", "SOFFSET", "OFFSET"), Int(0)),
    }
    run(TEXTS[name], names)

    execute(f"{name} {place('s', 16, bits)}, s[2:3], 0x8", waves)

    found = waves.scalars[np.uint32][16 : 16 + bits // 32]
    assert sum(int(x[0]) << 32 * k for k, x in enumerate(found)) == int(names["SDATA"])
