# SPDX-License-Identifier: Apache-2.0
"""Arguments of a call of each of SGLang's signatures that is in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases import generator, random

H, HV, K, V, W, P, B = 2, 4, 8, 6, 4, 3, 2
D = 2 * H * K + HV * V

Call = dict[str, Any]


def floats(*shape: int) -> Tensor:
    return random(generator(sum(shape)), *shape, dtype=torch.float32)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _qkv(tokens: int) -> Call:
    return {
        "q": floats(1, tokens, H, K),
        "k": floats(1, tokens, H, K),
        "v": floats(1, tokens, HV, V),
    }


def _gates(tokens: int) -> Call:
    shared = {"A_log": floats(HV), "dt_bias": floats(HV)}
    return {"a": floats(tokens, HV), "b": floats(tokens, HV), **shared}


def _pool() -> Call:
    return {"ssm_states": floats(5, HV, V, K), "cache_indices": index(3, 1)}


def decode() -> Call:
    return {**_qkv(B), **_gates(B), **_pool(), "query_start_loc": index(0, 1, 2)}


def packed_decode() -> Call:
    sizes = {"num_v_heads": HV, "head_v_dim": V, "scale": K**-0.5}
    return {"mixed_qkv": floats(B, D), **_gates(B), **_pool(), **sizes}


def extend() -> Call:
    gates = {"g": -floats(1, 5, HV).abs(), "beta": floats(1, 5, HV).sigmoid()}
    return {**_qkv(5), **gates, **_pool(), "query_start_loc": index(0, 2, 5)}


def target_verify() -> Call:
    return {
        **_qkv(B * P),
        **_gates(B * P),
        **_pool(),
        "query_start_loc": index(0, P, 2 * P),
        "intermediate_states_buffer": floats(B, P, HV, V, K),
        "intermediate_state_indices": index(0, 1),
        "cache_steps": P,
        "retrieve_parent_token": None,
    }


def conv_fn() -> Call:
    return {
        "x": floats(D, 5),
        "weight": floats(D, W),
        "bias": None,
        "conv_states": floats(5, D, W - 1),
        "query_start_loc": index(0, 2, 5),
        "cache_indices": index(3, 1),
    }


def conv_update() -> Call:
    return {
        "x": floats(B, D, P),
        "conv_state": floats(5, D, W - 1),
        "weight": floats(D, W),
        "conv_state_indices": index(3, 1),
    }


def gating() -> Call:
    return _gates(B)
