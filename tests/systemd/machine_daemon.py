"""The daemon under systemd: started, stopped, killed, hung, rebooted, always with files on their way."""

import hashlib
import time
from functools import partial

import pytest

from daemon import png
from installed import (
    DAEMON,
    IDLE_S,
    SITE,
    Load,
    books,
    change,
    drop,
    drop_in,
    half_written,
    idle_cost,
    ready,
    results,
    wait_results,
)
from machine import Machine
from scenario_table import Note

WATCHDOG_S = 8


def test_a_start_returns_when_the_daemon_can_work(machine: Machine, note: Note) -> None:
    machine.run("systemctl", "stop", DAEMON)
    drop(machine, "waits.png", png(1))
    start = time.monotonic()
    machine.run("systemctl", "start", "--no-block", DAEMON)
    machine.wait_for(lambda: machine.show(DAEMON, "ActiveState") == "activating", 10, "the start")
    ready(machine)
    start_s = time.monotonic() - start
    said = machine.journal(f"--unit={DAEMON}", "--boot")
    became_ready = max(float(e["__MONOTONIC_TIMESTAMP"]) for e in said if str(e["MESSAGE"]).startswith("Started"))
    loaded = max(float(e["__MONOTONIC_TIMESTAMP"]) for e in said if "ready: " in str(e["MESSAGE"]))
    assert abs(became_ready - loaded) < 1e6, "systemd's word and the daemon's are a second apart"
    assert half_written(machine) == []
    note.books(books(machine, ["waits.png"]))
    note.measured(f"{start_s:.1f} s from start to ready")


def test_a_broken_settings_end_the_start_and_are_not_tried_again(machine: Machine, note: Note) -> None:
    text = machine.path(SITE).read_text()
    change(machine, SITE, folderz=[])
    drop(machine, "waits.png", png(1))
    assert machine.run("systemctl", "restart", DAEMON, check=False).returncode != 0
    assert (machine.show(DAEMON, "Result"), machine.show(DAEMON, "ExecMainStatus")) == ("exit-code", "2")
    time.sleep(8)  # longer than RestartSec
    assert (machine.show(DAEMON, "ActiveState"), machine.show(DAEMON, "NRestarts")) == ("failed", "0")
    assert "folderz" in machine.messages(DAEMON)
    machine.path(SITE).write_text(text)
    machine.run("systemctl", "start", DAEMON)
    note.books(books(machine, ["waits.png"]))
    note.measured("exit 2, restarts 0; after the repair it starts")


def test_b_stop_under_load_keeps_its_bound_and_leaves_nothing_half_written(machine: Machine, note: Note) -> None:
    bound_s = float(machine.show(DAEMON, "TimeoutStopUSec").removesuffix("s"))
    with Load(machine, 200) as load:
        wait_results(machine, 20)
        start = time.monotonic()
        machine.run("systemctl", "stop", DAEMON)
        stop_s = time.monotonic() - start
        assert half_written(machine) == []
        n_left = load.n - len(results(machine))
        assert n_left > 0, "it stopped after the work, not under it"
    assert (machine.show(DAEMON, "Result"), machine.show(DAEMON, "ExecMainStatus")) == ("success", "0")
    assert stop_s < bound_s
    machine.run("systemctl", "start", DAEMON)
    note.books(books(machine, load.names))
    note.measured(f"stopped in {stop_s:.1f} s of {bound_s:g}, {n_left} files still to come")


def test_c_killed_under_load_it_is_restarted(machine: Machine, note: Note) -> None:
    with Load(machine, 300) as load:
        for kill in range(3):
            wait_results(machine, 20 + 70 * kill)
            machine.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", DAEMON)
            machine.wait_for(partial(_has_restarted, machine, kill + 1), 30, "the restart")
            ready(machine)
    note.books(books(machine, load.names))
    assert machine.show(DAEMON, "NRestarts") == "3"
    note.measured("3 x kill -9")


def test_d_a_hang_under_load_is_ended_by_the_watchdog(machine: Machine, note: Note) -> None:
    drop_in(machine, DAEMON, f"[Service]\nWatchdogSec={WATCHDOG_S}\n")
    machine.run("systemctl", "restart", DAEMON)
    with Load(machine, 150) as load:
        wait_results(machine, 20)
        start = time.monotonic()
        machine.run("systemctl", "kill", "--kill-who=main", "--signal=STOP", DAEMON)
        detected_s = machine.wait_for(lambda: "atchdog timeout" in machine.messages(DAEMON), 60, "the watchdog")
        machine.wait_for(partial(_has_restarted, machine, 1), 60, "the restart")
        ready(machine)
        restart_s = time.monotonic() - start
    note.books(books(machine, load.names))
    assert restart_s <= 2 * WATCHDOG_S
    note.measured(f"WatchdogSec={WATCHDOG_S}: noticed after {detected_s:.1f} s, at work again after {restart_s:.1f} s")


@pytest.mark.parametrize("how", ["reboot", "power cut"])
def test_h_reboot_with_work_in_flight(how: str, machine: Machine, note: Note) -> None:
    names = []
    with Load(machine, 200, per_s=100) as load:
        wait_results(machine, 20)
    names += load.names
    n_left = load.n - len(results(machine))
    assert n_left > 0, "nothing was in flight"
    start = time.monotonic()
    machine.reboot() if how == "reboot" else machine.cut_power()
    ready(machine)
    boot_s = time.monotonic() - start
    note.books(books(machine, names))
    note.measured(f"{how} with {n_left} files to come; ready again after {boot_s:.1f} s")


def test_k_idle_costs_next_to_nothing(machine: Machine, note: Note) -> None:
    with Load(machine, 20) as load:
        pass
    done = books(machine, load.names)
    share, resident_mb = idle_cost(machine)
    note.books(done)
    note.measured(f"inference in the daemon: {100 * share:.2f} % of one core over {IDLE_S:g} s, {resident_mb:.0f} MB")
    assert share < 0.01


def test_l_the_journal_finds_one_file_by_its_hash(machine: Machine, note: Note) -> None:
    data = png(7)
    drop(machine, "lot1/W05/one.png", data)
    drop(machine, "lot1/W05/other.png", png(8))
    done = books(machine, ["lot1/W05/one.png", "lot1/W05/other.png"])
    sha256 = hashlib.sha256(data).hexdigest()
    found = machine.journal(f"--unit={DAEMON}", f"SHA256={sha256}")
    if not found and not machine.journal("--field=SHA256"):
        pytest.skip("the daemon writes no journald fields")
    assert found
    assert all("one.png" in str(entry) for entry in found)
    assert {entry["PRIORITY"] for entry in found} <= {"5", "6"}
    note.books(done)
    note.measured(f"{len(found)} entry: {', '.join(sorted(k for k in found[0] if k[0] != '_'))}")


def _has_restarted(machine: Machine, times: int) -> bool:
    return int(machine.show(DAEMON, "NRestarts")) >= times
