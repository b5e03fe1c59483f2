"""The seam to the models: ``infer(model, inputs) -> Answer``. Everything else in the daemon sees arrays only.

``Embedded`` runs the model repository's ONNX files in this process with ONNX Runtime. It reads the same folders that
Triton serves, and an answer carries the version that gave it, so labels are never read from another version's folder.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from semwatch import model_repository
from semwatch.errors import ModelMismatch, ServiceUnavailable
from semwatch.model_repository import MODELS, Meta

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, and which version of it."""

    outputs: Mapping[str, NDArray[np.float32]]
    version: int
    meta: Meta


@dataclass(frozen=True, slots=True)
class _Loaded:
    session: ort.InferenceSession
    version: int
    meta: Meta


class Embedded:
    """The model repository in this process; safe to call from several threads.

    Args:
        repository: folder with detector, encoder and head.
        pins: version by model; a model without a pin serves its newest version.
        threads: processor threads of one network; None for all the machine has.
        models: which to load; training asks before there is a head.

    Raises:
        ModelMismatch: a model is absent, damaged, or does not fit its own description or the other models.
    """

    def __init__(
        self,
        repository: Path,
        *,
        pins: Mapping[str, int | None] | None = None,
        threads: int | None = None,
        models: Sequence[str] = MODELS,
    ) -> None:
        pins = pins or {}
        # One network at a time has all the cores: two at once only evict each other's caches.
        self._turn = threading.Lock()
        self._threads = threads or len(os.sched_getaffinity(0))
        self._loaded = {model: self._load(repository, model, pins.get(model)) for model in models}
        _check_fit({model: loaded.meta for model, loaded in self._loaded.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def infer(self, model: str, inputs: Arrays) -> Answer:
        """Ask a model about a batch.

        Args:
            model: "detector", "encoder" or "head".
            inputs: arrays by name, batch axis first, dtypes as in the model's ``Meta``.

        Raises:
            ModelMismatch: the arrays do not fit the model.
            ServiceUnavailable: the runtime could not answer now (out of memory).
        """
        loaded = self._loaded[model]
        _check_inputs(loaded.meta, inputs)
        names = list(loaded.meta.outputs)
        with self._turn:
            try:
                values = loaded.session.run(names, dict(inputs))
            except Exception as error:
                raise ServiceUnavailable(f"the embedded {model} could not answer: {error}") from error
        return Answer(dict(zip(names, values, strict=True)), loaded.version, loaded.meta)

    def meta(self, model: str) -> Meta:
        """What travels with the version that would answer now."""
        return self._loaded[model].meta

    def versions(self) -> dict[str, int]:
        """Version in service, by model."""
        return {model: loaded.version for model, loaded in self._loaded.items()}

    def close(self) -> None:
        """Let go of the networks' memory."""
        with self._turn:
            self._loaded = {}

    def _load(self, repository: Path, model: str, pin: int | None) -> _Loaded:
        version = model_repository.latest(repository, model) if pin is None else pin
        meta = model_repository.read_meta(repository, model, version)
        path = model_repository.weights_path(repository, model, version, meta)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelMismatch(f"{path} does not load: {error}") from error
        found = {tensor.name for tensor in session.get_inputs()}, {tensor.name for tensor in session.get_outputs()}
        if found != (set(meta.inputs), set(meta.outputs)):
            raise ModelMismatch(f"{path} takes and gives {found}, its meta.json says otherwise; publish it again")
        return _Loaded(session, version, meta)


def _check_inputs(meta: Meta, inputs: Arrays) -> None:
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in meta.inputs.items()}
    given = {name: (str(array.dtype), array.shape[1:]) for name, array in inputs.items()}
    if expected != given:
        raise ModelMismatch(f"the {meta.model} wants {expected} per item, got {given}")


def _check_fit(metas: Mapping[str, Meta]) -> None:
    encoder, head = metas.get("encoder"), metas.get("head")
    if head is None or encoder is None:
        return
    if head.encoder_sha256 != encoder.weights_sha256:
        raise ModelMismatch(
            "this head was trained on another encoder's features; pin the encoder it belongs to in the recipe, or "
            "fit a head on this encoder with `semwatch-train head`"
        )
    if not head.labels:
        raise ModelMismatch("the head's meta.json names no classes; publish it again")
