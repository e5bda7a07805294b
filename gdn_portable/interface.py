# SPDX-License-Identifier: Apache-2.0
"""The ops of a Gated DeltaNet layer: signatures, contract, and the object that holds them.

The maths of every op, in natural log and float32, for one value head with state S [V, K]::

    g    = -exp(A_log) * softplus(a + dt_bias)        softplus(x) = x when x > 20
    beta = sigmoid(b)
    q, k = x / sqrt(sum(x * x) + 1e-6) over K         unless qk_l2norm=False; then q *= scale
    S    = exp(g) * S;  u = beta * (v - S k);  S += u k^T;  o = S q

The rules of every op:

* Padding: an index at or below ``spec.pad_slot`` in ``state_indices`` reads and writes no state
  and gives a zero output row; so do rows at or past ``cu_seqlens[-1]``. A padded
  ``out_state_indices`` entry alone means: compute, do not write.
* Two rows may not write one slot, nor one row read what another writes; reads may repeat.
* States are read and written in place, through their strides. Nothing is copied.
* Zero-length sequences and empty batches are legal.
* ``mixed_qkv``, a convolution's ``x``, q, k and v have the spec's ``dtype``. ``a``, ``b``,
  ``gate``, ``out``, the norm's ``x`` and parameters may have any floating dtype.
* Index tensors are int32 or int64, on the device, of any stride, and may be longer than the batch.
* ``out`` is written and returned; None allocates it in the activations' dtype.
* No op synchronises with the host. Arguments are checked where ``bind`` was asked to, or on a CPU:
  then a bad one raises InputError before anything is written. Unchecked it may touch any memory.
* A kernel that serves only where it is named may take fewer calls, with UnsupportedCallError for
  the others, and may wait for the device: its docstring says so.
* Gradients flow to activations and parameters through the reference alone: other kernels raise
  InputError for an activation that requires one. States are read as they are, written without.
* Float32 below is float64 where the spec's ``dtype`` or ``state_dtype`` is.

Letters: B sequences of a decode or verify batch, N of a packed batch, T packed tokens, H q/k
heads, HV value heads, K and V head dims, D = 2 * H * K + HV * V conv channels laid out
[q | k | v], W conv width, L >= W - 1 columns of a conv window. Shapes of states are those of the
layouts VK and DIM_FIRST; under KV and LEN_FIRST the last two axes are swapped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gdn_portable.metadata import (
    DeferredUpdates,
    DraftProtocol,
    Drafts,
    GdnParams,
    PrefillMetadata,
    VerifyMetadata,
)
from gdn_portable.spec import Device, GdnSpec, Op
from gdn_portable.state import StatePool


class Conv1dPrefill(Protocol):
    """Causal depthwise convolution and activation over packed sequences."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_state: Tensor,
        *,
        metadata: PrefillMetadata,
        out: Tensor | None = None,
    ) -> Tensor:
        """Convolve every sequence with its window before it, and advance the windows.

        A window holds the last W - 1 inputs, oldest first, in columns 0 to W - 2 of its slot;
        further columns are not touched. A sequence without initial state starts from zeros.

        Args:
            x: [T, D] inputs, any strides: a transposed projection costs no copy.
            weight: [D, W]; the last column multiplies the newest input.
            bias: [D], or None.
            conv_state: [slots, D, L] pool, advanced in place.
            metadata: the batch. A window asked for by ``checkpoint_offsets`` goes to the slot in
                ``checkpoint_indices``.
            out: [T, D].

        Returns:
            [T, D] activated outputs.
        """
        ...


class Conv1dUpdate(Protocol):
    """The convolution for one token per sequence."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_state: Tensor,
        *,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Convolve one token with its sequence's window, and advance the window.

        Args:
            x: [B, D] inputs, any strides.
            weight: [D, W].
            bias: [D], or None.
            conv_state: [slots, D, L] pool, advanced in place.
            state_indices: [B] slots read, and written unless ``out_state_indices`` is given.
            out_state_indices: [B] slots written instead.
            out: [B, D]; may be ``x``.

        Returns:
            [B, D] activated outputs.
        """
        ...


