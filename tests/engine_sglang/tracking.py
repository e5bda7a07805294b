# SPDX-License-Identifier: Apache-2.0
"""Prefix caching: the state and window that SGLang asks to be kept are those after that prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.attention import hybrid_linear_attn_backend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods.gdn_attention import GDN_ATOL, GDN_RTOL
from torch import Tensor

from tests.cases import bits
from tests.engine_sglang.layer import DEVICE, SLOTS, make_layer, pools, run_eagerly

pytestmark = pytest.mark.usefixtures("steps")
LENGTHS = (130, 64, 9)
KEPT = (128, 64)  # of the first two requests: SGLang keeps whole chunks of 64 tokens
TARGETS = (2, 5, 6)


def _track(layer: Any, cpu_lists: bool) -> None:
    """Ask for the states of the first two requests, as the radix cache does."""
    batch = layer.forward_batch
    lengths = [p + n for p, n in zip(layer.case.prefix_lens, LENGTHS, strict=True)]
    batch.mamba_track_mask = torch.tensor([True, True, False], device=DEVICE)
    batch.mamba_track_indices = torch.tensor(TARGETS, device=DEVICE)
    batch.mamba_track_seqlens = torch.tensor(lengths, device=DEVICE)
    if cpu_lists:
        batch.mamba_prefill_track_mask_cpu = [True, True, False]
        batch.mamba_track_seqlens_cpu = lengths


def _without_what_follows(layer: Any, kept: tuple[int, ...]) -> Any:
    """Return a layer on the same inputs, cut after ``kept`` tokens of every request."""
    cut = make_layer(ForwardMode.EXTEND, kept, prefixes=layer.case.prefix_lens)
    starts = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0).tolist()
    rows = [start + i for start, n in zip(starts, kept, strict=True) for i in range(n)]
    for name in ("mixed_qkv", "a", "b"):
        setattr(cut, name, getattr(layer, name)[rows])
    cut.actual_module.load_state_dict(layer.actual_module.state_dict())
    return cut


@pytest.mark.parametrize("cpu_lists", [True, False], ids=["lists", "tensors"])
@pytest.mark.parametrize("prefixes", [(3, 5, 9), (0, 0, 0)], ids=["goes on", "new"])
def test_the_state_after_the_last_whole_chunk_is_kept(
    prefixes: tuple[int, ...], cpu_lists: bool
) -> None:
    layer = make_layer(ForwardMode.EXTEND, LENGTHS, prefixes=prefixes)
    cut = _without_what_follows(layer, (*KEPT, LENGTHS[2]))
    _track(layer, cpu_lists)

    run_eagerly(layer)
    run_eagerly(cut)

    (windows, states), (cut_windows, cut_states) = pools(layer), pools(cut)
    for target, slot in zip(TARGETS[:2], SLOTS[:2], strict=True):
        assert torch.equal(bits(windows[target]), bits(cut_windows[slot]))
        torch.testing.assert_close(states[target], cut_states[slot], atol=GDN_ATOL, rtol=GDN_RTOL)
    for pool in pools(layer):
        assert pool[[0, 3, 6]].isnan().all()


def test_nothing_is_kept_where_nothing_is_asked_for() -> None:
    layer = make_layer(ForwardMode.EXTEND, LENGTHS)

    run_eagerly(layer)

    for pool in pools(layer):
        assert pool[[0, 2, 3, 5, 6]].isnan().all()


def test_a_decoded_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(hybrid_linear_attn_backend, "track_mamba_states_all_layers", _eagerly)
    layer = make_layer(ForwardMode.DECODE, (1, 1, 1))
    layer.forward_batch.mamba_track_mask = torch.tensor([True, False, True], device=DEVICE)
    layer.forward_batch.mamba_track_indices = torch.tensor(TARGETS, device=DEVICE)

    run_eagerly(layer)

    for pool in pools(layer):
        assert torch.equal(bits(pool[[2, 6]]), bits(pool[[SLOTS[0], SLOTS[2]]]))
        assert pool[[0, 3, 5]].isnan().all()


def _eagerly(
    conv_pool: Tensor,
    ssm_pool: Tensor,
    slots: Tensor,
    mask: Tensor,
    targets: Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """Do what SGLang's kernel for GPUs does."""
    for pool in (conv_pool, ssm_pool):
        pool[:, targets[mask]] = pool[:, slots[mask].long()]
