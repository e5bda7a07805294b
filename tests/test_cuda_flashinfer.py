# SPDX-License-Identifier: Apache-2.0
"""On a Hopper GPU: FlashInfer's adapters pass every case, and serve as engines call them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from gdn_backend_cuda.flashinfer_probe import parameters
from torch import Tensor

from gdn_portable import (
    GdnSpec,
    Op,
    PrefillMetadata,
    UnsupportedError,
    VerifyMetadata,
    bind,
)
from gdn_portable.testing import SLOTS, Case, cases
from tests.flashinfer_calls import (
    CHUNK,
    CHUNK_CP,
    DECODE,
    HV,
    KERNELS,
    SPEC,
    STATES,
    UNIT,
    Chunk,
    K,
    bound,
    chunk_of,
    compare_verify,
    index,
    offsets_of,
    rows_of,
    snapshots,
    states_of,
)

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU, torch sees none", allow_module_level=True)
pytest.importorskip("flashinfer.gdn_decode")
pytest.importorskip("flashinfer.gdn_prefill")


gdn_decode = pytest.importorskip("flashinfer.gdn_decode")


gdn_prefill = pytest.importorskip("flashinfer.gdn_prefill")


SPECS = {
    "bf16": SPEC,
    "fp16, ratio 3": replace(SPEC, dtype=torch.float16, num_v_heads=6),
    "bf16 state, ratio 1": replace(SPEC, state_dtype=torch.bfloat16, num_v_heads=2),
    "ratio 8, null block": replace(SPEC, num_k_heads=1, num_v_heads=8, pad_slot=0, scale=0.05),
}


NAMED = [
    (kernel, case.name)
    for kernel, op in KERNELS.items()
    for case in cases(replace(SPEC, head_k_dim=16, head_v_dim=16))
    if case.op is op and "deferred" not in case.arguments
]


@cache
def _cases(spec: str) -> dict[str, Case]:
    return {case.name: case for case in cases(SPECS[spec])}


@pytest.mark.parametrize(("kernel", "name"), NAMED)
@pytest.mark.parametrize("spec", SPECS)
def test_a_kernel_passes_every_case(spec: str, kernel: str, name: str) -> None:
    case = _cases(spec)[name]
    if case.spec.dtype is torch.float16 and case.op in (Op.RECURRENT_DECODE, Op.MTP_VERIFY):
        with pytest.raises(UnsupportedError, match=r"float16, needs torch\.bfloat16"):
            bound(case.spec, kernel)
        return

    case.check(bound(case.spec, kernel))


@pytest.mark.parametrize("B", [3, 40])
def test_snapshots_of_chains_are_flashinfers(B: int) -> None:
    T = 4
    slots = torch.arange(B, device="cuda") % SLOTS
    slots[1] = -1
    metadata = VerifyMetadata(slots, T)

    compare_verify(SPEC, rows_of(B * T), metadata, lambda: snapshots(SPEC, B, T))


@pytest.mark.parametrize("spec", STATES.values(), ids=STATES)
def test_a_slot_table_is_flashinfers(spec: GdnSpec) -> None:
    table = torch.arange(20, device="cuda").view(5, 4)
    table[1], table[2, 1] = -1, -1
    metadata = VerifyMetadata(table, 4, num_accepted=index(0, 1, 4, 2, 3))

    compare_verify(spec, rows_of(20), metadata, lambda: None)


@pytest.mark.parametrize("kernel", [CHUNK, CHUNK_CP])
@pytest.mark.parametrize("spec", [UNIT, replace(UNIT, state_dtype=torch.bfloat16)], ids=STATES)
def test_a_checkpoint_may_lie_far_behind_the_states_that_are_kept(
    spec: GdnSpec, kernel: str
) -> None:
    lengths = (1300, 0, 70, 2000, 512)
    rows, results = chunk_of(sum(lengths)), []
    metadata = PrefillMetadata(
        offsets_of(*lengths),
        index(1, 2, 3, 4, 5),
        has_initial_state=torch.tensor([True, False, False, True, True], device="cuda"),
        checkpoint_offsets=index(1111, 0, 70, 1536, 511),
        checkpoint_indices=index(11, 12, 13, 14, 15),
    )
    for ops in (bound(spec, kernel), bind(spec, "cuda", backend="triton")):
        state = states_of(spec)
        results.append((ops.chunk_prefill(*rows, state, metadata=metadata), state))

    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("spec", [UNIT, replace(UNIT, state_dtype=torch.bfloat16)], ids=STATES)
def test_slots_may_interleave_where_rows_to_write_are_a_list_of_their_own(spec: GdnSpec) -> None:
    if "output_state_indices" not in parameters(gdn_prefill.chunk_gated_delta_rule):
        pytest.skip("needs a FlashInfer that takes output_state_indices")
    rows, ops, expected = chunk_of(100), bound(spec, CHUNK), states_of(spec)
    state = expected.transpose(0, 1).contiguous().transpose(0, 1)
    metadata = PrefillMetadata(offsets_of(70, 30), index(3, 4), None, index(5, 4))

    want = ops.chunk_prefill(*rows, expected, metadata=metadata)
    o = ops.chunk_prefill(*rows, state, metadata=metadata)

    assert state.stride(0) < state[0].numel()
    assert torch.equal(o, want)
    assert torch.equal(state, expected)


@pytest.mark.parametrize("kernel", [CHUNK, CHUNK_CP])
def test_a_deterministic_prefill_does_not_depend_on_the_batch(kernel: str) -> None:
    ops = bind(UNIT, "cuda", kernels={Op.CHUNK_PREFILL: kernel}, deterministic=True)
    rows, alone, together = chunk_of(3000), states_of(UNIT), states_of(UNIT)
    last = Chunk(*(x[900:] for x in rows))

    expected = ops.chunk_prefill(*last, alone, metadata=PrefillMetadata(offsets_of(2100), index(2)))
    got = ops.chunk_prefill(
        *rows, together, metadata=PrefillMetadata(offsets_of(70, 830, 2100), index(0, 1, 2))
    )

    assert torch.equal(got[900:], expected)
    assert torch.equal(together[2], alone[2])


def test_two_specs_are_bound_in_one_process() -> None:
    """Nothing of one layer's heads, dtypes or scale is left in the other's kernels."""
    other = replace(SPEC, num_k_heads=4, num_v_heads=4, scale=0.5, state_dtype=torch.bfloat16)
    got, expected = [], []
    for _ in range(2):
        for spec in (SPEC, other):
            rows = rows_of(3, spec)
            for out, ops in ((got, bound(spec, DECODE)), (expected, bind(spec, "cuda"))):
                state = states_of(spec)
                out.append(ops.recurrent_decode(*rows, state, state_indices=index(1, -1, 5)))

    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_a_captured_decode_is_replayed_with_other_slots_and_padded_rows() -> None:
    rows, slots, out = rows_of(3), index(4, 5, 6), torch.empty(3, HV, K, device="cuda").bfloat16()
    ops, state, other = bound(SPEC, DECODE), states_of(SPEC), states_of(SPEC)
    ops.recurrent_decode(*rows, states_of(SPEC), state_indices=slots, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.recurrent_decode(*rows, state, state_indices=slots, out=out)

    for values in ((7, -1, 2), (-1, 0, -2), (9, 10, 11)):
        slots.copy_(index(*values))
        graph.replay()
        expected = ops.recurrent_decode(*rows, other, state_indices=index(*values))

        assert torch.equal(out, expected)
        assert torch.equal(state[:SLOTS], other[:SLOTS])


def test_a_captured_prefill_is_replayed_with_other_slots_and_lengths() -> None:
    rows, slots, offsets = chunk_of(100), index(4, 5, 6), offsets_of(70, 20, 10)
    ops, state, other = bound(UNIT, CHUNK), states_of(UNIT), states_of(UNIT)
    metadata, out = PrefillMetadata(offsets, slots), torch.empty_like(rows.v)
    ops.chunk_prefill(*rows, states_of(UNIT), metadata=metadata, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.chunk_prefill(*rows, state, metadata=metadata, out=out)

    for values, lengths in (((7, -1, 2), (64, 1, 30)), ((-1, 0, 3), (0, 99, 0))):
        slots.copy_(index(*values))
        offsets.copy_(offsets_of(*lengths))
        graph.replay()
        apart = PrefillMetadata(offsets_of(*lengths), index(*values))
        expected = ops.chunk_prefill(*rows, other, metadata=apart)

        assert torch.equal(out, expected)
        assert torch.equal(state, other)
        assert not out[sum(lengths) :].any()


def test_a_prefill_and_a_decode_run_at_once_on_other_slots() -> None:
    ops = bound(UNIT, CHUNK, DECODE)
    rows, chunk = rows_of(3), chunk_of(100)
    metadata = PrefillMetadata(offsets_of(70, 30), index(1, 2))
    alone, both = states_of(UNIT), states_of(UNIT)

    def run(state: Tensor, streams: tuple[Any, Any]) -> list[Tensor]:
        out = []
        for _ in range(20):
            with torch.cuda.stream(streams[0]):
                out.append(ops.chunk_prefill(*chunk, state, metadata=metadata))
            with torch.cuda.stream(streams[1]):
                out.append(ops.recurrent_decode(*rows, state, state_indices=index(4, 5, 6)))
        torch.cuda.synchronize()
        return out

    current = torch.cuda.current_stream()
    expected = run(alone, (current, current))
    got = run(both, (torch.cuda.Stream(), torch.cuda.Stream()))

    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(both[:SLOTS], alone[:SLOTS])
