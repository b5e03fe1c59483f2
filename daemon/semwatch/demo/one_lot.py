"""The demonstration: own Redis, own daemon as a child process, a lot dropped image by image, verdicts on screen."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.settings.site import IMAGE_SUFFIXES
from semwatch.store import audit, results
from semwatch.store.review_record import ReviewRecord, VerdictRecord
from semwatch.streams import unknowns
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.system import files, terminal
from semwatch.triton import setup
from semwatch.triton.server import LocalTriton

MARKER = ".semwatch-demo"
READY_TIMEOUT_S = 60.0
RESULT_TIMEOUT_S = 60.0
"""Longest wait for the next result before the demo gives up."""
DROP_INTERVAL_S = 0.3
SOURCE = "demo-sem"
RECIPE = "name: demo\n"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a demo keeps its things."""

    folder: Path

    @property
    def lot(self) -> Path:
        """The synthetic lot as generated, with its ground truth."""
        return self.folder / "lot"

    @property
    def drop(self) -> Path:
        """The drop folder."""
        return self.folder / "drop"

    @property
    def results(self) -> Path:
        """Results as the daemon writes them."""
        return self.folder / "results"

    @property
    def site(self) -> Path:
        """Site settings."""
        return self.folder / "site.yaml"


def run_demo(
    *, lot: Path | None, folder: Path, repository: Path, n: int, seed: int, console: Console, triton: Path | None = None
) -> None:
    """Run the demonstration from an empty folder to the table of verdicts.

    Args:
        lot: folder of images to drop; None to generate a synthetic lot with the learning side's command.
        folder: emptied first if an earlier demo made it; refused otherwise.
        repository: model repository.
        n: images of the synthetic lot.
        seed: of the synthetic lot.
        console: where progress and tables go.
        triton: folder of a local Triton server, set up there if it is not; None for the embedded runtime.

    Raises:
        ConfigError: the folder holds something else, the lot is empty, or the learning side is not installed.
        ServiceUnavailable: the daemon did not become ready, died, or stopped giving results.
    """
    layout = Layout(folder.absolute())
    clear(layout)
    if lot is None:
        generate(layout.lot, n=n, seed=seed)
        lot = layout.lot
    images = images_of(lot)
    with EmbeddedRedis(layout.folder / "redis") as redis, _engine(triton, repository, console) as server:
        write_settings(layout, redis.url, repository.absolute(), triton_url=server.url if server else None)
        with running_daemon(layout, console) as daemon:
            reviews = drop_one_by_one(images, layout, daemon, console)
        publisher = unknowns.Publisher(unknowns.connect(redis.url))
        depths = publisher.depths()
    sheet = layout.folder / "contact-sheet.png"
    overlays = [layout.results / SOURCE / f"{record.path}.overlay.png" for _, record in reviews]
    results.contact_sheet(overlays, sheet)
    _show(reviews, truth_of(lot), console)
    verified = audit.verify(layout.folder / "state" / "audit.jsonl", expected_last_seq=len(reviews))
    console.print(f"results and overlays  {layout.results}")
    console.print(f"contact sheet         {sheet}")
    console.print(f"Redis streams         {', '.join(f'{name} {depth.length}' for name, depth in depths.items())}")
    console.print(f"audit log             {'intact' if verified.ok else 'BROKEN'}, {verified.n_lines} lines")


def clear(layout: Layout) -> None:
    """Empty the demo's folder.

    Raises:
        ConfigError: it holds something that no demo made.
    """
    folder = layout.folder
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ConfigError(f"{folder} holds something that no demo made; give another --folder")
    shutil.rmtree(folder, ignore_errors=True)
    layout.drop.mkdir(parents=True)
    (folder / MARKER).touch()


def generate(folder: Path, *, n: int, seed: int, options: Sequence[str] = ()) -> None:
    """Write a synthetic lot with the learning side's command.

    Raises:
        ConfigError: the learning side is not installed.
    """
    command = [sys.executable, "-m", "semwatch_training", "synth", "--out", str(folder), "--n", str(n)]
    try:
        subprocess.run([*command, "--seed", str(seed), *options], check=True, timeout=600)
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            "no synthetic lot could be made: install the learning side with `pip install 'semwatch[train]'`, or give a "
            "folder of images with --lot"
        ) from error


