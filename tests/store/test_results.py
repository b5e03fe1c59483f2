import dataclasses
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import jsonschema
import numpy as np
import pytest

from factories import KINDS, make_review, make_verdict
from paths import ROOT
from semwatch.defects import Quality, QualityFlag, Reference, Review, Verdict, VerdictKind
from semwatch.errors import ConfigError, ImageError, ServiceUnavailable
from semwatch.store import lot_table, results, review_record
from semwatch.store.corrections import Correction, corrected


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def changed_defect(review: Review, **changes: Any) -> Review:
    page = review.pages[0]
    defects = (dataclasses.replace(page.defects[0], **changes), *page.defects[1:])
    return dataclasses.replace(review, pages=(dataclasses.replace(page, defects=defects), *review.pages[1:]))


@contextmanager
def disk_that_ends_at(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- the record ----------------------------------------------------------------------------------------------------


def test_clean_image_gives_a_defect_free_record() -> None:
    record = review_record.to_record(make_review(0))
    assert [(page.verdict, page.defects) for page in record.pages] == [("defect-free", ())]
    assert record.model_versions == {"detector": 1}


def test_record_says_what_the_review_says() -> None:
    review = make_review(2, n_pages=2, size_hw=(100, 200), info_bar_px=10)
    record = review_record.to_record(review)
    assert (record.source, record.path, record.sha256) == (review.source, review.path, review.sha256)
    assert [page.page for page in record.pages] == [0, 1]
    page, said = review.pages[1], record.pages[1]
    assert (said.width_px, said.height_px, said.field_xyxy) == (200, 100, (0, 0, 200, 90))
    assert said.verdict == "defects"
    for defect, written in zip(page.defects, said.defects, strict=True):
        assert written.box_xyxy == defect.box_xyxy
        assert written.crop_xyxy == defect.crop_xyxy
        assert written.peak_score == pytest.approx(defect.peak_score, rel=1e-5)
        assert written.verdict.label == defect.verdict.label
        assert [near.label for near in written.verdict.nearest] == [near.label for near in defect.verdict.nearest]


def test_page_says_what_became_of_its_reference_and_older_results_say_nothing(tmp_path: Path) -> None:
    used = Reference("a_ref.tif", "", (5.8, -4.9), 0.97, np.zeros((256, 256), np.uint8), np.ones((256, 256), np.bool_))
    for reference in (used, Reference("a_ref.tif", "there is no reference file")):
        review = make_review(1)
        review = dataclasses.replace(review, pages=(dataclasses.replace(review.pages[0], reference=reference),))
        paths = results.write(review, results_dir=tmp_path)
        (page,) = json.loads(paths.json.read_text())["pages"]
        assert page["reference"] == {
            "name": "a_ref.tif",
            "used": reference is used,
            "reason": reference.reason,
            "shift_px": None if reference.shift_px is None else list(reference.shift_px),
            "correlation": reference.correlation,
        }
    written = json.loads(paths.json.read_text())
    for page in written["pages"]:
        del page["reference"]
    paths.json.write_text(json.dumps(written))
    assert results.read(paths.json).pages[0].reference is None


def test_result_of_an_older_release_has_no_hashes_and_still_reads(tmp_path: Path) -> None:
    review = replace(make_review(1), model_hashes={"head": "0123456789abcdef"})
    path = results.write(review, results_dir=tmp_path).json
    assert results.read(path).model_hashes == {"head": "0123456789abcdef"}
    old = json.loads(path.read_text())
    del old["model_hashes"]
    path.write_text(json.dumps(old))
    assert results.read(path).model_hashes == {}


def without_image(review: Review) -> Review:
    """The same review with a blank first page."""
    quality = Quality((QualityFlag("blank", 0.0, 2.0),), is_image=False)
    blank = replace(review.pages[0], score_map=None, defects=(), quality=quality)
    return replace(review, pages=(blank, *review.pages[1:]))


def test_page_without_image_has_no_score_and_is_not_defect_free(tmp_path: Path) -> None:
    paths = results.write(without_image(make_review(1, n_pages=2)), results_dir=tmp_path)
    blank, other = results.read(paths.json).pages
    assert (blank.verdict, blank.image_score, blank.defects) == ("no-image", None, ())
    assert blank.quality.model_dump() == {
        "is_image": False, "flags": ({"name": "blank", "measure": 0.0, "limit": 2.0},)
    }  # fmt: skip
    assert other.verdict == "defects"
    assert other.quality.is_image


def test_revision_of_another_page_leaves_a_page_without_image_as_it_is(tmp_path: Path) -> None:
    path = results.write(without_image(make_review(1, n_pages=2)), results_dir=tmp_path).json
    verdict = review_record.verdict_record(make_verdict("known", "scratch"), None)
    revised = results.revise(path, {(1, 1): verdict}, head_version=9, utc="2025-03-02T00:00:00Z")
    assert revised is not None
    assert [page.verdict for page in revised.pages] == ["no-image", "defects"]


def test_result_of_a_release_that_knew_no_quality_still_reads(tmp_path: Path) -> None:
    path = results.write(make_review(1), results_dir=tmp_path).json
    old = json.loads(path.read_text())
    del old["pages"][0]["quality"]
    path.write_text(json.dumps(old))
    page = results.read(path).pages[0]
    assert page.quality == review_record.QualityRecord()
    assert page.verdict == "defects"


def test_page_whose_defects_the_head_calls_defect_free_is_defect_free() -> None:
    verdicts = [make_verdict("defect-free"), make_verdict("defect-free")]
    assert review_record.to_record(make_review(2, verdicts=verdicts)).pages[0].verdict == "defect-free"
    mixed = [make_verdict("defect-free"), make_verdict("unknown")]
    assert review_record.to_record(make_review(2, verdicts=mixed)).pages[0].verdict == "defects"


def test_page_of_an_unknown_process_says_so() -> None:
    record = review_record.to_record(make_review(0, domain="unknown process"))
    assert [(p.domain, p.domain_p, p.verdict) for p in record.pages] == [("unknown process", 0.002, "defect-free")]
    found = review_record.to_record(make_review(1, domain="unknown process", verdicts=[make_verdict("unknown")]))
    assert [(page.domain, page.verdict) for page in found.pages] == [("unknown process", "defects")]
    known = review_record.to_record(make_review(0, domain="known process"))
    assert [(p.domain, p.domain_p, p.verdict) for p in known.pages] == [("known process", 0.5, "defect-free")]


def test_result_of_an_older_release_does_not_judge_its_process_and_still_reads(tmp_path: Path) -> None:
    path = results.write(make_review(1, domain="unknown process"), results_dir=tmp_path).json
    validator = jsonschema.Draft202012Validator(json.loads(review_record.SCHEMA_PATH.read_text()))
    validator.validate(json.loads(path.read_text()))
    old = json.loads(path.read_text())
    for page in old["pages"]:
        del page["domain"], page["domain_p"]
    path.write_text(json.dumps(old))
    validator.validate(old)
    assert [(page.domain, page.domain_p) for page in results.read(path).pages] == [("not judged", None)]


def test_class_codes_come_from_the_table_and_unlisted_labels_have_none() -> None:
    verdicts = [*(make_verdict(kind) for kind in KINDS), make_verdict("known", "bridge")]
    record = review_record.to_record(make_review(5, verdicts=verdicts), {"particle": 7, "defect-free": 0}, 99, 98)
    assert [d.verdict.class_code for d in record.pages[0].defects] == [7, 99, 98, 0, None]
    bare = review_record.to_record(make_review(5, verdicts=verdicts))
    assert {d.verdict.class_code for d in bare.pages[0].defects} == {None}


def test_floats_have_six_significant_digits() -> None:
    record = review_record.to_record(changed_defect(make_review(1), area_nm2=1234567.891, peak_score=0.123456789))
    (defect,) = record.pages[0].defects
    assert (defect.area_nm2, defect.peak_score) == (1234570.0, 0.123457)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_number_that_is_not_finite_is_never_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(ImageError, match="makes no sense: peak_score"):
        results.write(changed_defect(make_review(1), peak_score=value), results_dir=tmp_path)
    assert names(tmp_path) == []


def test_confidence_just_above_one_by_rounding_is_one_and_far_above_is_refused() -> None:
    def sure(confidence: float) -> Review:
        return make_review(1, verdicts=[dataclasses.replace(make_verdict(), confidence=confidence)])

    assert review_record.to_record(sure(1.0000001)).pages[0].defects[0].verdict.confidence == 1
    with pytest.raises(ImageError, match="confidence"):
        review_record.to_record(sure(1.01))


def test_numpy_numbers_are_welcome() -> None:
    box = tuple(np.int32(v) for v in (1, 2, 3, 4))
    review = changed_defect(make_review(1), box_xyxy=box, area_px=np.int64(4), peak_score=np.float32(0.5))
    assert review_record.to_record(review).pages[0].defects[0].box_xyxy == (1, 2, 3, 4)


# --- the schema ----------------------------------------------------------------------------------------------------


def test_published_schema_is_the_models_own() -> None:
    assert review_record.SCHEMA_PATH.read_text() == review_record.schema_text(), review_record.schema_text.__doc__


def test_written_results_satisfy_the_published_schema_and_additions_do_not(tmp_path: Path) -> None:
    schema = json.loads(review_record.SCHEMA_PATH.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    verdicts = [make_verdict(kind) for kind in KINDS]
    for n in (0, 4):
        path = results.write(make_review(n, verdicts=verdicts, pixel_nm=None), results_dir=tmp_path).json
        written = json.loads(path.read_text())
        validator.validate(written)
        assert not validator.is_valid(written | {"extra": 1})


# --- write and read ------------------------------------------------------------------------------------------------


def test_result_lies_beside_its_lot_and_reads_back(tmp_path: Path) -> None:
    review = make_review(2, n_pages=3, path="lot7/w1/a.tif")
    paths = results.write(review, results_dir=tmp_path)
    folder = "tool-a/lot7/w1"
    assert names(tmp_path) == [
        f"{folder}/a.tif.overlay.png",
        f"{folder}/a.tif.p1.overlay.png",
        f"{folder}/a.tif.p2.overlay.png",
        f"{folder}/a.tif.review.json",
    ]
    assert results.read(paths.json) == review_record.to_record(review)
    for path in paths.overlays:
        assert cv2.imread(str(path)) is not None


def test_image_at_the_top_of_the_drop_folder_has_a_place(tmp_path: Path) -> None:
    assert results.write(make_review(0, path="a.tif"), results_dir=tmp_path).json == (
        tmp_path / "tool-a" / "a.tif.review.json"
    )


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    def content() -> dict[str, bytes]:
        return {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    results.write(make_review(2), results_dir=tmp_path)
    before = content()
    results.write(make_review(2), results_dir=tmp_path)
    assert content() == before


def test_review_under_another_recipe_is_the_next_revision_however_often_it_is_repeated(tmp_path: Path) -> None:
    results.write(make_review(1), results_dir=tmp_path)
    for _ in range(2):
        path = results.write(dataclasses.replace(make_review(1), recipe_id="other"), results_dir=tmp_path).json
    assert names(path.parent) == ["a.tif.overlay.png", "a.tif.r1.review.json", "a.tif.review.json"]
    assert (results.read(path).recipe.id, results.read(path).revision) == ("other", 2)
    assert results.read(results.revision_path(path, 1)).recipe.id == "5f2a9c0e7b1d4e68"
    same_models = dataclasses.replace(make_review(1), recipe_id="other", reviewed_utc=T1)
    assert results.read(results.write(same_models, results_dir=tmp_path).json).revision == 2


def test_words_of_people_go_with_the_defect_when_it_is_judged_again(tmp_path: Path) -> None:
    review = make_review(3)
    path = results.write(review, results_dir=tmp_path).json
    first, second, third = review.pages[0].defects
    said = [Correction(0, "void", 1), Correction(0, None, 2), Correction(0, "pit", 3)]
    results.change(path, lambda record: corrected(record, said, by="ada", utc=T1))
    fewer = dataclasses.replace(review.pages[0], defects=(dataclasses.replace(third, defect_id=1),))
    again = dataclasses.replace(review, recipe_id="other", pages=(fewer,))
    (page,) = results.read(results.write(again, results_dir=tmp_path).json).pages
    assert [(one.human and one.human.label) for one in page.defects] == ["pit"]
    assert [(one.label, one.box_xyxy) for one in page.missed] == [("void", first.box_xyxy)]  # found no more
    back = results.read(results.write(dataclasses.replace(review, recipe_id="third"), results_dir=tmp_path).json)
    assert [one.human and one.human.label for one in back.pages[0].defects] == ["void", None, "pit"]
    assert back.pages[0].missed == ()
    assert results.read(results.revision_path(path, 1)).pages[0].defects[1].human is not None
    assert second.defect_id == 2


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (Correction(0, "void", 7), "has no defect 7 on page 0; its defects are 1, 2"),
        (Correction(3, "void", 1), "has no page 3; its pages are 0"),
        (Correction(0, "void", box_xyxy=(250, 0, 300, 10)), "does not lie inside page 0"),
        (Correction(0, None, box_xyxy=(1, 1, 5, 5)), "nobody said"),
    ],
)
def test_correction_of_what_is_not_there_is_refused(tmp_path: Path, said: Correction, why: str) -> None:
    path = results.write(make_review(2), results_dir=tmp_path).json
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=why):
        results.change(path, lambda record: corrected(record, [said], by="ada", utc=T1))
    assert path.read_bytes() == before


