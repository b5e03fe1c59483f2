"""A server of a test's own with tiny networks, heads to publish beside it, and questions to ask it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from tritonclient.grpc import InferenceServerClient

from semwatch.errors import ServiceUnavailable
from semwatch.models import head_bank, model_repository
from semwatch.models.inference import Answer
from semwatch.models.model_repository import Tensor
from semwatch.models.swap import Swap
from semwatch.triton import control
from semwatch.triton.client import Triton
from semwatch.triton.server import LocalTriton
from semwatch.triton.view import Settings

WIDTH = 74


@contextmanager
def running(installed: Path, repository: Path, **options: object) -> Iterator[LocalTriton]:
    """A server of a test's own, killed rather than asked to end."""
    folder = repository.parent / "triton"
    folder.mkdir(exist_ok=True)
    if not (folder / "venv").exists():
        (folder / "venv").symlink_to(installed / "venv")
    server = LocalTriton(folder, repository, settings=Settings(threads=1), **options)  # type: ignore[arg-type]
    try:
        server.start()
        yield server
    finally:
        server.stop(timeout_s=0.05)


def republish(repository: Path, **changes: object) -> int:
    """The head once more under the next number, with another description."""
    folder = repository / "head" / str(model_repository.versions(repository, "head")[-1])
    meta = model_repository.read_meta(repository, "head", int(folder.name)).model_copy(update=changes)
    beside = {name: folder / name for name in (model_repository.PROBE, head_bank.BANK, head_bank.GOLDEN)}
    return model_repository.publish(repository, meta, folder / "model.onnx", beside=beside)


def publish_noise(repository: Path) -> int:
    """A head whose hash is right and whose network is none."""
    noise = repository.parent / "noise"
    noise.write_bytes(b"noise" * 100)
    return model_repository.publish(repository, model_repository.read_meta(repository, "head", 1), noise)


def publish_four_classes(repository: Path) -> int:
    """A head with one class more than version 1."""
    weights = helper.make_tensor("W", TensorProto.FLOAT, [WIDTH, 4], np.eye(WIDTH, 4, dtype=np.float32).ravel())
    rows = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", WIDTH])
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in ("logits", "p_values")]
    nodes = [
        helper.make_node("MatMul", ["features", "W"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p_values"]),
    ]
    graph = helper.make_graph(nodes, "head", [rows], outputs, [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    file = repository.parent / "four.onnx"
    onnx.save(model, file)
    meta = model_repository.read_meta(repository, "head", 1)
    four = Tensor(dtype="float32", shape=(4,))
    changes = {"labels": ("a", "b", "c", "d"), "outputs": {"logits": four, "p_values": four}}
    return model_repository.publish(repository, meta.model_copy(update=changes), file)


def images(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(seed).integers(0, 256, (n, 112, 112), dtype=np.uint8)}


def rows(n: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    return {"features": np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)}


def crops(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "crop": rng.integers(0, 256, (n, 56, 56), dtype=np.uint8),
        "soft_mask": rng.random((n, 4, 4), dtype=np.float32),
        "size": rng.random((n, 2), dtype=np.float32),
    }


@contextmanager
def stranger(url: str) -> Iterator[InferenceServerClient]:
    """Somebody else at the server."""
    client = InferenceServerClient(url)
    try:
        yield client
    finally:
        client.close()


def unload(server: LocalTriton, model: str) -> None:
    """What somebody else may do who knows the server's secret."""
    with stranger(server.url) as other:
        other.unload_model(model, headers=control.grpc_headers(control.beside(server.view)))


def first_swap(models: Triton, timeout_s: float = 10.0) -> Swap | None:
    """Look for another head until there is one."""
    deadline = time.monotonic() + timeout_s
    while (swap := models.refresh()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return swap


def first_answer(ask: Callable[[], Answer], timeout_s: float = 10.0) -> Answer:
    """What the line does: try the same again while the service is away."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except ServiceUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
