"""Commands of the user's: real processes that end, fail, hang, shout and leave children behind."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from semwatch.system import commands


def run(*code: str, timeout_s: float = 20.0, stop: threading.Event | None = None, **variables: str) -> commands.Ended:
    argv = [sys.executable, "-S", "-c", "\n".join(code)]
    return commands.run(argv, variables, timeout_s=timeout_s, stop=stop or threading.Event())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_of_both_kinds_and_the_exit_code_come_back() -> None:
    ended = run("import sys", "print('out', flush=True)", "print('err', file=sys.stderr)", "sys.exit(3)")
    assert ended == (False, "exit code 3", "out\nerr")
    assert run("pass") == (True, "exit code 0", "")
    assert run("import os", "os.kill(os.getpid(), 9)").why == "signal 9"


def test_arguments_reach_the_program_as_they_are_and_no_shell_sees_them(tmp_path: Path) -> None:
    odd = f"; touch {tmp_path}/shell #$(touch {tmp_path}/sub) `x` * \n --flag"
    argv = [sys.executable, "-S", "-c", "import sys; print(repr(sys.argv[1]))", odd]
    ended = commands.run(argv, {}, timeout_s=20, stop=threading.Event())
    assert ended.output == repr(odd)
    assert list(tmp_path.iterdir()) == []


def test_it_gets_its_variables_and_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "@ours")
    monkeypatch.setenv("SECRET", "x")
    ended = run("import os", "print(sorted(os.environ))", SEMWATCH_LOT="a b")
    assert "'SEMWATCH_LOT'" in ended.output
    assert "NOTIFY_SOCKET" not in ended.output
    assert "SECRET" not in ended.output


def test_one_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    start = time.monotonic()
    ended = run(
        "import os, signal, sys, time",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        f"child = os.fork(); open('{tmp_path}/' + ('child' if child == 0 else 'parent'), 'w').write(str(os.getpid()))",
        "print('begun', flush=True)",
        "time.sleep(600)",
        timeout_s=2.0,
    )
    assert not ended.ok
    assert ended.why == "ended after 2 s"
    assert "begun" in ended.output
    assert time.monotonic() - start < 15
    for name in ("parent", "child"):
        pid = int((tmp_path / name).read_text())
        deadline = time.monotonic() + 5
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_alive(pid), name


def test_child_that_keeps_the_output_open_does_not_hold_up_the_end() -> None:
    start = time.monotonic()
    ended = run("import os, time", "if os.fork() == 0: time.sleep(600)")
    assert ended.why == "exit code 0"
    assert time.monotonic() - start < 15


def test_flood_of_output_is_cut_to_its_end() -> None:
    ended = run("import sys", "sys.stdout.write('x' * 3_000_000 + 'end')")
    assert ended.ok
    assert ended.output.endswith("xend")
    assert len(ended.output) <= commands.MAX_OUTPUT


def test_stop_ends_it_at_once() -> None:
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    start = time.monotonic()
    ended = run("import time", "time.sleep(600)", stop=stop)
    assert ended.why == "ended by a stop"
    assert time.monotonic() - start < 15


def test_program_that_is_not_there_or_no_program_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    for path in (tmp_path / "missing", plain):
        ended = commands.run([str(path)], {}, timeout_s=20, stop=threading.Event())
        assert not ended.ok
        assert str(path) in ended.why + ended.output


def test_no_file_of_ours_is_open_in_it(tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        ended = run("import os", "print([os.readlink('/proc/self/fd/' + fd) for fd in ('0',)])",
                    "print(any('secret' in os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')"
                    " if os.path.lexists(f'/proc/self/fd/{fd}')))")  # fmt: skip
    assert ended.output == "['/dev/null']\nFalse"
