"""The command line as a person meets it: what it says, where, and with which exit code."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from daemon import SOURCE, Daemon, Site, make_site, png
from semwatch.__main__ import main
from semwatch.audit import AuditLog
from semwatch.embedded_redis import EmbeddedRedis, find_executable
from semwatch.errors import ConfigError
from semwatch.ledger import Ledger

NOWHERE = "redis://127.0.0.1:1/0"
COMMANDS = (
    ["run"],
    ["review"],
    ["demo"],
    ["status"],
    ["doctor"],
    ["recipe", "check"],
    ["recipe", "show"],
    ["recipe", "calibrate"],
    ["audit", "verify"],
    ["quarantine", "list"],
    ["quarantine", "requeue"],
)


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def words(self) -> str:
        """Both outputs without the frames and line ends of tables and help."""
        return re.sub(r"[\s│╭╮╰╯─┃┏┓┡┩┳╇┴└┘━]+", " ", self.out + self.err)


Command = Callable[..., Said]


@pytest.fixture
def semwatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``semwatch ARGV...`` inside this process, from its entry point; spared is only the start of Python."""

    def command(*argv: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["semwatch", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Said(code or 0, said.out, said.err)

    return command


def spawn(*argv: object, cwd: Path, **environ: str) -> Said:
    """``semwatch ARGV...`` as a process."""
    done = subprocess.run(
        [sys.executable, "-m", "semwatch", *map(str, argv)],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    try:
        find_executable()
    except ConfigError as error:
        pytest.skip(str(error))
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def review(semwatch: Command, tiny_repository: Path, tmp_path: Path) -> Command:
    """``semwatch review`` with the tiny models, gate open, results in ``tmp_path/out``."""
    recipe = write_recipe(tmp_path / "open.yaml", gate={"threshold": 0.0})
    fixed = ("--recipe", recipe, "--repository", tiny_repository, "--out", tmp_path / "out")
    return lambda *argv: semwatch("review", *fixed, *argv)


def write_recipe(path: Path, **values: object) -> Path:
    path.write_text(yaml.safe_dump({"name": "test", **values}))
    return path


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


# --- help and exit codes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], *COMMANDS], ids=" ".join)
def test_help_of_every_command_says_what_it_does_and_what_its_exit_codes_mean(semwatch, argv) -> None:
    said = semwatch(*argv, "--help")
    assert said.code == 0
    assert f"Usage: semwatch {' '.join(argv)}".rstrip() in said.words
    for meaning in ("0 all well", "2 settings", "3 the models", "4 a service"):
        assert meaning in said.words
    described = said.words.split(f"semwatch {' '.join(argv)}")[1].split("Exit codes")[0]
    assert re.search(r"[A-Z][a-z]+( [\w',-]+){3}", described)


@pytest.mark.parametrize("group", ["recipe", "audit", "quarantine"])
def test_group_without_a_command_shows_what_there_is(semwatch, group) -> None:
    said = semwatch(group)
    assert said.code == 2
    for name in (command[1] for command in COMMANDS if command[0] == group):
        assert name in said.words


@pytest.mark.parametrize(
    "argv", [["reveiw"], ["review"], ["review", "absent.tif"], ["status"], ["doctor", "--colour"]], ids=" ".join
)
def test_wrong_arguments_are_exit_code_2_and_are_named(semwatch, argv) -> None:
    said = semwatch(*argv)
    assert said.code == 2
    assert said.out == ""
    assert re.search(r"reveiw|absent\.tif|paths|--site|--colour", said.words)


@pytest.mark.parametrize("argv", [["run"], ["status"], ["doctor"], ["quarantine", "list"]], ids=" ".join)
def test_missing_site_is_exit_code_2_and_names_the_example_to_start_from(semwatch, tmp_path, argv) -> None:
    said = semwatch(*argv, "--site", tmp_path / "absent.yaml")
    assert said.code == 2
    assert said.err.startswith("ConfigError: ")
    assert f"cp {Path('semwatch') / 'examples' / 'site.yaml'}" in said.err.replace(str(example_folder()), "semwatch")


def example_folder() -> Path:
    from semwatch.config import EXAMPLES

    return EXAMPLES.parent


def test_process_exits_0_where_all_is_well(tmp_path, tiny_repository) -> None:
    image = put(tmp_path / "a.png", png(1))
    said = spawn("review", image, "--repository", tiny_repository, "--json", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert (tmp_path / "semwatch-results/review/a.png.review.json").is_file()
    assert said.json[0]["file"] == str(image)


def test_process_exits_1_where_a_file_could_not_be_reviewed(tmp_path, tiny_repository) -> None:
    put(tmp_path / "a.png", b"no image")
    said = spawn("review", "a.png", "--repository", tiny_repository, cwd=tmp_path)
    assert said.code == 1
    assert "neither TIFF, PNG, JPEG nor BMP" in said.words


def test_process_exits_2_where_the_settings_are_wrong(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: a\ngate: {treshold: 1}\n")
    said = spawn("recipe", "check", "recipe.yaml", cwd=tmp_path)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1


def test_process_exits_3_where_there_are_no_models(tmp_path) -> None:
    put(tmp_path / "a.png", png(1))
    said = spawn("review", "a.png", cwd=tmp_path)
    assert said.code == 3
    assert said.err.startswith("ModelMismatch: no detector in the model repository model_repository; build it with")
    assert len(said.err.splitlines()) == 1


def test_process_exits_4_where_the_disk_refuses(tmp_path, tiny_repository) -> None:
    put(tmp_path / "a.png", png(1))
    put(tmp_path / "out", b"a file where a folder should be")
    said = spawn("review", "a.png", "--repository", tiny_repository, "--out", "out", cwd=tmp_path)
    assert said.code == 4
    assert re.fullmatch(r"ServiceUnavailable: cannot write out/review/\S+: .*\n", said.err)


# --- review --------------------------------------------------------------------------------------------------------


def test_review_of_an_empty_folder_says_what_counts_as_an_image(review, tmp_path) -> None:
    (tmp_path / "lot").mkdir()
    said = review(tmp_path / "lot")
    assert said.code == 2
    assert "no images (.tif, .tiff, .png" in said.err
    assert not (tmp_path / "out").exists()


def test_review_of_a_file_writes_result_overlay_and_table(review, tmp_path) -> None:
    said = review(put(tmp_path / "a.png", png(1)), "--json")
    assert said.code == 0
    (row,) = said.json
    assert row["result"] == str(tmp_path / "out/review/a.png.review.json")
    written = json.loads(Path(row["result"]).read_text())
    assert row["image_scores"] == pytest.approx([page["image_score"] for page in written["pages"]], rel=1e-5)
    assert len(row["verdicts"]) == len(written["pages"][0]["defects"]) > 0
    assert [Path(overlay).is_file() for overlay in row["overlays"]] == [True]
    table = read_csv(tmp_path / "out/review/lot.csv")
    assert [line["path"] for line in table] == ["a.png"] * len(row["verdicts"])


def test_review_of_a_folder_names_results_like_the_daemon_and_gives_each_lot_its_table(review, tmp_path) -> None:
    for name in ("lot1/a.png", "lot1/deep/b.png", "c.png"):
        put(tmp_path / "drop" / name, png(len(name)))
    for name in ("half.png.part", ".hidden.png", ".cache/d.png", "notes.txt"):
        put(tmp_path / "drop" / name, png(1))
    said = review(tmp_path / "drop", "--json")
    assert said.code == 0
    found = {path.relative_to(tmp_path / "out/review").as_posix() for path in (tmp_path / "out").rglob("*.review.json")}
    assert found == {"lot1/a.png.review.json", "lot1/deep/b.png.review.json", "c.png.review.json"}
    assert len(said.json) == 3
    for lot in (".", "lot1", "lot1/deep"):
        assert (tmp_path / "out/review" / lot / "lot.csv").is_file()


def test_review_of_good_and_broken_files_reviews_the_good_and_says_why_not_the_broken(review, tmp_path) -> None:
    lot = tmp_path / "lot"
    put(lot / "a.png", png(1))
    put(lot / "b.png", b"no image")
    put(lot / "c.png", png(2)[:500])
    said = review(lot, "--json")
    assert said.code == 1
    assert [Path(row["file"]).name for row in said.json if "error" in row] == ["b.png", "c.png"]
    assert [Path(row["file"]).name for row in said.json if "result" in row] == ["a.png"]
    assert len({line["path"] for line in read_csv(tmp_path / "out/review/lot.csv")}) == 1
    assert review(lot).code == 1


def test_review_of_two_folders_keeps_files_of_one_name_apart(review, tmp_path) -> None:
    for lot in ("lot1", "lot2"):
        put(tmp_path / lot / "a.png", png(int(lot[-1])))
    said = review(tmp_path / "lot1", tmp_path / "lot2", "--json")
    assert [row["result"] for row in said.json] == [
        str(tmp_path / "out/review" / lot / "a.png.review.json") for lot in ("lot1", "lot2")
    ]


def test_review_of_a_file_given_twice_is_one_review(review, tmp_path) -> None:
    image = put(tmp_path / "lot/a.png", png(1))
    assert len(review(image, tmp_path / "lot", f"{tmp_path}/lot/../lot/a.png", "--json").json) == 1


def test_second_review_of_the_folder_that_holds_the_results_does_not_take_overlays_for_images(review, tmp_path) -> None:
    put(tmp_path / "a.png", png(1))
    assert len(review(tmp_path, "--json").json) == 1
    assert len(review(tmp_path, "--json").json) == 1


def test_names_with_brackets_and_bytes_that_are_no_text_are_shown_as_they_are(tmp_path, tiny_repository) -> None:
    put(tmp_path / "[red]a[1].png", b"no image")
    put(Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.png")), png(1))
    argv = ("review", ".", "--repository", tiny_repository)
    said = spawn(*argv, cwd=tmp_path, PYTHONIOENCODING="utf-8:strict", COLUMNS="200")
    assert said.code == 1
    assert "[red]a[1].png: neither" in said.out
    assert r"b\xff.png.review.json" in said.out


def test_table_of_a_narrow_terminal_cuts_no_path_off(review, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    said = review(put(tmp_path / "a.png", png(1)))
    assert "…" not in said.out
    folded = [line.split("│")[4].strip() for line in said.out.splitlines() if line.count("│") == 5]
    assert "".join(folded) == str(tmp_path / "out/review/a.png.review.json")


def test_review_with_a_recipe_whose_promise_the_detector_cannot_keep_is_exit_code_2(
    semwatch, tmp_path, tiny_repository
) -> None:
    recipe = write_recipe(tmp_path / "strict.yaml", gate={"false_alarm_rate": 0.001})
    image = put(tmp_path / "a.png", png(1))
    said = semwatch("review", image, "--recipe", recipe, "--repository", tiny_repository, "--out", tmp_path / "out")
    assert said.code == 2
    assert "60 normal images cannot promise a false alarm rate of 0.001" in said.err


# --- recipe --------------------------------------------------------------------------------------------------------


def test_recipe_check_tells_name_version_and_id_of_a_good_one(semwatch, tmp_path) -> None:
    said = semwatch("recipe", "check", write_recipe(tmp_path / "r.yaml", version=3))
    assert said.code == 0
    assert re.fullmatch(r"ok test version 3, id [0-9a-f]{16}\n", said.out)


def test_recipe_check_names_line_key_and_the_nearest_valid_key(semwatch, tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("name: a\ngate:\n  treshold: 1.5\n")
    said = semwatch("recipe", "check", tmp_path / "r.yaml")
    assert (said.code, said.out) == (2, "")
    assert f"{tmp_path / 'r.yaml'}:3: gate.treshold" in said.err
    assert re.search(r"\bthreshold\b", said.err)


def test_recipe_check_shows_brackets_of_a_message(semwatch, tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("name: a\nbinarization: {percentiles: 5}\n")
    assert "[a, b]" in semwatch("recipe", "check", tmp_path / "r.yaml").err


def test_recipe_check_of_an_absent_recipe_names_the_example(semwatch, tmp_path) -> None:
    said = semwatch("recipe", "check", tmp_path / "absent.yaml")
    assert said.code == 2
    assert "no such file; start from the commented example: cp " in said.err


def test_recipe_show_gives_every_setting_with_its_meaning(semwatch, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    said = semwatch("recipe", "show")
    assert said.code == 0
    assert "gate.false_alarm_rate 0.05 Share of defect-free images that may pass the gate." in said.words
    rows = [line.split("│") for line in said.out.splitlines() if line.startswith("│")]
    assert len(rows) > 15
    assert all(cell.strip() for row in rows for cell in row[1:4])


def test_recipe_show_as_json_is_a_recipe_again(semwatch, tmp_path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", classes={"particle": {"code": 10}})
    shown = semwatch("recipe", "show", recipe, "--json").json
    identity = shown.pop("id")
    assert shown["classes"] == {"particle": {"code": 10, "doi": True}}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(shown))
    assert identity in semwatch("recipe", "check", tmp_path / "again.yaml").out
    assert "particle" in semwatch("recipe", "show", recipe).words


@pytest.mark.parametrize(("n", "rate", "needed"), [(0, 0.05, 19), (3, 0.05, 19), (1, 0.3, 3)])
def test_calibrate_with_too_few_normals_says_how_many_it_takes(
    semwatch, tmp_path, tiny_repository, n, rate, needed
) -> None:
    (tmp_path / "normals").mkdir()
    for seed in range(n):
        put(tmp_path / f"normals/{seed}.png", png(seed))
    recipe = write_recipe(tmp_path / "r.yaml", gate={"false_alarm_rate": rate})
    fixed = ("--recipe", recipe, "--repository", tiny_repository)
    said = semwatch("recipe", "calibrate", tmp_path / "normals", *fixed)
    assert (said.code, said.out) == (2, "")
    assert f"{n} normal images cannot promise a false alarm rate of {rate}; give at least {needed}," in said.err
    for seed in range(n, needed):
        put(tmp_path / f"normals/{seed}.png", png(seed))
    assert semwatch("recipe", "calibrate", tmp_path / "normals", *fixed).code == 0


def test_line_that_calibrate_prints_makes_a_recipe_that_keeps_normals_out(semwatch, tmp_path, tiny_repository) -> None:
    for seed in range(19):
        put(tmp_path / f"normals/{seed}.png", png(seed))
    fixed = ("calibrate", tmp_path / "normals", "--repository", tiny_repository)
    said = semwatch("recipe", *fixed)
    assert said.code == 0
    assert "at most 5.000% of normal images like these 19 pass" in said.out
    (tmp_path / "r.yaml").write_text(f"name: own\n{said.out}")
    measured = semwatch("recipe", *fixed, "--json").json
    assert measured["n_normals"] == 19
    assert yaml.safe_load(said.out)["gate"]["threshold"] == pytest.approx(measured["threshold"], rel=1e-8)
    argv = ("--recipe", tmp_path / "r.yaml", "--repository", tiny_repository, "--out", tmp_path / "out")
    reviewed = semwatch("review", tmp_path / "normals", *argv, "--json")
    assert [row["verdicts"] for row in reviewed.json] == [[]] * 19


def test_calibrate_names_the_file_that_is_no_image(semwatch, tmp_path, tiny_repository) -> None:
    put(tmp_path / "normals/a.png", png(1))
    broken = put(tmp_path / "normals/b.png", b"no image")
    said = semwatch("recipe", "calibrate", tmp_path / "normals", "--repository", tiny_repository)
    assert said.code == 2
    assert str(broken) in said.err
    assert "take it out" in said.err


# --- doctor --------------------------------------------------------------------------------------------------------


def doctor(semwatch: Command, site: Site) -> tuple[int, dict[str, dict[str, Any]]]:
    said = semwatch("doctor", "--site", site.file, "--json")
    return said.code, {check["check"]: check for check in said.json}


def test_doctor_is_content_with_a_site_that_can_work(semwatch, tmp_path, tiny_repository, redis_url) -> None:
    site = make_site(tmp_path / "[site]", tiny_repository, redis_url=redis_url)
    code, checks = doctor(semwatch, site)
    assert code == 0
    assert all(check["ok"] for check in checks.values())
    assert checks["models"]["detail"] == "detector 1, encoder 1, head 1"
    assert checks[f"gate of {SOURCE}"]["detail"] == "opens above 0"
    assert checks["Redis"]["detail"] == "answers; unknowns 0, results 0"
    said = semwatch("doctor", "--site", site.file)
    assert said.code == 0
    assert f"ok  drop folder {SOURCE}: {site.drop}\n" in said.out
    assert "FIX" not in said.out


def test_doctor_leaves_nothing_behind(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    before = sorted(site.folder.rglob("*"))
    semwatch("doctor", "--site", site.file)
    semwatch("status", "--site", site.file)
    assert sorted(site.folder.rglob("*")) == before


def break_drop_folder(site: Site) -> None:
    site.drop.rmdir()


def put_file_for_drop_folder(site: Site) -> None:
    site.drop.rmdir()
    site.drop.touch()


def put_file_for_results(site: Site) -> None:
    (site.folder / "results").touch()


def put_file_for_state(site: Site) -> None:
    site.state.touch()


def take_models_away(site: Site) -> None:
    change_settings(site, models={"repository": "nothing"})


def name_redis_that_is_down(site: Site) -> None:
    change_settings(site, redis={"url": NOWHERE, "timeout_s": 1})


def ask_for_a_disk_that_no_one_has(site: Site) -> None:
    change_settings(site, limits={"min_free_mb": 10**9})


def misspell_recipe(site: Site) -> None:
    (site.folder / "recipe.yaml").write_text("gate: {treshold: 1}\n")


def promise_too_much(site: Site) -> None:
    write_recipe(site.folder / "recipe.yaml", gate={"false_alarm_rate": 0.001})


def break_ledger(site: Site) -> None:
    put(site.state / "ledger.sqlite", b"no database at all" * 100)


def change_settings(site: Site, **changes: object) -> None:
    site.file.write_text(yaml.safe_dump({**yaml.safe_load(site.file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "check", "remedy"),
    [
        (break_drop_folder, f"drop folder {SOURCE}", "create it, or mount the share"),
        (put_file_for_drop_folder, f"drop folder {SOURCE}", "give the folder's path"),
        (put_file_for_results, "results folder", "move it away"),
        (put_file_for_state, "state folder", "move it away"),
        (ask_for_a_disk_that_no_one_has, "disk", "free some space"),
        (break_ledger, "ledger", "move the file"),
        (misspell_recipe, f"recipe of {SOURCE}", "threshold"),
        (take_models_away, "models", "semwatch-train build"),
        (promise_too_much, f"gate of {SOURCE}", "semwatch recipe calibrate"),
        (name_redis_that_is_down, "Redis", "start it, or correct redis.url"),
    ],
)
def test_doctor_names_the_one_thing_that_is_wrong_and_its_remedy(
    semwatch, tmp_path, tiny_repository, damage, check, remedy
) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    damage(site)
    code, checks = doctor(semwatch, site)
    assert code == 1
    assert [name for name, found in checks.items() if not found["ok"]] == [check]
    assert remedy in checks[check]["remedy"]


def test_doctor_prints_each_fault_with_its_remedy_below(semwatch, tmp_path) -> None:
    site = make_site(tmp_path / "site", tmp_path / "nothing", redis_url=NOWHERE)
    site.drop.rmdir()
    said = semwatch("doctor", "--site", site.file)
    lines = said.out.splitlines()
    assert said.code == 1
    faults = [at for at, line in enumerate(lines) if line.startswith("FIX ")]
    assert [lines[at].split(":")[0] for at in faults] == [f"FIX drop folder {SOURCE}", "FIX models", "FIX Redis"]
    assert all(lines[at + 1].startswith("    ") for at in faults)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_doctor_tells_folders_without_rights(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    site.drop.chmod(0o300)
    (site.folder / "results").mkdir(0o500)
    _, checks = doctor(semwatch, site)
    assert not checks[f"drop folder {SOURCE}"]["ok"]
    assert not checks["results folder"]["ok"]


# --- status --------------------------------------------------------------------------------------------------------


def status(semwatch: Command, site: Site) -> dict[str, Any]:
    said = semwatch("status", "--site", site.file, "--json")
    assert said.code == 0
    return said.json  # type: ignore[no-any-return]


def test_status_before_the_daemon_ever_ran_counts_what_waits(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    state = status(semwatch, site)
    assert (state["daemon_running"], state["waiting_files"], state["oldest_waiting_s"]) == (False, 0, 0)
    assert state["done"] is None
    site.put("lot/a.png", png(1))
    os.utime(site.put("b.png", png(2)), (0, 0))  # an old picture that has just been copied
    state = status(semwatch, site)
    assert state["waiting_files"] == 2
    assert state["oldest_waiting_s"] < 60
    assert state["models"] == {"detector": 1, "encoder": 1, "head": 1}
    assert state["disk_free_mb"] > 0
    assert "daemon running no" in semwatch("status", "--site", site.file).words


def test_status_while_the_daemon_runs_and_after_it(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository, limits={"min_free_mb": 10**9})  # so that the line pauses
    site.put("a.png", png(1))
    before = status(semwatch, site)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        during = status(semwatch, site)
        daemon.kill()
    after = status(semwatch, site)
    assert [state["daemon_running"] for state in (before, during, after)] == [False, True, False]
    assert [state["waiting_files"] for state in (before, during, after)] == [1, 1, 1]
    assert [state["done"] for state in (before, during, after)] == [None, 0, 0]
    assert before.keys() == during.keys() == after.keys()


def test_status_with_redis_tells_its_depths_and_without_an_answer_none(
    semwatch, tmp_path, tiny_repository, redis_url
) -> None:
    assert status(semwatch, make_site(tmp_path / "a", tiny_repository))["redis"] == "not configured"
    site = make_site(tmp_path / "b", tiny_repository, redis_url=redis_url)
    assert status(semwatch, site)["redis"] == {"unknowns": 0, "results": 0}
    assert "redis unknowns 0, results 0" in semwatch("status", "--site", site.file).words
    assert status(semwatch, make_site(tmp_path / "c", tiny_repository, redis_url=NOWHERE))["redis"] is None


def test_status_tells_folders_and_models_that_are_away(semwatch, tmp_path) -> None:
    site = make_site(tmp_path / "site", tmp_path / "nothing")
    site.drop.rmdir()
    state = status(semwatch, site)
    assert state["folders_away"] == [SOURCE]
    assert state["models"] == {"detector": None, "encoder": None, "head": None}


def test_status_of_a_broken_ledger_is_one_message_with_the_remedy(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    break_ledger(site)
    said = semwatch("status", "--site", site.file, "--json")
    assert (said.code, said.out) == (2, "")
    assert "move the file" in said.err


# --- audit ---------------------------------------------------------------------------------------------------------


def write_log(folder: Path, n: int) -> Path:
    with AuditLog(folder / "audit.jsonl") as log:
        log.append([(seq, {"event": "reviewed", "path": f"{seq}.png"}) for seq in range(1, n + 1)])
    return folder / "audit.jsonl"


def test_audit_verify_of_an_absent_log_says_so(semwatch, tmp_path) -> None:
    for path in (tmp_path / "audit.jsonl", tmp_path):
        said = semwatch("audit", "verify", path)
        assert (said.code, said.out) == (2, "")
        assert f"no audit log at {path}; the daemon keeps audit.jsonl in the state_dir" in said.err


def test_audit_verify_of_an_intact_log_gives_the_hash_to_note_on_one_line(semwatch, tmp_path) -> None:
    log = write_log(tmp_path, 3)
    said = semwatch("audit", "verify", log)
    assert said.code == 0
    assert re.fullmatch(r"intact: 3 lines; note elsewhere: [0-9a-f]{64}\n", said.out)
    report = semwatch("audit", "verify", log, "--json").json
    assert (report["ok"], report["n_lines"], report["problems"]) == (True, 3, [])


def test_audit_verify_of_a_tampered_log_names_the_line(semwatch, tmp_path) -> None:
    log = write_log(tmp_path, 3)
    log.write_text(log.read_text().replace("2.png", "x.png"))
    said = semwatch("audit", "verify", log)
    assert said.code == 1
    assert "broken: line 2: was edited" in said.out
    said = semwatch("audit", "verify", log, "--json")
    assert (said.code, said.json["ok"]) == (1, False)


def test_audit_verify_notices_lines_cut_off_at_the_end_where_the_ledger_lies_beside(semwatch, tmp_path) -> None:
    log = write_log(tmp_path, 2)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for seq in (1, 2, 3):  # the third still waits to be appended, which is no fault
            sha256 = str(seq) * 64
            claim = ledger.claim("s", f"{seq}", sha256=sha256, size=1, mtime_ns=1, now_utc="2026-01-01T00:00:00Z")
            ledger.finish(claim, outbox=[], audit={"event": "reviewed"}, now_utc="2026-01-01T00:00:00Z")
        ledger.forget_audit(2)
    assert semwatch("audit", "verify", log).code == 0
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    said = semwatch("audit", "verify", log)
    assert said.code == 1
    assert "ends with seq 1: the ledger beside it has handed over 2" in said.out


# --- quarantine ----------------------------------------------------------------------------------------------------


def test_quarantine_before_the_daemon_ever_ran_is_one_message(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    for argv in (["list", "--site", site.file], ["requeue", "--site", site.file, "ab"]):
        said = semwatch("quarantine", *argv)
        assert said.code == 2
        assert "the daemon has not run yet" in said.err


def test_quarantined_file_is_listed_requeued_and_tried_again_by_the_running_daemon(
    semwatch, tmp_path, tiny_repository
) -> None:
    site = make_site(tmp_path / "site", tiny_repository, reconcile_s=0.5)
    chosen = ("--site", site.file)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        assert semwatch("quarantine", "list", *chosen, "--json").json == []
        site.put("lot/[b]broken.png", b"no image")
        daemon.wait_for(lambda: status(semwatch, site)["quarantined"] == 1)
        (work,) = semwatch("quarantine", "list", *chosen, "--json").json
        assert work["path"] == "lot/[b]broken.png"
        assert "neither TIFF" in work["reason"]

        shown = work["sha256"][:16]
        listed = semwatch("quarantine", "list", *chosen).words
        assert shown in listed
        assert "[b]broken.png" in listed
        for wrong in ("", "zz"):
            said = semwatch("quarantine", "requeue", *chosen, shown, wrong)
            assert said.code == 2
            assert f"nothing in quarantine begins with '{wrong}'" in said.err

        said = semwatch("quarantine", "requeue", *chosen, shown[:8].upper())
        assert (said.code, said.out) == (0, f"queued again: {SOURCE}/lot/[b]broken.png\n")
        daemon.wait_for(lambda: daemon.log().count("broken.png quarantined") == 2)

        site.put("lot/[b]broken.png", png(1))
        daemon.wait_for(lambda: status(semwatch, site)["done"] == 1)
        assert daemon.stop() == 0
    state = status(semwatch, site)
    assert (state["done"], state["quarantined"], state["waiting_files"]) == (1, 1, 0)
    assert semwatch("audit", "verify", site.state / "audit.jsonl").code == 0


def test_requeued_file_that_has_gone_is_asked_for(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    with Ledger(site.state / "ledger.sqlite") as ledger:
        now_utc = "2026-01-01T00:00:00Z"
        claim = ledger.claim(SOURCE, "gone.png", sha256="ab" * 32, size=1, mtime_ns=1, now_utc=now_utc)
        ledger.quarantine(claim, "broken", audit={"event": "quarantined"}, now_utc=now_utc)
    said = semwatch("quarantine", "requeue", "--site", site.file, "ab")
    assert said.code == 0
    assert said.out == f"queued again: {SOURCE}/gone.png (is not in the drop folder now: drop it again)\n"
