# SPDX-License-Identifier: Apache-2.0
"""A Gated DeltaNet layer as model code: the same module on every device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial

import torch
from torch import Tensor, nn

from gdn_portable.interface import GdnOps
from gdn_portable.metadata import (
    DeferredUpdates,
    Drafts,
    GdnParams,
    PrefillMetadata,
    VerifyMetadata,
)
from gdn_portable.spec import GdnSpec
from gdn_portable.state import StatePool


class GatedDeltaNet(nn.Module):
    """Projections, convolution, recurrence, gated norm and output projection of one layer.

    The module holds weights and no state: ops and pool are passed to every forward, so that one
    bound object serves all layers. State dicts of Hugging Face's Qwen3-Next, Qwen3.5 and Qwen4-Exp
    layers load as they are, told apart by their keys. To train it, bind with
    ``backend="reference"``: the other kernels have no backward, and are called under
    ``torch.no_grad()``. :class:`gdn_portable.parallel.HeadParallel` shards it.

    Attributes:
        spec: the layer, as this rank has it.
        whole_spec: the layer that state dicts hold; ``spec``, where it is not sharded.
        in_proj: hidden -> [q | k | v | z | b | a], one product.
        conv1d: holds the weight [D, 1, W].
        A_log: [HV] float32.
        dt_bias: [HV] float32.
        norm: holds the weight [V] and eps of the gated RMSNorm.
        out_proj: HV * V -> hidden.
    """

    def __init__(self, spec: GdnSpec, hidden_size: int, *, norm_eps: float = 1e-6) -> None:
        """Allocate and initialise weights in ``spec.dtype`` on torch's default device."""
        super().__init__()
        self.spec = self.whole_spec = spec
        value_dim = spec.num_v_heads * spec.head_v_dim
        rows = sum(projections(spec))
        self.in_proj = nn.Linear(hidden_size, rows, bias=False, dtype=spec.dtype)
        self.conv1d = nn.Conv1d(
            spec.conv_dim,
            spec.conv_dim,
            spec.conv_width,
            groups=spec.conv_dim,
            bias=False,
            dtype=spec.dtype,
        )
        self.A_log = nn.Parameter(torch.empty(spec.num_v_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(spec.num_v_heads, dtype=torch.float32))
        self.norm = nn.RMSNorm(spec.head_v_dim, eps=norm_eps, dtype=spec.dtype)
        self.out_proj = nn.Linear(value_dim, hidden_size, bias=False, dtype=spec.dtype)
        self.register_load_state_dict_pre_hook(_from_hugging_face)  # type: ignore[no-untyped-call]
        self.reset_decay()

    def reset_decay(self) -> None:
        """Draw decay rates in (0.01, 16) and time steps in (0.001, 0.1), as published models do."""
        with torch.no_grad():
            self.A_log.uniform_(0.01, 16).log_()
            steps = self.dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp_()
            steps.add_((-(-steps).expm1()).log())  # inverse of softplus

    @property
    def params(self) -> GdnParams:
        """What the fused steps take."""
        return GdnParams(
            conv_weight=self.conv1d.weight.squeeze(1),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            norm_weight=self.norm.weight,
            norm_eps=self.norm.eps or 0.0,
        )

    def prefill(
        self,
        hidden: Tensor,
        ops: GdnOps,
        pool: StatePool,
        *,
        metadata: PrefillMetadata,
        checkpoint_state: Tensor | None = None,
    ) -> Tensor:
        """Run packed sequences, hidden [T, hidden_size], as :class:`interface.PrefillStep`."""
        mixed_qkv, gate, b, a = self._project(hidden)
        o = ops.prefill_step(
            mixed_qkv,
            a,
            b,
            self.params,
            pool,
            metadata=metadata,
            checkpoint_state=checkpoint_state,
            gate=gate,
        )
        return self._output(o)

    def decode(
        self,
        hidden: Tensor,
        ops: GdnOps,
        pool: StatePool,
        *,
        state_indices: Tensor,
        out_state_indices: Tensor | None = None,
        deferred: DeferredUpdates | None = None,
        num_deferred: Tensor | None = None,
        flush: Tensor | None = None,
    ) -> Tensor:
        """Run one token per sequence, hidden [B, hidden_size], as :class:`interface.DecodeStep`."""
        mixed_qkv, gate, b, a = self._project(hidden)
        o = ops.decode_step(
            mixed_qkv,
            a,
            b,
            self.params,
            pool,
            state_indices=state_indices,
            out_state_indices=out_state_indices,
            deferred=deferred,
            num_deferred=num_deferred,
            flush=flush,
            gate=gate,
        )
        return self._output(o)

    def verify(
        self,
        hidden: Tensor,
        ops: GdnOps,
        pool: StatePool,
        *,
        metadata: VerifyMetadata,
        drafts: Drafts | None = None,
    ) -> Tensor:
        """Run packed drafts, hidden [T, hidden_size], as :class:`interface.VerifyStep`."""
        mixed_qkv, gate, b, a = self._project(hidden)
        o = ops.verify_step(
            mixed_qkv, a, b, self.params, pool, metadata=metadata, drafts=drafts, gate=gate
        )
        return self._output(o)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mixed_qkv, z, b, a = self.in_proj(hidden).split(projections(self.spec), dim=-1)
        gate = z.unflatten(-1, (self.spec.num_v_heads, self.spec.head_v_dim))
        return mixed_qkv, gate, b, a

    def _output(self, o: Tensor) -> Tensor:
        out: Tensor = self.out_proj(o.flatten(-2))
        return out


def projections(spec: GdnSpec) -> tuple[int, int, int, int]:
    """Return the rows of [qkv], z, b and a in ``in_proj``."""
    return (
        spec.conv_dim,
        spec.num_v_heads * spec.head_v_dim,
        spec.num_v_heads,
        spec.num_v_heads,
    )


def _from_hugging_face(
    module: nn.Module,
    state_dict: MutableMapping[str, Tensor],
    prefix: str,
    local_metadata: Mapping[str, object],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Turn the projections of a Qwen3-Next state dict, or of a later one, into ``in_proj``.

    Where a part is missing the keys stay as they are, for torch to report.
    """
    assert isinstance(module, GatedDeltaNet)
    D, value_dim, HV, _ = projections(module.whole_spec)
    layouts: tuple[tuple[dict[str, int], Callable[..., Tensor]], ...] = (
        ({"qkvz": D + value_dim, "ba": 2 * HV}, partial(deinterleave, module.whole_spec)),
        ({"qkv": D, "z": value_dim, "b": HV, "a": HV}, lambda *parts: torch.cat(parts)),
    )
    for rows, join in layouts:
        sizes = {f"{prefix}in_proj_{part}.weight": size for part, size in rows.items()}
        if not all(key in state_dict for key in sizes):
            continue
        wrong = {key: len(state_dict[key]) for key in sizes if len(state_dict[key]) != sizes[key]}
        error_msgs += [
            f"size mismatch for {key}: {got} rows, needs {sizes[key]}" for key, got in wrong.items()
        ]
        if not wrong:
            state_dict[f"{prefix}in_proj.weight"] = join(*map(state_dict.pop, sizes))


def deinterleave(spec: GdnSpec, qkvz: Tensor, ba: Tensor) -> Tensor:
    """Return [q | k | v | z | b | a] from Qwen3-Next's rows, which are grouped by key head."""
    H, K, ratio = spec.num_k_heads, spec.head_k_dim, spec.num_v_heads // spec.num_k_heads
    V = ratio * spec.head_v_dim
    grouped = (*qkvz.unflatten(0, (H, -1)).split([K, K, V, V], dim=1),)
    grouped += (*ba.unflatten(0, (H, -1)).split([ratio, ratio], dim=1),)
    return torch.cat([rows.flatten(0, 1) for rows in grouped])
