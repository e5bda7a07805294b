# SPDX-License-Identifier: Apache-2.0
"""What travels with the tensors of a call: parameters, batch metadata and drafts.

Index tensors are int32 or int64, on the device, possibly strided and possibly longer than the
batch. Letters are those of :class:`gdn_portable.GdnSpec`, and: B sequences of a decode or verify
batch, N sequences of a packed batch, T packed tokens, P drafts of a sequence, the root (the
newest token of the sequence, known but not in the state) included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

import torch
from torch import Tensor

from gdn_portable.errors import InputError
from gdn_portable.spec import ConvLayout, GdnSpec, StateLayout


@dataclass(frozen=True, slots=True, eq=False)
class GdnParams:
    """A layer's parameters.

    Attributes:
        conv_weight: [D, W].
        A_log: [HV] natural log of the decay rate.
        dt_bias: [HV] added to ``a`` before softplus.
        conv_bias: [D], or None.
        norm_weight: [V] of the gated RMSNorm, or None where no step is given a gate.
        norm_eps: of the gated RMSNorm.
    """

    conv_weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    conv_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_eps: float = 1e-6


@dataclass(slots=True, eq=False)
class PrefillMetadata:
    """A packed batch of N sequences, some of them continued, some new, some empty.

    Attributes:
        cu_seqlens: [N + 1] offsets of the sequences' tokens, starting at 0. Rows at or past the
            last offset belong to nobody.
        state_indices: [N] slots read, and written unless ``out_state_indices`` is given.
        has_initial_state: [N] bool; False ignores what the slot holds. None: all are read.
        out_state_indices: [N] slots written instead; a padded entry writes nothing.
        checkpoint_offsets: [N] tokens from the sequence's first in this call after which its
            state and window are kept as well; 0 is the initial state, negative keeps none.
        checkpoint_indices: [N] where they are kept: the slot of both pools, or for the state the
            row of ``checkpoint_state`` when ``chunk_prefill`` is given one.
        seq_lens_cpu: [N] the lengths on the host: a hint for choosing a kernel, never needed. What
            it says has to be true; of a captured graph, at least as long as any replay's.
        plan: what ``plan_prefill`` stored; belongs to the backend. Where it has ``cu_seqlens``,
            the checks compare them with those above.
    """

    cu_seqlens: Tensor
    state_indices: Tensor
    has_initial_state: Tensor | None = None
    out_state_indices: Tensor | None = None
    checkpoint_offsets: Tensor | None = None
    checkpoint_indices: Tensor | None = None
    seq_lens_cpu: Sequence[int] | None = None
    plan: object | None = field(default=None, repr=False)


@dataclass(slots=True, eq=False)
class Plans:
    """What ``measured.plan_prefill`` stores: what a choice goes by, and the kernels' own plans.

    Attributes:
        sequences: sequences as long as the longest that would make up the batch; N of the same
            length, or where lengths are not known on the host.
        parts: what each kernel's own ``plan_prefill`` stored.
        runs_all: run every kernel that may be chosen, one after the other: for the warm-up.
    """

    sequences: float
    parts: tuple[object | None, ...] = ()
    runs_all: bool = False

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Return what the parts were planned for, where they keep it."""
        kept = (getattr(part, "cu_seqlens", None) for part in self.parts)
        return next((cu_seqlens for cu_seqlens in kept if cu_seqlens is not None), None)


PlanT = TypeVar("PlanT")


def plan_of(metadata: PrefillMetadata, kind: type[PlanT]) -> PlanT | None:
    """Return the plan of that class, be it the batch's or one of several; None where none was made.

    A kernel asks for its own plan so, and does without where another kernel's planner was called.
    """
    plan = metadata.plan
    for part in plan.parts if isinstance(plan, Plans) else (plan,):
        if isinstance(part, kind):
            return part
    return None


