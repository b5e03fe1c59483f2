"""A real Triton, set up from its wheel, with tiny networks: the same answers as embedded, and every way to lose it."""

import http.client
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from semwatch.errors import ConfigError, ModelMismatch, ServiceUnavailable
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.head_swap import Swap
from semwatch.models.inference import Answer, Embedded
from semwatch.models.model_repository import Tensor
from semwatch.system.files import file_sha256
from semwatch.triton import background as triton_background
from semwatch.triton import config as triton_config
from semwatch.triton import control
from semwatch.triton import setup as triton_setup
from semwatch.triton import view as triton_view
from semwatch.triton.client import Triton
from semwatch.triton.server import LocalTriton
from semwatch.triton.setup import set_up
from semwatch.triton.view import Settings
from triton_line import backend_with_faults

WIDTH = 74


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_repository, tmp_path / "models")


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


@pytest.fixture
def server(installed: Path, repository: Path) -> Iterator[LocalTriton]:
    with running(installed, repository) as server:
        yield server


@pytest.fixture
def models(server: LocalTriton, repository: Path) -> Iterator[Triton]:
    with Triton(repository, url=server.url, timeout_s=5) as models:
        yield models


@pytest.fixture(scope="module")
def shared(
    installed: Path, tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """One server for the tests that change nothing."""
    repository = shutil.copytree(tiny_repository, tmp_path_factory.mktemp("shared") / "models")
    with running(installed, repository) as server:
        yield server.url, repository


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


# --- set-up ----------------------------------------------------------------------------------------------------------


def test_folder_without_an_installation_says_how_to_make_one(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="semwatch triton setup"):
        LocalTriton(tmp_path, repository).start()
    with pytest.raises(ConfigError, match="semwatch triton setup"):
        triton_background.up(tmp_path, repository)
    assert triton_background.status(tmp_path)["running"] is False
    assert triton_background.down(tmp_path) is False


def test_set_up_that_was_done_is_not_done_again(installed: Path) -> None:
    start = time.monotonic()
    made = set_up(installed)
    assert time.monotonic() - start < 0.5
    assert made.is_current()
    assert not list((made.packages).glob("numpy-2*"))


def test_index_out_of_reach_is_said_and_nothing_half_made_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="could not install nvidia-pytriton"):
        set_up(tmp_path / "new")
    assert not triton_setup.Installation(tmp_path / "new").is_current()


# --- the same answers ------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_embedded_runtime(shared: tuple[str, Path]) -> None:
    url, repository = shared
    asked = [("detector", images(3)), ("encoder", crops(5)), ("head", rows(7)), ("detector", images(1))]
    with Triton(repository, url=url) as triton, Embedded(repository, threads=1) as embedded:
        assert triton.versions() == embedded.versions() == {"detector": 1, "encoder": 1, "head": 1}
        for model, inputs in asked:
            ours, theirs = triton.infer(model, inputs), embedded.infer(model, inputs)
            assert (ours.version, ours.meta) == (theirs.version, theirs.meta)
            assert ours.outputs.keys() == theirs.outputs.keys()
            for name, values in theirs.outputs.items():
                assert ours.outputs[name].dtype == values.dtype
                np.testing.assert_allclose(ours.outputs[name], values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [0, 16, 17, 40])
def test_batch_of_any_size_is_answered(shared: tuple[str, Path], n: int) -> None:
    url, repository = shared
    with Triton(repository, url=url) as triton, Embedded(repository, threads=1) as embedded:
        ours = triton.infer("detector", images(n)).outputs
        assert ours["score_map"].shape == (n, 8, 8)
        assert ours["raw_score"].shape == (n,)
        if n:
            np.testing.assert_allclose(
                ours["raw_score"], embedded.infer("detector", images(n)).outputs["raw_score"], rtol=0, atol=1e-4
            )


def test_wrong_arrays_are_refused_before_they_are_sent(shared: tuple[str, Path]) -> None:
    url, repository = shared
    with Triton(repository, url=url) as triton, pytest.raises(ModelMismatch, match="the detector wants"):
        triton.infer("detector", {"image": np.zeros((1, 112, 112), np.float32)})


