"""KLARFs as manifests of lots, and what is written back, by the whole daemon on real files."""

import json
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from daemon import Site, make_site
from klarf_lots import KLARF, RECIPE, image, klarf, name
from semwatch import klarf as library
from semwatch.operations import lots
from semwatch.service import lots_done
from semwatch.settings.site import load_site
from semwatch.system.clock import moment_of
from service_here import running, wait_for


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lots_done, "INTERVAL_S", 0.1)


def site_with(tmp_path: Path, repository: Path, **klarf_settings: Any) -> Site:
    recipe = {**RECIPE, "klarf": {**KLARF, **klarf_settings}}
    return make_site(tmp_path / "site", repository, recipe=recipe)


def lot_json(site: Site, of: str = "lot7/lot7.001") -> dict[str, Any]:
    return json.loads((site.results / f"{of}.lot.json").read_text())


def revisions(site: Site, folder: Path | None = None) -> list[str]:
    return sorted(path.name for path in (folder or site.results).rglob("*.r?.001"))


def codes(path: Path) -> dict[int, Any]:
    (wafer,) = library.read(path).wafers
    return {defect.id: defect["CLASSNUMBER"] for defect in wafer.defects}


def reasons(record: dict[str, Any]) -> dict[int, str]:
    return {one["id"]: one["reason"] for wafer in record["wafers"] for one in wafer["defects"] if not one["verdict"]}


def test_lot_is_written_back_once_every_image_of_its_klarf_is_judged(tmp_path, tiny_repository) -> None:
    site = site_with(tmp_path, tiny_repository)
    original = klarf([1, 2, 3])
    with running(site):
        for defect in (1, 2):
            site.put(f"lot7/{name(defect).lower()}", image(defect))  # the KLARF spells it in capitals
        site.put("lot7/lot7.001", original)
        wait_for(lambda: len(site.reviews()) == 2)
        assert revisions(site) == []  # the third is not there yet
        site.put(f"lot7/{name(3)}", image(3))
        wait_for(lambda: revisions(site) == ["lot7.r1.001"])
        record = lot_json(site)
    assert (record["revision"], record["lot_id"], record["klarf"]) == (1, "lot 7", ["lot7.r1.001"])
    assert record["missing"] == record["late"] == []
    assert (site.drop / "lot7/lot7.001").read_bytes() == original
    written = (site.results / "lot7/lot7.r1.001").read_bytes()
    (defects,) = (wafer["defects"] for wafer in record["wafers"])
    assert {one["id"]: one["code"] for one in defects if one["code"] is not None} == {
        defect: code for defect, code in codes(site.results / "lot7/lot7.r1.001").items() if code
    }
    for one in defects:  # nothing else has changed
        if one["code"] is not None:
            old = f" {one['id'] % 7} 1 0 2 2 1 30 2 31;".encode()
            original = original.replace(old, old.replace(b" 1 0 2 2", f" 1 {one['code']} 2 2".encode()), 1)
    assert written == original
    for path in site.reviews():
        pages = json.loads(path.read_text())["pages"]
        assert [page["page"] for page in pages] == [0]  # the other is its reference
        assert pages[0]["reference"]["name"] == "page 1"


def test_daemon_without_klarf_in_its_recipe_takes_no_klarf_and_judges_every_page(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository, recipe=RECIPE)
    with running(site):
        site.put("lot7/lot7.001", klarf([1]))
        site.put(f"lot7/{name(1)}", image(1))
        wait_for(site.reviews)
    (review,) = site.reviews()
    assert [page["page"] for page in json.loads(review.read_text())["pages"]] == [0, 1]
    assert list(site.results.rglob("*.lot.json")) == []


# --- images that never come, come late, or cannot be read -------------------------------------------------------------


def test_images_that_have_not_come_by_the_deadline_are_reasons_and_a_late_one_is_another_revision(
    tmp_path, tiny_repository
) -> None:
    site = site_with(tmp_path, tiny_repository, deadline_s=3.0)
    with running(site):
        site.put("lot7/lot7.001", klarf([1, 2, 3, 4]))
        site.put(f"lot7/{name(1)}", image(1))
        site.put(f"lot7/{name(2)}", b"no image at all")
        wait_for(lambda: revisions(site) == ["lot7.r1.001"])
        first = lot_json(site)
        assert first["missing"] == ["lot7/D0003.tif", "lot7/D0004.tif"]
        assert first["why"] == "the deadline has passed"
        why = reasons(first)
        assert set(why) == {2, 3, 4}
        assert "was refused" in why[2]
        assert "D0003.tif has not come" in why[3]
        assert set(codes(site.results / "lot7/lot7.r1.001")) == {1, 2, 3, 4}
        site.put(f"lot7/{name(4)}", image(4))
        wait_for(lambda: revisions(site) == ["lot7.r1.001", "lot7.r2.001"])
        wait_for(lambda: lot_json(site)["revision"] == 2)
        second = lot_json(site)
    assert (second["missing"], second["late"]) == (["lot7/D0003.tif"], ["lot7/D0004.tif"])
    assert second["why"] == "1 defect says something else than in revision 1"
    assert set(reasons(second)) == {2, 3}


