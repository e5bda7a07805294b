# SPDX-License-Identifier: Apache-2.0
"""Run every op on private memory as engines call it, so that nothing compiles later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gdn_portable.checks.tensors import INTEGERS
from gdn_portable.errors import InputError, UnsupportedCallError
from gdn_portable.metadata import (
    DeferredUpdates,
    DraftProtocol,
    Drafts,
    GdnParams,
    Plans,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    VerifyMetadata,
)
from gdn_portable.spec import Device, GdnSpec, Op, torch_device
from gdn_portable.state import StatePool
from gdn_portable.steps import split_qkv

SHORT = 64  # tokens of a prefill that no kernel cuts into segments
DECODE = (Op.CONV1D_UPDATE, Op.RECURRENT_DECODE, Op.DECODE_STEP)
HEADS = 128  # of value, of all sequences of a batch, that fill any device


def warmup(
    spec: GdnSpec,
    device: Device,
    launchers: Mapping[Op, Callable[..., Any]],
    *,
    batch_sizes: Sequence[int] = (1,),
    prefill_tokens: Sequence[int] = (64,),
    max_drafts: int = 4,
    max_deferred: int = 0,
    protocols: Collection[DraftProtocol] | None = None,
    index_dtypes: Collection[torch.dtype] = INTEGERS,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Run the ops and the steps for every size, with every argument that may be given or not."""
    protocols = tuple(DraftProtocol) if protocols is None else protocols
    _refuse_others("index_dtypes", index_dtypes, INTEGERS)
    _refuse_others("protocols", protocols, tuple(DraftProtocol))
    _refuse_sizes("batch_sizes", batch_sizes)
    _refuse_sizes("prefill_tokens", prefill_tokens)
    _refuse_sizes("max_drafts", (max_drafts,))
    _refuse_sizes("max_deferred", (max_deferred,))
    say = progress or (lambda _: None)
    target = torch_device(device)
    with torch.device(target), torch.no_grad():
        for dtype in index_dtypes:
            name = str(dtype).removeprefix("torch.")
            calls = _Calls(spec, launchers, target, dtype)
            for tokens in filter(None, prefill_tokens):
                say(f"prefill of {tokens} tokens, {name} indices")
                calls.prefill(tokens)
            for batch in filter(None, batch_sizes):
                say(f"decode of {batch} sequences, {name} indices")
                calls.decode(batch)
                if max_deferred:
                    say(f"decode of {batch} sequences that defers, {name} indices")
                    calls.defer(batch, max_deferred)
                if max_drafts and protocols:
                    say(f"verify of {batch} sequences with {max_drafts} drafts, {name} indices")
                    calls.verify(batch, max_drafts, protocols)


def _refuse_others(name: str, given: Collection[object], known: Collection[object]) -> None:
    for value in given:
        if value not in known:
            raise InputError(f"{name} has {value}, needs {' or '.join(map(str, known))}")


def _refuse_sizes(name: str, given: object) -> None:
    sizes = given if isinstance(given, Collection) else [None]
    if any(not isinstance(size, int) or size < 0 for size in sizes):
        raise InputError(f"{name} is {given!r}, needs whole numbers of at least 0")


