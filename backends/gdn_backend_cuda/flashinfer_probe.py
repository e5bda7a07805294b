# SPDX-License-Identifier: Apache-2.0
"""Whether FlashInfer is here, new enough, and takes what its adapters pass.

Nothing is imported before a table is asked: by ``bind``, ``explain`` or ``doctor``.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from gdn_backend_cuda.probe import is_older, lacks
from gdn_portable.backend import needs

DISTRIBUTION = "flashinfer-python"
DECODE = "flashinfer.gdn_decode:gated_delta_rule_decode_pretranspose"
VERIFY = "flashinfer.gdn_decode:gated_delta_rule_mtp"
VERIFY_BFLOAT16 = "flashinfer.gdn_kernels.gdn_decode_bf16_state:gated_delta_rule_mtp"
PREFILL = "flashinfer.gdn_prefill:chunk_gated_delta_rule"
SCRATCH = "flashinfer.utils:_get_cache_buf"
# what a call means is lost without them
SEMANTIC = {
    DECODE: (
        "q", "k", "v", "A_log", "a", "dt_bias", "b", "scale", "output", "use_qk_l2norm", "state",
        "initial_state", "initial_state_indices", "output_state_indices",
    ),
    VERIFY: (
        "q", "k", "v", "initial_state", "initial_state_indices", "A_log", "a", "dt_bias", "b",
        "scale", "output", "intermediate_states_buffer", "ssm_state_indices",
        "disable_state_update", "use_qk_l2norm",
    ),
    VERIFY_BFLOAT16: (
        "A_log", "a", "dt_bias", "q", "k", "v", "b", "initial_state_source",
        "initial_state_indices", "ssm_state_indices", "disable_state_update",
        "use_qk_l2norm_in_kernel", "scale", "output",
    ),
    PREFILL: (
        "q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state", "cu_seqlens",
        "use_qk_l2norm_in_kernel", "output", "output_state", "use_cp", "state_indices",
        "state_checkpoints", "checkpoint_cu_starts", "checkpoint_every_n_tokens",
    ),
    SCRATCH: ("name", "num_bytes", "device"),
}  # fmt: skip
# passed where they are known: they choose among kernels and size grids
TUNING = {"backend": "flashinfer"}


def is_unfit(function: str, oldest: tuple[int, int, int]) -> Callable[[], str | None]:
    """Return a probe of ``"module:function"`` in a FlashInfer of at least that version."""

    def probe() -> str | None:
        return (
            needs("flashinfer", DISTRIBUTION)()
            or needs("cutlass", "nvidia-cutlass-dsl")()
            or is_older(DISTRIBUTION, oldest)
            or _unusable(function)
        )

    return probe


@functools.cache
def _unusable(function: str) -> str | None:
    """Import a function and return what speaks against it; a library's error is a reason."""
    module, _, name = function.partition(":")
    reason = lacks(module, (name,))
    if reason is not None:
        return reason
    found = pkgutil.resolve_name(function)
    missing = [each for each in SEMANTIC[function] if each not in parameters(found)]
    return f"{function} has no parameter {', '.join(missing)}" if missing else None


def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names that a function takes, behind its decorators."""
    return frozenset(inspect.signature(function).parameters)


def load(function: str) -> Callable[..., Any]:
    """Return a function, given what only tunes it where it knows of that."""
    found: Callable[..., Any] = pkgutil.resolve_name(function)
    known = parameters(found)
    given = {key: value for key, value in TUNING.items() if key in known}
    return functools.partial(found, **given) if given else found
