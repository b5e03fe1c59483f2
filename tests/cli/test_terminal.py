"""What a person sees at 80 columns, on a real terminal: whole words, lines that fit; and how quickly help comes."""

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import redis
from rich.console import Console

from little_site import LOT, LittleSite, little_site
from paths import ROOT
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.system import terminal

KLARF = """FileVersion 1 2;
FileTimestamp 03-01-26 08:00:00;
InspectionStationID "MAKER" "MODEL" "TOOL7";
LotID "LOT7";
SampleSize 1 300;
DeviceID "DEVICE";
SetupID "SETUP" 03-01-26 08:00:00;
StepID "STEP";
SampleOrientationMarkType NOTCH;
OrientationMarkLocation DOWN;
DiePitch 8000 6000;
WaferID "W01";
Slot 1;
SampleCenterLocation 0 0;
InspectionTest 1;
SampleTestPlan 1
 0 0;
AreaPerTest 1e10;
DefectRecordSpec 10 DEFECTID XREL YREL XINDEX YINDEX XSIZE YSIZE DEFECTAREA DSIZE CLASSNUMBER ;
DefectList
 1 100.5 200.25 0 0 0.5 0.5 0.25 0.5 CLASS;
EndOfFile;
"""
TABLES = (
    ("lot",), ("lot", LOT), ("quality",), ("logs", "defect_0000"), ("status",), ("doctor",), ("quarantine", "list"),
    ("models", "list"), ("models", "labels"), ("models", "diff", "head", "1", "2"), ("clusters", "list", "--all"),
    ("clusters", "show", "novel-1"), ("queue", "stats"), ("queue", "tail"), ("queue", "tail", "--stream", "results"),
    ("queue", "failed"),
)  # fmt: skip
WITHOUT_SITE = (
    ("recipe", "show"), ("klarf", "show", "a.klarf"), ("klarf", "diff", "a.klarf", "b.klarf"),
    ("klarf", "check", "a.klarf"), ("triton", "status"), ("install", "--root", "root", "--dry-run"),
    ("review", "shots"),
)  # fmt: skip


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path, server: EmbeddedRedis) -> LittleSite:
    folder = tmp_path_factory.mktemp("little")
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        made = little_site(folder, tiny_repository, client, server.url)
    for name, number in (("a", "3"), ("b", "4")):
        (made.site.folder / f"{name}.klarf").write_text(KLARF.replace("CLASS", number, 1))
    (made.site.folder / "model_repository").symlink_to(tiny_repository)
    shots = made.site.folder / "shots"
    shots.mkdir()
    for image in made.images[:2]:
        (shots / Path(image).name).write_bytes((made.site.drop / image).read_bytes())
    (shots / "log_of_the_tool.png").write_bytes(b"no image")
    return made


def on_terminal(argv: tuple[str, ...], columns: int, cwd: Path) -> str:
    """What a program prints on a terminal of so many columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environ = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-m", *argv], cwd=cwd, env=environ, stdout=its, stderr=subprocess.DEVNULL):
        os.close(its)
        said = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the program has let go of it
                break
            if not part:
                break
            said += part
    os.close(ours)
    text = said.decode()
    for code in ("\x1b[1m", "\x1b[0m", "\x1b[2m"):
        text = text.replace(code, "")
    return text.replace("\r\n", "\n")


@pytest.mark.parametrize("argv", [*TABLES, *WITHOUT_SITE], ids=" ".join)
def test_every_table_fits_80_columns_and_breaks_no_word(argv: tuple[str, ...], there: LittleSite) -> None:
    site = () if argv in WITHOUT_SITE else ("--site", str(there.site.file))
    narrow, wide = (on_terminal(("semwatch", *argv, *site), columns, there.site.folder) for columns in (80, 1000))
    assert narrow.strip()
    assert "Traceback" not in narrow
    whole = set(wide.split())
    rules = {"─"}
    broken = [word for word in narrow.split() if word not in whole and not set(word) <= rules and not _moves(word)]
    assert broken == []
    for line in narrow.splitlines():
        assert len(line) <= 80 or len(line.split()[-1]) > 80 - 40, line  # a word that is longer stands alone


def _moves(word: str) -> bool:
    """Figures that change from one call to the next: seconds, megabytes, milliseconds."""
    return re.fullmatch(r"[-\d.,:%TZ]+", word) is not None


def test_a_table_wider_than_the_terminal_becomes_blocks() -> None:
    console = Console(width=40, file=io.StringIO())
    terminal.print_table(console, ("file", "verdict"), [("a" * 30, "b" * 30), ("c", "")])
    assert console.file.getvalue() == f"file     {'a' * 30}\nverdict  {'b' * 30}\n\nfile  c\n\n"


def test_a_column_gives_way_between_words_and_never_below_its_longest() -> None:
    console = Console(width=24, file=io.StringIO())
    terminal.print_table(console, ("file", "n"), [("some words and one-longer-word", "1")], right=(1,))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 24
    assert [line.split() for line in lines[2:]] == [["some", "words", "and", "1"], ["one-longer-word"]]


def test_a_line_goes_on_below_itself_on_a_terminal_and_stays_whole_in_a_file() -> None:
    for is_terminal, n_lines in ((True, 2), (False, 1)):
        console = Console(width=20, file=io.StringIO(), force_terminal=is_terminal, color_system=None)
        terminal.print_line(console, "  one two three four five six seven")
        lines = console.file.getvalue().splitlines()
        assert len(lines) == n_lines
        assert all(line.startswith("  ") for line in lines)
        assert " ".join(" ".join(lines).split()) == "one two three four five six seven"


# --- help -------------------------------------------------------------------------------------------------------------

HELP = """
import json, sys
import typer
from importlib import import_module
from typer.testing import CliRunner

app = import_module(sys.argv[1]).app
commands, pending = [], [([], typer.main.get_command(app))]
while pending:
    words, command = pending.pop()
    commands.append(words)
    below = getattr(command, "commands", {})
    pending += [([*words, word], below[word]) for word in below]
for words in commands:
    for help_ in ("--help", "-h"):
        said = CliRunner().invoke(app, [*words, help_])
        assert said.exit_code == 0 and "Usage" in said.output, (words, said.output)
assert CliRunner().invoke(app, ["--version"]).output.startswith("semwatch ")
heavy = [name for name in ("torch", "scipy", "sklearn", "onnx", "matplotlib") if name in sys.modules]
print(json.dumps({"heavy": heavy, "commands": len(commands)}))
"""


@pytest.mark.parametrize(("program", "fewest"), [("semwatch_training.__main__", 25), ("semwatch.cli.app", 40)])
def test_no_help_loads_torch(program: str, fewest: int) -> None:
    environ = {**os.environ, "PYTHONPATH": f"{ROOT / 'daemon'}{os.pathsep}{ROOT / 'training'}"}
    done = subprocess.run(
        [sys.executable, "-c", HELP, program], env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["heavy"] == []
    assert told["commands"] >= fewest


def test_a_command_loads_only_what_it_needs() -> None:
    """`semwatch lot` answers in the time that it takes Python to start and SQLite to be asked."""
    code = """
import sys
from semwatch.__main__ import main
sys.argv = ["semwatch", "lot", "--help"]
try:
    main()
except SystemExit:
    print([name for name in ("torch", "onnxruntime", "redis", "watchdog", "numpy", "cv2") if name in sys.modules])
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "daemon")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
