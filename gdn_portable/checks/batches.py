# SPDX-License-Identifier: Apache-2.0
"""Rules for a batch as a whole: what its sequences read, write and keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gdn_portable.checks.tensors import Rules, shape_text
from gdn_portable.errors import InputError
from gdn_portable.metadata import (
    DraftProtocol,
    Drafts,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    VerifyMetadata,
    commit_batch,
    conv_slot_shape,
    draft_protocol,
    given,
    state_slot_shape,
)
from gdn_portable.spec import Op


def prefill(
    rules: Rules,
    op: Op,
    metadata: PrefillMetadata,
    rows: int,
    slots: int,
    checkpoint_state: Tensor | None,
    g: Tensor | None,
) -> None:
    """Check a packed batch against the pools, and its decay where that is given."""
    planned_only = op is Op.PLAN_PREFILL
    lengths = rules.lengths(metadata.cu_seqlens, None if planned_only else rows)
    if metadata.seq_lens_cpu is not None and [*map(int, metadata.seq_lens_cpu)] != lengths:
        raise InputError(
            f"seq_lens_cpu is {list(metadata.seq_lens_cpu)}, needs {lengths} as cu_seqlens says"
        )
    if planned_only:
        return
    made_for = getattr(metadata.plan, "cu_seqlens", None)
    if made_for is not None and not torch.equal(made_for, metadata.cu_seqlens):
        raise InputError(
            f"plan was made for other cu_seqlens, needs plan_prefill again: {made_for.tolist()}"
        )
    N = len(lengths)
    source = rules.slots("state_indices", metadata.state_indices, N, slots)
    target = rules.targets(metadata.out_state_indices, source, slots)
    live, reads = rules.live(source), list(source)
    if metadata.has_initial_state is not None:
        flags = rules.indices("has_initial_state", metadata.has_initial_state, N, (torch.bool,))
        pad = rules.spec.pad_slot
        reads = [s if f else pad for s, f in zip(source, flags, strict=True)]
    rules.exclusive(live, reads, target)
    if g is not None:
        _decay(g, lengths, live)
    _checkpoints(
        rules,
        metadata,
        lengths,
        live,
        target,
        reads,
        slots,
        checkpoint_state,
    )


def _decay(g: Tensor, lengths: list[int], live: list[bool]) -> None:
    for i, rows in enumerate(g[: sum(lengths)].detach().split(lengths)):
        if live[i] and rows.numel() and rows.max() > 0:
            raise InputError(f"g is {rows.max():g} in sequence {i}, needs at most 0: a log decay")


def _checkpoints(
    rules: Rules,
    metadata: PrefillMetadata,
    lengths: list[int],
    live: list[bool],
    target: list[int],
    reads: list[int],
    slots: int,
    checkpoint_state: Tensor | None,
) -> None:
    given, places = metadata.checkpoint_offsets, metadata.checkpoint_indices
    if given is None or places is None:
        if given is not places:
            raise InputError("checkpoint_offsets and checkpoint_indices: needs both or neither")
        return
    offsets = rules.indices("checkpoint_offsets", given, len(lengths))
    if checkpoint_state is not None:
        rules.state("checkpoint_state", checkpoint_state, rules.double_or_float())
        slots = len(checkpoint_state)
    wanted = [on and offset >= 0 for on, offset in zip(live, offsets, strict=True)]
    where = rules.slots("checkpoint_indices", places, len(lengths), slots, wanted)
    for i, offset in enumerate(offsets):
        if wanted[i] and offset > lengths[i]:
            raise InputError(
                f"checkpoint_offsets[{i}] is {offset}, needs at most the length {lengths[i]}"
            )
    pad = rules.spec.pad_slot if checkpoint_state is None else -1
    wanted = [on and row > pad for on, row in zip(wanted, where, strict=True)]
    rules.exclusive(wanted, [pad] * len(where), where, pad=pad)
    if checkpoint_state is None:
        used = {slot for slot, on in zip(target, live, strict=True) if on}
        used |= {slot for slot, on in zip(reads, live, strict=True) if on}
        for i, slot in enumerate(where):
            if wanted[i] and slot in used:
                raise InputError(
                    f"checkpoint_indices[{i}] is {slot}, needs a slot that no sequence uses"
                )


def verify(
    rules: Rules,
    metadata: VerifyMetadata,
    drafts: Drafts | None,
    rows: int,
    slots: int,
    conv_state: Tensor | None,
    state: Tensor | None,
) -> None:
    """Check drafts against the protocol they name."""
    protocol, P = draft_protocol(metadata, drafts), metadata.max_drafts
    lengths = _draft_lengths(rules, metadata, rows)
    B = len(lengths)
    accepted = [0] * B
    if metadata.num_accepted is not None:
        accepted = rules.indices("num_accepted", metadata.num_accepted, B)
    if protocol is DraftProtocol.SLOT_TABLE:
        source = _slot_table(rules, metadata, accepted, lengths, slots, conv_state)
    else:
        source = rules.slots("state_indices", metadata.state_indices, B, slots)
    live, most = rules.live(source), P
    if isinstance(drafts, ReplayDrafts):
        rules.exclusive(live, source, source)
        most = _replay(rules, drafts, P, slots)
    elif isinstance(drafts, SnapshotDrafts):
        used = _snapshots(rules, metadata, drafts, live, conv_state, state)
        if len(set(used)) < len(used):
            raise InputError(f"rows is {used}, needs each row once")
    elif metadata.state_indices.dim() == 2:
        most = metadata.state_indices.shape[1]
        if conv_state is not None:
            columns = conv_state.shape[rules.time_axis()]
            most = min(most, columns - (rules.spec.conv_width - 1) + 1)
    for i, count in enumerate(accepted):
        if live[i] and not 0 <= count <= most and not isinstance(drafts, SnapshotDrafts):
            raise InputError(f"num_accepted[{i}] is {count}, needs 0 to {most}")
    _tree(metadata, lengths, live)


def _draft_lengths(rules: Rules, metadata: VerifyMetadata, rows: int) -> list[int]:
    P = _most_drafts(metadata)
    if metadata.cu_seqlens is None:
        if rows % P:
            raise InputError(
                f"{rows} draft tokens without cu_seqlens, needs a multiple of max_drafts ({P}), "
                "which counts the root"
            )
        B, slots = rows // P, metadata.state_indices
        if slots.dim() == 1 and len(slots) < B:
            raise InputError(
                f"state_indices is {shape_text(slots.shape)}, needs one axis of at least {B}: "
                f"{rows} draft tokens are {B} sequences of max_drafts ({P}), which counts the root"
            )
        return [P] * B
    lengths = rules.lengths(metadata.cu_seqlens, rows)
    if max(lengths, default=0) > P:
        raise InputError(f"a sequence has {max(lengths)} drafts, needs at most {P}")
    return lengths


def _most_drafts(metadata: VerifyMetadata) -> int:
    P = metadata.max_drafts
    if not isinstance(P, int):
        raise InputError(f"max_drafts is {P!r}, needs an integer")
    if P < 1:
        raise InputError(f"max_drafts is {P}, needs at least 1: the root counts")
    return P


def _slot_table(
    rules: Rules,
    metadata: VerifyMetadata,
    accepted: list[int],
    lengths: list[int],
    slots: int,
    conv_state: Tensor | None,
) -> list[int]:
    """Check [B, P] slots; return the slot that each sequence is read from."""
    table, P = metadata.state_indices, metadata.max_drafts
    B = len(lengths)
    if table.shape[0] < B or table.shape[1] < P:
        raise InputError(
            f"state_indices is {shape_text(table.shape)}, needs {shape_text((B, P))} [B, P]"
        )
    if conv_state is not None:
        columns, needed = conv_state.shape[rules.time_axis()], rules.spec.conv_width - 1 + P - 1
        if columns < needed:
            raise InputError(
                f"conv_state has windows of {columns} columns, needs {needed} for a slot table "
                f"of {P} drafts: set conv_window in the spec"
            )
    named: list[list[int]] = table[:B].tolist()
    writer: dict[int, int] = {}
    source = []
    pad = rules.spec.pad_slot
    for i, row in enumerate(named):
        rules.slots(f"state_indices[{i}]", table[i], len(row), slots)
        source.append(row[min(max(accepted[i], 1), len(row)) - 1])
        if conv_state is not None and lengths[i] and (row[0] > pad) != (source[i] > pad):
            raise InputError(
                f"state_indices[{i}] is {row}, needs both or neither of padding: the window is in "
                f"slot {row[0]}, and num_accepted {accepted[i]} reads the state in slot {source[i]}"
            )
        written = row[: lengths[i]] if source[i] > pad else []
        for t, slot in enumerate(written):
            if slot > pad and (slot in row[:t] or writer.setdefault(slot, i) != i):
                raise InputError(f"state_indices names slot {slot} twice, needs it once")
    for i, slot in enumerate(source):
        if slot > pad and writer.get(slot, i) != i:
            raise InputError(
                f"row {i} reads slot {slot}, which row {writer[slot]} writes: needs separate slots"
            )
    return source


def _replay(rules: Rules, drafts: ReplayDrafts, P: int, slots: int) -> int:
    """Check kept inputs; return how many drafts they have room for."""
    spec, room = rules.spec, drafts.k.shape[1] if drafts.k.dim() > 1 else 0
    shapes = {
        "k": (spec.num_k_heads, spec.head_k_dim),
        "v": (spec.num_v_heads, spec.head_v_dim),
        "g": (spec.num_v_heads,),
        "beta": (spec.num_v_heads,),
        "conv_inputs": (spec.conv_dim,),
    }
    for name, shape in shapes.items():
        dtype = spec.compute_dtype if name in ("g", "beta") else spec.dtype
        shape = (max(P, room), *shape)
        rules.kept(f"drafts.{name}", getattr(drafts, name), slots, shape, (dtype,))
    return room


def _snapshots(
    rules: Rules,
    metadata: VerifyMetadata,
    drafts: SnapshotDrafts,
    live: list[bool],
    conv_state: Tensor | None,
    state: Tensor | None,
) -> list[int]:
    """Check what states and windows are kept in; return the rows of live sequences."""
    B, P, spec = len(live), metadata.max_drafts, rules.spec
    kept_of = (
        ("conv_state", drafts.conv_state, conv_state, conv_slot_shape(spec, spec.conv_width - 1)),
        ("state", drafts.state, state, state_slot_shape(spec)),
    )
    rows = list(range(B))
    if metadata.rows is not None:
        rows = rules.indices("rows", metadata.rows, B)
    for name, kept, pool, shape in kept_of:
        if pool is None:
            continue
        kept = given(f"drafts.{name}", kept)
        steps_fit = kept.dim() == len(shape) + 2 and kept.shape[1] >= P
        if not steps_fit or tuple(kept.shape[2:]) != shape:
            needed = shape_text(("rows", P, *shape))
            raise InputError(f"drafts.{name} has shape {shape_text(kept.shape)}, needs {needed}")
        rules.dtype_and_device(f"drafts.{name}", kept, (pool.dtype,))
        # the windows of a chain may overlap, those of one of its drafts not
        chained = name == "conv_state" and kept.stride(1) == kept.stride(rules.time_axis())
        if chained and metadata.is_tree and kept.shape[rules.time_axis()] > 1:
            raise InputError(
                "drafts.conv_state has overlapping windows, which hold a chain; a tree needs "
                "windows of its own for each draft"
            )
        rules.writable(f"drafts.{name}", kept[:, 0] if chained else kept)
        for i, row in enumerate(rows):
            if live[i] and not 0 <= row < len(kept):
                raise InputError(f"rows[{i}] is {row}, needs 0 to {len(kept) - 1}")
    return [row for row, on in zip(rows, live, strict=True) if on]


def _tree(metadata: VerifyMetadata, lengths: list[int], live: list[bool]) -> None:
    B, P = len(lengths), metadata.max_drafts
    if (metadata.next_token is None) != (metadata.next_sibling is None):
        raise InputError("next_token and next_sibling: needs both or neither")
    for name in ("parents", "next_token", "next_sibling"):
        links = getattr(metadata, name)
        if links is None:
            continue
        if links.dim() != 2 or links.shape[0] < B or links.shape[1] < P:
            raise InputError(
                f"{name} is {shape_text(links.shape)}, needs {shape_text((B, P))} [B, P]"
            )
        if name == "parents" and metadata.next_token is not None:
            continue  # filled from the links
        for i, row in enumerate(links[:B].tolist()):
            for t in range(lengths[i] if live[i] else 0):
                low, high = (0, t - 1) if name == "parents" else (t + 1, P - 1)
                none = t == 0 if name == "parents" else row[t] == -1
                if not none and not low <= row[t] <= high:
                    raise InputError(
                        f"{name}[{i}, {t}] is {row[t]}, needs {low} to {high}"
                        + ("" if name == "parents" else ", or -1 for none")
                    )
    if metadata.next_token is None or metadata.next_sibling is None:
        return
    links = torch.cat([metadata.next_token[:B, :P], metadata.next_sibling[:B, :P]], dim=1)
    for i, row in enumerate(links.tolist()):
        named = [row[t] for t in range(2 * P) if live[i] and t % P < lengths[i] and row[t] >= 0]
        if len(set(named)) < len(named):
            raise InputError(f"next_token and next_sibling of row {i} name a draft twice: {named}")


def _layers(rules: Rules, drafts: Drafts, conv_state: Tensor | None, state: Tensor | None) -> None:
    """Check the axis of layers that pools have in front."""
    if isinstance(drafts, ReplayDrafts):
        raise InputError("pool has an axis of layers, needs one layer: so have ReplayDrafts")
    counts = {}
    for pool, kept, name in (
        (conv_state, drafts.conv_state, "conv_state"),
        (state, drafts.state, "state"),
    ):
        if pool is None or kept is None:
            continue
        counts[f"pool.{name}"], counts[f"drafts.{name}"] = len(pool), len(kept)
        rules.writable(f"pool.{name}", pool)
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise InputError(f"layers are {counts}, needs the same number of all, at least 1")


def commit(
    rules: Rules, conv_state: Tensor | None, state: Tensor | None, arguments: Mapping[str, Any]
) -> None:
    """Check what is to be kept."""
    metadata, drafts = arguments["metadata"], arguments["drafts"]
    last = arguments["last_accepted"]
    draft_protocol(metadata, drafts)
    layered = state is not None and state.dim() == 5
    layered = layered or (conv_state is not None and conv_state.dim() == 4)
    if layered:
        _layers(rules, drafts, conv_state, state)
    windows, states = (
        pool[0] if layered and pool is not None else pool for pool in (conv_state, state)
    )
    slots = rules.pools(windows, states)
    rules.indices("state_indices", metadata.state_indices, 0)
    rules.indices("last_accepted", last, 0)
    B = commit_batch(metadata, last)
    source = rules.slots("state_indices", metadata.state_indices, B, slots)
    target = rules.targets(arguments.get("out_state_indices"), source, slots)
    live = rules.live(source)
    lengths = [_most_drafts(metadata)] * B
    if metadata.cu_seqlens is not None:
        lengths = rules.lengths(metadata.cu_seqlens, None)
    for i, draft in enumerate(rules.indices("last_accepted", last, B)):
        if live[i] and not -1 <= draft < lengths[i]:
            raise InputError(f"last_accepted[{i}] is {draft}, needs -1 to {lengths[i] - 1}")
    rules.exclusive(live, source, target)
    _tree(metadata, lengths, live)
    if isinstance(drafts, ReplayDrafts):
        _replay(rules, drafts, metadata.max_drafts, slots)
    else:
        kept = SnapshotDrafts(
            *(
                part[0] if layered and part is not None else part
                for part in (drafts.conv_state, drafts.state)
            )
        )
        _snapshots(rules, metadata, kept, live, windows, states)
