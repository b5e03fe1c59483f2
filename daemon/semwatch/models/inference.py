"""The seam to the models: ``infer(model, inputs) -> Answer``. Everything else in the daemon sees arrays only.

``Embedded`` runs the model repository's ONNX files in this process with ONNX Runtime. It reads the same folders that
Triton serves, and an answer carries the version that gave it, so labels are never read from another version's folder.
Every version must answer its probe as the network did that it was made from, or it is not loaded.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from semwatch.errors import FileUnavailable, ModelMismatch, ServiceUnavailable
from semwatch.models import model_repository
from semwatch.models.checks import check_beside, check_inputs, check_probe
from semwatch.models.contract import check_contract
from semwatch.models.model_repository import MODELS, Arrays, Meta
from semwatch.models.swap import Fits, ModelSwap, Swap


class ModelId(NamedTuple):
    """One version of a model."""

    version: int
    """Local number."""
    content_hash: str
    """The same on every machine, see ``Meta.content_hash``."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, and which version of it."""

    outputs: Mapping[str, NDArray[np.float32]]
    id: ModelId
    meta: Meta

    @property
    def version(self) -> int:
        """Local number of the version."""
        return self.id.version


@dataclass(frozen=True, slots=True)
class _Loaded:
    session: ort.InferenceSession
    id: ModelId
    meta: Meta

    @property
    def version(self) -> int:
        return self.id.version


class Models(Protocol):
    """Whoever answers for the models: ``Embedded``, or a server behind a client."""

    def infer(self, model: str, inputs: Arrays, *, backlog: bool = False) -> Answer:
        """Ask a model about a batch, see ``Embedded.infer``."""

    def refresh(self, model: str = "head", *, fits: Fits | None = None) -> Swap | None:
        """Let the head or detector that should serve now serve, see ``Embedded.refresh``; None where it does."""

    def waits(self, model: str) -> bool:
        """Whether another version of a model should serve, so that ``refresh`` has something to do."""

    def meta(self, model: str) -> Meta:
        """What travels with the version that would answer now."""

    def versions(self) -> dict[str, int]:
        """Version in service, by model."""

    def hashes(self) -> dict[str, str]:
        """Content hash of the version in service, by model."""

    def refused(self, model: str = "head") -> dict[int, str]:
        """Versions of a model that could not be used, and why."""

    def close(self) -> None:
        """Let go of what is held."""


class Embedded:
    """The model repository in this process; safe to call from several threads.

    Args:
        repository: folder with detector, encoder and head.
        pins: version by model; a model without a pin serves what ``choice`` says.
        before: version by model that served last, see ``ModelSwap``.
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
        before: Mapping[str, int] = MappingProxyType({}),
        threads: int | None = None,
        models: Sequence[str] = MODELS,
    ) -> None:
        self._repository, self._swaps = repository, ModelSwap(repository, pins or {}, before=before)
        # One network at a time has all the cores: two at once only evict each other's caches.
        self._turn = threading.Lock()
        self._threads = threads or len(os.sched_getaffinity(0))
        self._loaded: dict[str, _Loaded] = {}
        for model in sorted(models, key=MODELS.index):  # an encoder is held against its detector, a head against it
            self._loaded[model] = self._swaps.first(model, partial(self._load, model), self._check_beside)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def infer(self, model: str, inputs: Arrays, *, backlog: bool = False) -> Answer:  # noqa: ARG002
        """Ask a model about a batch.

        Args:
            model: "detector", "encoder" or "head".
            inputs: arrays by name, batch axis first, dtypes as in the model's ``Meta``.
            backlog: the work may wait; for a server with a queue, without effect here.

        Raises:
            ModelMismatch: the arrays do not fit the model.
            FileUnavailable: the runtime could not answer this batch (out of memory).
        """
        return self._ask(self._loaded[model], inputs)

    def refresh(self, model: str = "head", *, fits: Fits | None = None) -> Swap | None:
        """Let the head or detector that should serve now serve, without an answer missed; None where it does already.

        The new version is loaded and proven on its probe beside the old one, then takes its place between two answers;
        see ``ModelSwap.next``. Call it for a detector when no image is in review: its gate goes with its scores.

        Args:
            model: "head" or "detector".
            fits: what else a version must keep, beside what serves with it.
        """

        def check(meta: Meta) -> None:
            self._check_beside(meta)
            if fits is not None:
                fits(meta)

        swap, loaded = self._swaps.next(model, self._loaded[model].version, partial(self._load, model), check)
        if loaded is not None:
            self._loaded = {**self._loaded, model: loaded}
        return swap

    def waits(self, model: str) -> bool:
        """Whether another version of a model should serve, so that ``refresh`` has something to do."""
        return self._swaps.waits(model, self._loaded[model].version)

    def meta(self, model: str) -> Meta:
        """What travels with the version that would answer now."""
        return self._loaded[model].meta

    def versions(self) -> dict[str, int]:
        """Version in service, by model."""
        return {model: loaded.version for model, loaded in self._loaded.items()}

    def hashes(self) -> dict[str, str]:
        """Content hash of the version in service, by model."""
        return {model: loaded.id.content_hash for model, loaded in self._loaded.items()}

    def refused(self, model: str = "head") -> dict[int, str]:
        """Versions of a model that could not be used, and why."""
        return self._swaps.refused(model)

    def close(self) -> None:
        """Let go of the networks' memory."""
        with self._turn:
            self._loaded = {}

    def _ask(self, loaded: _Loaded, inputs: Arrays) -> Answer:
        check_inputs(loaded.meta, inputs)
        names = list(loaded.meta.outputs)
        with self._turn:
            try:
                values = loaded.session.run(names, dict(inputs))
            except Exception as error:
                raise FileUnavailable(f"the embedded {loaded.meta.model} could not answer: {error}") from error
        return Answer(dict(zip(names, values, strict=True)), loaded.id, loaded.meta)

    def _check_beside(self, meta: Meta) -> None:
        check_beside(meta, {model: loaded.meta for model, loaded in self._loaded.items()})

    def _load(self, model: str, version: int) -> _Loaded:
        meta = model_repository.read_meta(self._repository, model, version)
        check_contract(meta)
        if model == "encoder":
            self._check_beside(meta)
        path = model_repository.weights_path(self._repository, model, version, meta)
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
        loaded = _Loaded(session, ModelId(version, meta.content_hash), meta)
        self._check_probe(loaded)
        return loaded

    def _check_probe(self, loaded: _Loaded) -> None:
        """A version must answer its probe as what it was made from did."""
        probe = model_repository.read_probe(self._repository, loaded.meta.model, loaded.version)
        if probe is None:
            return
        inputs, expected = probe
        name = f"{loaded.meta.model} {loaded.version}"
        try:
            answered = self._ask(loaded, inputs).outputs
        except ServiceUnavailable as error:
            raise ModelMismatch(f"{name} cannot answer its own probe: {error}") from error
        check_probe(name, expected, answered)
