# SPDX-License-Identifier: Apache-2.0
"""Inputs as a model gives them, drawn many times over so that none is in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from gdn_portable.bench.cases import FRONT_END, VERIFY_OPS, Case, Gates
from gdn_portable.metadata import (
    DeferredUpdates,
    DraftProtocol,
    Drafts,
    GdnParams,
    PrefillMetadata,
    ReplayDrafts,
    SnapshotDrafts,
    VerifyMetadata,
)
from gdn_portable.spec import GdnSpec
from gdn_portable.state import StatePool
from gdn_portable.steps import split_qkv

DECAY_RATES = {Gates.REAL: (0.01, 16.0), Gates.SLOW: (1e-4, 1e-3)}  # bounds of A
STATE_SCALE = 0.1
CONV_OPS = ("conv1d_update", "conv1d_prefill", FRONT_END)
RULE_OPS = ("recurrent_decode", "chunk_prefill", "mtp_verify")


class Slots:
    """The index tensors of a case. All draws share them: libraries cache by their identity."""

    def __init__(self, case: Case, device: torch.device, generator: torch.Generator) -> None:
        N = case.num_sequences
        self.lengths = case.lengths
        self.accepted = case.num_accepted
        self.table = case.protocol is DraftProtocol.SLOT_TABLE
        rows = N * case.drafts if self.table else N
        order = torch.randperm(rows, generator=generator, device=device)
        self.num_slots = rows + 1  # slot 0 is nobody's: some libraries write it
        self.slots = (order + 1).to(torch.int32)  # [N], or [N * P] of a table
        self.cu_seqlens = torch.tensor((0, *case.lengths), device=device).cumsum(0)
        self.cu_seqlens_int32 = self.cu_seqlens.to(torch.int32)
        self.num_accepted = torch.full((N,), self.accepted, dtype=torch.int32, device=device)
        self.last_accepted = self.num_accepted - 1
        self.num_deferred = torch.tensor(case.num_deferred, dtype=torch.int32, device=device)
        self.rows = torch.arange(N, dtype=torch.int32, device=device)
        self.has_initial_state = torch.ones(N, dtype=torch.bool, device=device)

    @cached_property
    def read(self) -> Tensor:
        """Return the slots whose state a call starts from, [N]."""
        return self.by_draft[:, self.accepted - 1].contiguous() if self.table else self.slots

    @cached_property
    def by_draft(self) -> Tensor:
        """Return a slot table, [N, P]."""
        return self.slots.view(len(self.lengths), -1)


class Batch:
    """The tensors of one call, of the case's dtypes and on its device.

    ``mixed`` are inputs of the conv where the op has one, else what a conv gave: [T, D] either way.
    """

    def __init__(self, case: Case, slots: Slots, device: torch.device, seed: int) -> None:
        spec, T = case.spec, case.num_tokens
        self.case, self.spec, self.slots, self.device, self.seed = case, spec, slots, device, seed
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=device)
            return drawn.to(spec.dtype)

        self.a, self.b = normal(T, spec.num_v_heads), normal(T, spec.num_v_heads)
        self.params = draw_params(spec, case.gates, device, generator)
        self.pool = _pool(case, slots.num_slots, device)
        self._drafts: Drafts | None = None
        self.deferred: DeferredUpdates | None = None
        self.shared: dict[str, Tensor] = {}  # what parts of a peer hand to each other
        if case.deferred:
            rows = slots.num_slots
            self.deferred = DeferredUpdates.allocate(spec, rows, case.deferred, device)
        if case.op == "gated_rms_norm":
            self.x = normal(T, spec.num_v_heads, spec.head_v_dim)
            self.gate = normal(T, spec.num_v_heads, spec.head_v_dim)
            return
        self.mixed = normal(T, spec.conv_dim)
        if case.op in RULE_OPS:
            self.mixed = functional.silu(self.mixed)
        if case.op == "chunk_prefill":
            q, k, v = split_qkv(spec, self.mixed)
            self.q, self.k, self.v = _unit(q), _unit(k), v.contiguous()
            self.g, self.beta = gates_of(self.params, self.a, self.b)
            del self.mixed
        if case.op in VERIFY_OPS:
            self._drafts = self._allocate_drafts()

    def refresh(self) -> None:
        """Give the states the values they were first drawn with."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        for pool in (self.pool.state, self.pool.conv_state):
            if pool is not None:
                pool.normal_(std=STATE_SCALE, generator=generator)
        if isinstance(self._drafts, ReplayDrafts):
            for kept in (self._drafts.k, self._drafts.v, self._drafts.conv_inputs):
                kept.normal_(generator=generator)
            self._drafts.g.uniform_(-1.0, 0.0, generator=generator)
            self._drafts.beta.uniform_(0.0, 1.0, generator=generator)
        if self.deferred is not None:
            self.deferred.k.normal_(generator=generator)
            self.deferred.u.normal_(std=STATE_SCALE, generator=generator)
            self.deferred.g.uniform_(-1.0, 0.0, generator=generator)

    @property
    def state(self) -> Tensor:
        """Return the pool of recurrent states."""
        assert self.pool.state is not None
        return self.pool.state

    @property
    def conv_state(self) -> Tensor:
        """Return the pool of conv windows."""
        assert self.pool.conv_state is not None
        return self.pool.conv_state

    @property
    def drafts(self) -> Drafts | None:
        """Return what a verify keeps its drafts in; None of a slot table."""
        return self._drafts

    @cached_property
    def snapshots(self) -> SnapshotDrafts:
        """Return room for the state and window after every draft, whatever the protocol."""
        if isinstance(self._drafts, SnapshotDrafts):
            return self._drafts
        return SnapshotDrafts.allocate(
            self.spec, self.case.num_sequences, self.case.drafts, self.device
        )

    @cached_property
    def prefill(self) -> PrefillMetadata:
        """Return the metadata of a prefill."""
        return PrefillMetadata(
            cu_seqlens=self.slots.cu_seqlens_int32,
            state_indices=self.slots.slots,
            seq_lens_cpu=self.case.lengths,
        )

    @cached_property
    def verify(self) -> VerifyMetadata:
        """Return the metadata of a verify."""
        snapshot = self.case.protocol is DraftProtocol.SNAPSHOT
        return VerifyMetadata(
            state_indices=self.slots.by_draft if self.slots.table else self.slots.slots,
            max_drafts=self.case.drafts,
            num_accepted=None if snapshot else self.slots.num_accepted,
        )

    def _allocate_drafts(self) -> Drafts | None:
        if self.case.protocol is DraftProtocol.REPLAY:
            slots = self.slots.num_slots
            return ReplayDrafts.allocate(self.spec, slots, self.case.drafts, self.device)
        if self.case.protocol is DraftProtocol.SNAPSHOT:
            rows = self.case.num_sequences
            return SnapshotDrafts.allocate(self.spec, rows, self.case.drafts, self.device)
        return None


