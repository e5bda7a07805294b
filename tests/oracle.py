# SPDX-License-Identifier: Apache-2.0
"""The ops as plain float64 loops over sequences, tokens and heads, written from the contract.

Every function takes the spec and then the arguments of the op of its name, writes the states it
is given in place and returns a new float64 output. It shares no code with the library.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gdn_portable import ConvLayout, ReplayDrafts, SnapshotDrafts, StateLayout, StatePool

F64 = torch.float64


def conv1d_prefill(spec, x, weight, bias, conv_state, *, metadata):
    windows = conv_view(spec, conv_state)
    out = torch.zeros(x.shape, dtype=F64)
    for n, (first, last) in enumerate(spans(metadata.cu_seqlens)):
        slot = int(metadata.state_indices[n])
        if slot <= spec.pad_slot:
            continue
        window = read_window(spec, windows, slot, starts_empty(metadata, n))
        keep_window(spec, windows, checkpoint(metadata, n, 0), window)
        for t in range(first, last):
            out[t] = convolve(spec, window, x[t], weight, bias)
            window = window[1:] + [x[t].double()]
            keep_window(spec, windows, checkpoint(metadata, n, t + 1 - first), window)
        keep_window(spec, windows, target(metadata.out_state_indices, n, slot), window)
    return out


def conv1d_update(spec, x, weight, bias, conv_state, *, state_indices, out_state_indices=None):
    windows = conv_view(spec, conv_state)
    out = torch.zeros(x.shape, dtype=F64)
    for i in range(len(x)):
        slot = int(state_indices[i])
        if slot <= spec.pad_slot:
            continue
        window = read_window(spec, windows, slot)
        out[i] = convolve(spec, window, x[i], weight, bias)
        window = window[1:] + [x[i].double()]
        keep_window(spec, windows, target(out_state_indices, i, slot), window)
    return out


def conv1d_verify(spec, x, weight, bias, conv_state, *, metadata, drafts=None):
    windows = conv_view(spec, conv_state)
    out = torch.zeros(x.shape, dtype=F64)
    for i, (first, last) in enumerate(draft_spans(metadata, len(x))):
        slot, accepted = window_slot(metadata, i), num_accepted(metadata, i)
        if slot <= spec.pad_slot:
            continue
        read_at = max(accepted, 1) - 1 if drafts is None else 0
        window = read_window(spec, windows, slot, column=read_at)
        if isinstance(drafts, ReplayDrafts):
            for t in range(accepted):
                window = window[1:] + [drafts.conv_inputs[slot, t].double()]
            keep_window(spec, windows, slot, window)
        inputs, after = [row.double() for row in x[first:last]], []
        for t, parent in enumerate(parents(metadata, i, last - first)):
            before = window if t == 0 else after[parent]
            out[first + t] = convolve(spec, before, inputs[t], weight, bias)
            after.append(before[1:] + [inputs[t]])
        for t in range(last - first):
            if isinstance(drafts, ReplayDrafts):
                drafts.conv_inputs[slot, t] = inputs[t]
            if isinstance(drafts, SnapshotDrafts):
                row = target(metadata.rows, i, i)
                conv_view(spec, drafts.conv_state)[row, t] = torch.stack(after[t], dim=-1)
        if drafts is None and last > first:
            for column, value in enumerate(window[1:] + inputs):
                windows[slot, :, column] = value
    return out


def gating(spec, a, b, A_log, dt_bias):
    g = torch.zeros(a.shape, dtype=F64)
    for t in range(len(a)):
        for j in range(spec.num_v_heads):
            x = a[t, j].double() + dt_bias[j].double()
            softplus = x if x > 20 else torch.log(1 + torch.exp(x))
            g[t, j] = -torch.exp(A_log[j].double()) * softplus
    return g, 1 / (1 + torch.exp(-b.double()))


def chunk_prefill(spec, q, k, v, g, beta, state, *, metadata, checkpoint_state=None):
    states = state_view(spec, state)
    kept = states if checkpoint_state is None else state_view(spec, checkpoint_state)
    out = torch.zeros(v.shape, dtype=F64)
    for n, (first, last) in enumerate(spans(metadata.cu_seqlens)):
        slot = int(metadata.state_indices[n])
        if slot <= spec.pad_slot:
            continue
        S = states[slot].double()
        if starts_empty(metadata, n):
            S = torch.zeros_like(S)
        keep_state(spec, kept, checkpoint(metadata, n, 0), S)
        for t in range(first, last):
            S, out[t] = advance(spec, S, q[t], k[t], v[t], g[t], beta[t])
            keep_state(spec, kept, checkpoint(metadata, n, t + 1 - first), S)
        keep_state(spec, states, target(metadata.out_state_indices, n, slot), S)
    return out


def recurrent_decode(
    spec, q, k, v, a, b, A_log, dt_bias, state, *, state_indices, out_state_indices=None
):
    states = state_view(spec, state)
    g, beta = gating(spec, a, b, A_log, dt_bias)
    out = torch.zeros(v.shape, dtype=F64)
    for i in range(len(v)):
        slot = int(state_indices[i])
        if slot <= spec.pad_slot:
            continue
        S, out[i] = advance(spec, states[slot].double(), q[i], k[i], v[i], g[i], beta[i])
        keep_state(spec, states, target(out_state_indices, i, slot), S)
    return out


def mtp_verify(spec, q, k, v, a, b, A_log, dt_bias, state, *, metadata, drafts=None):
    states = state_view(spec, state)
    g, beta = gating(spec, a, b, A_log, dt_bias)
    out = torch.zeros(v.shape, dtype=F64)
    for i, (first, last) in enumerate(draft_spans(metadata, len(v))):
        slot, accepted = window_slot(metadata, i), num_accepted(metadata, i)
        if drafts is None:
            slot = int(metadata.state_indices[i, max(accepted, 1) - 1])
        if slot <= spec.pad_slot:
            continue
        S = states[slot].double()
        if isinstance(drafts, ReplayDrafts):
            S = replay(spec, S, drafts, slot, range(accepted))
            keep_state(spec, states, slot, S)
        after = []
        for t, parent in enumerate(parents(metadata, i, last - first)):
            row, before = first + t, S if t == 0 else after[parent]
            S_t, out[row] = advance(spec, before, q[row], k[row], v[row], g[row], beta[row])
            after.append(S_t)
        for t in range(last - first):
            row = first + t
            if isinstance(drafts, ReplayDrafts):
                drafts.k[slot, t], drafts.v[slot, t] = k[row], v[row]
                drafts.g[slot, t], drafts.beta[slot, t] = g[row], beta[row]
            elif isinstance(drafts, SnapshotDrafts):
                state_view(spec, drafts.state)[target(metadata.rows, i, i), t] = after[t]
            else:
                keep_state(spec, states, int(metadata.state_indices[i, t]), after[t])
    return out


def mtp_commit(spec, pool, drafts, *, metadata, last_accepted, out_state_indices=None):
    windows, states = conv_view(spec, pool.conv_state), state_view(spec, pool.state)
    B = len(last_accepted) if metadata.cu_seqlens is None else len(metadata.cu_seqlens) - 1
    for i, last in enumerate(last_accepted[:B].tolist()):
        slot = int(metadata.state_indices[i])
        if slot <= spec.pad_slot:
            continue
        path, row = ancestors(metadata, i, last), target(metadata.rows, i, i)
        goal = target(out_state_indices, i, slot)
        if windows is not None:
            window = read_window(spec, windows, slot)
            if isinstance(drafts, ReplayDrafts):
                window = (window + [drafts.conv_inputs[slot, t] for t in path])[len(path) :]
            elif last >= 0:
                snapshot = conv_view(spec, drafts.conv_state)[row, last]
                window = list(snapshot.double().unbind(-1))
            keep_window(spec, windows, goal, window)
        if states is not None:
            S = states[slot].double()
            if isinstance(drafts, ReplayDrafts):
                S = replay(spec, S, drafts, slot, path)
            elif last >= 0:
                S = state_view(spec, drafts.state)[row, last].double()
            keep_state(spec, states, goal, S)


def gated_rms_norm(spec, x, gate, weight, *, eps=1e-6):
    out = torch.zeros(x.shape, dtype=F64)
    for t in range(x.shape[0]):
        for j in range(x.shape[1]):
            row, z = x[t, j].double(), gate[t, j].double()
            normed = row / torch.sqrt((row * row).mean() + eps) * weight.double()
            opened = torch.sigmoid(z) * (z if spec.gate_activation == "silu" else 1)
            out[t, j] = normed * opened if row.any() else 0
    return out


def prefill_step(
    spec, mixed_qkv, a, b, params, pool, *, metadata, checkpoint_state=None, gate=None
):
    windows = metadata
    if checkpoint_state is not None:
        windows = replace(metadata, checkpoint_offsets=None, checkpoint_indices=None)
    x = conv1d_prefill(spec, mixed_qkv, *conv(params), pool.conv_state, metadata=windows)
    g, beta = gating(spec, a, b, params.A_log, params.dt_bias)
    batch = {"metadata": metadata, "checkpoint_state": checkpoint_state}
    return norm(
        spec, chunk_prefill(spec, *split(spec, x), g, beta, pool.state, **batch), gate, params
    )


def decode_step(spec, mixed_qkv, a, b, params, pool, *, gate=None, **slots):
    x = conv1d_update(spec, mixed_qkv, *conv(params), pool.conv_state, **slots)
    inputs = (*split(spec, x), a, b, params.A_log, params.dt_bias)
    return norm(spec, recurrent_decode(spec, *inputs, pool.state, **slots), gate, params)


def verify_step(spec, mixed_qkv, a, b, params, pool, *, gate=None, **batch):
    x = conv1d_verify(spec, mixed_qkv, *conv(params), pool.conv_state, **batch)
    inputs = (*split(spec, x), a, b, params.A_log, params.dt_bias)
    return norm(spec, mtp_verify(spec, *inputs, pool.state, **batch), gate, params)


def advance(spec, state, q, k, v, g, beta):
    """One token of every value head: the state [HV, V, K] after it, and its output [HV, V]."""
    states, outputs = [], []
    for j in range(spec.num_v_heads):
        i = j // (spec.num_v_heads // spec.num_k_heads)
        q_i, k_i, v_j = q[i].double(), k[i].double(), v[j].double()
        if spec.qk_l2norm:
            q_i = q_i / torch.sqrt((q_i * q_i).sum() + 1e-6)
            k_i = k_i / torch.sqrt((k_i * k_i).sum() + 1e-6)
        q_i = q_i * (spec.head_k_dim**-0.5 if spec.scale is None else spec.scale)
        S = torch.exp(g[j].double()) * state[j]
        u = beta[j].double() * (v_j - S @ k_i)
        S = S + torch.outer(u, k_i)
        states.append(S)
        outputs.append(S @ q_i)
    return torch.stack(states), torch.stack(outputs)


def replay(spec, state, drafts, slot, path):
    for t in path:
        k, v = drafts.k[slot, t], drafts.v[slot, t]
        state, _ = advance(spec, state, k, k, v, drafts.g[slot, t], drafts.beta[slot, t])
    return state


def convolve(spec, window, x, weight, bias):
    y = torch.zeros(x.shape, dtype=F64) if bias is None else bias.double()
    for i, row in enumerate([*window, x.double()]):
        y = y + weight[:, i].double() * row
    return y if spec.activation is None else y / (1 + torch.exp(-y))


def read_window(spec, windows, slot, empty=False, column=0):
    """The W - 1 inputs before the next token, oldest first."""
    columns = range(column, column + spec.conv_width - 1)
    if empty:
        return [torch.zeros(windows.shape[1], dtype=F64) for _ in columns]
    return [windows[slot, :, c].double().clone() for c in columns]


def keep_window(spec, windows, slot, window):
    if slot is not None and slot > spec.pad_slot:
        for column, value in enumerate(window):
            windows[slot, :, column] = value


def keep_state(spec, states, slot, state):
    if slot is not None and slot > spec.pad_slot:
        states[slot] = state


def conv_view(spec, pool):
    """[..., D, L], whatever the layout."""
    return pool.mT if pool is not None and spec.conv_layout is ConvLayout.LEN_FIRST else pool


def state_view(spec, pool):
    """[..., V, K], whatever the layout."""
    return pool.mT if pool is not None and spec.state_layout is StateLayout.KV else pool


def spans(cu_seqlens):
    offsets = cu_seqlens.tolist()
    return list(zip(offsets[:-1], offsets[1:], strict=True))


def draft_spans(metadata, tokens):
    if metadata.cu_seqlens is not None:
        return spans(metadata.cu_seqlens)
    P = metadata.max_drafts
    return [(first, first + P) for first in range(0, tokens, P)]


def starts_empty(metadata, n):
    return metadata.has_initial_state is not None and not metadata.has_initial_state[n]


def checkpoint(metadata, n, tokens_done):
    """Where to keep what stands after ``tokens_done`` tokens, or None."""
    offsets = metadata.checkpoint_offsets
    if offsets is None or int(offsets[n]) != tokens_done:
        return None
    return int(metadata.checkpoint_indices[n])


def target(indices, i, default):
    return default if indices is None else int(indices[i])


def window_slot(metadata, i):
    slots = metadata.state_indices
    return int(slots[i, 0] if slots.dim() == 2 else slots[i])


def num_accepted(metadata, i):
    return 0 if metadata.num_accepted is None else int(metadata.num_accepted[i])


def parents(metadata, i, drafts):
    """The parent of each of a sequence's drafts; that of the root, -1, is not used."""
    if metadata.next_token is not None:
        found = {}
        for t in range(drafts):
            child = int(metadata.next_token[i, t])
            while child >= 0:
                found[child] = t
                child = int(metadata.next_sibling[i, child])
        return [found.get(t, -1) for t in range(drafts)]
    if metadata.parents is not None:
        return [-1, *metadata.parents[i, 1:drafts].tolist()][:drafts]
    return list(range(-1, drafts - 1))


def ancestors(metadata, i, last):
    """The drafts from the root to ``last``, both included."""
    parent_of, path = parents(metadata, i, last + 1), []
    while last >= 0:
        path, last = [last, *path], -1 if last == 0 else parent_of[last]
    return path


def split(spec, x: Tensor):
    H, HV, K, V = spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim
    q, k, v = x[:, : H * K], x[:, H * K : 2 * H * K], x[:, 2 * H * K :]
    return q.reshape(-1, H, K), k.reshape(-1, H, K), v.reshape(-1, HV, V)


def conv(params):
    return params.conv_weight, params.conv_bias


def norm(spec, x, gate, params):
    if gate is None:
        return x
    return gated_rms_norm(spec, x, gate, params.norm_weight, eps=params.norm_eps)


def layer(pool, index):
    """The pool of one layer of a pool with a leading layer axis."""
    return StatePool(pool.conv_state[index], pool.state[index])
