"""A family of models that no code of ours knows: plain ONNX graphs under a contract of their own.

The detector takes a square of another size and says more than the line reads; the encoder looks at the crop and at the
whole field, and asks for neither soft mask nor size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from semwatch.models import model_repository
from semwatch.models.model_repository import OPEN, Meta, Tensor

DETECTOR_PX, CROP_PX, FIELD_HW = 96, 40, (32, 48)
LABELS = ("blob", "defect-free")
WIDTH = (CROP_PX // 8) ** 2 + (FIELD_HW[0] // 8) * (FIELD_HW[1] // 8)
_TYPES = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}

Tensors = Mapping[str, Tensor]


def byte(*shape: int) -> Tensor:
    return Tensor(dtype="uint8", shape=shape)


def real(*shape: int) -> Tensor:
    return Tensor(dtype="float32", shape=shape)


def publish(
    repository: Path,
    model: Literal["detector", "encoder", "head"],
    inputs: Tensors,
    outputs: Tensors,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Any],
    **meta: Any,
) -> int:
    """Publish one graph as it stands."""

    def values(tensors: Tensors) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                name, _TYPES[t.dtype], ["batch", *(f"{name}_{k}" if n == OPEN else n for k, n in enumerate(t.shape))]
            )
            for name, t in tensors.items()
        ]

    kept = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), model, values(inputs), values(outputs), kept)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(made)
    path = repository / f"{model}.onnx"
    repository.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.SerializeToString())
    said = Meta(model=model, created_utc="2025-01-01T00:00:00Z", inputs=inputs, outputs=outputs, **meta)
    try:
        return model_repository.publish(repository, said, path)
    finally:
        path.unlink()


def publish_detector(
    repository: Path, inputs: Tensors | None = None, outputs: Tensors | None = None, **meta: Any
) -> int:
    """How far each 8 x 8 patch is from the image's mean; beside what is asked, the patches themselves.

    Where ``outputs`` names them, it also says of the field the mean of each row of patches, and of each place its mean.
    """
    side = DETECTOR_PX // 8
    inputs = {"image": byte(DETECTOR_PX, DETECTOR_PX)} if inputs is None else inputs
    name = next(iter(inputs))
    nodes = [
        helper.make_node("Cast", [name], ["gray"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["gray", "one"], ["planes"]),
        helper.make_node("AveragePool", ["planes"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Squeeze", ["pooled", "one"], ["patches"]),
        helper.make_node("ReduceMean", ["patches", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["patches", "mean"], ["away"]),
        helper.make_node("Abs", ["away"], ["score_map"]),
        helper.make_node("ReduceMax", ["score_map", "axes"], ["raw_score"], keepdims=0),
        helper.make_node("Sigmoid", ["raw_score"], ["domain_p"]),
        helper.make_node("ReduceMean", ["patches", "across"], ["field_features"], keepdims=0),
        helper.make_node("Unsqueeze", ["patches", "one"], ["patch_features"]),
    ]
    constants = {"one": np.array([1], np.int64), "axes": np.array([1, 2], np.int64), "across": np.array([2], np.int64)}
    default = {"score_map": real(side, side), "raw_score": real(), "patches": real(side, side)}
    given = default if outputs is None else outputs
    scores = tuple(i / 100 for i in range(100))
    return publish(repository, "detector", inputs, given, nodes, constants, normal_scores=scores, **meta)


def publish_open_detector(repository: Path) -> int:
    """The same of fields of any size, all of them of processes that it knows."""
    outputs = {"score_map": real(OPEN, OPEN), "raw_score": real(), "domain_p": real()}
    return publish_detector(repository, {"image": byte(OPEN, OPEN)}, outputs)


def publish_listening_encoder(repository: Path, width: int = DETECTOR_PX // 8, **meta: Any) -> int:
    """Patch means of the crop, and what the detector says of the field and of the defect's places."""
    nodes = [
        helper.make_node("Cast", ["crop"], ["gray"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["gray", "one"], ["plane"]),
        helper.make_node("AveragePool", ["plane"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("Concat", ["means", "field_features", "region_features"], ["features"], axis=1),
    ]
    inputs = {"crop": byte(CROP_PX, CROP_PX), "field_features": real(width), "region_features": real(1)}
    given = {"features": real((CROP_PX // 8) ** 2 + width + 1)}
    return publish(repository, "encoder", inputs, given, nodes, {"one": np.array([1], np.int64)}, **meta)


def publish_encoder(repository: Path, **more: Tensor) -> int:
    """Patch means of the crop and of the field; inputs of ``more`` are asked for and not looked at."""
    inputs = {"crop": byte(CROP_PX, CROP_PX), "field": byte(*FIELD_HW), **more}
    nodes = []
    for name in ("crop", "field"):
        nodes += [
            helper.make_node("Cast", [name], [f"{name}_gray"], to=TensorProto.FLOAT),
            helper.make_node("Div", [f"{name}_gray", "full"], [f"{name}_unit"]),
            helper.make_node("Unsqueeze", [f"{name}_unit", "one"], [f"{name}_planes"]),
            helper.make_node("AveragePool", [f"{name}_planes"], [f"{name}_p"], kernel_shape=[8, 8], strides=[8, 8]),
            helper.make_node("Flatten", [f"{name}_p"], [f"{name}_flat"]),
        ]
    nodes.append(helper.make_node("Concat", ["crop_flat", "field_flat"], ["features"], axis=1))
    constants = {"one": np.array([1], np.int64), "full": np.float32(255)}
    return publish(repository, "encoder", inputs, {"features": real(WIDTH)}, nodes, constants)


def publish_head(repository: Path, encoder_version: int = 1) -> int:
    """Random logits of two classes, both of which always fit."""
    encoder = model_repository.read_meta(repository, "encoder", encoder_version)
    nodes = [
        helper.make_node("MatMul", ["features", "weight"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["p_values"]),
    ]
    width = encoder.outputs["features"].shape[0]
    weight = np.random.default_rng(0).normal(size=(width, len(LABELS))).astype(np.float32)
    outputs = {"logits": real(len(LABELS)), "p_values": real(len(LABELS))}
    return publish(
        repository, "head", {"features": encoder.outputs["features"]}, outputs, nodes, {"weight": weight},
        labels=LABELS, encoder_sha256=encoder.weights_sha256,
    )  # fmt: skip


def publish_all(repository: Path) -> Path:
    publish_detector(repository)
    publish_encoder(repository)
    publish_head(repository)
    return repository
