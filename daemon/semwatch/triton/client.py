"""The models on a Triton server: the same questions and answers as ``inference.Embedded``, over gRPC.

Every request names the version it wants, one that this client has proven (``proving``): its signature and content hash
are the repository's, and it answers its probe. So a new head is loaded and proven beside the old one before any answer
of the line comes from it, and labels are never those of another version. After the server was away everything is
proven again before the next answer, because another server, or other models, may stand behind the address.

At the start, what is wrong with the server is said and ends the program, as with the embedded runtime; one that is away
for ``timeout_s`` ends it too, with the exit code after which systemd starts the daemon again. From then on the line
waits: others mend or exchange the server, and it serves again once it is what the repository says.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from tritonclient.utils import InferenceServerException

from semwatch.errors import ConfigError, ModelMismatch, SemwatchError, ServiceUnavailable
from semwatch.models import model_repository
from semwatch.models.checks import check_beside, check_inputs
from semwatch.models.contract import check_contract
from semwatch.models.inference import Answer, ModelId
from semwatch.models.model_repository import MODELS, Arrays, Meta
from semwatch.models.swap import Fits, ModelSwap, Swap
from semwatch.settings import site
from semwatch.triton import wire as triton_wire
from semwatch.triton.config import BACKLOG, LIVE, max_batch
from semwatch.triton.proving import Server, Version
from semwatch.triton.wire import words

log = logging.getLogger(__name__)

SETTINGS = site.Triton()
"""What holds where nothing is said."""

BACKOFF_S = 0.2
"""Pause before the second try; doubled before each further one."""
LOAD_TIMEOUT_S = 60.0
SWAP_TIMEOUT_S = 15.0
"""A swap is tried in the daemon's loop: it must not silence the watchdog."""
BACKLOG_TIMEOUT_S = 5.0
"""So is re-review, which comes again by itself."""
SWAP_PAUSE_S = 10.0
"""Until the next try of a swap that found the server away."""