@dataclass(frozen=True, slots=True)
class Rotation:
    """Draws of one case that are used in turn.

    Attributes:
        batches: at least one.
        is_cold: whether they are more than the caches hold.
    """

    batches: tuple[Batch, ...]
    is_cold: bool

    def refresh(self) -> None:
        """Give all states the values they were first drawn with."""
        for batch in self.batches:
            batch.refresh()


def draw_params(
    spec: GdnSpec, gates: Gates, device: torch.device, generator: torch.Generator
) -> GdnParams:
    """Draw a layer's parameters as the checkpoints' initialisation does; see :class:`Gates`."""

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return torch.empty(shape, device=device).uniform_(low, high, generator=generator)

    low, high = DECAY_RATES[gates]
    bound = spec.conv_width**-0.5
    weight = uniform(spec.conv_dim, spec.conv_width, low=-bound, high=bound)
    return GdnParams(
        conv_weight=weight.to(spec.dtype),
        A_log=uniform(spec.num_v_heads, low=low, high=high).log(),
        # of the activations' dtype, as in the checkpoints: some libraries take no other
        dt_bias=torch.ones(spec.num_v_heads, dtype=spec.dtype, device=device),
        norm_weight=torch.ones(spec.head_v_dim, dtype=spec.dtype, device=device),
    )


def gates_of(params: GdnParams, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return log decay and write strength, float32."""
    g = -params.A_log.exp() * functional.softplus(a.float() + params.dt_bias)
    return g, b.float().sigmoid()


def _unit(x: Tensor) -> Tensor:
    return functional.normalize(x.float(), dim=-1).to(x.dtype)


def _pool(case: Case, num_slots: int, device: torch.device) -> StatePool:
    """Allocate the pools that the op uses."""
    pool = StatePool(None, None)
    if case.op == "gated_rms_norm":
        return pool
    pool = StatePool.allocate(case.spec, num_slots, device)
    if case.op in CONV_OPS:
        pool.state = None
    if case.op in RULE_OPS:
        pool.conv_state = None
    return pool
