"""Heads swapped while they are asked: failed requests, labels of the wrong version, latency, time to the first answer.

Once inside one process, where four threads ask encoder and head of one ``Embedded`` about crops that the line itself
cut; once through a running daemon, where four clients drop images and wait for their results. Each begins with a calm
time without a publication, the peer of what follows: four good heads, two bad ones (a file that is no network, though
its hash is right; a probe that the network does not answer so) and a rollback. Good heads are fitted without one class
more each, and every class carries its version in its name: an answer with another version's labels cannot pass. Inside
the process, each answer is also compared with what its version says when asked alone.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import commands
import fresh_crops
from daemon import Daemon, Site, make_site
from semwatch.defects import DEFECT_FREE
from semwatch.intake import decoding
from semwatch.line.pipeline import search
from semwatch.models import choice, model_repository
from semwatch.models.inference import Embedded
from semwatch.models.model_repository import PROBE, Arrays
from semwatch.service.loop import TICK_S
from semwatch.settings.recipe import Recipe
from semwatch.store import serving
from semwatch_training.learning.refit import refit
from semwatch_training.synthetic import lot_images

CALM_S, SWAPPING_S = 30.0, float(os.environ.get("SEMWATCH_SWAP_S", "60"))
CLIENTS = 4
LEFT_OUT = ("scratch", "residue", "bubble")
ROLLBACK_BUDGET_S = 2.0
RESULT_TIMEOUT_S = 120.0
PLAN = ("good", "damaged", "good", "lying", "good", "good", "rollback")


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Heads ready to be published, none of which is in service yet."""

    folders: Sequence[Path]
    """Version folders of good ones."""
    folder: Path
    """Room for the files of the bad ones."""

    def publish(self, repository: Path, kind: str, n: int) -> int:
        """Publish the n-th; ``damaged`` and ``lying`` make a bad one of it."""
        source = self.folders[n % len(self.folders)]
        version = model_repository.latest(repository, "head") + 1
        meta = model_repository.read_meta(source.parents[1], "head", int(source.name))
        meta = meta.model_copy(update={"labels": tuple(named(label, version) for label in meta.labels)})
        weights, probe = source / model_repository.WEIGHTS, source / PROBE
        if kind == "damaged":
            content = weights.read_bytes()
            weights = self.folder / "damaged.onnx"
            weights.write_bytes(content[: len(content) // 2])
        if kind == "lying":
            told = model_repository.read_probe(source.parents[1], "head", int(source.name))
            assert told is not None
            probe = self.folder / PROBE
            model_repository.write_probe(probe, told[0], {**told[1], "logits": told[1]["logits"] * 1.01})
        assert model_repository.publish(repository, meta, weights, beside={PROBE: probe}) == version
        return version


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """One publication or rollback."""

    kind: str
    version: int
    """That shall answer from then on; of a bad head, its own."""
    start: float
    end: float
    """When the process, or the daemon, had taken or refused it."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One request of one client."""

    start: float
    end: float
    version: int = 0
    labels: tuple[str, ...] = ()
    features: NDArray[np.float32] | None = None
    logits: NDArray[np.float32] | None = None
    failed: str | None = None

    @property
    def ms(self) -> float:
        return 1000 * (self.end - self.start)


def named(label: str, version: int) -> str:
    """A class name that says which version it belongs to."""
    return label if label == DEFECT_FREE else f"{label} of {version}"


@pytest.fixture(scope="module")
def heads(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Heads:
    folder = tmp_path_factory.mktemp("heads")
    staged = fresh_crops.copied_models(repository, folder / "staged")
    versions = [1, *(refit(staged, without=[label]).version for label in LEFT_OUT)]
    return Heads([staged / "head" / str(version) for version in versions], folder)


# --- inside one process ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_swap_under_load(repository: Path, heads: Heads, tmp_path: Path) -> None:
    mine = fresh_crops.copied_models(repository, tmp_path / "models")
    with Embedded(mine) as models:
        pages = pages_of_the_line(models)
        with asking(lambda i: ask(models, pages[i % len(pages)])) as asked:
            begun = time.monotonic()
            time.sleep(CALM_S)
            events = list(events_of(mine, heads, serve=lambda version: refreshed(models)))
        refused = set(models.refused())
        bad = {event.version for event in events if event.kind in ("damaged", "lying")}
    failed = [one.failed for one in asked if one.failed is not None]
    wrong = [one for one in asked if one.failed is None and not is_its_versions(one, mine)]
    n_unlike = unlike_alone(mine, asked)
    show("one process, 4 threads: encoder and head, one page's crops", asked, events, begun)
    say_counts(asked, {"failed requests": len(failed), "labels of another version": len(wrong)})
    Console().print(f"answers unlike those of their version asked alone: {n_unlike}; refused: {sorted(refused)}")
    assert failed == []
    assert wrong == []
    assert n_unlike == 0
    assert refused == bad
    assert {one.version for one in asked} == {1, *(e.version for e in events)} - bad


def pages_of_the_line(models: Embedded) -> list[Arrays]:
    """What the encoder is shown of the pages of a lot, as the line cuts it."""
    recipe = Recipe()
    recipe = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"threshold": 0.0})})
    pages: list[Arrays] = []
    for image in lot_images(n=12, seed=3, size_hw=(768, 768), defect_free_share=0.1):
        page = decoding.decode(image.content, name=image.name, max_pixels=1 << 24, max_pages=1)[0]
        found = search(page, recipe, models).candidates
        pages.append(
            {
                "crop": np.stack([one.crop for one in found]),
                "soft_mask": np.stack([one.soft_mask for one in found]),
                "size": np.stack([one.size for one in found]),
            }
        )
    return pages


