# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel needs of a GPU, and what speaks against it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton

from ci.resources.driver import Compiled

# of a register, to or from memory of the thread
SPILL = re.compile(r"\b(STL|LDL)((?:\.\w+)*)\s[^;]*?\[(R1(?:\+0x[0-9a-f]+)?)\]")
MATRIX_INSTRUCTIONS = re.compile(r"\b(?:v_mfma_|wgmma\.mma_async|mma\.sync|tcgen05\.mma)")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A compute unit, or SM, with four schedulers.

    Attributes:
        shared_bytes: that programs of a unit share.
        most_shared_bytes: of one program.
        reserved_bytes: taken beside what a program asks for.
        warps: that a unit holds.
        programs: that a unit holds.
        most_scratch: bytes of scratch memory that a thread may have.
        least_warps: of a kernel that have to fit a unit together.
    """

    shared_bytes: int
    most_shared_bytes: int
    reserved_bytes: int
    warps: int
    programs: int
    most_scratch: int
    least_warps: int = 4  # one for each scheduler


# the tiles that were measured to be fastest on an H200 spill some registers: see the tables
GPUS = {
    "gfx942": Gpu(64 << 10, 64 << 10, 0, 32, 32, 0),
    "gfx950": Gpu(160 << 10, 160 << 10, 0, 32, 32, 0),
    "sm90": Gpu(228 << 10, 227 << 10, 1 << 10, 64, 32, 512),
    "sm100": Gpu(228 << 10, 227 << 10, 1 << 10, 64, 32, 512),
    "sm103": Gpu(228 << 10, 227 << 10, 1 << 10, 64, 32, 512),
    # never run: shared memory holds one program of two warps of a scan whose sequences are cut
    "sm120": Gpu(100 << 10, 99 << 10, 1 << 10, 48, 24, 1024, 2),
}


@dataclass(frozen=True, slots=True)
class Needs:
    """What a kernel needs; a warp is a wave on AMD.

    Attributes:
        warps: of a program.
        registers: of a thread; on AMD vector registers, accumulation registers included.
        shared: bytes of a program.
        scratch: bytes of a thread in memory: spilled registers, or arrays.
        resident: warps that a compute unit or SM holds at a time.
        matrix: matrix instructions in its code, not how often they run.
    """

    warps: int
    registers: int
    shared: int
    scratch: int
    resident: int
    matrix: int


def needs_of(kernel: Compiled, arch: str) -> Needs:
    """Read a kernel's machine code."""
    if arch.startswith("gfx"):
        code = kernel.files["amdgcn"].read_text()
        registers, scratch = (
            int(_found(rf"^\s+\.{name}:\s+(\d+)$", code))
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
    else:
        code = kernel.files["ptx"].read_text()
        usage = _dump(kernel, "-res-usage")
        registers = int(_found(r"\bREG:(\d+)", usage))
        scratch = int(_found(r"\bSTACK:(\d+)", usage)) + int(_found(r"\bLOCAL:(\d+)", usage))
    return Needs(
        warps=kernel.num_warps,
        registers=registers,
        shared=kernel.shared_bytes,
        scratch=scratch,
        resident=resident_warps(arch, kernel.num_warps, registers, kernel.shared_bytes),
        matrix=len(MATRIX_INSTRUCTIONS.findall(code)),
    )


def resident_warps(arch: str, warps: int, registers: int, shared: int) -> int:
    """Return how many warps of a kernel's programs a compute unit or SM holds at a time."""
    gpu = GPUS[arch]
    # a scheduler has 512 registers of every lane of 64, or of two times 32, in granules of 8
    by_registers = 4 * (512 // (-(-max(registers, 1) // 8) * 8))
    by_shared = gpu.shared_bytes // max(1, shared + gpu.reserved_bytes)
    return min(gpu.programs, by_shared, min(gpu.warps, by_registers) // warps) * warps


def faults_of(kernel: Compiled, arch: str, needs: Needs, said: str) -> list[str]:
    """Return what speaks against a kernel; ``said`` is what the compiler wrote to stderr."""
    gpu = GPUS[arch]
    source = kernel.files["ttir"].read_text() if "ttir" in kernel.files else ""
    code = kernel.files["amdgcn" if arch.startswith("gfx") else "ptx"].read_text()
    spills = re.findall(r"^\s+\.vgpr_spill_count:\s+([1-9]\d*)$", code, re.MULTILINE)
    spills_on_hopper = arch == "sm90" and needs.scratch > 0
    halves = unstored_halves(_dump(kernel, "-sass")) if spills_on_hopper else ()
    checks = {
        # ptxas 12.8, which Triton 3.6 and 3.7 have for Hopper, does so where it spills 16 bits
        f"spilled halves are loaded before they are stored: {', '.join(halves)}": halves,
        f"the compiler says: {said}": said,
        f"{needs.scratch} bytes of scratch memory, needs at most {gpu.most_scratch}": (
            needs.scratch > gpu.most_scratch
        ),
        f"{', '.join(spills)} registers spilled": spills,
        f"{needs.shared} bytes of shared memory, needs at most {gpu.most_shared_bytes}": (
            needs.shared > gpu.most_shared_bytes
        ),
        f"a unit holds {needs.resident} warps, needs {gpu.least_warps} at least": (
            needs.resident < gpu.least_warps
        ),
        "products of matrices without matrix instructions": (
            "tt.dot" in source and not needs.matrix
        ),
        "products of float32 in XF32": "xf32" in code,
    }
    return [fault for fault, is_so in checks.items() if is_so]


def unstored_halves(sass: str) -> tuple[str, ...]:
    """Return where a thread loads 16 bits from its memory before it stored something there."""
    stored, found = set(), []
    for instruction, kind, place in SPILL.findall(sass):
        if instruction == "STL":
            stored.add(place)
        elif "16" in kind and place not in stored:
            found.append(place)
    return tuple(found)


@cache
def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _dump(kernel: Compiled, what: str) -> str:
    command = [_cuobjdump(), what, str(kernel.files["cubin"])]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern}")
    return found[1]
