"""Redis and Triton as units beside the daemon: away under load they delay, never lose."""

import time

import pytest

from installed import (
    DAEMON,
    REDIS,
    SITE,
    TRITON,
    Layer,
    Load,
    books,
    change,
    drop_in,
    idle_cost,
    is_active,
    ready,
    results,
    semwatch,
    wait_results,
)
from machine import Machine
from scenario_table import Note

AWAY_S = 6


def test_e_redis_stopped_and_killed_under_load(machine: Machine, note: Note) -> None:
    with Load(machine, 400) as load:
        wait_results(machine, 20)
        machine.run("systemctl", "stop", REDIS)
        n_before = len(results(machine))
        time.sleep(AWAY_S)
        n_meanwhile = len(results(machine)) - n_before
        assert is_active(machine), "the daemon fell with Redis"
        machine.run("systemctl", "start", REDIS)
        wait_results(machine, n_before + n_meanwhile + 20)
        machine.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", REDIS)
        machine.wait_for(lambda: int(machine.show(REDIS, "NRestarts")) > 0, 30, "Redis's restart")
    done = books(machine, load.names)
    note.books(done)
    assert machine.show(DAEMON, "NRestarts") == "0"
    assert done.records > 0
    note.measured(
        f"away {AWAY_S} s, {n_meanwhile} results meanwhile, then kill -9; {done.records} records, none lost or doubled"
    )


@pytest.mark.timeout(600)
def test_f_triton_stopped_and_killed_under_load(layer: Layer, note: Note) -> None:
    with layer.machine("triton") as machine:
        machine.boot()
        ready(machine)
        _use_triton(machine)
        with Load(machine, 300, per_s=15) as load:
            wait_results(machine, 20)
            machine.run("systemctl", "stop", TRITON)
            time.sleep(1)
            n_before = len(results(machine))
            time.sleep(AWAY_S)
            n_meanwhile = len(results(machine)) - n_before
            assert n_meanwhile == 0, "something else than Triton answered"
            assert is_active(machine), "the daemon fell with Triton"
            machine.run("systemctl", "start", TRITON)
            wait_results(machine, n_before + 20)
            machine.run("systemctl", "kill", "--kill-who=main", "--signal=KILL", TRITON)
            machine.wait_for(lambda: int(machine.show(TRITON, "NRestarts")) > 0, 30, "Triton's restart")
        done = books(machine, load.names)
        assert machine.show(DAEMON, "NRestarts") == "0"
        share, resident_mb = idle_cost(machine)
        note.books(done)
        note.measured(f"away {AWAY_S} s, then kill -9")
        note.measured(f"idle daemon, inference remote: {100 * share:.2f} % of one core, {resident_mb:.0f} MB")
        assert share < 0.01
        assert resident_mb < 250


def _use_triton(machine: Machine) -> None:
    """Install the server from its wheel, offline, and let the daemon ask it."""
    semwatch(machine, "triton", "setup", "--folder", "/opt/semwatch/triton", timeout_s=300,
             PIP_NO_INDEX="1", PIP_FIND_LINKS="/wheels")  # fmt: skip
    drop_in(machine, DAEMON, machine.path("/usr/share/doc/semwatch/drop-ins/triton.conf").read_text())
    change(machine, SITE, models={"repository": "/srv/semwatch/model_repository", "runtime": "triton"})
    machine.run("systemctl", "start", TRITON, timeout_s=150)
    machine.run("systemctl", "restart", DAEMON, timeout_s=150)
