"""Entries as journald gets them: a socket of ours plays it, and where this machine lets us, journald itself."""

import array
import fcntl
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import put
from daemon import SOURCE, Daemon, make_site, png
from paths import ROOT
from semwatch.system.journal import JournalHandler, JsonFormatter, about, entry, is_for_machines, is_stderr, priority

SHA = "ab" * 32
JOURNALD = Path("/lib/systemd/systemd-journald")


class Journald:
    """A bound socket that reads the native protocol, datagrams and files alike."""

    def __init__(self, address: Path) -> None:
        self.seals: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))
        self._socket.settimeout(0.5)

    def entry(self) -> dict[str, str]:
        """The next entry; empty where none comes."""
        try:
            data, ancillary, _, _ = self._socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        except TimeoutError:
            return {}
        if ancillary:
            assert data == b""
            fd = array.array("i", ancillary[0][2])[0]
            self.seals.append(fcntl.fcntl(fd, fcntl.F_GET_SEALS))
            data = os.pread(fd, os.fstat(fd).st_size, 0)
            os.close(fd)
        return {name: value.decode() for name, value in parsed(data)}

    def entries(self) -> list[dict[str, str]]:
        return list(iter(self.entry, {}))

    def close(self) -> None:
        self._socket.close()


def parsed(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Read the native protocol by its own definition."""
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        assert name.decode().replace("_", "A").isalnum()
        yield name.decode(), value
        data = rest


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    made = Journald(tmp_path / "socket")
    yield made
    made.close()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[logging.Logger]:
    """A logger that writes to the socket in ``tmp_path``, whether somebody listens there or not."""
    handler = JournalHandler(str(tmp_path / "socket"))
    logger = logging.Logger("semwatch.tested", logging.DEBUG)
    logger.addHandler(handler)
    yield logger
    handler.close()


# --- one entry -----------------------------------------------------------------------------------------------------


def test_no_fields_at_all_are_no_bytes_and_an_empty_message_is_an_entry(journald, log) -> None:
    assert entry({}) == b""
    log.info("")
    got = journald.entry()
    assert got.pop("CODE_LINE").isdigit()
    assert got == {
        "MESSAGE": "",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "semwatch",
        "LOGGER": "semwatch.tested",
        "CODE_FILE": __file__,
        "CODE_FUNC": "test_no_fields_at_all_are_no_bytes_and_an_empty_message_is_an_entry",
    }


def test_a_review_carries_its_own_fields(journald, log) -> None:
    said = about(
        "reviewed", SOURCE, "lot7/w01/a.tif", SHA, recipe="metal2", recipe_id="5f2a",
        verdicts={"known": 2, "unknown": 1}, models={"detector": 1, "head": 3},
    )  # fmt: skip
    log.info("%s: %d defects", "lot7/w01/a.tif", 3, extra=said)
    got = journald.entry()
    assert got["MESSAGE"] == "lot7/w01/a.tif: 3 defects"
    own = {"EVENT", "SOURCE", "IMAGE", "LOT", "SHA256", "RECIPE", "RECIPE_ID", "VERDICTS", "MODELS"}
    assert {name: got[name] for name in own} == {
        "EVENT": "reviewed", "SOURCE": SOURCE, "IMAGE": "lot7/w01/a.tif", "LOT": "lot7/w01", "SHA256": SHA,
        "RECIPE": "metal2", "RECIPE_ID": "5f2a", "VERDICTS": "known=2 unknown=1", "MODELS": "detector=1 head=3",
    }  # fmt: skip


def test_what_is_not_known_is_left_out_and_never_invented() -> None:
    assert about() == {"journal": {}}
    assert about("waits", SOURCE, "a.tif") == {"journal": {"EVENT": "waits", "SOURCE": SOURCE, "IMAGE": "a.tif"}}
    assert about(verdicts={}, models={}) == {"journal": {"VERDICTS": "defect-free", "MODELS": ""}}


@pytest.mark.parametrize(
    ("level", "number"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3), ("critical", 2)]
)
def test_levels_are_the_priorities_of_syslog(journald, log, level: str, number: int) -> None:
    getattr(log, level)("said")
    assert journald.entry()["PRIORITY"] == str(number)
    assert priority(logging.WARNING + 1) == 4


def test_value_of_several_lines_stands_behind_its_length_and_forges_no_field(journald, log) -> None:
    log.info("one\nPRIORITY=0\n", extra=about(image="lot\n7/a\nSHA256=forged.tif"))
    got = journald.entry()
    assert (got["MESSAGE"], got["PRIORITY"]) == ("one\nPRIORITY=0\n", "6")
    assert (got["IMAGE"], got["LOT"]) == ("lot\n7/a\nSHA256=forged.tif", "lot\n7")
    assert "SHA256" not in got


def test_file_names_that_are_no_utf_8_are_spelled_out(journald, log) -> None:
    log.info("%s", "\udcff.tif", extra=about(image="\ud800.tif"))
    got = journald.entry()
    assert (got["MESSAGE"], got["IMAGE"]) == ("\\xff.tif", "\\ud800.tif")


def test_a_traceback_is_one_entry(journald, log) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("a bug")
    first, *more = journald.entries()
    assert more == []
    assert first["MESSAGE"].startswith("a bug\nTraceback")
    assert first["MESSAGE"].endswith("ValueError: two\nlines")


@pytest.mark.parametrize("size", [100_000, 3_000_000])
def test_message_of_any_size_arrives_whole_the_large_one_as_a_sealed_file(journald, log, size: int) -> None:
    text = "ä\n" * (size // 3)
    log.warning(text, extra=about(sha256=SHA))
    got = journald.entry()
    assert (got["MESSAGE"], got["SHA256"]) == (text, SHA)
    all_seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    assert journald.seals == ([all_seals] if size > 1 << 20 else [])


def test_wrong_logging_call_is_reported_and_ends_nothing(journald, log, capsys) -> None:
    log.info("%d", "no number")
    assert "Logging error" in capsys.readouterr().err
    log.info("next")
    assert journald.entry()["MESSAGE"] == "next"


# --- a journal that does not take it -------------------------------------------------------------------------------


def test_full_journal_never_holds_the_line_and_the_loss_is_told_once(journald, log) -> None:
    start = time.monotonic()
    for i in range(2000):
        log.info("%d", i)
    assert time.monotonic() - start < 5
    arrived = journald.entries()
    assert 0 < len(arrived) < 2000
    log.info("room again")
    log.info("and again")
    told, *after = journald.entries()
    assert told["MESSAGE"] == f"{2000 - len(arrived)} log entries are lost: the journal did not take them"
    assert told["PRIORITY"] == "4"
    assert [got["MESSAGE"] for got in after] == ["room again", "and again"]


def test_large_message_to_a_full_journal_is_dropped_too(journald, log) -> None:
    for _ in range(2000):
        log.info("small")
    log.info("x" * 3_000_000)
    assert "x" not in {got["MESSAGE"][:1] for got in journald.entries()}


def test_journal_away_is_stderr_with_priorities_until_it_comes_back(tmp_path, capfd) -> None:
    handler = JournalHandler(str(tmp_path / "socket"))
    logger = logging.Logger("semwatch.tested")
    logger.addHandler(handler)
    logger.error("first\nsecond")
    assert capfd.readouterr().err == "<3>ERROR semwatch.tested: first\n<3>    second\n"
    journald = Journald(tmp_path / "socket")
    logger.error("third")
    assert journald.entry()["MESSAGE"] == "third"
    journald.close()  # its name stays behind, as after a crash
    logger.error("fourth")
    assert capfd.readouterr().err == "<3>ERROR semwatch.tested: fourth\n"
    handler.close()
    handler.close()


def test_journal_away_and_stderr_stuck_does_not_hold_the_line_either(tmp_path) -> None:
    program = f"""
        import logging
        from semwatch.system.journal import JournalHandler
        handler = JournalHandler({str(tmp_path / "absent")!r})
        logging.getLogger().addHandler(handler)
        for i in range(5000):
            logging.warning("%d %s", i, "x" * 200)
        print(handler._n_dropped > 0)
    """
    read_end, write_end = os.pipe()  # nobody reads: a megabyte fills it
    try:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            stdout=subprocess.PIPE, stderr=write_end, timeout=30, check=True,
            env={**os.environ, "PYTHONPATH": "daemon"}, cwd=ROOT,
        )  # fmt: skip
    finally:
        os.close(read_end)
        os.close(write_end)
    assert done.stdout == b"True\n"


# --- which form ----------------------------------------------------------------------------------------------------


def test_stderr_is_the_journal_only_where_the_named_file_is_the_same(tmp_path) -> None:
    with (tmp_path / "a").open("w") as a, (tmp_path / "b").open("w") as b:
        status = os.fstat(a.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert is_stderr(environ, a.fileno())
        assert not is_stderr(environ, b.fileno())
        assert not is_stderr({}, a.fileno())
        assert not is_stderr({"JOURNAL_STREAM": "nonsense"}, a.fileno())
        closed = a.fileno()
    assert not is_stderr(environ, closed)


def test_json_is_one_object_a_line_with_the_same_fields() -> None:
    record = logging.LogRecord("semwatch.service", logging.ERROR, "service.py", 7, "two\nlines \udcff", (), None, "f")
    record.journal = about("quarantined", SOURCE, "lot7/a.tif", SHA)["journal"]
    line = JsonFormatter().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert (said["message"], said["priority"], said["level"]) == ("two\nlines \\xff", 3, "ERROR")
    assert (said["lot"], said["sha256"], said["code_line"]) == ("lot7", SHA, 7)
    assert said["time"].endswith("Z")


def test_text_for_people_is_not_for_machines() -> None:
    logger = logging.Logger("tested")
    assert not is_for_machines(logger)
    logger.addHandler(logging.StreamHandler())
    assert not is_for_machines(logger)
    logger.handlers[0].setFormatter(JsonFormatter())
    assert is_for_machines(logger)


JSON_RUN = "import sys; from semwatch.__main__ import main; sys.argv.append('--log-format=json'); main()"


def test_daemon_says_one_json_line_for_every_file_and_the_priority_tells_who_must_act(
    tmp_path, tiny_repository
) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    site.put("lot7/a.png", png(1))
    site.put("lot7/broken.png", b"no image")
    with Daemon(site, {"PYTHONPATH": os.pathsep.join(sys.path)}, program=("-c", JSON_RUN)) as daemon:
        daemon.wait_ready()
        daemon.wait_for(lambda: daemon.log().count('"event": "') >= 2)
        site.put("copy.png", png(1))
        daemon.wait_for(lambda: '"duplicate"' in daemon.log())
        assert daemon.stop() == 0
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    told = {line["image"]: line for line in lines if "image" in line}
    assert {name: (line["event"], line["priority"]) for name, line in told.items()} == {
        "lot7/a.png": ("reviewed", 6),
        "lot7/broken.png": ("quarantined", 3),
        "copy.png": ("duplicate", 6),
    }
    assert (told["lot7/a.png"]["lot"], told["lot7/a.png"]["recipe"]) == ("lot7", "test")
    assert told["lot7/a.png"]["sha256"] == told["copy.png"]["sha256"]
    assert "detector=1" in told["lot7/a.png"]["models"]
    assert told["lot7/a.png"]["verdicts"]


def test_full_disk_is_said_once_as_something_to_act_on(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository, limits={"min_free_mb": 10**9})
    with Daemon(site, {"PYTHONPATH": os.pathsep.join(sys.path)}, program=("-c", JSON_RUN)) as daemon:
        daemon.wait_ready()
        daemon.wait_for(lambda: "paused" in daemon.log())
        for _ in range(5):  # more beats, each of which finds the disk as full
            assert daemon.notices(5)
        assert daemon.stop() == 0
    paused = [said for said in map(json.loads, daemon.log().splitlines()) if "paused" in said["message"]]
    assert [said["priority"] for said in paused] == [3]
    assert paused[0]["message"].startswith("paused: disk nearly full, ")


def test_daemon_that_cannot_start_says_so_in_json_too(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository, models={"repository": "nothing"})
    with Daemon(site, {"PYTHONPATH": os.pathsep.join(sys.path)}, program=("-c", JSON_RUN)) as daemon:
        assert daemon.process.wait(60) == 3
        said = json.loads(daemon.log())
    assert said["priority"] == 3
    assert "ModelMismatch" in said["message"]


# --- journald itself -----------------------------------------------------------------------------------------------


def as_service(tmp_path: Path, command: str) -> str:
    """Run a shell command whose stderr is a real journal of its own; the machine's is neither read nor written."""
    if not JOURNALD.exists() or not all(map(shutil.which, ("unshare", "journalctl"))):
        pytest.skip("journald, journalctl or unshare is not installed here")
    starter = put(
        tmp_path / "start.py",
        textwrap.dedent("""
            import os, socket, sys
            way = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            way.connect("/run/systemd/journal/stdout")
            way.sendall(b"semwatch\\n\\n6\\n1\\n0\\n0\\n0\\n")  # as the service manager opens it
            status = os.fstat(way.fileno())
            os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
            os.dup2(way.fileno(), 2)
            os.execvp(sys.argv[1], sys.argv[1:])
        """).encode(),
    )
    script = f"""
        mount -t tmpfs none /var/log && mount -t tmpfs none /run || exit 77
        mkdir -p /run/systemd/journal /run/systemd/journald.conf.d /run/log/journal
        printf '[Journal]\\nReadKMsg=no\\nAudit=no\\n' >/run/systemd/journald.conf.d/no_kernel.conf
        {JOURNALD} >/dev/null 2>&1 &
        journald=$!
        trap 'kill $journald; wait' EXIT
        for i in $(seq 100); do test -S /run/systemd/journal/stdout && break; sleep 0.05; done
        start="{sys.executable} {starter}"
        {command}
    """
    space = ["--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    done = subprocess.run(
        ["unshare", *space, "--propagation", "private", "sh", "-c", script],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr}")
    assert "Traceback" not in done.stderr
    return done.stdout


def test_real_journal_finds_a_review_by_its_fields_and_logs_tells_them(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    site.put("lot7/a.png", png(1))
    site.put("lot7/broken.png", b"no image")
    semwatch, done = f"{sys.executable} -m semwatch", f"test $(ls {site.results}/lot7 2>/dev/null | wc -l) -ge 4"
    out = as_service(
        tmp_path,
        f"""
        $start {semwatch} run --site {site.file} &
        daemon=$!
        for i in $(seq 300); do {done} && break; sleep 0.1; done
        kill -TERM $daemon; wait $daemon
        journalctl --sync >/dev/null 2>&1
        journalctl --quiet --output=json SYSLOG_IDENTIFIER=semwatch LOT=lot7
        echo ----
        {semwatch} logs a.png --site {site.file}
        """,
    )
    journal, story = out.split("----\n")
    told = {said["IMAGE"]: said for said in map(json.loads, journal.splitlines())}
    assert {name: (said["EVENT"], said["PRIORITY"]) for name, said in told.items()} == {
        "lot7/a.png": ("reviewed", "6"),
        "lot7/broken.png": ("quarantined", "3"),
    }
    assert all(said["_TRANSPORT"] == "journal" and len(said["SHA256"]) == 64 for said in told.values())
    assert told["lot7/a.png"]["RECIPE"] == "test"
    assert "journal  sem-1/lot7/a.png: " in story
    assert "journal was not read" not in story


def test_real_journal_takes_a_message_larger_than_a_datagram(tmp_path) -> None:
    program = put(
        tmp_path / "large.py",
        b"import logging\nfrom semwatch.system.journal import JournalHandler\n"
        b"logging.getLogger().addHandler(JournalHandler())\nlogging.error('x' * 2_000_000 + '\\nend')\n",
    )
    out = as_service(
        tmp_path,
        f"$start {sys.executable} {program}; sleep 0.5;"
        " journalctl --quiet --all -o cat SYSLOG_IDENTIFIER=semwatch PRIORITY=3;"
        " echo ----; journalctl --quiet _TRANSPORT=kernel",
    )
    ours, of_the_kernel = out.split("----\n")
    assert ours == "x" * 2_000_000 + "\nend\n"
    assert of_the_kernel == ""


def test_bug_that_ends_the_daemon_is_one_entry_of_priority_crit(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    program = put(
        tmp_path / "broken.py",
        b"import sys\nfrom semwatch.service import loop\nfrom semwatch.__main__ import main\n"
        b"def bug(self):\n    raise RuntimeError('a bug')\n"
        b"loop.Service._beat = bug\nsys.argv[0] = 'semwatch'\nmain()\n",
    )
    out = as_service(
        tmp_path,
        f"$start {sys.executable} {program} run --site {site.file}; echo ended $?; sleep 0.5;"
        " journalctl --quiet --output=json SYSLOG_IDENTIFIER=semwatch PRIORITY=2",
    )
    ended, *entries = out.splitlines()
    assert ended == "ended 1"
    assert len(entries) == 1
    assert "RuntimeError: a bug" in json.loads(entries[0])["MESSAGE"]
