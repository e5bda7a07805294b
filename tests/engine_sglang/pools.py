# SPDX-License-Identifier: Apache-2.0
"""States stay in SGLang's own memory, whatever its strides, and nothing is copied to reach them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.linear import gdn_backend
from sglang.srt.mem_cache.memory_pool import MambaPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods.gdn_attention import GDN_ATOL, GDN_RTOL

from gdn_portable import GdnSpec, InputError, StatePool, UnsupportedError
from tests.cases import bits
from tests.engine_sglang.layer import (
    DEVICE,
    NUM_SLOTS,
    SLOTS,
    make_layer,
    poison,
    pools,
    replace_pools,
    run_eagerly,
)

MODES = {
    "prefill": (ForwardMode.EXTEND, (4, 1, 66)),
    "decode": (ForwardMode.DECODE, (1, 1, 1)),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_page_that_both_states_share_is_used_where_it_is(
    mode: str, steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, paged = make_layer(*MODES[mode]), make_layer(*MODES[mode])
    windows, states = pools(paged)
    spec = GdnSpec(
        num_k_heads=2,
        num_v_heads=4,
        head_k_dim=32,
        head_v_dim=32,
        dtype=windows.dtype,
        state_dtype=states.dtype,
        conv_width=2,
    )
    pages = StatePool.allocate(spec, NUM_SLOTS, DEVICE, paged=True)
    replace_pools(paged, pages.conv_state, pages.state)
    poison(paged, SLOTS)

    want, got = run_eagerly(plain), run_eagerly(paged)

    assert not pages.state.is_contiguous()
    assert not paged.backend.linear_attn_backend.requires_contiguous_prefill_state
    assert torch.equal(bits(got), bits(want))
    for pool, expected in zip((pages.conv_state, pages.state), pools(plain), strict=True):
        assert torch.equal(bits(pool.contiguous()), bits(expected))


def _give_ring(layer: Any, rows: int) -> None:
    """Give the pool what --enable-linear-replayssm does."""
    pool = layer.runner.req_to_token_pool.mamba_pool
    cache, options = pool.mamba_cache, {"dtype": layer.mixed_qkv.dtype, "device": DEVICE}
    HV, V, K = cache.temporal.shape[-3:]
    pool.mamba_cache = MambaPool.State(
        conv=cache.conv,
        temporal=cache.temporal,
        replayssm_d=torch.zeros(1, NUM_SLOTS, HV, rows, V, **options),
        replayssm_k=torch.zeros(1, NUM_SLOTS, 2, rows, K, **options),
        replayssm_g=torch.zeros(1, NUM_SLOTS, HV, rows, device=DEVICE),
    )
    pool.enable_linear_replayssm, pool.linear_replayssm_cache_len = True, rows
    pool.replayssm_write_pos = torch.zeros(NUM_SLOTS, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("rows", [1, 4])
def test_states_are_written_where_a_ring_is_full(rows: int, steps: bool) -> None:
    plain, ringed = make_layer(*MODES["decode"]), make_layer(*MODES["decode"])
    _give_ring(ringed, rows)

    for step in range(2 * rows):
        before = pools(ringed)[1].clone()
        want, got = run_eagerly(plain), run_eagerly(ringed)

        torch.testing.assert_close(got, want, atol=GDN_ATOL, rtol=GDN_RTOL)
        assert torch.equal(bits(pools(ringed)[0]), bits(pools(plain)[0]))
        written = pools(plain)[1] if step % rows == rows - 1 else before
        torch.testing.assert_close(
            pools(ringed)[1], written, atol=GDN_ATOL, rtol=GDN_RTOL, equal_nan=True
        )


def test_a_ring_of_drafts_is_refused_before_a_layer_runs(steps: bool) -> None:
    layer = make_layer(*MODES["decode"])
    pool = layer.runner.req_to_token_pool.mamba_pool
    _give_ring(layer, 16)
    pool.replayssm_cache_base = torch.zeros(NUM_SLOTS, dtype=torch.int32)

    with pytest.raises(UnsupportedError, match="start without --enable-linear-replayssm-spec"):
        gdn_backend.GDNAttnBackend(layer.runner)


def test_two_windows_of_a_layer_are_refused(steps: bool) -> None:
    layer = make_layer(*MODES["decode"])
    pool = layer.runner.req_to_token_pool.mamba_pool
    cache = pool.mamba_cache
    pool.mamba_cache = MambaPool.State(conv=[*cache.conv, *cache.conv], temporal=cache.temporal)

    with pytest.raises(UnsupportedError, match="a layer has 2 conv states, needs 1"):
        gdn_backend.GDNAttnBackend(layer.runner)


@pytest.mark.parametrize("mode", MODES)
def test_windows_of_another_layout_are_refused_before_a_state_changes(
    mode: str, steps: bool
) -> None:
    layer = make_layer(*MODES[mode])
    windows, states = pools(layer)
    replace_pools(layer, windows.transpose(1, 2), states)
    before = [pool.clone() for pool in pools(layer)]

    with pytest.raises(InputError, match=r"needs 256 and \(256, 1\) \[D, L\]"):
        run_eagerly(layer)

    for pool, old in zip(pools(layer), before, strict=True):
        assert torch.equal(bits(pool), bits(old))
