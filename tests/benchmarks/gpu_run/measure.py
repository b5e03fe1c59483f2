"""Peak, arithmetic and time, all measured in one process on one device: "cuda", or "cpu" to try the same code out."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

PEAK_SIDE = {"cuda": 8192, "cpu": 1024}
"""Side of the square matrices whose product is the peak."""
WARM_UP = 3


def peak_tflops(device: str, dtype: torch.dtype, *, repeats: int = 20) -> float:
    """TFLOP/s of the fastest of some large matrix products; one multiply-add is two operations."""
    side = PEAK_SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = times(lambda: a @ b, device, repeats)
    return 2 * side**3 / min(seconds) / 1e12


def gflop(network: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Billions of operations of the matrix products and convolutions in one call, by count, nothing is computed.

    One multiply-add is two operations. Attention counts as its two products.
    """
    on_meta = [x.to("meta") for x in inputs]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(network).requires_grad_(False).to("meta")(*on_meta)
    return float(counter.get_total_flops()) / 1e9


def times(step: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds of each of some calls, after a warm-up."""
    for _ in range(WARM_UP):
        step()
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            step()
            marks.append(time.perf_counter())
        return [b - a for a, b in pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def median_ms(step: Callable[[], object], device: str, repeats: int) -> float:
    """Milliseconds of the median call."""
    return 1e3 * statistics.median(times(step, device, repeats))


def captured(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Capture a step as a CUDA graph; returns its replay, and what every replay writes its answer into."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made once, such as workspaces, must not be made while capturing
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = step()
    return graph.replay, answer
