# SPDX-License-Identifier: Apache-2.0
"""A byte-level Gated DeltaNet language model, and its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gdn_portable.errors import ModelFileError
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import Drafts, PrefillMetadata, VerifyMetadata
from gdn_portable.nn import GatedDeltaNet
from gdn_portable.spec import GdnSpec
from gdn_portable.state import StatePool

WEIGHTS = Path(__file__).parent / "shakespeare.safetensors"
VOCABULARY = 256


@dataclass(frozen=True, slots=True)
class ByteLmConfig:
    """Sizes of the model; head dims and conv width are those every vendor's kernels serve."""

    num_layers: int = 4
    hidden_size: int = 256
    mlp_size: int = 512
    num_k_heads: int = 2
    num_v_heads: int = 4
    head_dim: int = 128
    conv_width: int = 4

    def spec(self, dtype: torch.dtype, *, max_drafts: int = 1) -> GdnSpec:
        """Return the spec of its layers; ``max_drafts`` widens the window for a slot table."""
        return GdnSpec(
            num_k_heads=self.num_k_heads,
            num_v_heads=self.num_v_heads,
            head_k_dim=self.head_dim,
            head_v_dim=self.head_dim,
            conv_width=self.conv_width,
            conv_window=self.conv_width - 1 + max_drafts - 1,
            dtype=dtype,
            state_dtype=torch.float32,
        )


class _Layer(nn.Module):
    def __init__(self, config: ByteLmConfig, spec: GdnSpec) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.mlp_size
        self.mixer_norm = nn.RMSNorm(hidden, eps=1e-6, dtype=spec.dtype)
        self.mixer = GatedDeltaNet(spec, hidden)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-6, dtype=spec.dtype)
        self.up = nn.Linear(hidden, 2 * inner, bias=False, dtype=spec.dtype)
        self.down = nn.Linear(inner, hidden, bias=False, dtype=spec.dtype)

    def mlp(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * value)
        return out


class ByteLm(nn.Module):
    """Embedding, Gated DeltaNet and MLP layers, and an output tied to the embedding."""

    def __init__(self, config: ByteLmConfig, spec: GdnSpec) -> None:
        """Allocate weights on torch's default device."""
        super().__init__()
        self.config = config
        self.spec = spec
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size, dtype=spec.dtype)
        self.layers = nn.ModuleList(_Layer(config, spec) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6, dtype=spec.dtype)

    def allocate_pools(self, num_slots: int, device: torch.device) -> list[StatePool]:
        """Allocate one pool per layer."""
        return [StatePool.allocate(self.spec, num_slots, device) for _ in self.layers]

    def prefill(
        self, tokens: Tensor, ops: GdnOps, pools: list[StatePool], *, metadata: PrefillMetadata
    ) -> Tensor:
        """Return logits [T, 256] of packed tokens [T]."""
        return self._run(
            tokens,
            lambda i, mixer, x: mixer.prefill(x, ops, pools[i], metadata=metadata),
        )

    def decode(
        self, tokens: Tensor, ops: GdnOps, pools: list[StatePool], *, state_indices: Tensor
    ) -> Tensor:
        """Return logits [B, 256] of one token per sequence [B]."""
        return self._run(
            tokens,
            lambda i, mixer, x: mixer.decode(x, ops, pools[i], state_indices=state_indices),
        )

    def verify(
        self,
        tokens: Tensor,
        ops: GdnOps,
        pools: list[StatePool],
        *,
        metadata: VerifyMetadata,
        drafts: list[Drafts | None],
    ) -> Tensor:
        """Return logits [T, 256] of packed drafts [T]."""
        return self._run(
            tokens,
            lambda i, mixer, x: mixer.verify(x, ops, pools[i], metadata=metadata, drafts=drafts[i]),
        )

    def _run(self, tokens: Tensor, mix: Callable[[int, GatedDeltaNet, Tensor], Tensor]) -> Tensor:
        x = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            x = x + mix(i, layer.mixer, layer.mixer_norm(x))
            x = x + layer.mlp(x)
        return F.linear(self.norm(x), self.embedding.weight).float()


def save_model(model: ByteLm, path: Path, provenance: dict[str, str]) -> None:
    """Write weights in bfloat16, with the config and where they come from."""
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, path, {"config": json.dumps(asdict(model.config)), **provenance})


def load_model(
    path: Path, device: torch.device, dtype: torch.dtype, *, max_drafts: int = 1
) -> ByteLm:
    """Read a model written by :func:`save_model`.

    Args:
        path: the safetensors file.
        device: where to put it.
        dtype: of weights and activations.
        max_drafts: P of the verify steps that will be run under the slot-table protocol.

    Raises:
        ModelFileError: the file is missing, damaged, or holds another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = ByteLmConfig(**json.loads(metadata["config"]))
        with torch.device(device):
            model = ByteLm(config, config.spec(dtype, max_drafts=max_drafts))
        model.load_state_dict(tensors)
    except FileNotFoundError as error:
        raise ModelFileError(f"no model file at {path}") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # torch lists every problem of a state dict on a line of its own, after a heading
        problems = str(error).splitlines()
        first = problems[min(1, len(problems) - 1)].strip() if problems else type(error).__name__
        raise ModelFileError(f"{path} is not a model of this demo: {first}") from error
    return model.eval()


def model_provenance(path: Path) -> dict[str, str]:
    """Return what a model file says about where it comes from."""
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    return {key: value for key, value in metadata.items() if key != "config"}
