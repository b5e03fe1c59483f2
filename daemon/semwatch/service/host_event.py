"""One event report to the fab's host: SECS-II stream 6, function 11 (SEMI E5) over HSMS (E37), in a process of its own.

``python -m semwatch.service.host_event SETTINGS`` connects, or waits for the host to connect, establishes
communication (S1F13), sends the report, waits for its acknowledgement and ends. What is reported is in the
environment, as for a hook. A library that hangs is ended with the process, and the daemon never loads it.

The report of CEID has one report RPTID with five texts: LOT, PATH, LOT_ID, KLARF, REVISION.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

from semwatch.settings.site import HostEvent
from semwatch.system import commands

REPORTED = ("lot", "path", "lot_id", "klarf", "revision")
"""In this order."""
_GRACE_S = 5.0
"""Of the process, beyond the time that the host is given."""


def way(settings: HostEvent, stop: Event, cwd: Path) -> Callable[[Mapping[str, str]], commands.Ended]:
    """What tells the host of a lot, as ``service.hooks`` calls it."""

    def send(variables: Mapping[str, str]) -> commands.Ended:
        argv = [sys.executable, "-m", "semwatch.service.host_event", settings.model_dump_json()]
        environ = {f"SEMWATCH_HOOK_{name.upper()}": value for name, value in variables.items()}
        return commands.run(argv, environ, timeout_s=settings.timeout_s + _GRACE_S, stop=stop, cwd=str(cwd))

    return send


def report(settings: Mapping[str, Any], values: Mapping[str, str]) -> str:
    """Send the report; why it failed, or nothing."""
    try:
        import secsgem.common  # noqa: PLC0415  # installed with the extra alone
        import secsgem.gem  # noqa: PLC0415
        import secsgem.hsms  # noqa: PLC0415
    except ImportError:
        return "secsgem is not installed: pip install 'semwatch[secsgem]'"
    mode = secsgem.hsms.HsmsConnectMode.ACTIVE if settings["mode"] == "active" else secsgem.hsms.HsmsConnectMode.PASSIVE
    equipment = secsgem.gem.GemEquipmentHandler(
        secsgem.hsms.HsmsSettings(
            address=settings["address"],
            port=settings["port"],
            session_id=settings["device_id"],
            connect_mode=mode,
            device_type=secsgem.common.DeviceType.EQUIPMENT,
        )
    )
    equipment.settings.timeouts.t3 = settings["timeout_s"]
    equipment.settings.timeouts.t5 = min(1.0, settings["timeout_s"])
    equipment.enable()
    if not equipment.waitfor_communicating(settings["timeout_s"]):
        return f"no communication with the host at {settings['address']}:{settings['port']}"
    texts = [values[name].encode("ascii", "backslashreplace").decode() for name in REPORTED]
    message = {"DATAID": 1, "CEID": settings["ceid"], "RPT": [{"RPTID": settings["rptid"], "V": texts}]}
    answer = equipment.send_and_waitfor_response(equipment.stream_function(6, 11)(message))
    if answer is None:
        return "the host has not acknowledged the report"
    code = equipment.settings.streams_functions.decode(answer).get()
    equipment.disable()
    return "" if code == 0 else f"the host refuses the report: ACKC6 {code}"


def main(argv: list[str]) -> None:
    """Send one report and leave the process, whatever threads are left."""
    values = {name: os.environ.get(f"SEMWATCH_HOOK_{name.upper()}", "") for name in REPORTED}
    why = report(json.loads(argv[0]), values)
    sys.stdout.write(f"{why or 'acknowledged'}\n")
    sys.stdout.flush()
    os._exit(1 if why else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
