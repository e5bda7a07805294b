# SPDX-License-Identifier: Apache-2.0
"""Matrix instructions of the simulator: products that Triton lays out for a GPU come out right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from ci.amdgcn import UnknownInstructionError, simulated  # noqa: E402
from ci.amdgcn.float_formats import to_xf32  # noqa: E402
from ci.amdgcn.matrix import INSTRUCTIONS  # noqa: E402

DTYPES = {
    "f32": torch.float32,
    "xf32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
}


@triton.jit
def _product(
    a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    if TRANSPOSED:
        left = tl.trans(tl.load(a + k[:, None] * M + m[None, :]))
    else:
        left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    at = out + m[:, None] * N + n[None, :]
    product = tl.dot(left, right, input_precision=PRECISION, out_dtype=out.dtype.element_ty)
    tl.store(at, product)


def _numbers(rows: int, columns: int, element: str) -> Tensor:
    """Return a matrix of which no two rows, columns or places are alike."""
    generator = torch.Generator().manual_seed(rows + columns)
    numbers = torch.randn(rows, columns, generator=generator) * 30
    if element == "xf32":
        return torch.from_numpy(to_xf32(numbers.numpy()))
    return numbers.to(DTYPES[element])


def _archs(element: str, depth: int, rows: int) -> list[str]:
    """Return the GPUs that have an instruction."""
    if element == "xf32":
        return ["gfx942"]
    bits = 8 * DTYPES[element].itemsize
    return ["gfx950"] if depth * rows * bits == 64 * 128 else ["gfx942", "gfx950"]


CASES = [
    (arch, name)
    for name, shape in INSTRUCTIONS.items()
    for arch in _archs(name.rpartition("_")[2], shape.depth, shape.rows)
]


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_an_instruction_lays_out_its_matrices_as_triton_does(arch: str, name: str) -> None:
    shape, element = INSTRUCTIONS[name], name.rpartition("_")[2]
    rows, depth = shape.rows, shape.depth
    a, b = _numbers(rows, depth, element), _numbers(depth, rows, element)
    out = torch.zeros(rows, rows, dtype=torch.int32 if element == "i8" else torch.float32)
    precision = "tf32" if element == "xf32" else "ieee"
    if element == "xf32" and triton.__version__.startswith(("3.6.", "3.7.", "3.8.")):
        pytest.skip("Triton before 3.9 fails to compile products of XF32")

    with simulated(arch) as gpu:
        _product[(1,)](
            a, b, out, rows, rows, depth, False, precision, num_warps=1, matrix_instr_nonkdim=rows
        )

    assert gpu.launches[0].counts.instructions[name] == 1
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=2e-6, atol=2e-3)


@pytest.mark.parametrize("element", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    ("shape", "transposed", "num_warps"),
    [((64, 64, 128), False, 4), ((32, 64, 64), True, 2)],
    ids=str,
)
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_products_of_several_waves_agree_with_torch(
    arch: str, element: str, shape: tuple[int, int, int], transposed: bool, num_warps: int
) -> None:
    M, N, K = shape
    a, b, out = _numbers(M, K, element), _numbers(K, N, element), torch.empty(M, N)
    stored = a.t().contiguous() if transposed else a

    with simulated(arch) as gpu:
        _product[(1,)](stored, b, out, M, N, K, transposed, "ieee", num_warps=num_warps)

    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=2e-6, atol=0.02)
    assert gpu.launches[0].counts.mfma_flops == 2 * M * N * K


def test_a_matrix_instruction_that_was_not_tried_is_an_error() -> None:
    x = _numbers(16, 16, "f16")

    with simulated("gfx942") as gpu, pytest.raises(UnknownInstructionError, match="4x4x4_16b_f16"):
        gpu.rewrite = lambda text: text.replace("16x16x16_f16", "4x4x4_16b_f16")
        _product[(1,)](x, x, torch.empty(16, 16), 16, 16, 16, False, "ieee", num_warps=1)
