"""What runs the networks best on this processor: threads, OpenVINO and quantisation in one table.

Speed is told in ms and in GFLOP/s against the matrix-product peak of the same cores in the same run; accuracy by the
verdicts on synthetic fields that no weight has seen, and by the largest difference of a score map. What keeps the
verdicts and is fastest deserves to be the embedded default. OpenVINO rows need ``pip install openvino``.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from rich.console import Console
from rich.table import Table

from semwatch.defects import Review
from semwatch.intake.decoding import decode
from semwatch.line import pipeline
from semwatch.line.scaling import resize
from semwatch.models import model_repository
from semwatch.models.inference import Answer, Embedded, ModelId
from semwatch.models.model_repository import Arrays
from semwatch.settings.recipe import Recipe
from semwatch_training.synthetic import lot_images
from semwatch_training.synthetic.lot import LotImage

N = 150
N_CALIBRATION = 24
ROUNDS = 7
PEAK_SIZE = 2048
NETWORKS = ("detector", "encoder")
Run = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Variant:
    """One way to run the networks."""

    name: str
    run: dict[str, Run]


class Line(Embedded):
    """The embedded runtime whose detector and encoder another runtime answers."""

    def __init__(self, repository: Path, run: dict[str, Run]) -> None:
        super().__init__(repository)
        self._run = run

    def infer(self, model: str, inputs: Arrays, *, backlog: bool = False) -> Answer:
        if model not in self._run:
            return super().infer(model, inputs, backlog=backlog)
        answered = ModelId(self.versions()[model], self.hashes()[model])
        return Answer(self._run[model](inputs), answered, self.meta(model))


@pytest.mark.timeout(3600)
def test_cpu_runtimes(repository: Path, tmp_path: Path) -> None:
    images = list(lot_images(n=N + N_CALIBRATION, seed=29, size_hw=(512, 512)))
    paths = {model: weights(repository, model) for model in NETWORKS}
    feeds = calibration_feeds(repository, images[:N_CALIBRATION])
    gflop = {model: count_gflop(paths[model], feeds[model][0]) for model in NETWORKS}
    peaks = {threads: peak_gflops(threads) for threads in (1, 2)}
    variants = list(all_variants(paths, feeds, tmp_path))
    times = measure(variants, feeds)
    judged = {v.name: reviews(Line(repository, v.run), images[N_CALIBRATION:]) for v in variants[1:]}
    reference = judged[variants[1].name]
    table = Table(
        "runtime", "detector ms", "encoder ms", "GFLOP/s of both", "of the peak", "map off by", "verdicts changed",
        "named right", title=f"CPU: {gflop['detector']:.1f} + {gflop['encoder']:.1f} GFLOP; peak {peaks[1]:.0f} / "
        f"{peaks[2]:.0f} GFLOP/s (1 / 2 threads); {N} images",
    )  # fmt: skip
    for variant in variants:
        ms = times[variant.name]
        rate = sum(gflop.values()) / sum(ms.values()) * 1000
        peak = peaks[1] if "1 thread" in variant.name else peaks[2]
        found = judged.get(variant.name)
        said = accuracy(found, reference, images[N_CALIBRATION:]) if found else ("", "", "")
        table.add_row(
            variant.name, *(f"{ms[m]:.1f}" for m in NETWORKS), f"{rate:.0f}", f"{100 * rate / peak:.0f} %", *said
        )
    Console(width=150).print(table)


def all_variants(paths: dict[str, Path], feeds: dict[str, list[Arrays]], folder: Path) -> Iterator[Variant]:
    """The first is for speed alone, the second is the embedded default that the others are compared with."""
    yield Variant("ONNX Runtime fp32, 1 thread", {m: onnx_runtime(p, 1) for m, p in paths.items()})
    yield Variant("ONNX Runtime fp32, 2 threads", {m: onnx_runtime(p, 2) for m, p in paths.items()})
    yield Variant("the same, threads spin", {m: onnx_runtime(p, 2, spin=True) for m, p in paths.items()})
    dynamic = {m: folder / f"{m}-dynamic.onnx" for m in paths}
    for model, path in paths.items():
        quantize_dynamic(path, dynamic[model], weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    yield Variant("int8 matrix products (dynamic)", {m: onnx_runtime(p, 2) for m, p in dynamic.items()})
    static = {m: folder / f"{m}-static.onnx" for m in paths}
    for model, path in paths.items():
        quantize_static(
            path, static[model], _Reader(feeds[model]), quant_format=QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=["Conv", "MatMul"],
        )  # fmt: skip
    yield Variant(f"int8 with {N_CALIBRATION} calibration images", {m: onnx_runtime(p, 2) for m, p in static.items()})
    if find_spec("openvino") is None:
        Console().print("OpenVINO is not installed: its rows are left out")
        return
    for precision in ("f32", "bf16"):
        runs = {m: openvino(p, precision) for m, p in paths.items()}
        yield Variant(f"OpenVINO {precision}, 2 threads", runs)
        if precision == "bf16":
            yield Variant(
                "OpenVINO, bf16 in the encoder alone", {**runs, "detector": openvino(paths["detector"], "f32")}
            )


def onnx_runtime(path: Path, threads: int, *, spin: bool = False) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def openvino(path: Path, precision: str) -> Run:
    import openvino as ov

    hints = {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(str(path), "CPU", hints)
    return lambda inputs: {key.any_name: np.array(value) for key, value in compiled(dict(inputs)).items()}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[Arrays]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, NDArray[np.generic]] | None:
        feed = next(self._left, None)
        return None if feed is None else dict(feed)


def measure(variants: Sequence[Variant], feeds: dict[str, list[Arrays]]) -> dict[str, dict[str, float]]:
    """Median milliseconds at batch 1; the variants take turns, so that a busy machine is fair."""
    found: dict[str, dict[str, list[float]]] = {v.name: {m: [] for m in NETWORKS} for v in variants}
    for turn in range(ROUNDS + 1):
        for variant in variants:
            for model in NETWORKS:
                start = time.perf_counter()
                variant.run[model](feeds[model][turn % len(feeds[model])])
                if turn:  # the first warms up
                    found[variant.name][model].append((time.perf_counter() - start) * 1000)
    return {name: {m: float(np.median(t)) for m, t in times.items()} for name, times in found.items()}


def accuracy(found: list[Review], reference: list[Review], images: Sequence[LotImage]) -> tuple[str, str, str]:
    """Largest map difference (of the map's largest value), images with other verdicts, share of defects named right."""
    worst, changed, right, total = 0.0, 0, 0, 0
    for ours, theirs, image in zip(found, reference, images, strict=True):
        page, other = ours.pages[0], theirs.pages[0]
        scale = float(np.abs(other.score_map.values).max()) or 1.0
        worst = max(worst, float(np.abs(page.score_map.values - other.score_map.values).max()) / scale)
        said = [sorted(str(d.verdict.label or d.verdict.kind) for d in p.defects) for p in (page, other)]
        changed += said[0] != said[1]
        for (x0, y0, x1, y1), truth in zip(image.boxes_xyxy, image.micrograph.labels, strict=True):
            total += 1
            right += any(
                d.verdict.label == truth
                and min(x1, d.box_xyxy[2]) > max(x0, d.box_xyxy[0])
                and min(y1, d.box_xyxy[3]) > max(y0, d.box_xyxy[1])
                for d in page.defects
            )
    return f"{worst:.1e}", f"{changed} of {len(found)}", f"{right} of {total}"


def reviews(models: Line, images: Sequence[LotImage]) -> list[Review]:
    return [
        pipeline.review(
            image.content,
            source="b",
            path=image.name,
            sha256=hashlib.sha256(image.content).hexdigest(),
            recipe=Recipe(),
            models=models,
            reviewed_utc="2026-01-01T00:00:00Z",
        )
        for image in images
    ]


def weights(repository: Path, model: str) -> Path:
    version = model_repository.versions(repository, model)[-1]
    return model_repository.weights_path(
        repository, model, version, model_repository.read_meta(repository, model, version)
    )


def calibration_feeds(repository: Path, images: Sequence[LotImage]) -> dict[str, list[Arrays]]:
    """What the networks see of these images, one crop at most of each."""
    recipe = Recipe()
    open_gate = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"threshold": 0.0})})
    found: dict[str, list[Arrays]] = {"detector": [], "encoder": []}
    with Embedded(repository) as models:
        for image in images:
            page = decode(image.content, name=image.name)[0]
            found["detector"].append({"image": resize(page.field, (448, 448))[None]})
            for candidate in pipeline.search(page, open_gate, models).candidates[:1]:
                found["encoder"].append(
                    {"crop": candidate.crop[None], "soft_mask": candidate.soft_mask[None], "size": candidate.size[None]}
                )
    return found


