"""A real Triton that dies, hangs, forgets a model, or is another one: every way to lose it."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from semwatch.errors import ModelMismatch, ServiceUnavailable
from semwatch.models import model_repository
from semwatch.models.model_repository import Tensor
from semwatch.models.swap import Swap
from semwatch.system.files import file_sha256
from semwatch.triton import control
from semwatch.triton import view as triton_view
from semwatch.triton.client import Triton
from semwatch.triton.server import LocalTriton
from triton_server import (
    first_answer,
    first_swap,
    images,
    publish_four_classes,
    republish,
    rows,
    running,
    stranger,
    unload,
)

# --- the server is lost ----------------------------------------------------------------------------------------------


def test_no_server_is_said_within_the_deadline(repository: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="semwatch triton up"):
        Triton(repository, url="127.0.0.1:9", timeout_s=1)
    assert time.monotonic() - start < 2.5


def test_killed_server_is_said_at_once_and_its_return_is_noticed(models: Triton, server: LocalTriton) -> None:
    before = models.infer("detector", images(1)).outputs["raw_score"]
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="UNAVAILABLE"):
        models.infer("detector", images(1))
    assert time.monotonic() - start < 5
    server.start()
    start = time.monotonic()
    after = first_answer(lambda: models.infer("detector", images(1))).outputs["raw_score"]
    assert time.monotonic() - start < 3
    np.testing.assert_array_equal(after, before)


def test_stopped_server_costs_the_deadline_and_answers_when_it_goes_on(lent: tuple[LocalTriton, Path]) -> None:
    server, repository = lent
    with Triton(repository, url=server.url, timeout_s=2) as models:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(ServiceUnavailable, match="DEADLINE_EXCEEDED"):
            models.infer("head", rows())
        assert 1.9 < time.monotonic() - start < 3
        os.kill(server.pid, signal.SIGCONT)
        assert first_answer(lambda: models.infer("head", rows())).version == 1


def test_swap_waits_while_the_server_is_away(
    models: Triton, server: LocalTriton, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semwatch.triton.client.SWAP_PAUSE_S", 0.3)
    server.stop(timeout_s=0.05)
    version = republish(repository)
    assert models.refresh() is None
    assert models.refused() == {}
    server.start()
    deadline = time.monotonic() + 10
    while (swap := models.refresh()) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert swap == Swap("head", version)


def test_killed_process_of_one_model_comes_back(models: Triton, server: LocalTriton) -> None:
    assert server.pid is not None
    stubs = [child for child in psutil.Process(server.pid).children() if "head_0_0" in " ".join(child.cmdline())]
    assert len(stubs) == 1
    stubs[0].kill()
    assert first_answer(lambda: models.infer("head", rows())).version == 1


def test_model_whose_process_was_killed_while_it_started_is_found_stuck(
    server: LocalTriton, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton never ends such a load; what then helps is another server."""
    monkeypatch.setattr("semwatch.triton.server.STUCK_S", 1.0)
    assert server.stuck_model() is None
    assert server.pid is not None
    old = {child.pid for child in psutil.Process(server.pid).children()}
    unload(server, "head")
    headers = control.grpc_headers(control.beside(server.view))
    with stranger(server.url) as other:
        loading = threading.Thread(target=_load_in_vain, args=(other, headers))
        loading.start()
        killed = False
        deadline = time.monotonic() + 10
        while not killed and time.monotonic() < deadline:
            for child in psutil.Process(server.pid).children():
                with suppress(psutil.Error):
                    if child.pid not in old and "head_0_0" in " ".join(child.cmdline()):
                        child.kill()
                        killed = True
        assert killed
        found = [server.stuck_model()]
        while found[-1] is None and time.monotonic() < deadline:
            time.sleep(0.1)
            found.append(server.stuck_model())
        loading.join()
    assert found[0] is None
    assert found[-1] == "head"
    server.stop(timeout_s=0.05)
    server.start()
    assert server.stuck_model() is None
    with Triton(repository, url=server.url) as models:
        assert models.infer("head", rows()).version == 1


def _load_in_vain(client: InferenceServerClient, headers: Mapping[str, str]) -> None:
    with pytest.raises(InferenceServerException):
        client.load_model("head", headers=headers, client_timeout=3)


def test_unloaded_model_is_loaded_again(lent: tuple[LocalTriton, Path]) -> None:
    server, repository = lent
    with Triton(repository, url=server.url, timeout_s=5) as models:
        unload(server, "head")
        answer = models.infer("head", rows())
    assert answer.version == 1


