# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models whose GDN layers run on the ops: Qwen3-Next, Qwen3.5, Qwen4-Exp, Lara Mini.

``use(model)`` takes the place of the layers' ``forward`` and of nothing else: weights, caches and
``generate`` are transformers' own. A cache's tensors are the pools, sequence b in slot b, read and
written where they are: the window is the last W - 1 of a cache's W columns, and the state
[B, HV, K, V] has K contiguous in memory. One that has not, as beam search and models that are not
in use make it, is copied once. Padding is multiplied away in front of the projections, as
transformers does it.

transformers itself is never imported: layers are known by the names of their classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gdn_portable import custom_ops
from gdn_portable.checks.tensors import shape_text
from gdn_portable.errors import InputError, UnsupportedCallError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import (
    GdnParams,
    PrefillMetadata,
    conv_slot_shape,
    state_slot_shape,
)
from gdn_portable.nn import deinterleave
from gdn_portable.select import bind
from gdn_portable.spec import GdnSpec, Op, activation_named
from gdn_portable.state import StatePool

# keywords by which several sequences are packed in one row
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# what a layer calls its cache: since transformers 5.24, and before
CACHES = ("cache", "cache_params")


def use(
    model: nn.Module,
    *,
    backend: str | None = None,
    kernels: Mapping[Op | str, str] | None = None,
    check: bool | None = None,
    deterministic: bool = False,
) -> InUse:
    """Run the GDN layers of ``model`` on the ops, until the object that is returned undoes it.

    Call it once the model is on its device and in its dtype. Kernels of a GPU have no backward:
    there, call the model under ``torch.no_grad()``, as ``generate`` does.

    Args:
        model: holds layers of the classes in ``PROJECTIONS``, at any depth.
        backend: as :func:`gdn_portable.bind` takes it; so are the others.
        kernels: see ``bind``.
        check: see ``bind``.
        deterministic: see ``bind``.

    Raises:
        InputError: no layer is of a known class, or the ``forward`` of one was replaced before.
        SpecError: a layer has an activation that the ops have not.
        UnsupportedError: a layer has no kernel; every kernel's reasons are given.
    """
    found = [(layer, _spec(layer), project) for layer, project in _gdn_layers(model)]
    runners: dict[tuple[GdnSpec, torch.device], _Runner] = {}
    for layer, spec, _ in found:
        device = layer.A_log.device
        if (spec, device) not in runners:
            ops = bind(
                spec,
                device,
                backend=backend,
                kernels=kernels,
                check=check,
                deterministic=deterministic,
            )
            runners[spec, device] = _Runner(ops, device)
    in_use = InUse(tuple(runner.ops for runner in runners.values()))
    for layer, spec, project in found:
        runner = runners[spec, layer.A_log.device]
        in_use.replace(layer, partial(runner.forward, layer, project))
    return in_use


class InUse:
    """What ``use`` did, and how to undo it; as a context, undone at its end.

    Attributes:
        ops: what the layers run on: one for layers that are alike and on one device.
    """

    def __init__(self, ops: tuple[GdnOps, ...]) -> None:
        """Start with nothing replaced."""
        self.ops = ops
        self._replaced: list[tuple[Any, Any, Any]] = []

    def replace(self, layer: Any, forward: Callable[..., Tensor]) -> None:
        """Let ``layer`` run ``forward`` instead of its own."""
        name = _called(layer)
        self._replaced.append((layer, forward, vars(layer).get(name)))
        setattr(layer, name, forward)

    def undo(self) -> None:
        """Give the layers their own ``forward`` back; again does nothing.

        Raises:
            InputError: somebody wrapped the ``forward`` of a layer since, and has to unwrap first.
        """
        for layer, forward, _ in self._replaced:
            if vars(layer).get(_called(layer)) is not forward:
                raise InputError(
                    f"the forward of layer {layer.layer_idx} was replaced since use(), needs the "
                    "one from there"
                )
        for layer, _, own in self._replaced:
            delattr(layer, _called(layer))
            if own is not None:
                setattr(layer, _called(layer), own)
        self._replaced = []

    def __repr__(self) -> str:
        """Count the layers, and name what they run on."""
        return f"InUse({len(self._replaced)} layers: {', '.join(map(repr, self.ops))})"

    def __enter__(self) -> InUse:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


Project = Callable[["_Runner", Any, Tensor], "_Projected"]


class _Projected(NamedTuple):
    """What a layer projects hidden states to."""

    mixed_qkv: Tensor  # [T, D]
    gate: Tensor  # [T, HV * V]
    b: Tensor  # [T, HV]
    a: Tensor  # [T, HV]


def _in_parts(runner: _Runner, layer: Any, hidden: Tensor) -> _Projected:
    """Project as Qwen3.5 and later ones do: one module for each."""
    modules = (layer.in_proj_qkv, layer.in_proj_z, layer.in_proj_b, layer.in_proj_a)
    return _Projected(*(module(hidden).flatten(0, 1) for module in modules))


