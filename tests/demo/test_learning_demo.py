"""The learning demonstration: what it counts, how it names, and once the whole of it, too small to learn anything."""

import csv
import io
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from rich.console import Console

from cluster_files import T0
from factories import make_review, make_verdict
from semwatch.classes import clusters
from semwatch.classes.clusters import Clusters
from semwatch.classes.observations import Observation, learned, observe
from semwatch.classes.register import ClassRegister
from semwatch.defects import Verdict
from semwatch.demo import learning
from semwatch.demo.learning import _counts, _name_clusters, _show, _type_of, run_learning_demo
from semwatch.demo.one_lot import Layout, write_settings
from semwatch.errors import ServiceUnavailable
from semwatch.models import choice, model_repository
from semwatch.models.relabel import relabel
from semwatch.service import rereview
from semwatch.settings.site import Site, load_site
from semwatch.store import results
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.store.review_record import ReviewRecord, to_record
from semwatch.streams import records
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.handoff import Handoff
from semwatch.streams.records import Record
from semwatch.streams.unknowns import connect

UNKNOWN = make_verdict("unknown")
NOVEL = Verdict("novel", "novel-1", 0.9, ())


def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def said(made: Console) -> str:
    assert isinstance(made.file, io.StringIO)
    return made.file.getvalue()


def write_truth(folder: Path, truth: dict[str, list[str]]) -> Path:
    """A lot's labels.csv: a row for each defect, one without a label for an image without any."""
    folder.mkdir(exist_ok=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label"])
        rows.writerows([name, label] for name, labels in truth.items() for label in labels or [""])
    return folder


def reviewed(name: str, *verdicts: Verdict) -> tuple[Path, ReviewRecord]:
    return Path(name), to_record(make_review(len(verdicts), path=name, verdicts=verdicts or None))


# --- counting --------------------------------------------------------------------------------------------------------


def test_lot_without_images_counts_nothing(tmp_path: Path) -> None:
    assert _counts([], write_truth(tmp_path / "lot", {})) == {}


def test_image_counts_once_by_the_best_that_was_said_of_it(tmp_path: Path) -> None:
    right, wrong = make_verdict("known", "scratch"), make_verdict("known", "bridge")
    cases: dict[str, tuple[Verdict, ...]] = {
        "right.png": (wrong, UNKNOWN, right),
        "novel.png": (wrong, UNKNOWN, NOVEL),
        "left.png": (wrong, make_verdict("non-decidable")),
        "wrong.png": (wrong, make_verdict("defect-free")),
        "missed.png": (),
        "harmless.png": (make_verdict("defect-free"),),
    }
    lot = write_truth(tmp_path / "lot", {name: ["scratch", "scratch"] for name in cases})
    counts = _counts([reviewed(name, *verdicts) for name, verdicts in cases.items()], lot)
    assert counts == {"scratch": Counter(images=6, right=1, novel=1, left=1, wrong=1)}


def test_image_of_two_types_counts_for_both_and_types_outside_the_demo_for_none(tmp_path: Path) -> None:
    lot = write_truth(tmp_path / "lot", {"a.png": ["scratch", "void", "bridge"], "b.png": []})
    verdicts = make_verdict("known", "void"), UNKNOWN
    counts = _counts([reviewed("a.png", *verdicts), reviewed("b.png", UNKNOWN)], lot)
    assert counts == {"scratch": Counter(images=1, left=1), "void": Counter(images=1, right=1)}


def test_table_tells_before_and_after_and_what_was_missed() -> None:
    made = console()
    before = {"scratch": Counter(images=4, left=3), "void": Counter(images=2, right=2)}
    after = {"scratch": Counter(images=4, right=3, wrong=1), "residue": Counter(images=4, right=1, novel=3)}
    _show(before, after, made)
    rows = [line.split() for line in said(made).splitlines()]
    assert ["scratch", "1", "4", "0", "0", "3", "0", "1"] in rows
    assert ["scratch", "2", "4", "3", "0", "0", "1", "0"] in rows
    assert ["residue", "2", "4", "1", "3", "0", "0", "0"] in rows
    assert len([row for row in rows if len(row) == 8 and row[1] in "12"]) == 8
    assert "new types named right: 0% before, 50% after" in said(made)


def test_table_of_lots_that_show_no_new_type_is_no_division_by_zero() -> None:
    made = console()
    _show({}, {}, made)
    assert "new types named right: 0% before, 0% after" in said(made)


# --- naming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "n_crops", "label"),
    [
        ({}, 0, None),
        ({}, 5, None),
        ({"scratch": 3, "residue": 2}, 5, "scratch"),
        ({"scratch": 2, "residue": 2}, 4, None),  # half is not more than half
        ({"scratch": 2, "void": 1}, 5, None),
        ({"void": 5}, 5, None),  # the head knows it: nothing new
    ],
)
def test_cluster_gets_the_unseen_type_that_more_than_half_of_its_crops_show(
    shown: dict[str, int], n_crops: int, label: str | None
) -> None:
    assert _type_of(Counter(shown), n_crops) == label