def images_of(lot: Path) -> list[Path]:
    """Images of a folder, in the order of their names.

    Raises:
        ConfigError: there is none.
    """
    found = sorted(path for path in lot.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES) if lot.is_dir() else []
    if not found:
        raise ConfigError(f"{lot} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return found


@contextmanager
def _engine(folder: Path | None, repository: Path, console: Console) -> Iterator[LocalTriton | None]:
    """The Triton server that a demo runs on; None for the embedded runtime."""
    if folder is None:
        yield None
        return
    start = time.monotonic()
    setup.set_up(folder)
    with LocalTriton(folder, repository) as server:
        console.print(f"Triton ready after {time.monotonic() - start:.1f} s, log {server.log}", highlight=False)
        yield server


def write_settings(layout: Layout, redis_url: str, repository: Path, *, triton_url: str | None = None) -> None:
    """Write site and recipe of the demo."""
    (layout.folder / "recipe.yaml").write_text(RECIPE)
    folder = {"path": "drop", "source": SOURCE, "recipe": "recipe.yaml", "completeness": "rename"}
    site = {
        "folders": [folder],
        "results_dir": "results",
        "state_dir": "state",
        "models": {"repository": str(repository), **_runtime(triton_url)},
        "redis": {"url": redis_url},
    }
    layout.site.write_text(yaml.safe_dump(site, sort_keys=False))


def _runtime(triton_url: str | None) -> dict[str, object]:
    return {} if triton_url is None else {"runtime": "triton", "triton": {"url": triton_url}}


@contextmanager
def running_daemon(layout: Layout, console: Console) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon as systemd would run it: ready by notification, stopped by SIGTERM."""
    address = str(layout.folder / "notify")
    start = time.monotonic()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener, (layout.folder / "daemon.log").open("wb") as log:
        listener.bind(address)
        command = [sys.executable, "-m", "semwatch", "run", "--site", str(layout.site), "--verbose"]
        process = subprocess.Popen(command, env={**os.environ, "NOTIFY_SOCKET": address}, stderr=log, stdout=log)
        try:
            _wait_ready(listener, process, log.name)
            console.print(f"daemon ready after {time.monotonic() - start:.1f} s", highlight=False)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(listener: socket.socket, process: subprocess.Popen[bytes], log: str) -> None:
    listener.settimeout(0.2)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if b"READY=1" in listener.recv(4096):
                return
        except TimeoutError:
            continue
    raise ServiceUnavailable(f"the daemon did not become ready; it said:\n{Path(log).read_text()[-2000:]}")


def drop_one_by_one(
    images: Sequence[Path], layout: Layout, daemon: subprocess.Popen[bytes], console: Console
) -> list[tuple[Path, ReviewRecord]]:
    """Drop the images one by one, as a tool does, and collect their results as they come."""
    found: dict[Path, ReviewRecord] = {}
    waiting = list(images)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    last_news = time.monotonic()
    with Progress(*columns, console=console) as progress:
        dropped, reviewed = (
            progress.add_task("dropped ", total=len(images)),
            progress.add_task("reviewed", total=len(images)),
        )
        while len(found) < len(images):
            if waiting:
                image = waiting.pop(0)
                files.write_whole(layout.drop / image.name, image.read_bytes())
                progress.update(dropped, advance=1)
            for image in images:
                path = layout.results / SOURCE / f"{image.name}.review.json"
                if image not in found and path.exists():
                    found[image] = results.read(path)
                    progress.update(reviewed, advance=1)
                    last_news = time.monotonic()
            if daemon.poll() is not None or time.monotonic() - last_news > RESULT_TIMEOUT_S:
                raise ServiceUnavailable(f"no more results; the daemon's log is {layout.folder / 'daemon.log'}")
            time.sleep(DROP_INTERVAL_S)
    return [(image, found[image]) for image in images]


def truth_of(lot: Path) -> dict[str, list[str]]:
    """True labels by file name, where the lot brings a labels.csv."""
    table = lot / "labels.csv"
    truth: dict[str, list[str]] = {}
    if table.exists():
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                truth.setdefault(row["file"], []).append(row["label"])
    return truth


def _show(reviews: Sequence[tuple[Path, ReviewRecord]], truth: dict[str, list[str]], console: Console) -> None:
    columns = ["image", "score", "gate", "verdicts", *(["truth"] if truth else []), "ms"]
    rows = []
    for image, record in reviews:
        page = record.pages[0]
        verdicts = _verdicts_in_a_line([defect.verdict for defect in page.defects])
        if flags := ", ".join(flag.name for flag in page.quality.flags):
            verdicts = f"{verdicts} [red]{flags}[/]" if page.quality.is_image else f"[red]no image: {flags}[/]"
        cells: list[str | Text] = [
            image.name,
            "-" if page.image_score is None else f"{page.image_score:.3f}",
            f"{page.gate_threshold:.3f}",
            Text.from_markup(verdicts),
        ]
        if truth:
            cells.append(", ".join(label for label in truth.get(image.name, []) if label) or "defect-free")
        rows.append([*cells, f"{sum(record.timings_ms.values()):.0f}"])
    terminal.print_table(console, columns, rows, title="verdicts", right=(1, 2, len(columns) - 1))


def _verdicts_in_a_line(verdicts: Sequence[VerdictRecord]) -> str:
    """The verdicts of one page in a line: named defects with their confidence, the others counted."""
    named = [f"[green]{v.label} {v.confidence:.2f}[/]" for v in verdicts if v.kind in ("known", "novel")]
    colours = {"unknown": "magenta", "non-decidable": "yellow"}
    for kind, colour in colours.items():
        if n := sum(v.kind == kind for v in verdicts):
            named.append(f"[{colour}]{n} {kind}[/]")
    return ", ".join(named) or "[dim]defect-free[/]"
