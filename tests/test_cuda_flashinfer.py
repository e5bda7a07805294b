# SPDX-License-Identifier: Apache-2.0
"""On a Hopper GPU: FlashInfer's adapters pass every case, and every hazard of a naive call.

Each hazard is shown by a call of FlashInfer that goes wrong; the adapter's call beside it does not.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gdn_portable import (
    GdnOps,
    GdnParams,
    GdnSpec,
    Op,
    PrefillMetadata,
    SnapshotDrafts,
    StatePool,
    UnsupportedError,
    VerifyMetadata,
    bind,
)
from gdn_portable.testing import SLOTS, Case, cases

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU, torch sees none", allow_module_level=True)
gdn_decode = pytest.importorskip("flashinfer.gdn_decode")
gdn_prefill = pytest.importorskip("flashinfer.gdn_prefill")

ROOT = Path(__file__).parents[1]
H, HV, K = 2, 4, 128
SPEC = GdnSpec(
    num_k_heads=H,
    num_v_heads=HV,
    head_k_dim=K,
    head_v_dim=K,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
    scratch_slot=SLOTS,
)
SPECS = {
    "bf16": SPEC,
    "fp16, ratio 3": replace(SPEC, dtype=torch.float16, num_v_heads=6),
    "bf16 state, ratio 1": replace(SPEC, state_dtype=torch.bfloat16, num_v_heads=2),
    "ratio 8, null block": replace(SPEC, num_k_heads=1, num_v_heads=8, pad_slot=0, scale=0.05),
}
KERNELS = {
    "flashinfer.recurrent_decode": Op.RECURRENT_DECODE,
    "flashinfer.mtp_verify": Op.MTP_VERIFY,
    "flashinfer.chunk_prefill": Op.CHUNK_PREFILL,
    "flashinfer.chunk_prefill_cp": Op.CHUNK_PREFILL,
    "flashinfer.prefill_step": Op.PREFILL_STEP,
    "flashinfer.prefill_step_cp": Op.PREFILL_STEP,
}
NAMED = [
    (kernel, case.name)
    for kernel, op in KERNELS.items()
    for case in cases(replace(SPEC, head_k_dim=16, head_v_dim=16))
    if case.op is op
]


@cache
def _cases(spec: str) -> dict[str, Case]:
    return {case.name: case for case in cases(SPECS[spec])}


@cache
def _bound(spec: GdnSpec, *kernels: str) -> GdnOps:
    return bind(spec, "cuda", kernels={KERNELS[kernel]: kernel for kernel in kernels})


@pytest.mark.parametrize(("kernel", "name"), NAMED)
@pytest.mark.parametrize("spec", SPECS)
def test_a_kernel_passes_every_case(spec: str, kernel: str, name: str) -> None:
    case = _cases(spec)[name]
    if case.spec.dtype is torch.float16 and case.op in (Op.RECURRENT_DECODE, Op.MTP_VERIFY):
        with pytest.raises(UnsupportedError, match=r"float16, needs torch\.bfloat16"):
            _bound(case.spec, kernel)
        return

    case.check(_bound(case.spec, kernel))


def _slots(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cuda")


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    rng = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=rng, device="cuda").to(dtype)


class Rows(NamedTuple):
    """What decode and verify take for T rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor


def _rows(T: int, spec: GdnSpec = SPEC) -> Rows:
    heads, width = spec.num_v_heads, spec.head_k_dim
    zeros = torch.zeros(heads, device="cuda")
    q, k = _normal(2, T, spec.num_k_heads, width, seed=1)
    a, b = _normal(2, T, heads, seed=2)
    return Rows(q, k, _normal(T, heads, width, seed=3), a, b, zeros, zeros)


def _states(spec: GdnSpec, slots: int = SLOTS + 1) -> Tensor:
    shape = (spec.num_v_heads, spec.head_v_dim, spec.head_k_dim)
    return _normal(slots, *shape, seed=4, dtype=spec.state_dtype)


def _grouped(rows: Rows, T: int) -> dict[str, Tensor]:
    grouped = {
        name: getattr(rows, name).unflatten(0, (-1, T)) for name in ("q", "k", "v", "a", "b")
    }
    return {**grouped, "A_log": rows.A_log, "dt_bias": rows.dt_bias}