@dataclass(frozen=True, slots=True)
class _Calls:
    """What an engine may call with index tensors of one dtype."""

    spec: GdnSpec
    launchers: Mapping[Op, Callable[..., Any]]
    device: torch.device
    dtype: torch.dtype

    def prefill(self, tokens: int) -> None:
        """Run a prefill, a short one and many, from old states and new, and with states kept."""
        pool = self._pool(3)
        many = -(-HEADS // self.spec.num_v_heads)
        batches = [(length, self._slots(1)) for length in sorted({tokens, min(tokens, SHORT)})]
        # of padding, which needs no pool
        batches.append((many, torch.full((many,), self.spec.pad_slot, dtype=self.dtype)))
        for length, slots in batches:
            N = len(slots)
            cu_seqlens = torch.arange(0, length + 1, length // N, dtype=self.dtype)
            fresh, kept = torch.ones(N, dtype=torch.bool), (torch.zeros_like(slots), slots + 2)
            nothing = (None, None)
            options = product((fresh,), (None, slots + 1), (nothing, kept))
            for flags, target, checkpoint in ((None, None, nothing), *options):
                metadata = PrefillMetadata(cu_seqlens, slots, flags, target, *checkpoint)
                self.launchers[Op.PLAN_PREFILL](metadata)
                if isinstance(metadata.plan, Plans):
                    metadata.plan.runs_all = True
                prefill = (Op.CONV1D_PREFILL, Op.CHUNK_PREFILL, Op.PREFILL_STEP)
                self._run(prefill, length, pool, metadata=metadata)

    def decode(self, batch: int) -> None:
        """Run a decode in place, and into other slots."""
        slots, pool = self._slots(batch), self._pool(2 * batch)
        self._run(DECODE, batch, pool, state_indices=slots)
        others = slots + batch
        self._run(DECODE, batch, pool, state_indices=slots, out_state_indices=others)

    def defer(self, batch: int, max_deferred: int) -> None:
        """Run a decode that writes its states now and then, when it says so, and elsewhere."""
        slots, pool = self._slots(batch), self._pool(2 * batch)
        count, flush = torch.zeros_like(slots), torch.zeros(batch, dtype=torch.bool)
        rows = self._slot(batch)
        kept = DeferredUpdates.allocate(self.spec, rows, max_deferred, self.device)
        updates = {"deferred": kept, "num_deferred": count}
        for flag, target in ((None, None), (flush, None), (None, slots + batch)):
            indices = {"state_indices": slots, "out_state_indices": target}
            self._run(DECODE, batch, pool, {**updates, "flush": flag}, **indices)

    def verify(self, batch: int, max_drafts: int, protocols: Collection[DraftProtocol]) -> None:
        """Verify and commit under every protocol that the spec has room for."""
        slots = self._slots(batch)
        if DraftProtocol.REPLAY in protocols:
            replay = ReplayDrafts.allocate(self.spec, self._slot(batch), max_drafts, self.device)
            self._verify(VerifyMetadata(slots, max_drafts), replay)
        if DraftProtocol.SNAPSHOT in protocols:
            snapshots = SnapshotDrafts.allocate(self.spec, batch, max_drafts, self.device)
            self._verify(VerifyMetadata(slots, max_drafts), snapshots)
        has_room = self.spec.conv_state_len >= self.spec.conv_width - 2 + max_drafts
        if DraftProtocol.SLOT_TABLE in protocols and has_room:
            table = self._slots(batch * max_drafts).view(batch, max_drafts)
            self._verify(VerifyMetadata(table, max_drafts), None)

    def _verify(self, metadata: VerifyMetadata, drafts: Drafts | None) -> None:
        slots, pool = metadata.state_indices, self._pool(2 * metadata.state_indices.numel())
        verify = (Op.CONV1D_VERIFY, Op.MTP_VERIFY, Op.VERIFY_STEP)
        for batch in self._shapes(metadata, drafts):
            tokens = len(slots) * batch.max_drafts
            self._run(verify, tokens, pool, metadata=batch, drafts=drafts)
            if drafts is None:
                continue
            last = torch.zeros_like(slots)
            self._call(Op.MTP_COMMIT, pool, drafts, metadata=batch, last_accepted=last)
            others = slots + len(slots)
            kept = {"last_accepted": last, "out_state_indices": others}
            self._call(Op.MTP_COMMIT, pool, drafts, metadata=batch, **kept)

    def _shapes(self, metadata: VerifyMetadata, drafts: Drafts | None) -> Iterator[VerifyMetadata]:
        """Yield a batch as it may come: of chains or trees, all as long or not, in rows or not."""
        batch, P = len(metadata.state_indices), metadata.max_drafts
        counts = torch.arange(batch + 1, dtype=self.dtype)
        parents = torch.zeros(batch, P, dtype=self.dtype)
        none = parents - 1
        trees = replace(metadata, parents=parents, next_token=none, next_sibling=none)
        accepted: list[Tensor | None] = [None]
        if not isinstance(drafts, SnapshotDrafts):  # which do not read it
            accepted.append(torch.ones_like(counts[1:]))
        for batches in (metadata,) if drafts is None else (metadata, trees):
            for cu_seqlens, pending in product((None, counts * P), accepted):
                drafted = replace(batches, cu_seqlens=cu_seqlens, num_accepted=pending)
                yield drafted
                if isinstance(drafts, SnapshotDrafts):
                    yield replace(drafted, rows=counts[:batch])

    def _run(
        self,
        ops: tuple[Op, Op, Op],
        tokens: int,
        pool: StatePool,
        updates: Mapping[str, Any] | None = None,
        **batch: Any,
    ) -> None:
        """Run a convolution, a recurrence, their step, and what stands between them, on ones."""
        (conv, rule, step), updates = ops, updates or {}
        HV, V, D, dtype = (
            self.spec.num_v_heads,
            self.spec.head_v_dim,
            self.spec.conv_dim,
            self.spec.dtype,
        )
        mixed = torch.ones(tokens, D, dtype=dtype)
        a = torch.ones(tokens, HV, dtype=dtype)
        gate = torch.ones(tokens, HV, V, dtype=dtype)
        plain = GdnParams(
            conv_weight=torch.ones(D, self.spec.conv_width, dtype=dtype),
            A_log=torch.zeros(HV),
            dt_bias=torch.zeros(HV),
            norm_weight=torch.ones(V, dtype=dtype),
        )
        biased = replace(plain, conv_bias=torch.zeros(D, dtype=dtype))
        held = replace(plain, dt_bias=plain.dt_bias.to(dtype))  # as checkpoints have it
        rates = (plain,) if dtype is torch.float32 else (plain, held)
        for params in (plain, biased):
            window = (params.conv_weight, params.conv_bias, pool.conv_state)
            self._call(conv, mixed, *window, **batch)
        q, k, v = split_qkv(self.spec, mixed)
        for params in rates:
            gates = (a, a, params.A_log, params.dt_bias)
            g_beta = self._call(Op.GATING, *gates)
            gates = g_beta if rule is Op.CHUNK_PREFILL else gates
            self._call(rule, q, k, v, *gates, pool.state, **updates, **batch)
        o = torch.ones(tokens, HV, V, dtype=dtype)
        self._call(Op.GATED_RMS_NORM, o, gate, plain.norm_weight, eps=plain.norm_eps)
        for params, given in product((*rates, biased), (None, gate)):
            self._call(step, mixed, a, a, params, pool, gate=given, **updates, **batch)

    def _call(self, op: Op, *args: Any, **kwargs: Any) -> Any:
        """Run an op, unless its kernel cannot do such a call: then there is nothing to warm."""
        with contextlib.suppress(UnsupportedCallError):
            return self.launchers[op](*args, **kwargs)

    def _slot(self, index: int) -> int:
        """Return the ``index``-th slot that is not padding."""
        return max(self.spec.pad_slot + 1, 0) + index

    def _slots(self, count: int) -> Tensor:
        return torch.arange(count, dtype=self.dtype) + self._slot(0)

    def _pool(self, slots: int) -> StatePool:
        return StatePool.allocate(self.spec, self._slot(slots), self.device)