@pytest.fixture
def layout(tmp_path: Path, tiny_repository: Path, server: EmbeddedRedis, client: redis.Redis) -> Layout:
    """A demo after its cycle: the head serves novel-1 and novel-2; nobody has given a name."""
    layout = Layout(tmp_path / "demo")
    layout.drop.mkdir(parents=True)
    repository = shutil.copytree(tiny_repository, layout.folder / "models")
    relabel(repository, {"bridge": "novel-1", "particle": "novel-2"}, {}, utc=T0)
    write_settings(layout, server.url, repository)
    return layout


def learn(site: Site, url: str, groups: list[list[Record]]) -> None:
    """What line and cycle leave: every unknown in the ledger, each group a cluster, the first three of them learned."""
    with Ledger(site.state_dir / LEDGER) as ledger:
        ledger.add_unknowns(rereview.features_of(record for group in groups for record in group), once="a test")
    found = [Observation(tuple(r.id for r in group), len(group), 0.5, "void", 2.0, examples=()) for group in groups]
    ids = [f"novel-{i}" for i in range(1, min(len(groups), 3) + 1)]
    with Handoff(connect(url)) as handoff:
        register = ClassRegister(handoff, site.learning_dir, owner="cycle")
        register.change(lambda _: learned(observe(Clusters(), found, utc=T0), ids, 2, T0))


def crops(path: str, n: int) -> list[Record]:
    found = records.records(make_review(n, path=path, verdicts=[UNKNOWN], sha256=path.encode().hex().rjust(64, "0")))
    return [replace(record, path=path) for record in found]


def test_each_learned_cluster_is_named_by_its_crops_and_a_second_one_of_a_type_is_merged(
    layout: Layout, server: EmbeddedRedis
) -> None:
    site = load_site(layout.site)
    site.state_dir.mkdir()
    learn(
        site,
        server.url,
        [
            [*crops("a.png", 3), *crops("b.png", 2)],  # scratch by 3 of 5
            [*crops("c.png", 4)],  # residue
            [*crops("d.png", 3)],  # scratch once more
            [*crops("e.png", 2)],  # proposed only
        ],
    )
    truth = {"a.png": ["scratch"], "b.png": ["void"], "c.png": ["residue", "residue"], "d.png": ["scratch"]}
    made = console()
    _name_clusters(site, server.url, layout, write_truth(layout.folder / "lot1", {**truth, "e.png": ["residue"]}), made)
    now = clusters.read(site.state_dir)
    assert [(k.id, k.state, k.label) for k in now.clusters] == [
        ("novel-1", "named", "scratch"),
        ("novel-2", "named", "residue"),
        ("novel-3", "merged", "novel-3"),
        ("novel-4", "proposed", "novel-4"),
    ]
    assert now.clusters[2].merged_into == "novel-1"
    head = choice.choice(site.models.repository, "head")
    assert set(model_repository.read_meta(site.models.repository, "head", head).labels) == {
        "scratch", "residue", "defect-free",
    }  # fmt: skip
    rows = [[cell.strip() for cell in re.split(r" {2,}", line)] for line in said(made).splitlines()]
    assert rows[3:] == [
        ["novel-1", "5", "scratch 3, void 2", "scratch"],
        ["novel-2", "4", "residue 4", "residue"],
        ["novel-3", "3", "scratch 3", "merged into novel-1"],
        ["novel-4", "2", "residue 2", "-"],
    ]


def test_command_that_fails_ends_the_demo_with_what_it_said(layout: Layout) -> None:
    with pytest.raises(ServiceUnavailable, match=r"semwatch clusters name novel-9 pit failed:\n.*novel-9"):
        learning._semwatch(layout, "clusters", "name", "novel-9", "pit")


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whole_demo_runs_on_a_handful_of_images_and_says_that_they_are_too_few(
    repository: Path, tmp_path: Path
) -> None:
    made, folder = console(), tmp_path / "demo"
    before = sorted(repository.rglob("*"))
    run_learning_demo(folder=folder, repository=repository, n=4, seed=7, console=made)
    told = said(made)
    assert "the head knows nothing of scratch and residue" in told
    assert "30 are needed: nothing was learned" in told
    assert "new types named right: 0% before, 0% after" in told
    assert "audit log             intact, 8 lines" in told
    assert sorted(repository.rglob("*")) == before
    head = model_repository.read_meta(folder / "models", "head", choice.choice(folder / "models", "head"))
    assert {"scratch", "residue"} & set(head.labels) == set()
    assert {"void", "necking"} <= set(head.labels)
    found = [results.read(path) for path in (folder / "results").rglob("*.review.json")]
    assert len(found) == 8
    assert {label for r in found for p in r.pages for d in p.defects if (label := d.verdict.label)} <= set(head.labels)
