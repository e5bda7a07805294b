# SPDX-License-Identifier: Apache-2.0
"""AMD's aiter as far as it is adapted: signatures of releases, and functions with their habits.

The habits are those of the source: rows of padding are left as they are, dtypes are asserted, and
nothing looks whether a slot exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from gdn_portable import GdnSpec, PrefillMetadata, reference

OPT_VK = "chunk_gated_delta_rule_opt_vk"
DECODE_FILE = "ops/flydsl/linear_attention_kernels.py"
PREFILL_FILE = "ops/triton/gated_delta_net/gated_delta_rule.py"
OPT_VK_0_1_16 = (
    "q, k, v, o=None, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, "
    "use_qk_l2norm_in_kernel=False, cu_seqlens=None, use_chunk_hip=False, use_chunk_flydsl=False, "
    "state_dtype=None, use_exp2=True, num_decodes=0, num_decode_tokens=0"
)
DECODE_0_1_16 = (
    "query, key, value, a, b, dt_bias, A_log, indices, state, out, use_qk_l2norm, "
    "need_shuffle_state, stream=None"
)
CONV_UPDATE = (
    "x, conv_state, weight, bias, out, use_silu, cache_seqlens, conv_state_indices, pad_slot_id"
)
PACKED = "mixed_qkv, a, b, dt_bias, A_log, indices, state, out, *, scale=None"
BUILD = "seq_lens_cpu, *, cu_seqlens, chunk_size=64, num_decodes=0, num_decode_tokens=0"

CALLS: set[str] = set()  # the functions that ran

Signatures = Mapping[str, Mapping[str, str]]

# by release and file, the parameters of every function that an adapter calls
RELEASES: Mapping[str, Signatures] = {
    "0.1.16": {
        DECODE_FILE: {"flydsl_gdr_decode": DECODE_0_1_16},
        PREFILL_FILE: {OPT_VK: OPT_VK_0_1_16},
        "ops/causal_conv1d.py": {"causal_conv1d_update": CONV_UPDATE},
    },
    "0.1.20": {
        DECODE_FILE: {
            "flydsl_gdr_decode": f"{DECODE_0_1_16}, read_indices=None, write_indices=None"
        },
        "ops/gdr_decode_packed_bf16.py": {"gdr_decode_packed_bf16": PACKED},
        PREFILL_FILE: {
            OPT_VK: (
                "q, k, v, o=None, g=None, beta=None, scale=None, initial_state=None, "
                "output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None, "
                "use_chunk_hip=False, use_chunk_flydsl=False, use_prepare_flydsl=False, "
                "state_dtype=None, use_exp2=True, num_decodes=0, num_decode_tokens=0, "
                "seq_lens_cpu=None, prefill_metadata=None, initial_state_indices=None, "
                "inplace_final_state=None, snapshot_dtype=None"
            )
        },
        "ops/prefill_batch_metadata.py": {"build_gated_delta_rule_prefill_metadata": BUILD},
        "ops/causal_conv1d_update.py": {"causal_conv1d_update": CONV_UPDATE},
    },
}


def write_release(folder: Path, release: str, *, imports: str = "") -> None:
    """Write the files of a release, which run the functions below, and those of flydsl.

    Args:
        folder: to be put on Python's path.
        release: one of ``RELEASES``.
        imports: what ``import aiter`` runs.
    """
    files = {"aiter/__init__.py": imports, "aiter/jit/core.py": "", "flydsl/__init__.py": ""}
    for file, functions in RELEASES[release].items():
        files[f"aiter/{file}"] = "\n".join(
            f"def {name}({parameters}):\n"
            "    arguments = dict(locals())\n"
            "    from tests import fake_aiter\n"
            f"    fake_aiter.CALLS.add({name!r})\n"
            f"    return fake_aiter.{name}(**arguments)\n"
            for name, parameters in functions.items()
        )
    name = f"amd_aiter-{release}.dist-info/METADATA"
    files[name] = f"Metadata-Version: 2.1\nName: amd-aiter\nVersion: {release}\n"
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)


def write_namesake(folder: Path) -> None:
    """Write what PyPI calls aiter: another project's iterators."""
    (folder / "aiter").mkdir(parents=True)
    (folder / "aiter" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (folder / "aiter" / "join_aiters.py").write_text("")


def flydsl_gdr_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    indices: Tensor,
    state: Tensor,
    out: Tensor,
    use_qk_l2norm: bool,
    need_shuffle_state: bool,
    stream: object,
    read_indices: Tensor,
    write_indices: Tensor,
) -> None:
    """Pass over rows that read or write a negative slot, output and all."""
    assert state.data_ptr() % 16 == 0 and not need_shuffle_state
    assert all(x.dtype == query.dtype for x in (key, value, a, b, dt_bias, out))
    assert A_log.dtype in (torch.float32, torch.bfloat16)
    assert read_indices.dtype == write_indices.dtype == indices.dtype == torch.int32
    assert query.stride(-1) == key.stride(-1) == state.stride(-1) == 1
    assert out.is_contiguous()
    spec = _spec(query[:, 0], value[:, 0], state, qk_l2norm=use_qk_l2norm)
    rows = ((read_indices >= 0) & (write_indices >= 0)).nonzero().flatten()
    out[rows, 0] = reference.recurrent_decode(
        spec,
        *(x[rows, 0] for x in (query, key, value, a, b)),
        A_log,
        dt_bias,
        state,
        state_indices=read_indices[rows],
        out_state_indices=write_indices[rows],
    )


