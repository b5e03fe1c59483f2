"""The event to the host: a real one on the loopback hears of each lot once; an absent one holds up nothing."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from daemon import SOURCE, Daemon, make_site, png
from semwatch.service import host_event
from semwatch.settings.site import HostEvent
from semwatch.system import child_server

pytest.importorskip("secsgem")

HOST = """
import json, sys
import secsgem.common, secsgem.gem, secsgem.hsms

port, mode, ack, log = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]

class Host(secsgem.gem.GemHostHandler):
    def __init__(self, settings):
        super().__init__(settings)
        self.register_stream_function(6, 11, self.on_report)

    def on_report(self, handler, message):
        with open(log, "a") as file:
            file.write(json.dumps(self.settings.streams_functions.decode(message).get()) + "\\n")
        return self.stream_function(6, 12)(ack)

mode = {"active": secsgem.hsms.HsmsConnectMode.ACTIVE, "passive": secsgem.hsms.HsmsConnectMode.PASSIVE}[mode]
host = Host(secsgem.hsms.HsmsSettings(address="127.0.0.1", port=port, session_id=0, connect_mode=mode,
                                      device_type=secsgem.common.DeviceType.HOST))
host.settings.timeouts.t5 = 0.5
host.enable()
print("listens", flush=True)
sys.stdin.read()
"""


class Host:
    """A host in a process of its own, for its threads outlive it in ours."""

    def __init__(self, folder: Path, mode: str = "passive", ack: int = 0) -> None:
        self.port, self.log = child_server.free_port(), folder / "host.log"
        argv = [sys.executable, "-c", HOST, str(self.port), mode, str(ack), str(self.log)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def __enter__(self) -> "Host":
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"listens\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def reports(self) -> list[dict[str, Any]]:
        import json

        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


VARIABLES = {
    "lot": "sem-1/lot\N{GREEK SMALL LETTER MU}7",
    "path": "/r/lot7",
    "lot_id": "A1",
    "klarf": "",
    "revision": "2",
}


def tell(tmp_path: Path, **settings: Any) -> Any:
    way = host_event.way(HostEvent(**settings), threading.Event(), tmp_path)
    return way(VARIABLES)


@pytest.mark.parametrize(("ours", "theirs"), [("active", "passive"), ("passive", "active")])
def test_host_gets_the_report_in_its_order_and_its_acknowledgement_counts(
    tmp_path: Path, ours: str, theirs: str
) -> None:
    with Host(tmp_path, theirs) as host:
        ended = tell(tmp_path, mode=ours, port=host.port, ceid=7, rptid=3)
        assert ended.ok, ended
        (report,) = host.reports()
    assert report["CEID"] == 7
    (content,) = report["RPT"]
    assert content == {"RPTID": 3, "V": ["sem-1/lot\\u03bc7", "/r/lot7", "A1", "", "2"]}


def test_host_that_refuses_or_is_away_is_a_failure_within_the_time(tmp_path: Path) -> None:
    with Host(tmp_path, ack=1) as host:
        ended = tell(tmp_path, port=host.port)
        assert (ended.ok, "ACKC6 1" in ended.output) == (False, True)
    start = time.monotonic()
    ended = tell(tmp_path, port=child_server.free_port(), timeout_s=1.0)
    assert not ended.ok
    assert "no communication with the host" in ended.output or "ended after" in ended.why
    assert time.monotonic() - start < 30


def test_machine_without_the_extra_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "secsgem", None)
    assert "pip install 'semwatch[secsgem]'" in host_event.report({}, {})


def test_daemon_tells_the_host_of_each_lot_once_and_waits_for_one_that_is_away(
    tmp_path: Path, tiny_repository: Path
) -> None:
    with Host(tmp_path) as host:
        settings = {"port": host.port, "timeout_s": 20}
        hooks = {"quiet_s": 2, "retry_s": 0.5}
        site = make_site(tmp_path / "site", tiny_repository, host_event=settings, hooks=hooks)
        with Daemon(site) as daemon:
            daemon.wait_ready()
            site.put("lot1/a.png", png(1))
            daemon.wait_for(lambda: "hook host_event" in daemon.log() and host.reports())
            assert daemon.stop() == 0
        (report,) = host.reports()
    assert report["RPT"][0]["V"][:2] == [f"{SOURCE}/lot1", str(site.results / "lot1")]
    with Daemon(site) as daemon:  # the host is gone
        daemon.wait_ready()
        site.put("lot2/b.png", png(2))
        daemon.wait_for(lambda: len(site.reviews()) == 2)
        assert daemon.stop() == 0


def test_daemon_does_not_load_the_library() -> None:
    code = "import semwatch.service.loop, sys; print('secsgem' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
