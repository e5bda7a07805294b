# SPDX-License-Identifier: Apache-2.0
"""A layer sharded by heads gives what it gave whole: on 2 processes by gloo, on 2 GPUs by NCCL."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdn_portable import InputError, SpecError, bind
from gdn_portable.nn import GatedDeltaNet
from gdn_portable.parallel import HeadParallel
from tests.ranks import HIDDEN, LENGTHS, SPEC, gradients, inputs, run, whole_layer, work

RANKS = 2

# sums of float32 in another order; the kernels' too on GPUs
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


class Ranks:
    """What came out of every rank, and the device of the whole layer to compare with."""

    def __init__(self, backend: str, folder: Path) -> None:
        self.device = torch.device("cpu" if backend == "gloo" else "cuda")
        torch.save(_hugging_face(), folder / "hugging_face.pt")
        torch.multiprocessing.spawn(work, (RANKS, backend, folder), nprocs=RANKS)
        self.results: list[dict[str, Any]] = [
            torch.load(folder / f"rank{rank}.pt", map_location=self.device, weights_only=False)
            for rank in range(RANKS)
        ]


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    if request.param == "nccl" and torch.cuda.device_count() < RANKS:
        pytest.skip(f"needs {RANKS} GPUs, torch sees {torch.cuda.device_count()}")
    return Ranks(request.param, tmp_path_factory.mktemp(request.param))


def _hugging_face() -> dict[str, Tensor]:
    """Return the weights of another layer, as Qwen3.5 checkpoints hold them."""
    torch.manual_seed(2)
    weights = dict(GatedDeltaNet(SPEC, HIDDEN).state_dict())
    rows = [SPEC.conv_dim, SPEC.num_v_heads * SPEC.head_v_dim, SPEC.num_v_heads, SPEC.num_v_heads]
    parts = weights.pop("in_proj.weight").split(rows)
    named = zip(("qkv", "z", "b", "a"), parts, strict=True)
    return weights | {f"in_proj_{name}.weight": part for name, part in named}


def _joined(results: list[dict[str, Any]], kind: str) -> dict[str, Tensor]:
    """Return what the whole layer would give: outputs of a rank, states of all of them."""
    of_ranks = [result[kind] for result in results]
    for other in of_ranks[1:]:
        close(other["outputs"], of_ranks[0]["outputs"], rtol=0, atol=0)
    groups = results[0]["spec"].conv_groups
    parts = zip(*(rank["conv_state"].split(groups, dim=1) for rank in of_ranks), strict=True)
    return {
        "outputs": of_ranks[0]["outputs"],
        "conv_state": torch.cat([torch.cat(part, dim=1) for part in parts], dim=1),
        "state": torch.cat([rank["state"] for rank in of_ranks], dim=1),
    }


def test_a_rank_has_its_share_of_the_heads(ranks: Ranks) -> None:
    assert [result["spec"] for result in ranks.results] == [SPEC.shard(RANKS)] * RANKS


def test_outputs_and_states_are_those_of_the_whole_layer(ranks: Ranks) -> None:
    layer, x = whole_layer(ranks.device), inputs(ranks.device)

    expected = run(layer, bind(SPEC, ranks.device), x)

    close(_joined(ranks.results, "sharded"), expected)


@pytest.mark.parametrize("kind", ["loaded", "loaded again"])
def test_a_whole_state_dict_is_cut_as_it_loads(ranks: Ranks, kind: str) -> None:
    layer = GatedDeltaNet(SPEC, HIDDEN)
    layer.load_state_dict(_hugging_face())
    layer.to(ranks.device)

    expected = run(layer, bind(SPEC, ranks.device), inputs(ranks.device))

    close(_joined(ranks.results, kind), expected)


def test_hidden_states_may_be_shared_out_by_tokens(ranks: Ranks) -> None:
    layer, x = whole_layer(ranks.device), inputs(ranks.device)

    outputs = torch.cat([result["by tokens"] for result in ranks.results])

    expected = run(layer, bind(SPEC, ranks.device), x)["outputs"][: sum(LENGTHS)]
    close(outputs, expected)


def test_gradients_are_those_of_the_whole_layer(ranks: Ranks) -> None:
    layer, x = whole_layer(ranks.device), inputs(ranks.device)
    expected = gradients(layer, x)
    # the order of rows in which the ranks' shares follow each other
    K, V, HV = SPEC.conv_groups[0], SPEC.conv_groups[2], SPEC.num_v_heads
    halves = {"in_proj.weight": [K, K, V, V, HV, HV], "conv1d.weight": [K, K, V]}
    for name, sizes in halves.items():
        parts = [part.chunk(RANKS) for part in expected[name].split(sizes)]
        expected[name] = torch.cat([part[rank] for rank in range(RANKS) for part in parts])

    for result in ranks.results:
        close(result["gradients"], expected)


class Mesh:
    """A mesh of ranks, for what is refused before it is used."""

    mesh_dim_names = ("dp", "tp")

    def __init__(self, *ranks: int) -> None:
        self.ranks, self.ndim = ranks, len(ranks)

    def size(self) -> int:
        return math.prod(self.ranks)


def test_heads_that_do_not_divide_are_refused() -> None:
    layer = GatedDeltaNet(replace(SPEC, num_k_heads=3), HIDDEN)

    with pytest.raises(SpecError, match="tp_size is 2, needs a divisor of num_k_heads"):
        HeadParallel()._apply(layer, Mesh(2))  # type: ignore[arg-type]


def test_another_module_is_refused() -> None:
    with pytest.raises(InputError, match="module is a Linear, needs a GatedDeltaNet"):
        HeadParallel()._apply(nn.Linear(2, 2), Mesh(2))  # type: ignore[arg-type]


def test_a_mesh_of_more_axes_is_refused_with_the_layer_as_it_was() -> None:
    layer = GatedDeltaNet(SPEC, HIDDEN)
    before = {name: weight.clone() for name, weight in layer.state_dict().items()}

    with pytest.raises(InputError, match=r"has 2 axes, needs one: mesh\['dp'\] or mesh\['tp'\]"):
        HeadParallel()._apply(layer, Mesh(1, 2))  # type: ignore[arg-type]

    assert layer.spec == SPEC
    assert [name for name, was in before.items() if not layer.state_dict()[name].equal(was)] == []
