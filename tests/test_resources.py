# SPDX-License-Identifier: Apache-2.0
"""Kernels compile, keep within a GPU's limits, and need what the committed tables say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from ci.resources import compilers, table  # noqa: E402
from ci.resources.calls import Call  # noqa: E402
from ci.resources.driver import Compiled, compiling_for  # noqa: E402
from ci.resources.measure import (  # noqa: E402
    Needs,
    faults_of,
    needs_of,
    resident_warps,
    unstored_halves,
)
from gdn_portable import Device, GdnSpec, PrefillMetadata, bind  # noqa: E402

NEEDS = Needs(warps=4, registers=128, shared=4096, scratch=0, resident=16, matrix=8)
KEY = ("bf16/fp32", "decode_step B1", "_decode")
# ci/compile takes minutes for the other two, whose kernels are those of sm100 and smaller ones
COMPILED = tuple(
    (arch, compiler)
    for compiler in compilers.names()
    for arch in compilers.gpus(compiler)
    if arch not in ("sm103", "sm120")
)
PLANTED = """
from ci.resources import compile
from tests.test_resources import planted_calls
compile.SETS["models"] = planted_calls
compile.main()
"""


@pytest.mark.parametrize(("arch", "compiler"), COMPILED)
def test_the_steps_of_models_need_what_the_table_says(arch: str, compiler: str) -> None:
    if not compilers.is_installed(compiler):
        pytest.skip(f"needs {compiler}: python -m ci.resources --install")

    found = table.gather(compilers.compiled(arch, compiler, "models"))

    # python -m ci.resources --write writes the tables again
    assert found.faults + table.differences(table.read(arch, compiler), found) == []


@triton.jit
def _product(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    # what a kernel of this library must not do: leave the precision of float32 products open
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _for_nvidia_alone(x):
    tl.store(x, tl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], tl.int32, True, 1))


@cache
def _compiled(arch: str, size: int, dtype: torch.dtype) -> Compiled:
    """Return a product of matrices by one warp; a kernel is reported once."""
    found: list[Compiled] = []
    x = torch.empty(size, size, dtype=dtype)
    with compiling_for(arch, found.append):
        _product[(1,)](x, x, torch.empty(size, size), size, num_warps=1)
    (kernel,) = found
    return kernel


def planted_calls(device: object) -> Iterator[Call]:
    """Yield a call that cannot be compiled, and one of which a compiler complains and goes on."""
    x = torch.empty(1, dtype=torch.int32)
    yield Call("layer", "refused", partial(_for_nvidia_alone[(1,)], x))
    yield Call("layer", "silent", partial(os.write, 2, b"error: something"))


@pytest.mark.parametrize(
    ("arch", "size", "dtype", "words"),
    [
        ("gfx942", 32, torch.bfloat16, []),
        ("gfx942", 32, torch.float32, ["in XF32"]),
        ("gfx942", 128, torch.bfloat16, ["holds 2 warps"]),
        ("sm90", 32, torch.bfloat16, []),
        ("sm90", 128, torch.bfloat16, ["scratch memory", "holds 3 warps"]),
    ],
    ids=str,
)
def test_what_speaks_against_a_kernel_is_found_in_its_code(
    arch: str, size: int, dtype: torch.dtype, words: list[str]
) -> None:
    kernel = _compiled(arch, size, dtype)

    faults = faults_of(kernel, arch, needs_of(kernel, arch), "")

    assert len(faults) == len(words)
    assert [word for word, fault in zip(words, faults, strict=True) if word not in fault] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scratch": 4}, "4 bytes of scratch memory, needs at most 0"),
        ({"shared": 65537}, "65537 bytes of shared memory, needs at most 65536"),
        ({"resident": 3}, "a unit holds 3 warps, needs 4 at least"),
        ({"matrix": 0}, "products of matrices without matrix instructions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_kernel_that_needs_too_much_is_refused(changes: dict[str, int], words: str) -> None:
    kernel = _compiled("gfx942", 32, torch.bfloat16)

    assert faults_of(kernel, "gfx942", replace(NEEDS, **changes), "") == [words]


def test_a_spilled_half_that_is_loaded_before_it_is_stored_is_found() -> None:
    store, load = "STL.S16 [R1+0x8], R48 ;", "LDL.LU.S16 R12, [R1+0x8] ;"
    predicates = "LDL.LU R179, [R1+0x34] ; STL [R1+0x34], R179 ;"  # bits of nothing, masked away

    assert unstored_halves(f"{predicates} {store} {load}") == ()
    assert unstored_halves(f"{predicates} {load} {store}") == ("R1+0x8",)


def test_what_a_compiler_says_is_a_fault_whether_it_goes_on_or_not(tmp_path: Path) -> None:
    compiler = f"triton-{triton.__version__}"
    with (tmp_path / "stderr").open("w+") as stderr:
        child = subprocess.run(
            [sys.executable, "-c", PLANTED, "gfx942", compiler, "models"],
            cwd=compilers.ROOT,
            env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            check=True,
        )

    refused, silent = map(json.loads, child.stdout.splitlines()[-2:])

    assert (refused["call"], silent["call"]) == ("refused", "silent")
    assert any("error: invalid instruction" in fault for fault in refused["faults"])
    assert silent["faults"] == ["the compiler says: error: something"]


def test_a_scan_of_the_widest_float32_heads_spills_no_register() -> None:
    spec = GdnSpec(
        num_k_heads=1,
        num_v_heads=1,
        head_k_dim=256,
        head_v_dim=256,
        dtype=torch.float32,
        state_dtype=torch.float32,
    )
    ops = bind(spec, Device("rocm", "gfx942"), backend="triton")
    x, gates = torch.zeros(5, 1, 256), torch.zeros(5, 1)
    metadata = PrefillMetadata(torch.tensor([0, 5]), torch.tensor([0]))
    found: list[Compiled] = []

    with compiling_for("gfx942", found.append):
        ops.chunk_prefill(x, x, x, gates, gates, torch.zeros(1, 1, 256, 256), metadata=metadata)

    kernels = {kernel.name: kernel for kernel in found}
    assert needs_of(kernels["_scan"], "gfx942").scratch == 0


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "resident"),
    [
        ("gfx942", 4, 128, 0, 16),
        ("gfx942", 4, 129, 0, 12),
        ("gfx942", 1, 8, 0, 32),
        ("gfx942", 4, 64, 20000, 12),
        ("gfx950", 4, 64, 20000, 32),
        ("gfx942", 8, 512, 0, 0),
        ("sm90", 4, 255, 0, 8),
        ("sm90", 8, 32, 113 * 1024, 16),
        ("sm120", 4, 32, 50 * 1024, 4),
    ],
)
def test_registers_and_shared_memory_say_how_many_warps_are_resident(
    arch: str, warps: int, registers: int, shared: int, resident: int
) -> None:
    assert resident_warps(arch, warps, registers, shared) == resident


@pytest.mark.parametrize("option", ["--arch", "--compiler"])
def test_a_gpu_or_compiler_that_is_none_is_refused(option: str) -> None:
    command = (sys.executable, "-m", "ci.resources", option, "gfx1")

    ended = subprocess.run(command, capture_output=True, text=True, cwd=compilers.ROOT)

    assert ended.returncode == 2
    assert f"{option} is gfx1, needs " in " ".join(ended.stderr.split())


def test_a_table_is_read_as_it_was_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "TABLES", tmp_path / "tables")

    table.write("gfx942", "triton-3.6.0", {KEY: NEEDS})

    assert table.read("gfx942", "triton-3.6.0") == {KEY: NEEDS}


def test_a_difference_names_the_kernel_and_what_changed() -> None:
    call = KEY[:2]
    line = {"layer": call[0], "call": call[1], "faults": []}
    needs = {"warps": 4, "registers": 130, "shared": 4096, "scratch": 8, "resident": 12}
    compiled = [
        {**line, "kernel": "_decode", "needs": {**needs, "matrix": 8}},
        {**line, "kernel": "_decode", "needs": {**needs, "matrix": 9}},
        {**line, "kernel": None, "needs": None},
    ]
    rows = {KEY: NEEDS, (*call, "_conv"): NEEDS, ("bf16/fp32", "not called", "_scan"): NEEDS}

    assert table.differences(rows, table.gather(compiled)) == [
        "bf16/fp32: decode_step B1: _conv: not compiled",
        "bf16/fp32: decode_step B1: _decode: "
        "registers 128 -> 130, scratch 0 -> 8, resident 16 -> 12",
        "bf16/fp32: decode_step B1: _decode 2: not in the table, "
        "warps 4, registers 130, shared 4096, scratch 8, resident 12, matrix 9",
    ]
