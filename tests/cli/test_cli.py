"""The command line as a person meets it: help, exit codes, ``review`` and ``recipe``."""

import csv
import json
import os
import re
from pathlib import Path

import cv2
import pytest
import yaml

from commands import Command, put, spawn, write_recipe
from daemon import png
from semwatch.cli import options

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


@pytest.fixture
def review(semwatch: Command, tiny_repository: Path, tmp_path: Path) -> Command:
    """``semwatch review`` with the tiny models, gate open, results in ``tmp_path/out``."""
    recipe = write_recipe(tmp_path / "open.yaml", gate={"threshold": 0.0})
    fixed = ("--recipe", recipe, "--repository", tiny_repository, "--out", tmp_path / "out")
    return lambda *argv: semwatch("review", *fixed, *argv)


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
    from semwatch.settings.fields import EXAMPLES

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
    put(tmp_path / "out" / "review", b"a file where a folder should be")
    said = spawn("review", "a.png", "--repository", tiny_repository, "--out", "out", cwd=tmp_path)
    assert said.code == 4
    assert re.fullmatch(r"ServiceUnavailable: cannot write out/review/\S+: .*\n", said.err)


def test_results_that_should_go_into_a_file_are_a_wrong_argument(tmp_path, tiny_repository) -> None:
    said = spawn(
        "review", put(tmp_path / "a.png", png(1)), "--repository", tiny_repository, "--out", "a.png", cwd=tmp_path
    )
    assert (said.code, said.err) == (
        2,
        "ConfigError: --out a.png is no folder: name one, it is made where it is not there\n",
    )


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


def test_review_against_a_reference_says_what_became_of_it(review, tmp_path) -> None:
    from semwatch_training.synthetic.pairs import render_pair

    pair = render_pair("BEOL", seed=1, size_hw=(320, 384), max_shift=0.03, defects=["bridge"])
    inspected, reference = (
        put(tmp_path / name, cv2.imencode(".png", pixels)[1].tobytes())
        for name, pixels in (("a.png", pair.inspected), ("b.png", pair.reference))
    )
    (row,) = review(inspected, "--reference", reference, "--json").json
    assert row["references"] == [""]
    (page,) = json.loads(Path(row["result"]).read_text())["pages"]
    assert (page["reference"]["name"], page["reference"]["used"]) == ("b.png", True)
    said = review(inspected, reference, "--reference", reference)
    assert said.code == 2
    assert "--reference is of one image" in said.words


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
    assert str(tmp_path / "out/review/a.png.review.json") in said.out.split()


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
    monkeypatch.setattr(options.out, "_width", 200)
    said = semwatch("recipe", "show")
    assert said.code == 0
    assert "gate.false_alarm_rate 0.05 Share of defect-free images that may pass the gate." in said.words
    rows = [re.split(r" {2,}", line) for line in said.out.splitlines() if re.match(r"\w", line)][1:]
    assert len(rows) > 15
    assert all(len(row) == 3 for row in rows[1:]), said.out


def test_recipe_show_as_json_is_a_recipe_again(semwatch, tmp_path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", classes={"particle": {"code": 10}})
    shown = semwatch("recipe", "show", recipe, "--json").json
    identity = shown.pop("id")
    assert shown["classes"] == {"particle": {"code": 10, "doi": True}}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(shown))
    assert identity in semwatch("recipe", "check", tmp_path / "again.yaml").out
    assert "particle" in semwatch("recipe", "show", recipe).words


def calibrated(semwatch, tmp_path, repository, *argv: object, n: int = 19, n_defects: int = 0, **gate: float):
    """Run `recipe calibrate` on n images that are called normal, and on some that are called defective."""
    (tmp_path / "normals").mkdir()
    for seed in range(n):
        put(tmp_path / f"normals/{seed}.png", png(seed))
    for seed in range(n_defects):
        put(tmp_path / f"defects/d{seed}.png", png(100 + seed))
    given = ("--defects", tmp_path / "defects") if n_defects else ()
    recipe = write_recipe(tmp_path / "own.yaml", gate=gate)
    folders = (tmp_path / "normals", *given, "--recipe", recipe, "--repository", repository)
    return semwatch("recipe", "calibrate", *folders, *argv)


