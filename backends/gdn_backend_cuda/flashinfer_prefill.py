# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's chunk prefill on a pool of states, with and without context parallelism."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from gdn_backend_triton.launch import longest, refuse_gradients
from torch import Tensor

from gdn_backend_cuda.checkpoints import Keeping
from gdn_backend_cuda.flashinfer_probe import PREFILL, load, parameters
from gdn_backend_cuda.prefill_slots import EVERY, Given, Placed, placing
from gdn_backend_cuda.slots import kernel_output, packed
from gdn_portable.interface import ChunkPrefill
from gdn_portable.metadata import PrefillMetadata
from gdn_portable.spec import Device, GdnSpec

_scratch_lock = threading.Lock()


def make_chunk_prefill(spec: GdnSpec, device: Device, *, deterministic: bool) -> ChunkPrefill:
    """Return the op: one kernel walks every sequence."""
    return make_rule(spec, device, _given(spec), use_cp=False)


def make_chunk_prefill_cp(spec: GdnSpec, device: Device, *, deterministic: bool) -> ChunkPrefill:
    """Return the op: sequences are cut into parts that run side by side.

    Where they are cut depends on the batch, so ``deterministic`` cuts none.
    """
    return make_rule(spec, device, _given(spec), use_cp=not deterministic)


def _given(spec: GdnSpec) -> Given:
    return Given.RAW if spec.qk_l2norm else Given.VECTORS


def make_rule(spec: GdnSpec, device: Device, given: Given, *, use_cp: bool) -> ChunkPrefill:
    """Return the launches.

    Rows of padding are operands of products, times zero: q, k and v need finite numbers there.

    Args:
        spec: the layer.
        device: where.
        given: what q, k, g and beta are, whatever the spec says.
        use_cp: whether sequences are cut into parts that run side by side.
    """
    launch = load(PREFILL)
    takes_length = "max_seqlen" in parameters(launch)
    launch_place, keeping = placing(device, given), Keeping.of(device)
    has_targets = "output_state_indices" in parameters(launch) and not use_cp

    def run(*, q: Tensor, max_seqlen: int, **arguments: object) -> None:
        if takes_length:
            arguments["max_seqlen"] = max_seqlen
        with _scratch_of_its_own():
            launch(
                q=q,
                scale=spec.q_scale,
                output_final_state=True,
                use_qk_l2norm_in_kernel=False,
                **arguments,
            )

    def rule(
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
        refuse_gradients(v)
        T, N = len(v), len(metadata.cu_seqlens) - 1
        o = kernel_output(out, v, v.dtype)
        result = o if out is None else out
        if not N:
            return result.zero_()
        v = packed(v)
        placed = Placed(
            q, k, g, beta, state, o, metadata=metadata, given=given,
            has_targets=has_targets, pad=spec.pad_slot, launch=launch_place,
        )  # fmt: skip
        if not T:
            return result
        run(
            q=placed.q,
            k=placed.k,
            v=v,
            g=placed.alpha,
            beta=placed.beta,
            initial_state=state,
            output_state=state,
            cu_seqlens=placed.cu_seqlens,
            state_indices=placed.slots,
            output=o,
            use_cp=use_cp,
            max_seqlen=_longest(metadata, T, N),
            **_targets(placed),
            **_checkpoints(placed),
        )
        if placed.kept is not None:
            kept, pads = state, (spec.pad_slot, spec.pad_slot)
            if checkpoint_state is not None:
                kept, pads = checkpoint_state, (spec.pad_slot, -1)
            left = keeping.gather(v, placed, metadata, pads)
            run(
                q=left.k,
                k=left.k,
                v=left.v,
                g=left.alpha,
                beta=left.beta,
                initial_state=placed.kept,
                output_state=placed.kept,
                cu_seqlens=left.cu_seqlens,
                state_indices=left.slots,
                output=torch.empty_like(left.v),
                use_cp=False,
                max_seqlen=min(EVERY, len(left.k)),
            )
            keeping.keep(placed.kept, left.slots, kept, metadata, pads)
        return result if result is o else result.copy_(o)

    return rule


def _targets(placed: Placed) -> dict[str, object]:
    return {} if placed.targets is None else {"output_state_indices": placed.targets}


def _checkpoints(placed: Placed) -> dict[str, object]:
    if placed.kept is None:
        return {}
    return {
        "state_checkpoints": placed.kept,
        "checkpoint_cu_starts": placed.starts,
        "checkpoint_every_n_tokens": EVERY,
    }


def _longest(metadata: PrefillMetadata, T: int, N: int) -> int:
    """Return a bound of the sequences' lengths, at least their mean as FlashInfer wants it."""
    return min(max(longest(metadata, T), -(-T // N), 1), T)


@contextmanager
def _scratch_of_its_own() -> Iterator[None]:
    """Let FlashInfer allocate its scratch anew, from memory that belongs to the stream.

    It keeps one for the device, so that two streams, or a captured graph beside one, would write
    the same. What another caller's graphs may hold is put back.
    """
    cache = importlib.import_module("flashinfer.utils")._cache_buf
    with _scratch_lock:
        others = {key: cache.pop(key) for key in list(cache) if key[0].startswith("gdn_")}
        try:
            yield
        finally:
            for key in [key for key in cache if key[0].startswith("gdn_")]:
                del cache[key]
            cache.update(others)
