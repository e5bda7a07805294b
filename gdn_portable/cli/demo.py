# SPDX-License-Identifier: Apache-2.0
"""``demo``: a language model writes text through bound ops, plainly and with drafts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from gdn_portable.cli.options import Dtype, present_device
from gdn_portable.demo.generate import (
    INDEX_DTYPE,
    Generated,
    Generator,
    Sampling,
    Speculation,
    check_request,
)
from gdn_portable.demo.model import WEIGHTS, load_model, model_provenance
from gdn_portable.interface import GdnOps
from gdn_portable.metadata import DraftProtocol
from gdn_portable.select import bind

PROMPTS = (
    "ROMEO\tBut, soft! what light through yonder window",
    "KING LEAR\tBlow, winds",
    "HAMLET\tTo be, or not to be, that is the question:\n\tWhether 'tis nobler in the mind",
    "MACBETH\tIs this a dagger",
    "PORTIA\tThe quality of mercy",
)


class Mode(str, Enum):
    """What to run."""

    BOTH = "both"
    PLAIN = "plain"
    SPECULATIVE = "speculative"


def demo(
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; may be given several times.")
    ] = None,
    new_bytes: Annotated[int, typer.Option(help="Bytes to write for each prompt.")] = 240,
    max_batch: Annotated[int, typer.Option(help="Sequences that run at once.")] = 4,
    mode: Annotated[Mode, typer.Option(help="Byte by byte, with drafts, or both.")] = Mode.BOTH,
    protocol: Annotated[
        DraftProtocol, typer.Option(help="How accepted drafts are kept.")
    ] = DraftProtocol.REPLAY,
    max_drafts: Annotated[int, typer.Option(help="Drafts of a step, root included.")] = 6,
    branches: Annotated[
        int, typer.Option(help="Continuations a tree of drafts follows; 1 is a chain.")
    ] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest byte.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the noise at a temperature above 0.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.FP32,
    backend: Annotated[
        str | None, typer.Option(help="Backend to bind; default: the device's.")
    ] = None,
    model: Annotated[Path, typer.Option(help="The model file.")] = WEIGHTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Continue prompts of different lengths as one continuous batch."""
    prompts = [os.fsencode(text) for text in (prompt if prompt is not None else PROMPTS)]
    check_request(prompts, new_bytes)
    speculation = Speculation(protocol, max_drafts, branches)
    target = present_device(device)
    # a model this small gains nothing from threads, and loses tenfold where they wait for a core
    torch.set_num_threads(1)
    weights = load_model(model, target, dtype.torch, max_drafts=max(1, max_drafts))
    ops = bind(weights.spec, target, backend=backend)
    warm_up(
        ops,
        batch=max_batch,
        tokens=sum(map(len, prompts)),
        max_drafts=max_drafts,
        protocols=() if mode is Mode.PLAIN else (protocol,),
    )
    sampling, generators = Sampling(temperature, seed), dict[str, Generator]()
    if mode is not Mode.SPECULATIVE:
        generators["plain"] = Generator(weights, ops, max_batch, sampling)
    if mode is not Mode.PLAIN:
        generators["speculative"] = Generator(weights, ops, max_batch, sampling, speculation)

    console, runs = Console(stderr=as_json), dict[str, Generated]()
    for name, generator in generators.items():
        stream = not as_json and not runs
        with _watch(console, prompts, new_bytes, name, stream=stream) as on_bytes:
            runs[name] = generator.run(prompts, new_bytes, on_bytes)

    same = len({tuple(run.texts) for run in runs.values()}) == 1
    if as_json:
        document = _document(prompts, runs, ops, speculation, same, model_provenance(model))
        print(json.dumps(document, indent=2))
    else:
        first = next(iter(runs.values()))
        if not console.is_terminal:
            console.print(_panels(prompts, first.texts))
        console.print(_rates(runs, speculation), _kernels(ops))
        if len(runs) == 2:
            verdict = "the same bytes as" if same else "OTHER BYTES THAN"
            console.print(f"Speculative decoding wrote {verdict} plain decoding.")
    if not same:
        raise typer.Exit(1)


