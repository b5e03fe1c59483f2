"""The real line on a real Triton while faults are done to it: daemon, server, Redis, a proxy between, and the count."""

import json
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis

from daemon import SOURCE, Daemon, Site, make_site, png
from semwatch.line import pipeline
from semwatch.models import model_repository
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import load_recipe
from semwatch.store import audit, results
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.system import child_server
from semwatch.system.clock import utc_now
from semwatch.triton import background as triton_background
from semwatch.triton import control
from semwatch.triton import view as triton_view
from semwatch.triton.server import LocalTriton
from semwatch.triton.view import Settings, View

N_FILES = 40
PACE_S = 0.15
TOLERANCE = 1e-4
DONE_TIMEOUT_S = 120.0
_RESTART_S = 0.5
"""RestartSec of our stand-in for systemd."""
_GIVEN_UP = (0, 2, 3)
"""Exit codes after which systemd leaves the daemon down: RestartPreventExitStatus of semwatch.service."""
_FAULTY = '''
import time
_sound_answer = TritonPythonModel._answer


def _answer_with_fault(self, batches):
    """Do what the test wrote down, then what the backend does."""
    try:
        with open({path!r}) as file:
            kind, _, value = file.read().partition(" ")
    except OSError:
        kind = ""
    if kind == "slow":
        time.sleep(float(value))
    if kind == "memory":
        bytearray(1 << 60)
    return _sound_answer(self, batches)


TritonPythonModel._answer = _answer_with_fault
'''


class Kept:
    """The daemon as systemd keeps it: started again after a failure that may go away; ``exits`` holds its codes."""

    def __init__(self, site: Site) -> None:
        self._site, self._is_wanted, self.exits = site, True, list[int]()
        self.daemon = Daemon(site)
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while True:
            code = self.daemon.process.wait()
            self.daemon.__exit__()
            if not self._is_wanted:
                return
            self.exits.append(code)
            if code in _GIVEN_UP:
                return
            time.sleep(_RESTART_S)
            if not self._is_wanted:
                return
            self.daemon = Daemon(self._site)

    def stop(self, timeout_s: float = 40) -> float:
        """Ask it to end, for good; return the seconds that it took."""
        self._is_wanted = False
        start = time.monotonic()
        with suppress(ProcessLookupError):
            self.daemon.process.terminate()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.daemon.process.kill()
            raise AssertionError(f"the daemon did not stop within {timeout_s} s")
        return time.monotonic() - start