def _by_key_head(runner: _Runner, layer: Any, hidden: Tensor) -> _Projected:
    """Project as Qwen3-Next does, and bring its channels, grouped by key head, in order."""
    spec, (qkvz_order, ba_order) = runner.ops.spec, runner.orders
    qkvz = layer.in_proj_qkvz(hidden).flatten(0, 1).index_select(-1, qkvz_order)
    ba = layer.in_proj_ba(hidden).flatten(0, 1).index_select(-1, ba_order)
    mixed_qkv, gate = qkvz.tensor_split([spec.conv_dim], dim=-1)
    return _Projected(mixed_qkv, gate, *ba.chunk(2, dim=-1))


PROJECTIONS: Mapping[str, Project] = {
    "Qwen3NextGatedDeltaNet": _by_key_head,
    "Qwen3_5GatedDeltaNet": _in_parts,
    "Qwen3_5MoeGatedDeltaNet": _in_parts,
    "Qwen4ExpTextGatedDeltaNet": _in_parts,
    "LaraMiniGatedDeltaNet": _in_parts,
}


class _Runner:
    """Runs the layers that are alike and on one device, and keeps the batch that they share.

    Attributes:
        ops: what it runs them on.
        compiled_ops: the same as custom ops, for torch.compile.
        orders: the channels of Qwen3-Next's two projections in the order [q | k | v | z], [b | a].
    """

    def __init__(self, ops: GdnOps, device: torch.device) -> None:
        """Prepare what does not depend on a batch."""
        spec = ops.spec
        widths = [spec.conv_dim + spec.num_v_heads * spec.head_v_dim, 2 * spec.num_v_heads]
        channels = (torch.arange(width, device=device) for width in widths)
        self.ops = ops
        self.compiled_ops = custom_ops.register(ops, custom_ops.free_name("transformers"))
        self.orders = deinterleave(spec, *channels).split(widths)
        self._shared: tuple[tuple[int, int, bool], PrefillMetadata] | None = None

    def forward(
        self,
        layer: Any,
        project: Project,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        *,
        cache_params: Any = None,
        **keywords: object,
    ) -> Tensor:
        """Return the layer's output for hidden states [B, T, hidden], and advance its cache."""
        _refuse(hidden_states, keywords)
        cache = cache_params if cache is None else cache
        B, T = hidden_states.shape[:2]
        if attention_mask is not None:
            hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
        x = project(self, layer, hidden_states)
        pool, has_state = self._states(layer, cache, x.mixed_qkv, (B, T))
        ops, batch = self._ops_and_batch(B, T, has_state, hidden_states.device)
        inputs = (x.mixed_qkv, x.a, x.b, _params(layer), pool)
        if has_state and T == 1:
            o = ops.decode_step(*inputs, state_indices=batch.state_indices, gate=x.gate)
        else:
            o = ops.prefill_step(*inputs, metadata=batch, gate=x.gate)
        if cache is not None:
            cache.layers[layer.layer_idx].has_previous_state[0] = True
        output: Tensor = layer.out_proj(o.flatten(1).unflatten(0, (B, T)))
        return output

    def _states(
        self, layer: Any, cache: Any, mixed_qkv: Tensor, batch: tuple[int, int]
    ) -> tuple[StatePool, bool]:
        """Return the cache's tensors as pools, and whether they hold anything."""
        spec = self.ops.spec
        if mixed_qkv.dtype != spec.dtype:
            raise InputError(
                f"projections are {mixed_qkv.dtype}, needs {spec.dtype}, the layer's when use() "
                "was called: undo it and use the model again"
            )
        if cache is None:
            return StatePool.allocate(spec, batch[0], mixed_qkv.device), False
        states = _kept(cache, layer.layer_idx)
        if not states.is_conv_states_initialized[0]:
            inputs = mixed_qkv.unflatten(0, batch).transpose(1, 2)
            states.lazy_initialization(conv_states=inputs, conv_kernel_size=spec.conv_width)
        if not states.is_recurrent_states_initialized[0]:
            shape = (batch[0], *state_slot_shape(spec))
            state = torch.empty(shape, dtype=spec.state_dtype, device=mixed_qkv.device)
            states.lazy_initialization(recurrent_states=state.mT)  # keeps strides
        if states.recurrent_states[0].stride(-2) != 1:
            states.recurrent_states[0] = states.recurrent_states[0].mT.contiguous().mT
        pool = StatePool(states.conv_states[0][..., 1:], states.recurrent_states[0].mT)
        _check_pool(pool, spec, batch[0])
        return pool, states.has_previous_state[0]

    def _ops_and_batch(
        self, B: int, T: int, has_state: bool, device: torch.device
    ) -> tuple[GdnOps, PrefillMetadata]:
        """Return B sequences of T tokens, planned once for all layers of a step."""
        if torch.compiler.is_compiling():
            return self.compiled_ops, _batch(B, T, has_state, device)
        key = (B, T, has_state)
        if self._shared is not None and self._shared[0] == key:
            return self.ops, self._shared[1]
        with torch.inference_mode(False):  # a later call may be recorded by autograd
            batch = _batch(B, T, has_state, device)
            self.ops.plan_prefill(batch)
        # what a graph captures is filled by its replays, for no one else
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            self._shared = (key, batch)
        return self.ops, batch


