"""The learning side under systemd: its timer fires, the cycle runs under the unit's limits."""

import json

import pytest

from building import wheelhouse
from installed import DAEMON, RESULTS, STATE, TRAIN, WORK_S, Layer, Load, books, drop_in, put_version, ready, results
from scenario_table import Note

RETRAIN, TIMER = "semwatch-retrain.service", "semwatch-retrain.timer"
CYCLE_S = 240
SOON = """
[Timer]
OnCalendar=
OnActiveSec=2s
RandomizedDelaySec=0
AccuracySec=100ms
"""


@pytest.mark.timeout(900)
def test_g_the_timer_fires_a_cycle_of_learning(layer: Layer, note: Note) -> None:
    wheelhouse(*TRAIN)
    with layer.machine("learning") as machine:
        machine.boot()
        ready(machine)
        with Load(machine, 60) as load:
            put_version(machine, layer.version, extras=TRAIN)
        done = books(machine, load.names)
        assert done.records >= 30, "too few unknowns for a cycle"
        drop_in(machine, TIMER, SOON)
        machine.run("systemctl", "restart", TIMER)
        machine.wait_for(lambda: machine.show(RETRAIN, "ExecMainStartTimestamp"), 30, "the timer")
        machine.wait_for(lambda: machine.show(RETRAIN, "ActiveState") in ("inactive", "failed"), CYCLE_S, "the cycle")
        said = machine.messages(RETRAIN)
        assert machine.show(RETRAIN, "Result") == "success", said[-3000:]
        (report,) = machine.path(STATE).glob("learning/cycles/*/report.json")
        outcome = json.loads(report.read_bytes())["outcome"]
        with Load(machine, 10, first=60) as more:
            pass
        machine.wait_for(lambda: results(machine) >= set(more.names), WORK_S, "results after the swap")
        reviews = [json.loads((machine.path(RESULTS) / f"{name}.review.json").read_bytes()) for name in more.names]
        heads = {review["model_versions"].get("head") for review in reviews} - {None}  # None: an image without defects
        assert heads == ({2} if outcome == "published" else {1})
        note.books(done)
        note.measured(f"{done.records} unknowns; outcome {outcome}, then served head {heads.pop()}")
        assert machine.show(DAEMON, "NRestarts") == "0"
