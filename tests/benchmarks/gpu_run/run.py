"""One run that says how fast the networks are on this machine's GPU, and how far low precision moves their answers.

    <out>/report.json   see ``Report``; written anew after every row, so that a run that is cut off keeps what it has
    <out>/report.txt    the same as tables

The floor is the time that the counted operations take at the peak of a large matrix product, measured on the same card
in the same run: before, between and after the networks, the highest counts. Inputs lie on the device; copies to and
from it are not in the times.
"""

import io
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gpu_run import measure
from gpu_run.networks import Pair, lowered
from semwatch.line.scaling import resize
from semwatch.models.model_repository import Arrays
from semwatch.system import files
from semwatch.system.clock import utc_now
from semwatch_training.engines import parity
from semwatch_training.families.ni.ni_detector import DetectorGraph
from semwatch_training.families.smg_vit.smg_vit import EncoderGraph

BATCHES = (1, 4, 16)
METHOD_GFLOP = {"vit-b": {"detector": 288.2, "encoder": 46.3}}
"""METHOD section 5's own count, that the counter is checked against."""
COUNT_TOLERANCE = 0.01


class Row(BaseModel):
    """One time."""

    size: str
    weights: str
    part: str
    """detector, encoder, or both: one image and one crop of it."""
    way: str
    """eager, graph (a CUDA graph), or compiled (by torch.compile, in a CUDA graph)."""
    precision: str
    batch: int
    ms_per_image: float
    gflop_per_image: float
    floor_ms: float
    ratio: float
    """Time over floor."""


class Parity(BaseModel):
    """Largest difference to fp32 on the same device by output, relative to the output's largest value."""

    size: str
    weights: str
    part: str
    precision: str
    images: int
    relative: dict[str, float]


class Report(BaseModel):
    """What a run found."""

    schema_version: int = 1
    created_utc: str
    device: str
    torch_version: str
    peak_tflops: float
    peak_precision: str
    gflop_check: dict[str, float] = {}
    """Counted over METHOD's own figure, by network."""
    rows: list[Row] = []
    parity: list[Parity] = []
    left_out: list[str] = []
    """What could not be measured here, and why."""


@dataclass(frozen=True, slots=True)
class Order:
    """How much is measured."""

    batches: Sequence[int] = BATCHES
    repeats: int = 50
    images: int = 8
    compiled: Sequence[str] = ("vit-b",)
    """Sizes that torch.compile is tried on too; it takes most of a minute for each network and batch."""


