# SPDX-License-Identifier: Apache-2.0
"""SGLang's own classes, extended: imported where the shim is registered, and not before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from sglang.srt.layers.attention.linear import gdn_backend
from sglang.srt.layers.attention.linear.kernels.gdn_triton import TritonGDNKernel
from sglang.srt.runtime_context import get_exec
from sglang.srt.utils import is_cpu, is_npu, is_xpu
from sglang.srt.utils.common import rank0_log

from gdn_portable.engines.sglang.bound import Bind
from gdn_portable.engines.sglang.functions import make_functions
from gdn_portable.engines.sglang.kernel import GdnKernel, SharedPrefill
from gdn_portable.errors import UnsupportedError
from gdn_portable.metadata import PrefillMetadata

RESERVED_SLOT = 0  # what SGLang gives requests that pad a batch; no request owns it
HOOKS = (
    "requires_contiguous_prefill_state",
    "init_forward_metadata",
    "_init_prefill_conv_block_table",
    "_init_target_verify_qkv_routing",
    "_track_mamba_state_decode",
    "_track_mamba_state_extend",
)
METHODS = ("packed_decode", "decode", "extend", "target_verify")


class Dispatcher(gdn_backend.GDNKernelDispatcher):  # type: ignore[misc]
    """SGLang's dispatcher with one kernel behind every phase, trees of drafts included.

    Whatever ``--linear-attn-backend`` and the flags of the phases say: SGLang sets some of them by
    itself, so that a choice cannot be told from a default.
    """

    bind: Bind

    def __init__(self, decode_backend: Any, prefill_backend: Any, verify_backend: Any = None):
        """Take the place of the kernels that the flags name."""
        bind = type(self).bind
        if get_exec().deterministic.enable_deterministic_inference:
            bind = partial(bind, deterministic=True)
        self.bound, kernel = bind, GdnKernel(bind)
        self.decode_kernel = self.extend_kernel = kernel
        self.verify_kernel = self.tree_verify_kernel = kernel
        self.verify_kernel_is_flashinfer = False
        self.supports_packed_decode = kernel.supports_packed_decode


class Backend(gdn_backend.GDNAttnBackend):  # type: ignore[misc]
    """SGLang's GDN backend; plans a prefill once for all layers, and copies no states.

    Pools of any stride are used where they are. Requests that pad an eager batch, for which SGLang
    names its reserved slot, are padding for the kernels as they are in a graph.
    """

    requires_contiguous_prefill_state = False

    def __init__(self, model_runner: Any):
        """Refuse what cannot be served, then bind: both before any state is touched.

        Raises:
            UnsupportedError: with every reason.
        """
        reasons = list(_reasons(model_runner.req_to_token_pool.mamba_pool))
        if reasons:
            raise _unsupported("SGLang's GDN layers", reasons)
        super().__init__(model_runner)
        self._kernel: GdnKernel = self.kernel_dispatcher.extend_kernel
        cache = model_runner.req_to_token_pool.mamba_pool.mamba_cache
        ops = self._kernel.bind(cache.conv[0][0], cache.temporal[0], model_runner.dtype)
        rank0_log(f"GDN layers run on gdn_portable: {ops}")

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare a batch: what pads it, and what the layers of a prefill share."""
        super().init_forward_metadata(forward_batch)
        metadata = self.forward_metadata
        self._share(None)
        if self.mis_metadata is not None:
            return
        slots = metadata.mamba_cache_indices
        metadata.mamba_cache_indices = torch.where(slots > RESERVED_SLOT, slots, self.pad_slot_id)
        mode = forward_batch.logical_forward_mode
        if mode.is_extend() and not mode.is_target_verify():
            self._share(SharedPrefill(self._prefill(forward_batch)))

    def _share(self, shared: SharedPrefill | None) -> None:
        self._shared = shared
        self._kernel.begin_prefill(shared)

    def _prefill(self, forward_batch: Any) -> PrefillMetadata:
        """Return the batch's metadata, with the very tensors that SGLang gives the kernel."""
        metadata = self.forward_metadata
        step = PrefillMetadata(
            cu_seqlens=metadata.query_start_loc,
            state_indices=metadata.mamba_cache_indices,
            has_initial_state=forward_batch.extend_prefix_lens > 0,
        )
        lengths = forward_batch.extend_seq_lens_cpu
        is_whole = forward_batch.tbo_parent_token_range is None  # and not one of two halves
        if is_whole and lengths is not None and len(lengths) == len(step.cu_seqlens) - 1:
            step.seq_lens_cpu = lengths
        if metadata.has_mamba_track_mask and metadata.track_ssm_h_src.numel():
            step.checkpoint_offsets = metadata.track_chunk_idx * self.mamba_chunk_size
            step.checkpoint_indices = torch.arange(
                len(metadata.track_chunk_idx), device=metadata.track_chunk_idx.device
            )
        return step

    def _init_prefill_conv_block_table(self, forward_batch: Any) -> None:
        """Make no table on the host: the convolution finds its blocks on the device."""
        self.forward_metadata.conv_block_table = None

    def _init_target_verify_qkv_routing(self, forward_batch: Any) -> None:
        """Pass q, k and v as views of the convolution's output, in every phase."""
        self._use_strided_target_verify_qkv = True


