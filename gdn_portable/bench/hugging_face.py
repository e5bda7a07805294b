# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model in use beside the same model as it is: tokens, and times of a caller.

    python -m gdn_portable.bench.hugging_face --json out.json

The model is Qwen3-Next's with random weights: its layers' own sizes, few of them, a dense MLP
instead of experts. Tokens are compared in float32, since logits of random weights lie too close for
bfloat16; times are of bfloat16, and of the host and the device together.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_portable.cli.options import present_device
from gdn_portable.engines.transformers import use
from gdn_portable.errors import InputError

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "vocab_size": 4096,
    "num_experts": 0,
    "initializer_range": 0.05,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LIBRARIES = ("fla", "causal_conv1d")  # what transformers runs on where they are installed


class Load(NamedTuple):
    """A batch of prompts of one length."""

    sequences: int
    tokens: int


class Times(NamedTuple):
    """Milliseconds, of one GDN layer or of the model."""

    prefill: float
    decode: float  # of one token of each sequence


LOADS = (Load(1, 512), Load(1, 8192), Load(16, 512))


def build(sizes: dict[str, Any], groups: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model of ``groups`` times three GDN layers and one of attention."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(**sizes, num_hidden_layers=4 * groups)
    torch.manual_seed(0)
    with device:
        model: Any = Qwen3NextForCausalLM(config)
    return model.to(dtype).eval()


def greedy(model: Any, load: Load, new_tokens: int) -> list[int]:
    """Return what the model writes after random prompts, the last of them padded to half."""
    ids = _prompts(model, load)
    mask = torch.ones_like(ids)
    mask[-1, : load.tokens // 2] = 0
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    written: Tensor = model.generate(ids, attention_mask=mask, **options)[:, load.tokens :]
    return written.flatten().tolist()


def times(model: Any, load: Load, repeats: int) -> dict[str, Times]:
    """Time the first layer, and the whole model, each with a cache of its own."""
    ids = _prompts(model, load)
    hidden = model.get_input_embeddings()(ids)
    layer = model.model.layers[0].linear_attn

    def run_layer(cache: Any, x: Tensor) -> None:
        layer(x, cache)  # by either of the names that transformers has had for it

    def run_model(cache: Any, x: Tensor) -> None:
        model(x, past_key_values=cache, logits_to_keep=1)

    return {
        "layer": _times(model, run_layer, hidden, repeats),
        "model": _times(model, run_model, ids, repeats),
    }


def _times(model: Any, run: Callable[[Any, Tensor], None], x: Tensor, repeats: int) -> Times:
    from transformers import DynamicCache

    prefills, decodes = [], []
    for _ in range(repeats + 1):  # whatever compiles does so in the first
        cache = DynamicCache(config=model.config)
        prefills.append(_milliseconds(run, cache, x))
        decodes += [_milliseconds(run, cache, x[:, :1]) for _ in range(4)]
    return Times(statistics.median(prefills[1:]), statistics.median(decodes[4:]))


def _milliseconds(run: Callable[[Any, Tensor], None], cache: Any, x: Tensor) -> float:
    _settle(x.device)
    start = time.perf_counter()
    run(cache, x)
    _settle(x.device)
    return (time.perf_counter() - start) * 1e3


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prompts(model: Any, load: Load) -> Tensor:
    generator = torch.Generator(model.device).manual_seed(1)
    size = (load.sequences, load.tokens)
    return torch.randint(1, model.config.vocab_size, size, generator=generator, device=model.device)


@torch.no_grad()
def compare(
    sizes: dict[str, Any],
    loads: Sequence[Load],
    device: torch.device,
    *,
    groups: int,
    repeats: int,
    new_tokens: int,
) -> dict[str, Any]:
    """Return tokens and times of the model as it is, and in use."""
    import transformers

    model = build(sizes, groups, device, torch.float32)
    prompts = Load(4, min(loads[0].tokens, 96))
    expected = greedy(model, prompts, new_tokens)
    with use(model):
        found = greedy(model, prompts, new_tokens)
    same = [a == b for a, b in zip(expected, found, strict=True)]
    model = model.to(torch.bfloat16)
    before = {load: times(model, load, repeats) for load in loads}
    with use(model) as in_use:
        after = {load: times(model, load, repeats) for load in loads}
    return {
        "device": str(in_use.ops[0].device),
        "name": in_use.ops[0].device.name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "transformers_runs_on": [x for x in LIBRARIES if importlib.util.find_spec(x)] or ["torch"],
        "kernels": {op.value: kernel for op, kernel in in_use.ops[0].kernels.items()},
        "layers": model.config.layer_types,
        "tokens": {"compared": len(same), "same": sum(same)},
        "milliseconds": [
            {
                "of": what,
                "sequences": load.sequences,
                "tokens": load.tokens,
                "step": step,
                "as it is": getattr(before[load][what], step),
                "in use": getattr(after[load][what], step),
            }
            for load in loads
            for what in before[load]
            for step in Times._fields
        ],
    }


def render(report: dict[str, Any]) -> str:
    """Return the report as lines of text."""
    tokens = report["tokens"]
    lines = [
        f"{report['name'] or report['device']}, torch {report['torch']}, transformers "
        f"{report['transformers']} on {' and '.join(report['transformers_runs_on'])}",
        f"greedy tokens, float32: {tokens['same']} of {tokens['compared']} the same",
        f"{'milliseconds':24}{'as it is':>12}{'in use':>12}{'ratio':>8}",
    ]
    for row in report["milliseconds"]:
        batch = f"{row['of']} {row['step']} {row['sequences']} x {row['tokens']}"
        before, after = row["as it is"], row["in use"]
        lines.append(f"{batch:24}{before:12.3f}{after:12.3f}{before / after:8.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--groups", type=int, default=2, help="of 3 GDN layers and attention")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write JSON there")
    options = parser.parse_args(arguments)
    try:
        device = present_device(options.device)
    except InputError as error:
        parser.error(str(error))
    report = compare(
        SIZES,
        LOADS,
        device,
        groups=options.groups,
        repeats=options.repeats,
        new_tokens=32,
    )
    print(render(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
