# SPDX-License-Identifier: Apache-2.0
"""Machine code with one mistake planted: every way to break one instruction."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

from ci.amdgcn.assembly import Instruction, parse

SOURCES_MATTER = re.compile(
    r"[vs]_(?:sub|lshl|lshr|ashr|cndmask|cselect|mfma|cmp_[lg][te]|perm|bfi|fma|mad|cvt_pk|pack)"
)
SIBLINGS = (
    (r"_add_", "_sub_"), (r"_sub_", "_add_"), (r"_max_", "_min_"), (r"_min_", "_max_"),
    (r"_lt_", "_ge_"), (r"_ge_", "_lt_"), (r"_gt_", "_le_"), (r"_le_", "_gt_"),
    (r"_eq_", "_ne_"), (r"_(?:ne|neq|lg)_", "_eq_"), (r"_mul_f32", "_add_f32"),
    (r"_and_b", "_or_b"), (r"_or_b", "_and_b"), (r"_lshlrev_", "_lshrrev_"),
    (r"_lshrrev_", "_lshlrev_"), (r"v_exp_", "v_log_"),
    (r"_scc0", "_scc1"), (r"_scc1", "_scc0"), (r"_vccz", "_vccnz"), (r"_vccnz", "_vccz"),
    (r"_execz", "_execnz"), (r"_execnz", "_execz"),
)  # fmt: skip
_BETWEEN_OPERANDS = re.compile(r",\s*(?![^\[(]*[\])])")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change of one line.

    Attributes:
        kind: of mistake.
        line: number of the line, from 1.
        before: the instruction.
        after: what takes its place; empty where it is dropped.
    """

    kind: str
    line: int
    before: str
    after: str

    def apply(self, text: str) -> str:
        """Return an assembly text with the mistake in it."""
        lines = text.splitlines(keepends=True)
        lines[self.line - 1] = f"\t{self.after}\n"
        return "".join(lines)


def mutants_of(text: str, executed: Container[int]) -> Iterator[Mutant]:
    """Yield every mutant of a kernel, of the instructions whose positions are ``executed``.

    Waits for loads are left alone: they are not simulated, so none would be missed.
    """
    for position, instruction in enumerate(parse(text).instructions):
        if position not in executed:
            continue
        if instruction.name in ("s_endpgm", "s_nop", "s_code_end", "s_waitcnt"):
            continue
        for kind, after in _broken(instruction):
            if after != instruction.text:
                yield Mutant(kind, instruction.line, instruction.text, after)


def _broken(instruction: Instruction) -> Iterator[tuple[str, str]]:
    text, name = instruction.text, instruction.name
    if name == "s_barrier":
        yield "drop s_barrier", ""
        return
    if not name.startswith("s_cbranch") and name != "s_branch":
        yield "drop an instruction", ""
    opcode, _, rest = text.partition(" ") if " " in text else text.partition("\t")
    for pattern, sibling in SIBLINGS:
        if re.search(pattern, opcode):
            kind = "invert a branch" if "branch" in name else "another opcode"
            yield kind, f"{re.sub(pattern, sibling, opcode, count=1)} {rest}"
    if "branch" in name:
        return
    yield from _moved_offset(instruction)
    operands = _BETWEEN_OPERANDS.split(rest.strip())
    last, space, modifiers = operands[-1].partition(" ")
    operands[-1] = last
    tail = space + modifiers

    def with_source(place: int, value: str) -> str:
        changed = [*operands[:place], value, *operands[place + 1 :]]
        return f"{opcode} {', '.join(changed)}{tail}"

    if SOURCES_MATTER.match(name) and len(operands) > 2:
        # of a fused multiply-add the factor and the summand, of all else the first two
        a, b = (2, 3) if re.match(r"v_(?:fma|mad)", name) else (1, 2)
        if b < len(operands):
            swapped = [*operands]
            swapped[a], swapped[b] = operands[b], operands[a]
            yield "swap two sources", f"{opcode} {', '.join(swapped)}{tail}"
    for place, operand in enumerate(operands):
        # a store and a comparison of scalars have no result in front
        if place == 0 and not re.search(r"store|ds_write|s_cmp", name):
            continue
        if found := re.fullmatch(r"([vsa])(\d+)", operand):
            yield "another register", with_source(place, f"{found[1]}{int(found[2]) + 1}")
        elif re.fullmatch(r"-?(?:0x[0-9a-f]+|\d+)", operand):
            yield "another constant", with_source(place, str(int(operand, 0) + 1))
        elif re.fullmatch(r"-?\d+\.\d+", operand):
            yield "another constant", with_source(place, str(-float(operand)))
        # whether two numbers can be compared does not depend on their signs
        is_signed = re.match(r"v_(?!cmp_[ou]_)\w+_f32", name)
        is_vector = re.fullmatch(r"[va]\d+|[va]\[\d+:\d+\]", operand)
        if is_vector and instruction.encoding == "e64" and is_signed:
            yield "another sign", with_source(place, f"-{operand}")


def _moved_offset(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """Yield an access that is moved by 16 bytes, or by one place of those that it counts in."""
    text = instruction.text
    if not re.match(r"(?:buffer|global|flat|ds)_(?:load|store|read|write|atomic)", text):
        return
    for found in re.finditer(r"(offset[01]?):(\d+)", text):
        step = 16 if found[1] == "offset" else 1
        moved = f"{found[1]}:{int(found[2]) + step}"
        yield "another offset", text[: found.start()] + moved + text[found.end() :]
    if "offset" not in text and not text.startswith(("flat", "ds_bpermute", "ds_swizzle")):
        yield "another offset", f"{text} offset:16"
