"""What is written back for a lot, where to, and how later revisions come about; by the whole daemon on real files."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from daemon import SOURCE, Site, make_site
from klarf_lots import KLARF, RECIPE, image, klarf, name
from semwatch import klarf as library
from semwatch.errors import ConfigError
from semwatch.operations import correct, lots, requeue
from semwatch.service import lots_done
from semwatch.service.loop import Service
from semwatch.settings.site import load_site
from semwatch.store.corrections import Correction
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.store.manifests import KEPT, LotRevision
from service_here import running, wait_for


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lots_done, "INTERVAL_S", 0.1)
    monkeypatch.setattr(lots_done, "RETRY_S", 0.5)


def site_with(tmp_path: Path, repository: Path, **klarf_settings: Any) -> Site:
    recipe = {**RECIPE, "klarf": {**KLARF, **klarf_settings}}
    return make_site(tmp_path / "site", repository, recipe=recipe)


def drop_lot(site: Site, *defects: int) -> None:
    for defect in defects:
        site.put(f"lot7/{name(defect)}", image(defect))
    site.put("lot7/lot7.001", klarf(defects))


def record(site: Site) -> dict[str, Any]:
    return json.loads((site.results / "lot7/lot7.001.lot.json").read_text())


def codes(path: Path, column: str = "CLASSNUMBER") -> dict[int, Any]:
    return {one.id: one[column] for wafer in library.read(path).wafers for one in wafer.defects}


def delivered(site: Site) -> list[LotRevision]:
    with Ledger(site.state / LEDGER, read_only=True) as ledger:
        return ledger.manifests.done_after(0)


def test_outbox_gets_the_klarf_and_waits_for_its_share(tmp_path, tiny_repository) -> None:
    outbox = tmp_path / "share"
    site = site_with(tmp_path, tiny_repository, outbox=str(outbox), form="partial", target_column="AUTOOFFSEMCLASS")
    with running(site):
        drop_lot(site, 1, 2)
        wait_for((site.results / "lot7/lot7.001.lot.json").exists)
        assert delivered(site) == []  # others hear of a lot only when its KLARF lies there
        outbox.mkdir()
        wait_for(lambda: delivered(site))
    place = outbox / SOURCE / "lot7/lot7.r1.001"
    assert [path for path in outbox.rglob("*") if path.is_file()] == [place]
    assert library.read(place).wafers[0].defects.columns == ("DEFECTID", "AUTOOFFSEMCLASS")
    (one,) = delivered(site)
    assert (one.path, one.about["lot_id"], one.files[-1].place) == ("lot7/lot7.001", "lot 7", str(place))
    assert one.counts["defects"] == 2
    assert [path.suffix for path in (site.state / KEPT).iterdir()] == [".klarf"]  # of what was read alone


@pytest.mark.parametrize("outbox", ["drop", "drop/out"])
def test_outbox_in_a_drop_folder_is_refused(tmp_path, tiny_repository, outbox: str) -> None:
    site = site_with(tmp_path, tiny_repository, outbox=outbox)
    with pytest.raises(ConfigError, match=r"klarf\.outbox lies in the drop folder"):
        Service(load_site(site.file))


def test_word_of_a_person_is_a_new_revision_that_says_so(tmp_path, tiny_repository) -> None:
    site = site_with(tmp_path, tiny_repository)
    settings = load_site(site.file)
    with running(site):
        drop_lot(site, 1, 2)
        wait_for(lambda: delivered(site))
        with Ledger(site.state / LEDGER, read_only=True) as ledger:
            work = next(work for _, work in ledger.find(part=name(1)))
        first = (site.results / "lot7/lot7.r1.001").read_bytes()
        correct.correct(settings, work, [Correction(0, "particle", box_xyxy=(40, 40, 50, 50))])
        wait_for(lambda: len(delivered(site)) == 2)
        assert codes(site.results / "lot7/lot7.r2.001")[1] == 10
        assert record(site)["why"] == "1 defect says something else than in revision 1, 1 by people"
        (one,) = (one for one in record(site)["wafers"][0]["defects"] if one["id"] == 1)
        assert (one["by"], one["label"], one["code"]) == ("person", "particle", 10)
        # Judged again, the word of the person stands, and nothing is written that says the same.
        with Ledger(site.state / LEDGER, exclusive=False) as ledger:
            assert requeue.review_again(settings, ledger, "lot7").queued == 2
        wait_for(lambda: _all_done_and_looked_at(site))
    assert len(delivered(site)) == 2
    assert (site.results / "lot7/lot7.r1.001").read_bytes() == first
    audit = [json.loads(line) for line in (site.state / "audit.jsonl").read_text().splitlines()]
    assert [(one["revision"], one["why"]) for one in audit if one["event"] == "lot"] == [
        (1, "every defect has a verdict or a reason"),
        (2, "1 defect says something else than in revision 1, 1 by people"),
    ]


def _all_done_and_looked_at(site: Site) -> bool:
    with Ledger(site.state / LEDGER, read_only=True) as ledger:
        is_all_done = {n for n, count in ledger.counts().items() if count} == {"DONE"}
        return is_all_done and not ledger.manifests.to_look_at("")


def test_image_that_is_replaced_after_the_lot_was_done_is_another_revision(tmp_path, tiny_repository) -> None:
    site = site_with(tmp_path, tiny_repository)
    with running(site):
        drop_lot(site, 1)
        wait_for(lambda: delivered(site))
        site.put(f"lot7/{name(1)}", b"broken now")
        wait_for(lambda: len(delivered(site)) == 2)
    (one,) = record(site)["wafers"][0]["defects"]
    assert "was refused" in one["reason"]
    assert codes(site.results / "lot7/lot7.r2.001") == {1: 0}


def test_file_that_lies_where_a_revision_belongs_is_never_overwritten(tmp_path, tiny_repository) -> None:
    site = site_with(tmp_path, tiny_repository)
    (site.results / "lot7").mkdir(parents=True)
    (site.results / "lot7/lot7.r1.001").write_bytes(b"of an earlier ledger")
    with running(site):
        drop_lot(site, 1)
        wait_for(lambda: delivered(site))
    assert (site.results / "lot7/lot7.r1.001").read_bytes() == b"of an earlier ledger"
    assert codes(site.results / "lot7/lot7.r2.001").keys() == {1}
    assert record(site)["revision"] == 2


def test_recipe_that_gets_a_klarf_section_while_the_daemon_runs_takes_the_klarfs_that_lie_there(
    tmp_path, tiny_repository
) -> None:
    site = make_site(tmp_path / "site", tiny_repository, recipe=RECIPE)
    with running(site):
        drop_lot(site, 1, 2)
        wait_for(lambda: len(site.reviews()) == 2)
        recipe = {**RECIPE, "klarf": KLARF}
        (site.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        wait_for(lambda: delivered(site))
    again = json.loads((site.results / f"lot7/{name(1)}.review.json").read_text())
    assert again["revision"] == 2
    assert [page["reference"]["name"] for page in again["pages"]] == ["page 1"]


def test_reference_in_a_file_of_its_own_is_waited_for_and_used(tmp_path, tiny_repository) -> None:
    nested = (
        b'Record FileRecord "1.8" {\n Record LotRecord "lot 7" {\n  Record WaferRecord "w1" {\n   List DefectList {\n'
        b"    Columns 3 { int32 DEFECTID, int32 CLASSNUMBER, ImageList Images }\n    Data 1 {\n"
        b'     1 0 Images 2 { "a.tif" "TIF" 1 "30", "ref.tif" "TIF" 2 "31" };\n    }\n   }\n  }\n }\n}\nEndOfFile;\n'
    )
    site = site_with(tmp_path, tiny_repository)
    with running(site):
        site.put("lot7/lot7.001", nested)
        site.put("lot7/A.TIF", image(1))
        site.put("lot7/ref.tif", image(2))
        wait_for(lambda: delivered(site))
    (review,) = site.reviews()
    pages = json.loads(review.read_text())["pages"]
    assert [(page["page"], page["reference"]["name"]) for page in pages] == [(0, "ref.tif, page 1")]


def test_lot_names_what_is_expected_missing_and_surplus(tmp_path, tiny_repository) -> None:
    site = site_with(tmp_path, tiny_repository, wait_s=1.0)
    settings = load_site(site.file)
    with running(site):
        drop_lot(site, 1, 2)
        site.put("lot7/other.tif", image(9))
        wait_for(lambda: delivered(site) and len(site.reviews()) == 3)
        site.put("lot7/w2.001", klarf([1, 30], lot="lot 7"))
        wait_for(lambda: len(lots.show(settings, "lot7").klarfs) == 2)
        found = lots.show(settings, "lot 7")  # by its LotID
    first, second = found.klarfs
    assert not found.complete
    assert found.surplus == ("lot7/other.tif",)
    assert (first.klarf, first.defects, first.images, first.reviewed, first.missing) == ("lot7/lot7.001", 2, 2, 2, ())
    assert first.wafers == ("w1 (slot 3)",)
    assert first.done_utc
    assert first.is_delivered
    assert (second.arrived, second.missing, second.done_utc) == (1, (f"lot7/{name(30)}",), None)


def test_copies_that_a_dead_process_left_go_at_the_next_start(tmp_path, tiny_repository) -> None:
    site = site_with(tmp_path, tiny_repository)
    (site.state / KEPT).mkdir(parents=True)
    left, other = site.state / KEPT / "7.r2.1", site.state / KEPT / "7.r2.txt"
    for path in (left, other):
        path.write_bytes(b"x")
    with running(site):
        wait_for(lambda: not left.exists())
    assert other.exists()


def test_journal_names_lot_step_and_wafer_of_an_image_that_a_klarf_names(
    tmp_path: Path, tiny_repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = site_with(tmp_path, tiny_repository, wait_s=1.0)
    drop_lot(site, 1)
    site.put("other/x.tif", image(9))
    with caplog.at_level("INFO"), running(site):
        wait_for(lambda: len(site.reviews()) == 2)
    entries = [record.journal for record in caplog.records if hasattr(record, "journal")]
    (named,) = [one for one in entries if one.get("EVENT") == "reviewed" and one["IMAGE"] == f"lot7/{name(1)}"]
    assert {key: named[key] for key in ("LOT_ID", "STEP", "WAFER", "SLOT")} == {
        "LOT_ID": "lot 7", "STEP": "M1", "WAFER": "w1", "SLOT": "3",
    }  # fmt: skip
    (other,) = [one for one in entries if one.get("EVENT") == "reviewed" and one["IMAGE"] == "other/x.tif"]
    assert "WAFER" not in other
