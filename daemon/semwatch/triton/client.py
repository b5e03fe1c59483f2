"""The models on a Triton server: the same questions and answers as ``inference.Embedded``, over gRPC.

Every request names the version it wants, one that this client has proven: its signature and content hash are the
repository's, and it answers its probe. So a new head is loaded and proven beside the old one before any answer of the
line comes from it, and labels are never those of another version. After the server was away everything is proven again
before the next answer, because another server, or other models, may stand behind the address.

Where the server reads a view of the model repository (``view``) this client places and loads the versions it
needs; a server without one must hold them already.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from semwatch import model_repository, serving
from semwatch.errors import ModelMismatch, ServiceUnavailable
from semwatch.inference import Answer, Swap
from semwatch.model_checks import check_fit, check_inputs, check_probe
from semwatch.model_repository import MODELS, Arrays, Meta
from semwatch.triton import view as triton_view
from semwatch.triton import wire as triton_wire
from semwatch.triton.config import BACKLOG, LIVE, MAX_BATCH, sha256_key
from semwatch.triton.view import View
from semwatch.triton.wire import words

log = logging.getLogger(__name__)

RETRIED = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")
"""gRPC's words for a server that is away, ending, or slow; everything else would only fail again."""
BACKOFF_S = 0.2
"""Pause before the second try; doubled before each further one."""
LOAD_TIMEOUT_S = 60.0
SWAP_TIMEOUT_S = 15.0
"""A swap is tried in the daemon's loop: it must not silence the watchdog."""
SWAP_PAUSE_S = 10.0
"""Until the next try of a swap that found the server away."""
_POLL_S = 0.1
_DEAD = "Stub process"
"""What a server says that lost the process of a model; it starts none before the model is loaded again."""
_BUSY = ("maximum queue size", "timeout expired")
"""What an UNAVAILABLE says that comes from a living server."""
# gRPC's own reconnect waits grow to two minutes: a server that is back would be asked far too late.
_CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # how long one try to connect may take
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A proxy of the plant's network has no business between the line and its models.
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True, slots=True)
class _Proven:
    version: int
    meta: Meta


