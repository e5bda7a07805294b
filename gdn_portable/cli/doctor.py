# SPDX-License-Identifier: Apache-2.0
"""``doctor``: what is here, and which kernel serves each op of a layer, or why not."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from gdn_portable.cli.options import Dtype, default_device, imagined_device, layer_of
from gdn_portable.errors import InputError
from gdn_portable.select import (
    OVERRIDE_VARIABLE,
    Choice,
    backend_names,
    default_backend,
    detect_device,
    explain,
)
from gdn_portable.spec import Device, GdnSpec, Op
from gdn_portable.versions import versions


def doctor(
    device: Annotated[
        str | None, typer.Option(help="Where: cpu, cuda, cuda:1. Default: a GPU if one is here.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Explain for an architecture that is not here: gfx942.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json; default: Qwen3-Next's layer.")
    ] = None,
    tp_size: Annotated[int, typer.Option(help="Ranks that share the heads.")] = 1,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the activations.")] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show every backend's kernels, not the default's alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the device, versions, and every kernel of every op with the reason for or against.

    Libraries are those that are installed here, for an architecture that is not here as well. What
    GDN_PORTABLE_KERNELS names serves, as it does where an engine binds the ops.
    """
    if device is not None and arch is not None:
        raise InputError("--device and --arch are both given, needs one")
    facts = imagined_device(arch) if arch is not None else detect_device(default_device(device))
    spec = layer_of(config, tp_size, dtype.torch if dtype else None)
    names = sorted(backend_names(), key=lambda name: name != default_backend(facts))
    override = os.environ.get(OVERRIDE_VARIABLE)
    served = explain(spec, facts)  # as bind does: with what the environment names
    tables = {name: explain(spec, facts, backend=name) for name in names}
    found = versions()
    if as_json:
        print(json.dumps(_document(facts, spec, found, override, served, tables), indent=2))
        return
    console = Console()
    console.print(_facts_table(facts, spec, found, is_here=arch is None))
    default, *others = names
    where = "here" if arch is None else "there"
    if override:
        console.print(_kernel_table(f"{OVERRIDE_VARIABLE}={override}", served))
        others = names
    else:
        console.print(_kernel_table(f"backend {default} (default {where})", served))
    if show_all:
        for name in others:
            console.print(_kernel_table(f"backend {name}", tables[name]))
    else:
        console.print(_short_table({name: tables[name] for name in others}))


def _document(
    device: Device,
    spec: GdnSpec,
    found: dict[str, str | None],
    override: str | None,
    served: tuple[Choice, ...],
    tables: dict[str, tuple[Choice, ...]],
) -> dict[str, object]:
    return {
        "device": {
            "kind": device.kind,
            "arch": device.arch,
            "index": device.index,
            "name": device.name,
        },
        "spec": {name: _plain(getattr(spec, name)) for name in spec.__dataclass_fields__},
        "versions": found,
        "default_backend": default_backend(device),
        OVERRIDE_VARIABLE: override,
        "serves": {choice.op.value: choice.kernel for choice in served if choice.chosen},
        "backends": {
            name: [
                {
                    "op": choice.op.value,
                    "kernel": choice.kernel,
                    "chosen": choice.chosen,
                    "reasons": list(choice.reasons),
                    "among": list(choice.among.kernels) if choice.among else [],
                    "source": choice.among.source if choice.among else "",
                }
                for choice in choices
            ]
            for name, choices in tables.items()
        },
    }


def _plain(value: object) -> object:
    return str(value) if isinstance(value, torch.dtype) else value


def _facts_table(
    device: Device, spec: GdnSpec, found: dict[str, str | None], *, is_here: bool
) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2))
    imagined = "" if is_here else ", imagined; libraries are those that are installed here"
    table.add_row("device", f"{device} {device.name}".strip() + imagined)
    table.add_row(
        "layer",
        f"H={spec.num_k_heads} HV={spec.num_v_heads} K={spec.head_k_dim} V={spec.head_v_dim} "
        f"W={spec.conv_width}, {_short(spec.dtype)} activations, {_short(spec.state_dtype)} state, "
        f"layouts {spec.conv_layout.value} and {spec.state_layout.value}",
    )
    for name, version in found.items():
        if version is not None:
            table.add_row(name, version)
    return table


def _kernel_table(title: str, choices: tuple[Choice, ...]) -> Table:
    table = Table("op", "kernel", "", "reasons against it", title=title, title_justify="left")
    for choice in choices:
        mark = "serves" if choice.chosen else "cannot" if choice.reasons else "able, not first"
        name, _, among = choice.kernel.partition(": ")
        chosen_by = [choice.among.source] if choice.among else []
        kernel = "\n".join([name, *filter(None, among.split(" | ")), *chosen_by])
        table.add_row(choice.op.value, kernel, mark, "\n".join(choice.reasons))
    return table


def _short_table(tables: dict[str, tuple[Choice, ...]]) -> Table:
    """Return a line for each backend: how many ops it could serve, and what most often forbids."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.title, table.title_justify = "other backends; --all shows their kernels", "left"
    for name, choices in tables.items():
        served = {choice.op for choice in choices if choice.chosen}
        refused = (choice for choice in choices if choice.op not in served)
        reasons = Counter(reason for choice in refused for reason in choice.reasons)
        most = [reason for reason, _ in reasons.most_common(1)]
        could = f"could serve {len(served)} of {len(Op)} ops"
        table.add_row(f"backend {name}", ": ".join([could, *most]))
    return table


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
