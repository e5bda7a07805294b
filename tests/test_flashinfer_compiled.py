# SPDX-License-Identifier: Apache-2.0
"""The launches around FlashInfer's compile for Hopper, and need nothing that it lacks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from gdn_backend_triton.conv1d import make_front_end  # noqa: E402
from gdn_backend_triton.launch import lazily  # noqa: E402

from ci.resources.driver import Compiled, compiling_for  # noqa: E402
from ci.resources.measure import faults_of, needs_of  # noqa: E402
from gdn_portable import Device, GdnSpec, PrefillMetadata, SnapshotDrafts, VerifyMetadata  # noqa: E402
from tests import flashinfer_double  # noqa: E402
from tests.cases import ab, decays, g_beta, generator, mixed_qkv, params, qkv  # noqa: E402

HOPPER = Device("cuda", "sm90")
SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=6,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
    scratch_slot=8,
)
N, P, T = 2, 3, 6
SLOTS = torch.arange(N, dtype=torch.int32)
OFFSETS = torch.arange(0, T + 1, P, dtype=torch.int32)
FRESH = torch.zeros(N, dtype=torch.bool)
BATCHES = {
    "continued": PrefillMetadata(OFFSETS, SLOTS),
    "new": PrefillMetadata(OFFSETS, SLOTS, FRESH),
    "forked": PrefillMetadata(OFFSETS, SLOTS, FRESH, SLOTS),
    "checkpoints": PrefillMetadata(
        OFFSETS, SLOTS, checkpoint_offsets=SLOTS, checkpoint_indices=SLOTS
    ),
}


def _idle(function: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(function)
    def does_nothing(*_: Any, **__: Any) -> None: ...

    return does_nothing


def _make(target: str, spec: GdnSpec = SPEC) -> Callable[..., Any]:
    return lazily(f"gdn_backend_cuda.{target}")(spec, HOPPER, deterministic=False)


def _call_all() -> None:
    states = torch.zeros(9, SPEC.num_v_heads, SPEC.head_v_dim, SPEC.head_k_dim)
    qkv_rows, rates = qkv(SPEC, generator(), T), decays(SPEC, generator())
    a, b = ab(SPEC, generator(), T)
    for target, l2norm in product(("chunk_prefill", "chunk_prefill_cp"), (True, False)):
        prefill = _make(f"flashinfer_prefill:make_{target}", replace(SPEC, qk_l2norm=l2norm))
        for metadata in BATCHES.values():
            prefill(*qkv_rows, *g_beta(SPEC, generator(), T), states, metadata=metadata)
    front_end = make_front_end(replace(SPEC, scale=1.0), HOPPER, finished=True)
    front_end(
        mixed_qkv(SPEC, generator(), T), a, b, params(SPEC, generator()),
        torch.zeros(9, SPEC.conv_dim, 3, dtype=SPEC.dtype), metadata=BATCHES["continued"],
    )  # fmt: skip
    decode = _make("flashinfer_decode:make_recurrent_decode")
    decode(
        *(x[:N] for x in (*qkv_rows, a, b)), *rates, states, state_indices=SLOTS,
        out_state_indices=SLOTS,
    )  # fmt: skip
    verify, table = _make("flashinfer_verify:make_mtp_verify"), SLOTS[:, None].repeat(1, P)
    verify(*qkv_rows, a, b, *rates, states, metadata=VerifyMetadata(table, P))
    drafts = SnapshotDrafts.allocate(SPEC, N, P, "cpu")
    verify(*qkv_rows, a, b, *rates, states, metadata=VerifyMetadata(SLOTS, P), drafts=drafts)


def test_they_compile_and_keep_within_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer_double.install(monkeypatch, is_newer=True)
    for name in ("flashinfer.gdn_prefill", "flashinfer.gdn_decode"):
        module = sys.modules[name]
        for function in filter(callable, list(vars(module).values())):
            monkeypatch.setattr(module, function.__name__, _idle(function))
    found: list[Compiled] = []

    with compiling_for(HOPPER.arch, found.append), torch.no_grad():
        _call_all()

    launched = {"_place", "_front_end", "_gather", "_keep", "_finish"}
    assert {kernel.name for kernel in found} == launched
    for kernel in found:
        assert faults_of(kernel, HOPPER.arch, needs_of(kernel, HOPPER.arch), "") == []
    # it uses what it stores once more; to round a number takes as long as to round eight pairs
    (front_end,) = (kernel for kernel in found if kernel.name == "_front_end")
    assert "cvt.rn.bf16.f32" not in front_end.files["ptx"].read_text()
