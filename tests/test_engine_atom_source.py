# SPDX-License-Identifier: Apache-2.0
"""The ATOM shim takes ATOM's own metadata, and shares its pools with ATOM's kernels.

Runs where ATOM can be imported, see ``tests/atom_source.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import cycle
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from gdn_portable.engines.atom import AtomGdn, Layout, atom_spec
from tests import test_engine_atom as double
from tests.atom_source import attention_gdn, gdn_attn
from tests.cases import assert_identical, generator, random
from tests.mixed_engine import BF16, Place, simulated_ops

if TYPE_CHECKING:
    from ci.amdgcn import Simulator


def test_the_double_has_the_fields_of_atoms_metadata() -> None:
    ours, theirs = (
        [field.name for field in fields(kind)]
        for kind in (double.GDNAttentionMetadata, gdn_attn.GDNAttentionMetadata)
    )

    assert ours == theirs


@pytest.mark.parametrize("num_spec", [0, 2])
def test_pools_are_those_that_atom_allocates(num_spec: int) -> None:
    atom = AtomGdn.bind(BF16, "cpu", num_spec=num_spec)
    sizes = (1, BF16.num_k_heads, BF16.num_v_heads, BF16.head_k_dim, BF16.head_v_dim, 4, num_spec)
    conv_shape, state_shape = gdn_attn.GDNStateMixin._state_shape(*sizes)
    cache = SimpleNamespace(
        k_cache=torch.zeros(3, *conv_shape).bfloat16(), v_cache=torch.zeros(3, *state_shape)
    )

    pool = atom.pool(cache)

    assert pool.conv_state is cache.k_cache
    assert pool.state is cache.v_cache


@pytest.mark.parametrize("pairs", [[], [(1, 3)], [(0, 2), (1, 3)]], ids=str)
def test_slots_are_relocated_as_atom_does(pairs: list[tuple[int, int]]) -> None:
    spec = atom_spec(BF16, num_spec=double.NUM_SPEC)
    caches = double._caches(spec, Layout.MODEL_RUNNER, "cpu")[:2]
    for cache in caches:
        cache.copy_(random(generator(), *cache.shape))
    k_cache, v_cache = (cache.clone() for cache in caches)
    runner = SimpleNamespace(mamba_k_cache=k_cache, mamba_v_cache=v_cache)
    atoms = SimpleNamespace(num_spec=double.NUM_SPEC, model_runner=runner)

    AtomGdn.bind(BF16, "cpu", num_spec=double.NUM_SPEC).relocate_state_slots(pairs, *caches)
    gdn_attn.GDNStateMixin.relocate_state_slots(atoms, pairs)

    assert_identical(caches, (k_cache, v_cache))


def _atoms(
    atom: AtomGdn,
    mixed_qkv: Tensor,
    b: Tensor,
    a: Tensor,
    core_attn_out: Tensor,
    *,
    layer: Any,
    metadata: Any,
    cache: Any,
) -> Tensor:
    """Run a layer by ATOM's own ``forward``, as the shim's method of that name does."""
    kind, spec = attention_gdn.GatedDeltaNet, atom.ops.spec
    own = kind.__new__(kind)
    torch.nn.Module.__init__(own)
    vars(own).update(
        layer_num=0,
        tp_size=1,
        num_k_heads=spec.num_k_heads,
        num_v_heads=spec.num_v_heads,
        head_k_dim=spec.head_k_dim,
        head_v_dim=spec.head_v_dim,
        key_dim=spec.num_k_heads * spec.head_k_dim,
        value_dim=spec.num_v_heads * spec.head_v_dim,
        activation=spec.activation,
        conv1d=layer.conv1d,
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
    )
    context = SimpleNamespace(
        attn_metadata=SimpleNamespace(gdn_metadata=metadata), kv_cache_data={"layer_0": cache}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_gdn, "get_forward_context", lambda: context)
        kind.forward(own, mixed_qkv, b, a, core_attn_out, "layer")
    if metadata.num_spec_decodes:
        rows = int(metadata.spec_query_start_loc[-1])
    else:
        rows = int((metadata.non_spec_state_indices_tensor >= 0).sum())
    core_attn_out[rows:] = 0  # ATOM leaves rows of padding unwritten
    return core_attn_out


@pytest.mark.parametrize("first", ["ATOM", "the shim"])
@pytest.mark.parametrize(
    "scenario",
    [
        double.test_prefills_in_chunks_then_padded_decodes_then_drafts,
        double.test_a_group_goes_on_where_it_was_moved_to,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_atoms_kernels_and_the_shim_take_turns_on_the_same_pool(
    amd_gpu: Simulator, monkeypatch: pytest.MonkeyPatch, scenario: Callable[..., None], first: str
) -> None:
    shims = AtomGdn.forward
    turns = cycle([_atoms, shims] if first == "ATOM" else [shims, _atoms])
    layout = Layout.MODEL_RUNNER_KV
    make = double._engine

    def take_turns(atom: AtomGdn, *rows: Tensor, metadata: Any, **named: Any) -> Tensor:
        # ATOM's prefill asks torch for properties of a GPU, and needs multiples of 256 channels
        forward = shims if metadata.num_prefills else next(turns)
        return forward(atom, *rows, metadata=metadata, **named)

    monkeypatch.setattr(AtomGdn, "forward", take_turns)
    monkeypatch.setattr(double, "GDNAttentionMetadata", gdn_attn.GDNAttentionMetadata)
    monkeypatch.setattr(double, "_engine", lambda place, *_: make(place, layout))
    place = Place("cpu", BF16, simulated_ops)

    scenario(place, layout) if "layout" in scenario.__annotations__ else scenario(place)

    assert any("causal_conv1d" in launch.kernel for launch in amd_gpu.launches)
