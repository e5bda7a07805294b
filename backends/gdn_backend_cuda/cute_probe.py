# SPDX-License-Identifier: Apache-2.0
"""Whether the CuTe DSL is here, new enough, and has what our kernels are written in.

Nothing is imported before a table is asked: by ``bind``, ``explain`` or ``doctor``.
"""

from __future__ import annotations

import functools

from gdn_backend_cuda.probe import is_older, lacks
from gdn_portable.backend import needs

DISTRIBUTION = "nvidia-cutlass-dsl"
OLDEST = (4, 6)  # before, sums of numbers lose the type of their dialect
NAMES = {
    "cutlass": ("Boolean", "Constexpr", "Float32", "Int32", "Int64", "Uint32", "range_constexpr"),
    "cutlass.cute": ("arch", "compile", "jit", "kernel", "math"),
    "cutlass.cutlass_dsl": ("dsl_user_op",),
    "cutlass._mlir.dialects.arith": ("select",),
    "cutlass._mlir.dialects.llvm": ("extractvalue", "inline_asm"),
    "cuda.bindings.driver": ("CUstream",),
}


def cute_is_unfit() -> str | None:
    """Return why the CuTe DSL cannot be used."""
    return needs("cutlass", DISTRIBUTION)() or is_older(DISTRIBUTION, OLDEST) or _unusable()


@functools.cache
def _unusable() -> str | None:
    """Return the first reason against a module that is needed."""
    reasons = (lacks(module, names) for module, names in NAMES.items())
    return next((reason for reason in reasons if reason is not None), None)
