"""`semwatch init`: a site from an empty folder that works, by flags and by questions; nothing there is overwritten."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from commands import Command
from daemon import Daemon, Site, png
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import load_site


def test_site_by_flags_is_clean_and_reviews_an_image(
    semwatch: Command, tmp_path: Path, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = semwatch("init", "fab", "--models", tiny_repository, "--source", "sem-1", "--name", "fab3-ws7", "--yes")
    assert said.code == 0, said.words
    assert "FIX" not in said.words
    assert "next: `semwatch run --site fab/site.yaml`" in said.words
    assert "then: `semwatch status --site fab/site.yaml`" in said.words
    site = load_site(tmp_path / "fab/site.yaml")
    assert (site.name, site.folders[0].source, site.redis) == ("fab3-ws7", "sem-1", None)
    assert semwatch("doctor", "--site", "fab/site.yaml").code == 0
    made = Site(tmp_path / "fab")
    with Daemon(made) as daemon:
        daemon.wait_ready()
        made.put("lot1/a.png", png(1))
        daemon.wait_for(made.reviews)
        assert daemon.stop() == 0


def test_site_without_models_is_written_and_says_what_to_mend(
    semwatch: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the models of a checkout are proposed there
    said = semwatch("init", tmp_path / "fab", "--yes")
    assert said.code == 1
    assert "FIX models" in said.words
    assert "mend what stands behind FIX" in said.words
    assert load_site(tmp_path / "fab/site.yaml").models.repository == tmp_path / "fab/model_repository"
    assert load_recipe(tmp_path / "fab/recipe.yaml").name == "layer-1"


@pytest.mark.parametrize("name", ["site.yaml", "recipe.yaml"])
def test_what_is_there_is_never_overwritten(semwatch: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    said = semwatch("init", tmp_path, "--yes")
    assert said.code == 2
    assert f"{name} is there already" in said.words
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--source", "a b"), "source"),
        (("--name", ""), "name"),
        (("--drop", "~/drop"), "not expanded"),
        (("--results", "drop/results"), "lies in the drop folder"),
        (("--redis", "localhost"), "redis.url"),
        (("--redis", "redis://:secret@host/0"), "password"),
    ],
)
def test_answer_that_cannot_be_used_is_refused_and_leaves_nothing(
    semwatch: Command, tmp_path: Path, flags: tuple[str, str], reason: str
) -> None:
    said = semwatch("init", tmp_path / "fab", "--yes", *flags)
    assert said.code == 2
    assert reason in said.words
    assert "secret" not in said.words
    assert not list((tmp_path / "fab").iterdir())


@pytest.mark.parametrize("odd", ["yes", "1", "a: b", "# c", "'", "null", "[x]"])
def test_odd_folder_names_and_recipe_names_reach_the_files_as_they_are(
    semwatch: Command, tmp_path: Path, odd: str
) -> None:
    semwatch("init", tmp_path / "fab", "--yes", "--drop", odd)
    assert yaml.safe_load((tmp_path / "fab/site.yaml").read_text())["folders"][0]["path"] == odd
    assert (tmp_path / "fab" / odd).is_dir()


def test_json_has_the_checks(semwatch: Command, tmp_path: Path, tiny_repository: Path) -> None:
    said = semwatch("init", tmp_path / "fab", "--models", tiny_repository, "--json")
    assert said.json["ok"]
    assert {one["name"] for one in said.json["checks"]} >= {"models", "ledger"}


def test_questions_at_a_terminal_take_answers_and_defaults(tmp_path: Path, tiny_repository: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "semwatch", "init", "fab", "--source", "sem-9"],
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    answers = iter(["fab3-ws7", "", str(tiny_repository), "", "", "", ""])
    shown, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 0.5)[0]:
            continue
        try:
            chunk = os.read(ours, 4096).decode()
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
        if shown.rstrip(" ").endswith(":") and shown.endswith(" "):
            os.write(ours, next(answers).encode() + b"\n")
            shown += "\n"
    assert process.wait(30) == 0, shown
    os.close(ours)
    assert "Name of the tool" not in shown
    site = load_site(tmp_path / "fab/site.yaml")
    assert (site.name, site.folders[0].source, site.folders[0].path) == ("fab3-ws7", "sem-9", tmp_path / "fab/drop")
