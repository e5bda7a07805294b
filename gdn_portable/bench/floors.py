# SPDX-License-Identifier: Apache-2.0
"""The least time a case can take: the larger of its bytes and its products on this card."""

from __future__ import annotations

from typing import NamedTuple

from gdn_portable.bench.cases import FRONT_END, VERIFY_OPS, Case
from gdn_portable.metadata import DraftProtocol

CHUNK = 64  # tokens the products of a chunked prefill are counted for
GATE_BYTES = 4  # g, beta and updates that are deferred are float32


class Work(NamedTuple):
    """What cannot be avoided: every input read once, every output written once."""

    bytes: int
    flops: int  # of matrix products


class Rates(NamedTuple):
    """What a card was measured to do."""

    bandwidth: float  # bytes per second, an elementwise float32 copy
    matmul: float  # FLOPs per second, a large bfloat16 product


def floor_of(work: Work, rates: Rates) -> float:
    """Return microseconds."""
    return max(work.bytes / rates.bandwidth, work.flops / rates.matmul) * 1e6


def work_of(case: Case) -> Work:
    """Count the bytes and FLOPs of a case."""
    return Work(_bytes(case), _flops(case))


def _bytes(case: Case) -> int:
    spec, op, T = case.spec, case.op, case.num_tokens
    D, W, HV = spec.conv_dim, spec.conv_width, spec.num_v_heads
    size = spec.dtype.itemsize
    qkv, ab, out = D * size, 2 * HV * size, HV * spec.head_v_dim * size
    gates = 2 * HV * GATE_BYTES
    conv = T * 2 * qkv + _windows(case) + D * W * size
    recurrence = T * (qkv + out) + _states(case)
    match op:
        case "conv1d_update" | "conv1d_prefill":
            return conv
        case "front_end":
            return conv + T * (ab + gates)
        case "chunk_prefill":
            return recurrence + T * gates
        case "recurrent_decode" | "mtp_verify":
            return recurrence + T * ab
        case "gated_rms_norm":
            return T * 3 * out + spec.head_v_dim * size
        case _:  # a step: what its parts hand to each other need not be written
            return recurrence + T * ab + conv - T * 2 * qkv


def _states(case: Case) -> int:
    """Count the recurrent states read and written, with the drafts a verify keeps."""
    spec, N, T = case.spec, case.num_sequences, case.num_tokens
    state = spec.num_v_heads * spec.head_v_dim * spec.head_k_dim * spec.state_dtype.itemsize
    if case.deferred:
        update = spec.num_k_heads * spec.head_k_dim * spec.dtype.itemsize
        update += spec.num_v_heads * (spec.head_v_dim + 1) * GATE_BYTES
        written = case.num_deferred.count(case.deferred)
        return (N + written) * state + (sum(case.num_deferred) + N - written) * update
    if case.protocol is None:
        return 2 * N * state
    if case.protocol is DraftProtocol.REPLAY:
        draft = sum(spec.conv_groups[1:]) * spec.dtype.itemsize
        draft += 2 * spec.num_v_heads * GATE_BYTES
        return 2 * N * state + (T + N * case.num_accepted) * draft
    return (N + T + _committed(case)) * state


def _windows(case: Case) -> int:
    """Count the conv windows read and written, with the inputs a verify keeps."""
    spec, N, T = case.spec, case.num_sequences, case.num_tokens
    column = spec.conv_dim * spec.conv_state_dtype.itemsize
    window = column * (spec.conv_width - 1)
    if case.protocol is DraftProtocol.REPLAY:
        inputs = (T + N * case.num_accepted) * spec.conv_dim * spec.dtype.itemsize
        return 2 * N * window + inputs
    if case.protocol is DraftProtocol.SNAPSHOT:
        return (N + T + _committed(case)) * window
    if case.protocol is DraftProtocol.SLOT_TABLE:
        return N * (window + column * spec.conv_state_len)
    return 2 * N * window


def _committed(case: Case) -> int:
    """Count the states that a commit reads and writes: a step with snapshots ends with one."""
    snapshot = case.op == "verify_step" and case.protocol is DraftProtocol.SNAPSHOT
    return 2 * case.num_sequences if snapshot else 0


def _flops(case: Case) -> int:
    spec, T = case.spec, case.num_tokens
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    if case.op in ("conv1d_update", "conv1d_prefill", FRONT_END, "gated_rms_norm"):
        return 0
    if case.op in ("chunk_prefill", "prefill_step"):
        # of a token: S k, S q and the update [K, V]; two products of [CHUNK, CHUNK] with [CHUNK, V]
        # for each value head; the lower triangles of K K^T and Q K^T for each key head
        per_value_head = 3 * 2 * K * V + 2 * 2 * CHUNK * V
        per_key_head = 2 * CHUNK * K
        return T * (HV * per_value_head + H * per_key_head)
    if case.op in VERIFY_OPS and case.protocol is DraftProtocol.REPLAY:
        T += case.num_sequences * case.num_accepted
    return T * HV * 3 * 2 * K * V