class Proxy:
    """A TCP proxy on loopback whose connections can be cut, delayed, and led elsewhere."""

    def __init__(self, port: int) -> None:
        self.target, self.delay_s = port, 0.0
        self.cut_after: int | None = None
        """Cut each connection once so many bytes of answers went through; None: never."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, suppress(OSError), socket.create_connection(("127.0.0.1", self.target), 5) as far:
            far.settimeout(None)
            self._open += [near, far]
            asking = threading.Thread(target=self._pump, args=(near, far, False), daemon=True)
            asking.start()
            self._pump(far, near, True)
            asking.join()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(65536):
                if is_answer and self.delay_s:
                    time.sleep(self.delay_s)
                if is_answer and self.cut_after is not None and passed + len(data) > self.cut_after:
                    sink.sendall(data[: max(self.cut_after - passed, 0)])
                    break
                sink.sendall(data)
                passed += len(data)
        _shut(source)
        _shut(sink)

    def cut(self) -> None:
        """End every connection now."""
        while self._open:
            _shut(self._open.pop())

    def close(self) -> None:
        """End it."""
        _shut(self._listener)  # wakes who accepts
        self._listener.close()
        self.cut()


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


class EmptyAtStart(LocalTriton):
    """A server that starts with a view that holds no model."""

    def _fill_view(self) -> None:
        View(self.view, self._repository).prepare(Settings(threads=1))


@dataclass
class Line:
    """One site with everything around it; a fault case works on it."""

    site: Site
    repository: Path
    installed: Path
    server: LocalTriton
    redis: EmbeddedRedis
    hang_s: float
    proxy: Proxy | None = None
    supervised: Path | None = None
    """Folder of a server under ``semwatch triton up``; then ``server`` is not started."""
    mended_at: float | None = None
    kept: Kept | None = None
    n_dropped: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # --- files -----------------------------------------------------------------------------------------------------

    def drop(self, n: int, pace_s: float = 0.0) -> None:
        for _ in range(n):
            with self._lock:
                index, self.n_dropped = self.n_dropped, self.n_dropped + 1
            self.site.put(f"lot{index % 3}/{index}.png", png(index))
            time.sleep(pace_s)

    def n_done(self) -> int:
        return len(self.site.reviews())

    def wait(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s} s in vain:\n{self.log()[-3000:]}"
            time.sleep(0.02)

    def log(self) -> str:
        path = self.site.folder / "daemon.log"
        return path.read_text() if path.exists() else ""

    def saw(self, pattern: str, timeout_s: float = 60.0) -> None:
        """Wait until the daemon has said something: the fault reached it."""
        self.wait(lambda: re.search(pattern, self.log()) is not None, timeout_s)

    def mended(self) -> None:
        """The fault is gone from now on."""
        self.mended_at = time.time()

    def start_daemon(self) -> None:
        self.kept = Kept(self.site)

    # --- the server ------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    def status(self) -> dict[str, Any]:
        assert self.supervised is not None
        return triton_background.status(self.supervised)

    def stub(self, model: str) -> psutil.Process:
        """The process of one model."""
        pid = self.server.pid if self.supervised is None else self.status()["server_pid"]
        alive = [child for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE]
        return [child for child in alive if f"{model}_0_0" in " ".join(child.cmdline())][-1]

    def fault(self, text: str) -> None:
        """Let the models do something else before each answer; empty: nothing."""
        path = self.site.folder / "fault"
        path.write_text(text) if text else path.unlink(missing_ok=True)

    def secret(self) -> Mapping[str, str]:
        return control.grpc_headers(control.beside(self.server.view))

    def other_server(self, repository: Path, *, port: int = 0) -> LocalTriton:
        """A server of other models; the caller stops it."""
        return local_server(repository.parent / "other-triton", self.installed, repository, port=port)


def local_server(
    folder: Path, installed: Path, repository: Path, *, port: int = 0, kind: type[LocalTriton] = LocalTriton
) -> LocalTriton:
    """A server of a test's own on the installation of all tests, not yet started."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "venv").exists():
        (folder / "venv").symlink_to(installed / "venv")
    return kind(folder, repository, settings=Settings(threads=1), grpc_port=port)


@contextmanager
def backend_with_faults(folder: Path) -> Iterator[None]:
    """Our own backend, which first does what the file ``fault`` says, in every view filled meanwhile."""
    sound = triton_view.BACKEND
    folder.mkdir(parents=True, exist_ok=True)
    faulty = folder / "model.py"
    faulty.write_text(sound.read_text() + _FAULTY.format(path=str(folder / "fault")))
    triton_view.BACKEND = faulty
    try:
        yield
    finally:
        triton_view.BACKEND = sound


@contextmanager
def line(
    folder: Path,
    installed: Path,
    tiny_repository: Path,
    *,
    timeout_s: float,
    hang_s: float,
    supervised: bool = False,
    proxied: bool = False,
    starts: bool = True,
) -> Iterator[Line]:
    """Server, Redis and site; the daemon runs once ``start_daemon`` was called."""
    repository = shutil.copytree(tiny_repository, folder / "models")
    with ExitStack() as keep:
        keep.enter_context(backend_with_faults(folder / "site"))
        store = keep.enter_context(EmbeddedRedis(folder / "redis"))
        server = local_server(folder / "triton", installed, repository)
        port = 0
        if supervised:
            now = triton_background.up(
                server.log.parent, repository, grpc_port=0, http_port=0, settings=Settings(threads=1)
            )
            keep.callback(triton_background.down, server.log.parent)
            port = now["grpc_port"]
        elif starts:
            keep.callback(server.stop, timeout_s=0.05)
            server.start()
            port = int(server.url.rpartition(":")[2])
        else:
            port = child_server.free_port()
            server._ports = (port, 0)
        proxy = None
        if proxied:
            proxy = Proxy(port)
            keep.callback(proxy.close)
            port = proxy.port
        site = make_site(
            folder / "site", repository, redis_url=store.url,
            models={
                "repository": str(repository), "runtime": "triton",
                "triton": {"url": f"127.0.0.1:{port}", "timeout_s": timeout_s},
            },
            limits={"min_free_mb": 0, "stop_timeout_s": 3},
        )  # fmt: skip
        made = Line(site, repository, installed, server, store, hang_s, proxy)
        made.supervised = server.log.parent if supervised else None
        try:
            yield made
        finally:
            if made.kept is not None:
                made.kept.stop()
            made.server.stop(timeout_s=0.05)


