"""A detector that is published while the daemon reviews takes over between two images."""

import json
import shutil
from pathlib import Path

import pytest

from daemon import Daemon, Site, make_site, png
from semwatch.models import choice, model_repository
from semwatch.store import serving


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_repository, tmp_path / "models")


def publish(repository: Path, normal_scores: tuple[float, ...]) -> int:
    """The same network with other normal images: another gate, another content hash."""
    folder = repository / "detector" / "1"
    meta = model_repository.read_meta(repository, "detector", 1).model_copy(update={"normal_scores": normal_scores})
    beside = {model_repository.PROBE: folder / model_repository.PROBE}
    return model_repository.publish(repository, meta, folder / model_repository.WEIGHTS, beside=beside)


def reviews(site: Site) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in site.reviews()]


def test_published_detector_serves_without_a_restart_and_every_result_has_the_gate_of_its_own(
    repository: Path, tmp_path: Path
) -> None:
    site = make_site(tmp_path / "site", repository, recipe={"name": "test"})
    high = tuple(1000.0 + k for k in range(60))
    with Daemon(site) as daemon:
        daemon.wait_ready()
        for k in range(4):
            site.put(f"before-{k}.png", png(k))
        assert publish(repository, high) == 2
        for k in range(4):
            site.put(f"beside-{k}.png", png(10 + k))
        daemon.wait_for(lambda: serving.announced(site.state)[0].get("detector") == 2)
        for k in range(2):
            site.put(f"after-{k}.png", png(20 + k))
        daemon.wait_for(lambda: len(site.reviews()) == 10)
        choice.roll_back(repository, "detector", "worse")
        daemon.wait_for(lambda: serving.announced(site.state)[0].get("detector") == 1)
        assert daemon.stop() == 0
    found = reviews(site)
    hash_of = {v: model_repository.read_meta(repository, "detector", v).content_hash for v in (1, 2)}
    for one in found:
        is_high = one["pages"][0]["gate_threshold"] >= 1000
        assert one["model_hashes"]["detector"] == hash_of[2 if is_high else 1], one["path"]
    assert all(one["pages"][0]["gate_threshold"] >= 1000 for one in found if str(one["path"]).startswith("after"))


def test_detector_that_cannot_serve_is_refused_and_the_line_goes_on(repository: Path, tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", repository, recipe={"name": "test"})
    with Daemon(site) as daemon:
        daemon.wait_ready()
        publish(repository, (0.1, 0.2))
        daemon.wait_for(lambda: 2 in serving.announced(site.state, "detector")[1])
        site.put("a.png", png(1))
        daemon.wait_for(lambda: len(site.reviews()) == 1)
        assert daemon.stop() == 0
    assert "detector 2 is refused" in daemon.log()