def test_two_people_at_once_both_get_their_word_in(tmp_path: Path) -> None:
    path = results.write(make_review(3), results_dir=tmp_path).json

    def say(number: int) -> None:
        results.change(path, lambda r: corrected(r, [Correction(0, "void", number)], by=f"p{number}", utc=T1))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(say, [1, 2, 3] * 4))
    assert [one.human and one.human.by for one in results.read(path).pages[0].defects] == ["p1", "p2", "p3"]


def test_result_of_other_content_is_kept_under_its_hash(tmp_path: Path) -> None:
    old, new = "a" * 64, "b" * 64
    results.write(make_review(1, n_pages=2, sha256=old), results_dir=tmp_path)
    paths = results.write(make_review(1, sha256=new), results_dir=tmp_path)
    folder = paths.json.parent
    assert names(folder) == [
        "a.tif.aaaaaaaa.overlay.png",
        "a.tif.aaaaaaaa.p1.overlay.png",
        "a.tif.aaaaaaaa.review.json",
        "a.tif.overlay.png",
        "a.tif.review.json",
    ]
    assert results.read(folder / "a.tif.aaaaaaaa.review.json").sha256 == old
    assert results.read(paths.json).sha256 == new


def test_overlays_of_a_neighbour_with_a_like_name_stay(tmp_path: Path) -> None:
    results.write(make_review(1, path="a.tif.tif"), results_dir=tmp_path)
    results.write(make_review(1, path="a.tif", sha256="a" * 64), results_dir=tmp_path)
    results.write(make_review(1, path="a.tif", sha256="b" * 64), results_dir=tmp_path)
    assert "tool-a/a.tif.tif.overlay.png" in names(tmp_path)