def test_server_that_others_manage_is_asked_for_and_never_told(lent: tuple[LocalTriton, Path], tmp_path: Path) -> None:
    server, repository = lent
    copy = shutil.copytree(repository, tmp_path / "copy")  # no view beside it
    with Triton(copy, url=server.url) as models:
        unload(server, "head")
        with pytest.raises(ServiceUnavailable, match="does not hold head 1"):
            models.infer("head", rows())
    with Triton(repository, url=server.url) as manager:
        assert manager.infer("head", rows()).version == 1


# --- another server --------------------------------------------------------------------------------------------------


def test_server_with_another_signature_is_refused_in_plain_words(shared: tuple[str, Path], repository: Path) -> None:
    url, _ = shared
    path = repository / "detector/1/meta.json"
    meta = model_repository.read_meta(repository, "detector", 1)
    small = meta.model_copy(update={"inputs": {"image": Tensor(dtype="uint8", shape=(56, 56))}})
    path.write_text(small.model_dump_json())
    with pytest.raises(ModelMismatch, match=r"detector 1 on Triton at .* takes .*112, 112.* it takes .*56, 56"):
        Triton(repository, url=url)


def test_server_with_other_weights_is_told_by_their_hash(shared: tuple[str, Path], repository: Path) -> None:
    url, _ = shared
    weights = repository / "head/1/model.onnx"
    network = onnx.load(weights)
    network.doc_string = "other bytes, same answers"
    onnx.save(network, weights)
    meta = model_repository.read_meta(repository, "head", 1)
    changed = meta.model_copy(update={"weights_sha256": file_sha256(weights)})
    (repository / "head/1/meta.json").write_text(changed.model_dump_json())
    with pytest.raises(ModelMismatch, match="other weights"):
        Triton(repository, url=url)


def test_other_models_behind_the_same_address_are_noticed_before_the_next_answer(
    installed: Path, repository: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(repository, tmp_path / "other" / "models")
    publish_four_classes(other)
    shutil.rmtree(other / "head/1")
    (other / "head/2").rename(other / "head/1")
    with running(installed, repository) as server, Triton(repository, url=server.url) as models:
        port = int(server.url.rpartition(":")[2])
        server.stop(timeout_s=0.05)
        shutil.rmtree(triton_view.beside(repository))
        with running(installed, other, grpc_port=port):
            deadline = time.monotonic() + 10
            said = ""
            while "head 1 on Triton at" not in said and time.monotonic() < deadline:
                with pytest.raises(ServiceUnavailable) as refused:
                    models.infer("head", rows())
                said = str(refused.value)
        assert "let the server serve this model repository" in said
        with running(installed, repository, grpc_port=port):  # mended: the line goes on by itself
            assert first_answer(lambda: models.infer("head", rows())).version == 1


def test_head_that_another_server_cannot_load_is_not_refused_for_it(
    installed: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semwatch.triton.client.SWAP_PAUSE_S", 0.3)
    secret = tmp_path / "secret"
    control.write_new(secret)
    other = shutil.copytree(repository, tmp_path / "other" / "models")
    publish_four_classes(other)
    shutil.rmtree(other / "head/1")
    (other / "head/2").rename(other / "head/1")
    options = {"control_secret_file": secret}
    with (
        running(installed, repository, **options) as server,
        Triton(repository, url=server.url, timeout_s=5, control_secret_file=secret) as models,
    ):
        port = int(server.url.rpartition(":")[2])
        server.stop(timeout_s=0.05)
        good = republish(repository)
        with running(installed, other, grpc_port=port, **options):
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                assert models.refresh() is None
                time.sleep(0.1)
            assert models.refused() == {}
        with running(installed, repository, grpc_port=port, **options):
            assert first_swap(models) == Swap("head", good)
            assert models.infer("head", rows()).version == good


def test_numpy_2_under_the_backend_is_told_at_the_start(installed: Path, repository: Path) -> None:
    """Our own environment holds numpy 2: the backend refuses to load there."""
    with running(installed, repository, environment=Path(sys.prefix)) as server:
        assert "numpy<2" in server.log.read_text()
        with pytest.raises(ModelMismatch, match="numpy<2"):
            Triton(repository, url=server.url)


def test_empty_answers_of_a_foreign_backend_are_told_at_the_start(
    installed: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap itself, sprung: a backend without our guard, under numpy 2."""
    text = triton_view.BACKEND.read_text()
    unguarded = tmp_path / "model.py"
    unguarded.write_text(text.replace('if int(np.__version__.split(".")[0]) >= 2:', "if False:"))
    assert unguarded.read_text() != text
    monkeypatch.setattr(triton_view, "BACKEND", unguarded)
    with (
        running(installed, repository, environment=Path(sys.prefix)) as server,
        pytest.raises(ModelMismatch, match="gave an empty score_map: its Python environment holds numpy 2"),
    ):
        Triton(repository, url=server.url)
