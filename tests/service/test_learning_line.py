"""The daemon's side of learning: heads come, go and are refused while it works, and what it has said is said anew.

Real processes, a real Redis, a real head fitted on what the line itself called unknown; tiny models.
"""

import csv
import json
import shutil
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import redis
import tifffile

from daemon import SOURCE, Daemon, Site, make_site, png
from factories import make_review, make_verdict
from semwatch.defects import Review
from semwatch.errors import ServiceUnavailable
from semwatch.line import pipeline
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.inference import Answer, Embedded
from semwatch.models.model_repository import Arrays
from semwatch.models.relabel import relabel
from semwatch.models.swap import Swap
from semwatch.service import drift, rereview
from semwatch.service.drift import DriftWatch
from semwatch.service.learning_side import EARLY_CYCLE
from semwatch.settings.recipe import Recipe, load_recipe
from semwatch.store import audit, overlay, serving
from semwatch.streams import records
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.handoff import Handoff
from semwatch.streams.unknowns import connect
from semwatch.system import child_server
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.publishing.export import publish_head
from tiny_models import exporting_once

T0 = "2026-01-01T00:00:00Z"
RECIPE = {"name": "test", "gate": {"threshold": 0.0}, "classes": {"mark": {"code": 77}}, "unknown_code": 99}
N_FIRST = 5
SWAP_S = 1.0
"""A published head serves within this."""


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path, exports: Path) -> Path:
    """Head 1 calls every crop of ``png`` unknown; head 2 knows them as novel-1."""
    repository = shutil.copytree(tiny_repository, tmp_path_factory.mktemp("learned") / "models")
    recipe = Recipe.model_validate({"gate": {"threshold": 0.0}})
    with Embedded(repository, threads=1) as models:
        reviews = [
            pipeline.review(
                png(seed), source=SOURCE, path="a", sha256=f"{seed:064x}", recipe=recipe, models=models, reviewed_utc=T0
            )
            for seed in range(16)
        ]
        frozen_width = int(models.meta("encoder").provenance["frozen_width"])
    found = [defect for review in reviews for page in review.pages for defect in page.defects]
    assert {defect.verdict.kind for defect in found} == {"unknown"}
    n = len(found)
    crops = head_bank.Bank(
        np.stack([d.features for d in found]), ("novel-1",) * n, tuple(f"crop {i}" for i in range(n)), ("",) * n
    )
    bank = head_bank.joined([head_bank.read(repository / "head/1" / head_bank.BANK), crops])
    fit = HeadFit(frozen_width=frozen_width, components=8)
    head = fit_head(bank.features, bank.labels, fit, images=range(len(bank)))
    with exporting_once(exports):
        assert publish_head(head, repository, encoder_version=1, provenance={}, bank=bank, golden=crops) == 2
    return repository


def publish_from(folder: Path, repository: Path, *, weights: Path | None = None, **changes: object) -> int:
    """Publish the head of a version folder once more, with another description or other weights."""
    meta = model_repository.read_meta(folder.parents[1], "head", int(folder.name)).model_copy(update=changes)
    beside = {file.name: file for file in folder.glob("*.npz")}
    return model_repository.publish(repository, meta, weights or folder / model_repository.WEIGHTS, beside=beside)


def serves(site: Site, head: int) -> Callable[[], bool]:
    return lambda: serving.announced(site.state)[0].get("head") == head


def result(site: Site, name: str) -> dict[str, Any]:
    return json.loads((site.results / f"{name}.review.json").read_text())


def verdicts(review: dict[str, Any]) -> list[dict[str, Any]]:
    return [defect["verdict"] for page in review["pages"] for defect in page["defects"]]


