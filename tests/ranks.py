# SPDX-License-Identifier: Apache-2.0
"""What each rank of a sharded layer does in the tests, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

from gdn_portable import GdnOps, GdnSpec, PrefillMetadata, StatePool, bind
from gdn_portable.nn import GatedDeltaNet
from gdn_portable.parallel import HeadParallel

HIDDEN = 32
LENGTHS = [5, 66, 1]
SLOTS = [3, 0, 5]
DECODES = 3
SPEC = GdnSpec(
    num_k_heads=2,
    num_v_heads=6,
    head_k_dim=16,
    head_v_dim=32,
    dtype=torch.float32,
    state_dtype=torch.float32,
)


def inputs(device: torch.device) -> Tensor:
    """Return hidden states of the prompts, and after them of the tokens that are decoded."""
    generator = torch.Generator().manual_seed(1)
    rows = sum(LENGTHS) + DECODES * len(LENGTHS)
    return torch.randn(rows, HIDDEN, generator=generator).to(device)


def whole_layer(device: torch.device) -> GatedDeltaNet:
    """Return the layer that is sharded."""
    torch.manual_seed(0)
    layer = GatedDeltaNet(SPEC, HIDDEN)
    torch.nn.init.normal_(layer.norm.weight)
    return layer.to(device)


@torch.no_grad()
def run(layer: Any, ops: GdnOps, x: Tensor) -> dict[str, Tensor]:
    """Prefill and decode; return outputs and states."""
    pool = StatePool.allocate(layer.spec, 6, x.device)
    slots = torch.tensor(SLOTS, device=x.device)
    fresh = torch.zeros(len(SLOTS), dtype=torch.bool, device=x.device)
    offsets = torch.tensor([0, *LENGTHS], device=x.device).cumsum(0)
    prompts, *tokens = x.split([sum(LENGTHS), *[len(SLOTS)] * DECODES])
    batch = PrefillMetadata(offsets, slots, fresh)
    ops.plan_prefill(batch)
    outputs = [layer.prefill(prompts, ops, pool, metadata=batch)]
    outputs += [layer.decode(x, ops, pool, state_indices=slots) for x in tokens]
    assert pool.conv_state is not None and pool.state is not None
    return {"outputs": torch.cat(outputs), "conv_state": pool.conv_state, "state": pool.state}


def gradients(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """Return those of a loss of a prefill, by the reference; of DTensors, whole."""
    x = x[: sum(LENGTHS)].clone().requires_grad_()
    ops = bind(layer.spec, x.device, backend="reference")
    pool = StatePool.allocate(layer.spec, 6, x.device)
    offsets = torch.tensor([0, *LENGTHS], device=x.device).cumsum(0)
    batch = PrefillMetadata(offsets, torch.tensor(SLOTS, device=x.device))
    layer.prefill(x, ops, pool, metadata=batch).square().sum().backward()
    found = {"hidden": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in found.items()
        if grad is not None
    }


def work(rank: int, ranks: int, backend: str, folder: Path) -> None:
    """Shard the layer in three ways, run each, and write what came out of them to ``folder``."""
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    try:
        torch.save(_results(ranks, device, folder), folder / f"rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _results(ranks: int, device: torch.device, folder: Path) -> dict[str, Any]:
    mesh, x = init_device_mesh(device.type, (ranks,)), inputs(device)
    layer = parallelize_module(whole_layer(device), mesh, HeadParallel())
    ops = bind(layer.spec, device)

    with torch.device("meta"):
        empty = GatedDeltaNet(SPEC, HIDDEN)
    loaded = parallelize_module(empty, mesh, HeadParallel()).to_empty(device=device)
    loaded.load_state_dict(torch.load(folder / "hugging_face.pt"))
    again = parallelize_module(whole_layer(device), mesh, HeadParallel())
    again.load_state_dict(loaded.state_dict())

    tokens = HeadParallel(input_layouts=Shard(0), output_layouts=Shard(0))
    by_tokens = parallelize_module(whole_layer(device), mesh, tokens)
    share = x[: sum(LENGTHS)].chunk(ranks)[mesh.get_local_rank()]
    batch = PrefillMetadata(
        torch.tensor([0, *LENGTHS], device=device).cumsum(0), torch.tensor(SLOTS, device=device)
    )
    with torch.no_grad():
        pool = StatePool.allocate(layer.spec, 6, device)
        ops.plan_prefill(batch)
        outputs = by_tokens.prefill(share, ops, pool, metadata=batch)
    return {
        "spec": layer.spec,
        "sharded": run(layer, ops, x),
        "gradients": gradients(layer, x),
        "loaded": run(loaded, ops, x),
        "loaded again": run(again, ops, x),
        "by tokens": outputs.clone(),  # waits for the other ranks' parts
    }