def test_klarf_whose_images_never_come_is_done_at_its_deadline_with_a_reason_for_each(
    tmp_path, tiny_repository
) -> None:
    site = site_with(tmp_path, tiny_repository, deadline_s=0.5, no_verdict_code=43)
    with running(site):
        site.put("lot7/lot7.001", klarf([1, 2]))
        wait_for(lambda: revisions(site))
    assert codes(site.results / "lot7/lot7.r1.001") == {1: 43, 2: 43}
    assert set(reasons(lot_json(site))) == {1, 2}


def test_image_that_lies_there_at_the_deadline_is_waited_for_but_not_for_ever(tmp_path, tiny_repository) -> None:
    """After a stop of hours the deadline of a lot may be over before its images have been looked at."""
    recipe = {**RECIPE, "klarf": {**KLARF, "deadline_s": 2.0}}
    site = make_site(
        tmp_path / "site", tiny_repository, recipe=recipe, watched={"completeness": "marker", "steady_s": 0.1}
    )
    with running(site):
        site.put(f"lot7/{name(1)}", image(1))  # whole once its marker is there
        site.put("lot7/lot7.001", klarf([1]))
        site.put("lot7/lot7.001.done", b"")
        wait_for(lambda: revisions(site) == ["lot7.r1.001"])
        first = lot_json(site)
        assert "has not come, or not whole" in reasons(first)[1]
        assert moment_of(first["written_utc"]) - moment_of(first["due_utc"]) >= timedelta(seconds=1)
        site.put(f"lot7/{name(1)}.done", b"")
        wait_for(lambda: len(revisions(site)) == 2)
        wait_for(lambda: reasons(lot_json(site)) == {})


# --- which comes first -----------------------------------------------------------------------------------------------


def test_images_wait_for_their_klarf_and_are_judged_alone_after_a_while(tmp_path, tiny_repository) -> None:
    site = site_with(tmp_path, tiny_repository, wait_s=2.0)
    with running(site):
        site.put(f"lot7/{name(1)}", image(1))
        time.sleep(1.0)
        assert site.reviews() == []
        wait_for(site.reviews)
        (review,) = site.reviews()
        assert [page["page"] for page in json.loads(review.read_text())["pages"]] == [0, 1]  # nobody knew better
        site.put("lot7/lot7.001", klarf([1]))
        wait_for(lambda: revisions(site) == ["lot7.r1.001"])
        pages = json.loads(review.read_text())["pages"]  # judged again, against its reference
        assert [(page["page"], page["reference"]["name"]) for page in pages] == [(0, "page 1")]


def test_klarf_without_end_is_taken_once_it_has_settled(tmp_path, tiny_repository) -> None:
    site = site_with(tmp_path, tiny_repository, settle_s=2.0)
    with running(site):
        site.put(f"lot7/{name(1)}", image(1))
        site.put("lot7/lot7.001", klarf([1], end=""))
        time.sleep(1.0)
        assert list(site.results.rglob("*.lot.json")) == []
        wait_for(lambda: revisions(site) == ["lot7.r1.001"])


def test_corrected_klarf_of_the_same_name_takes_the_place_of_the_first(tmp_path, tiny_repository) -> None:
    site = site_with(tmp_path, tiny_repository)
    with running(site):
        for defect in (1, 2):
            site.put(f"lot7/{name(defect)}", image(defect))
        site.put("lot7/lot7.001", klarf([1]))
        wait_for(lambda: revisions(site) == ["lot7.r1.001"])
        site.put("lot7/lot7.001", klarf([1, 2]))
        wait_for(lambda: revisions(site) == ["lot7.r1.001", "lot7.r2.001"])
        assert lot_json(site)["why"] == "another KLARF came under the same name"
        assert set(codes(site.results / "lot7/lot7.r2.001")) == {1, 2}
        site.put("lot7/lot7.001", klarf([1]))  # and the first again: its content was taken before
        wait_for(lambda: len(revisions(site)) == 3)
        assert set(codes(site.results / "lot7/lot7.r3.001")) == {1}
        site.put("lot7/lot7.001", klarf([1, 1]))  # a bad one leaves the one before in force
        wait_for(site.reasons)
    assert lot_json(site)["revision"] == 3