# --- the count -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """What became of the files of one case."""

    files: int
    results: int
    lost: int
    doubled: int
    wrong: int
    recovery_s: float | None
    """From the fault mended to the next result written; None where nothing was left to do."""
    exits: tuple[int, ...]
    """Codes with which the daemon ended before it was started again; none expected but where a case is about that."""

    @property
    def is_sound(self) -> bool:
        return not (self.lost or self.doubled or self.wrong) and self.results == self.files


def count(made: Line) -> Count:
    """Compare results, ledger, audit log and stream with what was dropped, each result with the embedded runtime's."""
    names = {f"lot{index % 3}/{index}.png": index for index in range(made.n_dropped)}
    found = {p.relative_to(made.site.results).as_posix().removesuffix(".review.json"): p for p in made.site.reviews()}
    client = redis.Redis.from_url(made.redis.url)
    summaries = [json.loads(fields[b"meta"])["path"] for _, fields in client.xrange("semwatch:results")]
    client.close()
    log = made.site.state / "audit.jsonl"
    assert audit.verify(log, expected_last_seq=len(log.read_text().splitlines())).ok
    audited = [json.loads(row)["path"] for row in log.read_text().splitlines()]
    lost = sum(1 for name in names if name not in found or name not in audited or name not in summaries)
    doubled = sum(n - 1 for kind in (summaries, audited) for n in Counter(kind).values())
    after = sorted(at for p in found.values() if (at := p.stat().st_mtime) >= (made.mended_at or 0))
    assert made.kept is not None
    return Count(
        files=len(names),
        results=len(found),
        lost=lost + len(made.site.reasons()),
        doubled=doubled + len(found.keys() - names.keys()),
        wrong=len(wrong_answers(made, {found[name]: index for name, index in names.items() if name in found})),
        recovery_s=after[0] - made.mended_at if after and made.mended_at else None,
        exits=tuple(made.kept.exits),
    )


_EXPECTED: dict[tuple[str, int], Any] = {}


def wrong_answers(made: Line, found: Mapping[Path, int]) -> list[str]:
    """Results that say something else than the embedded runtime says of the same file by the same version."""
    said = {path: results.read(path) for path in found}
    wrong = []
    for version in sorted({record.model_versions["head"] for record in said.values()}):
        meta = model_repository.read_meta(made.repository, "head", version)
        with Embedded(made.repository, pins={"head": version}, threads=1) as models:
            for path, index in found.items():
                if said[path].model_versions["head"] == version:
                    key = meta.weights_sha256 + str(meta.labels), index
                    if key not in _EXPECTED:
                        _EXPECTED[key] = _embedded(made, models, said[path].path, index)
                    if fault := _difference(_EXPECTED[key], _plain(said[path])):
                        wrong.append(f"{path.name}: {fault}")
    for text in wrong[:3]:
        print(text)
    return wrong


def _embedded(made: Line, models: Embedded, name: str, index: int) -> Any:
    data = png(index)
    review = pipeline.review(
        data, source=SOURCE, path=name, sha256="0" * 64, recipe=load_recipe(made.site.folder / "recipe.yaml"),
        models=models, reviewed_utc=utc_now(),
    )  # fmt: skip
    paths = results.write(review, results_dir=made.site.folder / "embedded")
    return _plain(results.read(paths.json))


def _plain(record: Any) -> Any:
    """What was judged, without when."""
    return [page.model_dump(mode="json", exclude={"overlay"}) for page in record.pages]


def _difference(expected: Any, found: Any, where: str = "") -> str:
    """Where two results differ by more than ``TOLERANCE``; empty where they do not."""
    if isinstance(expected, float) and isinstance(found, float):
        return "" if abs(expected - found) <= TOLERANCE else f"{where}: {found} for {expected}"
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        return next((d for key in expected if (d := _difference(expected[key], found[key], f"{where}.{key}"))), "")
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return next((d for i, (e, f) in pairs if (d := _difference(e, f, f"{where}[{i}]"))), "")
    return "" if expected == found else f"{where}: {found} for {expected}"
