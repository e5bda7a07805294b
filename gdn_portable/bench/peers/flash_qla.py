# SPDX-License-Identifier: Apache-2.0
"""FlashQLA: chunked prefill."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

from gdn_portable.bench.inputs import Batch
from gdn_portable.bench.peers.part import Part, refuse_other_than_128

MODULE = "flash_qla"


def _chunk(batch: Batch) -> Callable[[], Tensor]:
    call = importlib.import_module(MODULE).chunk_gated_delta_rule
    states = batch.state[batch.slots.read]

    def chunk() -> Tensor:
        o: Tensor = call(
            q=batch.q[None],
            k=batch.k[None],
            v=batch.v[None],
            g=batch.g[None],
            beta=batch.beta[None],
            scale=batch.spec.q_scale,
            initial_state=states,
            output_final_state=True,
            use_qk_l2norm_in_kernel=batch.spec.qk_l2norm,
            cu_seqlens=batch.slots.cu_seqlens,
            state_v_first=True,
            auto_cp=True,
        )[0]
        return o[0]

    return chunk


CHUNKS = (
    Part(
        name="flash_qla chunk",
        modules=(MODULE,),
        includes="recurrence; q and k are given as unit vectors, log decay; states in the order of "
        "the sequences, no pool",
        make=_chunk,
        refuse=refuse_other_than_128,
    ),
)
