import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from daemon import SOURCE, Daemon, make_site
from semwatch.defects import Micrograph
from semwatch.intake import decoding
from semwatch.intake.drop_folder import Arrival
from semwatch.service.references import References, read_reference
from semwatch.settings.recipe import Recipe
from semwatch.settings.site import Folder, Limits
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.system.files import Stamp
from semwatch_training.synthetic.pairs import render_pair

RECIPE = Recipe.model_validate({"reference": {"pattern": "*_ref", "wait_s": 10.0}})


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def known(tmp_path: Path, clock: Clock) -> References:
    folder = Folder.model_validate(
        {"path": tmp_path, "source": "sem1", "recipe": tmp_path / "recipe.yaml", "completeness": "rename"}
    )
    return References({"sem1": folder}, {"sem1": RECIPE}, clock=clock)


def arrival(folder: Path, path: str = "lot/a.png") -> Arrival:
    return Arrival("sem1", path, folder / path, Stamp(1, 1))


def test_image_waits_for_its_reference_until_it_is_there(known, clock, tmp_path) -> None:
    assert known.waits(arrival(tmp_path))
    clock.now = 5.0
    assert known.waits(arrival(tmp_path))
    (tmp_path / "lot").mkdir()
    (tmp_path / "lot/a_ref.png").write_bytes(png(render_pair("BEOL", seed=3, size_hw=(96, 96)).reference)[:500])
    assert known.waits(arrival(tmp_path))  # half written
    (tmp_path / "lot/a_ref.png").write_bytes(png(render_pair("BEOL", seed=3, size_hw=(96, 96)).reference))
    assert not known.waits(arrival(tmp_path))
    given = known.read(arrival(tmp_path))
    assert given is not None
    assert given.name == "a_ref.png"
    assert given.data is not None


def test_image_without_a_reference_is_judged_alone_after_the_wait(known, clock, tmp_path) -> None:
    assert known.waits(arrival(tmp_path))
    clock.now = 10.0
    assert not known.waits(arrival(tmp_path))
    given = known.read(arrival(tmp_path))
    assert given is not None
    assert (given.name, given.data, given.reason) == ("a_ref.png", None, "there is no reference file")


def test_reference_itself_never_waits(known, tmp_path) -> None:
    assert not known.waits(arrival(tmp_path, "lot/a_ref.png"))
    assert known.partner_of(arrival(tmp_path, "lot/a_ref.png")) == "lot/a"
    assert known.read(arrival(tmp_path, "lot/a_ref.png")) is None


def test_reference_is_decoded_once_within_the_limits_of_the_site(known, tmp_path) -> None:
    (tmp_path / "lot").mkdir()
    (tmp_path / "lot/a_ref.png").write_bytes(png(np.full((96, 96), 90, np.uint8)))
    decoded = []

    def decode(data: bytes, **limits: Any) -> tuple[Micrograph, ...]:
        decoded.append(limits)
        return decoding.decode(data, **limits)

    known = References(known._folders, known._recipes, limits=Limits(max_image_mpx=0.01, max_pages=3), decode=decode)
    assert not known.waits(arrival(tmp_path))
    given = known.read(arrival(tmp_path))
    assert given is not None
    assert given.pages is not None
    assert decoded == [{"name": "a_ref.png", "max_pixels": 10_000, "max_pages": 3}]
    again = known.read(arrival(tmp_path))
    assert again is not None
    assert again.pages is None  # of another look, so it is read anew
    assert not known.waits(arrival(tmp_path))
    assert known.read(arrival(tmp_path, "lot/b.png")) is not given
    assert known.read(arrival(tmp_path, "lot/a_ref.png")) is None


def test_reference_behind_a_link_is_none(known, clock, tmp_path) -> None:
    private = tmp_path.with_name("private")
    private.mkdir()
    (private / "a_ref.png").write_bytes(png(np.full((96, 96), 90, np.uint8)))
    (tmp_path / "lot").symlink_to(private)
    assert known.waits(arrival(tmp_path))
    clock.now = 10.0
    assert not known.waits(arrival(tmp_path))
    given = known.read(arrival(tmp_path))
    assert given is not None
    assert (given.data, given.pages) == (None, None)
    assert "behind a link" in given.reason


def test_no_name_is_no_reference() -> None:
    assert read_reference([]) is None


def test_daemon_pairs_files_and_records_the_reference_as_none_of_its_own(tmp_path, tiny_repository) -> None:
    recipe = {"name": "pairs", "gate": {"threshold": 0.0}, "reference": {"pattern": "*_ref", "wait_s": 0.0}}
    site = make_site(tmp_path / "site", tiny_repository, recipe=recipe)
    pair = render_pair("BEOL", seed=1, size_hw=(320, 384), max_shift=0.03, defects=["bridge"])
    site.put("lot/a_ref.png", png(pair.reference))
    site.put("lot/a.png", png(pair.inspected))
    site.put("lot/same.png", png(pair.reference))  # the reference's content is still an image
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: len(site.reviews()) == 2 and "a_ref.png: a reference of lot/a" in daemon.log())
        assert daemon.stop() == 0
    assert [path.name for path in site.reviews()] == ["a.png.review.json", "same.png.review.json"]
    (page,) = json.loads((site.results / "lot/a.png.review.json").read_text())["pages"]
    assert page["reference"]["name"] == "a_ref.png"
    assert page["reference"]["used"]
    assert len(page["defects"]) == 1
    (alone,) = json.loads((site.results / "lot/same.png.review.json").read_text())["pages"]
    assert alone["reference"]["reason"] == "there is no reference file"
    events = [json.loads(line) for line in (site.state / "audit.jsonl").read_text().splitlines()]
    assert [event["of"] for event in events if event["event"] == "reference"] == ["lot/a"]
    with Ledger(site.state / LEDGER, read_only=True) as ledger:
        done = {work.path: work.reason for work in ledger.listing("DONE", limit=10)}
    assert done["lot/a_ref.png"] == "a reference of lot/a, not reviewed by itself"
    assert done["lot/a.png"] is None
    assert SOURCE