def run(out: Path, pairs: Sequence[Callable[[], Pair]], device: str, order: Order) -> Report:
    """Measure pairs of networks one after another; each is made when its turn comes.

    Args:
        out: folder of the report.
        pairs: see ``networks.make``.
        device: "cuda", or "cpu": the same code in fp32 without graphs, to try it out.
        order: how much.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    report = Report(
        created_utc=utc_now(),
        device=torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        torch_version=str(torch.__version__),
        peak_tflops=measure.peak_tflops(device, dtype),
        peak_precision=_name(dtype),
    )
    if device == "cpu":
        report.left_out.append("CUDA graphs and torch.compile: no CUDA device; times are of the processor, in fp32")
    out.mkdir(parents=True, exist_ok=True)
    for make in pairs:
        pair = make()
        inputs = looked_at(pair, order.images)
        gflop = _count(pair, inputs, report)
        networks = {part: lowered(graph, dtype, device) for part, graph in _parts(pair).items()}
        for way in ("eager", "graph") if device == "cuda" else ("eager",):
            _time(out, report, pair, networks, inputs, gflop, way, device, order)
        _compare(report, pair, inputs, device)
        _write(out, report)
        if device == "cuda" and pair.name in order.compiled:
            quick = {part: torch.compile(network, dynamic=False) for part, network in networks.items()}
            _time(out, report, pair, quick, inputs, gflop, "compiled", device, order)
        _settle(report, measure.peak_tflops(device, dtype))
        _write(out, report)
    if beaten := [row for row in report.rows if row.ratio < 1]:
        report.left_out.append(
            f"a sound floor: {len(beaten)} times lie below it, so the device was busy with others while its peak was "
            f"measured; run it again alone"
        )
        _write(out, report)
    return report


def looked_at(pair: Pair, n: int) -> dict[str, Arrays]:
    """Inputs of both networks: fields of a synthetic lot, and the middle of each as a crop with a round soft mask."""
    field_px, crop_px = pair.detector.detector.form.input_px, pair.encoder.vit.form.input_px
    side = crop_px // pair.encoder.vit.trunk.shape.patch
    fields = [page.field for page in parity.read_pages(None, n)]
    middles = [field[field.shape[0] // 4 : -field.shape[0] // 4, field.shape[1] // 4 : -field.shape[1] // 4]
               for field in fields]  # fmt: skip
    axis = np.linspace(-2, 2, side, dtype=np.float32)
    blob = np.exp(-(axis[:, None] ** 2) - axis[None, :] ** 2)
    return {
        "detector": {"image": np.stack([resize(field, (field_px, field_px)) for field in fields])},
        "encoder": {
            "crop": np.stack([resize(middle, (crop_px, crop_px)) for middle in middles]),
            "soft_mask": np.repeat(blob[None], n, axis=0),
            "size": np.full((n, 2), -2, np.float32),
        },
    }


def table(report: Report) -> str:
    """The report for people."""
    console = Console(width=120, record=True, file=io.StringIO())
    peak = f"peak {report.peak_tflops:.2f} TFLOP/s ({report.peak_precision})"
    title = f"{report.device}, torch {report.torch_version}: {peak}"
    shown = Table("size", "weights", "part", "way", "batch", "ms/image", "GFLOP", "floor ms", "x floor", title=title)
    for row in report.rows:
        shown.add_row(
            row.size, row.weights, row.part, f"{row.way} {row.precision}", str(row.batch), f"{row.ms_per_image:.3f}",
            f"{row.gflop_per_image:.1f}", f"{row.floor_ms:.3f}", f"{row.ratio:.2f}",
        )  # fmt: skip
    against = Table("size", "weights", "part", "precision", "images", "off by, of the largest value")
    for each in report.parity:
        off = "  ".join(f"{name} {value:.1e}" for name, value in each.relative.items())
        against.add_row(each.size, each.weights, each.part, each.precision, str(each.images), off)
    console.print(shown, against)
    for name, value in report.gflop_check.items():
        console.print(f"GFLOP counted over METHOD section 5, {name}: {value:.4f}")
    for line in report.left_out:
        console.print(f"left out: {line}")
    return console.export_text()


def _parts(pair: Pair) -> dict[str, DetectorGraph | EncoderGraph]:
    return {"detector": pair.detector, "encoder": pair.encoder}


def _count(pair: Pair, inputs: dict[str, Arrays], report: Report) -> dict[str, float]:
    counted = {part: measure.gflop(graph, _first(inputs[part], 1, "cpu")) for part, graph in _parts(pair).items()}
    for part, expected in METHOD_GFLOP.get(pair.name, {}).items():
        report.gflop_check[f"{pair.name} {part}"] = counted[part] / expected
    return {**counted, "both": sum(counted.values())}


def _time(
    out: Path, report: Report, pair: Pair, networks: dict[str, Any], inputs: dict[str, Arrays],
    gflop: dict[str, float], way: str, device: str, order: Order,
) -> None:  # fmt: skip
    """Add a row for each part and batch."""
    for batch in order.batches:
        fed = {part: _first(arrays, batch, device) for part, arrays in inputs.items()}
        alone = {part: partial(_call, [networks[part]], [fed[part]]) for part in networks}
        steps = {**alone, "both": partial(_call, [*networks.values()], [fed[part] for part in networks])}
        for part, step in steps.items():
            try:
                with torch.no_grad():
                    timed = step if way == "eager" else measure.captured(step)[0]
                    ms = measure.median_ms(timed, device, order.repeats) / batch
            except RuntimeError as error:  # out of memory, or torch.compile without a compiler
                report.left_out.append(f"{pair.name} {part} {way} batch {batch}: {str(error)[:300]}")
                continue
            floor = gflop[part] / report.peak_tflops
            report.rows.append(
                Row(
                    size=pair.name, weights=pair.weights, part=part, way=way, precision=report.peak_precision,
                    batch=batch, ms_per_image=ms, gflop_per_image=gflop[part], floor_ms=floor, ratio=ms / floor,
                )
            )  # fmt: skip
            _write(out, report)


def _compare(report: Report, pair: Pair, inputs: dict[str, Arrays], device: str) -> None:
    """Add how far bf16 and fp16 are from fp32."""
    names = {"detector": ("score_map", "raw_score"), "encoder": ("features",)}
    for part, graph in _parts(pair).items():
        n = len(next(iter(inputs[part].values())))
        fed = _first(inputs[part], n, device)
        with torch.no_grad():
            expected = _answers(graph.to(device), fed, names[part])
            graph.to("cpu")
            for dtype in (torch.bfloat16, torch.float16):
                found = _answers(lowered(graph, dtype, device), fed, names[part])
                report.parity.append(
                    Parity(
                        size=pair.name, weights=pair.weights, part=part, precision=_name(dtype), images=n,
                        relative=parity.differences(expected, found),
                    )
                )  # fmt: skip


def _answers(network: nn.Module, fed: Sequence[Tensor], names: Sequence[str]) -> dict[str, Any]:
    answer = network(*fed)
    outputs = answer if isinstance(answer, tuple) else (answer,)
    return {name: output.float().cpu().numpy() for name, output in zip(names, outputs, strict=True)}


def _settle(report: Report, peak_tflops: float) -> None:
    """Take a higher peak for the floor of every row."""
    if peak_tflops > report.peak_tflops:
        report.peak_tflops = peak_tflops
        for row in report.rows:
            row.floor_ms = row.gflop_per_image / peak_tflops
            row.ratio = row.ms_per_image / row.floor_ms


def _call(networks: Sequence[Callable[..., Any]], fed: Sequence[Sequence[Tensor]]) -> list[Any]:
    return [network(*inputs) for network, inputs in zip(networks, fed, strict=True)]


def _first(arrays: Arrays, batch: int, device: str) -> list[Tensor]:
    """A batch of the inputs, over and over where there are fewer."""
    return [torch.from_numpy(np.resize(array, (batch, *array.shape[1:]))).to(device) for array in arrays.values()]


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _write(out: Path, report: Report) -> None:
    files.write_whole(out / "report.json", (report.model_dump_json(indent=1) + "\n").encode())
    files.write_whole(out / "report.txt", table(report).encode())
