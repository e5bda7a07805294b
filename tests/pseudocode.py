# SPDX-License-Identifier: Apache-2.0
"""AMD's pseudocode of instructions, which tinygrad ships, as Python.

The text is nearly Python: it is translated line by line, and run on registers whose parts have
types, as in ``tmp[31 : 0].f32``. Integers have no end and floats are float64 until they are
written, so that sums and products are rounded once.
"""

from __future__ import annotations

import math
import re
import struct
from fractions import Fraction
from functools import cache
from types import CodeType
from typing import Any

import numpy as np

TYPE = re.compile(r"(bf|[fiub])(\d+)")
SUBSTITUTIONS = [
    (r"\[([^\[\]?]*) : ([^\[\]?]*)\]", r"[\1:\2]"),
    (r"^\{ D1\.\w1, D0\.\w64 \} = (.*)$", r"D0.u64 = \1; D1.u1 = (\1) >> 64"),
    (r"^(\w+)\.u\d+(\[.*\]) = ", r"\1\2 = "),
    (r"^(\w+) = lambda(\(.*\)) \($", r"def \1\2:"),
    (r"\bpass\b", r"turn"),
    (r"^if( .*) then$", r"if\1:"),
    (r"^elsif( .*) then$", r"elif\1:"),
    (r"^else$", r"else:"),
    (r"\bin\b(?= :|\[)", r"parts"),
    (r"^for (\w+) in (.*) : (.*) do$", r"for \1 in range(\2, \3 + 1):"),
    (r"^declare (parts|tmp) : .*\[(\d+)\]$", r"\1 = [0] * \2"),
    (r"^declare .*$", r"pass"),
    (r"\{ ([^{}]*) \}", r"joined(\1)"),
    (r"(\d+)'([UIFB])\(", r"cast(\1, '\2', "),
    (r"\b(\d+)'(0x[0-9a-f]+|\d+)U?\b", r"Int(\2, \1)"),
    (r"\b(0x[0-9a-f]+|\d+)(?:ULL|LL|U)\b", r"\1"),
    (r"\b([\d.]+)F\b", r"float64(\1)"),
    (r"\[([^\[\]?]*) \? (\d+) : (\d+)\]", r"[\2 if \1 else \3]"),
    (r"\| \((.*) \? (.*) : (.*)\)\)$", r"| ((\2) if (\1) else (\3)))"),
    (r"^(.*? \+?= )(.*) \? (.*) : (.*)$", r"\1(\3) if (\2) else (\4)"),
    (r"([\w.\[\]:]+) <> ([\w.\[\]:]+)", r"differ(\1, \2)"),
    (r"(\S+) \* float64\(2\.0\) \*\* (\S+)", r"ldexp(\1, \2)"),
    (r" / (\d+)(?![\d.])", r" // \1"),
    (r"&&", r"and"),
    (r"\|\|", r"or"),
    (r"!(?!=)", r"not "),
    (r"^(\w+) = (?!\[)(.*?)$", r"\1 = held(\2)"),
]


class Int(int):
    """A number whose bits have parts and types."""

    width: int

    def __new__(cls, value: Any, width: int = 128) -> Int:
        self = super().__new__(cls, int(value))
        self.width = width
        return self

    def __getattr__(self, name: str) -> Any:
        return _read(self, name)

    def __getitem__(self, key: Any) -> Int:
        return _part(self, key)


