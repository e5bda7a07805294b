# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: prefill kernels that are chosen as they are called, each in its turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gdn_portable import GdnOps, GdnSpec, Op, PrefillMetadata, bind, detect_device, explain
from gdn_portable.testing import cases
from gdn_portable.tuned import Cell, Layer, Tuned, file_name, versions

if not torch.cuda.is_available():
    pytest.skip("needs a GPU, torch sees none", allow_module_level=True)

SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=4,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
OPS = (Op.CHUNK_PREFILL, Op.PREFILL_STEP)
CASES = {case.name: case for case in cases(SPEC) if case.op in OPS}
CELLS = (Cell(1, 64), Cell(1, 1024), Cell(3, 64), Cell(3, 1024))
DEVICE = detect_device("cuda:0")
KERNELS = {
    op: [
        choice.kernel
        for choice in explain(SPEC, DEVICE)
        if choice.op is op and not choice.reasons and choice.among is None
        if not choice.kernel.startswith("composed.")
    ]
    for op in OPS
}
if min(map(len, KERNELS.values())) < 2:
    pytest.skip(f"needs two kernels to choose from, there is {KERNELS}", allow_module_level=True)


@pytest.fixture(params=range(3))
def ops(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GdnOps:
    """Return ops whose choice changes from cell to cell, and with the parameter in every cell."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "gdn_portable" / "tuned" / file_name(DEVICE, versions())
    tuned = Tuned(path=path, device=DEVICE, versions=versions())
    for op, names in KERNELS.items():
        for place, cell in enumerate(CELLS):
            first = (place + request.param) % len(names)
            times = tuned.times(Layer.of(SPEC), op)
            times[cell] = {name: 1.0 if i == first else 9.0 for i, name in enumerate(names)}
    tuned.write()
    return bind(SPEC, DEVICE)


@pytest.mark.parametrize("name", CASES)
def test_the_choice_passes_every_case(ops: GdnOps, name: str) -> None:
    assert ops.kernels[CASES[name].op].startswith("measured.")

    CASES[name].check(ops)


def _call(ops: GdnOps, lengths: list[int]) -> tuple[PrefillMetadata, tuple[torch.Tensor, ...]]:
    H, HV, K, V = SPEC.num_k_heads, SPEC.num_v_heads, SPEC.head_k_dim, SPEC.head_v_dim
    T, slots = sum(lengths), torch.arange(len(lengths), device="cuda")
    torch.manual_seed(0)
    shapes = ((T, H, K), (T, H, K), (T, HV, V))
    q, k, v = (torch.randn(shape, device="cuda", dtype=SPEC.dtype) for shape in shapes)
    g, beta = -torch.rand(T, HV, device="cuda"), torch.rand(T, HV, device="cuda")
    state = torch.zeros(len(lengths), HV, V, K, device="cuda")
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    metadata = PrefillMetadata(offsets, slots, seq_lens_cpu=lengths)
    return metadata, (q, k, v, g, beta, state)


@pytest.mark.parametrize("lengths", [[64], [1500], [64, 0, 3], [700, 800, 10, 40]], ids=str)
def test_a_planned_call_asks_the_device_for_nothing_and_replays_in_a_graph(
    ops: GdnOps, lengths: list[int]
) -> None:
    metadata, tensors = _call(ops, lengths)
    ops.warmup(prefill_tokens=(sum(lengths),), max_drafts=0)
    ops.plan_prefill(metadata)
    expected = ops.chunk_prefill(*tensors, metadata=metadata).clone()
    after = tensors[-1].clone()
    torch.cuda.synchronize()

    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.plan_prefill(metadata)
        ops.chunk_prefill(*tensors, metadata=metadata)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.chunk_prefill(*tensors, metadata=metadata)
    tensors[-1].zero_()
    graph.replay()

    assert torch.equal(out, expected)
    assert torch.equal(tensors[-1], after)


def test_a_deterministic_call_does_not_depend_on_the_batch(ops: GdnOps) -> None:
    pinned = bind(SPEC, DEVICE, deterministic=True)
    metadata, tensors = _call(pinned, [1500, 64, 64])
    alone = [x[:1500] for x in tensors[:-1]]
    state = torch.zeros_like(tensors[-1])

    together = pinned.chunk_prefill(*tensors, metadata=metadata)
    single = replace(
        metadata, cu_seqlens=metadata.cu_seqlens[:2], state_indices=metadata.state_indices[:1]
    )
    by_itself = pinned.chunk_prefill(*alone, state, metadata=replace(single, seq_lens_cpu=None))

    assert pinned.kernels[Op.CHUNK_PREFILL] == KERNELS[Op.CHUNK_PREFILL][0]
    assert torch.equal(together[:1500], by_itself)
    assert torch.equal(tensors[-1][0], state[0])
