"""The found classes shared through a real Redis: each side remembers them, and a state that Redis lost comes back."""

from pathlib import Path

import pytest
import redis

from cluster_files import T0, three
from semwatch.classes import clusters, decisions
from semwatch.classes.clusters import FILE, Clusters
from semwatch.classes.register import ClassRegister
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.streams.handoff import Handoff


@pytest.fixture
def daemon(client: redis.Redis, tmp_path: Path) -> ClassRegister:
    return ClassRegister(Handoff(client), tmp_path / "state", owner="person", older=tmp_path / "learning")


@pytest.fixture
def learning(client: redis.Redis, tmp_path: Path) -> ClassRegister:
    return ClassRegister(Handoff(client), tmp_path / "learning", owner="cycle")


def name(c: Clusters) -> Clusters:
    return decisions.named(c, "novel-1", "bridge residue", classes=[], by="kim", utc=T0)


def test_nothing_was_found_yet_and_no_file_is_made(daemon: ClassRegister, tmp_path: Path) -> None:
    assert daemon.read() == Clusters()
    assert not (tmp_path / "state" / FILE).exists()


def test_what_one_side_changes_the_other_reads_and_remembers(
    daemon: ClassRegister, learning: ClassRegister, tmp_path: Path
) -> None:
    after = learning.change(lambda _: three())
    assert after.revision == 1
    assert daemon.read() == after
    assert clusters.read(tmp_path / "state") == clusters.read(tmp_path / "learning") == after
    decided = daemon.change(name)
    assert learning.read() == decided
    assert decided.decisions[-1].label == "bridge residue"


def test_file_that_an_older_release_left_is_taken_over_by_whichever_side_starts(
    daemon: ClassRegister, learning: ClassRegister, client: redis.Redis, tmp_path: Path
) -> None:
    older = three().model_copy(update={"revision": 7})
    for first in (daemon, learning):
        client.flushall()
        (tmp_path / "state" / FILE).unlink(missing_ok=True)
        clusters.write(tmp_path / "learning", older)
        assert first.read() == older
        assert daemon.read() == learning.read() == older
        assert daemon.change(name).revision == 8


def test_state_that_redis_has_lost_is_put_back(
    daemon: ClassRegister, learning: ClassRegister, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    learning.change(lambda _: three())
    decided = daemon.change(name)
    client.flushall()
    assert learning.read().revision == 1  # the older of the two came first
    assert daemon.read() == decided
    assert learning.read() == decided
    assert "it is put back" in caplog.text


def test_state_of_another_revision_is_refused_and_nothing_changes(daemon: ClassRegister) -> None:
    after = daemon.change(lambda _: three())
    with pytest.raises(ServiceUnavailable, match="somebody else has changed"):
        daemon.write(after)
    with pytest.raises(ConfigError, match="left as they are"):
        daemon.write(after.model_copy(update={"revision": 2, "next_number": 1}))
    assert daemon.read() == after


def test_damaged_file_is_written_anew_and_only_matters_where_redis_has_nothing(
    daemon: ClassRegister, client: redis.Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    after = daemon.change(lambda _: three())
    file = tmp_path / "state" / FILE
    file.write_text(file.read_text().replace('"learned"', '"loved"', 1))
    assert daemon.read() == after
    assert clusters.read(tmp_path / "state") == after
    assert "written anew" in caplog.text
    file.write_text("{")
    client.flushall()
    with pytest.raises(ConfigError, match=r"clusters\.json"):
        daemon.read()


def test_disk_that_refuses_is_a_warning_since_redis_has_the_state(
    daemon: ClassRegister, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").touch()  # no folder can be made
    after = daemon.change(lambda _: three())
    assert daemon.read() == after
    assert "not remembered" in caplog.text