class Register:
    """Bits that are written, whole or in parts."""

    def __init__(self, value: Any = 0) -> None:
        self.__dict__["value"] = int(value)

    def __int__(self) -> int:
        value: int = self.__dict__["value"]
        return value

    def __getattr__(self, name: str) -> Any:
        return _read(int(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        bits, width = _written(value, name)
        self[width - 1 : 0] = bits

    def __getitem__(self, key: Any) -> Any:
        return Part(self, key) if isinstance(key, slice) else _part(int(self), key)

    def __setitem__(self, key: Any, value: Any) -> None:
        high, low = (key.start, key.stop) if isinstance(key, slice) else (key, key)
        mask = ((1 << high - low + 1) - 1) << low
        self.__dict__["value"] = (int(self) & ~mask) | (int(value) << low & mask)


class Part:
    """Some bits of a register."""

    def __init__(self, whole: Register, key: slice) -> None:
        self.__dict__.update(whole=whole, key=key)

    def __int__(self) -> int:
        return int(_part(int(self.whole), self.key))

    def __getattr__(self, name: str) -> Any:
        return _read(int(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.whole[self.key] = _written(value, name)[0]


class Cell:
    """Bytes of a memory, from one on."""

    def __init__(self, memory: bytearray, start: int) -> None:
        self.__dict__.update(memory=memory, start=start)

    def __getattr__(self, name: str) -> Any:
        start: int = self.__dict__["start"]
        return _read(int.from_bytes(self.memory[start : start + 8], "little"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        bits, width = _written(value, name)
        size = width // 8
        kept = (bits & (1 << width) - 1).to_bytes(size, "little")
        self.memory[self.start : self.start + size] = kept


class Cells(bytearray):
    """A memory."""

    def __getitem__(self, start: Any) -> Any:
        return (
            Cell(self, int(start)) if not isinstance(start, slice) else super().__getitem__(start)
        )


def _part(value: int, key: Any) -> Int:
    """Return one bit or several; they are reversed where the lower end comes first."""
    if not isinstance(key, slice):
        return Int(int(value) >> key & 1, 1)
    high, low = key.start, key.stop
    if high < low:
        kept = _part(value, slice(low, high))
        return Int(int(f"{int(kept):0{kept.width}b}"[::-1], 2), kept.width)
    return Int(int(value) >> low & (1 << high - low + 1) - 1, high - low + 1)


def _kind(name: str) -> tuple[str, int]:
    found = TYPE.fullmatch(name)
    if found is None:
        raise AttributeError(name)
    return found[1], int(found[2])


def _read(bits: int, name: str) -> Any:
    """Return the low bits as the number that a type says."""
    kind, width = _kind(name)
    bits = int(bits) & (1 << width) - 1
    if kind == "f":
        code, size = {16: ("e", 2), 32: ("f", 4), 64: ("d", 8)}[width]
        return np.float64(struct.unpack(f"<{code}", bits.to_bytes(size, "little"))[0])
    return Int(bits - (1 << width) if kind == "i" and bits >> width - 1 else bits, width)


def _written(value: Any, name: str) -> tuple[int, int]:
    """Return a number as bits, and how many."""
    kind, width = _kind(name)
    if kind not in ("f", "bf"):
        return int(value), width
    rounded = np.float64(value).astype({"f16": np.float16}.get(name, np.float32))
    bits = int.from_bytes(rounded.tobytes(), "little")
    if kind == "bf":
        bits = 0x7FFF if math.isnan(value) else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return bits, width


def _held(value: Any) -> Any:
    return value if isinstance(value, float) else Int(value)


def _cast(width: int, kind: str, value: Any) -> Any:
    if kind == "F":
        return _read(value, f"f{width}") if isinstance(value, Int) else value
    return _read(int(value), f"{kind.lower()}{width}")


def _joined(*parts: Int) -> Int:
    bits = width = 0
    for part in parts:
        bits, width = bits << part.width | int(part), width + part.width
    return Int(bits, width)


def _signed(value: int, width: int) -> int:
    return int(value) - (1 << width) if width and value >> width - 1 & 1 else int(value)


def _clamped(kind: str) -> Any:
    low, high = {"u": (0, 1), "i": (-0.5, 0.5)}[kind[0]]
    size = 1 << int(kind[1:])

    def convert(value: Any) -> int:
        low_end, high_end = int(low * size), int(high * size) - 1
        return 0 if math.isnan(value) else int(min(max(value, low_end), high_end))

    return convert


def _fma(a: Any, b: Any, c: Any) -> Any:
    if not all(map(math.isfinite, (a, b, c))) or not (a * b + c):
        return a * b + c
    return np.float64(float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))))


def _exponent(value: Any) -> int:
    """Return the exponent as a float32 stores it."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0] >> 23 & 255)


FUNCTIONS = {
    "Int": Int,
    "held": _held,
    "cast": _cast,
    "joined": _joined,
    "differ": lambda a, b: a < b or a > b,  # NaN does not
    "fma": _fma,
    "float64": np.float64,
    "ldexp": np.ldexp,
    "sqrt": np.sqrt,
    "trunc": np.trunc,
    "floor": np.floor,
    "fract": lambda x: x - np.floor(x),
    "isEven": lambda x: x % 2 == 0,
    "log2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "pow": np.power,
    "PI": math.pi,
    "INF": math.inf,
    "isNAN": math.isnan,
    "isSignalNAN": lambda x: False,  # Python has quiet ones alone
    "isQuietNAN": math.isnan,
    "sign": lambda x: math.copysign(1, x) < 0,
    "exponent": _exponent,
    "mantissa": lambda x: np.frexp(x)[0],
    "signext": lambda x: x,
    "signext_from_bit": _signed,
    "s_ff1_i32_b64": lambda x: (int(x) & -int(x)).bit_length() - 1,
    "ROUND_MODE": 0,
    "ROUND_NEAREST_EVEN": 0,
    **{
        f"{a}_to_{b}": float
        for a, b in (
            ("u32", "f32"), ("i32", "f32"), ("u16", "f16"), ("i16", "f16"),
            ("f16", "f32"), ("f32", "f16"), ("f32", "bf16"),
        )
    },
    **{f"{a}_to_{b}": _clamped(b) for a, b in (("f32", "u32"), ("f32", "i32"))},
    **{f"{a}_to_{b}": _clamped(b) for a, b in (("f16", "u16"), ("f16", "i16"))},
    **dict.fromkeys(("v_max_u32", "v_max_i32", "v_max_u16", "v_max_i16"), max),
    **dict.fromkeys(("v_min_u32", "v_min_i32", "v_min_u16", "v_min_i16"), min),
    "v_max3_i32": max,
    "v_min3_f32": lambda *x: np.fmin.reduce(x),
    "v_max3_f32": lambda *x: np.fmax.reduce(x),
    "v_max_f32": np.fmax,
    "v_min_f32": np.fmin,
    "v_max_f16": np.fmax,
    "v_min_f16": np.fmin,
    "v_maximum_f32": np.maximum,
    "v_minimum_f32": np.minimum,
}  # fmt: skip


@cache
def pseudocodes() -> dict[str, str]:
    """Return AMD's pseudocode by opcode, without what says how an opcode is encoded."""
    from tinygrad.runtime.autogen.amd.cdna.str_pcode import PCODE

    return {
        re.sub(r"_e(32|64)$", "", opcode.name.lower()): re.sub(r"//.*", "", text)
        for opcode, text in PCODE.items()
    }


@cache
def _compiled(text: str) -> CodeType:
    """Translate, and compile."""
    lines, depth = [], 0
    for raw in text.splitlines():
        line = raw.strip().rstrip(";")
        if line.startswith("end"):
            depth -= 2 if line.endswith(")") else 1
            continue
        if line:
            for pattern, replacement in SUBSTITUTIONS:
                line = re.sub(pattern, replacement, line)
            opens = line.endswith(":")
            depth -= opens and line.startswith(("elif", "else"))
            lines.append("    " * depth + line)
            depth += opens
    return compile("\n".join(lines), "<pseudocode>", "exec")


def run(text: str, names: dict[str, Any]) -> None:
    """Run a pseudocode on registers and numbers, which it changes.

    Args:
        text: the pseudocode.
        names: by the names that it has for them.
    """
    names.update(tmp=Register(), tmp0=Register(), tmp1=Register())
    with np.errstate(all="ignore"):
        exec(_compiled(text), FUNCTIONS, names)