def _batch(B: int, T: int, has_state: bool, device: torch.device) -> PrefillMetadata:
    return PrefillMetadata(
        cu_seqlens=torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device),
        state_indices=torch.arange(B, dtype=torch.int32, device=device),
        has_initial_state=None if has_state else torch.zeros(B, dtype=torch.bool, device=device),
        seq_lens_cpu=[T] * B,
    )


def _gdn_layers(model: nn.Module) -> list[tuple[Any, Project]]:
    """Return the layers to replace, each as it was made, and how they project."""
    found: list[tuple[Any, Project]] = []
    for module in model.modules():
        names = (kind.__name__ for kind in type(module).__mro__)
        found += [(module, PROJECTIONS[name]) for name in names if name in PROJECTIONS]
    if not found:
        others = {type(m).__name__ for m in model.modules() if "DeltaNet" in type(m).__name__}
        raise InputError(
            f"model has {', '.join(sorted(others)) or 'no GDN layer'}, needs a layer of class "
            f"{' or '.join(PROJECTIONS)}"
        )
    for layer, _ in found:
        current = vars(layer).get(_called(layer))
        if current is not None and getattr(current, "__func__", None) is not type(layer).forward:
            raise InputError(
                f"the forward of layer {layer.layer_idx} is replaced already, needs its own"
            )
        taken = inspect.signature(type(layer).forward).parameters
        if not taken.keys() & set(CACHES):
            raise InputError(
                f"the forward of layer {layer.layer_idx} takes {', '.join(taken)}, needs "
                f"{' or '.join(CACHES)}: a transformers that is not known"
            )
        if layer.A_log.is_meta:
            raise InputError(
                f"layer {layer.layer_idx} is on the meta device, needs weights that are loaded and "
                "not offloaded"
            )
    return found


def _called(layer: Any) -> str:
    """Name the attribute to replace: a hook of accelerate calls what it found in its place."""
    return "_old_forward" if hasattr(layer, "_hf_hook") else "forward"


def _spec(layer: Any) -> GdnSpec:
    return GdnSpec(
        num_k_heads=layer.num_k_heads,
        num_v_heads=layer.num_v_heads,
        head_k_dim=layer.head_k_dim,
        head_v_dim=layer.head_v_dim,
        conv_width=layer.conv_kernel_size,
        dtype=layer.conv1d.weight.dtype,
        state_dtype=torch.float32,  # of every cache, whatever the config says
        activation=activation_named(layer.activation),
        gate_activation=activation_named(layer.norm.activation),
    )


def _params(layer: Any) -> GdnParams:
    return GdnParams(
        conv_weight=layer.conv1d.weight.squeeze(1),
        conv_bias=layer.conv1d.bias,
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        norm_weight=layer.norm.weight,
        norm_eps=layer.layer_norm_epsilon,
    )


def _refuse(hidden_states: Tensor, keywords: Mapping[str, object]) -> None:
    """Refuse what a layer may be asked for and is not served."""
    packed = [name for name in PACKED if keywords.get(name) is not None]
    if packed:
        raise UnsupportedCallError(
            f"{packed[0]} is given, which packs sequences in a row: needs a row for each, padded"
        )
    if torch.is_autocast_enabled(hidden_states.device.type):
        raise UnsupportedCallError(
            "autocast is on, in whose dtype projections would come: needs it off, and the model "
            "in the dtype wanted"
        )


def _kept(cache: Any, layer_idx: int) -> Any:
    """Return what a cache keeps of a layer; refuse attention's, and what keeps more than states."""
    kept: Any = dict(enumerate(cache.layers)).get(layer_idx)
    if not hasattr(kept, "recurrent_states"):
        raise InputError(
            f"the cache keeps {type(kept).__name__} of GDN layer {layer_idx}, needs states: "
            "DynamicCache(config=model.config)"
        )
    if kept.record_past:
        raise UnsupportedCallError(
            "the cache records past states to take tokens back, which a recurrent state cannot"
        )
    return kept


def _check_pool(pool: StatePool, spec: GdnSpec, batch: int) -> None:
    """Refuse a cache that was made for another batch or by another model."""
    conv_shape = conv_slot_shape(spec, spec.conv_state_len)
    for name, states, dtype, shape in (
        ("conv", pool.conv_state, spec.conv_state_dtype, conv_shape),
        ("recurrent", pool.state, spec.state_dtype, state_slot_shape(spec)),
    ):
        assert states is not None
        if states.shape != (batch, *shape) or states.dtype != dtype:
            raise InputError(
                f"the cache's {name} states are {shape_text(states.shape)} of {states.dtype}, "
                f"needs {shape_text((batch, *shape))} of {dtype}"
            )