def test_broken_old_result_is_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = results.write(make_review(1), results_dir=tmp_path).json
    path.write_text("{")
    with caplog.at_level(logging.WARNING):
        results.write(make_review(1), results_dir=tmp_path)
    assert "kept under another name" in caplog.text
    assert len(names(tmp_path)) == 4
    assert results.read(path).source == "tool-a"


CRASHING_WRITER = """
import os, sys
from pathlib import Path
from factories import make_review
from semwatch.store import results
n_left = int(sys.argv[2])
def die_at_rename(event, args):
    global n_left
    if event == "os.rename":
        n_left -= 1
        if n_left == 0:
            os._exit(9)
sys.addaudithook(die_at_rename)
results.write(make_review(1, n_pages=2, sha256="b" * 64), results_dir=Path(sys.argv[1]))
"""


@pytest.mark.parametrize("step", range(1, 8))
def test_death_before_any_rename_leaves_whole_results_and_the_replay_mends_all(tmp_path: Path, step: int) -> None:
    old = results.write(make_review(1, n_pages=2, sha256="a" * 64), results_dir=tmp_path).json
    environ = os.environ | {"PYTHONPATH": f"{ROOT / 'daemon'}:{ROOT / 'tests' / 'helpers'}"}
    command = [sys.executable, "-c", CRASHING_WRITER, str(tmp_path), str(step)]
    died = subprocess.run(command, env=environ, timeout=60, check=False)
    assert died.returncode == (9 if step <= 6 else 0)  # 2 old overlays, old JSON, 2 overlays, JSON
    assert old.exists() == (step <= 3 or step == 7)
    if step <= 3:
        assert results.read(old).sha256 == "a" * 64
    results.write(make_review(1, n_pages=2, sha256="b" * 64), results_dir=tmp_path)
    assert names(old.parent) == [
        f"a.tif{tag}{suffix}"
        for tag in (".aaaaaaaa", "")
        for suffix in (".overlay.png", ".p1.overlay.png", ".review.json")
    ]
    assert results.read(old).sha256 == "b" * 64
    assert results.read(old.with_name("a.tif.aaaaaaaa.review.json")).sha256 == "a" * 64


