"""The product inside a machine: put there as the operations guide says, loaded with work, and its books checked."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from building import MACHINES
from daemon import png
from machine import Machine, MachineError
from semwatch.store import audit
from semwatch.store.audit import AUDIT

PREFIX = "/opt/semwatch"
PROGRAMS = f"{PREFIX}/current/bin"
SITE, RECIPE = "/etc/semwatch/site.yaml", "/etc/semwatch/recipe.yaml"
DROP, RESULTS, STATE = "/srv/semwatch/drop/tool-a", "/srv/semwatch/results/tool-a", "/var/lib/semwatch"
DAEMON, REDIS, TRITON = "semwatch.service", "semwatch-redis.service", "semwatch-triton.service"
EXTRAS = ("redis-server", "triton")
TRAIN = (*EXTRAS, "train")
PIP_S, START_S, WORK_S = 300.0, 90.0, 120.0
IDLE_S, SETTLE_S = 60.0, 10.0

# Runs inside as the daemon's user, and asks ledger and Redis the way the product reaches them.
_BOOKS = """
import json, sqlite3, sys
from pathlib import Path
from semwatch.settings.site import load_site
from semwatch.store.ledger import LEDGER
from semwatch.streams.unknowns import connect
site = load_site(Path(sys.argv[1]))
books = {"states": {}, "waiting": 0, "results": [], "unknowns": []}
with sqlite3.connect(f"file:{site.state_dir / LEDGER}?mode=ro", uri=True, timeout=10) as db:
    books["states"] = dict(db.execute("SELECT state, count(*) FROM work GROUP BY state"))
    books["waiting"] = db.execute("SELECT count(*) FROM outbox").fetchone()[0]
if site.redis is not None:
    client = connect(site.redis.url, username=site.redis.username, password_file=site.redis.password_file)
    for stream in ("results", "unknowns"):
        for _, fields in client.xrange(f"{site.redis.prefix}:{stream}"):
            path = json.loads(fields[b"meta"])["path"]
            books[stream].append([fields[b"id"].decode(), path])
json.dump(books, sys.stdout)
"""


# --- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """A machine's disk with the product on it: others are booted above it."""

    below: tuple[Path, ...]
    binds: dict[str, Path]
    version: str

    def machine(self, name: str) -> Machine:
        """A machine of its own above this layer, not yet booted."""
        return Machine(MACHINES / name, self.below, binds=self.binds)


# --- programs and settings -------------------------------------------------------------------------------------------


def put_version(machine: Machine, version: str, *, extras: Sequence[str] = EXTRAS) -> None:
    """Make the virtual environment of one version, offline, from the wheels bound at /wheels and /product."""
    folder = f"{PREFIX}/{version}"
    machine.run("python3", "-m", "venv", folder, timeout_s=PIP_S)
    machine.run(
        f"{folder}/bin/pip", "install", "--quiet", "--disable-pip-version-check", "--no-index",
        "--find-links=/wheels", "--find-links=/product", f"semwatch[{','.join(extras)}]=={version}", timeout_s=PIP_S,
    )  # fmt: skip


def put_later_version(machine: Machine, version: str, beside: str) -> None:
    """Make the environment of a later version that takes all but semwatch itself from the one beside it.

    Each further copy of the same packages would cost a minute, and shows nothing about semwatch.
    """
    folder, packages = f"{PREFIX}/{version}", "lib/python3.11/site-packages"
    machine.run("python3", "-m", "venv", folder, timeout_s=PIP_S)
    machine.path(f"{folder}/{packages}/beside.pth").write_text(f"{PREFIX}/{beside}/{packages}\n")
    machine.run(
        f"{folder}/bin/pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps",
        "--ignore-installed", "--find-links=/product", f"semwatch=={version}", timeout_s=PIP_S,
    )  # fmt: skip


def semwatch(machine: Machine, *argv: str, version: str = "current", **options: Any) -> str:
    """Run a semwatch command inside as root; return what it said."""
    return machine.run(f"{PREFIX}/{version}/bin/semwatch", *argv, **options).stdout


def change(machine: Machine, file: str, **changes: object) -> None:
    """Change top-level keys of a settings file; owner and rights stay."""
    path = machine.path(file)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def adapt(machine: Machine) -> None:
    """Settings for tiny models and fast tests: every image has a finding, a rename completes a file."""
    site = yaml.safe_load(machine.path(SITE).read_text())
    folders = [{**folder, "completeness": "rename"} for folder in site["folders"]]
    change(machine, SITE, folders=folders, reconcile_s=2, models={**site["models"], "threads": 1})
    change(machine, RECIPE, gate={"threshold": 0.0})


def drop_in(machine: Machine, unit: str, text: str) -> None:
    """Give a unit a drop-in of the test."""
    folder = machine.path(f"/etc/systemd/system/{unit}.d")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "50-test.conf").write_text(text)
    machine.run("systemctl", "daemon-reload")


def ready(machine: Machine) -> float:
    """Wait until systemd calls daemon and Redis active; return the seconds until the daemon was."""
    waited_s = [_wait_active(machine, unit) for unit in (DAEMON, REDIS)]
    return waited_s[0]


def _wait_active(machine: Machine, unit: str) -> float:
    try:
        return machine.wait_for(lambda: is_active(machine, unit), START_S, f"{unit} to be active")
    except MachineError as error:
        raise MachineError(f"{error}; it said:\n{machine.messages(unit)[-3000:]}") from None


