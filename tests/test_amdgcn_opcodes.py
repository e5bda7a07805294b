# SPDX-License-Identifier: Apache-2.0
"""Opcodes of the simulator against AMD's pseudocode, which tinygrad ships: all that compute."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("tinygrad.runtime.autogen.amd.cdna.str_pcode")

from ci.amdgcn import packed, scalar, vector
from ci.amdgcn.arithmetic import COMPARISONS
from ci.amdgcn.assembly import EXEC, VCC
from ci.amdgcn.lanes import LANE_INSTRUCTIONS
from ci.amdgcn.waves import LANES, Array, Waves
from tests.machine import execute, place, waves_of
from tests.pseudocode import Int, Register, pseudocodes, run

INTEGERS = [0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xFFFF, 0x8000]
FLOATS = [0.0, -0.0, 1.0, -1.5, 3e38, -1e-40, 1e-30, math.inf, -math.inf, 0.1, 1e9, math.nan]
CONSTANTS = (0, 1, 100, 0x7FFF, 0x8000, 0xFFFF)  # of 16 bits, in scalar instructions
LITERAL = 0x40490FDB  # 3.14
TRUTH_TABLE = 0xB2
HALF, HIGH = (1, 0, 1), (0, 1, 1)  # op_sel_hi and op_sel of v_fma_mix
ALSO_CALLED = {f"v_fma_{mix}": f"v_mad_{mix}" for mix in ("mix_f32", "mixlo_f16", "mixhi_f16")}
NOT_COMPARED = {
    "v_accvgpr_mov_b32": "there is no pseudocode",
    "v_accvgpr_read_b32": "there is no pseudocode",
    "v_accvgpr_write_b32": "there is no pseudocode",
    "v_nop": "there is no pseudocode",
    "ds_swizzle_b32": "there is no pseudocode",
    "v_div_scale_f32": "nothing is scaled",
    "v_div_fixup_f32": "division is exact where it would have been scaled",
    "v_frexp_exp_i32_f32": "the exponents of 0 and of denormal numbers are not in the pseudocode",
}


def implemented() -> set[str]:
    """Return the opcodes whose results depend on registers alone, matrix instructions apart."""
    names = {*vector.OPERATIONS, *vector.MASKED, *packed.PAIRS, *packed.HALVES, *packed.MIXED}
    names |= LANE_INSTRUCTIONS.keys() | {"s_bitcmp0_b32", "s_bitcmp1_b32", "v_cmp_class_f32"}
    for by_signature in (scalar.QUIET, scalar.TESTED, scalar.FLAGGED):
        names |= {name for functions in by_signature.values() for name in functions}
    names |= {f"s_{logic}_saveexec_b64" for logic in scalar.LOGIC}
    for how in COMPARISONS:
        names |= {f"v_cmp_{how}_{kind}" for kind in vector.TYPES}
        names |= {f"s_cmp{k}_{how}_{kind}" for kind in scalar.COMPARED for k in ("", "k")}
    return names


TEXTS = pseudocodes()
TEXTS |= {name: TEXTS[other] for name, other in ALSO_CALLED.items()}
COMPARED = sorted(implemented() & TEXTS.keys() - NOT_COMPARED.keys())
ACROSS_LANES = [name for name in COMPARED if name in LANE_INSTRUCTIONS]
SCALAR = [name for name in COMPARED if name.startswith("s_")]
VECTOR = [name for name in COMPARED if name.startswith("v_") and name not in LANE_INSTRUCTIONS]


@dataclass(frozen=True, slots=True)
class Operand:
    """Bits that an opcode takes: a whole number, or floats of ``float_bits`` side by side."""

    bits: int
    float_bits: int = 0

    def draw(self, random: np.random.Generator, shape: tuple[int, ...], *, nan: bool) -> Array:
        """Return numbers as uint64, about half of them special ones."""
        if not self.float_bits:
            ordinary = random.integers(0, 1 << 64, shape, np.uint64)
            special = random.choice(np.array(INTEGERS, np.uint64), shape)
            drawn = np.where(random.random(shape) < 0.5, special, ordinary)
            return drawn & np.uint64((1 << self.bits) - 1)
        shape = (*shape, self.bits // self.float_bits)
        special = random.choice(FLOATS if nan else FLOATS[:-1], shape)
        ordinary = random.standard_normal(shape) * 100
        drawn = np.where(random.random(shape) < 0.5, special, ordinary)
        with np.errstate(over="ignore"):
            floats = drawn.astype(f"f{self.float_bits // 8}")
        return floats.view(f"u{self.bits // 8}")[..., 0].astype(np.uint64)


def operands_of(name: str) -> list[Operand]:
    """Return what an opcode takes, as its pseudocode says."""
    if name in ALSO_CALLED:
        return [Operand(32, 16 if half else 32) for half in HALF]
    found = []
    for i in range(3):
        typed = re.findall(rf"\bS{i}(?:\[[^\]]*\])?\.([a-z]+)(\d+)", TEXTS[name])
        bits = [int(width) for _, width in typed]
        bits += [int(high) + 1 for high in re.findall(rf"\bS{i}(?:\.u\d+)?\[(\d+) :", TEXTS[name])]
        floats = [int(width) for kind, width in typed if kind == "f"]
        if bits:
            found.append(Operand(max(bits), max(floats, default=0)))
    return found


def result_bits(name: str) -> int:
    """Return how many bits the destination has, 0 where a mask or a condition is all."""
    start, text = r"(?:^|, )D0?", TEXTS[name]
    bits = re.findall(rf"{start}\.[a-z]+(\d+)(?: \}}| [+-]?= |\[S)", text, re.MULTILINE)
    ends = re.findall(rf"{start}(?:\.u\d+)?\[(\d+) :", text, re.MULTILINE)
    return max([*map(int, bits), *(int(end) + 1 for end in ends), 32 * ("D0 = " in text)])


def pairs(waves: Waves, register: int) -> list[int]:
    """Return two scalar registers of every wave as one number."""
    numbers: list[int] = waves.scalars[np.uint64][register // 2].tolist()
    return numbers


@pytest.mark.parametrize("name", SCALAR)
def test_a_scalar_opcode_computes_what_its_pseudocode_says(name: str) -> None:
    takes, bits = operands_of(name), result_bits(name)
    mask = (1 << bits) - 1
    has_constant = re.match(r"s_(mov|add|mul|cmov|cmp)k_", name)
    for constant in CONSTANTS if has_constant else (0,):
        waves, random = waves_of(64), np.random.default_rng(0)
        drawn = [operand.draw(random, (64,), nan=False) for operand in takes]
        written = [place("s", 12 + 2 * i, operand.bits) for i, operand in enumerate(takes)]
        for i, numbers in enumerate(drawn):
            waves.scalars[np.uint64][6 + i][...] = numbers
        if has_constant:
            drawn[-1][...] = constant
            written[-1] = hex(constant)
        before = [pairs(waves, 10), waves.scc.tolist(), pairs(waves, EXEC)]

        execute(f"{name} {', '.join([place('s', 10, bits)] * bool(bits) + written)}", waves)

        after = [pairs(waves, 10), waves.scc.tolist(), pairs(waves, EXEC)]
        for wave in range(64):
            target, scc, enabled = (values[wave] for values in before)
            names = {"D0": Register(target & mask), "SCC": Int(scc), "EXEC": Register(enabled)}
            names |= {f"S{i}": Register(x[wave]) for i, x in enumerate(drawn)}
            run(TEXTS[name], names)
            result = int(names["D0"]) & mask | target & ~mask
            assert [x[wave] for x in after] == [result, int(names["SCC"]), int(names["EXEC"])]


def line_of(name: str, takes: list[Operand], bits: int) -> str:
    """Return an instruction that takes v2, v4 and v6, and writes v0, VCC or both."""
    text = TEXTS[name]
    written = [place("v", 2 + 2 * i, operand.bits) for i, operand in enumerate(takes)]
    if name in ("v_fmamk_f32", "v_fmaak_f32"):
        written.insert(1 if name == "v_fmamk_f32" else 2, hex(LITERAL))
    targets = [place("v", 0, bits)] if bits else []
    if "VCC.u64[laneId] =" in text or "D1" in text or not bits:
        targets.append("vcc")
    if name == "v_cndmask_b32" or re.match(r"v_(addc|subb|subbrev)_co", name):
        written.append("vcc")
    line = f"{name} {', '.join(targets + written)}"
    if name in ALSO_CALLED:
        line += f" op_sel:[{','.join(map(str, HIGH))}] op_sel_hi:[{','.join(map(str, HALF))}]"
    if name == "v_pk_mov_b32":
        line += f" op_sel:[{HIGH[0]},{HIGH[1]}]"
    if name.startswith("v_bitop3"):
        line += f" bitop3:{TRUTH_TABLE:#x}"
    return line


def names_for(drawn: list[int], target: int, mask: int, lane: int) -> dict[str, Any]:
    """Return what the pseudocode of a vector opcode may name, in one lane."""
    sources = [Register(number) for number in drawn]
    result = Register(target)
    low, middle, high = (Int(TRUTH_TABLE >> shift & 7) for shift in (0, 3, 6))
    return {
        **{f"S{i}": source for i, source in enumerate(sources)},
        "S": sources,
        "SIMM32": Int(LITERAL),
        "D": result,
        "D0": result,
        "D1": Register(mask >> lane & 1),
        "VCC": Register(mask),
        "laneId": Int(lane),
        "WAVE_MODE": SimpleNamespace(IEEE=True),
        "INST": SimpleNamespace(NEG=low, ABS=middle, OMOD=high),
        "OPSEL": Int(sum(bit << i for i, bit in enumerate(HIGH))),
        "OPSEL_HI": Int(sum(bit << i for i, bit in enumerate(HALF))),
    }


def is_same(name: str, got: int, expected: int, bits: int) -> bool:
    """Return whether two results are equal, or both are NaN, or zeros of whose sign is not said."""
    if got == expected:
        return True
    found = re.search(r"\bD0(?:\[[^\]]*\])?\.f(\d+)|(pk_.*_f16)", TEXTS[name] + name)
    width = 0 if found is None else int(found[1] or 16)
    if not width:
        return False
    for shift in range(0, bits, width):
        parts = [Int(x >> shift & (1 << width) - 1) for x in (got, expected)]
        first, second = (getattr(part, f"f{width}") for part in parts)
        either_zero = first == second == 0 and re.match(r"v_(pk_)?(max|min|med|rndne)", name)
        if parts[0] != parts[1] and not either_zero and not (first != first and second != second):
            return False
    return True


@pytest.mark.parametrize("name", VECTOR)
def test_a_vector_opcode_computes_what_its_pseudocode_says(name: str) -> None:
    takes, bits = operands_of(name), result_bits(name)
    waves, random = waves_of(4), np.random.default_rng(0)
    # two NaNs side by side could not be told from numbers
    has_nan = "_pk_" not in name
    drawn = [operand.draw(random, (4, LANES), nan=has_nan) for operand in takes]
    for i, numbers in enumerate(drawn):
        waves.vectors[np.uint32][2 + 2 * i][...] = numbers & np.uint64(0xFFFFFFFF)
        waves.vectors[np.uint32][3 + 2 * i][...] = numbers >> np.uint64(32)
    if name == "v_div_fmas_f32":
        waves.write_mask(VCC, np.zeros((4, LANES), np.bool_))  # as v_div_scale leaves it
    targets, masks = waves.vector_pair(0).copy(), pairs(waves, VCC)

    execute(line_of(name, takes, bits), waves)

    results, flags, wrong = waves.vector_pair(0), waves.mask(VCC), []
    for wave, lane in np.ndindex(4, LANES):
        numbers = [int(x[wave, lane]) for x in drawn]
        names = names_for(numbers, int(targets[wave, lane]), masks[wave], lane)
        run(TEXTS[name], names)
        mask = (1 << bits) - 1
        got, expected = int(results[wave, lane]) & mask, int(names["D0"]) & mask
        flag = names["D0" if not bits else "D1" if "D1" in TEXTS[name] else "VCC"]
        expected_flag = flag[0 if "D1" in TEXTS[name] else lane]
        if not is_same(name, got, expected, bits) or flags[wave, lane] != expected_flag:
            wrong.append((*map(hex, numbers), hex(got), hex(expected), flags[wave, lane]))
    assert wrong == []


@pytest.mark.parametrize("name", ACROSS_LANES)
def test_an_opcode_across_lanes_does_what_its_pseudocode_says(name: str) -> None:
    waves, random = waves_of(16), np.random.default_rng(0)
    waves.scalars[np.uint64][EXEC // 2][1:] = random.integers(0, 1 << 64, 15, np.uint64)
    waves.scalar_changed(EXEC)
    target, source = ("s10", "v2") if "read" in name else ("v0", "s12" if "write" in name else "v2")
    written = [target, source] + ["s14"] * ("lane_b32" in name and "first" not in name)
    if "permute" in name:
        written.append("v4 offset:20")
    files = waves.block(0, 16).transpose(1, 2, 0).tolist()
    scalars = waves.scalars[np.uint32]
    given = [[int(scalars[i][wave]) for i in (10, 12, 14)] for wave in range(16)]
    enabled = pairs(waves, EXEC)

    execute(f"{name} {', '.join(written)}", waves)

    for wave, file in enumerate(files):
        names = {
            "VGPR": [[Int(x) for x in lane] for lane in file],
            "D0": Register(given[wave][0]),
            "S0": Int(given[wave][1]),
            "S1": Int(given[wave][2]),
            "EXEC": Int(enabled[wave]),
            "VDST": Int(0),
            "SRC0": Int(2),
            "ADDR": Int(2),
            "DATA0": Int(4),
            "OFFSET": Int(20),
        }
        run(TEXTS[name], names)
        assert waves.block(0, 16)[:, wave].T.tolist() == names["VGPR"]
        assert int(scalars[10][wave]) == int(names["D0"])


def test_every_opcode_is_compared_but_for_those_with_a_reason() -> None:
    comparisons = re.compile(r"[vs]_cmpk?_")
    others = {name for name in implemented() if not comparisons.match(name)}

    assert others - {*COMPARED} == NOT_COMPARED.keys()
