"""What a Triton server says of itself, for ``semwatch doctor``: its version, and which models it holds."""

from dataclasses import dataclass

from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from semwatch.errors import ServiceUnavailable
from semwatch.models.model_repository import MODELS
from semwatch.triton import wire as triton_wire


@dataclass(frozen=True, slots=True)
class ServerState:
    """One server at one moment."""

    version: str
    ready: dict[str, tuple[int, ...]]
    """Versions that are ready, by model."""


def ask_server(url: str, *, timeout_s: float = 5.0) -> ServerState:
    """Ask a server for its version and for what it holds of our models.

    Raises:
        ServiceUnavailable: no answer in time.
    """
    client = InferenceServerClient(url)
    try:
        version = str(client.get_server_metadata(client_timeout=timeout_s).version)
        return ServerState(version, {model: _ready(client, model, timeout_s) for model in MODELS})
    except InferenceServerException as error:
        raise ServiceUnavailable(f"no Triton answers at {url}: {error.message() or error}") from error
    finally:
        client.close()


def _ready(client: InferenceServerClient, model: str, timeout_s: float) -> tuple[int, ...]:
    # Not from the index: that is for those who may load models.
    try:
        found = client.get_model_metadata(model, client_timeout=timeout_s).versions
    except InferenceServerException as error:
        if triton_wire.is_absent(error):
            return ()
        raise
    return tuple(sorted(int(version) for version in found))
