# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA or AMD GPU: the cases pass, nothing synchronises, and graphs replay."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdn_portable import (
    GdnOps,
    GdnParams,
    GdnSpec,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    StatePool,
    VerifyMetadata,
    bind,
)
from gdn_portable.testing import Case, cases

if not torch.cuda.is_available():
    pytest.skip("needs a GPU, torch sees none", allow_module_level=True)

SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=4,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
    conv_window=6,
)
SPECS = {
    "bf16": SPEC,
    "fp16": dataclasses.replace(SPEC, dtype=torch.float16, num_v_heads=6),
    "bf16 state": dataclasses.replace(SPEC, state_dtype=torch.bfloat16, head_v_dim=64),
}
CASES = [(f"{name}: {case.name}", case) for name, spec in SPECS.items() for case in cases(spec)]


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_the_bound_ops_pass_every_case(case: Case) -> None:
    case.check(bind(case.spec, "cuda"))


def _layer() -> tuple[GdnOps, GdnParams, StatePool]:
    """Return ops, parameters and a filled pool of 12 slots."""
    ops = bind(SPEC, "cuda")
    with torch.device("cuda"):
        params = GdnParams(
            conv_weight=torch.randn(SPEC.conv_dim, 4, dtype=SPEC.dtype),
            A_log=torch.randn(4),
            dt_bias=torch.randn(4),
            norm_weight=torch.ones(128, dtype=SPEC.dtype),
        )
    pool = StatePool.allocate(SPEC, 12, "cuda")
    assert pool.conv_state is not None and pool.state is not None
    pool.conv_state.normal_()
    pool.state.normal_()
    return ops, params, pool


def _inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mixed = torch.randn(tokens, SPEC.conv_dim, dtype=SPEC.dtype, device="cuda")
    a, b = torch.randn(2, tokens, 4, dtype=SPEC.dtype, device="cuda")
    return mixed, a, b


def _index(*values: int) -> torch.Tensor:
    return torch.tensor(values, device="cuda")


def _prefill() -> tuple[Callable[..., Any], dict[str, Any], dict[str, torch.Tensor]]:
    metadata = PrefillMetadata(_index(0, 70, 70, 100), _index(3, 4, -1), seq_lens_cpu=[70, 0, 30])
    tensors = {"state_indices": _index(5, -1, 7), "cu_seqlens": _index(0, 20, 90, 100)}
    return (lambda ops: ops.prefill_step), {"metadata": metadata}, tensors


def _decode() -> tuple[Callable[..., Any], dict[str, Any], dict[str, torch.Tensor]]:
    slots = _index(3, 4, -1)
    return (
        lambda ops: ops.decode_step,
        {"state_indices": slots},
        {"state_indices": _index(5, -1, 7)},
    )


def _verify(drafts: Any, slots: torch.Tensor, other: torch.Tensor) -> Any:
    metadata = VerifyMetadata(slots, 4, cu_seqlens=_index(0, 4, 4, 7), num_accepted=_index(2, 1, 0))
    changed = {"state_indices": other, "cu_seqlens": _index(0, 1, 5, 9)}
    return (lambda ops: ops.verify_step), {"metadata": metadata, "drafts": drafts}, changed


def _steps() -> dict[str, Any]:
    table = torch.arange(12, device="cuda").view(3, 4)
    moved = torch.tensor([[8, 9, 10, 11], [-1] * 4, [0, 1, 2, 3]], device="cuda")
    replay = ReplayDrafts.allocate(SPEC, 12, 4, "cuda")
    snapshot = SnapshotDrafts.allocate(SPEC, 3, 4, "cuda")
    return {
        "prefill": _prefill(),
        "decode": _decode(),
        "replay": _verify(replay, _index(3, 4, -1), _index(5, -1, 7)),
        "snapshot": _verify(snapshot, _index(3, 4, -1), _index(5, -1, 7)),
        "slot table": _verify(None, table, moved),
    }


@pytest.mark.parametrize("name", ["prefill", "decode", "replay", "snapshot", "slot table"])
def test_a_step_does_not_synchronise_and_its_graph_replays_with_other_slots(name: str) -> None:
    ops, params, pool = _layer()
    pick, batch, changed = _steps()[name]
    step = pick(ops)
    rows = {"prefill": 100, "decode": 3}.get(name, 9)
    mixed, a, b = _inputs(rows)

    def run(into: StatePool, arguments: dict[str, Any]) -> Any:
        return step(mixed, a, b, params, into, **arguments)

    start = [pool.conv_state.clone(), pool.state.clone()]  # type: ignore[union-attr]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(pool, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(pool, batch)

    # other slots and lengths, then the same start for the replay and for an eager run
    holder = batch.get("metadata")
    for field, value in changed.items():
        (batch[field] if holder is None else getattr(holder, field)).copy_(value)
    if holder is not None and getattr(holder, "seq_lens_cpu", None):
        holder.seq_lens_cpu = [20, 70, 10]
    other = StatePool(start[0].clone(), start[1].clone())
    pool.conv_state.copy_(start[0])  # type: ignore[union-attr]
    pool.state.copy_(start[1])  # type: ignore[union-attr]
    apart = copy.deepcopy(batch)
    graph.replay()
    expected = run(other, apart)

    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    assert torch.equal(pool.conv_state, other.conv_state)  # type: ignore[arg-type]
    assert torch.equal(pool.state, other.state)  # type: ignore[arg-type]
