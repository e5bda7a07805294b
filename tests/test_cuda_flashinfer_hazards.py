# SPDX-License-Identifier: Apache-2.0
"""On a Hopper GPU: what a naive call of FlashInfer gets wrong, and the adapter's call does not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_portable import (
    GdnParams,
    GdnSpec,
    PrefillMetadata,
    StatePool,
    VerifyMetadata,
    bind,
)
from gdn_portable.testing import SLOTS
from tests.flashinfer_calls import (
    CHUNK,
    CHUNK_CP,
    DECODE,
    HV,
    SPEC,
    STATES,
    UNIT,
    VERIFY,
    K,
    Rows,
    bound,
    changed_rows,
    chunk_of,
    compare_verify,
    index,
    is_mended,
    naive_chunk,
    naive_decode,
    naive_verify,
    normal,
    offsets_of,
    rows_of,
    snapshots,
    states_of,
)

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU, torch sees none", allow_module_level=True)
pytest.importorskip("flashinfer.gdn_decode")
pytest.importorskip("flashinfer.gdn_prefill")


ROOT = Path(__file__).parents[1]


MISALIGNED = r"[Mm]isaligned|not aligned"


def test_a_negative_slot_to_read_is_slot_0_in_bfloat16() -> None:
    spec, rows = STATES["bfloat16"], rows_of(2)
    naive, mine = states_of(spec), states_of(spec)

    naive_decode(rows, naive, index(-1, 2))
    out = bound(spec, DECODE).recurrent_decode(*rows, mine, state_indices=index(-1, 2))

    assert 0 in changed_rows(naive, states_of(spec))
    assert changed_rows(mine[:SLOTS], states_of(spec)[:SLOTS]) == [2]
    assert not out[0].any() and out[1].any()


@pytest.mark.parametrize("spec", STATES.values(), ids=STATES)
def test_a_negative_slot_to_write_is_slot_0(spec: GdnSpec) -> None:
    rows, read, write = rows_of(2), index(1, 2), index(-1, 3)
    naive, mine = states_of(spec), states_of(spec)

    naive_decode(rows, naive, read, output_state_indices=write)
    out = bound(spec, DECODE).recurrent_decode(
        *rows, mine, state_indices=read, out_state_indices=write
    )

    assert 0 in changed_rows(naive, states_of(spec))
    assert changed_rows(mine[:SLOTS], states_of(spec)[:SLOTS]) == [3]
    assert out[0].any()


def test_bfloat16_states_take_slots_of_int64_through_the_adapter_only() -> None:
    spec, rows, slots = STATES["bfloat16"], rows_of(2), index(1, 2, dtype=torch.int64)

    with pytest.raises(Exception, match=r"TYPE_UNSTABLE_JOIN|[Tt]ype|int32"):
        naive_decode(rows, states_of(spec), slots)
    out = bound(spec, DECODE).recurrent_decode(*rows, states_of(spec), state_indices=slots)

    assert out.isfinite().all()


@pytest.mark.parametrize("spec", STATES.values(), ids=STATES)
def test_slices_of_longer_tensors_are_aligned(spec: GdnSpec) -> None:
    slots = index(0, 1, 2)[1:]
    long = [torch.cat([x.flatten()[:4], x.flatten()])[4:].view_as(x) for x in rows_of(2)[:5]]
    rows = Rows(*long, *rows_of(2)[5:])

    with pytest.raises((ValueError, RuntimeError), match=MISALIGNED):
        naive_decode(rows_of(2), states_of(spec), slots)
    with pytest.raises((ValueError, RuntimeError), match=MISALIGNED):
        naive_decode(rows, states_of(spec), index(1, 2))
    ops = bound(spec, DECODE)
    got = ops.recurrent_decode(*rows, states_of(spec), state_indices=slots)
    expected = ops.recurrent_decode(*rows_of(2), states_of(spec), state_indices=index(1, 2))

    assert torch.equal(got, expected)


def test_a_large_gate_is_nan_in_bfloat16_decode() -> None:
    spec, rows = STATES["bfloat16"], rows_of(2)
    rows = rows._replace(a=torch.full_like(rows.a, 96.0))
    expected, mine = states_of(spec), states_of(spec)

    naive = naive_decode(rows, states_of(spec), index(1, 2))
    assert naive.isnan().any() != is_mended(0, 7, 4)
    want = bind(spec, "cuda").recurrent_decode(*rows, expected, state_indices=index(1, 2))
    got = bound(spec, DECODE).recurrent_decode(*rows, mine, state_indices=index(1, 2))

    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(mine[:SLOTS], expected[:SLOTS], rtol=2e-2, atol=2e-2)


def test_a_large_gate_is_nan_in_verify() -> None:
    B, T = 40, 4  # more than 128 heads take another kernel
    slots = torch.arange(B, dtype=torch.int32, device="cuda") % SLOTS
    rows = rows_of(B * T)
    rows = rows._replace(a=torch.full_like(rows.a, 96.0))
    metadata, drafts = VerifyMetadata(slots, T), snapshots(SPEC, B, T)

    naive = naive_verify(rows, states_of(SPEC), slots, T, disable_state_update=True)
    mine = bound(SPEC, VERIFY).mtp_verify(*rows, states_of(SPEC), metadata=metadata, drafts=drafts)

    assert naive.isnan().any() != is_mended(0, 7, 4)
    assert mine.isfinite().all()
    assert drafts.state is not None and drafts.state.isfinite().all()


def test_snapshots_of_more_steps_than_drafts_are_misplaced() -> None:
    B, T = 2, 4
    wide, exact = (snapshots(SPEC, B, steps).state for steps in (T + 2, T))
    assert wide is not None and exact is not None
    rows, slots = rows_of(B * T), index(1, 2)

    for buffer in (wide, exact):
        naive_verify(
            rows, states_of(SPEC), slots, T, intermediate_states_buffer=buffer,
            disable_state_update=True,
        )  # fmt: skip

    assert torch.equal(wide[:, :T], exact) == is_mended(0, 7, 4)
    compare_verify(SPEC, rows, VerifyMetadata(slots, T), lambda: snapshots(SPEC, B, T + 2))


def test_the_final_state_is_lost_where_there_are_many_heads() -> None:
    T, written = 4, []
    for heads in (4, 128):
        spec = replace(STATES["bfloat16"], num_v_heads=heads)
        state, rows = states_of(spec, 2), rows_of(T, spec)
        buffer = snapshots(spec, 1, T).state
        naive_verify(
            rows, state, index(1), T, intermediate_states_buffer=buffer,
            disable_state_update=False,
        )  # fmt: skip
        written.append(bool(changed_rows(state, states_of(spec, 2))))
    many = replace(STATES["bfloat16"], num_v_heads=128)

    assert written == [True, False]
    table = torch.arange(T, device="cuda")[None]
    compare_verify(many, rows_of(T, many), VerifyMetadata(table, T), lambda: None)


LARGE_POOL = """
import torch
from flashinfer.gdn_decode import gated_delta_rule_mtp
B, T, H, HV, K, slot = 1, 4, 16, 32, 128, 4100
x = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()
zeros = torch.zeros(HV, device="cuda")
gated_delta_rule_mtp(
    q=x(B, T, H, K), k=x(B, T, H, K), v=x(B, T, HV, K), a=x(B, T, HV), b=x(B, T, HV),
    A_log=zeros, dt_bias=zeros, scale=0.1, disable_state_update=True,
    initial_state=torch.zeros(slot + 1, HV, K, K, device="cuda"),
    initial_state_indices=torch.tensor([slot], dtype=torch.int32, device="cuda"),
)
torch.cuda.synchronize()
"""


def test_a_pool_larger_than_eight_gibibytes_is_read_where_int32_is_not() -> None:
    spec = replace(SPEC, num_k_heads=16, num_v_heads=32, scratch_slot=0)
    rows, T = rows_of(4, spec), 4
    small, large = states_of(spec, 3), torch.zeros(4101, 32, K, K, device="cuda")
    large[4100] = small[2]
    ops, kept = bound(spec, VERIFY), [snapshots(spec, 1, T) for _ in range(2)]

    naive = subprocess.run(
        [sys.executable, "-c", LARGE_POOL], capture_output=True, text=True, check=False, cwd=ROOT
    )
    expected = ops.mtp_verify(*rows, small, metadata=VerifyMetadata(index(2), T), drafts=kept[0])
    got = ops.mtp_verify(*rows, large, metadata=VerifyMetadata(index(4100), T), drafts=kept[1])

    is_illegal = naive.returncode != 0 and "illegal memory access" in naive.stderr
    assert is_illegal != is_mended(0, 7, 4)
    assert torch.equal(got, expected)
    assert torch.equal(kept[1].state, kept[0].state)


def test_without_a_pool_to_write_final_states_go_out_of_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The buffer that FlashInfer allocates for one state is the first of nine here."""
    rows, memory = chunk_of(70), torch.full((9, HV, K, K), 7.0, device="cuda")
    empty = torch.empty

    def allocate(*shape: Any, **options: Any) -> Tensor:
        return memory[:1] if shape == ((1, HV, K, K),) else empty(*shape, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", allocate)
        naive_chunk(
            rows, states_of(UNIT), (70,), index(5), output_state=None, output_final_state=False
        )
    mine = states_of(UNIT)
    bound(UNIT, CHUNK).chunk_prefill(
        *rows, mine, metadata=PrefillMetadata(offsets_of(70), index(5), None, index(-1))
    )

    is_outside = changed_rows(memory, torch.full_like(memory, 7.0)) == [5]
    assert is_outside != is_mended(0, 7, 4)
    assert changed_rows(mine, states_of(UNIT)) == []


@pytest.mark.parametrize("kernel", [CHUNK, CHUNK_CP])
def test_an_empty_sequence_keeps_what_its_slot_held(kernel: str) -> None:
    rows, lengths, slots = chunk_of(100), (70, 0, 30), index(3, 4, 5)
    naive, mine = states_of(UNIT), states_of(UNIT)
    fresh = torch.tensor([True, False, True], device="cuda")
    metadata = PrefillMetadata(offsets_of(*lengths), slots, has_initial_state=fresh)

    naive_chunk(rows, naive, lengths, slots)
    bound(UNIT, kernel).chunk_prefill(*rows, mine, metadata=metadata)

    assert changed_rows(naive, states_of(UNIT)) == [3, 5]
    assert changed_rows(mine, states_of(UNIT)) == [3, 4, 5]
    assert not mine[4].any()


@pytest.mark.parametrize("kernel", [CHUNK, CHUNK_CP])
def test_the_last_chunk_of_the_last_sequence_is_written_over_rows_of_nobody(kernel: str) -> None:
    rows, lengths, slots = chunk_of(100), (40, 30), index(3, 4)
    metadata = PrefillMetadata(offsets_of(*lengths), slots)

    naive = naive_chunk(rows, states_of(UNIT), lengths, slots, use_cp=kernel == CHUNK_CP)
    o = bound(UNIT, kernel).chunk_prefill(*rows, states_of(UNIT), metadata=metadata)

    assert naive[70:].isfinite().all()  # they were NaN
    assert not o[70:].any()
    torch.testing.assert_close(o[:70], naive[:70], rtol=2e-2, atol=2e-2)


def test_a_misaligned_slice_is_copied_in_prefill() -> None:
    rows, metadata = chunk_of(100), PrefillMetadata(offsets_of(100), index(3))
    beta = torch.cat([rows.beta.flatten()[:1], rows.beta.flatten()])[1:].view_as(rows.beta)
    sliced, ops = rows._replace(beta=beta), bound(UNIT, CHUNK)

    with pytest.raises((ValueError, RuntimeError), match=MISALIGNED):
        naive_chunk(sliced, states_of(UNIT), (100,), index(3))
    got = ops.chunk_prefill(*sliced, states_of(UNIT), metadata=metadata)

    assert torch.equal(got, ops.chunk_prefill(*rows, states_of(UNIT), metadata=metadata))


def _scratch() -> dict[str, int]:
    """Return the addresses of FlashInfer's scratch by name."""
    cache = sys.modules["flashinfer.utils"]._cache_buf
    return {key[0]: buffer.data_ptr() for key, buffer in cache.items() if "gdn" in key[0]}


@pytest.mark.parametrize("kernel", [CHUNK, CHUNK_CP])
def test_streams_share_no_scratch(kernel: str) -> None:
    lengths, use_cp = (640,) * 8, kernel.endswith("cp")
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    batches = [chunk_of(sum(lengths), seed) for seed in (0, 9)]
    slots = [torch.arange(8, device="cuda").int() + 8 * i for i in range(2)]
    metadata = [PrefillMetadata(offsets_of(*lengths), each) for each in slots]
    ops, state = bound(UNIT, kernel), states_of(UNIT)
    expected = [
        ops.chunk_prefill(*rows, state, metadata=each)
        for rows, each in zip(batches, metadata, strict=True)
    ]

    shared = []
    for stream, rows, each in zip(streams, batches, slots, strict=True):
        with torch.cuda.stream(stream):
            naive_chunk(rows, states_of(UNIT), lengths, each, use_cp=use_cp)
            shared.append(_scratch())
    torch.cuda.synchronize()
    kept, pools = _scratch(), [states_of(UNIT) for _ in range(20)]
    got = []
    for pool in pools:
        torch.cuda.synchronize()
        for stream, rows, each in zip(streams, batches, metadata, strict=True):
            with torch.cuda.stream(stream):
                got.append(ops.chunk_prefill(*rows, pool, metadata=each))
    torch.cuda.synchronize()

    assert shared[0] and shared[0] == shared[1]
    assert _scratch() == kept
    for i, o in enumerate(got):
        assert torch.equal(o, expected[i % 2])
    for pool in pools:
        assert torch.equal(pool, state)


def test_rows_of_padding_behind_a_sequence_reach_it() -> None:
    """A chunk's products take them times zero: in a step the front end writes zeros there."""
    lengths, slots = (70, 30, 64), index(1, -1, 2)
    rows = chunk_of(sum(lengths))
    rows.v[70:100] = torch.nan
    naive, spec = states_of(UNIT), replace(SPEC, conv_window=3)
    o = naive_chunk(rows, naive, lengths, index(1, 20, 2))
    mixed = normal(sum(lengths), spec.conv_dim)
    a, b = normal(2, sum(lengths), HV)
    params = GdnParams(normal(spec.conv_dim, 4), *rows_of(1)[5:])
    metadata, results = PrefillMetadata(offsets_of(*lengths), slots), []
    for value in (torch.nan, 0.0):
        given = mixed.clone()
        given[70:100] = value
        pool = StatePool.allocate(spec, SLOTS + 1, "cuda")
        step = bound(spec, "flashinfer.prefill_step").prefill_step
        results.append((step(given, a, b, params, pool, metadata=metadata), pool.state))

    assert o[64:70].isnan().any() and naive[1].isnan().any()
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
