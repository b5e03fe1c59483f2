"""Torch to the model repository: ONNX with normalisation inside, parity checked before anything is published."""

import ast
import logging
import os
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from semwatch.errors import PublishError
from semwatch.models import head_bank, model_repository
from semwatch.models.contract import FIELD_SIDES_PX, check_contract
from semwatch.models.head_bank import Bank
from semwatch.models.model_repository import OPEN, Arrays, Meta, Tensor
from semwatch.system.clock import utc_now
from semwatch_training.discovery.head import Head
from semwatch_training.families.exported import Exported, Provenance
from semwatch_training.publishing import head_families

OPSET = 20
MAX_RELATIVE_DIFFERENCE = 1e-3
OPEN_PX = 256
"""Open sides of a field in probes and in what an export is traced with."""
PRECISION, IN_FP32 = "semwatch.precision", "fp32"
"""What nodes carry that no conversion may compute in a lower precision: the own operations of every module whose
``in_fp32`` is true, not those of the modules within."""
N_PROBE = 16
"""Crops whose answers travel with a head, to be asked again at every load."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest difference between ONNX Runtime and torch, relative to the largest torch value, by output."""

    relative: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The worst output's difference."""
        return max(self.relative.values())


def publish(exported: Exported, repository: Path, *, provenance: Provenance = MappingProxyType({})) -> int:
    """Export a family's network and publish it under its contract; returns the version.

    Args:
        exported: what the family says of it.
        repository: where to.
        provenance: what is added to the family's own.

    Raises:
        ModelMismatch: the line cannot keep its contract.
        PublishError: the exported model differs from its original, or the disk refused.
    """
    meta = exported.meta.model_copy(update={"provenance": {**exported.meta.provenance, **provenance}})
    check_contract(meta)
    return _publish(exported.graph.eval(), meta, repository, files=exported.files)


