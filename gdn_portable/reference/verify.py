# SPDX-License-Identifier: Apache-2.0
"""Speculative drafts: chains and trees under the three protocols, and their commit."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_portable.errors import InputError
from gdn_portable.metadata import (
    DraftProtocol,
    Drafts,
    ReplayDrafts,
    SnapshotDrafts,
    VerifyMetadata,
    commit_batch,
    draft_protocol,
    given,
)
from gdn_portable.reference.conv1d import convolve
from gdn_portable.reference.math import gating, normalise, read_out, update
from gdn_portable.reference.slots import (
    Packed,
    finish,
    like,
    most,
    pack,
    read,
    write,
)
from gdn_portable.reference.trees import parents_of, path_to
from gdn_portable.spec import GdnSpec
from gdn_portable.state import StatePool


class _Batch(NamedTuple):
    """A verify batch: its tokens, its slots, and how its drafts hang together."""

    protocol: DraftProtocol
    slots: Tensor  # [B] slot that a sequence's window or state is read from
    packed: Packed
    drafted: Tensor  # [B, P] which drafts there are
    accepted: Tensor  # [B] drafts of the step before that count
    parents: Tensor | None  # [B, P]; None is a chain

    def unpack(self, x: Tensor) -> Tensor:
        """Return packed rows [T, ...] as [B, P, ...], zeros where there is no draft."""
        if len(x) == 0:
            return x.new_zeros(*self.drafted.shape, *x.shape[1:])
        step = torch.arange(self.drafted.shape[1], device=x.device)
        rows = x[torch.where(self.drafted, self.packed.starts[:, None] + step, 0)]
        return torch.where(like(self.drafted, rows), rows, 0)


def _verify_batch(
    spec: GdnSpec,
    metadata: VerifyMetadata,
    drafts: Drafts | None,
    num_tokens: int,
    *,
    column: int | None,
) -> _Batch:
    """Read the metadata; ``column`` of a slot table is read, None where the accepted states are."""
    protocol, P = draft_protocol(metadata, drafts), metadata.max_drafts
    slots, cu_seqlens = metadata.state_indices, metadata.cu_seqlens
    if cu_seqlens is None:
        if num_tokens % P:
            raise InputError(
                f"{num_tokens} draft tokens without cu_seqlens, needs a multiple of "
                f"max_drafts ({P})"
            )
        cu_seqlens = torch.arange(0, num_tokens + 1, P, device=slots.device)
    B = len(cu_seqlens) - 1
    slots = slots[:B].to(torch.int64)
    accepted = torch.zeros(B, dtype=torch.int64, device=slots.device)
    if metadata.num_accepted is not None:
        accepted = metadata.num_accepted[:B].to(torch.int64)
    if protocol is DraftProtocol.SLOT_TABLE:
        last = (accepted - 1).clamp(0, slots.shape[1] - 1)
        slots = slots.gather(1, last[:, None])[:, 0] if column is None else slots[:, column]
    packed = pack(cu_seqlens, slots > spec.pad_slot, num_tokens)
    step = torch.arange(P, device=slots.device)
    drafted = packed.live[:, None] & (step < packed.lengths[:, None])
    return _Batch(protocol, slots, packed, drafted, accepted, parents_of(metadata, B))


def conv1d_verify(
    spec: GdnSpec,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    *,
    metadata: VerifyMetadata,
    drafts: Drafts | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve packed drafts."""
    batch = _verify_batch(spec, metadata, drafts, len(x), column=0)
    packed, slots, live = batch.packed, batch.slots, batch.packed.live
    if len(slots) == 0:
        return finish(x, packed.owned, x.dtype, out)
    window = _window_before(spec, batch, conv_state)
    if isinstance(drafts, ReplayDrafts):
        pending = _first(drafts.conv_inputs.shape[1], batch.accepted)
        kept = read(drafts.conv_inputs, slots, live, spec.compute_dtype)
        window = _replay_window(window, kept, pending)

    inputs = partial(_inputs_at, x, window, packed.starts, packed.sequence)
    at, taps = packed.position, list[Tensor]()
    for _ in range(spec.conv_width):
        taps.insert(0, inputs(at))
        at = _step_back(batch, at)
    result = finish(convolve(spec, taps, weight, bias), packed.owned, x.dtype, None)

    if isinstance(drafts, ReplayDrafts):
        write(conv_state[..., : spec.conv_width - 1], slots, window, live & (batch.accepted > 0))
        _keep_drafts(drafts.conv_inputs, slots, batch, batch.unpack(x))
    elif isinstance(drafts, SnapshotDrafts):
        windows = batch.unpack(torch.stack(taps[1:], dim=-1))  # [B, P, D, W-1]
        kept = given("drafts.conv_state", drafts.conv_state)
        _keep_drafts(kept, _rows(metadata, len(slots)), batch, windows)
    else:
        _write_table_window(batch, conv_state, x, window)
    return result if out is None else out.copy_(result)


