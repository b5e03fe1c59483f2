"""One Triton server as a client sees it: asked for one version at a time, and proven before it is believed.

A version is proven when its signature and content hash are the repository's and it answers its probe. What was proven
before server or connection were lost is doubted: another server, or other models, may stand behind the address.

Where the server reads a view of the model repository (``view``), versions that it lacks are placed there and loaded; a
server without one must hold them already. Loading needs the server's secret where it has one (``control``).
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from semwatch.errors import ConfigError, ModelMismatch, ServiceUnavailable
from semwatch.models import model_repository
from semwatch.models.checks import check_probe
from semwatch.models.inference import ModelId
from semwatch.models.model_repository import Arrays, Meta, Tensor
from semwatch.triton import control
from semwatch.triton import view as triton_view
from semwatch.triton import wire as triton_wire
from semwatch.triton.config import LIVE, max_batch, sha256_key
from semwatch.triton.view import View
from semwatch.triton.wire import words

_POLL_S = 0.1
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
class Version:
    """One version of one model, and what travels with it."""

    id: ModelId
    meta: Meta

    @property
    def number(self) -> int:
        """Local number."""
        return self.id.version

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.meta.model} {self.number}"


class Server:
    """Holds the connection to one server, and what was proven of it; safe to call from several threads.

    Args:
        repository: the model repository on this machine: metas and probes are read from here.
        url: the server's gRPC address, host:port.
        view: the folder that the server reads; None: the one beside the repository, where there is one.
        secret_file: holds what the server wants to hear before it loads a model; None: the view's, where it has one.
    """

    def __init__(self, repository: Path, url: str, *, view: Path | None, secret_file: Path | None) -> None:
        self._repository, self._url = repository, url
        folder = view or triton_view.beside(repository)
        self._view = View(folder, repository) if (folder / triton_view.SETTINGS).exists() else None
        self._secret_file = secret_file or control.beside(folder)
        self._client = InferenceServerClient(url, channel_args=_CHANNEL)
        self._control = threading.RLock()  # one thread at a time loads and proves
        self._broken: set[str] = set()
        self._losses = 0  # how often server or connection was lost; what was proven before the last is proven again
        self._proven_after: dict[tuple[str, int], int] = {}
        self._client._channel.subscribe(self._watch)  # the client itself does not say when it connects anew

    def close(self) -> None:
        """Close the connection; the server keeps its models."""
        self._client.close()

    def await_live(self, timeout_s: float) -> None:
        """Wait until the server answers.

        Raises:
            ServiceUnavailable: it does not within ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            last_error: Exception | None = None
            try:
                if self._client.is_server_live(client_timeout=_left_s(deadline)):
                    return
            except InferenceServerException as error:
                last_error = error
            if time.monotonic() + _POLL_S >= deadline:
                raise ServiceUnavailable(
                    f"no Triton answers at {self._url} within {timeout_s:g} s ({words(last_error)}); start it with "
                    f"`semwatch triton up`, or name its address in models.triton.url"
                ) from last_error
            time.sleep(_POLL_S)

    def ask(self, version: Version, inputs: Arrays, deadline: float, priority: int) -> Arrays | None:
        """Answer one batch that Triton takes whole; None where the server was lost meanwhile, so nobody knows whose.

        Raises:
            InferenceServerException: as the server or gRPC said it.
            ModelMismatch, ConfigError: what the server serves may not answer.
            ServiceUnavailable: others are proving until ``deadline``.
        """
        if self._is_doubted(version):
            with self._alone(deadline):
                if self._is_doubted(version):  # else another thread was faster
                    self.prove(version, deadline)
        answer = self._send(version, inputs, deadline, priority)
        return None if self._is_doubted(version) else answer

    def lost(self, model: str | None = None) -> None:
        """Doubt everything that was proven; with a model, let that one be loaded anew."""
        if model is not None:
            self._broken.add(model)
        self._losses += 1

    def prove(self, version: Version, deadline: float) -> None:
        """Let the server hold a version, and prove it; what it holds already serves on meanwhile.

        Raises:
            InferenceServerException: as the server or gRPC said it.
            ModelMismatch: the version cannot be loaded, or is not what the repository says.
            ConfigError: the view cannot be written, or the server loads for others alone.
            ServiceUnavailable: the server lacks it and is not ours to tell, or others are proving until ``deadline``.
        """
        with self._alone(deadline):
            before = self._losses
            self._ensure_loaded(version, deadline)
            self._check_signature(version, deadline)
            probe = model_repository.read_probe(self._repository, version.meta.model, version.number)
            if probe is not None:
                inputs, expected = probe
                parts = triton_wire.parts(inputs, max_batch(version.meta))
                answers = [self._send(version, part, deadline, LIVE) for part in parts]
                check_probe(version.name, expected, triton_wire.joined(version.meta, answers))
            self._proven_after[version.meta.model, version.number] = before

    def take_back(self, version: Version) -> None:
        """Let a version that may not serve leave the view, and the server's memory with its next load."""
        if self._view is not None and len(self._view.placed(version.meta.model)) > 1:
            self._view.remove(version.meta.model, version.number)

    # --- what is believed ------------------------------------------------------------------------------------------

    def _is_doubted(self, version: Version) -> bool:
        return self._proven_after.get((version.meta.model, version.number)) != self._losses

    def _watch(self, state: grpc.ChannelConnectivity) -> None:
        """Called by gRPC: a server that was exchanged while nothing was asked is noticed too."""
        if state is not grpc.ChannelConnectivity.READY:
            self._losses += 1

    @contextmanager
    def _alone(self, deadline: float) -> Iterator[None]:
        if not self._control.acquire(timeout=_left_s(deadline)):
            raise ServiceUnavailable(f"Triton at {self._url} keeps another request waiting that proves its models")
        try:
            yield
        finally:
            self._control.release()

    # --- one request -----------------------------------------------------------------------------------------------

    def _send(self, version: Version, inputs: Arrays, deadline: float, priority: int) -> dict[str, NDArray[np.float32]]:
        left_s = _left_s(deadline)
        result = self._client.infer(
            version.meta.model,
            [triton_wire.to_input(name, array) for name, array in inputs.items()],
            model_version=str(version.number),
            outputs=[InferRequestedOutput(name) for name in version.meta.outputs],
            priority=priority,
            timeout=int(left_s * 1e6),  # in the server's queue
            client_timeout=left_s,
        )
        return triton_wire.read(result, version.meta, version.number, len(next(iter(inputs.values()))))

    def _is_ready(self, version: Version, deadline: float) -> bool:
        try:
            return bool(
                self._client.is_model_ready(version.meta.model, str(version.number), client_timeout=_left_s(deadline))
            )
        except InferenceServerException as error:
            if triton_wire.is_absent(error):
                return False
            raise

    def _ensure_loaded(self, version: Version, deadline: float) -> None:
        """Have the version ready on the server: placed in its view, and loaded beside what serves."""
        model = version.meta.model
        if model not in self._broken and self._is_ready(version, deadline):
            return
        if self._view is None:
            raise ServiceUnavailable(
                f"Triton at {self._url} does not hold {version.name}; load it there, or start the server with "
                f"`semwatch triton up --repository {self._repository}`"
            )
        self._view.place(model, version.number)
        self._load(version, deadline)
        self._broken.discard(model)
        if not self._is_ready(version, deadline):
            raise ModelMismatch(
                f"Triton at {self._url} loaded {model}, but not version {version.number}: it reads another folder than "
                f"{self._view.folder}; start it with `semwatch triton up --repository {self._repository}`"
            )

    def _load(self, version: Version, deadline: float) -> None:
        # Read anew each time: a server that was started again may have another secret.
        headers = control.grpc_headers(self._secret_file)
        try:
            self._client.load_model(version.meta.model, headers=headers, client_timeout=_left_s(deadline))
        except InferenceServerException as error:
            if control.is_refusal(error.message()):
                raise ConfigError(
                    f"Triton at {self._url} loads models only for those who know its secret, and "
                    f"{control.why_unknown(self._secret_file)}; name the file that holds it in "
                    f"models.triton.control_secret_file"
                ) from error
            if triton_wire.code(error) in triton_wire.RETRIED:
                raise
            raise ModelMismatch(f"Triton cannot load {version.name}: {words(error)}") from error

    def _check_signature(self, version: Version, deadline: float) -> None:
        """What the server says it serves must be what the repository says."""
        meta, number, where = version.meta, str(version.number), f"{version.name} on Triton at {self._url}"
        described = self._client.get_model_metadata(meta.model, number, client_timeout=_left_s(deadline))
        for kind, expected, found in (
            ("takes", meta.inputs, described.inputs),
            ("gives", meta.outputs, described.outputs),
        ):
            theirs = {tensor.name: (tensor.datatype, tuple(tensor.shape[1:])) for tensor in found}
            if not _is_same(expected, theirs):
                ours = {name: (triton_wire.DTYPES[tensor.dtype], tensor.shape) for name, tensor in expected.items()}
                raise ModelMismatch(
                    f"{where} {kind} {theirs}, in {self._repository} it {kind} {ours}; let the server serve this model "
                    f"repository"
                )
        config = self._client.get_model_config(meta.model, number, client_timeout=_left_s(deadline)).config
        key = sha256_key(version.number)
        if key in config.parameters and config.parameters[key].string_value != meta.weights_sha256:
            raise ModelMismatch(
                f"{where} has other weights than in {self._repository} (sha256 differs); let the server serve this "
                f"model repository"
            )


def _is_same(expected: Mapping[str, Tensor], theirs: dict[str, tuple[str, tuple[int, ...]]]) -> bool:
    return expected.keys() == theirs.keys() and all(
        triton_wire.is_same(tensor, *theirs[name]) for name, tensor in expected.items()
    )


def _left_s(deadline: float) -> float:
    return max(deadline - time.monotonic(), 1e-3)