@pytest.mark.parametrize("n_bytes", [0, 100, 4096])
def test_full_disk_is_a_service_away_and_leaves_nothing_half_written(tmp_path: Path, n_bytes: int) -> None:
    with disk_that_ends_at(n_bytes), pytest.raises(ServiceUnavailable, match=r"cannot write .*a\.tif\.review\.json"):
        results.write(make_review(1), results_dir=tmp_path)
    assert names(tmp_path) == []
    results.write(make_review(1), results_dir=tmp_path)
    assert len(names(tmp_path)) == 2


def test_place_that_is_no_folder_is_a_service_away(tmp_path: Path) -> None:
    (tmp_path / "tool-a").write_text("a file")
    with pytest.raises(ServiceUnavailable, match="cannot write"):
        results.write(make_review(0), results_dir=tmp_path)


BAD_PATHS = ["", ".", "/etc/a.tif", "../a.tif", "lot/../../a.tif", "a/..", "a\0.tif"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_path_that_leads_elsewhere_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ImageError, match="no relative path"):
        results.write(make_review(0, path=path), results_dir=tmp_path / "results")
    assert names(tmp_path) == []


@pytest.mark.parametrize("source", ["", ".", "..", "a/b", "/a"])
def test_source_that_leads_elsewhere_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(ImageError, match="no relative path"):
        results.write(make_review(0, source=source), results_dir=tmp_path / "results")
    assert names(tmp_path) == []