def gdr_decode_packed_bf16(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    indices: Tensor,
    state: Tensor,
    out: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Give zeros for a slot that does not exist."""
    B = len(mixed_qkv)
    assert mixed_qkv.shape == (B, 6144) and mixed_qkv.stride(1) == 1
    assert a.shape == b.shape == (B, 32) and a.stride(1) == b.stride(1) == 1
    assert all(x.dtype == torch.bfloat16 for x in (mixed_qkv, a, b, dt_bias, state, out))
    assert A_log.dtype == torch.float32 and indices.dtype == torch.int32
    assert state.stride()[1:] == (16384, 128, 1) and indices.shape == (B,)
    assert out.shape == (B, 1, 32, 128) and out.is_contiguous() and scale is None
    q, k, v = mixed_qkv.split([1024, 1024, 4096], dim=1)
    q, k, v = q.unflatten(1, (8, 128)), k.unflatten(1, (8, 128)), v.unflatten(1, (32, 128))
    slots = torch.where(indices < len(state), indices, -1)
    out[:, 0] = reference.recurrent_decode(
        _spec(q, v, state), q, k, v, a, b, A_log, dt_bias, state, state_indices=slots
    )
    return out, state


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    use_silu: bool,
    cache_seqlens: Tensor,
    conv_state_indices: Tensor,
    pad_slot_id: int,
) -> None:
    """Take one number alone for padding, and the last columns of a window for its history."""
    W = weight.shape[1]
    assert x.shape == out.shape == (len(conv_state_indices), len(weight), 1)
    assert x.dtype == conv_state.dtype == out.dtype and conv_state_indices.dtype == torch.int32
    assert conv_state_indices.is_contiguous() and cache_seqlens.numel() == 0
    for i, slot in enumerate(conv_state_indices.tolist()):
        if slot == pad_slot_id:
            continue
        assert slot >= 0, "out of bounds"
        window = torch.cat([conv_state[slot, :, 1 - W :], x[i]], dim=1)
        conv_state[slot, :, 1 - W :] = window[:, 1:]
        y = (window.float() * weight.float()).sum(1)
        y = y + bias.float() if bias.numel() else y
        out[i, :, 0] = y * y.sigmoid() if use_silu else y


@dataclass(frozen=True)
class Layout:
    """What aiter calls prefill metadata."""

    cu_seqlens: Tensor
    schedule: SimpleNamespace


def build_gated_delta_rule_prefill_metadata(
    seq_lens_cpu: list[int],
    cu_seqlens: Tensor,
    chunk_size: int,
    num_decodes: int,
    num_decode_tokens: int,
) -> Layout:
    """Bind a schedule to the very tensor that it was made of."""
    assert len(seq_lens_cpu) == len(cu_seqlens) - 1 and seq_lens_cpu
    return Layout(cu_seqlens, SimpleNamespace(total_prefill_tokens=sum(seq_lens_cpu)))


def chunk_gated_delta_rule_opt_vk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: Tensor,
    state_dtype: torch.dtype,
    prefill_metadata: Layout,
    **rest: object,
) -> tuple[Tensor, Tensor]:
    """Take a state for every sequence, and as many tokens as the schedule has."""
    assert prefill_metadata.cu_seqlens is cu_seqlens
    assert q.shape[1] == prefill_metadata.schedule.total_prefill_tokens
    assert all(x.is_contiguous() and len(x) == 1 for x in (q, k, v, g, beta))
    assert initial_state.is_contiguous() and initial_state.dtype == state_dtype
    assert output_final_state
    spec = _spec(q[0], v[0], initial_state, scale=scale, qk_l2norm=use_qk_l2norm_in_kernel)
    final, N = initial_state.clone(), len(initial_state)
    o = reference.chunk_prefill(
        spec,
        *(x[0] for x in (q, k, v, g, beta)),
        final,
        metadata=PrefillMetadata(cu_seqlens, torch.arange(N)),
    )
    return o[None], final


def _spec(
    q: Tensor, v: Tensor, state: Tensor, *, scale: float | None = None, qk_l2norm: bool = True
) -> GdnSpec:
    return GdnSpec(
        num_k_heads=q.shape[1],
        num_v_heads=v.shape[1],
        head_k_dim=q.shape[2],
        head_v_dim=v.shape[2],
        dtype=q.dtype,
        state_dtype=state.dtype,
        scale=scale,
        qk_l2norm=qk_l2norm,
    )
