"""Hooks in a running daemon: real programs, told of lots and alarms, once each, whatever hangs, fails or dies."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from daemon import SOURCE, Daemon, Site, make_site, png
from klarf_lots import KLARF, RECIPE, image, klarf, name
from semwatch.store.hook_runs import HOOKS, HookRuns

PROGRAM = """#!{python} -S
import json, os, sys, time
with open({log!r}, "a") as file:
    file.write(json.dumps([sys.argv[1:], {{k: v for k, v in os.environ.items() if k.startswith("SEMWATCH_")}}]) + "\\n")
{then}
"""


def program(folder: Path, then: str = "") -> tuple[Path, Path]:
    """A program that notes its arguments and its variables, and the file with its notes."""
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / "hook.py", folder / "hook.log"
    path.write_text(PROGRAM.format(python=sys.executable, log=str(log), then=then))
    path.chmod(0o755)
    return path, log


def noted(log: Path) -> list[Any]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def site_with(folder: Path, repository: Path, recipe: dict[str, Any] | None = None, **hooks: Any) -> Site:
    changes = {} if recipe is None else {"recipe": recipe}
    return make_site(folder / "site", repository, **changes, hooks={"quiet_s": 2, "retry_s": 0.2, **hooks})


def test_lot_that_is_complete_is_told_once_with_its_values_and_not_again_after_a_restart(
    tmp_path: Path, tiny_repository: Path
) -> None:
    path, log = program(tmp_path / "hook")
    argv = [str(path), "{lot}", "{path}", "{images}", "{refused}", "as {lot} is"]
    site = site_with(tmp_path, tiny_repository, on_lot_done=argv)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        for n in range(3):
            site.put(f"lot; touch x/{n}.png", png(n))
        site.put("lot; touch x/bad.png", b"no image")
        daemon.wait_for(lambda: noted(log))
        daemon.wait_for(lambda: "hook on_lot_done" in daemon.log())
        assert daemon.stop() == 0
    ((arguments, variables),) = noted(log)
    lot = f"{SOURCE}/lot; touch x"
    assert arguments == [lot, str(site.folder / "results" / lot), "4", "1", "as {lot} is"]
    assert variables["SEMWATCH_HOOK_LOT"] == lot
    with Daemon(site) as daemon:
        daemon.wait_ready()
        site.put("lot2/9.png", png(9))
        daemon.wait_for(lambda: len(noted(log)) == 2)
        assert daemon.stop() == 0
    assert [arguments[0] for arguments, _ in noted(log)] == [lot, f"{SOURCE}/lot2"]


def test_lot_with_a_klarf_is_told_when_it_is_written_and_not_for_being_quiet(
    tmp_path: Path, tiny_repository: Path
) -> None:
    path, log = program(tmp_path / "hook")
    argv = [str(path), "{lot}", "{lot_id}", "{klarf}", "{revision}", "{defects}"]
    recipe = {**RECIPE, "klarf": {**KLARF, "target_column": "AUTOOFFSEMCLASS"}}
    site = site_with(tmp_path, tiny_repository, recipe=recipe, on_lot_done=argv)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        site.put(f"lot7/{name(1)}", image(1, side=64))
        site.put("lot7/lot7.001", klarf([1, 2]))
        daemon.wait_for(lambda: len(site.reviews()) == 1)
        time.sleep(6)  # longer than a lot without a KLARF is waited for
        assert noted(log) == []
        site.put(f"lot7/{name(2)}", image(2, side=64))
        daemon.wait_for(lambda: noted(log))
        assert daemon.stop() == 0
    ((arguments, variables),) = noted(log)
    written = site.results / "lot7/lot7.r1.001"
    assert arguments == [f"{SOURCE}/lot7", "lot 7", str(written), "1", "2"]
    assert written.exists()
    assert variables["SEMWATCH_HOOK_PATH"] == str(site.results / "lot7")


def test_hook_that_hangs_holds_up_neither_the_line_nor_the_stop_and_is_told_again(
    tmp_path: Path, tiny_repository: Path
) -> None:
    path, log = program(tmp_path / "hook", then="time.sleep(600)")
    site = site_with(tmp_path, tiny_repository, on_lot_done=[str(path), "{lot}"], timeout_s=600)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        site.put("lot1/1.png", png(1))
        daemon.wait_for(lambda: noted(log))
        for n in range(2, 8):
            site.put(f"lot1/{n}.png", png(n))
        daemon.wait_for(lambda: len(site.reviews()) == 7)
        start = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - start < 30
    with HookRuns(site.state / HOOKS, read_only=True) as runs:
        assert runs.waiting() == 1
    path.write_text(path.read_text().replace("600)", "0)"))
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: len(noted(log)) >= 3)  # the one that was ended, and the lot as it is now
        assert daemon.stop() == 0


def test_kill_in_the_midst_of_a_hook_repeats_it_after_the_start(tmp_path: Path, tiny_repository: Path) -> None:
    path, log = program(
        tmp_path / "hook", then=f"time.sleep(0 if os.path.exists({str(tmp_path / 'quick')!r}) else 600)"
    )
    site = site_with(tmp_path, tiny_repository, on_lot_done=[str(path), "{lot}"], timeout_s=600)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        site.put("lot1/1.png", png(1))
        daemon.wait_for(lambda: noted(log))
        daemon.process.kill()
        daemon.process.wait(30)
    (tmp_path / "quick").touch()
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: "hook on_lot_done, " in daemon.log())
        assert daemon.stop() == 0
    assert len(noted(log)) == 2
    with Daemon(site) as daemon:  # and no third time
        daemon.wait_ready()
        site.put("lot2/2.png", png(2))
        daemon.wait_for(lambda: [a for a, _ in noted(log)][-1] == [f"{SOURCE}/lot2"])
        assert daemon.stop() == 0
    assert len(noted(log)) == 3


def test_hook_that_fails_is_tried_again_then_given_up_which_doctor_says(
    tmp_path: Path, tiny_repository: Path, semwatch: Any
) -> None:
    path, log = program(tmp_path / "hook", then="print('the MES says no'); sys.exit(7)")
    site = site_with(tmp_path, tiny_repository, on_lot_done=[str(path)], attempts=2)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        site.put("lot1/1.png", png(1))
        daemon.wait_for(lambda: "is given up after 2 attempts: exit code 7; it said: the MES says no" in daemon.log())
        assert daemon.stop() == 0
    assert len(noted(log)) == 2
    said = semwatch("doctor", "--site", site.file)
    assert f"1 given up of late; on_lot_done of {SOURCE}/lot1: exit code 7" in said.words
    path.chmod(0o644)
    said = semwatch("doctor", "--site", site.file)
    assert f"{path} cannot be run" in said.words
    assert said.code == 1


def test_alarms_are_told_with_their_sentence_and_the_same_one_not_again_for_a_while(
    tmp_path: Path, tiny_repository: Path
) -> None:
    path, log = program(tmp_path / "hook")
    site = site_with(tmp_path, tiny_repository, on_alarm=[str(path), "{alarm}", "{source}", "{sentence}"])
    with Daemon(site) as daemon:
        daemon.wait_ready()
        for n in range(3):
            site.put(f"bad{n}.png", f"no image {n}".encode())
        daemon.wait_for(lambda: daemon.log().count(" quarantined: ") == 3 and noted(log))
        assert daemon.stop() == 0
    ((arguments, variables),) = noted(log)
    assert arguments[:2] == ["quarantined", SOURCE]
    assert "bad" in arguments[2]
    assert variables["SEMWATCH_HOOK_ALARM"] == "quarantined"


def test_pause_is_an_alarm(tmp_path: Path, tiny_repository: Path) -> None:
    path, log = program(tmp_path / "hook")
    site = site_with(tmp_path, tiny_repository, on_alarm=[str(path), "{alarm}"])
    text = site.file.read_text().replace("min_free_mb: 0", "min_free_mb: 999999999")
    site.file.write_text(text)
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: noted(log))
        assert daemon.stop() == 0
    assert noted(log)[0][0] == ["paused: disk full"]


def test_memory_of_the_hooks_that_is_broken_holds_up_no_image(tmp_path: Path, tiny_repository: Path) -> None:
    path, log = program(tmp_path / "hook")
    site = site_with(tmp_path, tiny_repository, on_lot_done=[str(path)])
    site.state.mkdir(parents=True)
    (site.state / HOOKS).write_bytes(b"broken " * 1000)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        site.put("lot1/1.png", png(1))
        daemon.wait_for(lambda: site.reviews() and "hooks wait a minute" in daemon.log())
        assert daemon.stop() == 0
    assert noted(log) == []


@pytest.mark.parametrize(
    ("hooks", "reason"),
    [
        ({"on_lot_done": ["lot-done"]}, "absolute path"),
        ({"on_lot_done": ["/bin/true", "{lots}"]}, "use one of {site}, {utc}, {lot}"),
        ({"on_alarm": ["/bin/true", "{lot}"]}, "use one of {site}, {utc}, {alarm}"),
        ({"on_lot_done": "/bin/true {lot}"}, "on_lot_done"),
        ({"attempts": 0}, "attempts"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_remedy(
    tmp_path: Path, tiny_repository: Path, semwatch: Any, hooks: dict[str, Any], reason: str
) -> None:
    site = make_site(tmp_path / "site", tiny_repository, hooks=hooks)
    said = semwatch("status", "--site", site.file)
    assert said.code == 2
    assert reason in said.words


def test_site_without_hooks_keeps_no_memory_of_them(tmp_path: Path, tiny_repository: Path) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        assert daemon.stop() == 0
    assert not (site.state / HOOKS).exists()
