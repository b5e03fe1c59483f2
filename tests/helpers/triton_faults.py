"""Fault cases of the line on Triton: each breaks something, sees that the line felt it, and mends it."""

import http.server
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import numpy_helper
from tritonclient.grpc import InferenceServerClient, InferInput

from semwatch.models import head_bank, model_repository
from semwatch.system.files import file_sha256
from semwatch.triton import config as triton_config
from triton_line import N_FILES, PACE_S, Count, EmptyAtStart, Line, count, line, local_server

WAITS = r"waits in its folder: .*"
"""What the daemon says of a file that it keeps while a service is away."""


@dataclass(frozen=True)
class Case:
    """One fault; ``do`` breaks and mends."""

    name: str
    do: Callable[[Line], None]
    timeout_s: float = 5.0
    supervised: bool = False
    proxied: bool = False
    starts: bool = True
    """Whether the server runs before the daemon."""
    max_queue: int | None = None


def run(
    case: Case, folder: Path, installed: Path, tiny_repository: Path, *, hang_s: float, n_files: int = N_FILES
) -> Count:
    """Drop files all the while, break and mend, wait for every file, stop, count."""
    timeout_s = min(case.timeout_s, hang_s / 2)
    with (
        _queue_of(case.max_queue),
        line(
            folder, installed, tiny_repository, timeout_s=timeout_s, hang_s=hang_s,
            supervised=case.supervised, proxied=case.proxied, starts=case.starts,
        ) as made,
    ):  # fmt: skip
        made.start_daemon()
        made.drop(n_files // 4)
        if case.starts:
            made.wait(lambda: made.n_done() >= 3)
        dropping = threading.Thread(target=made.drop, args=(n_files // 2, PACE_S))
        dropping.start()
        try:
            case.do(made)
        finally:
            dropping.join()
        assert made.mended_at is not None
        made.drop(n_files - n_files // 4 - n_files // 2)
        made.wait(lambda: made.n_done() >= made.n_dropped, 120)
        assert made.kept is not None
        made.kept.stop()
        return count(made)


@contextmanager
def _queue_of(n: int | None) -> Iterator[None]:
    """Views filled meanwhile let so many requests wait."""
    before = triton_config.MAX_QUEUE
    triton_config.MAX_QUEUE = n or before
    try:
        yield
    finally:
        triton_config.MAX_QUEUE = before


# --- the server ends -------------------------------------------------------------------------------------------------


def server_killed(made: Line) -> None:
    os.kill(made.status()["server_pid"], signal.SIGKILL)
    made.wait(lambda: made.status()["restarts"] == 1 and made.status()["ready"])
    made.mended()


def server_started_again(made: Line) -> None:
    made.server.stop()
    made.saw(WAITS + "UNAVAILABLE")
    made.server.start()
    made.mended()


def server_back_with_an_empty_view(made: Line) -> None:
    made.server.stop(timeout_s=0.05)
    made.saw(WAITS + "UNAVAILABLE")
    for model in model_repository.MODELS:
        shutil.rmtree(made.server.view / model)
    made.server = local_server(
        made.server.log.parent, made.installed, made.repository, port=made.port, kind=EmptyAtStart
    )
    made.server.start()
    made.mended()


def server_absent_at_the_daemons_start(made: Line) -> None:
    made.saw("no Triton answers at")
    made.wait(lambda: made.kept is not None and 4 in made.kept.exits)
    made.server.start()
    made.mended()


def port_taken_when_it_comes_back(made: Line) -> None:
    now = made.status()
    os.kill(now["server_pid"], signal.SIGKILL)
    with _silent_listener(now["grpc_port"]):
        made.wait(lambda: "cannot start again" in (made.server.log.parent / "supervisor.log").read_text())
        made.saw(WAITS)
    made.wait(lambda: bool(made.status()["ready"]))
    made.mended()


def web_server_on_its_address(made: Line) -> None:
    made.server.stop(timeout_s=0.05)
    http.server.ThreadingHTTPServer.allow_reuse_address = True
    with http.server.ThreadingHTTPServer(("127.0.0.1", made.port), _Quiet) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        made.saw(WAITS)
        time.sleep(2)
        web.shutdown()
    made.server.start()
    made.mended()


def redis_and_server_away_together(made: Line) -> None:
    made.redis.stop()
    made.server.stop(timeout_s=0.05)
    made.saw(WAITS + "UNAVAILABLE")
    made.saw("records wait in the outbox")
    made.redis.start()
    made.server.start()
    made.mended()


# --- the server or a model hangs, is slow, or dies --------------------------------------------------------------------


def server_hangs(made: Line) -> None:
    assert made.server.pid is not None
    os.kill(made.server.pid, signal.SIGSTOP)
    time.sleep(made.hang_s)
    made.saw(WAITS + "DEADLINE_EXCEEDED")
    os.kill(made.server.pid, signal.SIGCONT)
    made.mended()


def models_process_hangs(made: Line) -> None:
    """Triton itself finds such a process unhealthy; the client has the model loaded anew, and another one answers."""
    stub = made.stub("detector")
    stub.suspend()
    made.mended()  # nobody has to
    done = made.n_done()
    made.wait(lambda: made.n_done() > done + 3)
    assert made.stub("detector").pid != stub.pid
    stub.resume()


def models_process_killed(made: Line) -> None:
    stub = made.stub("encoder")
    stub.kill()
    made.mended()
    done = made.n_done()
    made.wait(lambda: made.n_done() > done + 3)
    assert made.stub("encoder").pid != stub.pid


def queue_full(made: Line) -> None:
    with _flood(made) as refused:
        made.saw(WAITS + "maximum queue size", 90)
        assert refused
    made.mended()


def requests_time_out_in_the_queue(made: Line) -> None:
    with _flood(made, n=40):
        made.saw(WAITS + "(timeout expired|DEADLINE_EXCEEDED)")
    made.mended()


def models_too_slow(made: Line) -> None:
    made.fault("slow 4")
    made.saw(WAITS + "DEADLINE_EXCEEDED")
    made.fault("")
    made.mended()


def models_slow(made: Line) -> None:
    made.fault("slow 0.5")
    done = made.n_done()
    made.wait(lambda: made.n_done() >= done + 5)
    made.fault("")
    made.mended()


def out_of_memory(made: Line) -> None:
    made.fault("memory")
    made.saw(WAITS + "the network could not answer")
    time.sleep(2)
    made.fault("")
    made.mended()


def models_process_killed_again_and_again(made: Line) -> None:
    """As the kernel does where memory ends: every new process of the model is killed after 2 s.

    Not while it starts: Triton would wait for it for ever, see ``LocalTriton.stuck_model``.
    """
    killed = set()
    deadline = time.monotonic() + 60
    while len(killed) < 5:
        assert time.monotonic() < deadline, made.log()[-3000:]
        with suppress(IndexError, psutil.Error):
            stub = made.stub("detector")
            if stub.pid not in killed and time.time() - stub.create_time() > 2:
                stub.kill()
                killed.add(stub.pid)
                made.drop(2)  # the next process is started when somebody asks
        time.sleep(0.02)
    made.mended()


# --- the server serves something else ---------------------------------------------------------------------------------


def _unloaded(model: str) -> Callable[[Line], None]:
    def unload(made: Line) -> None:
        client = InferenceServerClient(made.server.url)
        client.unload_model(model, headers=made.secret())
        client.close()
        made.mended()
        done = made.n_done()
        made.wait(lambda: made.n_done() > done + 3)

    return unload


def other_signature_behind_the_address(made: Line) -> None:
    other = shutil.copytree(made.repository, made.repository.parent / "else" / "models")
    meta = model_repository.read_meta(other, "head", 1)
    _replace_head(other, meta.model_copy(update={"outputs": {"logits": meta.outputs["logits"]}}))
    made.server.stop(timeout_s=0.05)
    stranger = made.other_server(other, port=made.port)
    stranger.start()
    made.saw(WAITS + "let the server serve this model repository")
    time.sleep(2)
    stranger.stop(timeout_s=0.05)
    made.server.start()
    made.mended()


def other_weights_under_the_same_number(made: Line) -> None:
    stranger = made.other_server(_other_weights(made), port=made.port)
    made.server.stop(timeout_s=0.05)
    stranger.start()
    made.saw(WAITS + "other weights")
    time.sleep(2)
    stranger.stop(timeout_s=0.05)
    made.server.start()
    made.mended()


def address_led_to_other_weights_in_an_instant(made: Line) -> None:
    assert made.proxy is not None
    stranger = made.other_server(_other_weights(made))
    stranger.start()
    sound = made.port
    try:
        for _ in range(5):
            made.proxy.target = int(stranger.url.rpartition(":")[2])
            made.proxy.cut()
            made.saw(WAITS + "other weights")
            time.sleep(0.5)
            made.proxy.target = sound
            made.proxy.cut()
            done = made.n_done()
            with suppress(AssertionError):  # every file may be done
                made.wait(lambda n=done: made.n_done() > n, 10)
    finally:
        stranger.stop(timeout_s=0.05)
    made.mended()


def server_exchanged_while_nothing_is_asked(made: Line) -> None:
    made.wait(lambda: made.n_done() >= 3 * N_FILES // 4)
    stranger = made.other_server(_other_weights(made), port=made.port)
    made.server.stop(timeout_s=0.05)
    stranger.start()
    time.sleep(1)
    made.drop(2)
    made.saw(WAITS + "other weights")
    stranger.stop(timeout_s=0.05)
    made.server.start()
    made.mended()


def damaged_head_published(made: Line) -> None:
    noise = made.repository.parent / "noise"
    noise.write_bytes(b"noise" * 100)
    model_repository.publish(made.repository, model_repository.read_meta(made.repository, "head", 1), noise)
    made.saw("does not load")
    made.mended()


def lying_head_published(made: Line) -> None:
    probe = model_repository.read_probe(made.repository, "head", 1)
    assert probe is not None
    path = made.repository.parent / "probe"
    model_repository.write_probe(path, probe[0], {**probe[1], "logits": probe[1]["logits"] * 1.01})
    _publish_head(made, probe=path)
    made.saw("answers its probe with another logits")
    made.mended()


def head_swapped_while_the_server_starts_again(made: Line) -> None:
    made.server.stop(timeout_s=0.05)
    made.saw(WAITS + "UNAVAILABLE")
    labels = model_repository.read_meta(made.repository, "head", 1).labels
    _publish_head(made, labels=tuple(f"v2 {label}" for label in labels))
    made.saw("head 2 waits until Triton can load it")
    made.server.start()
    made.mended()
    made.saw("head 2 serves from now on")


# --- the network and the daemon -----------------------------------------------------------------------------------


def connection_cut_in_an_answer(made: Line) -> None:
    assert made.proxy is not None
    made.proxy.cut_after = 1500
    made.proxy.cut()
    made.saw(WAITS)
    time.sleep(2)
    made.proxy.cut_after = None
    made.mended()


def network_slow(made: Line) -> None:
    assert made.proxy is not None
    made.proxy.delay_s = 2.0
    made.saw(WAITS + "DEADLINE_EXCEEDED")
    made.proxy.delay_s = 0.0
    made.mended()


def daemon_killed_while_the_server_answers(made: Line) -> None:
    made.fault("slow 0.3")
    time.sleep(0.5)
    for _ in range(3):
        assert made.kept is not None
        made.kept.daemon.process.kill()
        exits = len(made.kept.exits)
        made.wait(lambda n=exits: made.kept is not None and len(made.kept.exits) > n)
        time.sleep(2.5)
    made.fault("")
    made.mended()


def daemon_stopped_while_the_server_hangs(made: Line) -> None:
    assert made.server.pid is not None
    assert made.kept is not None
    os.kill(made.server.pid, signal.SIGSTOP)
    time.sleep(1)
    took_s = made.kept.stop()
    os.kill(made.server.pid, signal.SIGCONT)
    assert took_s < 3 + 3, f"a stop took {took_s:.1f} s, stop_timeout_s is 3"
    made.start_daemon()
    made.mended()


CASES = (
    Case("server killed (supervised)", server_killed, supervised=True),
    Case("server ended and started again", server_started_again),
    Case("server back with an empty view", server_back_with_an_empty_view),
    Case("server absent at the daemon's start", server_absent_at_the_daemons_start, timeout_s=2, starts=False),
    Case("port taken when it comes back (supervised)", port_taken_when_it_comes_back, supervised=True),
    Case("web server on its address", web_server_on_its_address),
    Case("Redis and server away together", redis_and_server_away_together),
    Case("server hangs (SIGSTOP)", server_hangs),
    Case("model's process hangs (SIGSTOP)", models_process_hangs),
    Case("model's process killed", models_process_killed),
    Case("queue full", queue_full, max_queue=2),
    Case("requests time out in the queue", requests_time_out_in_the_queue, timeout_s=2),
    Case("models slower than the deadline", models_too_slow, timeout_s=2),
    Case("models slow", models_slow),
    Case("out of memory in the model", out_of_memory),
    Case("model's process killed again and again", models_process_killed_again_and_again),
    Case("detector unloaded", _unloaded("detector")),
    Case("encoder unloaded", _unloaded("encoder")),
    Case("head unloaded", _unloaded("head")),
    Case("other signature behind the address", other_signature_behind_the_address),
    Case("other weights under the same number", other_weights_under_the_same_number),
    Case("address led to other weights at once", address_led_to_other_weights_in_an_instant, proxied=True),
    Case("server exchanged while idle", server_exchanged_while_nothing_is_asked),
    Case("damaged head published", damaged_head_published),
    Case("lying head published", lying_head_published),
    Case("head swapped while it starts again", head_swapped_while_the_server_starts_again),
    Case("connection cut in an answer", connection_cut_in_an_answer, proxied=True),
    Case("network slow", network_slow, timeout_s=1.5, proxied=True),
    Case("daemon killed while it answers", daemon_killed_while_the_server_answers),
    Case("daemon stopped while it hangs", daemon_stopped_while_the_server_hangs, timeout_s=30),
)


# --- small parts -----------------------------------------------------------------------------------------------------


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _silent_listener(port: int) -> Iterator[None]:
    """Somebody who took a port as soon as it was free, and never answers."""
    deadline = time.monotonic() + 10
    while True:
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("127.0.0.1", port))
            holder.listen()
            break
        except OSError:
            holder.close()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    with holder:
        yield


@contextmanager
def _flood(made: Line, n: int = 8) -> Iterator[list[str]]:
    """Others ask a slowed detector all the time; gives what they were refused with."""
    refused: list[str] = []
    is_over = threading.Event()

    def ask() -> None:
        client = InferenceServerClient(made.server.url)
        image = InferInput("image", [1, 112, 112], "UINT8")
        image.set_data_from_numpy(np.zeros((1, 112, 112), np.uint8))
        while not is_over.is_set():
            try:
                client.infer("detector", [image], client_timeout=30)
            except Exception as error:  # noqa: BLE001 - whatever the flooded server says
                refused.append(str(error))
                time.sleep(0.01)
        client.close()

    made.fault("slow 0.2")
    askers = [threading.Thread(target=ask) for _ in range(n)]
    for asker in askers:
        asker.start()
    try:
        yield refused
    finally:
        is_over.set()
        made.fault("")
        for asker in askers:
            asker.join(60)


def _other_weights(made: Line) -> Path:
    """A repository that differs in the numbers of head 1 alone, and says so in its own meta and probe."""
    other = shutil.copytree(made.repository, made.repository.parent / "else" / "models")
    network = onnx.load(other / "head/1/model.onnx")
    for weight in network.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype == np.float32 and values.ndim == 2:
            weight.CopyFrom(numpy_helper.from_array(-values, weight.name))
    onnx.save(network, other / "head/1/model.onnx")
    sha256 = file_sha256(other / "head/1/model.onnx")
    meta = model_repository.read_meta(other, "head", 1)
    (other / "head/1/meta.json").write_text(meta.model_copy(update={"weights_sha256": sha256}).model_dump_json())
    return other


def _replace_head(repository: Path, meta: model_repository.Meta) -> None:
    """Give head 1 another signature."""
    path = repository / "head/1/model.onnx"
    network = onnx.load(path)
    for output in list(network.graph.output):
        if output.name not in meta.outputs:
            network.graph.output.remove(output)
    onnx.save(network, path)
    meta = meta.model_copy(update={"weights_sha256": file_sha256(path)})
    (repository / "head/1/meta.json").write_text(meta.model_dump_json())
    (repository / "head/1" / model_repository.PROBE).unlink(missing_ok=True)


def _publish_head(made: Line, *, probe: Path | None = None, **changes: object) -> int:
    folder = made.repository / "head/1"
    meta = model_repository.read_meta(made.repository, "head", 1).model_copy(update=changes)
    beside: Mapping[str, Path] = {
        model_repository.PROBE: probe or folder / model_repository.PROBE,
        head_bank.BANK: folder / head_bank.BANK,
        head_bank.GOLDEN: folder / head_bank.GOLDEN,
    }
    return model_repository.publish(made.repository, meta, folder / "model.onnx", beside=beside)
