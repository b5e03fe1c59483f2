"""How far a converted network, or its engine on a GPU, is from the fp32 network it was made from.

Each difference is the largest one, relative to the output's largest value. A converted network is judged twice: as ONNX
Runtime runs it on the processor, and with every low-precision tensor rounded on its own. The runtime alone would
flatter: without kernels of that type it computes whole stretches in fp32. A GPU lies between the two.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from semwatch.defects import Micrograph
from semwatch.errors import PublishError
from semwatch.intake import decoding
from semwatch.line import detection
from semwatch.line import inputs as line_inputs
from semwatch.line.pipeline import search
from semwatch.models.inference import Embedded
from semwatch.models.model_repository import Arrays, Meta
from semwatch.settings.recipe import Recipe
from semwatch.triton.plans import Difference
from semwatch_training.data.datasets import folder_images
from semwatch_training.synthetic import lot_images

Batched = Sequence[Arrays]
"""Batches of one model's inputs; fields at their own scale differ in size from batch to batch."""

BATCH = 4
"""Samples asked at once."""


def judge(source: ModelProto, converted: Mapping[str, ModelProto], inputs: Mapping[str, Batched]) -> list[Difference]:
    """Compare networks of one signature with the one they were made from.

    Args:
        source: the fp32 network.
        converted: by the way of judging them, see ``Difference``.
        inputs: "noise" or "images" -> batches by input name; where all are empty, the kind is left out.
    """
    original = _session(source)
    sessions = {way: _session(model) for way, model in converted.items()}
    found = []
    for kind, batches in inputs.items():
        n = _count(batches)
        if n == 0:
            continue
        expected = _run(original, batches)
        for way, session in sessions.items():
            relative = differences(expected, _run(session, batches))
            found.append(Difference.model_validate({"inputs": kind, "way": way, "samples": n, "relative": relative}))
    return found


def differences(expected: Arrays, given: Arrays) -> dict[str, float]:
    """Largest difference by output, relative to the largest expected value; infinite where one is not a number."""
    worst = {}
    for name, values in expected.items():
        off = float(np.abs(given[name] - values).max()) / max(float(np.abs(values).max()), 1e-12)
        worst[name] = off if np.isfinite(off) else float("inf")
    return worst


def looked_at(
    repository: Path, versions: Mapping[str, int], pages: list[Micrograph]
) -> dict[str, Batched]:  # fmt: skip
    """What the models are fed with when they review these pages: fields, crops of candidates, features.

    The first candidate of each page is cropped. Fields of one size come in one batch.
    """
    recipe = Recipe()
    recipe = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"threshold": 0.0})})
    with Embedded(repository, models=("detector", "encoder"), pins=dict(versions)) as models:
        fields = [detection.asked(models.meta("detector"), page.field)[0] for page in pages]
        candidates = [c for page in pages for c in search(page, recipe, models).candidates[:1]]
        crops = line_inputs.for_encoder(models.meta("encoder"), candidates)
        features = [models.infer("encoder", part).outputs["features"] for part in _batches([crops])]
    return {
        "detector": _alike(fields),
        "encoder": [crops],
        "head": [line_inputs.for_head(np.concatenate(features))],
    }


def read_pages(folder: Path | None, n: int) -> list[Micrograph]:
    """First pages of up to n images spread over a folder; of a synthetic lot without one."""
    if folder is not None:
        paths = folder_images(folder)
        return [decoding.read(path)[0] for path in paths[:: max(1, len(paths) // n)][:n]]
    with tempfile.TemporaryDirectory() as written:
        pages = []
        for image in lot_images(n=n, seed=23, size_hw=(512, 512)):
            path = Path(written) / image.name
            path.write_bytes(image.content)
            pages.append(decoding.read(path)[0])
    return pages


def run_plan(toolkit: ModuleType, plan: bytes, meta: Meta, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
    """Answers of an engine to a batch, on the GPU of this machine.

    Raises:
        PublishError: the GPU or this TensorRT cannot run the plan.
    """
    trt: Any = toolkit
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    if engine is None:
        raise PublishError("TensorRT on this machine's GPU cannot read the plan that it was made for")
    context, stream = engine.create_execution_context(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    if engine.num_optimization_profiles > 1:  # the last one takes the largest batches
        context.set_optimization_profile_async(engine.num_optimization_profiles - 1, stream.cuda_stream)
    tensors = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}
    for name, tensor in tensors.items():
        if not context.set_input_shape(name, tuple(tensor.shape)):
            raise PublishError(f"the plan takes no {name} of {tuple(tensor.shape)}")
    outputs = {name: torch.empty(tuple(context.get_tensor_shape(name)), device="cuda") for name in meta.outputs}
    for name, tensor in {**tensors, **outputs}.items():
        context.set_tensor_address(name, tensor.data_ptr())
    torch.cuda.synchronize()
    if not context.execute_async_v3(stream.cuda_stream):
        raise PublishError("TensorRT could not run the plan on this machine's GPU")
    stream.synchronize()
    return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}


def gpu_difference(toolkit: ModuleType, plan: bytes, meta: Meta, source: ModelProto, inputs: Batched) -> Difference:
    """Compare a plan on this machine's GPU with its fp32 network on the processor, over images."""
    expected = _run(_session(source), inputs)
    given = _joined([run_plan(toolkit, plan, meta, part) for part in _batches(inputs)])
    return Difference(inputs="images", way="gpu", samples=_count(inputs), relative=differences(expected, given))


def _session(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # As written: the optimizer takes the pair of casts away that a rounding is made of.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: ort.InferenceSession, inputs: Batched) -> dict[str, NDArray[np.float32]]:
    names = [tensor.name for tensor in session.get_outputs()]
    return _joined([dict(zip(names, session.run(names, part), strict=True)) for part in _batches(inputs)])


def _count(inputs: Batched) -> int:
    return sum(len(next(iter(arrays.values()))) for arrays in inputs)


def _batches(inputs: Batched) -> list[dict[str, NDArray[Any]]]:
    return [
        {name: array[i : i + BATCH] for name, array in arrays.items()}
        for arrays in inputs
        for i in range(0, len(next(iter(arrays.values()))), BATCH)
    ]


def _alike(fields: Batched) -> Batched:
    """Fields of the same size together in one batch, sizes in the order in which they are first met."""
    sizes: dict[tuple[tuple[int, ...], ...], list[Arrays]] = {}
    for field in fields:
        sizes.setdefault(tuple(array.shape for array in field.values()), []).append(field)
    return [{name: np.concatenate([f[name] for f in same]) for name in same[0]} for same in sizes.values()]


def _joined(parts: Batched) -> dict[str, NDArray[np.float32]]:
    """All numbers of each output in one row: maps of different sizes have no other shape in common."""
    return {name: np.concatenate([part[name].ravel() for part in parts]) for name in parts[0]}
