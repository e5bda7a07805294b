# SPDX-License-Identifier: Apache-2.0
"""The kernels in the CuTe DSL, compiled for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from gdn_backend_cuda.cute_replay.kernel import compile_for
from gdn_backend_cuda.cute_replay.plan import ANY, Kind, shapes_of
from gdn_backend_cuda.cute_replay.shape import Shape

from ci.resources.calls import MODELS, MOST_P, Call, P
from ci.resources.driver import Compiled

KEY_HEADS = (32, 16, 8)  # beside 32 value heads
DRAFTS = (P, 8, MOST_P)


def cute_calls(arch: str, report: Callable[[Compiled], None]) -> Iterator[Call]:
    """Yield what compiles the kernels for models' layers and for other ratios of heads."""
    for layer, spec in MODELS.items():
        for H in KEY_HEADS:
            for drafts in DRAFTS:
                name = f"verify_step P{drafts} replay H{H} HV{spec.num_v_heads}"
                call = Kind(
                    has_bias=False, has_accepted=True, float32_dt_bias=True, drafts=drafts,
                    room=drafts,
                )  # fmt: skip
                for most, shape in shapes_of(replace(spec, num_k_heads=H), call):
                    batch = name if most == ANY else f"{name}, {most} items"
                    yield Call(layer, batch, partial(_replay, shape, arch, report))


def _replay(shape: Shape, arch: str, report: Callable[[Compiled], None]) -> None:
    kernel = compile_for(shape, arch, "--keep-ptx --keep-cubin")
    with TemporaryDirectory() as folder:
        files = {kind: Path(folder) / kind for kind in ("ptx", "cubin")}
        files["ptx"].write_text(kernel.__ptx__)
        files["cubin"].write_bytes(kernel.__cubin__)
        report(Compiled("cute_replay", shape.warps, shape.shared, files))
