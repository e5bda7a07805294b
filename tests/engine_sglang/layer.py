# SPDX-License-Identifier: Apache-2.0
"""A GDN layer of SGLang's kit whose pools hold NaN, but for the slots of its requests."""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MambaPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.test.kits.attention_unittest.attention_methods import gdn_attention
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_SLOTS = 8  # of which SGLang reserves the first
LAST = NUM_SLOTS - 1
SLOTS = (1, LAST, 4)  # of the requests


def make_layer(
    mode: ForwardMode,
    tokens: Sequence[int],
    prefixes: Sequence[int] = (3, 5, 9),
    slots: Sequence[int] = SLOTS,
) -> Any:
    """Return the kit's fixture of one batch: ``tokens`` of every request after its prefix."""
    case = gdn_attention.GDNAttentionCase(
        name="poisoned",
        backend="none",
        forward_mode=mode,
        num_k_heads=2,
        num_v_heads=4,
        page_size=1,
        prefix_lens=tuple(prefixes),
        extend_lens=() if mode.is_decode() else tuple(tokens),
        conv_history_weight=0.5,
    )
    layer = gdn_attention.build_gdn_attention_fixture(
        unittest.TestCase(),
        case,
        device=DEVICE,
        max_context_len=256,
        runner_batch_size=NUM_SLOTS - 1,
    )
    rows = torch.arange(1, len(slots) + 1, dtype=torch.int32, device=DEVICE)
    layer.forward_batch.req_pool_indices = rows  # SGLang reserves the first row too
    mapping = layer.runner.req_to_token_pool.req_index_to_mamba_index_mapping
    mapping.zero_()
    mapping[rows] = torch.tensor(slots, dtype=mapping.dtype, device=DEVICE)
    poison(layer, slots)
    return layer


def poison(layer: Any, slots: Sequence[int]) -> None:
    """Fill every slot with NaN, then those of the requests with numbers."""
    generator = torch.Generator().manual_seed(1)
    for pool in pools(layer):
        pool.fill_(float("nan"))
        for slot in slots:
            values = torch.randn(pool.shape[1:], generator=generator) * 0.1
            pool[slot] = values.to(pool)


def pools(layer: Any) -> tuple[Tensor, Tensor]:
    """Return the windows and the states, by slot."""
    cache = layer.runner.req_to_token_pool.mamba2_layer_cache(0)
    return cache.conv[0], cache.temporal


def replace_pools(layer: Any, conv_state: Tensor, state: Tensor) -> None:
    """Give the layer other memory: [slots, D, L] and [slots, HV, V, K]."""
    pool = layer.runner.req_to_token_pool.mamba_pool
    pool.mamba_cache = MambaPool.State(conv=[conv_state[None]], temporal=state[None])


def pad_eagerly(layer: Any, requests: int) -> None:
    """Pad a decode batch as SGLang does where ranks have to agree on its size."""
    batch = layer.forward_batch
    layer.runner.attn_backend = layer.backend
    batch._pad_inputs_to_size(layer.runner, requests, requests)
    batch.batch_size = requests
    _pad_rows(layer, requests)


def prepare_graph(layer: Any, requests: int, tokens: int = 1) -> None:
    """Put the batch in the buffers of a graph that was captured for more requests."""
    batch, backend = layer.forward_batch, layer.backend
    padding = requests - batch.batch_size
    backend.init_cuda_graph_state(max_bs=requests, max_num_tokens=requests * tokens)
    batch.req_pool_indices = torch.cat(
        [batch.req_pool_indices, batch.req_pool_indices.new_zeros(padding)]
    )
    batch.batch_size, batch.num_padding = requests, padding
    backend.init_forward_metadata_out_graph(batch)
    backend.init_forward_metadata_in_graph(batch)
    _pad_rows(layer, requests * tokens)


def run(layer: Any) -> Tensor:
    """Run the layer on its batch, whose metadata is prepared; return [T, HV, V]."""
    with forward_context(ForwardContext(attn_backend=layer.backend)):
        rows = (layer.mixed_qkv, layer.a, layer.b)
        return layer.actual_module(layer.forward_batch, *rows)[0]


def run_eagerly(layer: Any) -> Tensor:
    """Prepare the batch and run it; return [T, HV, V]."""
    layer.backend.init_forward_metadata(layer.forward_batch)
    return run(layer)


def _pad_rows(layer: Any, rows: int) -> None:
    """Add rows of NaN: nobody's."""
    for name in ("mixed_qkv", "a", "b"):
        x = getattr(layer, name)
        nan = torch.full((rows - len(x), *x.shape[1:]), float("nan")).to(x)
        setattr(layer, name, torch.cat([x, nan]))
