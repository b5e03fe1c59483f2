"""``semwatch models``: in this process on a site without a daemon, and as a process beside a running one."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import Command, Said, spawn
from daemon import Daemon, Site, make_site
from semwatch.models import choice, head_bank, model_repository
from semwatch.store import serving
from semwatch.store.ledger import Ledger

BESIDE = (model_repository.PROBE, head_bank.BANK, head_bank.GOLDEN)


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_repository, tmp_path / "models")


@pytest.fixture
def site(repository: Path, tmp_path: Path) -> Site:
    return make_site(tmp_path / "site", repository)


@pytest.fixture
def models(semwatch: Command, site: Site) -> Command:
    """``semwatch models ARGV...`` of this site."""
    return lambda *argv: semwatch("models", *argv, "--site", site.file)


def publish(repository: Path, *, weights: Path | None = None, **changes: object) -> int:
    """Head 1 once more under the next number, with another description or other weights."""
    folder = repository / "head" / "1"
    meta = model_repository.read_meta(repository, "head", 1).model_copy(update=changes)
    beside = {name: folder / name for name in BESIDE}
    return model_repository.publish(repository, meta, weights or folder / "model.onnx", beside=beside)


def audited(site: Site) -> list[dict[str, Any]]:
    if not (site.state / "ledger.sqlite").exists():
        return []
    with Ledger(site.state / "ledger.sqlite", read_only=True) as ledger:
        return [json.loads(line) for _, line in ledger.audit_after(0, 100)]


def rows(listed: Said) -> dict[tuple[str, int], dict[str, Any]]:
    assert listed.code == 0
    return {(row["model"], row["version"]): row for row in listed.json}


def states(models: Command) -> dict[int, str]:
    """State of each head."""
    return {n: row["state"] for (model, n), row in rows(models("list", "--json")).items() if model == "head"}


# --- list ------------------------------------------------------------------------------------------------------------


def test_empty_repository_is_an_empty_list(semwatch, tmp_path) -> None:
    (tmp_path / "nothing").mkdir()
    site = make_site(tmp_path / "site", tmp_path / "nothing")
    said = semwatch("models", "list", "--site", site.file, "--json")
    assert (said.code, said.json) == (0, [])


def test_list_tells_of_every_version_what_is_chosen_and_what_it_knows(models, repository) -> None:
    publish(repository, labels=("[a]", "b", "novel-1"))
    listed = rows(models("list", "--json"))
    assert list(listed) == [("detector", 1), ("encoder", 1), ("head", 1), ("head", 2)]
    new = listed["head", 2]
    assert (new["chosen"], new["serves"], new["pinned"], new["withdrawn"], new["refused"]) == (
        True, False, False, None, None,
    )  # fmt: skip
    assert new["labels"] == ["[a]", "b", "novel-1"]
    assert (listed["head", 1]["state"], new["state"]) == ("", "chosen")
    assert listed["encoder", 1]["labels"] == []
    hashes = {name: row["content_hash"] for name, row in listed.items()}
    assert hashes["head", 2] == model_repository.read_meta(repository, "head", 2).content_hash
    assert len(set(hashes.values())) == 4


def test_pinned_withdrawn_and_refused_versions_say_so(models, site, repository) -> None:
    for _ in range(3):
        publish(repository)
    choice.withdraw(repository, "head", 4, "calls [pits] bridges")
    site.state.mkdir()
    serving.announce(site.state, {"head": 1}, {3: "answers its probe otherwise"})
    assert states(models) == {
        1: "",
        2: "",
        3: "chosen, refused",
        4: "withdrawn",
    }
    choice.pin(repository, "head", 2)
    assert states(models)[2] == "chosen, pinned"
    said = models("list")
    assert "chosen, pinned" in said.words
    assert said.out.endswith("refused: head 3: answers its probe otherwise\nwithdrawn: head 4: calls [pits] bridges\n")


def test_damaged_version_does_not_hide_the_others_and_can_be_rolled_back(models, repository) -> None:
    publish(repository)
    (repository / "head/2/meta.json").write_text("{")
    listed = rows(models("list", "--json"))
    assert (listed["head", 2]["labels"], listed["head", 2]["created_utc"]) == ([], "")
    assert models("rollback", "head", "--reason", "damaged").code == 0
    assert states(models) == {1: "chosen", 2: "withdrawn"}


def test_pin_file_edited_into_nonsense_is_one_message_with_the_remedy(models, repository) -> None:
    (repository / "head" / choice.PINNED).write_text("newest please")
    said = models("list")
    assert (said.code, said.out) == (3, "")
    assert "must hold a version number alone; delete it, or pin again" in said.err


# --- pin and rollback without a daemon -------------------------------------------------------------------------------


def test_pin_and_release_are_noted_with_who_and_when_and_say_what_will_serve(models, site, repository) -> None:
    publish(repository)
    said = models("pin", "head", 1)
    assert (said.code, said.out) == (0, "serves: head 1, once the daemon runs\n")
    assert models("pin", "head", "--release").out == "serves: head 2, once the daemon runs\n"
    assert [(line["event"], line["model"], line["version"]) for line in audited(site)] == [
        ("model pinned", "head", 1),
        ("model released", "head", None),
    ]
    assert all(line["by"] and line["utc"].endswith("Z") for line in audited(site))
    assert choice.pin_of(repository, "head") is None


def test_rollback_withdraws_and_says_where_it_leads(models, site, repository) -> None:
    publish(repository)
    said = models("rollback", "head", "--reason", "calls pits bridges")
    assert said.out == "withdrawn: head 2: calls pits bridges\nserves: head 1, once the daemon runs\n"
    (line,) = audited(site)
    assert (line["event"], line["from"], line["to"], line["reason"]) == (
        "model rolled back", 2, 1, "calls pits bridges",
    )  # fmt: skip
    assert choice.why_withdrawn(repository, "head", 2) == "calls pits bridges"


def test_rollback_of_a_pin_moves_it_and_withdraws_nothing(models, repository) -> None:
    publish(repository)
    choice.pin(repository, "head", 2)
    assert models("rollback").out.startswith("pin moved: to head 1; 2 is not withdrawn\n")
    assert (choice.pin_of(repository, "head"), choice.why_withdrawn(repository, "head", 2)) == (1, None)


def test_rollback_goes_past_versions_that_the_daemon_refused(models, site, repository) -> None:
    for _ in range(2):
        publish(repository)
    site.state.mkdir()
    serving.announce(site.state, {"head": 3}, {2: "broken"})
    assert models("rollback").code == 0
    assert states(models) == {1: "chosen", 2: "withdrawn, refused", 3: "withdrawn"}
    assert [choice.why_withdrawn(repository, "head", n) for n in (2, 3)] == ["broken", "rolled back"]


def test_nothing_to_go_back_to_is_refused_and_leaves_no_line(models, site, repository) -> None:
    said = models("rollback", "head")
    assert said.code == 1
    assert "nothing to go back to" in said.err
    publish(repository)
    site.state.mkdir()
    serving.announce(site.state, {"head": 2}, {1: "broken"})
    assert models("rollback", "head").code == 1
    assert audited(site) == []
    assert choice.choice(repository, "head") == 2


def test_audit_line_stands_even_where_the_disk_refuses_the_change(models, site, repository) -> None:
    (repository / "head" / f".{choice.PINNED}.tmp").mkdir()  # where the pin would be written
    said = models("pin", "head", 1)
    assert said.code == 1
    assert "cannot write" in said.err
    assert [line["event"] for line in audited(site)] == ["model pinned"]
    assert choice.pin_of(repository, "head") is None


@pytest.mark.parametrize(
    ("argv", "code", "remedy"),
    [
        (("pin", "heads", 1), 2, "choose one of detector, encoder, head"),
        (("rollback", "../head"), 2, "choose one of detector, encoder, head"),
        (("diff", "", 1, 2), 2, "choose one of detector, encoder, head"),
        (("pin", "head"), 2, "either a version to stay with, or --release"),
        (("pin", "head", 1, "--release"), 2, "either a version to stay with, or --release"),
        (("pin", "head", 7), 3, "head version 7 is not in the model repository"),
        (("pin", "head", 0), 2, "invalid value for"),
        (("diff", "head", 1, 7), 3, "head version 7 is not in the model repository"),
        (("diff", "head", 1), 2, "missing argument"),
    ],
)
def test_bad_input_is_refused_in_words_and_changes_nothing(models, site, repository, argv, code, remedy) -> None:
    before = sorted(repository.rglob("*"))
    said = models(*argv)
    assert said.code == code
    assert remedy in said.words.lower()
    assert sorted(repository.rglob("*")) == before
    assert audited(site) == []


# --- diff ------------------------------------------------------------------------------------------------------------


def test_diff_tells_classes_codes_and_origin_and_nothing_that_is_the_same(models, repository) -> None:
    old = model_repository.read_meta(repository, "head", 1)
    publish(repository, labels=(*old.labels[1:], "[novel-1]"), codes={"particle": 7}, provenance={"cycle": "today"})
    told = models("diff", "head", 1, 2, "--json").json
    assert (told["classes_added"], told["classes_removed"]) == (["[novel-1]"], [old.labels[0]])
    assert (told["codes"], told["provenance"]) == ({"particle": [None, 7]}, {"cycle": [None, "today"]})
    assert (told["same_encoder"], told["same_weights"]) == (True, True)
    words = models("diff", "head", 1, 2).words
    assert f"classes only here {old.labels[0]} [novel-1]" in words
    assert "codes: particle - 7" in words
    same = models("diff", "head", 1, 1, "--json").json
    assert not any(same[key] for key in ("classes_added", "classes_removed", "codes", "provenance"))


def test_diff_of_heads_of_two_encoders_warns(models, repository) -> None:
    publish(repository, encoder_sha256="0" * 64)
    assert "features of different encoders" in models("diff", "head", 1, 2).out


# --- beside a running daemon -----------------------------------------------------------------------------------------


def test_commands_change_the_running_daemon_and_wait_for_it(models, site, repository, tmp_path) -> None:
    """Pin, release, broken head, rollback past it; the last as a process of its own, as a person calls it."""

    def head() -> int:
        return serving.announced(site.state)[0]["head"]

    with Daemon(site) as daemon:
        daemon.wait_ready()
        publish(repository)
        daemon.wait_for(lambda: head() == 2)
        said = models("pin", "head", 1)
        assert (said.code, said.out) == (0, "serves: head 1\n")
        assert head() == 1
        listed = rows(models("list", "--json"))
        assert (listed["head", 1]["state"], listed["head", 2]["state"]) == ("serves, pinned", "")
        assert listed["encoder", 1]["state"] == "serves"
        assert models("pin", "head", "--release").out == "serves: head 2\n"

        (tmp_path / "broken.onnx").write_bytes(b"no network")
        assert publish(repository, weights=tmp_path / "broken.onnx") == 3
        daemon.wait_for(lambda: 3 in serving.announced(site.state)[1])
        listed = rows(models("list", "--json"))
        assert listed["head", 2]["state"] == "serves"
        assert listed["head", 3]["state"] == "chosen, refused"
        assert "does not load" in listed["head", 3]["refused"]
        said = models("pin", "head", 3)
        assert said.code == 4
        assert "the daemon refused head 3" in said.err
        assert models("pin", "head", "--release").code == 4  # 3 is the newest still

        assert publish(repository) == 4
        daemon.wait_for(lambda: head() == 4)
        start = time.monotonic()
        said = spawn("models", "rollback", "--reason", "worse", "--site", site.file, cwd=tmp_path)
        assert (said.code, head()) == (0, 2)
        print(f"\nrollback beside a daemon: {time.monotonic() - start:.1f} s with the start of Python")
        said = models("pin", "encoder", 1)
        assert "at the daemon's next start" in said.out
        assert daemon.stop() == 0
    events = [json.loads(line) for line in (site.state / "audit.jsonl").read_text().splitlines()]
    assert [(e["event"], e["model"]) for e in events] == [
        *[("model pinned", "head"), ("model released", "head")] * 2,
        ("model rolled back", "head"),
        ("model pinned", "encoder"),
    ]


def test_encoder_that_was_published_beside_the_daemon_waits_for_its_start(models, site, repository) -> None:
    meta = model_repository.read_meta(repository, "encoder", 1)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        model_repository.publish(repository, meta, repository / "encoder/1/model.onnx")
        listed = rows(models("list", "--json"))
        assert listed["encoder", 1]["state"] == "serves"
        assert listed["encoder", 2]["state"] == "chosen, comes at the daemon's next start"


def test_table_fits_a_terminal_of_80_columns(models, site, repository, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(repository, labels=tuple(f"class-{i}" for i in np.arange(3)))
    choice.withdraw(repository, "head", 2, reason := "a reason of some length, as people give them, on one line " * 2)
    *table, told = models("list").out.splitlines()
    assert max(map(len, table)) <= 80
    assert told == f"withdrawn: head 2: {reason.strip()}"