def is_active(machine: Machine, unit: str = DAEMON) -> bool:
    return machine.show(unit, "ActiveState") == "active"


# --- work ------------------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """Files dropped one after another by a thread, as a tool does: written under another name, then renamed."""

    machine: Machine
    n: int
    per_s: float = 25.0
    first: int = 0
    names: list[str] = field(default_factory=list)
    """Of the files dropped so far, relative to the drop folder."""

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._drop_all, name="tool")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(self.n / self.per_s + 60)
        assert not self._thread.is_alive()
        assert len(self.names) == self.n, "the tool could not drop its files"

    def _drop_all(self) -> None:
        start = time.monotonic()
        for i in range(self.n):
            time.sleep(max(0.0, start + i / self.per_s - time.monotonic()))
            name = f"lot{i % 3}/{self.first + i:05d}.png"
            drop(self.machine, name, png(self.first + i))
            self.names.append(name)


def drop(machine: Machine, name: str, data: bytes, folder: str = DROP) -> None:
    """Drop one file."""
    path = machine.path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    partial.rename(path)


def results(machine: Machine, folder: str = RESULTS) -> set[str]:
    """Names of the dropped files that have a result."""
    top = machine.path(folder)
    return {str(path.relative_to(top)).removesuffix(".review.json") for path in top.rglob("*.review.json")}


def wait_results(machine: Machine, n: int, timeout_s: float = WORK_S) -> float:
    """Wait for that many results; return the seconds."""
    try:
        return machine.wait_for(lambda: len(results(machine)) >= n, timeout_s, f"{n} results")
    except MachineError as error:
        said = machine.messages(DAEMON)[-3000:]
        raise MachineError(f"{error}: {len(results(machine))} are there; the daemon said:\n{said}") from None


# --- books -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Books:
    """Files in, results out."""

    files: int
    results: int
    lost: int
    """Files without a result, without an audit line, or without their summary in Redis."""
    doubled: int
    """Results, audit lines, summaries and records beyond the first of each."""
    records: int
    """Unknowns in Redis."""


def books(machine: Machine, names: Iterable[str], timeout_s: float = WORK_S) -> Books:
    """Wait until all files are through, then count and check everything that was written about them."""
    wanted = set(names)
    wait_results(machine, len(wanted), timeout_s)
    machine.wait_for(lambda: _is_delivered(machine, len(wanted)), timeout_s, "all records in Redis")
    kept = _kept(machine)
    lines = [str(line["path"]) for line in _audit_lines(machine) if line["event"] == "reviewed"]
    summaries = [path for _, path in kept["results"]]
    records = [id_ for id_, _ in kept["unknowns"]]
    lost = [wanted - set(kind) for kind in (results(machine), lines, summaries)]
    assert kept["states"] == {"DONE": len(wanted)}, kept["states"]
    assert half_written(machine) == []
    assert audit.verify(machine.path(STATE) / AUDIT).ok
    return Books(
        files=len(wanted),
        results=len(results(machine)),
        lost=len(set().union(*lost)),
        doubled=sum(map(_beyond_first, (lines, summaries, records))) + len(results(machine) - wanted),
        records=len(records),
    )


def half_written(machine: Machine) -> list[str]:
    """Results that are not whole: partial files, and JSON that cannot be read."""
    found = [path for path in machine.path(RESULTS).rglob("*") if path.name.endswith((".tmp", ".partial", ".part"))]
    for path in machine.path(RESULTS).rglob("*.review.json"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            found.append(path)
    return [path.name for path in found]


def _is_delivered(machine: Machine, n: int) -> bool:
    kept = _kept(machine)
    return kept["waiting"] == 0 and len(kept["results"]) >= n and len(_audit_lines(machine)) >= n


def _kept(machine: Machine) -> Mapping[str, Any]:
    argv = ("runuser", "-u", "semwatch", "--", f"{PROGRAMS}/python", "-", SITE)
    done = machine.run(*argv, stdin=_BOOKS, check=False)
    if done.returncode != 0:  # Redis may be on its way up
        return {"states": {}, "waiting": -1, "results": [], "unknowns": [], "error": done.stderr[-500:]}
    kept: Mapping[str, Any] = json.loads(done.stdout)
    return kept


def _audit_lines(machine: Machine) -> list[dict[str, Any]]:
    path = machine.path(STATE) / AUDIT
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line) for line in whole.splitlines()]


def _beyond_first(items: Iterable[str]) -> int:
    return sum(n - 1 for n in Counter(items).values())


def idle_cost(machine: Machine) -> tuple[float, float]:
    """Cost of the daemon without work, at the shipped scan interval: share of one core over IDLE_S, resident MB."""
    change(machine, SITE, reconcile_s=30)
    machine.run("systemctl", "restart", DAEMON)
    time.sleep(SETTLE_S)
    pid = machine.main_pid(DAEMON)
    before, start = _cpu_s(machine, pid), time.monotonic()
    time.sleep(IDLE_S)
    share = (_cpu_s(machine, pid) - before) / (time.monotonic() - start)
    status = machine.run("cat", f"/proc/{pid}/status").stdout
    (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
    return share, int(kilobytes) * 1024 / 1e6


def _cpu_s(machine: Machine, pid: int) -> float:
    fields = machine.run("cat", f"/proc/{pid}/stat").stdout.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100  # USER_HZ, which is 100 wherever Linux shows it
