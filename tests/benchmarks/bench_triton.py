"""Triton (python backend, ONNX Runtime) against the embedded runtime: the same images, the same networks, one run.

Aims: identical verdicts on 300 images, maps within 1e-4, at most 10 ms more per request at batch 1 and at 4 in flight,
throughput within 5 %. ``make bench`` prints the tables; blocks of both alternate, so that a busy machine is fair.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from paths import DATA
from semwatch.defects import PageReview, Review
from semwatch.intake import decoding
from semwatch.line import pipeline
from semwatch.line.scaling import resize
from semwatch.models.inference import Embedded, Models
from semwatch.models.model_repository import Arrays
from semwatch.settings.recipe import Recipe
from semwatch.triton.client import Triton
from semwatch.triton.server import LocalTriton
from semwatch.triton.setup import set_up
from semwatch.triton.view import Settings
from semwatch_training.data.datasets import folder_images
from semwatch_training.synthetic import lot_images

N = 300
N_REAL = 100
REQUESTS = 40
ROUNDS, BLOCK = 5, 20
IN_FLIGHT = 4
Runtimes = dict[str, Models]


@pytest.fixture(scope="module")
def runtimes(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtimes]:
    folder = repository.parent / ".cache" / "triton"
    set_up(folder)
    threads = len(os.sched_getaffinity(0))
    view = tmp_path_factory.mktemp("view")
    with (
        LocalTriton(folder, repository, settings=Settings(threads=threads), view=view) as server,
        Triton(repository, url=server.url, view=view) as triton,
        Embedded(repository, threads=threads) as embedded,
    ):
        yield {"embedded": embedded, "triton": triton}


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Synthetic fields, and real ones where they are at hand."""
    data = DATA
    real: list[Path] = []
    if data.is_dir():
        mtd = [path for path in folder_images(data / "MTD") if path.suffix == ".jpg"]
        real = folder_images(data / "SEM-TIFF-metadata") + mtd[:: len(mtd) // N_REAL]
    found = [path.read_bytes() for path in real[:N_REAL]]
    return found + [image.content for image in lot_images(n=N - len(found), seed=23, size_hw=(512, 512))]


@pytest.mark.timeout(3600)
def test_the_same_verdicts_and_maps(runtimes: Runtimes, files: list[bytes]) -> None:
    worst_map = worst_score = 0.0
    other, n_defects = 0, 0
    for data in files:
        one, two = (review(data, models) for models in runtimes.values())
        other += verdicts(one) != verdicts(two)
        n_defects += one.n_defects
        for a, b in zip(one.pages, two.pages, strict=True):
            scale = float(np.abs(a.score_map.values).max()) or 1.0
            worst_map = max(worst_map, float(np.abs(a.score_map.values - b.score_map.values).max()) / scale)
            worst_score = max(worst_score, abs(a.score_map.raw_score - b.score_map.raw_score))
    table = Table("what", "measured", "aim", title=f"Triton against embedded, {len(files)} images, {n_defects} defects")
    table.add_row("images with other verdicts", str(other), "0")
    table.add_row("largest difference of a map, of its largest value", f"{worst_map:.1e}", "1e-4")
    table.add_row("largest difference of an image score", f"{worst_score:.1e}", "")
    Console().print(table)
    assert other == 0
    assert worst_map <= 1e-4


@pytest.mark.timeout(3600)
def test_latency_added_and_throughput(runtimes: Runtimes, files: list[bytes]) -> None:
    table = Table("what", "embedded", "Triton", "difference or ratio", "aim", title="what Triton costs")
    image = {"image": resize(decoding.decode(files[-1], name="x")[0].field, (448, 448))[None]}
    rng = np.random.default_rng(3)
    for model in ("detector", "encoder", "head"):
        metas = runtimes["embedded"].meta(model).inputs
        made = {name: rng.random((1, *tensor.shape)).astype(tensor.dtype) for name, tensor in metas.items()}
        inputs = image if model == "detector" else made
        for in_flight in (1, IN_FLIGHT):
            ms = alternating(runtimes, lambda models, m=model, i=inputs, n=in_flight: per_request_ms(models, m, i, n))
            added = ms["triton"] - ms["embedded"]
            name = f"ms per {model} request, batch 1, {in_flight} in flight"
            table.add_row(name, f"{ms['embedded']:.1f}", f"{ms['triton']:.1f}", f"{added:+.1f} ms", "10 ms")
    rates = alternating(runtimes, lambda models: files_per_s(models, files))
    ratio = rates["triton"] / rates["embedded"]
    table.add_row(
        "files/s, 2 in flight", f"{rates['embedded']:.2f}", f"{rates['triton']:.2f}", f"{ratio:.2f} x", "0.95 x"
    )
    Console().print(table)


def alternating(runtimes: Runtimes, measure: Callable[[Models], float]) -> dict[str, float]:
    """Medians over rounds in which both runtimes take their turn."""
    found: dict[str, list[float]] = {name: [] for name in runtimes}
    for turn in range(ROUNDS):
        for name in sorted(runtimes, reverse=bool(turn % 2)):
            found[name].append(measure(runtimes[name]))
    return {name: float(np.median(values)) for name, values in found.items()}


def per_request_ms(models: Models, model: str, inputs: Arrays, in_flight: int) -> float:
    """Median time from the question to its answer."""

    def ask(_: int) -> float:
        start = time.perf_counter()
        models.infer(model, inputs)
        return (time.perf_counter() - start) * 1000

    models.infer(model, inputs)
    with ThreadPoolExecutor(in_flight) as pool:
        return float(np.median(list(pool.map(ask, range(REQUESTS // 2 if model == "encoder" else REQUESTS)))))


def files_per_s(models: Models, files: Sequence[bytes]) -> float:
    """Rate of whole reviews, two at a time as the daemon does."""
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda data: review(data, models), files[-BLOCK:]))
    return BLOCK / (time.perf_counter() - start)


def review(data: bytes, models: Models) -> Review:
    return pipeline.review(
        data,
        source="b",
        path="b",
        sha256=hashlib.sha256(data).hexdigest(),
        recipe=Recipe(),
        models=models,
        reviewed_utc="2026-01-01T00:00:00Z",
    )


def verdicts(review: Review) -> list[list[tuple[object, ...]]]:
    """What a person would see: the gate, boxes, kinds and labels."""

    def of_page(page: PageReview) -> list[tuple[object, ...]]:
        return [(d.box_xyxy, d.verdict.kind, d.verdict.label) for d in page.defects]

    return [of_page(page) for page in review.pages]
