# SPDX-License-Identifier: Apache-2.0
"""Vector opcodes of the simulator against AMD's pseudocode, which tinygrad ships.

Only opcodes whose pseudocode is one assignment are compared: it is turned into Python by a few
substitutions, and evaluated lane by lane in integers without end, or in float64.
"""

from __future__ import annotations

import math
import re
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
PCODE = pytest.importorskip("tinygrad.runtime.autogen.amd.cdna.str_pcode").PCODE

from ci.amdgcn import program  # noqa: E402
from ci.amdgcn.lds import Lds  # noqa: E402
from ci.amdgcn.memory import GlobalMemory  # noqa: E402
from ci.amdgcn.vector import OPERATIONS  # noqa: E402
from ci.amdgcn.waves import LANE, LANES, SCALARS, Array, Waves  # noqa: E402

WAVES = 16
INTEGERS = [0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xFFFF, 0x8000]
FLOATS = [0.0, -0.0, 1.0, -1.5, 3e38, -1e-40, 1e-30, math.inf, -math.inf, math.nan, 0.1, 1e9]
# bits that are moved, and the sign of the lesser of two zeros, which is not modelled
EXCLUDED = {"v_bfrev_b32", "v_cvt_f32_bf16", "v_max3_f32", "v_min3_f32"}
SUBSTITUTIONS = [
    (r"\{ ([^{},]*), ([^{},]*) \}", r"((\1) << 32 | (\2))"),
    (r"S(\d)(?:\.u32)?\[(\d+) : 0\](?:\.u\d+)?", r"(S[\1] & (1 << \2 + 1) - 1)"),
    (r"S(\d)\.([a-z])(\d+)", r"read(S[\1], '\2', \3)"),
    (r"(\d+)'([UIF])\(", r"cast(\1, '\2', "),
    (r"\b(\d+)'(\d+)U", r"\2"),
    (r"\b([\d.]+)F\b", r"float64(\1)"),
    (r"\b(0x[0-9a-f]+|\d+)(?:U|LL|ULL)\b", r"\1"),
    (r"^(.*) \? (.*) : (.*)$", r"((\2) if (\1) else (\3))"),
]


def single_assignments() -> dict[str, str]:
    """Return the pseudocode of the opcodes to compare, by name."""
    found = {}
    for opcode, text in PCODE.items():
        name = opcode.name.lower().removesuffix("_e32").removesuffix("_e64")
        lines = [line for line in text.splitlines() if not line.startswith("//")]
        # v_fmaak and v_fmac have a literal or their destination as a source
        has_sources_only = "SIMM" not in text and "D0.f32)" not in text
        if name in OPERATIONS.keys() - EXCLUDED and len(lines) == 1 and has_sources_only:
            found[name] = lines[0].rstrip(";")
    return found


PSEUDOCODE = single_assignments()


def read(bits: int, kind: str, width: int) -> Any:
    """Return the low bits of a source as a number."""
    bits &= (1 << width) - 1
    if kind == "f":
        code, size = {16: ("e", 2), 32: ("f", 4)}[width]
        return np.float64(struct.unpack(f"<{code}", bits.to_bytes(size, "little"))[0])
    return bits - (1 << width) if kind == "i" and bits >> (width - 1) else bits


def written(value: Any, kind: str, width: int) -> int:
    """Return a number as the bits of a destination."""
    if kind != "f":
        return int(value) & (1 << width) - 1
    rounded = np.float64(value).astype({16: np.float16, 32: np.float32}[width])
    return int.from_bytes(rounded.tobytes(), "little")


def cast(width: int, kind: str, value: Any) -> Any:
    return value if kind == "F" else read(int(value), kind.lower(), width)


def clamped(value: Any, low: int, high: int) -> int:
    return 0 if math.isnan(value) else int(min(max(value, low), high))


def fma(a: Any, b: Any, c: Any) -> Any:
    if not all(map(math.isfinite, (a, b, c))) or not (a * b + c):
        return a * b + c
    return np.float64(float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))))


