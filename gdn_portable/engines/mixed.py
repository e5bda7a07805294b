# SPDX-License-Identifier: Apache-2.0
"""A forward of drafts, decodes and prefills in one batch, as vLLM and ATOM describe it.

The batch is split once into parts that the fused steps take, and every layer runs the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_portable.checks import checked
from gdn_portable.engines.protocols import MixedMetadata
from gdn_portable.errors import InputError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import (
    GdnParams,
    PrefillMetadata,
    VerifyMetadata,
    conv_slot_shape,
    state_slot_shape,
)
from gdn_portable.spec import Op
from gdn_portable.state import StatePool

STEPS = (Op.PREFILL_STEP, Op.DECODE_STEP, Op.VERIFY_STEP)
PLAN = "gdn_portable_plan"  # the attribute of an engine's metadata that holds its plan


class Slots(NamedTuple):
    """Where decodes read, and where they write if that is elsewhere."""

    state_indices: Tensor
    out_state_indices: Tensor | None


Batch = Slots | PrefillMetadata | VerifyMetadata
Launch = Callable[..., Tensor]
Rows = slice | Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rows of a batch that one fused step serves.

    Attributes:
        rows: a range of them, or their numbers.
        batch: names the slots.
        launch: the step, given its metadata.
        check: raises for what ``launch`` would be given; None where nothing is checked.
    """

    rows: Rows
    batch: Batch
    launch: Launch
    check: Launch | None

    def __len__(self) -> int:
        """Count the rows."""
        if isinstance(self.rows, Tensor):
            return len(self.rows)
        return max(int(self.rows.stop) - int(self.rows.start), 0)

    def take(self, tensor: Tensor) -> Tensor:
        """Return the part's rows: a view of a range, a copy of numbered ones."""
        rows = self.rows
        if isinstance(rows, Tensor):
            return tensor.index_select(0, rows)
        return tensor if rows.start == 0 and rows.stop == tensor.shape[0] else tensor[rows]

    def room(self, out: Tensor) -> Tensor:
        """Return where the step writes: a range of ``out``, or memory to copy from."""
        if isinstance(self.rows, Tensor):
            return out.new_empty(len(self), *out.shape[1:])
        return self.take(out)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A batch as every layer runs it.

    Attributes:
        bound: what it was made for.
        num_tokens: rows of the batch; further ones are zeroed.
        parts: between them, all rows.
    """

    bound: MixedOps
    num_tokens: int
    parts: tuple[Part, ...]

    def run(
        self,
        mixed_qkv: Tensor,
        b: Tensor,
        a: Tensor,
        out: Tensor,
        *,
        params: GdnParams,
        pool: StatePool,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Run one layer; arguments are checked, where they are, before the first part runs."""
        count = self.num_tokens
        named = {"mixed_qkv": mixed_qkv, "b": b, "a": a, "gate": gate, "core_attn_out": out}
        for name, tensor in named.items():
            if tensor is not None and tensor.shape[0] < count:
                raise InputError(f"{name} has {len(tensor)} rows, needs the {count} of the batch")
        calls: list[tuple[Part, Tensor, Launch]] = []
        for part in self.parts:
            room = part.room(out)
            inputs = (part.take(mixed_qkv), part.take(a), part.take(b), params, pool)
            keywords = {"gate": None if gate is None else part.take(gate), "out": room}
            if part.check is not None:
                part.check(*inputs, **keywords)
            calls.append((part, room, partial(part.launch, *inputs, **keywords)))
        for part, room, call in calls:
            call()
            if isinstance(part.rows, Tensor):
                out.index_copy_(0, part.rows, room)
        if count < out.shape[0]:
            out[count:].zero_()
        return out