@dataclass(slots=True, eq=False)
class VerifyMetadata:
    """A batch of B sequences with up to ``max_drafts`` draft tokens each, packed.

    Attributes:
        state_indices: [B] slots; or [B, P], one slot per draft, which names the slot-table
            protocol.
        max_drafts: P, the most drafts of a sequence, the root included.
        cu_seqlens: [B + 1] offsets of the sequences' drafts. None: every sequence has P.
        num_accepted: [B] drafts of the step before that were accepted, the root included; 0 where
            none is pending, to a slot table the same as 1. None: none is pending anywhere. Not
            read with ``SnapshotDrafts``, as their commit was told.
        rows: [B] rows of ``SnapshotDrafts``. None: the position in the batch.
        parents: [B, P] index of each draft's parent, smaller than its own; column 0 is the root
            and not read. None: a chain.
        next_token: [B, P] first child of each draft, -1 for none; with ``next_sibling`` another
            way to give a tree, from which the verify ops fill ``parents``.
        next_sibling: [B, P] next child of the same parent, -1 for none.
    """

    state_indices: Tensor
    max_drafts: int
    cu_seqlens: Tensor | None = None
    num_accepted: Tensor | None = None
    rows: Tensor | None = None
    parents: Tensor | None = None
    next_token: Tensor | None = None
    next_sibling: Tensor | None = None

    @property
    def is_slot_table(self) -> bool:
        """Whether every draft has a slot of its own."""
        return self.state_indices.dim() == 2

    @property
    def is_tree(self) -> bool:
        """Whether drafts may branch."""
        return self.parents is not None or self.next_token is not None


@dataclass(slots=True, eq=False)
class ReplayDrafts:
    """The inputs of one layer's last drafts, by slot, from which accepted ones are replayed.

    Attributes:
        k: [slots, P, H, K] keys as the convolution gave them, in the activations' dtype.
        v: [slots, P, HV, V] values, likewise.
        g: [slots, P, HV] log decay, float32.
        beta: [slots, P, HV] write strength, float32.
        conv_inputs: [slots, P, D] the convolution's inputs, in the activations' dtype.
    """

    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    conv_inputs: Tensor

    @classmethod
    def allocate(
        cls, spec: GdnSpec, num_slots: int, max_drafts: int, device: torch.device | str
    ) -> ReplayDrafts:
        """Allocate room for ``max_drafts`` drafts, root included, of every slot of one layer."""
        H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
        _positive(num_slots=num_slots, max_drafts=max_drafts)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_slots, max_drafts, *shape, dtype=dtype, device=device)

        return cls(
            k=zeros(H, K, dtype=spec.dtype),
            v=zeros(HV, V, dtype=spec.dtype),
            g=zeros(HV, dtype=spec.compute_dtype),
            beta=zeros(HV, dtype=spec.compute_dtype),
            conv_inputs=zeros(spec.conv_dim, dtype=spec.dtype),
        )


@dataclass(slots=True, eq=False)
class DeferredUpdates:
    """What decodes of one layer have not written to their states yet, by slot, oldest first.

    In order each makes a state ``exp(g) S + u k^T``; how many of a slot count, a decode is told.

    Attributes:
        k: [slots, R, H, K] keys as the convolution gave them, in the activations' dtype.
        u: [slots, R, HV, V] what is written under them, float32 or the activations' dtype.
        g: [slots, R, HV] log decay, float32.
    """

    k: Tensor
    u: Tensor
    g: Tensor

    @classmethod
    def allocate(
        cls, spec: GdnSpec, num_slots: int, max_deferred: int, device: torch.device | str
    ) -> DeferredUpdates:
        """Allocate room for ``max_deferred`` updates, R, of every slot of one layer."""
        H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
        _positive(num_slots=num_slots, max_deferred=max_deferred)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_slots, max_deferred, *shape, dtype=dtype, device=device)

        return cls(
            k=zeros(H, K, dtype=spec.dtype),
            u=zeros(HV, V, dtype=spec.compute_dtype),
            g=zeros(HV, dtype=spec.compute_dtype),
        )