def ask(models: Embedded, page: Arrays) -> Asked:
    start = time.monotonic()
    features = models.infer("encoder", page).outputs["features"]
    answer = models.infer("head", {"features": features})
    end = time.monotonic()
    return Asked(start, end, answer.version, answer.meta.labels, features, answer.outputs["logits"])


def refreshed(models: Embedded) -> None:
    """Look for another head at the daemon's own beat, until there is one or one is refused."""
    while models.refresh() is None:
        time.sleep(TICK_S)


def is_its_versions(one: Asked, repository: Path) -> bool:
    """Whether the labels are those that were published with the version."""
    return one.labels == model_repository.read_meta(repository, "head", one.version).labels


def unlike_alone(repository: Path, asked: Sequence[Asked]) -> int:
    """Answers that are not what their version says of the same features in peace."""
    n = 0
    for version in {one.version for one in asked if one.failed is None}:
        with Embedded(repository, pins={"head": version}, models=("head",)) as alone:
            for one in (one for one in asked if one.version == version):
                assert one.features is not None
                assert one.logits is not None
                again = alone.infer("head", {"features": one.features}).outputs["logits"]
                n += one.logits.shape != again.shape or not np.allclose(one.logits, again, rtol=1e-4, atol=1e-4)
    return n


# --- a running daemon ------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1200)
def test_swap_of_a_running_daemon(repository: Path, heads: Heads, tmp_path: Path) -> None:
    mine = fresh_crops.copied_models(repository, tmp_path / "models")
    site = make_site(tmp_path / "site", mine, models={"repository": str(mine)})
    images = [image.micrograph.pixels for image in lot_images(n=24, seed=8, size_hw=(768, 768), defect_free_share=0.1)]
    with Daemon(site) as daemon:
        daemon.wait_ready()
        number = count()
        with asking(lambda i: drop_and_wait(site, images[i % len(images)], next(number))) as asked:
            begun = time.monotonic()
            time.sleep(CALM_S)
            events = list(events_of(mine, heads, serve=lambda version: awaited(site, version), site=site))
        under_load = events[-1].end - events[-1].start, seconds_of_the_daemon(site, mine)
        awaited(site, heads.publish(mine, "good", 1))
        start = time.monotonic()
        roll_back(mine, site)
        in_peace = time.monotonic() - start, seconds_of_the_daemon(site, mine)
        assert daemon.stop() == 0
    bad = {event.version for event in events if event.kind in ("damaged", "lying")}
    failed = [one.failed for one in asked if one.failed is not None]
    wrong = [one for one in asked if one.version and not speaks_as(one)]
    show("a running daemon, 4 clients: an image dropped until its result lies there", asked, events, begun)
    say_counts(asked, {"failed requests": len(failed), "labels of another version": len(wrong)})
    table = Table("`semwatch models rollback`", "s", "of 2 s", "of it the daemon, s")
    for name, (seconds, of_it) in (("beside 4 clients", under_load), ("daemon idle", in_peace)):
        table.add_row(name, f"{seconds:.2f}", f"{seconds / ROLLBACK_BUDGET_S:.2f}", f"{of_it:.2f}")
    Console().print(table)
    assert failed == []
    assert wrong == []
    assert set(site.reasons()) == set()
    assert set(serving.announced(site.state)[1]) == bad
    assert bad.isdisjoint(one.version for one in asked)


def drop_and_wait(site: Site, pixels: NDArray[np.uint8], number: int) -> Asked:
    """Drop an image unlike every other; wait for its result."""
    changed = pixels.copy()
    changed[0, :16] = [255 * (number >> bit & 1) for bit in range(16)]
    content = cv2.imencode(".png", changed)[1].tobytes()
    result = site.results / f"{number}.png.review.json"
    start = time.monotonic()
    site.put(f"{number}.png", content)
    while not result.exists():
        if time.monotonic() - start > RESULT_TIMEOUT_S:
            raise TimeoutError(f"no result of image {number}")
        time.sleep(0.01)
    end = time.monotonic()
    record = json.loads(result.read_text())
    verdicts = [defect["verdict"] for page in record["pages"] for defect in page["defects"]]
    labels = {verdict["label"] for verdict in verdicts if verdict["label"]}
    labels |= {near["label"] for verdict in verdicts for near in verdict["nearest"]}
    return Asked(start, end, record["model_versions"].get("head", 0), tuple(sorted(labels)))