def test_second_klarf_of_the_lot_stands_beside_the_first_and_its_copy_is_a_duplicate(tmp_path, tiny_repository) -> None:
    site = site_with(tmp_path, tiny_repository)
    with running(site):
        for defect in (1, 2):
            site.put(f"lot7/{name(defect)}", image(defect))
        site.put("lot7/w1.001", klarf([1, 2]))
        site.put("lot7/w2.001", klarf([2, 1]))
        wait_for(lambda: revisions(site) == ["w1.r1.001", "w2.r1.001"])
        site.put("lot7/w3.001", klarf([1, 2]))
        wait_for(lambda: list(site.results.rglob("w3.001.duplicate.json")))
    assert revisions(site) == ["w1.r1.001", "w2.r1.001"]
    assert codes(site.results / "lot7/w1.r1.001") == codes(site.results / "lot7/w2.r1.001")


# --- bad KLARFs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "settings", "reason"),
    [
        (klarf([1], names={1: "../other.tif"}), {}, "line .*below the folder of the KLARF"),
        (klarf([1], names={1: "/etc/passwd.tif"}), {}, "line .*below the folder of the KLARF"),
        (klarf([1], names={1: r"C:\images\a.tif"}), {}, "line .*below the folder of the KLARF"),
        (klarf([1, 2, 1]), {}, "line .*every DEFECTID once"),
        (klarf([1], extra="OrientationMarkLocation LEFT;"), {}, "line .*OrientationMarkLocation once"),
        (klarf([1], step="M2"), {"step_ids": ["M1"]}, "for another recipe: its StepID is 'M2'"),
        (klarf([1]), {"recipe_ids": ["mine"]}, "for another recipe: its recipe is 'tool recipe'"),
        (klarf(range(1, 40)), {"max_defects": 20}, "klarf.max_defects of the recipe is 20"),
        (klarf(range(1, 200)), {"max_mb": 0.01}, "over 0.01; raise klarf.max_mb"),
        (b"FileVersion 1 2;\nDefectRecordSpec 2 DEFECTID X;\nDefectList\n 1 2 3;\nEndOfFile;", {}, "line 4, column 6"),
        (b"\x00\x01\x02 no KLARF EndOfFile;", {}, "cannot be read"),
        (b'FileVersion 1 2;\nWaferID "w";\nEndOfFile;' + b" " * 200, {}, ""),
    ],
    ids=["up", "absolute", "drive", "ids", "orientation", "step", "recipe", "many", "large", "row", "binary", "empty"],
)
def test_bad_klarf_is_put_aside_with_its_reason_and_the_line_goes_on(
    tmp_path, tiny_repository, data: bytes, settings: dict[str, Any], reason: str
) -> None:
    site = site_with(tmp_path, tiny_repository, wait_s=0.0, **settings)
    with running(site):
        site.put("lot7/bad.001", data)
        site.put(f"lot7/{name(1)}", image(1))
        wait_for(site.reviews)
        if not reason:  # a KLARF without any defect is done at once
            wait_for(lambda: list(site.results.rglob("bad.r1.001")))
            return
        wait_for(site.reasons)
    (found,) = site.reasons().values()
    assert re.search(reason, found), found
    assert list(site.results.rglob("*.lot.json")) == []


def test_images_that_are_each_other_s_reference_are_both_judged(tmp_path, tiny_repository) -> None:
    data = klarf([1, 2]).replace(b"2 2 1 30 2 31;", b"2 2 2 30 1 31;", 1).replace(b"D0002.tif", b"D0001.tif")
    site = site_with(tmp_path, tiny_repository)
    with running(site):
        site.put(f"lot7/{name(1)}", image(1))
        site.put("lot7/lot7.001", data)
        wait_for(lambda: revisions(site))
    (review,) = site.reviews()
    pages = json.loads(review.read_text())["pages"]
    assert [(page["page"], page["reference"]["name"]) for page in pages] == [(0, "page 1"), (1, "page 0")]
    assert reasons(lot_json(site)) == {}


def test_klarf_that_is_mended_under_its_name_leaves_no_reason_behind(tmp_path, tiny_repository) -> None:
    site = site_with(tmp_path, tiny_repository)
    with running(site):
        site.put("lot7/lot7.001", klarf([1, 1]))
        wait_for(site.reasons)
        site.put(f"lot7/{name(1)}", image(1))
        site.put("lot7/lot7.001", klarf([1]))
        wait_for(lambda: revisions(site) == ["lot7.r1.001"])
        found = lots.show(load_site(site.file), "lot7")
    assert site.reasons() == {}
    assert (found.refused, found.surplus, found.complete) == (0, (), True)
