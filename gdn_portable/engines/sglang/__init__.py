# SPDX-License-Identifier: Apache-2.0
"""SGLang: a kernel class for its GDN layers, drop-ins for the functions beside it, a registration.

    SGLANG_PLUGINS=gdn_portable python -m sglang.launch_server --model-path ...

Tested with SGLang 0.5.23. See ``docs/engines/sglang.md``.
"""

from __future__ import annotations

from gdn_portable.engines.sglang.bound import Bind
from gdn_portable.engines.sglang.functions import make_functions
from gdn_portable.engines.sglang.kernel import GdnKernel
from gdn_portable.select import bind

causal_conv1d_fn, causal_conv1d_update, fused_gdn_gating = make_functions(bind)

PLUGIN = "gdn_portable"


def register(bind: Bind = bind, *, steps: bool = True) -> None:
    """Put the library's kernels behind SGLang's GDN layers, in this process.

    Call it before SGLang makes its model runners. SGLang is imported here, and not before.

    Args:
        bind: what binds the ops; give :func:`gdn_portable.bind` with some arguments filled in to
            choose kernels.
        steps: run a layer's convolution and recurrence as one step. False leaves the layer to
            SGLang's own methods, with :class:`GdnKernel` and the drop-ins below them.

    Raises:
        UnsupportedError: this SGLang calls its kernels in another way than was tested.
    """
    from gdn_portable.engines.sglang.backend import Backend, install
    from gdn_portable.engines.sglang.steps import StepBackend

    install(bind, StepBackend if steps else Backend)


def plugin() -> None:
    """Register where ``SGLANG_PLUGINS`` names ``gdn_portable``: SGLang calls this in each process.

    Raises:
        SystemExit: it could not be registered; SGLang would pass over any other exception.
    """
    from sglang.srt.environ import envs

    if PLUGIN not in [name.strip() for name in envs.SGLANG_PLUGINS.get().split(",")]:
        return
    try:
        register()
    except Exception as error:
        raise SystemExit(
            f"SGLANG_PLUGINS names {PLUGIN}, which cannot be registered: {error}"
        ) from error


__all__ = [
    "GdnKernel",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "fused_gdn_gating",
    "plugin",
    "register",
]