def awaited(site: Site, version: int) -> None:
    """Wait until the daemon says that it serves a head, or that it does not."""
    serving.await_version(site.state, "head", version, timeout_s=60)


def seconds_of_the_daemon(site: Site, repository: Path) -> float:
    """From the last withdrawal on disk to the daemon's word that it serves the head before it."""
    withdrawn = max(path.stat().st_mtime for path in (repository / "head").glob(f"*{choice.WITHDRAWN}"))
    return (site.state / serving.ANNOUNCED).stat().st_mtime - withdrawn


def speaks_as(one: Asked) -> bool:
    """Whether all labels are those of the version; the first came without a version in its names."""
    if one.version == 1:
        return not any(" of " in label for label in one.labels)
    return all(label == DEFECT_FREE or label.endswith(f" of {one.version}") for label in one.labels)


# --- both ------------------------------------------------------------------------------------------------------------


@contextmanager
def asking(once: Callable[[int], Asked]) -> Iterator[list[Asked]]:
    """Let the clients ask without pause; what they got is whole at the end."""
    got: list[Asked] = []
    stop = threading.Event()

    def client(first: int) -> None:
        for i in count(first):
            if stop.is_set():
                return
            start = time.monotonic()
            try:
                got.append(once(i))
            except Exception as error:  # noqa: BLE001 - any failure is what is counted
                got.append(Asked(start, time.monotonic(), failed=f"{type(error).__name__}: {error}"))

    clients = [threading.Thread(target=client, args=(3 * i,)) for i in range(CLIENTS)]
    for thread in clients:
        thread.start()
    try:
        yield got
    finally:
        stop.set()
        for thread in clients:
            thread.join(RESULT_TIMEOUT_S)


def events_of(
    repository: Path, heads: Heads, *, serve: Callable[[int], None], site: Site | None = None
) -> Iterator[Event]:
    """Publish by the plan, evenly over the time; the rollback is the command where there is a site."""
    begun, n_good = time.monotonic(), 0
    for i, kind in enumerate(PLAN):
        time.sleep(max(0.0, begun + (i + 0.5) * SWAPPING_S / len(PLAN) - time.monotonic()))
        start = time.monotonic()
        if kind == "rollback":
            version = roll_back(repository, site)
        else:
            n_good += kind == "good"
            version = heads.publish(repository, kind, n_good)
        if kind != "rollback" or site is None:
            serve(version)
        yield Event(kind, version, start, time.monotonic())
        if kind in ("damaged", "lying"):  # as a cycle does with a head that the daemon refused
            choice.withdraw(repository, "head", version, kind)
    time.sleep(max(0.0, begun + SWAPPING_S - time.monotonic()))


def roll_back(repository: Path, site: Site | None) -> int:
    if site is None:
        return choice.roll_back(repository, "head", "benchmark")[1]
    said = commands.spawn("models", "rollback", "head", "--site", site.file, cwd=site.folder)
    assert said.code == 0, said.err
    return serving.announced(site.state)[0]["head"]


def show(title: str, asked: Sequence[Asked], events: Sequence[Event], begun: float) -> None:
    swaps = Table("event", "head", "taken or refused, s", "first answer after, s", title=title)
    for event in events:
        answers = [one.end for one in asked if one.version == event.version and one.end > event.start]
        first = "never, as it should" if event.kind in ("damaged", "lying") and not answers else "-"
        if answers:
            first = f"{min(answers) - event.start:.2f}"
        swaps.add_row(event.kind, str(event.version), f"{event.end - event.start:.2f}", first)
    Console().print(swaps)
    calm = [one.ms for one in asked if one.end < begun + CALM_S]
    during = [one.ms for one in asked if any(one.start < e.end and one.end > e.start for e in events)]
    between = [
        one.ms
        for one in asked
        if one.start > begun + CALM_S and not any(one.start < e.end and one.end > e.start for e in events)
    ]
    latency = Table("requests", "n", "median ms", "p95 ms", "worst ms", "worst / worst when calm")
    for name, ms in (("calm, nothing published", calm), ("during a swap", during), ("between swaps", between)):
        if ms:
            middle, late = np.median(ms), np.percentile(ms, 95)
            row = [str(len(ms)), f"{middle:.0f}", f"{late:.0f}", f"{max(ms):.0f}", f"{max(ms) / max(calm):.2f}"]
            latency.add_row(name, *row)
    Console().print(latency)


def say_counts(asked: Sequence[Asked], counts: Mapping[str, int]) -> None:
    said = "; ".join(f"{name} {n}" for name, n in counts.items())
    by_version = {
        version: sum(one.version == version for one in asked) for version in sorted({a.version for a in asked})
    }
    Console().print(f"{len(asked)} requests, by version {by_version}: {said}", highlight=False)
