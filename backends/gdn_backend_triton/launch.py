# SPDX-License-Identifier: Apache-2.0
"""What every launcher does before it launches."""

from __future__ import annotations

import functools
import pkgutil
from typing import Any

import torch
from torch import Tensor

from gdn_portable.backend import Launcher, MakeLauncher
from gdn_portable.errors import InputError, UnsupportedCallError
from gdn_portable.metadata import DeferredUpdates, PrefillMetadata
from gdn_portable.spec import Device, GdnSpec

# what changes from step to step, by the kernels' names for it: Triton would compile again, in the
# middle of serving, where one turns 1 or a multiple of 16
STEP_SIZES = (
    "B", "N", "T", "COLUMNS", "numel", "num_rows", "segment_tokens", "warm_up_limit",
    "a_t", "a_h", "b_t", "b_h",
)  # fmt: skip
# likewise by alignment: slices of an engine's longer tensors, and parts of our own scratch memory
STEP_TENSORS = (
    "cu_seqlens", "state_indices", "out_state_indices", "has_initial_state", "checkpoint_offsets",
    "checkpoint_indices", "num_accepted", "rows", "parents", "next_token", "next_sibling",
    "last_accepted", "num_deferred", "flush", "a", "b", "read", "write",
)  # fmt: skip


def ceil_div(count: int, size: int) -> int:
    """Return how many of ``size`` cover ``count``, sooner than ``triton.cdiv`` does."""
    return -(-count // size)


def power_of_two(least: int) -> int:
    """Return the power of two at or above ``least``, sooner than Triton's own function does."""
    return 1 << (least - 1).bit_length()


def longest(metadata: PrefillMetadata, tokens: int) -> int:
    """Return how long a sequence is at most: one may have all tokens where no lengths are known."""
    lengths = metadata.seq_lens_cpu
    return tokens if lengths is None else int(max(lengths, default=0))


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return new memory of the shape of ``x``, contiguous whatever ``x`` is."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def refuse_gradients(x: Tensor) -> None:
    """Raise where autograd would record the call: the kernels have no backward.

    Raises:
        InputError: gradients are on and ``x`` requires one.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "an input requires a gradient and the kernels have none: needs torch.no_grad(), or "
            'bind(..., backend="reference") to train'
        )


def refuse_deferred(deferred: DeferredUpdates | None) -> None:
    """Raise where a decode that writes every state is told not to.

    Raises:
        UnsupportedCallError: ``deferred`` is given.
    """
    if deferred is not None:
        raise UnsupportedCallError("deferred is given: the kernel writes every state")


def lazily(path: str) -> MakeLauncher:
    """Return what makes the launcher at ``"module:function"``; the module is imported at bind.

    Triton launches on the current device: where the bound device has a number, the launcher makes
    it the current one.
    """

    def make(spec: GdnSpec, device: Device, *, deterministic: bool) -> Launcher:
        maker: MakeLauncher = pkgutil.resolve_name(path)
        launcher = maker(spec, device, deterministic=deterministic)
        return launcher if device.index is None else _on_device(launcher, device.index)

    return make


def _on_device(launcher: Launcher, index: int) -> Launcher:
    @functools.wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Any:
        if torch.cuda.current_device() == index:
            return launcher(*args, **kwargs)
        with torch.cuda.device(index):
            return launcher(*args, **kwargs)

    return launch