def count_gflop(path: Path, feed: Arrays) -> float:
    """GFLOP of convolutions and matrix products for one image, from the shapes of a real run; one multiply-add is 2."""
    graph = onnx.load(path)
    nodes = [node for node in graph.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    known = {t.name: tuple(t.dims) for t in graph.graph.initializer} | {k: v.shape for k, v in feed.items()}
    told = {output.name for output in graph.graph.output} | known.keys()
    for name in dict.fromkeys(name for node in nodes for name in (*node.input[:2], *node.output)):
        if name not in told:
            graph.graph.output.append(helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    known |= {name: np.shape(value) for name, value in zip(names, session.run(names, dict(feed)), strict=True)}
    total = 0
    for node in nodes:
        per_output = np.prod(known[node.input[1]][1:]) if node.op_type == "Conv" else known[node.input[0]][-1]
        total += 2 * int(np.prod(known[node.output[0]])) * int(per_output)
    return total / 1e9


def peak_gflops(threads: int) -> float:
    """The best of what numpy and ONNX Runtime reach in one large fp32 matrix product."""
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    a = rng.random((PEAK_SIZE, PEAK_SIZE), dtype=np.float32)
    shape = [PEAK_SIZE, PEAK_SIZE]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "peak", tensors[:2], tensors[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    best_s = 1e9
    with threadpool_limits(threads):
        for product in (lambda: a @ a, lambda: session.run(None, {"a": a, "b": a})):
            time.sleep(0.5)  # the other's threads spin for a while after their last product
            for _ in range(2 * ROUNDS):
                start = time.perf_counter()
                product()
                best_s = min(best_s, time.perf_counter() - start)
    return 2 * PEAK_SIZE**3 / best_s / 1e9
