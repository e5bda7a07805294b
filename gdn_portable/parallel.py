# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism of :class:`gdn_portable.nn.GatedDeltaNet`, by heads, on torch.distributed.

    mesh = init_device_mesh("cuda", (2,))
    parallelize_module(model, mesh, {"layers.*.mixer": HeadParallel()})
    ops = gdn_portable.bind(model.layers[0].mixer.spec, "cuda")    # of this rank's heads

Every rank has H / ranks key heads and the value heads that read them: its own rows of each of the
parts q, k, v, z, b and a, its own conv channels, its own states. ``out_proj`` adds the ranks up.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from gdn_portable.errors import InputError
from gdn_portable.metadata import GdnParams
from gdn_portable.nn import GatedDeltaNet
from gdn_portable.spec import GdnSpec


class HeadParallel(ParallelStyle):
    """Shards a ``GatedDeltaNet`` by heads, in ``parallelize_module``.

    Weights become DTensors; rows of ``in_proj`` and ``conv1d`` come in the order of the ranks. A
    whole state dict, ours or Hugging Face's, loads into the sharded layer: each rank takes its
    share, without communication, so a layer may be made on the meta device, sharded, and loaded.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
    ) -> None:
        """Choose what a layer is given and returns on each rank.

        Args:
            input_layouts: of hidden states; None is ``Replicate()``, all of them on every rank.
                ``Shard(0)`` is a share of the tokens, as in sequence parallelism.
            output_layouts: of what ``out_proj`` returns, likewise.
        """
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Shard ``module`` in place.

        Raises:
            InputError: it is no ``GatedDeltaNet``, or sharded already, or the mesh has more axes.
            SpecError: its heads do not divide.
        """
        if type(module) is not GatedDeltaNet:
            raise InputError(f"module is a {type(module).__name__}, needs a GatedDeltaNet")
        if device_mesh.ndim != 1:
            named = device_mesh.mesh_dim_names or ()
            axes = " or ".join(f"mesh[{name!r}]" for name in named) or "one of them"
            raise InputError(f"device_mesh has {device_mesh.ndim} axes, needs one: {axes}")
        spec, ranks = module.spec, device_mesh.size()
        module.spec = spec.shard(ranks)
        with torch.no_grad():
            for linear, order in _orders(spec, ranks).items():
                weight = module.get_parameter(linear)
                weight.copy_(weight[order.to(weight.device)])
        plan = {
            "in_proj": ColwiseParallel(input_layouts=self.input_layouts),
            "out_proj": RowwiseParallel(output_layouts=self.output_layouts),
        }
        parallelize_module(module, device_mesh, plan, src_data_rank=self.src_data_rank)
        for owner, name, placement in (
            (module.conv1d, "weight", Shard(0)),
            (module, "A_log", Shard(0)),
            (module, "dt_bias", Shard(0)),
            (module.norm, "weight", Replicate()),
        ):
            whole = owner.get_parameter(name)
            share = distribute_tensor(
                whole, device_mesh, [placement], src_data_rank=self.src_data_rank
            )
            owner.register_parameter(name, nn.Parameter(share, requires_grad=whole.requires_grad))
        module.__class__ = ShardedGatedDeltaNet
        module.register_load_state_dict_pre_hook(_take_shares)  # type: ignore[no-untyped-call]
        return module


class ShardedGatedDeltaNet(GatedDeltaNet):
    """One rank's heads of a layer, as :class:`HeadParallel` makes it."""

    @property
    def params(self) -> GdnParams:
        """What the fused steps take: this rank's share, as plain tensors."""
        return GdnParams(
            conv_weight=_share(self.conv1d.weight).squeeze(1),
            A_log=_share(self.A_log),
            dt_bias=_share(self.dt_bias),
            # its gradient is a sum over the heads of all ranks
            norm_weight=_share(self.norm.weight, grad=Partial()),
            norm_eps=self.norm.eps or 0.0,
        )


def _share(weight: Tensor, *, grad: Placement | None = None) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local(grad_placements=None if grad is None else [grad])


def _orders(spec: GdnSpec, ranks: int) -> dict[str, Tensor]:
    """Return the order of rows in which an even cut gives each rank its share of every part."""
    HV, values = spec.num_v_heads, spec.num_v_heads * spec.head_v_dim
    return {
        "in_proj.weight": _by_rank((*spec.conv_groups, values, HV, HV), ranks),
        "conv1d.weight": _by_rank(spec.conv_groups, ranks),
    }


def _by_rank(parts: Sequence[int], ranks: int) -> Tensor:
    shares = [part.chunk(ranks) for part in torch.arange(sum(parts)).split(list(parts))]
    return torch.cat([share[rank] for rank in range(ranks) for share in shares])


def _take_shares(
    module: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str, *rest: object
) -> None:
    """Cut this rank's share out of whole weights; what has another shape is left to torch."""
    assert isinstance(module, ShardedGatedDeltaNet)
    orders: dict[str, Tensor] | None = None
    for name, parameter in module.named_parameters():
        whole = state_dict.get(prefix + name)
        if whole is None or isinstance(whole, DTensor) or whole.shape != parameter.shape:
            continue
        assert isinstance(parameter, DTensor)
        mesh, (placement,) = parameter.device_mesh, parameter.placements
        orders = orders or _orders(module.whole_spec, mesh.size())
        if name in orders:
            whole = whole[orders[name].to(whole.device)]
        share = whole
        if isinstance(placement, Shard):
            share = whole.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()].contiguous()
        state_dict[prefix + name] = DTensor.from_local(
            share,
            mesh,
            [placement],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
