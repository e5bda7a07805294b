# SPDX-License-Identifier: Apache-2.0
"""On a GPU a layer never waits for the device, and decode and drafts replay from a graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from tests.cases import bits
from tests.engine_sglang.layer import DEVICE, make_layer, pools, prepare_graph, run, run_eagerly
from tests.engine_sglang.verifying import P, make_verifier

pytestmark = [
    pytest.mark.usefixtures("deterministic"),
    pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, torch sees none"),
]
MODES = {
    "decode": (ForwardMode.DECODE, (1, 1, 1)),
    "prefill": (ForwardMode.EXTEND, (4, 1, 66)),
}


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_does_not_wait_for_the_device(mode: str, waiting_is_an_error: None) -> None:
    layer = make_layer(*MODES[mode])
    run_eagerly(layer)

    torch.cuda.set_sync_debug_mode("error")
    run(layer)


def test_drafts_do_not_wait_for_the_device(waiting_is_an_error: None) -> None:
    layer = make_verifier(topk=2)
    run_eagerly(layer)

    torch.cuda.set_sync_debug_mode("error")
    run(layer)


@pytest.mark.parametrize("tokens", [1, P], ids=["decode", "drafts"])
def test_a_graph_replays_what_runs_eagerly(tokens: int) -> None:
    def prepared() -> object:
        layer = make_layer(*MODES["decode"]) if tokens == 1 else make_verifier(topk=1)
        prepare_graph(layer, 5, tokens=tokens)
        return layer

    eager, captured = prepared(), prepared()
    want = [run(eager) for _ in range(3)][-1]

    run(captured)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(captured)
    graph.replay()
    graph.replay()

    assert torch.equal(bits(got), bits(want))
    for pool, expected in zip(pools(captured), pools(eager), strict=True):
        assert torch.equal(bits(pool), bits(expected))
