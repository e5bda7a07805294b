# SPDX-License-Identifier: Apache-2.0
"""What pads a batch touches no slot: the pools hold NaN where nobody may look, compared by bits."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.test.kits.attention_unittest.attention_methods.gdn_attention import GDN_ATOL, GDN_RTOL

from tests.cases import bits
from tests.engine_sglang.layer import (
    DEVICE,
    SLOTS,
    make_layer,
    pad_eagerly,
    pools,
    prepare_graph,
    run,
    run_eagerly,
)

pytestmark = pytest.mark.usefixtures("deterministic")


def test_requests_that_pad_an_eager_decode_touch_no_slot() -> None:
    plain, padded = (make_layer(ForwardMode.DECODE, (1, 1, 1)) for _ in range(2))
    pad_eagerly(padded, 5)

    want, got = run_eagerly(plain), run_eagerly(padded)

    assert torch.equal(bits(got[:3]), bits(want))
    assert not got[3:].any()
    _assert_same_pools(padded, plain)


def test_requests_that_pad_the_decode_of_a_graph_touch_no_slot() -> None:
    plain, padded = (make_layer(ForwardMode.DECODE, (1, 1, 1)) for _ in range(2))
    prepare_graph(padded, 5)

    want, got = run_eagerly(plain), run(padded)

    assert torch.equal(bits(got[:3]), bits(want))
    assert not got[3:].any()
    _assert_same_pools(padded, plain)


def test_a_new_request_does_not_read_its_slot() -> None:
    clean = make_layer(ForwardMode.EXTEND, (4, 1, 66), prefixes=(0, 0, 0))
    dirty = make_layer(ForwardMode.EXTEND, (4, 1, 66), prefixes=(0, 0, 0))
    for pool in pools(clean):
        pool[list(SLOTS)] = 0
    for pool in pools(dirty):
        pool.fill_(float("nan"))

    want, got = run_eagerly(clean), run_eagerly(dirty)

    assert not got.isnan().any()
    assert torch.equal(bits(got), bits(want))
    _assert_same_pools(dirty, clean)


def test_a_prefill_that_goes_on_reads_its_slot_and_no_other() -> None:
    layer = make_layer(ForwardMode.EXTEND, (4, 1, 66))
    before = [pool.clone() for pool in pools(layer)]

    o = run_eagerly(layer)

    assert not o.isnan().any()
    for pool, old in zip(pools(layer), before, strict=True):
        assert not pool[list(SLOTS)].isnan().any()
        assert (pool[list(SLOTS)] != old[list(SLOTS)]).flatten(1).any(1).all()
        assert pool[[0, 2, 3, 5, 6]].isnan().all()


def test_a_projection_that_nobody_split_is_used_as_it_is(steps: bool) -> None:
    if not steps and DEVICE == "cpu":
        pytest.skip("SGLang splits a projection by a kernel, which needs a GPU")
    split, whole = (make_layer(ForwardMode.DECODE, (1, 1, 1)) for _ in range(2))
    z = torch.randn(3, 4, 32).to(split.mixed_qkv)
    projected = torch.cat([whole.mixed_qkv, z.flatten(1)], dim=-1)
    whole.mixed_qkv = (projected, torch.cat([whole.b, whole.a], dim=-1))

    want = run_eagerly(split)
    with forward_context(ForwardContext(attn_backend=whole.backend)):
        whole.backend.init_forward_metadata(whole.forward_batch)
        got, got_z = whole.actual_module(whole.forward_batch, whole.mixed_qkv, None, None)

    assert torch.equal(got_z.reshape(3, 4, 32), z)
    torch.testing.assert_close(got[0], want, atol=GDN_ATOL, rtol=GDN_RTOL)
    for pool, other in zip(pools(whole), pools(split), strict=True):
        torch.testing.assert_close(pool, other, atol=GDN_ATOL, rtol=GDN_RTOL, equal_nan=True)


def _assert_same_pools(layer: object, other: object) -> None:
    for got, want in zip(pools(layer), pools(other), strict=True):
        assert torch.equal(bits(got), bits(want))
        assert got[[0, 2, 3, 5, 6]].isnan().all()