def _naive_decode(rows: Rows, state: Tensor, slots: Tensor, **options: Any) -> Tensor:
    """Call FlashInfer as its documentation has it."""
    o = torch.full_like(rows.v, torch.nan)
    gdn_decode.gated_delta_rule_decode_pretranspose(
        **_grouped(rows, 1),
        state=None,
        scale=SPEC.q_scale,
        output=o[:, None],
        initial_state=state,
        initial_state_indices=slots,
        backend="flashinfer",
        **options,
    )
    torch.cuda.synchronize()
    return o


def _naive_verify(rows: Rows, state: Tensor, slots: Tensor, T: int, **options: Any) -> Tensor:
    """Call FlashInfer as its documentation has it."""
    o = torch.full_like(rows.v, torch.nan)
    call = gdn_decode.gated_delta_rule_mtp
    if state.dtype is torch.bfloat16:
        call = gdn_decode.gated_delta_rule_decode_pretranspose
        options |= {"state": None, "backend": "flashinfer"}
    call(
        **_grouped(rows, T),
        scale=SPEC.q_scale,
        output=o.unflatten(0, (-1, T)),
        initial_state=state,
        initial_state_indices=slots,
        **options,
    )
    torch.cuda.synchronize()
    return o


def _changed(after: Tensor, before: Tensor) -> list[int]:
    moved = (after != before) | (after.isnan() != before.isnan())
    return [int(i) for i in moved.flatten(1).any(1).nonzero()]


MISALIGNED = r"[Mm]isaligned|not aligned"
STATES = {"float32": SPEC, "bfloat16": replace(SPEC, state_dtype=torch.bfloat16)}
DECODE, VERIFY, CHUNK = (
    "flashinfer.recurrent_decode",
    "flashinfer.mtp_verify",
    "flashinfer.chunk_prefill",
)


def test_a_negative_slot_to_read_is_slot_0_in_bfloat16() -> None:
    spec, rows = STATES["bfloat16"], _rows(2)
    naive, mine = _states(spec), _states(spec)

    _naive_decode(rows, naive, _slots(-1, 2))
    out = _bound(spec, DECODE).recurrent_decode(*rows, mine, state_indices=_slots(-1, 2))

    assert 0 in _changed(naive, _states(spec))
    assert _changed(mine[:SLOTS], _states(spec)[:SLOTS]) == [2]
    assert not out[0].any() and out[1].any()


@pytest.mark.parametrize("spec", STATES.values(), ids=STATES)
def test_a_negative_slot_to_write_is_slot_0(spec: GdnSpec) -> None:
    rows, read, write = _rows(2), _slots(1, 2), _slots(-1, 3)
    naive, mine = _states(spec), _states(spec)

    _naive_decode(rows, naive, read, output_state_indices=write)
    out = _bound(spec, DECODE).recurrent_decode(
        *rows, mine, state_indices=read, out_state_indices=write
    )

    assert 0 in _changed(naive, _states(spec))
    assert _changed(mine[:SLOTS], _states(spec)[:SLOTS]) == [3]
    assert out[0].any()


def test_bfloat16_states_take_slots_of_int64_through_the_adapter_only() -> None:
    spec, rows, slots = STATES["bfloat16"], _rows(2), _slots(1, 2, dtype=torch.int64)

    with pytest.raises(Exception, match=r"TYPE_UNSTABLE_JOIN|[Tt]ype|int32"):
        _naive_decode(rows, _states(spec), slots)
    out = _bound(spec, DECODE).recurrent_decode(*rows, _states(spec), state_indices=slots)

    assert out.isfinite().all()


@pytest.mark.parametrize("spec", STATES.values(), ids=STATES)
def test_slices_of_longer_tensors_are_aligned(spec: GdnSpec) -> None:
    slots = _slots(0, 1, 2)[1:]
    long = [torch.cat([x.flatten()[:4], x.flatten()])[4:].view_as(x) for x in _rows(2)[:5]]
    rows = Rows(*long, *_rows(2)[5:])

    with pytest.raises((ValueError, RuntimeError), match=MISALIGNED):
        _naive_decode(_rows(2), _states(spec), slots)
    with pytest.raises((ValueError, RuntimeError), match=MISALIGNED):
        _naive_decode(rows, _states(spec), _slots(1, 2))
    ops = _bound(spec, DECODE)
    got = ops.recurrent_decode(*rows, _states(spec), state_indices=slots)
    expected = ops.recurrent_decode(*_rows(2), _states(spec), state_indices=_slots(1, 2))

    assert torch.equal(got, expected)