@dataclass(frozen=True, slots=True, eq=False)
class MixedOps:
    """Bound ops, and what an engine's pools and batches are to them.

    Attributes:
        ops: what serves the batches.
        checks: of the steps, by op; empty where arguments are not checked.
        window: shape of a slot of the conv state.
        slot: shape of a slot of the recurrent state.
    """

    ops: GdnOps
    checks: Mapping[Op, Launch]
    window: tuple[int, ...]
    slot: tuple[int, ...]

    @classmethod
    def of(cls, ops: GdnOps, *, check: bool | None = None) -> MixedOps:
        """Take ``ops``; None for ``check`` checks on a CPU, as ``bind`` does."""
        spec = ops.spec
        checking = ops.device.kind == "cpu" if check is None else check
        steps = STEPS if checking else ()
        checks = {op: checked(op, _nothing, spec, ops.device) for op in steps}
        return cls(ops, checks, conv_slot_shape(spec, spec.conv_state_len), state_slot_shape(spec))

    def pool(self, conv_state: Tensor, state: Tensor) -> StatePool:
        """Wrap a layer's tensors as they are.

        Raises:
            InputError: they are not in the layouts and dtypes that the spec declares.
        """
        spec = self.ops.spec
        _check_pool("conv_state", conv_state, self.window, spec.conv_state_dtype)
        _check_pool("state", state, self.slot, spec.state_dtype)
        return StatePool(conv_state, state)

    def plan(
        self,
        metadata: MixedMetadata,
        *,
        read_slots: Tensor | None = None,
        checkpoint_offsets: Tensor | None = None,
        checkpoint_slots: Tensor | None = None,
        seq_lens_cpu: Sequence[int] | None = None,
    ) -> Plan:
        """Split a batch, plan its prefills, and keep the plan on ``metadata``.

        Args:
            metadata: the engine's.
            read_slots: [non-spec] slots read instead of those that are written.
            checkpoint_offsets: [non-spec] as ``PrefillMetadata`` has it.
            checkpoint_slots: [non-spec] where checkpoints go.
            seq_lens_cpu: lengths of the prefills on the host, where they are known.

        Raises:
            InputError: fields are missing, too short, or do not fit the spec.
        """
        drafts, others = _rows(metadata)
        if self.checks and isinstance(drafts, Tensor) and isinstance(others, Tensor):
            _check_rows(torch.cat([drafts, others]))
        parts: list[Part] = []
        if metadata.num_spec_decodes:
            verify = self._verify(metadata)
            parts.append(self._part(Op.VERIFY_STEP, drafts, verify, metadata=verify))
        leading = _leading(metadata, others)
        if leading:
            written = _needed(metadata, "non_spec_state_indices_tensor", leading)[:leading]
            read = written if read_slots is None else _at_least("read_slots", read_slots, leading)
            decode = Slots(read[:leading], None if read_slots is None else written)
            rows = _cut(others, 0, leading)
            parts.append(self._part(Op.DECODE_STEP, rows, decode, **decode._asdict()))
        if metadata.num_prefills:
            prefill = _prefill(metadata, leading, read_slots, seq_lens_cpu)
            if checkpoint_offsets is not None and checkpoint_slots is not None:
                prefill.checkpoint_offsets = checkpoint_offsets[leading:]
                prefill.checkpoint_indices = checkpoint_slots[leading:]
            self.ops.plan_prefill(prefill)
            rows = _cut(others, leading, None)
            parts.append(self._part(Op.PREFILL_STEP, rows, prefill, metadata=prefill))
        if self.checks:
            _check_apart(parts, self.ops.spec.pad_slot)
        plan = Plan(self, sum(map(Part.__len__, parts)), tuple(parts))
        try:
            setattr(metadata, PLAN, plan)
        except AttributeError as error:
            kind = type(metadata).__name__
            raise InputError(f"metadata is a {kind}, needs room for {PLAN}: {error}") from error
        return plan

    def kept(self, metadata: MixedMetadata) -> Plan | None:
        """Return the plan that these ops made of ``metadata``, None where they made none."""
        plan: Plan | None = getattr(metadata, PLAN, None)
        return plan if plan is not None and plan.bound is self else None

    def _part(self, op: Op, rows: Rows, batch: Batch, **named: object) -> Part:
        check = self.checks.get(op)
        launch: Launch = getattr(self.ops, op.value)
        return Part(rows, batch, partial(launch, **named), check and partial(check, **named))

    def _verify(self, metadata: MixedMetadata) -> VerifyMetadata:
        count, spec = metadata.num_spec_decodes, self.ops.spec
        slots = _needed(metadata, "spec_state_indices_tensor", count)[:count]
        most = spec.conv_state_len - spec.conv_width + 2
        if slots.dim() != 2 or slots.shape[1] > most:
            raise InputError(
                f"spec_state_indices_tensor is {list(slots.shape)}, needs [sequences, drafts] with "
                f"at most {most} drafts: windows have {spec.conv_state_len} columns"
            )
        return VerifyMetadata(
            state_indices=slots,
            max_drafts=slots.shape[1],
            cu_seqlens=_needed(metadata, "spec_query_start_loc", count + 1)[: count + 1],
            num_accepted=_needed(metadata, "num_accepted_tokens", count)[:count],
        )


