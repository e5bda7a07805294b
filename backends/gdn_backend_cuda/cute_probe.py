# SPDX-License-Identifier: Apache-2.0
"""Whether the CuTe DSL is here, new enough, and has what our kernels are written in.

Nothing is imported before a table is asked: by ``bind``, ``explain`` or ``doctor``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

from gdn_backend_cuda.flashinfer_probe import release
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
    reason = needs("cutlass", DISTRIBUTION)()
    if reason is not None:
        return reason
    version = importlib.metadata.version(DISTRIBUTION)
    if release(version) < OLDEST:
        return f"{DISTRIBUTION} is {version}, needs {'.'.join(map(str, OLDEST))} or newer"
    return _unusable()


@functools.cache
def _unusable() -> str | None:
    """Import what is needed and return what speaks against it; a library's error is a reason."""
    for name, needed in NAMES.items():
        try:
            module = importlib.import_module(name)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            return f"{name} cannot be imported: {type(error).__name__}: {first}"
        missing = [each for each in needed if not hasattr(module, each)]
        if missing:
            return f"{name} has no {', '.join(missing)}"
    return None