def test_link_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "results"
    outside.mkdir()
    inside.mkdir()
    (inside / "tool-a").symlink_to(outside)
    with pytest.raises(ImageError, match="leads out"):
        results.write(make_review(0), results_dir=inside)
    assert names(outside) == []


@pytest.mark.parametrize("name", ["x" * 251 + ".tif", "ä" * 120 + ".tif", "日" * 80 + ".tif"])
def test_long_names_are_shortened_and_stay_apart(tmp_path: Path, name: str) -> None:
    first = results.write(make_review(1, n_pages=2, path=name), results_dir=tmp_path).json
    other = results.write(make_review(1, path=f"y{name[1:]}"), results_dir=tmp_path).json
    assert first != other
    assert results.read(first).path == name
    assert len(list(lot_table.iter_lot(first.parent))) == 2
    results.write(make_review(1, path=name, sha256="b" * 64), results_dir=tmp_path)
    assert len(list(lot_table.iter_lot(first.parent))) == 2


def test_very_deep_folders_have_a_place(tmp_path: Path) -> None:
    paths = [f"{top}/{'/'.join(['d' * 200] * 19)}/a.tif" for top in "ab"]
    first, other = (results.write(make_review(0, path=path), results_dir=tmp_path).json for path in paths)
    assert first != other
    assert results.read(first).path == paths[0]


