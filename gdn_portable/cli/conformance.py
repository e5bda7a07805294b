# SPDX-License-Identifier: Apache-2.0
"""The cases of ``verify``: the layers, and how each case ends, in one process or in several."""

from __future__ import annotations

import functools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import torch

from gdn_portable.errors import DeviceLostError, UnsupportedCallError, UnsupportedError
from gdn_portable.interface import GdnOps
from gdn_portable.select import bind
from gdn_portable.spec import ConvLayout, GdnSpec, Op, StateLayout
from gdn_portable.testing import Case, cases

# the layer of Qwen3-Next and Qwen3.5 as one of eight ranks sees it, and what else engines ask for
MODEL = GdnSpec(
    num_k_heads=2,
    num_v_heads=4,
    head_k_dim=128,
    head_v_dim=128,
    dtype=torch.bfloat16,
    state_dtype=torch.float32,
)
LAYERS = {
    "model": MODEL,
    "bf16-state": replace(MODEL, state_dtype=torch.bfloat16, pad_slot=0),
    "len-first": replace(
        MODEL, num_k_heads=1, num_v_heads=2, conv_layout=ConvLayout.LEN_FIRST, scratch_slot=24
    ),
    "fp16-kv": replace(
        MODEL,
        num_k_heads=1,
        num_v_heads=3,
        head_k_dim=64,
        dtype=torch.float16,
        state_dtype=torch.float16,
        conv_width=3,
        activation=None,
        gate_activation="sigmoid",
        state_layout=StateLayout.KV,
        conv_layout=ConvLayout.LEN_FIRST,
    ),
    "ratio-8": replace(MODEL, num_k_heads=1, num_v_heads=8, head_k_dim=64, head_v_dim=32),
    "fp32": replace(
        MODEL,
        num_k_heads=1,
        num_v_heads=2,
        head_k_dim=32,
        head_v_dim=16,
        dtype=torch.float32,
        conv_width=2,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a case ended.

    Attributes:
        layer: a name of ``LAYERS``.
        case: its name.
        op: that was called.
        kernel: behind the op; "-" where none could be bound.
        error: the largest, relative to what is allowed; None where the case did not pass.
        refusal: why the kernel did not take it.
        failure: why it failed.
        seconds: that it took, the reference's on the CPU included.
    """

    layer: str
    case: str
    op: Op
    kernel: str
    error: float | None
    refusal: str | None
    failure: str | None
    seconds: float


def prepare_process() -> None:
    """Let a process run cases."""
    # a case is small: threads that wait for each other only slow its reference down
    torch.set_num_threads(1)


def outcomes_of(
    chosen: Sequence[tuple[str, Case]],
    target: torch.device,
    backend: str | None,
    jobs: int,
    say: Callable[[str], None],
) -> Iterator[Outcome]:
    """Yield how every case ends, in any order where there is more than one job.

    Args:
        chosen: the cases, each with the name of its layer.
        target: where to run.
        backend: to bind; None takes the device's, or what the environment names.
        jobs: processes that share the device; 1 is this one.
        say: told what is about to run, or has been run by one of several.

    Raises:
        DeviceLostError: nothing more can be run.
    """
    if jobs == 1:
        yield from _run(chosen, target, backend, say)
        return
    # a forked process could not use the device
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare_worker) as pool:
        futures = [
            pool.submit(_run_apart, layer, case.name, target, backend) for layer, case in chosen
        ]
        try:
            for future in as_completed(futures):
                outcome, loss = future.result()
                say(f"{outcome.layer}: {outcome.case}")
                yield outcome
                if loss is not None:
                    raise DeviceLostError(loss)
        except BrokenProcessPool as error:
            raise DeviceLostError("a process ended before its case") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    # the process that reports decides what a key does
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare_process()


@functools.cache
def _by_name(layer: str) -> dict[str, Case]:
    return {case.name: case for case in cases(LAYERS[layer])}


@torch.no_grad()
def _run_apart(
    layer: str, name: str, target: torch.device, backend: str | None
) -> tuple[Outcome, str | None]:
    """Return how a case ends, and what was lost with it."""
    outcomes = _run([(layer, _by_name(layer)[name])], target, backend, lambda _: None)
    outcome = next(outcomes)
    try:
        next(outcomes, None)  # looks after the device
    except DeviceLostError as error:
        return outcome, str(error)
    return outcome, None


def _run(
    chosen: Sequence[tuple[str, Case]],
    target: torch.device,
    backend: str | None,
    say: Callable[[str], None],
) -> Iterator[Outcome]:
    """Yield how every case ends, in this process."""
    bound: dict[GdnSpec, GdnOps] = {}
    for layer, case in chosen:
        say(f"{layer}: {case.name}")
        started = time.perf_counter()
        kernel, error, refusal, failure = "-", None, None, None
        try:
            if case.spec not in bound:
                bound[case.spec] = bind(case.spec, target, backend=backend, check=False)
            ops = bound[case.spec]
            kernel = ops.kernels[case.op]
            error = case.check(ops)
        except AssertionError as wrong:
            failure = str(wrong)
        except (UnsupportedError, UnsupportedCallError) as unable:
            refusal = _refusal(unable)
        # whatever a kernel or its compiler raises is what the report is for
        except Exception as broken:
            failure = f"{type(broken).__name__}: {broken}"
        yield Outcome(
            layer=layer,
            case=case.name,
            op=case.op,
            kernel=kernel,
            error=error,
            refusal=refusal,
            failure=failure,
            seconds=time.perf_counter() - started,
        )
        if failure is not None:
            _look_after(target)


def _refusal(error: UnsupportedError | UnsupportedCallError) -> str:
    if not isinstance(error, UnsupportedError):
        return str(error)
    return ", ".join(f"{name}: {'; '.join(reasons)}" for name, reasons in error.rejected.items())


def _look_after(target: torch.device) -> None:
    """Raise where a failure has taken the device with it."""
    try:
        torch.zeros(1, device=target).item()
    except RuntimeError as error:
        raise DeviceLostError(f"the device is lost: {str(error).splitlines()[0]}") from error