def _prefill(
    metadata: MixedMetadata,
    decodes: int,
    read_slots: Tensor | None,
    seq_lens_cpu: Sequence[int] | None,
) -> PrefillMetadata:
    """Return the batch of the sequences after the decodes."""
    offsets = _needed(metadata, "non_spec_query_start_loc", decodes + 2)
    count = len(offsets) - 1
    written = _needed(metadata, "non_spec_state_indices_tensor", count)[decodes:count]
    read = (
        written if read_slots is None else _at_least("read_slots", read_slots, count)[decodes:count]
    )
    return PrefillMetadata(
        cu_seqlens=offsets[decodes:] - decodes if decodes else offsets,
        state_indices=read,
        has_initial_state=_needed(metadata, "has_initial_state", count)[decodes:count],
        out_state_indices=None if read_slots is None else written,
        seq_lens_cpu=seq_lens_cpu,
    )


def _rows(metadata: MixedMetadata) -> tuple[Rows, Rows]:
    """Return the rows of drafts, and the others."""
    whole, none = slice(0, metadata.num_actual_tokens), slice(0, 0)
    if not metadata.num_spec_decodes:
        return none, whole
    if not metadata.num_prefills and not metadata.num_decodes:
        return whole, none
    drafts = _needed(metadata, "spec_token_indx", 0).long()
    return drafts, _needed(metadata, "non_spec_token_indx", 0).long()


def _leading(metadata: MixedMetadata, others: Rows) -> int:
    """Return how many of the other rows are decodes, padding included where nothing follows."""
    decodes = metadata.num_decodes
    if metadata.num_decode_tokens != decodes:
        raise InputError(
            f"num_decode_tokens is {metadata.num_decode_tokens}, needs num_decodes ({decodes}): "
            "a sequence without drafts decodes one token"
        )
    if isinstance(others, Tensor) and not metadata.num_prefills and len(others) != decodes:
        raise InputError(f"non_spec_token_indx has {len(others)} rows, needs {decodes} of decodes")
    if metadata.num_prefills or not decodes or isinstance(others, Tensor):
        return decodes
    slots = _needed(metadata, "non_spec_state_indices_tensor", decodes)
    return max(decodes, min(len(slots), metadata.num_actual_tokens))


def _cut(rows: Rows, start: int, stop: int | None) -> Rows:
    if isinstance(rows, Tensor):
        return rows[start:stop]
    return slice(start, rows.stop if stop is None else stop)


def _needed(metadata: MixedMetadata, name: str, length: int) -> Tensor:
    """Return a field that has to be there."""
    tensor: Tensor | None = getattr(metadata, name)
    if tensor is None:
        raise InputError(f"{name} is None, needs a tensor for such a batch")
    return _at_least(name, tensor, length)


def _at_least(name: str, tensor: Tensor, length: int) -> Tensor:
    if len(tensor) < length:
        raise InputError(f"{name} has {len(tensor)} entries, needs at least {length}")
    return tensor


def _check_rows(rows: Tensor) -> None:
    if not torch.equal(rows.sort().values, torch.arange(len(rows), device=rows.device)):
        raise InputError(
            f"spec_token_indx and non_spec_token_indx name rows {rows.tolist()}, need each of "
            f"0 to {len(rows) - 1} once"
        )


def _check_apart(parts: Sequence[Part], pad_slot: int) -> None:
    """Refuse a slot that one part writes and another reads or writes."""
    used: list[tuple[set[int], set[int]]] = []
    for batch in (part.batch for part in parts):
        target = getattr(batch, "out_state_indices", None)
        kept = getattr(batch, "checkpoint_indices", None)
        written = _numbers(batch.state_indices if target is None else target) | _numbers(kept)
        used.append((written, written | _numbers(batch.state_indices)))
    for (written, _), (_, other) in permutations(used, 2):
        shared = sorted(slot for slot in written & other if slot > pad_slot)
        if shared:
            raise InputError(
                f"slot {shared[0]} is written for one sequence and used for another, needs one each"
            )


def _numbers(slots: Tensor | None) -> set[int]:
    return set() if slots is None else set(slots.flatten().tolist())


def _check_pool(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape[1:] != shape or tensor.dtype != dtype:
        raise InputError(
            f"{name} is {list(tensor.shape)} in {tensor.dtype}, needs "
            f"[slots, {', '.join(map(str, shape))}] in {dtype}"
        )


def _nothing(*_args: object, **_kwargs: object) -> None:
    """Stand for a kernel where arguments are only checked."""
