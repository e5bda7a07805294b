# SPDX-License-Identifier: Apache-2.0
"""What is fixed when a model is loaded: the layer, its layouts and the device it runs on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

import torch

from gdn_portable.errors import SpecError

ACTIVATIONS = ("silu", None)
GATE_ACTIVATIONS = ("silu", "sigmoid")
LEAST = {
    "num_k_heads": 1,
    "num_v_heads": 1,
    "head_k_dim": 1,
    "head_v_dim": 1,
    "conv_width": 2,
    "conv_window": 1,
    "pad_slot": -1,
    "scratch_slot": 0,
}


class Op(str, Enum):
    """The ops of a Gated DeltaNet layer; the value is the attribute of ``GdnOps``."""

    CONV1D_PREFILL = "conv1d_prefill"
    CONV1D_UPDATE = "conv1d_update"
    CONV1D_VERIFY = "conv1d_verify"
    GATING = "gating"
    CHUNK_PREFILL = "chunk_prefill"
    RECURRENT_DECODE = "recurrent_decode"
    MTP_VERIFY = "mtp_verify"
    MTP_COMMIT = "mtp_commit"
    GATED_RMS_NORM = "gated_rms_norm"
    PLAN_PREFILL = "plan_prefill"
    PREFILL_STEP = "prefill_step"
    DECODE_STEP = "decode_step"
    VERIFY_STEP = "verify_step"


class StateLayout(str, Enum):
    """Order of the two inner axes of a recurrent state in memory; the last one is contiguous.

    An engine that looks at VK memory through a transposed view, as ATOM does, declares VK and
    passes ``view.mT``: no bit of the results changes, and nothing is copied.
    """

    VK = "VK"  # [slots, HV, V, K]
    KV = "KV"  # [slots, HV, K, V]


class ConvLayout(str, Enum):
    """Order of the two inner axes of a conv state."""

    DIM_FIRST = "DIM_FIRST"  # [slots, D, L], as SGLang keeps it
    LEN_FIRST = "LEN_FIRST"  # [slots, L, D], as ATOM's ModelRunner and vLLM keep it


@dataclass(frozen=True, slots=True)
class Device:
    """The facts about a device that a choice of kernel depends on."""

    kind: str  # "cpu", "cuda" for NVIDIA, "rocm" for AMD, else torch's device type
    arch: str = ""  # "sm90", "gfx942", ...; the kind where there is nothing finer
    index: int | None = None
    name: str = ""  # of the GPU, as torch has it; empty where none is here

    def __post_init__(self) -> None:
        """Take the kind where no architecture is named."""
        object.__setattr__(self, "arch", self.arch or self.kind)

    def __str__(self) -> str:
        """Name the device as reports do, for example ``cuda:0 (sm90)``."""
        name = self.kind if self.index is None else f"{self.kind}:{self.index}"
        return name if self.arch == self.kind else f"{name} ({self.arch})"


def torch_device(device: Device) -> torch.device:
    """Return torch's name for a device: it calls AMD's "cuda" as well."""
    kind = "cuda" if device.kind == "rocm" else device.kind
    return torch.device(kind) if device.index is None else torch.device(kind, device.index)


@dataclass(frozen=True, slots=True)
class GdnSpec:
    """A Gated DeltaNet layer as one tensor-parallel rank sees it.

    Letters used throughout: H q/k heads, HV value heads, K and V head dims, D conv channels laid
    out ``[q | k | v]``, W conv width, L columns of a conv window. Value head j reads q/k head
    ``j // (HV // H)``.

    Attributes:
        num_k_heads: H, of this rank.
        num_v_heads: HV, of this rank; a multiple of H.
        head_k_dim: K, of queries and keys.
        head_v_dim: V, of values.
        dtype: of the activations.
        state_dtype: of the recurrent state.
        conv_width: W, the taps of the convolution.
        conv_window: L, columns a slot of the conv state holds; None is W - 1. The slot-table
            protocol needs W - 1 + max_drafts - 1.
        conv_dtype: of the conv state; None is ``dtype``.
        conv_layout: axis order of the conv state.
        state_layout: axis order of the recurrent state.
        activation: after the convolution, "silu" or None.
        gate_activation: of the gated RMSNorm, "silu" or "sigmoid".
        scale: multiplies q; None is ``K ** -0.5``.
        qk_l2norm: whether q and k are L2-normalised over K before use.
        pad_slot: an index at or below it is padding; -1, or 0 for engines with a null block.
        scratch_slot: a slot that adapters may write freely; None forbids it.
    """

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    conv_width: int = 4
    conv_window: int | None = None
    conv_dtype: torch.dtype | None = None
    conv_layout: ConvLayout = ConvLayout.DIM_FIRST
    state_layout: StateLayout = StateLayout.VK
    activation: Literal["silu"] | None = "silu"
    gate_activation: Literal["silu", "sigmoid"] = "silu"
    scale: float | None = None
    qk_l2norm: bool = True
    pad_slot: int = -1
    scratch_slot: int | None = None

    def __post_init__(self) -> None:
        """Reject what no kernel could serve."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            optional = name in ("conv_window", "scratch_slot") and value is None
            if not optional and (type(value) is not int or value < least):
                raise SpecError(f"{name} is {value!r}, needs an integer of at least {least}")
        if self.num_v_heads % self.num_k_heads:
            raise SpecError(
                f"num_v_heads is {self.num_v_heads}, needs a multiple of num_k_heads "
                f"({self.num_k_heads})"
            )
        if self.conv_state_len < self.conv_width - 1:
            raise SpecError(
                f"conv_window is {self.conv_window}, needs at least conv_width - 1 "
                f"({self.conv_width - 1})"
            )
        for name in ("dtype", "state_dtype", "conv_state_dtype"):
            dtype = getattr(self, name)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise SpecError(f"{name} is {dtype!r}, needs a floating torch.dtype")
        if self.scale is not None and not (
            isinstance(self.scale, (int, float)) and math.isfinite(self.scale)
        ):
            raise SpecError(f"scale is {self.scale!r}, needs a finite number or None")
        _one_of("qk_l2norm", self.qk_l2norm, (True, False))
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("gate_activation", self.gate_activation, GATE_ACTIVATIONS)
        # a layout may be named by its string; the rest of the library compares members
        object.__setattr__(self, "conv_layout", _member(ConvLayout, "conv_layout", self))
        object.__setattr__(self, "state_layout", _member(StateLayout, "state_layout", self))

    @property
    def conv_groups(self) -> tuple[int, int, int]:
        """Channel counts of q, k and v within D; tensor parallelism cuts each on its own."""
        key_dim = self.num_k_heads * self.head_k_dim
        return key_dim, key_dim, self.num_v_heads * self.head_v_dim

    @property
    def conv_dim(self) -> int:
        """D, the number of conv channels."""
        return sum(self.conv_groups)

    @property
    def conv_state_len(self) -> int:
        """L, the columns a slot of the conv state holds."""
        return self.conv_width - 1 if self.conv_window is None else self.conv_window

    @property
    def conv_state_dtype(self) -> torch.dtype:
        """Dtype of the conv state."""
        return self.dtype if self.conv_dtype is None else self.conv_dtype

    @property
    def q_scale(self) -> float:
        """What q is multiplied by."""
        return self.head_k_dim**-0.5 if self.scale is None else self.scale

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the maths is done in, float32 unless the spec names float64."""
        doubles = torch.float64 in (self.dtype, self.state_dtype)
        return torch.float64 if doubles else torch.float32

    def shard(self, tp_size: int) -> GdnSpec:
        """Return the spec of one of ``tp_size`` ranks, heads divided evenly.

        Raises:
            SpecError: a head count is not a multiple of ``tp_size``.
        """
        if tp_size < 1 or self.num_k_heads % tp_size or self.num_v_heads % tp_size:
            raise SpecError(
                f"tp_size is {tp_size}, needs a divisor of num_k_heads ({self.num_k_heads}) "
                f"and of num_v_heads ({self.num_v_heads})"
            )
        return replace(
            self,
            num_k_heads=self.num_k_heads // tp_size,
            num_v_heads=self.num_v_heads // tp_size,
        )

    @classmethod
    def from_config(
        cls, hf_config: object, tp_size: int = 1, *, dtype: torch.dtype | None = None
    ) -> GdnSpec:
        """Read the spec from a Hugging Face Qwen3-Next, Qwen3.5 or Qwen4-Exp config.

        Args:
            hf_config: the config object or its dict; a nested ``text_config`` is followed.
            tp_size: how many ranks share the heads.
            dtype: of the activations; None takes the config's, and torch's default where that
                names none, as transformers builds such a model.

        Raises:
            SpecError: a field is missing, an activation is none that the ops have, or the heads do
                not divide.
        """
        config = _fields(hf_config)
        text = _fields(config["text_config"]) if config.get("text_config") else config
        if text.get("linear_allow_neg_eigval"):
            raise SpecError(
                "config linear_allow_neg_eigval is True, which doubles beta, needs False: not a "
                "model whose beta is sigmoid(b)?"
            )
        named = text.get("dtype") or text.get("torch_dtype")
        named = named or config.get("dtype") or config.get("torch_dtype")
        hidden_act = text.get("hidden_act", "silu")
        gate = text.get("output_gate_type") or hidden_act
        return cls(
            num_k_heads=_required(text, "linear_num_key_heads"),
            num_v_heads=_required(text, "linear_num_value_heads"),
            head_k_dim=_required(text, "linear_key_head_dim"),
            head_v_dim=_required(text, "linear_value_head_dim"),
            conv_width=_required(text, "linear_conv_kernel_dim"),
            dtype=dtype or _dtype("dtype", named or torch.get_default_dtype()),
            state_dtype=_dtype("mamba_ssm_dtype", text.get("mamba_ssm_dtype") or "float32"),
            activation=_activation("hidden_act", hidden_act, "silu"),
            gate_activation=_activation("output_gate_type", gate, *GATE_ACTIVATIONS),
        ).shard(tp_size)


def activation_named(name: object) -> Any:
    """Return an activation by its name in torch: configs and layers call silu swish as well."""
    return "silu" if name == "swish" else name


def _activation(field: str, name: object, *allowed: str) -> Any:
    activation = activation_named(name)
    _one_of(f"config {field}", activation, allowed)
    return activation


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{name} is {value!r}, needs {' or '.join(map(repr, allowed))}")


def _member(choices: type[Enum], name: str, spec: GdnSpec) -> Enum:
    value = getattr(spec, name)
    _one_of(name, value, tuple(choice.value for choice in choices))
    return choices(value)


def _fields(config: object) -> dict[str, object]:
    if isinstance(config, dict):
        return config
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        raise SpecError(f"config has type {type(config).__name__}, needs a dict or to_dict()")
    fields: dict[str, object] = to_dict()
    return fields


def _required(config: dict[str, object], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int):
        raise SpecError(f"config {name} is {value!r}, needs an integer: not a GDN model?")
    return value


def _dtype(name: str, value: object) -> torch.dtype:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise SpecError(f"config {name} is {value!r}, needs the name of a torch dtype")
    return dtype
