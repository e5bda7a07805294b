# SPDX-License-Identifier: Apache-2.0
"""Reads the assembly of one kernel, as LLVM prints it: instructions, labels and the header."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ci.amdgcn.errors import UnknownInstructionError

Kind = Literal["vector", "scalar", "integer", "float", "label", "off"]
Modifier: TypeAlias = "int | str | tuple[int, ...]"

VCC, M0, EXEC = 106, 124, 126
NAMED_SCALARS = {
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "m0": (M0, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
}
# accumulation registers a0, a1, ... are the upper half of the vector registers
FIRST_ACCUMULATOR = 256
ENCODINGS = ("e32", "e64", "dpp", "sdwa")
FLAGS = {
    "offen", "idxen", "clamp", "row_mirror", "row_half_mirror",
    "sc0", "sc1", "nt", "lds", "gds", "glc", "slc",
}  # fmt: skip
# their operands are neither registers nor numbers, and nothing here depends on them
WITHOUT_OPERANDS = {
    "s_waitcnt", "s_nop", "s_setprio", "s_sleep", "s_sched_barrier",
    "s_setreg_imm32_b32", "s_setreg_b32",
}  # fmt: skip

_MODIFIER = re.compile(r"(?<![\w\[])([a-z]\w*):(\[[^\]]*\]|swizzle\([^)]*\)|-?\w+)")
_OPERAND = re.compile(r"(?:\[[^\]]*\]|\([^)]*\)|[^,\[(])+")
_REGISTERS = re.compile(r"([vas])(?:(\d+)|\[(\d+):(\d+)\])")
_INTEGER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)")
_FLOAT = re.compile(r"-?\d*\.\d+(e[-+]?\d+)?")
_COMMENT = re.compile(r"\s*(;|//).*")
_LABEL = re.compile(r"([.\w$]+):")


@dataclass(frozen=True, slots=True)
class Operand:
    """A register or several, a number, or a label."""

    kind: Kind
    register: int = 0
    count: int = 1
    negated: bool = False
    absolute: bool = False
    sign_extended: bool = False
    value: int | float = 0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line; ``name`` is the opcode without what says how it is encoded."""

    name: str
    encoding: str
    operands: tuple[Operand, ...]
    modifiers: dict[str, Modifier]
    flags: frozenset[str]
    text: str
    line: int

    def integer(self, modifier: str, default: int = 0) -> int:
        """Return a modifier that is a number."""
        value = self.modifiers.get(modifier, default)
        if not isinstance(value, int):
            raise self.unknown(f"{modifier}:{value}")
        return value

    def integers(self, modifier: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return a modifier that is a list of numbers."""
        value = self.modifiers.get(modifier, default)
        if not isinstance(value, tuple):
            raise self.unknown(f"{modifier}:{value}")
        return value

    def unknown(self, what: str = "") -> UnknownInstructionError:
        """Return the error that says that the simulator does not know this."""
        about = f"{what!r} of " if what else ""
        return UnknownInstructionError(f"the simulator does not implement {about}{self.name!r}")


@dataclass(frozen=True, slots=True)
class Assembly:
    """A kernel's code and the header that says how it is launched."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # index of the instruction after each label
    header: dict[str, int] = field(repr=False)  # directives of .amdhsa_kernel, and metadata


def parse(text: str) -> Assembly:
    """Read the first kernel of ``text``."""
    found = re.search(r"\.type\s+(\w+),@function", text)
    if found is None:
        raise UnknownInstructionError("the assembly has no function")
    name = found[1]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    inside = False
    for number, raw in enumerate(text.splitlines(), 1):
        line = _COMMENT.sub("", raw).strip()
        if line == f"{name}:":
            inside = True
        elif not inside or not line:
            continue
        elif line.startswith(".Lfunc_end"):
            break
        elif label := _LABEL.fullmatch(line):
            labels[label[1]] = len(instructions)
        elif not line.startswith("."):
            instructions.append(_instruction(line, number, name))
    header = {key: int(value) for key, value in re.findall(r"\.amdhsa_(\w+)\s+(\d+)\s", text)}
    header |= {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)}
    return Assembly(name, tuple(instructions), labels, header)


def _instruction(line: str, number: int, kernel: str) -> Instruction:
    opcode, *more = line.split(maxsplit=1)
    rest = " ".join(more)
    name, _, encoding = opcode.rpartition("_")
    if encoding not in ENCODINGS:
        name, encoding = opcode, ""
    if name in WITHOUT_OPERANDS:
        return Instruction(name, encoding, (), {}, frozenset(), line, number)
    modifiers = {key: _modifier(value) for key, value in _MODIFIER.findall(rest)}
    operands = [part.split() for part in _OPERAND.findall(_MODIFIER.sub(" ", rest))]
    words = operands.pop() if operands else []
    flags: set[str] = set()
    while words and words[-1] in FLAGS:
        flags.add(words.pop())
    if words:
        operands.append(words)
    try:
        parsed = tuple(_operand(" ".join(words)) for words in operands)
    except UnknownInstructionError as error:
        error.locate(kernel, number, line)
        raise
    return Instruction(name, encoding, parsed, modifiers, frozenset(flags), line, number)


def _modifier(text: str) -> Modifier:
    if text.startswith("["):
        return tuple(int(part) for part in text[1:-1].split(","))
    return int(text, 0) if _INTEGER.fullmatch(text) else text


@functools.cache
def _operand(text: str) -> Operand:
    negated = absolute = sign_extended = False
    while True:
        if text.startswith("-") and not re.match(r"-[\d.]", text):
            negated, text = True, text[1:]
        elif text.startswith("|"):
            absolute, text = True, text.strip("|")
        elif found := re.fullmatch(r"(neg|abs|sext)\((.*)\)", text):
            negated |= found[1] == "neg"
            absolute |= found[1] == "abs"
            sign_extended |= found[1] == "sext"
            text = found[2]
        else:
            break
    signs = (negated, absolute, sign_extended)
    if found := _REGISTERS.fullmatch(text):
        first = int(found[2] or found[3])
        count = int(found[4]) - first + 1 if found[4] else 1
        if found[1] == "s":
            return Operand("scalar", first, count, *signs)
        return Operand("vector", first + FIRST_ACCUMULATOR * (found[1] == "a"), count, *signs)
    if text in NAMED_SCALARS:
        return Operand("scalar", *NAMED_SCALARS[text], *signs)
    if _INTEGER.fullmatch(text):
        return Operand("integer", 0, 1, *signs, value=int(text, 0))
    if _FLOAT.fullmatch(text):
        return Operand("float", 0, 1, *signs, value=float(text))
    if text == "off":
        return Operand("off")
    if re.fullmatch(r"[.\w$]+", text):
        return Operand("label", label=text)
    raise UnknownInstructionError(f"the simulator does not know the operand {text!r}")