def test_a_large_gate_is_nan_in_bfloat16_decode() -> None:
    spec, rows = STATES["bfloat16"], _rows(2)
    rows = rows._replace(a=torch.full_like(rows.a, 96.0))
    expected, mine = _states(spec), _states(spec)

    assert _naive_decode(rows, _states(spec), _slots(1, 2)).isnan().any()
    want = bind(spec, "cuda").recurrent_decode(*rows, expected, state_indices=_slots(1, 2))
    got = _bound(spec, DECODE).recurrent_decode(*rows, mine, state_indices=_slots(1, 2))

    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(mine[:SLOTS], expected[:SLOTS], rtol=2e-2, atol=2e-2)


def test_a_large_gate_is_nan_in_verify() -> None:
    B, T = 16, 4
    slots = torch.arange(B, dtype=torch.int32, device="cuda")
    rows = _rows(B * T)
    rows = rows._replace(a=torch.full_like(rows.a, 96.0))
    metadata, drafts = VerifyMetadata(slots, T), _snapshots(SPEC, B, T)

    naive = _naive_verify(rows, _states(SPEC), slots, T, disable_state_update=True)
    mine = _bound(SPEC, VERIFY).mtp_verify(*rows, _states(SPEC), metadata=metadata, drafts=drafts)

    assert naive.isnan().any()
    assert mine.isfinite().all()
    assert drafts.state is not None and drafts.state.isfinite().all()


def _snapshots(spec: GdnSpec, rows: int, steps: int) -> SnapshotDrafts:
    """Return snapshots of states alone, NaN."""
    shape = (rows, steps, spec.num_v_heads, spec.head_v_dim, spec.head_k_dim)
    return SnapshotDrafts(None, torch.full(shape, torch.nan, dtype=spec.state_dtype, device="cuda"))


