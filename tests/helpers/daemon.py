"""A real daemon under test: a site in a temporary folder, the process, and what it left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

SOURCE = "sem-1"


def png(seed: int, side: int = 96) -> bytes:
    """A small image unlike every other seed's."""
    rng = np.random.default_rng(seed)
    pixels = cv2.GaussianBlur(rng.integers(0, 256, (side, side), dtype=np.uint8), (0, 0), 3)
    return cv2.imencode(".png", pixels)[1].tobytes()


@dataclass(frozen=True)
class Site:
    """Folders and settings of one site."""

    folder: Path

    @property
    def drop(self) -> Path:
        return self.folder / "drop"

    @property
    def results(self) -> Path:
        return self.folder / "results" / SOURCE

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def file(self) -> Path:
        return self.folder / "site.yaml"

    def put(self, name: str, data: bytes) -> Path:
        """Drop a file the way tools do: under a temporary name, then renamed."""
        path = self.drop / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        partial.write_bytes(data)
        return partial.rename(path)

    def reviews(self) -> list[Path]:
        return sorted(self.results.rglob("*.review.json"))

    def reasons(self) -> dict[str, str]:
        return {p.name: json.loads(p.read_text())["reason"] for p in self.results.rglob("*.reason.json")}


def make_site(folder: Path, repository: Path, *, redis_url: str | None = None, **changes: Any) -> Site:
    """Write settings: gate always open unless the recipe says otherwise, quick scans."""
    site = Site(folder)
    site.drop.mkdir(parents=True)
    recipe = changes.pop("recipe", {"name": "test", "gate": {"threshold": 0.0}})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    watched = {"path": "drop", "source": SOURCE, "recipe": "recipe.yaml", "completeness": "rename"}
    settings = {
        "folders": [{**watched, **changes.pop("watched", {})}],
        "results_dir": "results",
        "state_dir": "state",
        "models": {"repository": str(repository), "threads": 1},
        "redis": {"url": redis_url, "timeout_s": 2} if redis_url else None,
        "reconcile_s": 2,
        "limits": {"min_free_mb": 0},
    }
    site.file.write_text(yaml.safe_dump({**settings, **changes}))
    return site


class Daemon:
    """``semwatch run`` as a child process; ``program`` may stand before its arguments instead of ``-m semwatch``."""

    def __init__(
        self, site: Site, environ: Mapping[str, str] | None = None, *, program: Sequence[str] = ("-m", "semwatch")
    ) -> None:
        self.site = site
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = f"\0semwatch-test-{os.getpid()}-{time.monotonic_ns()}"
        self._socket.bind(address)
        self._log = (site.folder / "daemon.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, *program, "run", "--site", str(site.file), "--verbose"],
            env={**os.environ, "NOTIFY_SOCKET": "@" + address[1:], **(environ or {})},
            stdout=self._log,
            stderr=self._log,
        )

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        self._socket.close()
        self._log.close()

    def wait_ready(self, timeout_s: float = 60) -> None:
        self.wait_for(lambda: "READY=1" in self.notices(0.1), timeout_s)

    def notices(self, timeout_s: float) -> str:
        """Next datagram to systemd, empty if none came."""
        self._socket.settimeout(timeout_s)
        try:
            return self._socket.recv(4096).decode()
        except TimeoutError:
            return ""

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"daemon ended:\n{self.log()[-3000:]}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s in vain:\n{self.log()[-3000:]}"
            time.sleep(0.02)

    def stop(self, timeout_s: float = 40) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def log(self) -> str:
        return (self.site.folder / "daemon.log").read_text()