@dataclass(slots=True, eq=False)
class SnapshotDrafts:
    """The state and window after every draft, in the engine's own buffers or allocated here.

    The step axis may be longer than P. Strides are honoured; in a chain the windows of one row
    may overlap in memory, as a view of ``W - 1 + P - 1`` columns. Either may be None where only
    the other op is called. Both may carry a leading layer axis for ``mtp_commit``.

    Attributes:
        conv_state: [rows, P, D, W - 1], or [rows, P, W - 1, D] as the spec's ``conv_layout`` says.
        state: [rows, P, HV, V, K], or [rows, P, HV, K, V] as ``state_layout`` says.
    """

    conv_state: Tensor | None
    state: Tensor | None

    @classmethod
    def allocate(
        cls, spec: GdnSpec, num_rows: int, max_drafts: int, device: torch.device | str
    ) -> SnapshotDrafts:
        """Allocate snapshots of ``max_drafts`` drafts, root included, for ``num_rows`` rows."""
        _positive(num_rows=num_rows, max_drafts=max_drafts)
        return cls(
            conv_state=torch.zeros(
                (num_rows, max_drafts, *conv_slot_shape(spec, spec.conv_width - 1)),
                dtype=spec.conv_state_dtype,
                device=device,
            ),
            state=torch.zeros(
                (num_rows, max_drafts, *state_slot_shape(spec)),
                dtype=spec.state_dtype,
                device=device,
            ),
        )


Drafts = ReplayDrafts | SnapshotDrafts


class DraftProtocol(str, Enum):
    """How accepted drafts become a sequence's state."""

    REPLAY = "replay"
    SNAPSHOT = "snapshot"
    SLOT_TABLE = "slot-table"


def draft_protocol(metadata: VerifyMetadata, drafts: Drafts | None) -> DraftProtocol:
    """Return the protocol that the arguments of a verify name.

    Raises:
        InputError: they name none, or two, or a tree where only a chain is possible.
    """
    if drafts is not None and metadata.is_slot_table:
        raise InputError(
            "state_indices is [B, P], which names the slot table, and drafts were given as well: "
            "needs state_indices [B] with drafts, or no drafts"
        )
    if isinstance(drafts, ReplayDrafts):
        return DraftProtocol.REPLAY
    if isinstance(drafts, SnapshotDrafts):
        return DraftProtocol.SNAPSHOT
    if not metadata.is_slot_table:
        raise InputError(
            f"drafts is None and state_indices has {metadata.state_indices.dim()} axes, which "
            "names no protocol: needs ReplayDrafts, SnapshotDrafts, or state_indices [B, P]"
        )
    if metadata.is_tree:
        raise InputError("a slot table holds a chain, got a tree: needs drafts")
    return DraftProtocol.SLOT_TABLE


def check_deferred(
    deferred: DeferredUpdates | None, num_deferred: Tensor | None, flush: Tensor | None
) -> None:
    """Raise InputError where a decode is told of updates and not where they are."""
    for name, value in (("num_deferred", num_deferred), ("flush", flush)):
        if deferred is None and value is not None:
            raise InputError(f"{name} is given and deferred is None, needs DeferredUpdates with it")


def given(name: str, tensor: Tensor | None) -> Tensor:
    """Return a part of the snapshots that an op needs.

    Raises:
        InputError: it is None.
    """
    if tensor is None:
        raise InputError(f"{name} is None, needs a tensor")
    return tensor


def commit_batch(metadata: VerifyMetadata, last_accepted: Tensor) -> int:
    """Return how many sequences a commit is for; index tensors may be longer."""
    if metadata.cu_seqlens is not None:
        return len(metadata.cu_seqlens) - 1
    return min(len(last_accepted), len(metadata.state_indices))


def conv_slot_shape(spec: GdnSpec, columns: int) -> tuple[int, int]:
    """Return the shape of ``columns`` columns of a conv window in the spec's layout."""
    if spec.conv_layout is ConvLayout.DIM_FIRST:
        return spec.conv_dim, columns
    return columns, spec.conv_dim


def state_slot_shape(spec: GdnSpec) -> tuple[int, int, int]:
    """Return the shape of one recurrent state in the spec's layout."""
    if spec.state_layout is StateLayout.VK:
        return spec.num_v_heads, spec.head_v_dim, spec.head_k_dim
    return spec.num_v_heads, spec.head_k_dim, spec.head_v_dim


def _positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} is {count}, needs at least 1")