def warm_up(
    ops: GdnOps, *, batch: int, tokens: int, max_drafts: int, protocols: tuple[DraftProtocol, ...]
) -> None:
    """Compile before anything is timed, and show what; on a CPU nothing is compiled."""
    if ops.device.kind == "cpu":
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("warmup", total=None)
        ops.warmup(
            batch_sizes=(batch,),
            prefill_tokens=(tokens,),
            max_drafts=max_drafts,
            protocols=protocols,
            index_dtypes=(INDEX_DTYPE,),
            progress=lambda what: progress.update(task, description=f"warmup: {what}"),
        )


@contextmanager
def _watch(
    console: Console, prompts: list[bytes], new_bytes: int, name: str, *, stream: bool
) -> Iterator[Callable[[int, bytes], None]]:
    """Show text as it is written on a terminal, and a progress bar where nothing streams."""
    if stream and console.is_terminal:
        texts = [b""] * len(prompts)
        with Live(_panels(prompts, texts), console=console, refresh_per_second=12) as live:

            def show(number: int, new: bytes) -> None:
                texts[number] += new
                live.update(_panels(prompts, texts))

            yield show
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TextColumn("bytes"), console=Console(file=sys.stderr))
    with progress:
        task = progress.add_task(f"{name} decoding", total=len(prompts) * new_bytes)
        yield lambda _, new: progress.advance(task, len(new))


def _panels(prompts: list[bytes], texts: list[bytes]) -> Group:
    """Show prompts in bold with what was written after them."""
    panels = []
    for prompt, text in zip(prompts, texts, strict=True):
        shown = Text(_readable(prompt), style="bold")
        shown.append(_readable(text), style="not bold")
        panels.append(Panel(shown))
    return Group(*panels)


def _readable(text: bytes) -> str:
    return text.decode(errors="replace").expandtabs(4)


def _rates(runs: dict[str, Generated], speculation: Speculation) -> Table:
    table = Table("decoding", "tokens per second", "accepted length", "steps", "prefill")
    for name, run in runs.items():
        label = name
        if name == "speculative":
            shape = "chain" if speculation.branches == 1 else "tree"
            label += f" ({speculation.protocol.value}, {shape} of {speculation.max_drafts})"
        table.add_row(
            label,
            f"{run.bytes_per_second:.0f}",
            f"{run.accepted_length:.2f}",
            str(run.decode_steps),
            f"{run.prompt_bytes} in {run.prefill_seconds:.2f} s",
        )
    return table


def _kernels(ops: GdnOps) -> Table:
    table = Table("op", f"kernel on {ops.device}")
    for op, kernel in ops.kernels.items():
        table.add_row(op.value, kernel)
    return table


def _document(
    prompts: list[bytes],
    runs: dict[str, Generated],
    ops: GdnOps,
    speculation: Speculation,
    same: bool,
    provenance: dict[str, str],
) -> dict[str, object]:
    return {
        "device": str(ops.device),
        "torch": torch.__version__,
        "model": provenance,
        "kernels": {op.value: kernel for op, kernel in ops.kernels.items()},
        "speculation": {
            "protocol": speculation.protocol.value,
            "max_drafts": speculation.max_drafts,
            "branches": speculation.branches,
        },
        "prompts": [prompt.decode(errors="replace") for prompt in prompts],
        "runs": {
            name: {
                "texts": [text.decode(errors="replace") for text in run.texts],
                "tokens_per_second": run.bytes_per_second,
                "accepted_length": run.accepted_length,
                "decode_steps": run.decode_steps,
                "prefill_seconds": run.prefill_seconds,
            }
            for name, run in runs.items()
        },
        "speculative_equals_plain": same if len(runs) == 2 else None,
    }
