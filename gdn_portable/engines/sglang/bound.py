# SPDX-License-Identifier: Apache-2.0
"""Binds the ops for the facts of a call: SGLang tells its kernels nothing when it makes them.

SGLang's layouts are declared here, not inferred: states [slots, HV, V, K], windows [slots, D, L].
The facts of a call are looked up in a dictionary; those that are new are checked and bound.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gdn_portable.errors import InputError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import DeferredUpdates
from gdn_portable.select import AnyDevice
from gdn_portable.spec import ConvLayout, GdnSpec, StateLayout

PAD_SLOT = -1
# no convolution sees where q, k and v meet, and no gate a head dim: any that every kernel takes do
HEAD_DIMS = (128, 64, 32, 16)


class Bind(Protocol):
    """What binds: :func:`gdn_portable.bind`, or it with some arguments filled in."""

    def __call__(
        self, spec: GdnSpec, device: AnyDevice, /, *, deterministic: bool = False
    ) -> GdnOps:
        """Return the ops for ``spec`` on ``device``."""
        ...


class Layer(Protocol):
    """What is read of SGLang's ``RadixLinearAttention``."""

    layer_id: int
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_weights: Tensor
    bias: Tensor | None
    activation: bool | str | None
    A_log: Tensor
    dt_bias: Tensor


RuleOps = Callable[[torch.Size, torch.Size, Tensor, torch.dtype, float | None], GdnOps]
ConvOps = Callable[[Tensor, Tensor, Tensor, bool | str | None, int | None], GdnOps]
StepOps = Callable[["Layer", Tensor, Tensor, torch.dtype], GdnOps]
GateOps = Callable[[Tensor], GdnOps]


def rule_ops(bind: Bind) -> RuleOps:
    """Return what gives the ops for the tensors of a recurrence."""

    @cache
    def bound(
        keys: torch.Size,
        values: torch.Size,
        slot: torch.Size,
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        scale: float | None,
    ) -> GdnOps:
        (H, K), (HV, V) = keys, values
        _check_slot(slot, (H, HV, K, V))
        spec = GdnSpec(
            num_k_heads=H,
            num_v_heads=HV,
            head_k_dim=K,
            head_v_dim=V,
            dtype=dtypes[0],
            state_dtype=dtypes[1],
            scale=scale,
            state_layout=StateLayout.VK,
            pad_slot=PAD_SLOT,
        )
        return bind(spec, device)

    def ops(
        keys: torch.Size, values: torch.Size, state: Tensor, dtype: torch.dtype, scale: float | None
    ) -> GdnOps:
        """Return the ops for keys [H, K], values [HV, V] and a pool [slots, HV, V, K]."""
        if scale == keys[1] ** -0.5:
            scale = None
        return bound(keys, values, state.shape[1:], (dtype, state.dtype), state.device, scale)

    return ops


def conv_ops(bind: Bind) -> ConvOps:
    """Return what gives the ops for the tensors of a convolution."""

    @cache
    def bound(
        channels: int,
        taps: torch.Size,
        slot: torch.Size,
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        activation: bool | str | None,
        pad_slot_id: int | None,
    ) -> GdnOps:
        D, W = taps
        _check_window(channels, taps, slot)
        head_dim = next((d for d in HEAD_DIMS if D % d == 0 and 3 * d <= D), 1)
        spec = GdnSpec(
            num_k_heads=1,
            num_v_heads=D // head_dim - 2,
            head_k_dim=head_dim,
            head_v_dim=head_dim,
            dtype=dtypes[0],
            state_dtype=torch.float32,
            conv_width=W,
            conv_window=slot[1],
            conv_dtype=dtypes[1],
            conv_layout=ConvLayout.DIM_FIRST,
            activation=_activation(activation),
            pad_slot=_pad_slot(pad_slot_id),
        )
        return bind(spec, device)

    def ops(
        x: Tensor,
        weight: Tensor,
        conv_state: Tensor,
        activation: bool | str | None,
        pad_slot_id: int | None,
    ) -> GdnOps:
        """Return the ops for inputs [.., D], a weight [D, W] and a pool [slots, D, L]."""
        dtypes, slot = (x.dtype, conv_state.dtype), conv_state.shape[1:]
        return bound(
            x.shape[-1], weight.shape, slot, dtypes, conv_state.device, activation, pad_slot_id
        )

    return ops