def _inputs_at(
    x: Tensor, window: Tensor, starts: Tensor, sequence: Tensor, position: Tensor
) -> Tensor:
    """Return the conv inputs at a position of a sequence; -1 is the last column of its window."""
    columns = window.shape[-1]
    old = window[sequence, :, (position + columns).clamp(0, columns - 1)]
    if len(x) == 0:
        return old
    new = x[(starts[sequence] + position).clamp(0, len(x) - 1)].to(window.dtype)
    return torch.where((position < 0)[:, None], old, new)


def _window_before(spec: GdnSpec, batch: _Batch, pool: Tensor) -> Tensor:
    """Return the windows [B, D, W-1] in front of what is pending and drafted."""
    columns, live = spec.conv_width - 1, batch.packed.live
    if batch.protocol is not DraftProtocol.SLOT_TABLE:
        return read(pool[..., :columns], batch.slots, live, spec.compute_dtype)
    wide = read(pool, batch.slots, live, spec.compute_dtype)
    offset = (batch.accepted - 1).clamp(0, wide.shape[-1] - columns)
    column = offset[:, None, None] + torch.arange(columns, device=offset.device)
    return wide.gather(-1, column.expand(*wide.shape[:-1], columns))


def _write_table_window(batch: _Batch, pool: Tensor, x: Tensor, window: Tensor) -> None:
    """Store the inputs after the first of each window, drafts included, from column 0 on."""
    packed = batch.packed
    sequences = torch.arange(len(batch.slots), device=x.device)
    for column in range(pool.shape[-1]):
        position = torch.full_like(sequences, column + 1 - window.shape[-1])
        keep = packed.live & (packed.lengths > 0) & (position < packed.lengths)
        rows = _inputs_at(x, window, packed.starts, sequences, position)
        write(pool[..., column], batch.slots, rows, keep)


def _step_back(batch: _Batch, position: Tensor) -> Tensor:
    """Return the parent of each draft; the window lies before the root, at -1, -2, ..."""
    if batch.parents is None:
        return position - 1
    inside = position.clamp(0, batch.parents.shape[1] - 1)
    return torch.where(position > 0, batch.parents[batch.packed.sequence, inside], position - 1)


