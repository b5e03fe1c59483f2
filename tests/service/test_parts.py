"""A file of many pages, as an .I01 of a whole lot is, judged part by part."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import redis

from daemon import Daemon, Site, make_site
from image_files import tiff
from klarf_lots import KLARF, RECIPE
from semwatch import klarf as library
from semwatch.errors import ImageError
from semwatch.intake import decoding
from semwatch.intake.tiff import only_pages
from semwatch.service import parts
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.store.manifests import KEPT
from service_here import running, wait_for

N = 40


def field(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.GaussianBlur(rng.integers(0, 256, (64, 64), dtype=np.uint8), (0, 0), 3)


def lot_of_one_file(n_defects: int = N) -> tuple[bytes, bytes]:
    """KLARF and .I01: of each defect the image, with a spot, and its reference."""
    pages = []
    for seed in range(n_defects):
        shown = field(seed).copy()
        cv2.circle(shown, (20 + seed % 20, 30), 5, 255, -1)
        pages += [shown, field(seed)]
    rows = "".join(f"\n {n} 0 2 2 {2 * n - 1} 30 {2 * n} 31" for n in range(1, n_defects + 1))
    text = (
        'FileVersion 1 2;\nLotID "lot 9";\nWaferID "w1";\nTiffFileName lot9.tif;\n'
        f"DefectRecordSpec 4 DEFECTID CLASSNUMBER IMAGECOUNT IMAGELIST;\nDefectList{rows};\nEndOfFile;\n"
    )
    return text.encode(), tiff(*pages)


def site_of(tmp_path: Path, repository: Path, **changes: Any) -> Site:
    return make_site(tmp_path / "site", repository, recipe={**RECIPE, "klarf": KLARF}, **changes)


def delivered(site: Site) -> list[Any]:
    if not (site.state / LEDGER).exists():
        return []
    with Ledger(site.state / LEDGER, read_only=True) as ledger:
        return ledger.manifests.done_after(0)


def check(site: Site) -> None:
    (review,) = site.reviews()
    pages = json.loads(review.read_text())["pages"]
    assert [page["page"] for page in pages] == [2 * n for n in range(N)]
    assert [page["reference"]["name"] for page in pages] == [f"page {2 * n + 1}" for n in range(N)]
    record = json.loads((site.results / "lot9/lot9.001.lot.json").read_text())
    assert [one["page"] for one in record["wafers"][0]["defects"]] == [2 * n for n in range(N)]
    assert len(library.read(site.results / "lot9/lot9.r1.001").wafers[0].defects) == N
    assert len(list((site.results / "lot9").glob("*.overlay.png"))) == N
    assert not list((site.state / KEPT).rglob("*.json"))


@pytest.mark.parametrize("big", [False, True], ids=["tiff", "bigtiff"])
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
def test_some_pages_of_a_tiff_are_what_they_are_in_the_whole_one(big: bool, order: str) -> None:
    whole = tiff(*(field(seed) for seed in range(6)), bigtiff=big, order=order)
    some, numbers = only_pages(whole, {4, 1, 9})
    assert numbers == [1, 4]
    every = decoding.decode(whole, name="whole")
    found = decoding.decode(some, name="some", max_pages=2)
    assert [np.array_equal(page.pixels, every[n].pixels) for page, n in zip(found, numbers, strict=True)] == [True] * 2
    with pytest.raises(ImageError, match="without pages"):
        decoding.decode(only_pages(whole, {9})[0], name="none")
    for cut in (whole[:12], b"no TIFF at all"):
        with pytest.raises(ImageError):
            only_pages(cut, {1})


def test_file_with_more_pages_than_the_limit_is_judged_in_parts_and_comes_again(
    tmp_path, tiny_repository, monkeypatch
) -> None:
    monkeypatch.setattr(parts, "SLICE_S", 0.0)  # one part each time it comes
    klarf, images = lot_of_one_file()
    site = site_of(tmp_path, tiny_repository)  # limits.max_pages is 64, the file has 80
    with running(site):
        site.put("lot9/LOT9.I01", images)
        site.put("lot9/lot9.001", klarf)
        wait_for(lambda: delivered(site))
    check(site)


def test_file_in_parts_gives_its_unknowns_and_one_summary(tmp_path, tiny_repository, server) -> None:
    klarf, images = lot_of_one_file()
    site = site_of(tmp_path, tiny_repository, redis_url=server.url)
    client = redis.Redis.from_url(server.url)
    client.flushall()
    with running(site):
        site.put("lot9/LOT9.I01", images)
        site.put("lot9/lot9.001", klarf)
        wait_for(lambda: delivered(site) and client.xlen("semwatch:results") == 1)
    (review,) = site.reviews()
    kinds = [one["verdict"]["kind"] for page in json.loads(review.read_text())["pages"] for one in page["defects"]]
    n_unknown = sum(kind in ("unknown", "non-decidable") for kind in kinds)
    assert client.xlen("semwatch:unknowns") == n_unknown > 0
    ((_, fields),) = client.xrange("semwatch:results")
    assert json.loads(fields[b"meta"])["n_defects"] == len(kinds), "the summary is of the whole file, not of a part"


@pytest.mark.timeout(600)
def test_file_in_parts_that_is_killed_at_each_of_them_is_finished_all_the_same(tmp_path, tiny_repository) -> None:
    """More deaths than attempts: what a part came to is kept, and tries that failed before it count no more."""
    klarf, images = lot_of_one_file()
    site = site_of(tmp_path, tiny_repository, limits={"min_free_mb": 0, "max_attempts": 2, "max_pages": 8})
    site.put("lot9/lot9.001", klarf)
    site.put("lot9/LOT9.I01", images)
    folder = site.state / KEPT / "parts"
    for n in range(4):
        with Daemon(site) as daemon:
            daemon.wait_for(lambda n=n: len(list(folder.rglob("*.json"))) > n or bool(delivered(site)))
            daemon.kill()
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: bool(delivered(site)))
        assert daemon.stop() == 0
    check(site)
    events = [json.loads(line)["event"] for line in (site.state / "audit.jsonl").read_text().splitlines()]
    assert sorted(events) == ["klarf", "lot", "reviewed"]