def test_threads_of_live_work_and_backlog_get_their_own_answers(shared: tuple[str, Path]) -> None:
    url, repository = shared
    with Triton(repository, url=url) as triton:
        expected = [float(triton.infer("detector", images(1, seed)).outputs["raw_score"][0]) for seed in range(8)]
        found: dict[int, float] = {}

        def ask(seed: int) -> None:
            for _ in range(5):
                answer = triton.infer("detector", images(1, seed), backlog=seed % 2 == 0)
                found[seed] = float(answer.outputs["raw_score"][0])

        workers = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
    np.testing.assert_allclose([found[seed] for seed in range(8)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_backlog", [False, True])
def test_live_request_passes_the_backlog_that_waits(
    installed: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, is_backlog: bool
) -> None:
    monkeypatch.setattr("semwatch.triton.client.BACKLOG_TIMEOUT_S", 30.0)
    answered: list[str] = []
    with (
        backend_with_faults(repository.parent),
        running(installed, repository) as server,
        Triton(repository, url=server.url) as models,
    ):
        (repository.parent / "fault").write_text("slow 0.1")

        def ask(name: str, backlog: bool) -> None:
            models.infer("detector", images(1), backlog=backlog)  # one after the other; heads' are put together
            answered.append(name)

        askers = [threading.Thread(target=ask, args=("old", True)) for _ in range(12)]
        askers.append(threading.Thread(target=ask, args=("new", is_backlog)))
        for asker in askers:
            asker.start()
            time.sleep(0.01)
        for asker in askers:
            asker.join(40)
    place = answered.index("new")
    assert len(answered) == 13
    print(f"\nplace of the request that came last: {place + 1} of 13")
    assert place <= 4 if not is_backlog else place == 12


def test_backlog_gives_up_sooner_than_live_work(
    server: LocalTriton, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semwatch.triton.client.BACKLOG_TIMEOUT_S", 0.5)
    with Triton(repository, url=server.url, timeout_s=20) as models:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(ServiceUnavailable):
            models.infer("head", rows(), backlog=True)
        assert time.monotonic() - start < 1.5
        os.kill(server.pid, signal.SIGCONT)


def test_repository_is_not_touched(shared: tuple[str, Path], tiny_repository: Path) -> None:
    _, repository = shared
    files = {path.relative_to(repository): path.stat().st_size for path in repository.rglob("*") if path.is_file()}
    expected = {p.relative_to(tiny_repository): p.stat().st_size for p in tiny_repository.rglob("*") if p.is_file()}
    assert files == expected


# --- the swap --------------------------------------------------------------------------------------------------------


def test_heads_change_under_four_clients_without_a_failure_and_with_their_own_labels(
    models: Triton, repository: Path
) -> None:
    wrong: list[object] = []
    seen: set[int] = set()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answer = models.infer("head", rows(3))
                seen.add(answer.version)
                if answer.version > 1 and not answer.meta.labels[0].startswith(f"v{answer.version} "):
                    wrong.append((answer.version, answer.meta.labels))
            except Exception as error:  # noqa: BLE001 - any failure is what the test looks for
                wrong.append(error)

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        plain = model_repository.read_meta(repository, "head", 1).labels
        for version in range(2, 6):
            assert republish(repository, labels=tuple(f"v{version} {label}" for label in plain)) == version
            assert models.refresh() == Swap("head", version)
            assert models.refresh() is None
            deadline = time.monotonic() + 5
            while version not in seen and time.monotonic() < deadline:
                time.sleep(0.01)
        choice.roll_back(repository, "head", "worse")
        assert models.refresh() == Swap("head", 4)
    finally:
        stop.set()
        for client in clients:
            client.join(timeout=10)
    assert wrong == []
    assert seen == {1, 2, 3, 4, 5}


def test_head_with_one_class_more_takes_over(models: Triton, repository: Path) -> None:
    assert models.infer("head", rows()).outputs["logits"].shape == (1, 3)
    version = publish_four_classes(repository)
    assert models.refresh() == Swap("head", version)
    answer = models.infer("head", rows(2))
    np.testing.assert_allclose(answer.outputs["logits"], rows(2)["features"][:, :4], atol=1e-5)
    assert answer.meta.labels == ("a", "b", "c", "d")


def test_broken_head_is_refused_once_and_the_old_one_goes_on(
    models: Triton, repository: Path, server: LocalTriton
) -> None:
    broken = publish_noise(repository)
    swap = models.refresh()
    assert swap is not None
    assert "does not load" in (swap.refused or "")
    assert models.refresh() is None
    assert set(models.refused()) == {broken}
    assert models.infer("head", rows()).version == 1
    choice.withdraw(repository, "head", broken, "broken")
    server.stop(timeout_s=0.05)
    server.start()  # what was refused does not come back with the server
    assert models.infer("head", rows()).version == 1
    meta = model_repository.read_meta(repository, "head", 1)
    good = model_repository.publish(repository, meta, repository / "head/1/model.onnx")
    assert models.refresh() == Swap("head", good)


def test_head_that_answers_its_probe_otherwise_never_answers_the_line(models: Triton, repository: Path) -> None:
    probe = model_repository.read_probe(repository, "head", 1)
    assert probe is not None
    version = republish(repository)
    lying = {**probe[1], "logits": probe[1]["logits"] * 1.01}
    model_repository.write_probe(repository / "head" / str(version) / model_repository.PROBE, probe[0], lying)
    swap = models.refresh()
    assert swap is not None
    assert "answers its probe with another logits" in (swap.refused or "")
    assert models.infer("head", rows()).version == 1


def test_start_after_a_broken_publication_serves_the_head_before_it(server: LocalTriton, repository: Path) -> None:
    broken = publish_noise(repository)
    with Triton(repository, url=server.url) as models:
        assert models.versions()["head"] == 1
        assert set(models.refused()) == {broken}
    choice.pin(repository, "head", broken)
    with pytest.raises(ModelMismatch, match="does not load"):
        Triton(repository, url=server.url)


def test_recipes_with_different_pins_are_served_side_by_side(server: LocalTriton, repository: Path) -> None:
    republish(repository)
    with (
        Triton(repository, url=server.url, pins={"head": 1}) as pinned,
        Triton(repository, url=server.url) as floating,
    ):
        for version in range(3, 7):
            assert republish(repository) == version
            assert floating.refresh() == Swap("head", version)
            assert pinned.refresh() is None
            assert floating.infer("head", rows()).version == version
            assert pinned.infer("head", rows()).version == 1


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
    after = _first_answer(lambda: models.infer("detector", images(1))).outputs["raw_score"]
    assert time.monotonic() - start < 3
    np.testing.assert_array_equal(after, before)


def test_stopped_server_costs_the_deadline_and_answers_when_it_goes_on(server: LocalTriton, repository: Path) -> None:
    with Triton(repository, url=server.url, timeout_s=2) as models:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(ServiceUnavailable, match="DEADLINE_EXCEEDED"):
            models.infer("head", rows())
        assert 1.9 < time.monotonic() - start < 3
        os.kill(server.pid, signal.SIGCONT)
        assert _first_answer(lambda: models.infer("head", rows())).version == 1


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
    assert _first_answer(lambda: models.infer("head", rows())).version == 1


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


def test_unloaded_model_is_loaded_again(models: Triton, server: LocalTriton) -> None:
    unload(server, "head")
    answer = models.infer("head", rows())
    assert answer.version == 1


def test_server_that_others_manage_is_asked_for_and_never_told(server: LocalTriton, repository: Path) -> None:
    copy = shutil.copytree(repository, repository.parent / "copy")  # no view beside it
    with Triton(copy, url=server.url) as models:
        unload(server, "head")
        with pytest.raises(ServiceUnavailable, match="does not hold head 1"):
            models.infer("head", rows())


# --- who may load models ---------------------------------------------------------------------------------------------


def test_stranger_without_the_secret_may_ask_and_not_load(server: LocalTriton, models: Triton) -> None:
    with stranger(server.url) as other:
        assert other.is_model_ready("head", "1")
        for forbidden in (
            lambda: other.load_model("head"),
            lambda: other.unload_model("head"),
            lambda: other.load_model("head", headers={"triton-grpc-protocol-semwatch-control": "guessed"}),
            other.get_system_shared_memory_status,
            lambda: other.update_log_settings({"log_verbose_level": 1}),
            lambda: other.update_trace_settings(settings={"trace_level": "OFF"}),
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                forbidden()
    for path in (
        "repository/index",
        "repository/models/head/unload",
        "systemsharedmemory/region/x/register",
        "logging",
    ):
        assert _posted(server.http_port, f"/v2/{path}") == 403
    assert models.infer("head", rows()).version == 1


def test_secret_is_its_users_alone_new_at_each_start_and_not_in_the_command_line(
    server: LocalTriton, models: Triton, repository: Path
) -> None:
    path = control.beside(server.view)
    first = control.read(path)
    assert path.stat().st_mode & 0o777 == 0o600
    command_line = Path(f"/proc/{server.pid}/cmdline").read_bytes()
    assert b"semwatch-control=xxxx" in command_line
    assert first.encode() not in command_line
    assert first not in server.log.read_text()
    server.stop(timeout_s=0.05)
    server.start()
    assert control.read(path) != first
    republish(repository)
    assert _first_swap(models) == Swap("head", 2)  # the new secret is read, not the one of the start


def test_client_without_the_secret_is_told_so_and_serves_what_is_loaded(
    installed: Path, repository: Path, tmp_path: Path
) -> None:
    given = tmp_path / "secret"
    control.write_new(given)
    with running(installed, repository, control_secret_file=given) as server:
        assert not control.beside(server.view).exists()
        with Triton(repository, url=server.url) as models:
            republish(repository)
            assert models.refresh() is None
            assert models.infer("head", rows()).version == 1
        with pytest.raises(ConfigError, match=r"loads models only for those who know its secret.*control_secret_file"):
            Triton(repository, url=server.url)
        wrong = tmp_path / "wrong"
        control.write_new(wrong)
        with pytest.raises(ConfigError, match="holds another one"):
            Triton(repository, url=server.url, control_secret_file=wrong)
        with Triton(repository, url=server.url, control_secret_file=given) as models:
            assert models.versions()["head"] == 2


def test_secret_is_read_by_those_who_may_write_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    tmp_path.chmod(0o755)
    control.write_new(path)
    assert path.stat().st_mode & 0o777 == 0o600
    tmp_path.chmod(0o2770)
    os.chown(tmp_path, -1, os.getgid())
    control.write_new(path)
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.stat().st_gid == tmp_path.stat().st_gid
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("text", ["", "short", "with space in the secret", "semi;colon=semi;colon=", "x" * 257])
def test_secret_that_no_option_can_carry_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    with pytest.raises(ConfigError, match="16 to 256 letters"):
        control.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        control.read(tmp_path / "absent")


def _posted(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("POST", path, body=b"{}")
        return connection.getresponse().status
    finally:
        connection.close()


def _first_swap(models: Triton, timeout_s: float = 10.0) -> Swap | None:
    deadline = time.monotonic() + timeout_s
    while (swap := models.refresh()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return swap


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
            assert _first_answer(lambda: models.infer("head", rows())).version == 1


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
            assert _first_swap(models) == Swap("head", good)
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


# --- start and end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["grpc_port", "http_port"])
def test_taken_port_is_named(installed: Path, repository: Path, which: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is taken"),
            running(installed, repository, **{which: port}),
        ):
            pass


def test_second_server_of_one_folder_is_refused(server: LocalTriton, repository: Path) -> None:
    second = LocalTriton(server.log.parent, repository, timeout_s=0.3)
    with pytest.raises(ConfigError, match="another Triton runs"):
        second.start()
    assert server.pid is not None


def test_models_that_outlive_a_killed_server_do_not_keep_the_next_from_starting(
    server: LocalTriton, repository: Path
) -> None:
    assert server.pid is not None
    family = psutil.Process(server.pid)
    hanging = family.children()[0]
    hanging.suspend()  # as one that waits on the shared memory of the dead
    family.kill()
    family.wait(5)
    assert hanging.is_running()
    second = LocalTriton(server.log.parent, repository, settings=Settings(threads=1))
    try:
        second.start()
        assert second.pid is not None
    finally:
        second.stop(timeout_s=0.05)


def test_server_listens_on_this_machine_alone_and_leaves_nothing_behind(installed: Path, repository: Path) -> None:
    with running(installed, repository) as server:
        assert server.pid is not None
        process = psutil.Process(server.pid)
        listening = [
            c.laddr.ip.removeprefix("::ffff:") for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN
        ]
        family = [process, *process.children(recursive=True)]
        assert set(listening) == {"127.0.0.1"}
        assert len(family) == 1 + len(model_repository.MODELS) * triton_config.INSTANCES
        server.stop()
        _, alive = psutil.wait_procs(family, timeout=3)
    assert alive == []


def test_background_server_is_mended_and_ends(installed: Path, repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "background"
    folder.mkdir()
    (folder / "venv").symlink_to(installed / "venv")
    now = triton_background.up(folder, repository, grpc_port=0, http_port=0, settings=Settings(threads=1))
    try:
        assert now["models"] == {"detector": [1], "encoder": [1], "head": [1]}
        with Triton(repository, url=f"127.0.0.1:{now['grpc_port']}") as models:
            with pytest.raises(ConfigError, match="runs already"):
                triton_background.up(folder, repository)
            os.kill(now["server_pid"], signal.SIGKILL)
            deadline = time.monotonic() + 15
            while triton_background.status(folder)["restarts"] != 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert _first_answer(lambda: models.infer("head", rows())).version == 1
            assert triton_background.status(folder)["restarts"] == 1
    finally:
        assert triton_background.down(folder)
    assert triton_background.status(folder)["running"] is False


def test_supervisor_that_is_killed_takes_its_server_along(installed: Path, repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "background"
    folder.mkdir()
    (folder / "venv").symlink_to(installed / "venv")
    now = triton_background.up(folder, repository, grpc_port=0, http_port=0, settings=Settings(threads=1))
    family = [psutil.Process(now["server_pid"]), *psutil.Process(now["server_pid"]).children()]
    os.kill(now["pid"], signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
    assert triton_background.status(folder)["running"] is False


def _first_answer(ask: Callable[[], Answer], timeout_s: float = 10.0) -> Answer:
    """What the line does: try the same again while the service is away."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except ServiceUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
