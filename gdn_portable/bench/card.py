# SPDX-License-Identifier: Apache-2.0
"""The card: what it is, what it can do, and whether its clock can be trusted."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gdn_portable.bench.floors import Rates
from gdn_portable.bench.timing import Clock, measure

COPY_BYTES = 2**30  # of each of the two tensors
MATMUL = 8192
REPLAYS = 20
BUSY_BYTES = 2**31  # a second or so of memory traffic, for the clock of a card at work
BUSY_CALLS = 900  # as many as are launched without waiting
DRIFT = 0.05
FOREIGN_BYTES = 2**31  # memory that others hold before it counts as another process
OTHER_MEMORY_OVERHEAD = 2**30  # of the driver and of loaded kernels
UNKNOWN_L2 = 64 * 2**20

# bits of nvidia-smi's clocks_event_reasons.active that slow a card down
SLOWDOWNS = {
    0x2: "application clocks are set",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
}
QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "temperature.gpu")
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # newer name first

Ask = Callable[[Sequence[str]], "str | None"]


@dataclass(frozen=True, slots=True)
class Card:
    """A card and the rates that floors are made of."""

    name: str
    memory: int  # bytes
    l2: int  # bytes
    rates: Rates


@dataclass(frozen=True, slots=True)
class Readings:
    """What nvidia-smi says at one moment; None where it does not."""

    driver: str | None = None
    clock: int | None = None  # MHz
    highest_clock: int | None = None
    temperature: int | None = None  # degrees Celsius
    slowdowns: tuple[str, ...] = ()
    other_processes: int | None = None


def read_card(device: torch.device, clock: Clock) -> Card:
    """Measure the rates of the card."""
    properties = torch.cuda.get_device_properties(device)
    return Card(
        name=properties.name,
        memory=properties.total_memory,
        l2=l2_of(device),
        rates=measure_rates(device, clock),
    )


def l2_of(device: torch.device) -> int:
    """Return the bytes of the card's last cache."""
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or UNKNOWN_L2


def measure_rates(
    device: torch.device, clock: Clock, *, copy_bytes: int = COPY_BYTES, matmul: int = MATMUL
) -> Rates:
    """Time an elementwise float32 kernel that reads and writes, and a square bfloat16 product."""
    bandwidth = _bandwidth(device, clock, copy_bytes)
    a, b = (torch.randn(matmul, matmul, dtype=torch.bfloat16, device=device) for _ in range(2))
    c = torch.empty_like(a)
    multiplied = measure([lambda: torch.matmul(a, b, out=c)], clock, REPLAYS).microseconds
    return Rates(bandwidth, 2 * matmul**3 / (multiplied * 1e-6))


def _bandwidth(device: torch.device, clock: Clock, copy_bytes: int) -> float:
    x = torch.ones(copy_bytes // 4, device=device)
    y = torch.empty_like(x)
    copied = measure([lambda: torch.add(x, 1.0, out=y)], clock, REPLAYS).microseconds
    return 2 * x.nbytes / (copied * 1e-6)


def drift(before: Rates, after: Rates) -> list[str]:
    """Return warnings where the card became slower or faster in the course of a run."""
    changes = (
        ("copy bandwidth", after.bandwidth / before.bandwidth - 1),
        ("matmul rate", after.matmul / before.matmul - 1),
    )
    return [
        f"the {name} changed by {change:+.0%} in the course of the run"
        for name, change in changes
        if abs(change) > DRIFT
    ]


def readings_of(device: torch.device) -> Readings:
    """Ask nvidia-smi about a card while it is at work."""
    busy = torch.ones(BUSY_BYTES // 4, device=device)
    for _ in range(BUSY_CALLS):
        busy.add_(1.0)
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    readings = parse_readings(_nvidia_smi, None if uuid is None else f"GPU-{uuid}")
    torch.cuda.synchronize(device)
    return readings


def parse_readings(ask: Ask, card: str | None) -> Readings:
    """Read what ``ask`` answers to the arguments of nvidia-smi."""
    chosen = [] if card is None else ["-i", card]
    for reasons in REASONS:
        fields = ",".join((*QUERY, reasons))
        answer = ask([*chosen, f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
        cells = [cell.strip() for cell in (answer or "").partition("\n")[0].split(",")]
        if len(cells) == len(QUERY) + 1:
            break
    else:
        return Readings()
    driver, clock, highest, temperature, bits = cells
    active = int(bits, 16) if bits.startswith("0x") else 0
    apps = ask([*chosen, "--query-compute-apps=pid", "--format=csv,noheader"])
    return Readings(
        driver=driver,
        clock=_number(clock),
        highest_clock=_number(highest),
        temperature=_number(temperature),
        slowdowns=tuple(reason for bit, reason in SLOWDOWNS.items() if active & bit),
        # this process is one of them, where it can be seen at all
        other_processes=None if apps is None else max(0, len(apps.split()) - 1),
    )


def warnings_of(readings: Readings, foreign_bytes: int) -> list[str]:
    """Return why times are not to be trusted."""
    found = [f"the card is slowed down: {reason}" for reason in readings.slowdowns]
    if readings.other_processes:
        found.append(f"{readings.other_processes} other processes use the card")
    elif foreign_bytes > FOREIGN_BYTES:
        found.append(f"others hold {foreign_bytes / 2**30:.1f} GiB of the card's memory")
    if readings.clock is None:
        found.append("clocks and slowdowns were not read: nvidia-smi did not answer")
    return found


def foreign_memory(device: torch.device) -> int:
    """Return the bytes in use on a card that this process does not account for."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device) - OTHER_MEMORY_OVERHEAD)


def _number(cell: str) -> int | None:
    return int(cell) if cell.isdigit() else None


def _nvidia_smi(arguments: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