def test_calibrate_without_images_is_refused(semwatch, tmp_path, tiny_repository) -> None:
    said = calibrated(semwatch, tmp_path, tiny_repository, n=0)
    assert (said.code, said.out) == (2, "")
    assert "there is no image in it" in said.err


@pytest.mark.parametrize(("n", "rate", "needed"), [(5, 0.05, 19), (1, 0.3, 3)])
def test_calibrate_with_few_normals_says_what_they_promise_and_how_many_it_takes(
    semwatch, tmp_path, tiny_repository, n, rate, needed
) -> None:
    said = calibrated(semwatch, tmp_path, tiny_repository, n=n, false_alarm_rate=rate)
    assert said.code == 0
    assert f"at most {1 / (n + 1):.3%} of normal images like these {n} pass" in said.out
    assert f"cannot promise less, give\n# {needed} for it" in said.out
    assert yaml.safe_load(said.out)["gate"]["threshold"] > 0


def test_calibrate_without_defects_says_that_misses_are_not_known(semwatch, tmp_path, tiny_repository) -> None:
    said = calibrated(semwatch, tmp_path, tiny_repository)
    assert said.code == 0
    assert "what it would miss is not known: give images with defects" in said.out
    assert "now 0.057: false alarms 19 of 19, 100.0% (85.4% to 100.0%); misses not known" in said.out
    assert ": false alarms 0 of 19, 0.0% (0.0% to 14.6%)" in said.out


def test_calibrate_that_misses_more_than_now_prints_no_threshold_without_yes(
    semwatch, tmp_path, tiny_repository
) -> None:
    said = calibrated(semwatch, tmp_path, tiny_repository, n_defects=6, threshold=0.0)
    assert said.code == 1
    assert yaml.safe_load(said.out) is None  # comments alone
    sentence = re.search(r"makes recall worse: the proposed threshold \S+ finds (\d) of 6 .*one 0 finds 6", said.err)
    assert sentence
    assert int(sentence[1]) < 6
    assert "take a threshold of the table, or give --yes" in said.err
    assert re.search(r"^# missed at the proposed threshold, lowest score first: d\d\.png ", said.out, re.MULTILINE)
    rows = re.findall(r"^# (0\.\d+) +(?:needs (\d+) normal|[\d.]+ +\d+ of 19, )", said.out, re.MULTILINE)
    assert rows == [("0.01", "99"), ("0.02", "49"), *((rate, "") for rate in ("0.05", "0.1", "0.2", "0.3"))]


def test_calibrate_that_misses_more_than_now_goes_through_with_yes(semwatch, tmp_path, tiny_repository) -> None:
    said = calibrated(semwatch, tmp_path, tiny_repository, "--yes", n_defects=6, threshold=0.0)
    assert said.code == 0
    assert "this makes recall worse" in said.out
    assert yaml.safe_load(said.out)["gate"]["threshold"] > 0


def test_calibrate_that_misses_no_more_than_now_prints_the_threshold(semwatch, tmp_path, tiny_repository) -> None:
    said = calibrated(semwatch, tmp_path, tiny_repository, n_defects=6, threshold=1e6)
    assert said.code == 0
    assert "recall does not fall" in said.out
    assert yaml.safe_load(said.out)["gate"]["threshold"] > 0


def test_calibrate_as_json_says_the_same(semwatch, tmp_path, tiny_repository) -> None:
    said = calibrated(semwatch, tmp_path, tiny_repository, "--json", n_defects=6, threshold=0.0)
    assert said.code == 1
    found = said.json
    assert found["is_worse"]
    assert found["present"]["misses"]["count"] == 0
    assert found["proposed"]["misses"]["count"] == len(found["worst_missed"]) > 0
    assert found["proposed"]["threshold"] == found["threshold"]
    assert [row["false_alarm_rate"] for row in found["alternatives"]] == [0.01, 0.02, 0.05, 0.1, 0.2, 0.3]
    assert "threshold" not in found["alternatives"][0]


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