def _compare_verify(
    spec: GdnSpec, rows: Rows, metadata: VerifyMetadata, make: Callable[[], Any]
) -> None:
    """Verify by FlashInfer's adapter and by Triton; compare all but the scratch slot."""
    results = []
    for ops in (_bound(spec, VERIFY), bind(spec, "cuda")):
        state, drafts = _states(spec), make()
        o = ops.mtp_verify(*rows, state, metadata=metadata, drafts=drafts)
        results.append([o, state[:SLOTS], *([] if drafts is None else [drafts.state])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_snapshots_of_more_steps_than_drafts_are_misplaced() -> None:
    B, T = 2, 4
    wide, exact = (_snapshots(SPEC, B, steps).state for steps in (T + 2, T))
    assert wide is not None and exact is not None
    rows, slots = _rows(B * T), _slots(1, 2)

    for buffer in (wide, exact):
        _naive_verify(
            rows, _states(SPEC), slots, T, intermediate_states_buffer=buffer,
            disable_state_update=True,
        )  # fmt: skip

    assert not torch.equal(wide[:, :T], exact)
    _compare_verify(SPEC, rows, VerifyMetadata(slots, T), lambda: _snapshots(SPEC, B, T + 2))


@pytest.mark.parametrize("B", [3, 40])
def test_snapshots_of_chains_are_flashinfers(B: int) -> None:
    T = 4
    slots = torch.arange(B, device="cuda") % SLOTS
    slots[1] = -1
    metadata = VerifyMetadata(slots, T)

    _compare_verify(SPEC, _rows(B * T), metadata, lambda: _snapshots(SPEC, B, T))


@pytest.mark.parametrize("spec", STATES.values(), ids=STATES)
def test_a_slot_table_is_flashinfers(spec: GdnSpec) -> None:
    table = torch.arange(20, device="cuda").view(5, 4)
    table[1], table[2, 1] = -1, -1
    metadata = VerifyMetadata(table, 4, num_accepted=_slots(0, 1, 4, 2, 3))

    _compare_verify(spec, _rows(20), metadata, lambda: None)


def test_the_final_state_is_lost_where_there_are_many_heads() -> None:
    T, written = 4, []
    for heads in (4, 128):
        spec = replace(STATES["bfloat16"], num_v_heads=heads)
        state, rows = _states(spec, 2), _rows(T, spec)
        buffer = _snapshots(spec, 1, T).state
        _naive_verify(
            rows, state, _slots(1), T, intermediate_states_buffer=buffer,
            disable_state_update=False,
        )  # fmt: skip
        written.append(bool(_changed(state, _states(spec, 2))))
    many = replace(STATES["bfloat16"], num_v_heads=128)

    assert written == [True, False]
    _compare_verify(
        many, _rows(T, many), VerifyMetadata(torch.arange(4, device="cuda")[None], T), lambda: None
    )


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
    rows, T = _rows(4, spec), 4
    small, large = _states(spec, 3), torch.zeros(4101, 32, K, K, device="cuda")
    large[4100] = small[2]
    ops, kept = _bound(spec, VERIFY), [_snapshots(spec, 1, T) for _ in range(2)]

    naive = subprocess.run(
        [sys.executable, "-c", LARGE_POOL], capture_output=True, text=True, check=False, cwd=ROOT
    )
    expected = ops.mtp_verify(*rows, small, metadata=VerifyMetadata(_slots(2), T), drafts=kept[0])
    got = ops.mtp_verify(*rows, large, metadata=VerifyMetadata(_slots(4100), T), drafts=kept[1])

    assert naive.returncode != 0 and "illegal memory access" in naive.stderr
    assert torch.equal(got, expected)
    assert torch.equal(kept[1].state, kept[0].state)


class Chunk(NamedTuple):
    """What chunk_prefill takes; q and k are unit vectors."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


UNIT = replace(SPEC, qk_l2norm=False)


def _unit(x: Tensor) -> Tensor:
    return (x.float() / x.float().norm(dim=-1, keepdim=True)).to(x.dtype)


def _chunk(T: int, seed: int = 0) -> Chunk:
    q, k = _unit(_normal(2, T, H, K, seed=seed))
    g = -_normal(T, HV, seed=seed + 1, dtype=torch.float32).abs() * 0.1
    beta = _normal(T, HV, seed=seed + 2, dtype=torch.float32).sigmoid()
    return Chunk(q, k, _normal(T, HV, K, seed=seed + 3), g, beta)


def _offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], device="cuda").cumsum(0)


def _naive_chunk(
    rows: Chunk, state: Tensor, lengths: tuple[int, ...], slots: Tensor | None, **options: Any
) -> Tensor:
    """Call FlashInfer as its documentation has it."""
    o = torch.full_like(rows.v, torch.nan)
    gdn_prefill.chunk_gated_delta_rule(
        **{
            "q": rows.q,
            "k": rows.k,
            "v": rows.v,
            "g": rows.g.exp(),
            "beta": rows.beta,
            "scale": SPEC.q_scale,
            "initial_state": state,
            "output_state": state,
            "output_final_state": True,
            "cu_seqlens": _offsets(*lengths).int(),
            "output": o,
            "use_cp": False,
            "state_indices": slots,
            "backend": "flashinfer",
            **options,
        }
    )
    return o


def test_without_a_pool_to_write_final_states_go_out_of_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The buffer that FlashInfer allocates for one state is the first of nine here."""
    rows, memory = _chunk(70), torch.full((9, HV, K, K), 7.0, device="cuda")
    empty = torch.empty

    def allocate(*shape: Any, **options: Any) -> Tensor:
        return memory[:1] if shape == ((1, HV, K, K),) else empty(*shape, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", allocate)
        _naive_chunk(
            rows, _states(UNIT), (70,), _slots(5), output_state=None, output_final_state=False
        )
    mine = _states(UNIT)
    _bound(UNIT, CHUNK).chunk_prefill(
        *rows, mine, metadata=PrefillMetadata(_offsets(70), _slots(5), None, _slots(-1))
    )

    assert _changed(memory, torch.full_like(memory, 7.0)) == [5]
    assert _changed(mine, _states(UNIT)) == []


@pytest.mark.parametrize("kernel", [CHUNK, "flashinfer.chunk_prefill_cp"])
def test_an_empty_sequence_keeps_what_its_slot_held(kernel: str) -> None:
    rows, lengths, slots = _chunk(100), (70, 0, 30), _slots(3, 4, 5)
    naive, mine = _states(UNIT), _states(UNIT)
    fresh = torch.tensor([True, False, True], device="cuda")
    metadata = PrefillMetadata(_offsets(*lengths), slots, has_initial_state=fresh)

    _naive_chunk(rows, naive, lengths, slots)
    _bound(UNIT, kernel).chunk_prefill(*rows, mine, metadata=metadata)

    assert _changed(naive, _states(UNIT)) == [3, 5]
    assert _changed(mine, _states(UNIT)) == [3, 4, 5]
    assert not mine[4].any()


def test_a_misaligned_slice_is_copied_in_prefill() -> None:
    rows, metadata = _chunk(100), PrefillMetadata(_offsets(100), _slots(3))
    beta = torch.cat([rows.beta.flatten()[:1], rows.beta.flatten()])[1:].view_as(rows.beta)
    sliced, ops = rows._replace(beta=beta), _bound(UNIT, CHUNK)

    with pytest.raises((ValueError, RuntimeError), match=MISALIGNED):
        _naive_chunk(sliced, _states(UNIT), (100,), _slots(3))
    got = ops.chunk_prefill(*sliced, _states(UNIT), metadata=metadata)

    assert torch.equal(got, ops.chunk_prefill(*rows, _states(UNIT), metadata=metadata))


def _scratch() -> dict[str, int]:
    """Return the addresses of FlashInfer's scratch by name."""
    cache = sys.modules["flashinfer.utils"]._cache_buf
    return {key[0]: buffer.data_ptr() for key, buffer in cache.items() if "gdn" in key[0]}


@pytest.mark.parametrize("kernel", [CHUNK, "flashinfer.chunk_prefill_cp"])
def test_streams_share_no_scratch(kernel: str) -> None:
    lengths, use_cp = (640,) * 8, kernel.endswith("cp")
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    batches = [_chunk(sum(lengths), seed) for seed in (0, 9)]
    slots = [torch.arange(8, device="cuda").int() + 8 * i for i in range(2)]
    metadata = [PrefillMetadata(_offsets(*lengths), each) for each in slots]
    ops, state = _bound(UNIT, kernel), _states(UNIT)
    expected = [
        ops.chunk_prefill(*rows, state, metadata=each)
        for rows, each in zip(batches, metadata, strict=True)
    ]

    shared = []
    for stream, rows, each in zip(streams, batches, slots, strict=True):
        with torch.cuda.stream(stream):
            _naive_chunk(rows, _states(UNIT), lengths, each, use_cp=use_cp)
            shared.append(_scratch())
    torch.cuda.synchronize()
    kept, pools = _scratch(), [_states(UNIT) for _ in range(20)]
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
    lengths, slots = (70, 30, 64), _slots(1, -1, 2)
    rows = _chunk(sum(lengths))
    rows.v[70:100] = torch.nan
    naive, spec = _states(UNIT), replace(SPEC, conv_window=3)
    o = _naive_chunk(rows, naive, lengths, _slots(1, 20, 2))
    mixed = _normal(sum(lengths), spec.conv_dim)
    a, b = _normal(2, sum(lengths), HV)
    params = GdnParams(_normal(spec.conv_dim, 4), *_rows(1)[5:])
    metadata, results = PrefillMetadata(_offsets(*lengths), slots), []
    for value in (torch.nan, 0.0):
        given = mixed.clone()
        given[70:100] = value
        pool = StatePool.allocate(spec, SLOTS + 1, "cuda")
        step = _bound(spec, "flashinfer.prefill_step").prefill_step
        results.append((step(given, a, b, params, pool, metadata=metadata), pool.state))

    assert o[64:70].isnan().any() and naive[1].isnan().any()
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kernel", [CHUNK, "flashinfer.chunk_prefill_cp"])
@pytest.mark.parametrize("spec", [UNIT, replace(UNIT, state_dtype=torch.bfloat16)], ids=STATES)
def test_a_checkpoint_may_lie_far_behind_the_states_that_are_kept(
    spec: GdnSpec, kernel: str
) -> None:
    lengths = (1300, 0, 70, 2000, 512)
    rows, results = _chunk(sum(lengths)), []
    metadata = PrefillMetadata(
        _offsets(*lengths),
        _slots(1, 2, 3, 4, 5),
        has_initial_state=torch.tensor([True, False, False, True, True], device="cuda"),
        checkpoint_offsets=_slots(1111, 0, 70, 1536, 511),
        checkpoint_indices=_slots(11, 12, 13, 14, 15),
    )
    for ops in (_bound(spec, kernel), bind(spec, "cuda", backend="triton")):
        state = _states(spec)
        results.append((ops.chunk_prefill(*rows, state, metadata=metadata), state))

    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kernel", [CHUNK, "flashinfer.chunk_prefill_cp"])
def test_a_deterministic_prefill_does_not_depend_on_the_batch(kernel: str) -> None:
    ops = bind(UNIT, "cuda", kernels={Op.CHUNK_PREFILL: kernel}, deterministic=True)
    rows, alone, together = _chunk(3000), _states(UNIT), _states(UNIT)
    last = Chunk(*(x[900:] for x in rows))

    expected = ops.chunk_prefill(*last, alone, metadata=PrefillMetadata(_offsets(2100), _slots(2)))
    got = ops.chunk_prefill(
        *rows, together, metadata=PrefillMetadata(_offsets(70, 830, 2100), _slots(0, 1, 2))
    )

    assert torch.equal(got[900:], expected)
    assert torch.equal(together[2], alone[2])


def test_two_specs_are_bound_in_one_process() -> None:
    """Nothing of one layer's heads, dtypes or scale is left in the other's kernels."""
    other = replace(SPEC, num_k_heads=4, num_v_heads=4, scale=0.5, state_dtype=torch.bfloat16)
    got, expected = [], []
    for _ in range(2):
        for spec in (SPEC, other):
            rows = _rows(3, spec)
            for out, ops in ((got, _bound(spec, DECODE)), (expected, bind(spec, "cuda"))):
                state = _states(spec)
                out.append(ops.recurrent_decode(*rows, state, state_indices=_slots(1, -1, 5)))

    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_a_captured_decode_is_replayed_with_other_slots_and_padded_rows() -> None:
    rows, slots, out = _rows(3), _slots(4, 5, 6), torch.empty(3, HV, K, device="cuda").bfloat16()
    ops, state, other = _bound(SPEC, DECODE), _states(SPEC), _states(SPEC)
    ops.recurrent_decode(*rows, _states(SPEC), state_indices=slots, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.recurrent_decode(*rows, state, state_indices=slots, out=out)

    for values in ((7, -1, 2), (-1, 0, -2), (9, 10, 11)):
        slots.copy_(_slots(*values))
        graph.replay()
        expected = ops.recurrent_decode(*rows, other, state_indices=_slots(*values))

        assert torch.equal(out, expected)
        assert torch.equal(state[:SLOTS], other[:SLOTS])


def test_a_captured_prefill_is_replayed_with_other_slots_and_lengths() -> None:
    rows, slots, offsets = _chunk(100), _slots(4, 5, 6), _offsets(70, 20, 10)
    ops, state, other = _bound(UNIT, CHUNK), _states(UNIT), _states(UNIT)
    metadata, out = PrefillMetadata(offsets, slots), torch.empty_like(rows.v)
    ops.chunk_prefill(*rows, _states(UNIT), metadata=metadata, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.chunk_prefill(*rows, state, metadata=metadata, out=out)

    for values, lengths in (((7, -1, 2), (64, 1, 30)), ((-1, 0, 3), (0, 99, 0))):
        slots.copy_(_slots(*values))
        offsets.copy_(_offsets(*lengths))
        graph.replay()
        apart = PrefillMetadata(_offsets(*lengths), _slots(*values))
        expected = ops.chunk_prefill(*rows, other, metadata=apart)

        assert torch.equal(out, expected)
        assert torch.equal(state, other)
        assert not out[sum(lengths) :].any()


def test_a_prefill_and_a_decode_run_at_once_on_other_slots() -> None:
    ops = _bound(UNIT, CHUNK, DECODE)
    rows, chunk = _rows(3), _chunk(100)
    metadata = PrefillMetadata(_offsets(70, 30), _slots(1, 2))
    alone, both = _states(UNIT), _states(UNIT)

    def run(state: Tensor, streams: tuple[Any, Any]) -> list[Tensor]:
        out = []
        for _ in range(20):
            with torch.cuda.stream(streams[0]):
                out.append(ops.chunk_prefill(*chunk, state, metadata=metadata))
            with torch.cuda.stream(streams[1]):
                out.append(ops.recurrent_decode(*rows, state, state_indices=_slots(4, 5, 6)))
        torch.cuda.synchronize()
        return out

    current = torch.cuda.current_stream()
    expected = run(alone, (current, current))
    got = run(both, (torch.cuda.Stream(), torch.cuda.Stream()))

    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(both[:SLOTS], alone[:SLOTS])
