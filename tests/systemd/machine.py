"""A whole Debian with a real systemd, booted in systemd-nspawn: what the deployment is tested on.

A machine's disk is an overlay: folders below are only read, what the machine writes lies in a folder of its own. So a
machine with the product installed is booted a second time in milliseconds, and no scenario sees another's traces. It
has no network but its own loopback. Needs root, and the Debian packages systemd-container and debootstrap.

    <folder>/disk     what the machine has written
    <folder>/root     its file system, mounted while it is in use
    <folder>/pids     its processes here, for cleaning up after a test run that was killed
    <folder>/console  what it showed while booting
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

BOOT_S = 60.0
POWER_OFF_S = 120.0
COMMAND_S = 120.0
_WANTS_REBOOT = 133  # systemd-nspawn with --keep-unit: the machine rebooted, start it again
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME": "/root", "LANG": "C.UTF-8"}


class MachineError(AssertionError):
    """The machine did not do what a scenario needs; the message holds its last words."""


class Machine:
    """One machine: mounted when it is made, booted by ``boot``, gone at the end of the ``with`` block.

    Args:
        folder: the machine's own; what lies there of an earlier one is ended and deleted.
        below: folders that make its disk, the uppermost first; they must not change while it exists.
        binds: folders of this computer that it can read, by their place in it.
    """

    def __init__(self, folder: Path, below: Sequence[Path], *, binds: Mapping[str, Path] | None = None) -> None:
        self.folder = folder
        self.root = folder / "root"
        self._binds = [f"--bind-ro={source}:{place}" for place, source in (binds or {}).items()]
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0
        clean(folder)
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("disk", "work", "root"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        options = f"lowerdir={':'.join(map(str, below))},upperdir={self.disk},workdir={folder / 'work'}"
        _host("mount", "-t", "overlay", "overlay", "-o", options, str(self.root))

    @property
    def disk(self) -> Path:
        """What the machine has written: once it is gone, a layer for others."""
        return self.folder / "disk"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._nspawn is not None:
                self.power_off()
        finally:
            clean(self.folder)

    # --- power -----------------------------------------------------------------------------------------------------

    def boot(self) -> Self:
        """Start it and wait until systemd has started everything, whether or not it all came up."""
        with (self.folder / "console").open("ab") as console:
            self._nspawn = subprocess.Popen(
                ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--private-network",
                 "--link-journal=no", "--console=pipe", "--machine=semwatch-test", *self._binds, "-D", str(self.root)],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
            )  # fmt: skip
        self._note_pids()
        self.wait_for(self._find_leader, BOOT_S, "a leader")
        self._note_pids()
        self.wait_for(self._bus_answers, BOOT_S, "systemd")
        self.run("systemctl", "is-system-running", "--wait", timeout_s=BOOT_S, check=False)
        return self

    def power_off(self) -> float:
        """Shut it down as ``systemctl poweroff`` does; return the seconds that took."""
        return self._end("poweroff", expected=0)

    def reboot(self) -> Self:
        """Reboot it by ``systemctl reboot``, and wait as ``boot`` does."""
        self._end("reboot", expected=_WANTS_REBOOT)
        return self.boot()

    def cut_power(self) -> Self:
        """Kill all its processes at once and boot it again. What it had written stays: the kernel below lives on."""
        assert self._nspawn is not None
        os.kill(self._leader, signal.SIGKILL)
        self._nspawn.wait(POWER_OFF_S)
        self._nspawn = None
        return self.boot()

    def _end(self, how: str, expected: int) -> float:
        assert self._nspawn is not None
        start = time.monotonic()
        self.run("systemctl", "--no-block", how, check=False)
        try:
            code = self._nspawn.wait(POWER_OFF_S)
        except subprocess.TimeoutExpired:
            raise MachineError(f"{how} took more than {POWER_OFF_S:g} s:\n{self._console()}") from None
        finally:
            if self._nspawn.poll() is None:
                _kill(self._leader)
                self._nspawn.wait(10)
            self._nspawn = None
        if code != expected:
            raise MachineError(f"{how} ended with {code}, not {expected}:\n{self._console()}")
        return time.monotonic() - start

    def _find_leader(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise MachineError(f"systemd-nspawn ended with {self._nspawn.returncode}:\n{self._console()}")
        with suppress(OSError):  # it may end between two looks
            for child in Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    self._leader = int(child)
                    return True
        return False

    def _bus_answers(self) -> bool:
        return self.run("systemctl", "show", "--property=Version", check=False).returncode == 0

    def _note_pids(self) -> None:
        assert self._nspawn is not None
        (self.folder / "pids").write_text(f"{self._leader} {self._nspawn.pid}")

    def _console(self) -> str:
        return (self.folder / "console").read_text(errors="replace")[-2000:]

    # --- inside ----------------------------------------------------------------------------------------------------

    def run(
        self, *argv: str, stdin: str | None = None, timeout_s: float = COMMAND_S, check: bool = True, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside as root, outside of any unit; a failure, unless not checked, tells what it said."""
        done = subprocess.run(
            ["nsenter", "--target", str(self._leader), "--all", "--root", "--wd", *argv],
            input=stdin, stdin=subprocess.DEVNULL if stdin is None else None, capture_output=True, encoding="utf-8",
            errors="replace", timeout=timeout_s, check=False, env={**_ENVIRONMENT, **environ},
        )  # fmt: skip
        if check and done.returncode != 0:
            raise MachineError(f"{' '.join(argv)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
        return done

    def path(self, inside: str) -> Path:
        """Where a file of the machine lies on this computer: for disks, not for /run and /tmp."""
        return self.root / inside.lstrip("/")

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def main_pid(self, unit: str) -> int:
        """The main process of a unit by its number inside, 0 where none runs."""
        return int(self.show(unit, "MainPID"))

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Journal entries of all boots, oldest first."""
        said = self.run("journalctl", "--output=json", "--all", "--no-pager", *matches, check=False).stdout
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    def messages(self, unit: str) -> str:
        """What a unit and systemd about it have said, one entry a line."""
        return "\n".join(str(entry.get("MESSAGE", "")) for entry in self.journal(f"--unit={unit}"))

    def wait_for(self, condition: Callable[[], object], timeout_s: float, what: str) -> float:
        """Wait until the condition holds; return the seconds that took."""
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > timeout_s:
                raise MachineError(f"waited {timeout_s:g} s in vain for {what}")
            time.sleep(0.05)
        return time.monotonic() - start


def clean(folder: Path) -> None:
    """End what runs of a machine in this folder and unmount its disk; harmless where nothing is left."""
    root = str(folder / "root")
    with suppress(OSError, ValueError):
        leader, nspawn = map(int, (folder / "pids").read_text().split())
        if root.encode() in Path(f"/proc/{nspawn}/cmdline").read_bytes().split(b"\0"):  # no stranger's process
            _kill(leader)
            _kill(nspawn)
    (folder / "pids").unlink(missing_ok=True)
    for _ in range(50):
        if not os.path.ismount(root):
            return
        if subprocess.run(["umount", root], capture_output=True, check=False, timeout=30).returncode:
            time.sleep(0.1)  # its last processes are on their way out
    _host("umount", "--lazy", root)


def _kill(pid: int) -> None:
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _host(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", check=False, timeout=60)
    if done.returncode != 0:
        raise MachineError(f"{' '.join(argv)}: {done.stderr.strip()}")