def publish_head(
    head: Head,
    repository: Path,
    *,
    encoder_version: int,
    provenance: Provenance,
    codes: Mapping[str, int] = MappingProxyType({}),
    bank: Bank | None = None,
    golden: Bank | None = None,
) -> int:
    """Export and publish a head for the features of one encoder version; returns the version.

    Args:
        head: to publish.
        repository: where to.
        encoder_version: whose features it reads.
        provenance: how it was made.
        codes: fab codes of classes that people named.
        bank: what it was fitted on; without it the head cannot learn more classes.
        golden: what it and its successors are proven on.
    """
    encoder = model_repository.read_meta(repository, "encoder", encoder_version)
    K = len(head.labels)
    meta = Meta(
        model="head",
        created_utc=utc_now(),
        inputs={"features": encoder.outputs["features"]},
        outputs={"logits": Tensor(dtype="float32", shape=(K,)), "p_values": Tensor(dtype="float32", shape=(K,))},
        labels=head.labels,
        codes={label: code for label, code in codes.items() if label in head.labels},
        encoder_sha256=encoder.weights_sha256,
        provenance={**provenance, **head_families.provenance_of(head)},
    )
    shown = golden if golden is not None and len(golden) else bank
    probe = None if shown is None else {"features": shown.features[:: max(1, len(shown) // N_PROBE)][:N_PROBE]}
    kept = {head_bank.BANK: bank, head_bank.GOLDEN: golden}
    return _publish(head.eval(), meta, repository, probe=probe, banks={k: v for k, v in kept.items() if v is not None})


def to_onnx(graph: nn.Module, meta: Meta, path: Path) -> None:
    """Write an ONNX file with a dynamic batch axis and the signature's own names."""
    example = tuple(torch.from_numpy(array) for array in random_inputs(meta, batch=2, seed=0).values())
    shapes = tuple(_open_axes(tensor) for tensor in meta.inputs.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own insides; parity is what we go by
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(meta.inputs),
            output_names=list(meta.outputs),
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise PublishError(f"torch gave no ONNX program for the {meta.model}")
    exact = {name for name, module in graph.named_modules() if getattr(module, "in_fp32", False)}
    path.write_bytes(bare(program.model_proto, exact).SerializeToString(deterministic=True))


def _open_axes(tensor: Tensor) -> dict[int, Any]:
    """The axes of an input that may have any size: the batch, and open sides of a field."""
    sides = FIELD_SIDES_PX
    axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=1024)}
    for axis, size in enumerate(tensor.shape, start=1):
        if size == OPEN:
            least, most = sides.smallest // sides.multiple, sides.largest // sides.multiple
            axes[axis] = sides.multiple * torch.export.Dim(f"side_{axis}", min=least, max=most)
    return axes


def bare(model: onnx.ModelProto, exact: Collection[str] = ()) -> onnx.ModelProto:
    """Take out what the exporter notes of its own making, folders of this machine among it.

    So the same weights exported anywhere by the same release are the same file, with the same content hash.

    Args:
        model: as exported.
        exact: names of modules whose own operations are marked as ``IN_FP32``.
    """
    graph = model.graph
    tensors = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    nodes = (*graph.node, *(node for function in model.functions for node in function.node))
    marked = [node for node in nodes if _module_of(node) in exact]
    for part in (model, graph, *model.functions, *tensors, *nodes):
        del part.metadata_props[:]
        part.doc_string = ""
    for node in marked:
        node.metadata_props.add(key=PRECISION, value=IN_FP32)
    return model


def _module_of(node: onnx.NodeProto) -> str | None:
    """Name of the module that a node is an operation of, as the exporter notes it: the last scope but the node's."""
    found = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
    return None if found is None else str(ast.literal_eval(found)[-2])


def parity(graph: nn.Module, meta: Meta, path: Path, batches: Sequence[Arrays]) -> Parity:
    """Compare an ONNX file with the module it was made from."""
    options = ort.SessionOptions()
    # Named, or ONNX Runtime would bind its threads to cores, which a hardened unit forbids.
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = dict.fromkeys(meta.outputs, 0.0)
    for inputs in batches:
        values = session.run(list(meta.outputs), inputs)
        for (name, expected), value in zip(_answers(graph, meta, inputs).items(), values, strict=True):
            difference = np.abs(expected - value).max() / max(np.abs(expected).max(), 1e-12)
            worst[name] = max(worst[name], float(difference))
    return Parity(worst)


def _answers(graph: nn.Module, meta: Meta, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
    """What the torch original says, by output."""
    with torch.no_grad():
        answer = graph(*(torch.from_numpy(inputs[name]) for name in meta.inputs))
    outputs = answer if isinstance(answer, tuple) else (answer,)
    return {name: output.numpy() for name, output in zip(meta.outputs, outputs, strict=True)}


def random_inputs(meta: Meta, *, batch: int, seed: int, open_px: int = OPEN_PX) -> dict[str, NDArray[Any]]:
    """Inputs of the right names, shapes and dtypes: uint8 noise, float32 in [0, 1]; open sides are of ``open_px``."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.integers(0, 256, (batch, *tensor.sized(open_px)), dtype=np.uint8)
            if tensor.dtype == "uint8"
            else rng.random((batch, *tensor.sized(open_px)), dtype=np.float32)
        )
        for name, tensor in meta.inputs.items()
    }


def _publish(
    graph: nn.Module,
    meta: Meta,
    repository: Path,
    *,
    probe: Arrays | None = None,
    banks: Mapping[str, Bank] = MappingProxyType({}),
    files: Mapping[str, Path] = MappingProxyType({}),
) -> int:
    """Publish with a probe: a few inputs, by default random ones, and what torch answers to them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / model_repository.WEIGHTS
        to_onnx(graph, meta, path)
        # Other sizes than the one traced: an axis frozen by mistake shows here.
        others = [random_inputs(meta, batch=batch, seed=batch, open_px=OPEN_PX + 64 * batch) for batch in (1, 3)]
        found = parity(graph, meta, path, others)
        if not found.worst < MAX_RELATIVE_DIFFERENCE:
            raise PublishError(f"the exported {meta.model} differs from its torch original: {dict(found.relative)}")
        beside = {name: Path(folder) / name for name in (model_repository.PROBE, *banks)}
        inputs = probe if probe is not None else random_inputs(meta, batch=2, seed=0)
        model_repository.write_probe(beside[model_repository.PROBE], inputs, _answers(graph, meta, inputs))
        for name, bank in banks.items():
            head_bank.write(bank, beside[name])
        return model_repository.publish(repository, meta, path, beside={**beside, **files})