def step_ops(bind: Bind) -> StepOps:
    """Return what gives the ops for a layer as a whole, convolution included."""

    @cache
    def bound(
        heads: tuple[int, int, int, int],
        taps: torch.Size,
        slots: tuple[torch.Size, torch.Size],
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        device: torch.device,
        activation: bool | str | None,
    ) -> GdnOps:
        H, HV, K, V = heads
        window, slot = slots
        channels = 2 * H * K + HV * V
        _check_window(channels, taps, window)
        _check_slot(slot, heads)
        spec = GdnSpec(
            num_k_heads=H,
            num_v_heads=HV,
            head_k_dim=K,
            head_v_dim=V,
            dtype=dtypes[0],
            state_dtype=dtypes[2],
            conv_width=taps[1],
            conv_window=window[1],
            conv_dtype=dtypes[1],
            conv_layout=ConvLayout.DIM_FIRST,
            state_layout=StateLayout.VK,
            activation=_activation(activation),
            pad_slot=PAD_SLOT,
        )
        return bind(spec, device)

    def ops(layer: Layer, conv_state: Tensor, state: Tensor, dtype: torch.dtype) -> GdnOps:
        """Return the ops for a layer and its pools [slots, D, L] and [slots, HV, V, K]."""
        return bound(
            (layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim),
            layer.conv_weights.shape,
            (conv_state.shape[1:], state.shape[1:]),
            (dtype, conv_state.dtype, state.dtype),
            state.device,
            layer.activation,
        )

    return ops


def gate_ops(bind: Bind) -> GateOps:
    """Return what gives the ops for the decay input [T, HV] of a gate."""

    @cache
    def bound(heads: int, dtype: torch.dtype, device: torch.device) -> GdnOps:
        spec = GdnSpec(
            num_k_heads=heads,
            num_v_heads=heads,
            head_k_dim=HEAD_DIMS[-1],
            head_v_dim=HEAD_DIMS[-1],
            dtype=dtype,
            state_dtype=torch.float32,
        )
        return bind(spec, device)

    def ops(a: Tensor) -> GdnOps:
        return bound(a.shape[-1], a.dtype, a.device)

    return ops


def updates_of(
    d: Tensor | None,
    k: Tensor | None,
    g: Tensor | None,
    write_pos: Tensor | None,
    force_flush: Tensor | None,
) -> dict[str, Any]:
    """Return what a decode takes for SGLang's ring: nothing where there is none.

    Of its L rows [slots, heads, L, .] the last is never kept: a decode that finds the others full
    carries all out, as SGLang's own kernel does. Keys are kept as they are, not normalised: no
    other kernel reads the ring.

    Raises:
        InputError: a part of the ring is missing.
    """
    if all(part is None for part in (d, k, g, write_pos, force_flush)):
        return {}
    if d is None or k is None or g is None or write_pos is None:
        raise InputError("part of a ReplaySSM ring is None, needs d, k, g and write_pos, or none")
    parts = (x[:, :, : x.shape[2] - 1].transpose(1, 2) for x in (k, d, g))
    return {
        "deferred": DeferredUpdates(*parts),
        "num_deferred": write_pos,
        "flush": force_flush,
    }


def _check_slot(slot: torch.Size, heads: tuple[int, int, int, int]) -> None:
    _, HV, K, V = heads
    if tuple(slot) != (HV, V, K):
        raise InputError(f"ssm_states has slots of {tuple(slot)}, needs {(HV, V, K)} [HV, V, K]")


def _check_window(channels: int, taps: torch.Size, slot: torch.Size) -> None:
    D, W = taps
    if channels != D or len(slot) != 2 or slot[0] != D or slot[1] < W - 1:
        raise InputError(
            f"a row has {channels} channels and the conv state slots of {tuple(slot)}, needs {D} "
            f"and {(D, W - 1)} [D, L]: the weight is {tuple(taps)}"
        )


def _activation(name: bool | str | None) -> Literal["silu"] | None:
    if name in (True, "silu", "swish"):
        return "silu"
    if name in (False, None):
        return None
    raise InputError(f"activation is {name!r}, needs 'silu', 'swish' or None")


def _pad_slot(pad_slot_id: int | None) -> int:
    """Return the spec's padding: SGLang means one number, the ops all up to one."""
    if pad_slot_id in (None, PAD_SLOT):
        return PAD_SLOT
    if pad_slot_id == 0:
        return 0
    raise InputError(
        f"pad_slot_id is {pad_slot_id}, needs -1, 0 or None: slots below it would be padding too"
    )