def audited(site: Site, event: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (site.state / "audit.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def review_one(site: Site, daemon: Daemon, name: str, seed: int) -> dict[str, Any]:
    site.put(name, png(seed))
    daemon.wait_for((site.results / f"{name}.review.json").exists)
    return result(site, name)


# --- one story: five unknown images, a head that knows them, names for it, and a head that is broken ------------------


@dataclass
class Story:
    """What one daemon, and a second one after it, said and left."""

    site: Site
    swap_s: dict[int, float] = field(default_factory=dict)
    """From the publication of a head to its service."""
    reviews: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: str = ""
    results: list[records.ResultSummary] = field(default_factory=list)
    unknowns: list[records.Record] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    announced: list[tuple[dict[str, int], dict[int, str]]] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path, learned: Path) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("story")
    repository = shutil.copytree(tiny_repository, folder / "models")
    port = child_server.free_port()
    with EmbeddedRedis(folder / "redis") as server:
        site = make_site(
            folder / "site", repository, redis_url=server.url, recipe=RECIPE, metrics={"port": port}, reconcile_s=0.5
        )
        told, client = Story(site), redis.Redis.from_url(server.url)
        with Daemon(site) as daemon:
            _unknown_then_novel(told, daemon, client, learned)
            _named(told, daemon, repository)
            _broken(told, daemon, repository, folder)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                told.metrics = answer.read().decode()
            assert daemon.stop() == 0
            told.logs.append(daemon.log())
        with Daemon(site) as daemon:
            told.reviews["restarted"] = review_one(site, daemon, "restarted.png", 106)
            told.announced.append(serving.announced(site.state))
            assert daemon.stop() == 0
            told.logs.append(daemon.log().removeprefix(told.logs[0]))
        told.results = [records.decode_result(fields) for _, fields in client.xrange("semwatch:results")]
        told.unknowns = [records.decode(fields) for _, fields in client.xrange("semwatch:unknowns")]
        client.close()
        yield told


def _unknown_then_novel(told: Story, daemon: Daemon, client: "redis.Redis", learned: Path) -> None:
    site = told.site
    for seed in range(N_FIRST):
        review_one(site, daemon, f"lot/{seed}.png", seed)
    daemon.wait_for(lambda: client.xlen("semwatch:results") == N_FIRST)
    told.reviews["first"] = result(site, "lot/0.png")
    _swap(told, daemon, publish_from(learned / "head/2", site.folder.parent / "models"))
    _await_revision(told, daemon, client, 2)
    told.reviews["revised"] = result(site, "lot/0.png")
    told.reviews["novel"] = review_one(site, daemon, "novel.png", 101)
    daemon.wait_for(lambda: "novel.png" in lot_table(site, ".").get("path", []))


def _named(told: Story, daemon: Daemon, repository: Path) -> None:
    head = relabel(repository, {"novel-1": "stain"}, {"stain": 23}, utc=T0)
    assert head == 3
    _swap(told, daemon, head)
    told.reviews["named"] = review_one(told.site, daemon, "named.png", 102)
    head = relabel(repository, {"stain": "mark"}, {"mark": 24}, utc=T0)
    assert head == 4
    _swap(told, daemon, head)
    told.reviews["in the table"] = review_one(told.site, daemon, "table.png", 103)
    daemon.wait_for(lambda: all(result(told.site, f"lot/{i}.png")["revision"] > 2 for i in range(N_FIRST)), 20)


def _broken(told: Story, daemon: Daemon, repository: Path, folder: Path) -> None:
    (folder / "broken.onnx").write_bytes(b"no network at all")
    head = publish_from(repository / "head/4", repository, weights=folder / "broken.onnx")
    daemon.wait_for(lambda: f"head {head} is refused" in daemon.log())
    told.reviews["beside a broken head"] = review_one(told.site, daemon, "beside.png", 104)
    told.announced.append(serving.announced(told.site.state))


def _swap(told: Story, daemon: Daemon, head: int) -> None:
    start = time.monotonic()
    daemon.wait_for(serves(told.site, head), 20)
    told.swap_s[head] = time.monotonic() - start


def _await_revision(told: Story, daemon: Daemon, client: "redis.Redis", revision: int) -> None:
    site = told.site
    daemon.wait_for(lambda: all(result(site, f"lot/{i}.png")["revision"] == revision for i in range(N_FIRST)), 20)
    daemon.wait_for(lambda: set(lot_table(site, "lot").get("revision", [])) == {str(revision)}, 20)
    daemon.wait_for(lambda: client.xlen("semwatch:results") == N_FIRST * revision, 20)


def lot_table(site: Site, lot: str) -> dict[str, list[str]]:
    """Columns of lot.csv."""
    path = site.results / lot / "lot.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def test_published_head_serves_within_a_second_and_is_announced(story: Story) -> None:
    assert set(story.swap_s) == {2, 3, 4}
    print(f"\nswaps of an idle line: {', '.join(f'{s:.2f}' for s in story.swap_s.values())} s")
    assert statistics.median(story.swap_s.values()) < SWAP_S
    assert all(f"head {head} serves from now on" in story.logs[0] for head in (2, 3, 4))


def test_what_nothing_explains_is_unknown_first_and_the_new_class_after_the_swap(story: Story) -> None:
    first, revised, novel = (story.reviews[name] for name in ("first", "revised", "novel"))
    assert {(v["kind"], v["label"], v["class_code"]) for v in verdicts(first)} == {("unknown", None, 99)}
    assert {(v["kind"], v["label"], v["class_code"]) for v in verdicts(novel)} == {("novel", "novel-1", 99)}
    assert (first["model_versions"]["head"], revised["model_versions"]["head"]) == (1, 2)
    assert {v["kind"] for v in verdicts(revised)} == {"novel"}


def test_revised_result_counts_on_and_every_revision_before_it_is_kept(story: Story) -> None:
    lot = story.site.results / "lot"
    for i in range(N_FIRST):
        kept = [json.loads((lot / f"{i}.png.r{r}.review.json").read_text()) for r in (1, 2)]
        assert [review["model_versions"]["head"] for review in kept] == [1, 2]
    assert story.reviews["first"] == json.loads((lot / "0.png.r1.review.json").read_text())
    assert story.reviews["revised"]["revision"] == 2
    assert story.reviews["revised"]["reviewed_utc"] == story.reviews["first"]["reviewed_utc"]


def test_each_revision_has_one_audit_line_that_says_what_changed(story: Story) -> None:
    lines = [line for line in audited(story.site, "revised") if line["revision"] == 2]
    assert sorted(line["path"] for line in lines) == [f"lot/{i}.png" for i in range(N_FIRST)]
    assert {(c["from"], c["to"]) for line in lines for c in line["changes"]} == {("unknown", "novel-1")}
    assert {line["head"] for line in lines} == {2}
    assert audit.verify(story.site.state / "audit.jsonl").ok


def test_results_stream_tells_every_revision_under_an_id_of_its_own(story: Story) -> None:
    said = [s for s in story.results if s.path == "lot/0.png"]
    assert [s.revision for s in said][:2] == [1, 2]
    assert [dict(s.n_by_kind) for s in said][:2] == [
        {"unknown": len(verdicts(story.reviews["first"]))},
        {"novel": len(verdicts(story.reviews["first"]))},
    ]
    assert len({s.id for s in story.results}) == len(story.results)


def test_new_class_is_drawn_in_its_own_colour_and_listed_in_the_table(story: Story) -> None:
    picture = cv2.imread(str(story.site.results / "novel.png.overlay.png"))
    painted = {kind: int((picture == colour).all(axis=2).sum()) for kind, colour in overlay.COLOURS.items()}
    assert painted["novel"] > 500
    assert painted["unknown"] == 0
    table = lot_table(story.site, ".")
    rows = [i for i, path in enumerate(table["path"]) if path == "novel.png"]
    assert {(table["kind"][i], table["label"][i], table["class_code"][i]) for i in rows} == {("novel", "novel-1", "99")}


def test_new_class_is_not_queued_as_unknown(story: Story) -> None:
    assert {record.path for record in story.unknowns} == {f"lot/{i}.png" for i in range(N_FIRST)}


def test_code_of_a_name_comes_from_the_head_and_from_the_recipes_table_before_it(story: Story) -> None:
    named, in_table = story.reviews["named"], story.reviews["in the table"]
    assert {(v["kind"], v["label"], v["class_code"]) for v in verdicts(named)} == {("known", "stain", 23)}
    assert {(v["kind"], v["label"], v["class_code"]) for v in verdicts(in_table)} == {("known", "mark", 77)}


def test_metrics_count_verdicts_revisions_and_refusals(story: Story) -> None:
    def value(name: str, **labels: str) -> float:
        told = ",".join(f'{key}="{text}"' for key, text in labels.items())
        line = next(line for line in story.metrics.splitlines() if line.startswith(f"semwatch_{name}{{{told}}} "))
        return float(line.split()[-1])

    assert value("swap_refused_total", model="head") == 1
    assert value("model_version", model="head") == 4
    assert value("reviews_total", source=SOURCE, verdict="unknown") == N_FIRST
    assert value("reviews_total", source=SOURCE, verdict="novel") == 1
    assert value("revised_total", source=SOURCE, verdict="novel") == N_FIRST
    n_novel = len(verdicts(story.reviews["novel"]))
    assert value("defects_total", kind="novel", label="novel-1", source=SOURCE) == n_novel


def test_broken_head_is_refused_and_the_one_before_it_goes_on_even_after_a_restart(story: Story) -> None:
    for (versions, refused), log, name in zip(
        story.announced, story.logs, ("beside a broken head", "restarted"), strict=True
    ):
        assert versions == {"detector": 1, "encoder": 1, "head": 4}
        assert set(refused) == {5}
        assert "does not load" in refused[5]
        assert log.count("head 5 is refused, the one before it goes on") == 1
        assert story.reviews[name]["model_versions"]["head"] == 4
        assert {v["label"] for v in verdicts(story.reviews[name])} == {"mark"}


def test_restart_does_not_read_again_what_was_read(story: Story) -> None:
    assert "re-review for heads" in story.logs[0]
    assert "re-review for heads" not in story.logs[1]
    assert rereview.read_marker(story.site.state / rereview.MARKER).heads == {SOURCE: 4}


# --- swaps while files are under way ----------------------------------------------------------------------------------


def pages(n: int, seed: int, file: Path) -> bytes:
    """A TIFF of n pages."""
    encoded = (np.frombuffer(png(seed + i), np.uint8) for i in range(n))
    stack = np.stack([cv2.imdecode(page, cv2.IMREAD_GRAYSCALE) for page in encoded])
    tifffile.imwrite(file, stack, photometric="minisblack")
    return file.read_bytes()


@pytest.mark.parametrize("n_rounds", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_swap_while_files_are_in_flight_leaves_no_label_of_another_head(
    tmp_path: Path, learned: Path, n_rounds: int
) -> None:
    """Single images and files of many pages; every label says which head it comes from."""
    repository = shutil.copytree(learned, tmp_path / "models")
    labels = model_repository.read_meta(repository, "head", 2).labels
    site = make_site(tmp_path / "site", repository)
    n_single, n_many = 12, 3
    took_s = []
    with Daemon(site) as daemon:
        daemon.wait_ready()
        for turn in range(n_rounds):
            for i in range(n_many):
                site.put(f"{turn}/many{i}.tif", pages(12, 1000 * turn + 100 * i, tmp_path / "pages.tif"))
            for i in range(n_single):
                site.put(f"{turn}/{i}.png", png(1000 * turn + 500 + i))
            n_before = len(site.reviews())
            daemon.wait_for(lambda n=n_before: len(site.reviews()) > n)  # the others are under way or wait
            names = tuple(f"{label} v{turn + 3}" for label in labels)
            assert publish_from(repository / "head/2", repository, labels=names) == turn + 3
            start = time.monotonic()
            daemon.wait_for(serves(site, turn + 3), 20)
            took_s.append(time.monotonic() - start)
        daemon.wait_for(lambda: len(site.reviews()) == n_rounds * (n_single + n_many))
        assert daemon.stop() == 0
        assert "waits in its folder" not in daemon.log()
    assert site.reasons() == {}
    by_head = {}
    for path in site.reviews():
        review = json.loads(path.read_text())
        head = review["model_versions"]["head"]
        said = {name for v in verdicts(review) for name in (v["label"], *(n["label"] for n in v["nearest"])) if name}
        suffixes = {name.partition(" ")[2] for name in said}
        assert suffixes == {f"v{head}" if head > 2 else ""}, path
        by_head[head] = by_head.get(head, 0) + 1
    assert len(by_head) >= n_rounds
    print(f"\nswaps beside work: {', '.join(f'{s:.2f}' for s in took_s)} s; files by head: {by_head}")
    assert statistics.median(took_s) < 2 * SWAP_S  # beside work, on a slow machine


class SwappedBetweenPages(Embedded):
    """The embedded runtime; after each of its first ``n_swaps`` answers of the head, the next head comes in."""

    def __init__(self, repository: Path, n_swaps: int) -> None:
        super().__init__(repository, threads=1)
        self._repository_here, self.n_left, self.asked = repository, n_swaps, list[int]()

    def infer(self, model: str, inputs: Arrays, *, backlog: bool = False) -> Answer:
        answer = super().infer(model, inputs, backlog=backlog)
        if model == "head":
            self.asked.append(answer.version)
            if self.n_left:
                self.n_left -= 1
                names = tuple(f"{label.partition(' ')[0]} v{answer.version + 1}" for label in answer.meta.labels)
                version = publish_from(self._repository_here / "head/2", self._repository_here, labels=names)
                assert self.refresh() == Swap("head", version)
        return answer


def review_pages(models: Embedded, tmp_path: Path) -> Review:
    return pipeline.review(
        pages(3, 1, tmp_path / "three.tif"), source=SOURCE, path="three.tif", sha256="0" * 64,
        recipe=Recipe.model_validate({"gate": {"threshold": 0.0}}), models=models, reviewed_utc=T0,
    )  # fmt: skip


@pytest.mark.parametrize("n_swaps", [0, 1, 2])
def test_file_of_many_pages_is_judged_by_one_version_however_often_it_changes(
    tmp_path: Path, learned: Path, n_swaps: int
) -> None:
    with SwappedBetweenPages(shutil.copytree(learned, tmp_path / "models"), n_swaps) as models:
        review = review_pages(models, tmp_path)
        head = review.model_versions["head"]
        assert head == models.versions()["head"] == 2 + n_swaps
        assert models.asked[-3:] == [head] * 3
        names = {near.label for page in review.pages for defect in page.defects for near in defect.verdict.nearest}
        assert {name.partition(" ")[2] for name in names} == {f"v{head}" if n_swaps else ""}


def test_file_during_which_the_head_changes_without_end_waits(tmp_path: Path, learned: Path) -> None:
    with (
        SwappedBetweenPages(shutil.copytree(learned, tmp_path / "models"), 99) as models,
        pytest.raises(ServiceUnavailable, match="a model changed 3 times within one file"),
    ):
        review_pages(models, tmp_path)


# --- at the start -----------------------------------------------------------------------------------------------------


def test_daemon_starts_with_the_pinned_version_and_leaves_it_when_the_pin_goes(tmp_path: Path, learned: Path) -> None:
    repository = shutil.copytree(learned, tmp_path / "models")
    choice.pin(repository, "head", 1)
    site = make_site(tmp_path / "site", repository)
    with Daemon(site) as daemon:
        pinned = review_one(site, daemon, "a.png", 1)
        assert serving.announced(site.state)[0]["head"] == 1
        choice.pin(repository, "head", None)
        daemon.wait_for(serves(site, 2), 20)
        released = review_one(site, daemon, "b.png", 2)
    assert [review["model_versions"]["head"] for review in (pinned, released)] == [1, 2]
    assert [{v["kind"] for v in verdicts(review)} for review in (pinned, released)] == [{"unknown"}, {"novel"}]


def test_daemon_whose_pinned_head_is_broken_does_not_start_and_says_why(tmp_path: Path, learned: Path) -> None:
    repository = shutil.copytree(learned, tmp_path / "models")
    choice.pin(repository, "head", 2)
    (repository / "head/2/model.onnx").write_bytes(b"no network")
    site = make_site(tmp_path / "site", repository)
    with Daemon(site) as daemon:
        assert daemon.process.wait(60) == 3
        assert "not the file that was published" in daemon.log()


# --- drift ------------------------------------------------------------------------------------------------------------


def test_drift_is_logged_counted_kept_over_a_restart_and_asks_for_a_cycle(
    tmp_path: Path, tiny_repository: Path, server: EmbeddedRedis
) -> None:
    """A reference window without one unknown, then a few files of nothing else."""
    port = child_server.free_port()
    site = make_site(tmp_path / "site", tiny_repository, metrics={"port": port}, redis_url=server.url)
    recipe = load_recipe(site.folder / "recipe.yaml")
    watch = DriftWatch()
    ordinary = make_review(1, source=SOURCE, verdicts=[make_verdict("known")], model_versions={"head": 1})
    ordinary = replace(ordinary, recipe_id=recipe.id)
    assert [alarm for _ in range(drift.REFERENCE) for alarm in watch.observe(ordinary)] == []
    site.state.mkdir()
    watch.save(site.state / drift.STATE)
    with Handoff(connect(server.url)) as handoff, Daemon(site) as daemon:
        for seed in range(8):
            review_one(site, daemon, f"{seed}.png", seed)
        daemon.wait_for(lambda: "drift: " in daemon.log())
        daemon.wait_for(lambda: handoff.wishes() != {})
        (wish,) = handoff.wishes().values()
        assert (site.state / EARLY_CYCLE).is_file()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            metrics = answer.read().decode()
        assert daemon.stop() == 0
        assert daemon.log().count("drift: ") == 1
    assert (wish.site, wish.source) == ("site", SOURCE)
    assert "unknown rate rose: 0% in the reference window, 100% in the last" in wish.sentence
    assert f'semwatch_drift_alarms_total{{source="{SOURCE}",what="unknown rate"}} 1.0' in metrics
    assert DriftWatch.load(site.state / drift.STATE).values()[SOURCE, "unknown rate"] >= 1