class Triton:
    """The model repository on a Triton server; safe to call from several threads.

    Args:
        repository: the model repository on this machine: metas, labels and probes are read from here.
        url: the server's gRPC address, host:port.
        timeout_s: deadline of one answer, all its tries together.
        attempts: tries of one request while the server is away.
        pins: version by model; a model without a pin serves what ``choice`` says.
        before: version by model that served last, see ``ModelSwap``.
        view: the folder that the server reads; None: the one beside the repository, where there is one.
        control_secret_file: holds the secret of a server that loads models for those alone who know it; None: the
            one in the view, where a server of ours (``LocalTriton``) puts its own.
        models: which to prove; a tool may need the head alone.

    Raises:
        ModelMismatch: a model is absent, damaged, does not load, or is not what the repository says.
        ConfigError: the server does not load models for us, or its view cannot be written.
        ServiceUnavailable: the server does not answer within ``timeout_s``.
    """

    def __init__(
        self,
        repository: Path,
        *,
        url: str = SETTINGS.url,
        timeout_s: float = SETTINGS.timeout_s,
        attempts: int = SETTINGS.attempts,
        pins: Mapping[str, int | None] | None = None,
        before: Mapping[str, int] = MappingProxyType({}),
        view: Path | None = None,
        control_secret_file: Path | None = None,
        models: Sequence[str] = MODELS,
    ) -> None:
        self._repository, self._swaps = repository, ModelSwap(repository, pins or {}, before=before)
        self._url, self._timeout_s, self._attempts = url, timeout_s, attempts
        self._serving: dict[str, Version] = {}
        self._next_swap = 0.0
        self._server = Server(repository, url, view=view, secret_file=control_secret_file)
        try:
            self._server.await_live(timeout_s)
            for model in sorted(models, key=MODELS.index):  # a head is held against its encoder
                self._serving[model] = self._swaps.first(model, partial(self._load, model), self._check_beside)
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
            backlog: let requests of live work go first, and give up sooner (``BACKLOG_TIMEOUT_S``).

        Raises:
            ModelMismatch: the arrays do not fit the model.
            ServiceUnavailable: no answer within the deadline and the tries, or the server serves another model than
                the repository's.
        """
        version = self._serving[model]
        check_inputs(version.meta, inputs)
        deadline = time.monotonic() + (min(self._timeout_s, BACKLOG_TIMEOUT_S) if backlog else self._timeout_s)
        priority = BACKLOG if backlog else LIVE
        parts = triton_wire.parts(inputs, max_batch(version.meta))
        answers = [self._ask(version, part, deadline, priority) for part in parts]
        return Answer(triton_wire.joined(version.meta, answers), version.id, version.meta)

    def refresh(self, model: str = "head", *, fits: Fits | None = None) -> Swap | None:
        """Let the head or detector that should serve now serve, without an answer missed; None where it does already.

        As ``Embedded.refresh``: loaded beside the old one and proven, else refused once. A server that is away leaves
        everything as it is; the next refresh after a pause tries again.
        """

        def check(meta: Meta) -> None:
            self._check_beside(meta)
            if fits is not None:
                fits(meta)

        now = self._serving[model]
        swap, loaded = self._swaps.next(model, now.number, lambda number: self._load_beside(number, now), check)
        if loaded is not None:
            self._serving = {**self._serving, model: loaded}
        return swap

    def waits(self, model: str) -> bool:
        """Whether another version of a model should serve, and it is time to try."""
        return time.monotonic() >= self._next_swap and self._swaps.waits(model, self._serving[model].number)

    def meta(self, model: str) -> Meta:
        """What travels with the version that would answer now."""
        return self._serving[model].meta

    def versions(self) -> dict[str, int]:
        """Version in service, by model."""
        return {model: version.number for model, version in self._serving.items()}

    def hashes(self) -> dict[str, str]:
        """Content hash of the version in service, by model."""
        return {model: version.id.content_hash for model, version in self._serving.items()}

    def refused(self, model: str = "head") -> dict[int, str]:
        """Versions of a model that could not be used, and why."""
        return self._swaps.refused(model)

    def close(self) -> None:
        """Close the connection; the server keeps its models."""
        self._server.close()

    # --- one answer ------------------------------------------------------------------------------------------------

    def _ask(self, version: Version, inputs: Arrays, deadline: float, priority: int) -> Arrays:
        """Answer one batch that Triton takes whole, again and later while the server is away."""
        last_error: Exception | None = None
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(max(0.0, min(BACKOFF_S * 2 ** (attempt - 1), deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                break
            try:
                answer = self._server.ask(version, inputs, deadline, priority)
            except InferenceServerException as error:
                last_error = error
                self._judge(version, error)
            except (ModelMismatch, ConfigError) as error:
                self._server.lost()
                raise ServiceUnavailable(str(error)) from error
            else:
                if answer is not None:
                    return answer
        raise ServiceUnavailable(
            f"Triton at {self._url} gave no {version.meta.model} answer: {words(last_error)}"
        ) from last_error

    def _judge(self, version: Version, error: InferenceServerException) -> None:
        """Return where another try may help; else raise what the caller shall know."""
        if triton_wire.is_busy(error):
            return
        if triton_wire.is_dead(error):
            self._server.lost(version.meta.model)
            return
        self._server.lost()
        if triton_wire.code(error) in triton_wire.RETRIED or triton_wire.is_absent(error):
            return
        if triton_wire.code(error) == "INVALID_ARGUMENT":
            raise ServiceUnavailable(
                f"Triton at {self._url} does not take what {version.name} takes: {words(error)}; let it serve this "
                f"model repository"
            ) from error
        raise ServiceUnavailable(f"Triton's {version.name} could not answer: {words(error)}") from error

    # --- which versions serve --------------------------------------------------------------------------------------

    def _still_serves(self, version: Version) -> bool:
        try:
            self._server.prove(version, time.monotonic() + BACKLOG_TIMEOUT_S)
        except (InferenceServerException, SemwatchError):
            return False
        return True

    def _check_beside(self, meta: Meta) -> None:
        check_beside(meta, {model: version.meta for model, version in self._serving.items()})

    def _load_beside(self, number: int, now: Version) -> Version | None:
        """Load a version beside the one that serves; None where the server is away, and for a pause after that.

        Raises:
            ModelMismatch: it may not serve.
        """
        if time.monotonic() < self._next_swap:
            return None
        try:
            return self._load(now.meta.model, number, SWAP_TIMEOUT_S)
        except (ModelMismatch, ServiceUnavailable, ConfigError) as error:
            # Where the one in service is not itself either, another server answers: that is not the new one's fault.
            if isinstance(error, ModelMismatch) and self._still_serves(now):
                raise
            self._next_swap = time.monotonic() + SWAP_PAUSE_S
            log.warning("%s %d waits until Triton can load it: %s", now.meta.model, number, error)
            return None

    def _load(self, model: str, number: int, timeout_s: float = LOAD_TIMEOUT_S) -> Version:
        """Let the server hold a version, and prove it.

        Raises:
            ModelMismatch: it may not serve; what served before goes on.
            ServiceUnavailable: the server is away.
        """
        meta = model_repository.read_meta(self._repository, model, number)
        check_contract(meta)
        if model == "encoder":
            self._check_beside(meta)
        model_repository.weights_path(self._repository, model, number, meta)
        version = Version(ModelId(number, meta.content_hash), meta)
        try:
            self._server.prove(version, time.monotonic() + timeout_s)
        except InferenceServerException as error:
            raise ServiceUnavailable(f"Triton at {self._url} cannot load {model} now: {words(error)}") from error
        except ModelMismatch:
            self._server.take_back(version)
            raise
        return version
