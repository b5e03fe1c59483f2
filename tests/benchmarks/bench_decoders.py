"""What decoding in a process of its own costs: the same files decoded here and there, in turns, in one run.

On a machine under load the clock says what the others take; the processor's time, of both processes together, does not.
"""

import io
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import tifffile
from rich.console import Console
from rich.table import Table

from semwatch.intake import decoding
from semwatch.intake.decoders import Decoders

AIM_MS = 3.0
ROUNDS = 25


def _files() -> dict[str, bytes]:
    dice = np.random.default_rng(0)
    field = dice.normal(120, 12, (1024, 1024)).clip(0, 255).astype(np.uint8)
    wide = dice.integers(0, 60000, (1024, 1024), np.uint16)
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, wide)
    return {
        "PNG 512": cv2.imencode(".png", field[:512, :512])[1].tobytes(),
        "PNG 1024": cv2.imencode(".png", field)[1].tobytes(),
        "JPEG 1024": cv2.imencode(".jpg", field)[1].tobytes(),
        "16-bit TIFF 1024": tiff.getvalue(),
        "PNG 4096": cv2.imencode(".png", np.tile(field, (4, 4)))[1].tobytes(),
    }


def _cpu_s(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _row(here: list[float], there: list[float]) -> list[str]:
    cost = statistics.median(b - a for a, b in zip(here, there, strict=True))
    return [f"{statistics.median(here):.2f}", f"{statistics.median(there):.2f}", f"{cost:.2f}"]


def test_cost_of_a_process_of_its_own() -> None:
    table = Table(
        "file",
        "here ms",
        "there ms",
        "cost ms",
        "ratio",
        "CPU here",
        "CPU there",
        "CPU cost",
        title=f"decoding, median of {ROUNDS}, in turns",
    )
    costs = {}
    with Decoders(1) as decoders:
        pid = decoders._all[0]._process.pid
        for name, data in _files().items():
            here, there, cpu_here, cpu_there = [], [], [], []
            decoders.decode(data, name=name)
            for _ in range(ROUNDS):
                start, cpu_start = time.perf_counter(), time.process_time()
                decoding.decode(data, name=name)
                between, cpu_between, theirs_before = time.perf_counter(), time.process_time(), _cpu_s(pid)
                decoders.decode(data, name=name)
                there.append(1000 * (time.perf_counter() - between))
                here.append(1000 * (between - start))
                cpu_here.append(1000 * (cpu_between - cpu_start))
                cpu_there.append(1000 * (time.process_time() - cpu_between + _cpu_s(pid) - theirs_before))
            ours, theirs = statistics.median(here), statistics.median(there)
            costs[name] = statistics.median(b - a for a, b in zip(here, there, strict=True))
            table.add_row(
                name,
                f"{ours:.2f}",
                f"{theirs:.2f}",
                f"{costs[name]:.2f}",
                f"{theirs / ours:.2f}",
                *_row(cpu_here, cpu_there),
            )
        memory = psutil.Process(pid).memory_full_info().uss / 1e6
    console = Console(width=120)
    console.print(table)
    console.print(f"memory of one decoder's own after all: {memory:.0f} MB; aim: at most {AIM_MS:g} ms an image")
    load = Path("/proc/loadavg").read_text().split()[0]
    console.print(f"load of the machine meanwhile: {load}")
    assert set(costs) == set(_files())
