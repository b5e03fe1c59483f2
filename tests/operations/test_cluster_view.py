"""What a person sees of a cluster before deciding: captions, hints, one picture, and what a step will change."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import redis

from cluster_files import ids
from commands import Command
from daemon import SOURCE
from little_site import UTC, LittleSite, little_site
from semwatch.classes import clusters
from semwatch.classes.clusters import Clusters
from semwatch.operations import cluster_view, correct, decide
from semwatch.settings.site import Site, load_site
from semwatch.store import results
from semwatch.store.corrections import Correction
from semwatch.store.ledger import Ledger
from semwatch.store.unknown_features import UnknownFeatures
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.handoff import Handoff

MEMBERS = ids(*range(10, 16))
"""Records of novel-2."""


@pytest.fixture
def there(tmp_path: Path, tiny_repository: Path, client: redis.Redis, server: EmbeddedRedis) -> LittleSite:
    """Members of novel-2 are defects 1 to 3 of two images; two examples are shown."""
    made = little_site(tmp_path, tiny_repository, client, server.url)
    with Ledger(made.site.state / "ledger.sqlite") as ledger:
        kept = [
            UnknownFeatures(
                id_, UTC, SOURCE, made.images[i // 3], "0" * 64, 0, i % 3 + 1, (0, 0, 9, 9), "0" * 16, "e", b""
            )
            for i, id_ in enumerate(MEMBERS)
        ]
        ledger.add_unknowns(kept, once="test")
    rng = np.random.default_rng(0)
    pictures = [cv2.imencode(".png", rng.integers(0, 256, (64, 64), np.uint8))[1].tobytes() for _ in range(2)]
    Handoff(client).put_examples("novel-2", dict(zip(MEMBERS[:2], pictures, strict=True)))
    return made


@pytest.fixture
def site(there: LittleSite) -> Site:
    return load_site(there.site.file)


def cluster(site: Site, name: str = "novel-2") -> clusters.Cluster:
    return clusters.find(decide.found_classes(site), name)


def test_examples_have_image_score_nearest_class_and_what_a_person_said(there: LittleSite, site: Site) -> None:
    shown = cluster_view.look(site, cluster(site))
    first, second = shown.crops
    record = results.read(results.review_path(site.results_dir, SOURCE, there.images[0]))
    defects = record.pages[0].defects
    assert [crop.number for crop in shown.crops] == [1, 2]
    assert first.image == f"{SOURCE}/{there.images[0]}"
    assert second.image == f"{SOURCE}/{there.images[0]} #2"
    for crop, defect in zip((first, second), defects, strict=False):
        near = defect.verdict.nearest[0]
        assert (crop.peak_score, crop.nearest, crop.probability, crop.p_value) == (
            defect.peak_score, near.label, near.probability, near.p_value
        )  # fmt: skip
    assert (first.human, second.human) == ("particle", None)
    assert sum(shown.nearest.values()) == 6
    assert shown.people == {"particle": 1, "not-a-defect": 1}
    assert shown.hints[-1] == "people gave its crops different labels: particle (1), not-a-defect (1)"


def test_picture_has_a_caption_below_each_crop(site: Site) -> None:
    shown = cluster_view.look(site, cluster(site))
    assert shown.sheet is not None
    sheet = cv2.imread(str(shown.sheet), cv2.IMREAD_GRAYSCALE)
    tile, strip = cluster_view.TILE_PX, sheet.shape[0] - cluster_view.TILE_PX
    assert sheet.shape == (tile + strip, 2 * tile)
    assert strip > 30
    for column in range(2):
        caption = sheet[tile:, column * tile : (column + 1) * tile]
        assert (caption > 120).sum() > 100  # words
        assert (caption[:, -2:] < 60).all()  # which end within the tile
    assert cluster_view.caption_of(shown.crops[0]) == ("1  defect_0000_topdown.png", "a person: particle")


def test_cluster_whose_results_are_elsewhere_shows_what_there_is(site: Site) -> None:
    shown = cluster_view.look(site, cluster(site, "novel-3"))
    assert [(crop.id, crop.image, crop.nearest) for crop in shown.crops] == [(id_, "", None) for id_ in ids(16, 17)]
    assert (shown.nearest, shown.people, shown.sheet) == ({}, {}, None)


def test_mixed_crops_are_pointed_out(there: LittleSite, site: Site) -> None:
    """Half of the crops are near to another class than the others."""
    path = results.review_path(site.results_dir, SOURCE, there.images[1])
    data = json.loads(path.read_text())
    for defect in data["pages"][0]["defects"]:
        defect["verdict"]["nearest"][0]["label"] = "scratch"
    path.write_text(json.dumps(data))
    (hint, _) = cluster_view.look(site, cluster(site)).hints
    assert hint.startswith("3 of 6 crops are near to another class than the others: ")
    assert "scratch (3)" in hint


OF = "6 crops of novel-2"
STEPS: dict[str, Callable[[Site], decide.Step]] = {
    f"{OF}: the class novel-2 is called void, code 12": lambda site: decide.naming(site, "novel-2", "void", 12),
    f"{OF} become crops of particle; the class": lambda site: decide.merging(site, "novel-2", "particle"),
    f"{OF} become crops of novel-1 (novel-1, 10 crops)": lambda site: decide.merging(site, "novel-2", "novel-1"),
    f"{OF} become 3 classes": lambda site: decide.splitting("novel-2", 3),
    f"{OF} are no class": lambda site: decide.rejecting("novel-2"),
    "novel-2 loses 1 crop and keeps 5": lambda site: decide.removing("novel-2", ["1"]),
}


@pytest.mark.parametrize("words", STEPS)
def test_each_step_says_what_it_will_change_and_changes_nothing(site: Site, words: str) -> None:
    step = STEPS[words]
    before = decide.found_classes(site)
    lines = cluster_view.preview(site, step(site))
    assert words in lines[0]
    if "classes" not in words:
        assert "6 of its records will be judged again once a head changes" in lines
    assert decide.found_classes(site) == before


def test_undo_says_whose_step_counts_no_more(site: Site) -> None:
    decide.name(site, "novel-2", "void")
    by = decide.found_classes(site).decisions[-1].by
    (line, *_) = cluster_view.preview(site, decide.undoing(site, None))
    assert line.startswith(f"the name of novel-2 by {by} (")
    assert line.endswith("counts no more: 6 crops, proposed again")


def test_results_that_carry_the_name_are_counted(there: LittleSite, site: Site) -> None:
    def learned_as_particle(c: Clusters) -> Clusters:
        return c.model_copy(update={"clusters": tuple(
            k.model_copy(update={"label": "particle", "state": "named"}) if k.id == "novel-1" else k for k in c.clusters
        )})  # fmt: skip

    before = learned_as_particle(decide.found_classes(site))
    after = decide.rejecting("novel-1")(before, "ana", UTC)
    with correct.open_index(site.state_dir / "results.sqlite") as index:
        index.refresh(site.results_dir, f"{SOURCE}/{Path(there.images[0]).parent}")
    assert "1 defect in the results so far is called particle" in cluster_view.effect(site, before, after)


# --- the command -----------------------------------------------------------------------------------------------------


def test_person_at_a_terminal_is_asked_and_no_is_no(
    semwatch: Command, there: LittleSite, site: Site, monkeypatch
) -> None:
    from semwatch.cli import options

    argv = ("clusters", "reject", "novel-2", "--site", there.site.file)
    monkeypatch.setattr(options.out, "_force_terminal", True)
    for answer, code in (("n\n", 1), ("y\n", 0)):
        monkeypatch.setattr(sys, "stdin", Typed(answer))
        said = semwatch(*argv)
        assert said.code == code
        assert "are no class" in said.words
        assert cluster(site).state == ("proposed" if code else "rejected")


def test_nobody_is_asked_where_nobody_sits_or_yes_was_said(semwatch: Command, there: LittleSite, site: Site) -> None:
    said = semwatch("clusters", "reject", "novel-2", "--site", there.site.file)
    assert (said.code, cluster(site).state) == (0, "rejected")
    assert "what looks like them is not proposed again; no head has learned it" in said.words
    said = semwatch("clusters", "undo", "--yes", "--site", there.site.file)
    assert (said.code, cluster(site).state) == (0, "proposed")
    assert "the reject of novel-2 is taken back" in said.words
    said = semwatch("clusters", "undo", "--site", there.site.file)
    assert (said.code, "nobody has decided anything: nothing to undo" in said.words) == (2, True)


def test_show_as_json_has_all_that_the_screen_has(semwatch: Command, there: LittleSite) -> None:
    told = semwatch("clusters", "show", "novel-2", "--site", there.site.file, "--json").json
    assert [crop["number"] for crop in told["crops"]] == [1, 2]
    assert told["crops"][0]["image"] == f"{SOURCE}/{there.images[0]}"
    assert Path(told["sheet"]).is_file()
    words = semwatch("clusters", "show", "novel-2", "--site", there.site.file).words
    assert "people say particle 1, not-a-defect 1" in words
    assert f"crop 1 image {SOURCE}/{there.images[0]} score" in words  # in blocks: the path is too long for a row


class Typed:
    """A terminal at which somebody types one line."""

    def __init__(self, line: str) -> None:
        self._line = line

    def isatty(self) -> bool:
        return True

    def readline(self, *_: object) -> str:
        return self._line


def test_correction_shows_beside_the_crop(there: LittleSite, site: Site) -> None:
    with Ledger(site.state_dir / "ledger.sqlite", read_only=True) as ledger:
        work = ledger.find(part=there.images[1])[0][1]
    correct.correct(site, work, [Correction(0, "void", 2)], is_new_label=True)
    assert cluster_view.look(site, cluster(site)).people == {"particle": 1, "not-a-defect": 1, "void": 1}