def mtp_verify(
    spec: GdnSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    metadata: VerifyMetadata,
    drafts: Drafts | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run packed drafts."""
    batch = _verify_batch(spec, metadata, drafts, len(v), column=None)
    slots, live = batch.slots, batch.packed.live
    if len(slots) == 0:
        return finish(v, batch.packed.owned, v.dtype, out)
    g, beta = gating(spec, a, b, A_log, dt_bias)
    S = read(state, slots, live, spec.compute_dtype)
    if isinstance(drafts, ReplayDrafts):
        pending = _first(drafts.k.shape[1], batch.accepted)
        S = _replay_state(spec, S, drafts, slots, live, pending)
        write(state, slots, S, live & (batch.accepted > 0))
        for kept, x in ((drafts.k, k), (drafts.v, v), (drafts.g, g), (drafts.beta, beta)):
            _keep_drafts(kept, slots, batch, batch.unpack(x))

    states, outputs = _run_drafts(spec, batch, S, q, k, v, g, beta)
    if isinstance(drafts, SnapshotDrafts):
        kept = given("drafts.state", drafts.state)
        for t, after in enumerate(states):
            write(kept[:, t], _rows(metadata, len(slots)), after, batch.drafted[:, t])
    elif drafts is None:
        for t, after in enumerate(states):
            target = metadata.state_indices[: len(slots), t].to(torch.int64)
            write(state, target, after, batch.drafted[:, t] & (target > spec.pad_slot))
    return finish(outputs, batch.packed.owned, v.dtype, out)


def _run_drafts(
    spec: GdnSpec,
    batch: _Batch,
    root: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Return the states [B, HV, V, K] after each draft, and packed outputs [T, HV, V]."""
    q, k = normalise(spec, q, k)
    q, k, v, g, beta = (batch.unpack(x) for x in (q, k, v.to(spec.compute_dtype), g, beta))
    sequences = torch.arange(len(root), device=root.device)
    S, states, outputs = root, list[Tensor](), list[Tensor]()
    for t in range(most(batch.packed.lengths, batch.drafted.shape[1])):
        if t > 0 and batch.parents is not None:
            S = torch.stack(states, dim=1)[sequences, batch.parents[:, t].clamp(max=t - 1)]
        S, _ = update(S, k[:, t], v[:, t], g[:, t], beta[:, t])
        states.append(S)
        outputs.append(read_out(S, q[:, t]))
    if not outputs:
        return states, torch.zeros_like(v[:, 0])[batch.packed.sequence]
    position = batch.packed.position.clamp(0, len(outputs) - 1)
    return states, torch.stack(outputs, dim=1)[batch.packed.sequence, position]


def mtp_commit(
    spec: GdnSpec,
    pool: StatePool,
    drafts: Drafts,
    *,
    metadata: VerifyMetadata,
    last_accepted: Tensor,
    out_state_indices: Tensor | None = None,
) -> None:
    """Keep the accepted drafts."""
    draft_protocol(metadata, drafts)
    B = commit_batch(metadata, last_accepted)
    source = metadata.state_indices[:B].to(torch.int64)
    target = source if out_state_indices is None else out_state_indices[:B].to(torch.int64)
    last, live = last_accepted[:B].to(torch.int64), source > spec.pad_slot
    keep = live & (target > spec.pad_slot)
    states, windows = pool.state, pool.conv_state
    if windows is not None:
        windows = windows[..., : spec.conv_width - 1]
    if isinstance(drafts, ReplayDrafts):
        path = path_to(metadata, last)
        if states is not None:
            S = read(states, source, live, spec.compute_dtype)
            S = _replay_state(spec, S, drafts, source, live, path)
            write(states, target, S, keep)
        if windows is not None:
            window = read(windows, source, live, spec.compute_dtype)
            kept = read(drafts.conv_inputs, source, live, spec.compute_dtype)
            write(windows, target, _replay_window(window, kept, path), keep)
        return
    rows, last = torch.where(keep, _rows(metadata, B), 0), torch.where(keep, last, 0)
    if states is not None:
        kept = given("drafts.state", drafts.state)
        for pool_state, kept_state in _layers(states, kept, axes=4):
            _commit_snapshots(pool_state, kept_state, rows, last, source, target, keep)
    if windows is not None:
        kept = given("drafts.conv_state", drafts.conv_state)
        for pool_window, kept_window in _layers(windows, kept, axes=3):
            _commit_snapshots(pool_window, kept_window, rows, last, source, target, keep)


def _layers(pool: Tensor, kept: Tensor, *, axes: int) -> list[tuple[Tensor, Tensor]]:
    """Pair a pool of ``axes`` axes with its snapshots, layer by layer where there is one more."""
    return [(pool, kept)] if pool.dim() == axes else list(zip(pool, kept, strict=True))


def _commit_snapshots(
    pool: Tensor,
    kept: Tensor,
    rows: Tensor,
    last: Tensor,
    source: Tensor,
    target: Tensor,
    keep: Tensor,
) -> None:
    """Copy the snapshot after ``last``, or the slot's own state where there is none."""
    own = pool[torch.where(keep, source, 0)]
    after = kept[rows, last.clamp(min=0)].to(pool.dtype)
    write(pool, target, torch.where(like(last >= 0, own), after, own), keep)


def _first(count: int, accepted: Tensor) -> Tensor:
    """Return which of ``count`` drafts [B, P] are among the first ``accepted``."""
    return torch.arange(count, device=accepted.device) < accepted[:, None]


def _replay_window(window: Tensor, inputs: Tensor, applied: Tensor) -> Tensor:
    """Return windows [B, D, W-1] after those of ``inputs`` [B, P, D] that are ``applied``."""
    for t in range(_last(applied)):
        shifted = torch.cat([window[..., 1:], inputs[:, t, :, None]], dim=-1)
        window = torch.where(like(applied[:, t], window), shifted, window)
    return window


def _replay_state(
    spec: GdnSpec, S: Tensor, drafts: ReplayDrafts, slots: Tensor, live: Tensor, applied: Tensor
) -> Tensor:
    """Return the states after those kept drafts that are ``applied`` [B, P]."""
    k, v, g, beta = (
        read(kept, slots, live, spec.compute_dtype)
        for kept in (drafts.k, drafts.v, drafts.g, drafts.beta)
    )
    _, k = normalise(spec, k, k)
    for t in range(_last(applied)):
        updated, _ = update(S, k[:, t], v[:, t], g[:, t], beta[:, t])
        S = torch.where(like(applied[:, t], S), updated, S)
    return S


def _last(applied: Tensor) -> int:
    """Return how many drafts to look at: up to the last that is applied anywhere."""
    number = torch.arange(1, applied.shape[1] + 1, device=applied.device)
    return most((applied * number).amax(1), applied.shape[1])


def _keep_drafts(kept: Tensor, rows: Tensor, batch: _Batch, values: Tensor) -> None:
    """Store values [B, P, ...] in rows of ``kept``, draft by draft: windows may overlap there."""
    for t in range(most(batch.packed.lengths, values.shape[1])):
        write(kept[:, t], rows, values[:, t], batch.drafted[:, t])


def _rows(metadata: VerifyMetadata, batch: int) -> Tensor:
    """Return the rows of the snapshots."""
    if metadata.rows is None:
        return torch.arange(batch, device=metadata.state_indices.device)
    return metadata.rows[:batch].to(torch.int64)