class Triton:
    """The model repository on a Triton server; safe to call from several threads.

    Args:
        repository: the model repository on this machine: metas, labels and probes are read from here.
        url: the server's gRPC address, host:port.
        timeout_s: deadline of one answer, all its tries together.
        attempts: tries of one request while the server is away.
        pins: version by model; a model without a pin serves what ``serving.choice`` says.
        view: the folder that the server reads; None: the one beside the repository, where there is one.
        models: which to prove; a tool may need the head alone.

    Raises:
        ModelMismatch: a model is absent, damaged, does not load, or is not what the repository says.
        ServiceUnavailable: the server does not answer within ``timeout_s``.
    """

    def __init__(
        self,
        repository: Path,
        *,
        url: str = "127.0.0.1:8001",
        timeout_s: float = 30.0,
        attempts: int = 3,
        pins: Mapping[str, int | None] | None = None,
        view: Path | None = None,
        models: Sequence[str] = MODELS,
    ) -> None:
        self._repository, self._pins = repository, pins or {}
        self._url, self._timeout_s, self._attempts = url, timeout_s, attempts
        folder = view or triton_view.beside(repository)
        self._view = View(folder, repository) if (folder / triton_view.SETTINGS).exists() else None
        self._client = InferenceServerClient(url, channel_args=_CHANNEL)
        self._control = threading.RLock()  # one thread at a time loads and proves
        self._refused: dict[tuple[str, int], str] = {}
        self._proven: dict[str, _Proven] = {}
        self._outages = 0  # how often server or connection was lost; what was proven before the last is proven again
        self._proven_after: dict[tuple[str, int], int] = {}
        self._broken: set[str] = set()
        self._next_swap = 0.0
        self._client._channel.subscribe(self._watch)  # the client itself does not say when it connects anew
        try:
            self._await_server(time.monotonic() + timeout_s)
            for model in models:
                self._proven[model] = self._load_head() if model == "head" else self._load(model, self._wanted(model))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def infer(self, model: str, inputs: Arrays, *, backlog: bool = False) -> Answer:
        """Ask a model about a batch of any size.

        Args:
            model: "detector", "encoder" or "head".
            inputs: arrays by name, batch axis first, dtypes as in the model's ``Meta``.
            backlog: let requests of live work go first.

        Raises:
            ModelMismatch: the arrays do not fit the model, or the server serves another model than the repository's.
            ServiceUnavailable: no answer within the deadline and the tries.
        """
        proven = self._proven[model]
        check_inputs(proven.meta, inputs)
        deadline = time.monotonic() + self._timeout_s
        priority = BACKLOG if backlog else LIVE
        parts = [self._ask(proven, part, deadline, priority) for part in triton_wire.parts(inputs, MAX_BATCH[model])]
        return Answer(triton_wire.joined(proven.meta, parts), proven.version, proven.meta)

    def refresh(self) -> Swap | None:
        """Let the head that should serve now serve, without an answer missed; None where it does already.

        As ``Embedded.refresh``: loaded beside the old one and proven, else refused once. A server that is away leaves
        everything as it is; the next refresh after a pause tries again.
        """
        now = self._proven["head"]
        try:
            version = self._wanted("head")
        except ModelMismatch as error:
            return self._refuse(-1, str(error))
        if version == now.version or ("head", version) in self._refused or time.monotonic() < self._next_swap:
            return None
        try:
            proven = self._fitting_head(version, SWAP_TIMEOUT_S)
        except ModelMismatch as error:
            return self._refuse(version, str(error))
        except ServiceUnavailable as error:
            self._next_swap = time.monotonic() + SWAP_PAUSE_S
            log.warning("head %d waits until Triton can load it: %s", version, error)
            return None
        self._proven = {**self._proven, "head": proven}
        return Swap("head", version)

    def meta(self, model: str) -> Meta:
        """What travels with the version that would answer now."""
        return self._proven[model].meta

    def versions(self) -> dict[str, int]:
        """Version in service, by model."""
        return {model: proven.version for model, proven in self._proven.items()}

    def refused(self) -> dict[int, str]:
        """Versions of the head that could not be used, and why."""
        return {version: why for (_, version), why in self._refused.items()}

    def close(self) -> None:
        """Close the connection; the server keeps its models."""
        self._client.close()

    # --- one answer ------------------------------------------------------------------------------------------------

    def _ask(self, proven: _Proven, inputs: Arrays, deadline: float, priority: int) -> Arrays:
        """Answer one batch that Triton takes whole, again and later while the server is away."""
        said: Exception | None = None
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(max(0.0, min(BACKOFF_S * 2 ** (attempt - 1), deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                break
            try:
                if self._is_doubted(proven):
                    self._prove_again(proven, deadline)
                return self._send(proven, inputs, deadline, priority)
            except InferenceServerException as error:
                said = error
                self._judge(proven, error)
        raise ServiceUnavailable(f"Triton at {self._url} gave no {proven.meta.model} answer: {words(said)}") from said

    def _judge(self, proven: _Proven, error: InferenceServerException) -> None:
        """Return where another try may help; else raise what the caller shall know."""
        model, code = proven.meta.model, triton_wire.code(error)
        if code in RETRIED and any(word in str(error) for word in _BUSY):
            return
        if code in RETRIED or triton_wire.is_absent(error):
            self._outages += 1
            return
        if _DEAD in str(error):
            self._broken.add(model)
            self._outages += 1
            return
        if code == "INVALID_ARGUMENT":
            self._outages += 1
            raise ModelMismatch(
                f"Triton at {self._url} does not take what {model} {proven.version} takes: {words(error)}; let it "
                f"serve this model repository"
            ) from error
        raise ServiceUnavailable(f"Triton's {model} {proven.version} could not answer: {words(error)}") from error

    def _send(self, proven: _Proven, inputs: Arrays, deadline: float, priority: int) -> dict[str, NDArray[np.float32]]:
        left_s = max(deadline - time.monotonic(), 1e-3)
        result = self._client.infer(
            proven.meta.model,
            [triton_wire.to_input(name, array) for name, array in inputs.items()],
            model_version=str(proven.version),
            outputs=[InferRequestedOutput(name) for name in proven.meta.outputs],
            priority=priority,
            timeout=int(left_s * 1e6),  # in the server's queue
            client_timeout=left_s,
        )
        return triton_wire.read(result, proven.meta, proven.version, len(next(iter(inputs.values()))))

    # --- which versions serve --------------------------------------------------------------------------------------

    def _wanted(self, model: str) -> int:
        pin = self._pins.get(model)
        return serving.choice(self._repository, model) if pin is None else pin

    def _refuse(self, version: int, why: str) -> Swap | None:
        is_news = self._refused.get(("head", version)) != why
        self._refused["head", version] = why
        return Swap("head", version, why) if is_news else None

    def _load_head(self) -> _Proven:
        """The head that should serve; where it cannot and nobody pinned it, the newest before it that can."""
        wanted = self._wanted("head")
        try:
            return self._fitting_head(wanted)
        except ModelMismatch as error:
            if self._pins.get("head") is not None or serving.pin_of(self._repository, "head") is not None:
                raise
            self._refuse(wanted, str(error))
            for version in reversed(model_repository.versions(self._repository, "head")):
                if version < wanted and serving.why_withdrawn(self._repository, "head", version) is None:
                    with suppress(ModelMismatch):
                        return self._fitting_head(version)
            raise

    def _fitting_head(self, version: int, timeout_s: float = LOAD_TIMEOUT_S) -> _Proven:
        if "encoder" in self._proven:
            meta = model_repository.read_meta(self._repository, "head", version)
            check_fit(self._proven["encoder"].meta, meta)
        return self._load("head", version, timeout_s)

    def _load(self, model: str, version: int, timeout_s: float = LOAD_TIMEOUT_S) -> _Proven:
        """Let the server hold a version, and prove it.

        Raises:
            ModelMismatch: it may not serve; what served before goes on.
            ServiceUnavailable: the server is away.
        """
        meta = model_repository.read_meta(self._repository, model, version)
        model_repository.weights_path(self._repository, model, version, meta)
        proven = _Proven(version, meta)
        try:
            self._prove(proven, time.monotonic() + timeout_s)
        except InferenceServerException as error:
            raise ServiceUnavailable(f"Triton at {self._url} cannot load {model} now: {words(error)}") from error
        except ModelMismatch:
            self._take_back(model, version)
            raise
        return proven

    def _prove_again(self, proven: _Proven, deadline: float) -> None:
        """The server was away: nothing is taken for granted."""
        with self._control:
            if self._is_doubted(proven):  # else another thread was faster
                self._prove(proven, deadline)

    def _is_doubted(self, proven: _Proven) -> bool:
        return self._proven_after.get((proven.meta.model, proven.version)) != self._outages

    def _watch(self, state: grpc.ChannelConnectivity) -> None:
        """Called by gRPC: a server that was exchanged while nothing was asked is noticed too."""
        if state is not grpc.ChannelConnectivity.READY:
            self._outages += 1

    def _prove(self, proven: _Proven, deadline: float) -> None:
        with self._control:
            before = self._outages
            self._ensure_loaded(proven, deadline)
            self._check_signature(proven, deadline)
            probe = model_repository.read_probe(self._repository, proven.meta.model, proven.version)
            if probe is not None:
                inputs, expected = probe
                parts = triton_wire.parts(inputs, MAX_BATCH[proven.meta.model])
                answers = [self._send(proven, part, deadline, LIVE) for part in parts]
                check_probe(f"{proven.meta.model} {proven.version}", expected, triton_wire.joined(proven.meta, answers))
            self._proven_after[proven.meta.model, proven.version] = before

    def _ensure_loaded(self, proven: _Proven, deadline: float) -> None:
        """Have the version ready on the server: placed in its view, and loaded beside what serves."""
        model, version = proven.meta.model, proven.version
        if model not in self._broken and self._is_ready(model, version, deadline):
            return
        if self._view is None:
            raise ServiceUnavailable(
                f"Triton at {self._url} does not hold {model} {version}; load it there, or start the server with "
                f"`semwatch triton up --repository {self._repository}`"
            )
        self._view.place(model, version)
        try:
            self._client.load_model(model, client_timeout=max(deadline - time.monotonic(), 1e-3))
        except InferenceServerException as error:
            if triton_wire.code(error) in RETRIED:
                raise
            raise ModelMismatch(f"Triton cannot load {model} {version}: {words(error)}") from error
        self._broken.discard(model)
        if not self._is_ready(model, version, deadline):
            raise ModelMismatch(
                f"Triton at {self._url} loaded {model}, but not version {version}: it reads another folder than "
                f"{self._view.folder}; start it with `semwatch triton up --repository {self._repository}`"
            )

    def _is_ready(self, model: str, version: int, deadline: float) -> bool:
        left_s = max(deadline - time.monotonic(), 1e-3)
        try:
            return bool(self._client.is_model_ready(model, str(version), client_timeout=left_s))
        except InferenceServerException as error:
            if triton_wire.is_absent(error):
                return False
            raise

    def _take_back(self, model: str, version: int) -> None:
        """Let a version that may not serve leave the view, and the server's memory with its next load."""
        if self._view is not None and len(self._view.placed(model)) > 1:
            self._view.remove(model, version)

    def _check_signature(self, proven: _Proven, deadline: float) -> None:
        """What the server says it serves must be what the repository says."""
        meta, version = proven.meta, proven.version
        left_s = max(deadline - time.monotonic(), 1e-3)
        told = self._client.get_model_metadata(meta.model, str(version), client_timeout=left_s)
        for kind, expected, found in (("takes", meta.inputs, told.inputs), ("gives", meta.outputs, told.outputs)):
            theirs = {tensor.name: (tensor.datatype, tuple(tensor.shape[1:])) for tensor in found}
            if expected.keys() != theirs.keys() or not all(
                triton_wire.is_same(t, *theirs[name]) for name, t in expected.items()
            ):
                ours = {name: (triton_wire.DTYPES[tensor.dtype], tensor.shape) for name, tensor in expected.items()}
                raise ModelMismatch(
                    f"{meta.model} {version} on Triton at {self._url} {kind} {theirs}, in {self._repository} it {kind} "
                    f"{ours}; let the server serve this model repository"
                )
        config = self._client.get_model_config(meta.model, str(version), client_timeout=left_s).config
        key = sha256_key(version)
        if key in config.parameters and config.parameters[key].string_value != meta.weights_sha256:
            raise ModelMismatch(
                f"{meta.model} {version} on Triton at {self._url} has other weights than in {self._repository} (sha256 "
                f"differs); let the server serve this model repository"
            )

    def _await_server(self, deadline: float) -> None:
        while True:
            left_s = deadline - time.monotonic()
            said: Exception | None = None
            try:
                if self._client.is_server_live(client_timeout=max(left_s, 1e-3)):
                    return
            except InferenceServerException as error:
                said = error
            if left_s <= _POLL_S:
                raise ServiceUnavailable(
                    f"no Triton answers at {self._url} within {self._timeout_s:g} s ({words(said)}); start it with "
                    f"`semwatch triton up`, or name its address in models.triton.url"
                ) from said
            time.sleep(_POLL_S)
