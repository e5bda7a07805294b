# SPDX-License-Identifier: Apache-2.0
"""The kernels in the CuTe DSL, compiled for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from gdn_backend_cuda.cute_replay.kernel import THREADS, compile_for
from gdn_backend_cuda.cute_replay.plan import Kind, shape_of

from ci.resources.calls import MODELS, Call, P
from ci.resources.driver import Compiled
from gdn_portable import GdnSpec

KEY_HEADS = (32, 16, 8)  # beside 32 value heads
CALL = Kind(has_bias=False, has_accepted=True, float32_dt_bias=True)


def cute_calls(arch: str, report: Callable[[Compiled], None]) -> Iterator[Call]:
    """Yield what compiles the kernels for models' layers and for other ratios of heads."""
    for layer, spec in MODELS.items():
        for H in KEY_HEADS:
            name = f"verify_step P{P} replay H{H} HV{spec.num_v_heads}"
            yield Call(layer, name, partial(_replay, replace(spec, num_k_heads=H), arch, report))


def _replay(spec: GdnSpec, arch: str, report: Callable[[Compiled], None]) -> None:
    shape = shape_of(spec, CALL)
    kernel = compile_for(shape, arch, "--keep-ptx --keep-cubin")
    with TemporaryDirectory() as folder:
        files = {kind: Path(folder) / kind for kind in ("ptx", "cubin")}
        files["ptx"].write_text(kernel.__ptx__)
        files["cubin"].write_bytes(kernel.__cubin__)
        report(Compiled("cute_replay", THREADS // 32, shape.shared, files))