def install(bind: Bind, backend: type[Backend]) -> None:
    """Put the kernels that ``bind`` binds behind SGLang's dispatcher, in this process.

    Args:
        bind: what binds.
        backend: what takes the place of SGLang's GDN backend.

    Raises:
        UnsupportedError: this SGLang calls its kernels in another way than was tested.
    """
    functions = make_functions(bind)._asdict()
    pairs = [(getattr(TritonGDNKernel, name), getattr(GdnKernel, name)) for name in METHODS]
    pairs += [(getattr(gdn_backend, name), function) for name, function in functions.items()]
    reasons = [reason for theirs, ours in pairs for reason in _unknown_parameters(theirs, ours)]
    original = Backend.__mro__[1]
    reasons += [f"{original.__name__} has no {m}" for m in HOOKS if not hasattr(original, m)]
    if reasons:
        raise _unsupported(f"sglang {version('sglang')}", reasons)
    dispatcher = type("Dispatcher", (Dispatcher,), {"bind": staticmethod(bind)})
    replaced = {"GDNKernelDispatcher": dispatcher, "GDNAttnBackend": backend, **functions}
    for name, ours in replaced.items():
        setattr(gdn_backend, name, ours)


def _reasons(mamba_pool: Any) -> Iterator[str]:
    """Yield what speaks against serving a runner."""
    engines = {"SGLANG_USE_CPU_ENGINE": is_cpu(), "an NPU": is_npu(), "an XPU": is_xpu()}
    for name, is_used in engines.items():
        if is_used:
            yield f"{name} is used, where SGLang calls other kernels: needs an NVIDIA or AMD GPU"
    cache = mamba_pool.mamba_cache
    base = getattr(mamba_pool, "replayssm_cache_base", None)
    if cache.replayssm_rawv is not None or base is not None:
        yield "verify has a ReplaySSM ring: start without --enable-linear-replayssm-spec"
    if len(cache.conv) != 1:
        yield f"a layer has {len(cache.conv)} conv states, needs 1 of [q | k | v]"


def _unknown_parameters(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Iterator[str]:
    known = inspect.signature(ours).parameters
    for name, parameter in inspect.signature(theirs).parameters.items():
        if name not in known and parameter.kind is not parameter.VAR_KEYWORD:
            yield f"{theirs.__qualname__} has a parameter {name}"


def _unsupported(what: str, reasons: list[str]) -> UnsupportedError:
    return UnsupportedError("\n  - ".join([f"cannot serve {what}:", *reasons]), {what: reasons})
