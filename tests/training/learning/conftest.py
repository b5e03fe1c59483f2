"""Sites that learn."""

import shutil
from pathlib import Path

import pytest
import redis

from cycles import add_two
from learning_site import Lab, make_lab
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.unknowns import connect
from semwatch_training.learning import cycle_report
from semwatch_training.learning.retrain import run_cycle


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw small pictures: they are not what is tested here."""
    monkeypatch.setattr(cycle_report, "MAX_POINTS", 40)
    monkeypatch.setattr(cycle_report, "DPI", 25)


@pytest.fixture
def lab(tmp_path: Path, tiny_repository: Path, client: redis.Redis, server: EmbeddedRedis, small_pictures: None) -> Lab:
    """A site that can learn, with an empty Redis."""
    return make_lab(tmp_path / "site", tiny_repository, client, server.url)


@pytest.fixture(scope="module")
def learned_site(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path, server: EmbeddedRedis) -> Path:
    """A site whose head 2 has learned novel-1 and novel-2."""
    folder = tmp_path_factory.mktemp("learned") / "site"
    with connect(server.url) as made:
        made.flushall()
        lab = make_lab(folder, tiny_repository, made, server.url)
        add_two(lab)
        assert run_cycle(lab.site).status == "learned"
    return folder


@pytest.fixture
def learned(learned_site: Path, tmp_path: Path, client: redis.Redis, small_pictures: None) -> Lab:
    """A site of its own whose head 2 has learned novel-1 and novel-2."""
    return Lab(shutil.copytree(learned_site, tmp_path / "site"), client)