def test_name_that_is_not_utf8_is_spelled_out(tmp_path: Path) -> None:
    path = results.write(make_review(0, path=os.fsdecode(b"l\xff/a\xe4.tif")), results_dir=tmp_path).json
    assert results.read(path).path == "l\\xff/a\\xe4.tif"
    assert len(list(lot_table.iter_lot(path.parent))) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 2}', "\0" * 100])
def test_foreign_or_broken_file_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.review.json"
    path.write_text(text)
    with pytest.raises(ImageError, match=r"a\.review\.json is not a whole result of schema version 1"):
        results.read(path)


def test_result_cut_at_any_of_many_bytes_is_refused(tmp_path: Path) -> None:
    path = results.write(make_review(1), results_dir=tmp_path).json
    whole = path.read_bytes().rstrip()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(ImageError):
            results.read(path)


def test_missing_result_says_so(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no result"):
        results.read(tmp_path / "none")


def test_reason_says_why_and_what_to_do(tmp_path: Path) -> None:
    path, is_new = results.write_reason(
        results_dir=tmp_path,
        source="tool-a",
        path="lot/a.tif",
        sha256="a" * 64,
        reason="not a TIFF: \udcff",
        attempts=3,
        size=17,
        quarantined_utc="2025-03-01T12:00:00Z",
    )
    assert (path, is_new) == (tmp_path / "tool-a" / "lot" / "a.tif.reason.json", True)
    reason = json.loads(path.read_text())
    assert (reason["reason"], reason["attempts"], reason["size"]) == ("not a TIFF: \\xff", 3, 17)
    assert "requeue" in reason["what_to_do"]


# --- a later head judges again -------------------------------------------------------------------------------------

T1 = "2025-03-02T12:00:00Z"


def said(kind: VerdictKind = "novel", label: str | None = "novel-1") -> review_record.VerdictRecord:
    return review_record.verdict_record(Verdict(kind, label, 0.9, ()), 7)


def unknown_result(folder: Path, n_defects: int = 2, **options: Any) -> Path:
    review = make_review(n_defects, verdicts=[make_verdict("unknown")], **options)
    return results.write(review, results_dir=folder).json


def test_revising_nothing_changes_nothing(tmp_path: Path) -> None:
    path = unknown_result(tmp_path)
    before = names(tmp_path), path.read_bytes()
    same = {(0, 1): less_sure(path)}
    for verdicts in ({}, same):
        assert results.revise(path, verdicts, head_version=4, utc=T1) is None
    assert (names(tmp_path), path.read_bytes()) == before


def less_sure(path: Path) -> review_record.VerdictRecord:
    """The standing verdict with another confidence: same kind, same label."""
    return results.read(path).pages[0].defects[0].verdict.model_copy(update={"confidence": 0.01})


def test_revision_replaces_what_it_is_given_and_keeps_the_one_before(tmp_path: Path) -> None:
    path = unknown_result(tmp_path)
    before, first = path.read_bytes(), results.read(path)
    revised = results.revise(path, {(0, 2): said()}, head_version=4, head_hash="4" * 16, utc=T1)
    assert revised == results.read(path)
    assert revised.model_hashes == {**first.model_hashes, "head": "4" * 16}
    assert (revised.revision, revised.revised_utc, revised.reviewed_utc) == (2, T1, first.reviewed_utc)
    assert revised.model_versions == {"detector": 1, "encoder": 1, "head": 4}
    assert revised.pages[0].defects == (
        first.pages[0].defects[0],
        first.pages[0].defects[1].model_copy(update={"verdict": said()}),
    )
    assert path.with_name("a.tif.r1.review.json").read_bytes() == before
    validator = jsonschema.Draft202012Validator(json.loads(review_record.SCHEMA_PATH.read_text()))
    validator.validate(json.loads(path.read_text()))


def test_page_verdict_follows_its_defects(tmp_path: Path) -> None:
    path = unknown_result(tmp_path, n_pages=2)
    clean = said("defect-free", "defect-free")
    revised = results.revise(path, {(0, 1): clean, (0, 2): clean, (1, 1): clean}, head_version=4, utc=T1)
    assert revised is not None
    assert [page.verdict for page in revised.pages] == ["defect-free", "defects"]


@pytest.mark.parametrize("head", [1, 3])
def test_head_that_judged_already_or_an_earlier_one_changes_nothing(tmp_path: Path, head: int) -> None:
    path = unknown_result(tmp_path)
    assert results.revise(path, {(0, 1): said()}, head_version=head, utc=T1) is None
    assert results.read(path).revision == 1


def test_revisions_count_on_and_all_of_them_are_kept(tmp_path: Path) -> None:
    path = unknown_result(tmp_path)
    for head, label in ((4, "novel-1"), (5, "novel-2"), (6, "residue")):
        results.revise(path, {(0, 1): said(label=label)}, head_version=head, utc=T1)
    kept = [results.read(results.revision_path(path, revision)) for revision in (1, 2, 3)]
    assert [record.revision for record in [*kept, results.read(path)]] == [1, 2, 3, 4]
    assert [record.pages[0].defects[0].verdict.label for record in kept] == [None, "novel-1", "novel-2"]


def test_defect_that_the_result_does_not_have_is_refused(tmp_path: Path) -> None:
    path = unknown_result(tmp_path)
    with pytest.raises(ImageError, match="no defect 3 on page 0"):
        results.revise(path, {(0, 3): said()}, head_version=4, utc=T1)


def test_kept_revision_of_other_bytes_is_never_overwritten(tmp_path: Path) -> None:
    path = unknown_result(tmp_path)
    kept = results.revision_path(path, 1)
    kept.write_text("mine")
    with pytest.raises(ImageError, match=r"a\.tif\.r1\.review\.json is not revision 1"):
        results.revise(path, {(0, 1): said()}, head_version=4, utc=T1)
    assert (kept.read_text(), results.read(path).revision) == ("mine", 1)


@pytest.mark.parametrize("n_bytes", [0, 100, 4096])
def test_full_disk_leaves_the_revision_before_in_its_place(tmp_path: Path, n_bytes: int) -> None:
    path = unknown_result(tmp_path, n_defects=9)  # more than 4096 bytes
    before = path.read_bytes()
    with disk_that_ends_at(n_bytes), pytest.raises(ServiceUnavailable, match="cannot write"):
        results.revise(path, {(0, 1): said()}, head_version=4, utc=T1)
    assert path.read_bytes() == before
    assert results.revise(path, {(0, 1): said()}, head_version=4, utc=T1) is not None
    assert results.revision_path(path, 1).read_bytes() == before


def test_result_written_before_there_were_revisions_reads_and_is_revised(tmp_path: Path) -> None:
    path = unknown_result(tmp_path)
    old = json.loads(path.read_text())
    del old["revision"], old["revised_utc"]
    path.write_text(json.dumps(old))
    assert (results.read(path).revision, results.read(path).revised_utc) == (1, None)
    assert results.revise(path, {(0, 1): said()}, head_version=4, utc=T1) is not None
    assert json.loads(results.revision_path(path, 1).read_text()) == old


def test_review_anew_counts_on_and_overwrites_no_kept_revision(tmp_path: Path) -> None:
    path = unknown_result(tmp_path)
    results.revise(path, {(0, 1): said()}, head_version=4, utc=T1)
    before = results.revision_path(path, 1).read_bytes()
    for _ in range(2):  # a replay gives the same
        unknown_result(tmp_path)
        assert results.read(path).revision == 3
    results.revise(path, {(0, 1): said()}, head_version=4, utc=T1)
    assert results.read(path).revision == 4
    assert results.revision_path(path, 1).read_bytes() == before


def test_kept_revisions_go_with_their_content_when_other_content_takes_the_name(tmp_path: Path) -> None:
    path = unknown_result(tmp_path, sha256="a" * 64)
    results.revise(path, {(0, 1): said()}, head_version=4, utc=T1)
    unknown_result(tmp_path, sha256="b" * 64)
    found = [name.name for name in path.parent.iterdir() if name.name.endswith("review.json")]
    assert sorted(found) == ["a.tif.aaaaaaaa.r1.review.json", "a.tif.aaaaaaaa.review.json", "a.tif.review.json"]
    assert results.read(path).revision == 1


def test_place_of_a_result_is_found_from_the_path_as_it_is_spelled_out(tmp_path: Path) -> None:
    name = os.fsdecode(b"l\xff/" + b"x" * 250 + b".tif")
    path = results.write(make_review(0, path=name), results_dir=tmp_path).json
    assert results.review_path(tmp_path, "tool-a", name) == path
    assert results.review_path(tmp_path, "tool-a", review_record.printable(name), is_printable=True) == path
    with pytest.raises(ImageError, match="no relative path"):
        results.review_path(tmp_path, "tool-a", "../a.tif")


def test_byte_and_the_text_that_spells_it_out_are_two_results(tmp_path: Path) -> None:
    twins = [
        os.fsdecode(b"a\xff.tif"),
        r"a\xff.tif",
        r"a\x5cxff.tif",
        "a\\.tif",
        "lot\\xyz/\\xe4.tif",
        "lot\\xyz/\udce4.tif",
    ]
    paths = [results.write(make_review(0, path=name), results_dir=tmp_path).json for name in twins]
    assert len(set(paths)) == len(twins)
    assert [results.review_path(tmp_path, "tool-a", name) for name in twins] == paths
    assert [path.name for path in paths[:4]] == [
        r"a\xff.tif.review.json", r"a\x5cxff.tif.review.json", r"a\x5cx5cxff.tif.review.json", "a\\.tif.review.json"
    ]  # fmt: skip


# --- pictures ------------------------------------------------------------------------------------------------------


def test_contact_sheet_of_nothing_and_of_missing_overlays_is_a_picture(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for overlays in ([], [tmp_path / "none.png", tmp_path / "empty.png"]):
        results.contact_sheet(overlays, tmp_path / "sheet.png", columns=1, tile_px=40)
        picture = cv2.imread(str(tmp_path / "sheet.png"))
        assert picture is not None
        assert picture.shape == (40 * max(1, len(overlays)), 40, 3)


def test_contact_sheet_shows_overlays_row_by_row(tmp_path: Path) -> None:
    paths = results.write(make_review(1, n_pages=3), results_dir=tmp_path)
    results.contact_sheet(paths.overlays, tmp_path / "sheet.png", columns=2, tile_px=100)
    picture = cv2.imread(str(tmp_path / "sheet.png"))
    assert picture is not None
    assert picture.shape == (200, 200, 3)
    assert [picture[y : y + 100, x : x + 100].std() > 10 for y in (0, 100) for x in (0, 100)] == [True] * 3 + [False]