class Conv1dVerify(Protocol):
    """The convolution for the packed draft tokens of every sequence."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_state: Tensor,
        *,
        metadata: VerifyMetadata,
        drafts: Drafts | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Convolve every draft with its ancestors and its sequence's window.

        What becomes of the windows depends on the protocol, see :class:`MtpVerify`:

        * replay: pending inputs first advance the pool's window; the drafts' inputs are kept.
        * snapshot: the window after every draft goes to ``drafts``; the pool is not touched.
        * slot table: the window of a sequence lives in slot ``state_indices[b, 0]`` and is read
          at column ``max(num_accepted, 1) - 1``; then that slot's columns hold the inputs after
          the first one of that window, drafts included. Needs L >= W - 1 + P - 1.

        Given ``next_token`` and ``next_sibling``, ``metadata.parents`` is filled on the device,
        in place where it is a tensor already.

        Args:
            x: [T, D] inputs of the drafts, any strides.
            weight: [D, W].
            bias: [D], or None.
            conv_state: [slots, D, L] pool.
            metadata: the batch.
            drafts: names the protocol; None is the slot table.
            out: [T, D]; may be ``x``.

        Returns:
            [T, D] activated outputs.
        """
        ...


class Gating(Protocol):
    """Log decay and write strength of every token."""

    def __call__(
        self, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ``g`` and ``beta``.

        Args:
            a: [T, HV] decay input, any strides.
            b: [T, HV] write-strength input, before sigmoid, any strides.
            A_log: [HV].
            dt_bias: [HV].

        Returns:
            g [T, HV] float32, natural log, at most 0; beta [T, HV] float32, never rounded.
        """
        ...


class ChunkPrefill(Protocol):
    """The gated delta rule over packed sequences."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        *,
        metadata: PrefillMetadata,
        checkpoint_state: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run every sequence from its slot's state, and store the state after it.

        A zero-length sequence stores its initial state: a copy, or zeros without one.

        Args:
            q: [T, H, K] queries; normalised and scaled inside. Any token and head stride.
            k: [T, H, K] keys; normalised inside. Any token and head stride.
            v: [T, HV, V] values. Any token and head stride.
            g: [T, HV] float32 log decay, as ``gating`` gives it: at most 0.
            beta: [T, HV] float32 write strength, after sigmoid.
            state: [slots, HV, V, K] pool, advanced in place.
            metadata: the batch. ``plan_prefill`` makes its plan once for all layers.
            checkpoint_state: [rows, HV, V, K] float32; where given, states asked for by
                ``checkpoint_offsets`` go to its rows, not to slots of ``state``.
            out: [T, HV, V].

        Returns:
            [T, HV, V] outputs.
        """
        ...


class RecurrentDecode(Protocol):
    """One step of the gated delta rule per sequence, with the gating fused in."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        *,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        deferred: DeferredUpdates | None = None,
        num_deferred: Tensor | None = None,
        flush: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Advance every sequence by one token.

        Given ``deferred`` a state is read, with the updates that are deferred in its slot, and
        written every so often: the token's own update is put behind them, or where there is no
        room left, or as ``flush`` says, all are carried out. Then none is deferred, else one more;
        the caller counts. Other ops do not know of them: flush before a slot is given to those.

        Args:
            q: [B, H, K] queries; normalised and scaled inside. Any token and head stride.
            k: [B, H, K] keys; normalised inside. Any token and head stride.
            v: [B, HV, V] values. Any token and head stride.
            a: [B, HV] decay input, any strides.
            b: [B, HV] write-strength input, before sigmoid, any strides.
            A_log: [HV].
            dt_bias: [HV].
            state: [slots, HV, V, K] pool, advanced in place.
            state_indices: [B] slots read, and written unless ``out_state_indices`` is given.
            out_state_indices: [B] slots written instead; all is carried out in them, and what is
                deferred in the slots read is left as it is.
            deferred: the layer's updates, extended in place; None writes every state.
            num_deferred: [B] updates deferred in the slot, up to R; None: none anywhere.
            flush: [B] bool or integers, not 0 where all is carried out now; None: where there is no
                room.
            out: [B, HV, V].

        Returns:
            [B, HV, V] outputs.
        """
        ...


class MtpVerify(Protocol):
    """The gated delta rule over the packed draft tokens of every sequence."""

    def __call__(
        self,
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
        """Run every draft from its parent's state, the root from its sequence's.

        The protocol is named by what is passed:

        * replay (``ReplayDrafts``): the ``num_accepted`` pending drafts of the step before are
          applied to the slot's state, which is written back once; the inputs of these drafts are
          kept in their place. Drafts may branch, but pending ones are a chain: commit a tree.
        * snapshot (``SnapshotDrafts``): the state after every draft goes to ``drafts``; the pool
          is not touched. ``num_accepted`` is not read. Drafts may branch.
        * slot table (no drafts, ``state_indices [B, P]``): the sequence is read from slot
          ``state_indices[b, max(num_accepted, 1) - 1]``, padding where that is padded, and the
          state after draft t goes to slot ``state_indices[b, t]`` unless that is padded. A chain.
          A sequence without drafts keeps all as it is, and its ``num_accepted`` for later.

        No sequence has more than ``max_drafts`` drafts; pending ones may be more, up to what was
        kept.

        Args:
            q: [T, H, K] queries; normalised and scaled inside. Any token and head stride.
            k: [T, H, K] keys; normalised inside. Any token and head stride.
            v: [T, HV, V] values. Any token and head stride.
            a: [T, HV] decay input, any strides.
            b: [T, HV] write-strength input, before sigmoid, any strides.
            A_log: [HV].
            dt_bias: [HV].
            state: [slots, HV, V, K] pool.
            metadata: the batch.
            drafts: names the protocol; None is the slot table.
            out: [T, HV, V].

        Returns:
            [T, HV, V] outputs.
        """
        ...


class MtpCommit(Protocol):
    """Keep the accepted drafts of every sequence."""

    def __call__(
        self,
        pool: StatePool,
        drafts: Drafts,
        *,
        metadata: VerifyMetadata,
        last_accepted: Tensor,
        out_state_indices: Tensor | None = None,
    ) -> None:
        """Make the state and window after draft ``last_accepted`` the sequence's own.

        After a commit of ``ReplayDrafts`` nothing is pending: the next verify of the slot is told
        ``num_accepted`` 0. Snapshots may have a leading layer axis, with a pool that has it too.

        Args:
            pool: written in place; a pool of None is passed over.
            drafts: what the last verify kept.
            metadata: of that verify. Without ``cu_seqlens`` the batch is as long as the shorter of
                ``state_indices`` and ``last_accepted``: pad what is longer than the batch.
            last_accepted: [B] index of a draft in its chain or tree; -1 for none, the state
                before the drafts.
            out_state_indices: [B] slots that receive the result instead: a copy, the sequence's
                own slot stays as it is.
        """
        ...


class GatedRmsNorm(Protocol):
    """RMSNorm over V, then a gate."""

    def __call__(
        self,
        x: Tensor,
        gate: Tensor,
        weight: Tensor,
        *,
        eps: float = 1e-6,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return ``x / sqrt(mean(x * x) + eps) * weight * activation(gate)``, in float32 inside.

        A head of ``x`` that is all zeros gives zeros whatever the gate holds: padding stays zero.
        The steps end with it where they are given a gate.

        Args:
            x: [T, HV, V] outputs of the recurrence.
            gate: [T, HV, V] or flat [T, HV * V], before ``spec.gate_activation``. Any token and
                head stride.
            weight: [V].
            eps: added to the mean square.
            out: [T, HV, V]; may be ``x``.

        Returns:
            [T, HV, V] in the dtype of ``out``, else of ``x``.
        """
        ...


class PlanPrefill(Protocol):
    """Work that all layers of a prefill step share."""

    def __call__(self, metadata: PrefillMetadata) -> None:
        """Store a plan on ``metadata``; called again, refill the same tensors in place.

        A prefill without a plan is right as well, and may be slower: kernels do this work in every
        layer, and one that is chosen by the batch is chosen without ``seq_lens_cpu``.

        Call it again when the contents of ``metadata`` change: a plan is used as it is, and a stale
        one gives wrong results where nothing is checked.
        """
        ...


class PrefillStep(Protocol):
    """A layer's prefill, from the packed projection to what ``out_proj`` takes."""

    def __call__(
        self,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        params: GdnParams,
        pool: StatePool,
        *,
        metadata: PrefillMetadata,
        checkpoint_state: Tensor | None = None,
        gate: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Convolve, split, normalise, gate and run the recurrence.

        Args:
            mixed_qkv: [T, D] projection, any strides.
            a: [T, HV] decay input, any strides.
            b: [T, HV] write-strength input, any strides.
            params: the layer's parameters.
            pool: both states, advanced in place.
            metadata: as :class:`Conv1dPrefill` and :class:`ChunkPrefill` take it.
            checkpoint_state: as :class:`ChunkPrefill` takes it; its rows are no slots, so no window
                is kept where it is given.
            gate: [T, HV, V] or [T, HV * V]; applies the gated RMSNorm, which needs
                ``params.norm_weight``.
            out: [T, HV, V].

        Returns:
            [T, HV, V] outputs.
        """
        ...


class DecodeStep(Protocol):
    """A layer's decode, from the packed projection to what ``out_proj`` takes."""

    def __call__(
        self,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        params: GdnParams,
        pool: StatePool,
        *,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        deferred: DeferredUpdates | None = None,
        num_deferred: Tensor | None = None,
        flush: Tensor | None = None,
        gate: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Advance every sequence by one token.

        Args:
            mixed_qkv: [B, D] projection, any strides; left as it is.
            a: [B, HV] decay input, any strides.
            b: [B, HV] write-strength input, any strides.
            params: the layer's parameters.
            pool: both states, advanced in place; windows are, whatever is deferred.
            state_indices: [B] slots read, and written unless ``out_state_indices`` is given.
            out_state_indices: [B] slots written instead.
            deferred: as :class:`RecurrentDecode` takes it, with the next two.
            num_deferred: [B].
            flush: [B].
            gate: [B, HV, V] or [B, HV * V]; applies the gated RMSNorm, which needs
                ``params.norm_weight``.
            out: [B, HV, V].

        Returns:
            [B, HV, V] outputs.
        """
        ...


class VerifyStep(Protocol):
    """A layer's verification of drafts, from the packed projection to what ``out_proj`` takes."""

    def __call__(
        self,
        mixed_qkv: Tensor,
        a: Tensor,
        b: Tensor,
        params: GdnParams,
        pool: StatePool,
        *,
        metadata: VerifyMetadata,
        drafts: Drafts | None = None,
        gate: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run every draft under the protocol of :class:`MtpVerify`.

        Args:
            mixed_qkv: [T, D] projection of the drafts, any strides; left as it is.
            a: [T, HV] decay input, any strides.
            b: [T, HV] write-strength input, any strides.
            params: the layer's parameters.
            pool: both states.
            metadata: the batch.
            drafts: names the protocol; None is the slot table.
            gate: [T, HV, V] or [T, HV * V]; applies the gated RMSNorm, which needs
                ``params.norm_weight``.
            out: [T, HV, V].

        Returns:
            [T, HV, V] outputs.
        """
        ...


class Warmup(Protocol):
    """Compile and allocate what later calls need."""

    def __call__(
        self,
        *,
        batch_sizes: Sequence[int] = (1,),
        prefill_tokens: Sequence[int] = (64,),
        max_drafts: int = 4,
        max_deferred: int = 0,
        protocols: Collection[DraftProtocol] | None = None,
        index_dtypes: Collection[torch.dtype] = (torch.int32, torch.int64),
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Run every op once per size on private memory; after it they are safe to capture.

        Covered are prefills of those sizes and of at most 64 tokens, protocols with their commits,
        and optional arguments, given and not, other than ``checkpoint_state``; of a prefill's,
        other slots and checkpoints with ``has_initial_state`` alone. Activations in unusual layouts
        or dtypes are not. Each index dtype and protocol left out is time saved.

        Args:
            batch_sizes: sequences of a decode or verify batch.
            prefill_tokens: packed tokens of a prefill.
            max_drafts: P of a verify, the root included; 0 for engines that never verify.
            max_deferred: R of what decodes defer, with ``num_deferred``; 0 for engines that write
                every state.
            protocols: of a verify, None for all; a slot table is left out where windows have no
                room for it.
            index_dtypes: of slots, ``cu_seqlens`` and the like.
            progress: told what is about to run.

        Raises:
            InputError: an index dtype is neither int32 nor int64, or a protocol is none.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GdnOps:
    """The ops of one layer spec bound to one device: every attribute is the kernel's launcher.

    What an op takes and does, the class of its attribute says: of ``decode_step``,
    ``help(gdn_portable.interface.DecodeStep)``.

    Attributes:
        spec: what they were bound for.
        device: where they run.
        kernels: the name of the kernel behind each op, for logs and tests.
    """

    spec: GdnSpec
    device: Device
    kernels: Mapping[Op, str]

    conv1d_prefill: Conv1dPrefill
    conv1d_update: Conv1dUpdate
    conv1d_verify: Conv1dVerify
    gating: Gating
    chunk_prefill: ChunkPrefill
    recurrent_decode: RecurrentDecode
    mtp_verify: MtpVerify
    mtp_commit: MtpCommit
    gated_rms_norm: GatedRmsNorm

    plan_prefill: PlanPrefill
    prefill_step: PrefillStep
    decode_step: DecodeStep
    verify_step: VerifyStep

    warmup: Warmup

    def __repr__(self) -> str:
        """Name the device and the kernels, as a log wants them."""
        served = ", ".join(f"{op.value}={kernel}" for op, kernel in self.kernels.items())
        return f"GdnOps({self.device}: {served})"