FUNCTIONS = {
    "read": read,
    "cast": cast,
    "fma": fma,
    "float64": np.float64,
    "sqrt": np.sqrt,
    "trunc": np.trunc,
    "floor": np.floor,
    "log2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "PI": math.pi,
    "pow": np.power,
    **dict.fromkeys(("u32_to_f32", "i32_to_f32", "u16_to_f16", "i16_to_f16"), np.float64),
    **dict.fromkeys(("f16_to_f32", "f32_to_f16"), np.float64),
    "f32_to_u32": lambda x: clamped(x, 0, 2**32 - 1),
    "f32_to_i32": lambda x: clamped(x, -(2**31), 2**31 - 1),
    "f16_to_u16": lambda x: clamped(x, 0, 2**16 - 1),
    "f16_to_i16": lambda x: clamped(x, -(2**15), 2**15 - 1),
    **dict.fromkeys(("v_max_u32", "v_max_i32"), max),
    **dict.fromkeys(("v_min_u32", "v_min_i32"), min),
    "v_maximum_f32": np.maximum,
    "v_minimum_f32": np.minimum,
}


def expected(pseudocode: str, sources: list[Array]) -> tuple[list[int], str, int]:
    """Return the result in every lane, and the type of it."""
    target, expression = pseudocode.split(" = ", 1)
    kind, width = re.fullmatch(r"D0\.([a-z])(\d+)", target).groups()
    for pattern, replacement in SUBSTITUTIONS:
        expression = re.sub(pattern, replacement, expression)
    code = compile(expression, "<pseudocode>", "eval")
    lanes = zip(*(source.reshape(-1).tolist() for source in sources), strict=True)
    with np.errstate(all="ignore"):
        values = [written(eval(code, FUNCTIONS, {"S": S}), kind, int(width)) for S in lanes]
    return values, kind, int(width)


def simulated(name: str, sources: list[Array]) -> Array:
    """Return v[0:1] after the instruction, as uint64 [waves, lanes]."""
    operation = OPERATIONS[name]
    widths = [np.dtype(dtype).itemsize for dtype in (operation.result, *operation.sources)]
    registers = [f"v[{2 * i}:{2 * i + 1}]" if w == 8 else f"v{2 * i}" for i, w in enumerate(widths)]
    text = f"\t.type k,@function\nk:\n\t{name} {', '.join(registers)}\n\ts_endpgm\n"
    vectors = np.zeros((8, WAVES, LANES), np.uint32)
    for i, source in enumerate(sources, 1):
        vectors[2 * i], vectors[2 * i + 1] = source & 0xFFFFFFFF, source >> np.uint64(32)
    ids = np.arange(WAVES)
    scalars = np.full((WAVES, SCALARS), 0xFFFFFFFF, np.uint32)
    lds = Lds(1, 0, 4, detects_races=False)
    waves = Waves(ids, ids, ids, vectors, scalars, ids == 0, GlobalMemory([]), lds)
    with np.errstate(all="ignore"):
        for execute in program.load(text).blocks[0].execute:
            execute(waves)
    return waves.vector_pair(0)


def inputs(name: str) -> list[Array]:
    """Return the bits of the sources: numbers with something special about them, and others."""
    random = np.random.default_rng(0)
    found = []
    for dtype in OPERATIONS[name].sources:
        size = np.dtype(dtype).itemsize
        if np.dtype(dtype).kind == "f":
            with np.errstate(over="ignore"):
                special = np.array(FLOATS, dtype)
            value = random.choice(special, (WAVES, LANES))
            others = (random.standard_normal((WAVES, LANES)) * 100).astype(dtype)
            value = np.where(LANE % 4 == 0, value, others)
            found.append(value.view(f"u{size}").astype(np.uint64))
        else:
            value = random.integers(0, 1 << 8 * size, (WAVES, LANES), np.uint64, endpoint=False)
            special = random.choice(np.array(INTEGERS, np.uint64), (WAVES, LANES))
            mask = np.uint64((1 << 8 * size) - 1)
            found.append(np.where(LANE % 2 == 0, value, special) & mask)
    return found


@pytest.mark.parametrize("name", PSEUDOCODE)
def test_an_opcode_computes_what_its_pseudocode_says(name: str) -> None:
    sources = inputs(name)
    values, kind, width = expected(PSEUDOCODE[name], sources)
    got = simulated(name, sources).reshape(-1) & np.uint64((1 << width) - 1)
    wrong = [
        (*(hex(source.reshape(-1)[i]) for source in sources), hex(value), hex(want))
        for i, (value, want) in enumerate(zip(got.tolist(), values, strict=True))
        if value != want and not (kind == "f" and math.isnan(read(want, kind, width)))
    ]
    assert not wrong
