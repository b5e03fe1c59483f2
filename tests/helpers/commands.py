"""The command line as tests call it: in this process from its entry point, or as a process of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from semwatch.__main__ import main


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def words(self) -> str:
        """Both outputs without the frames and line ends of tables and help."""
        return re.sub(r"[\s│╭╮╰╯─┃┏┓┡┩┳╇┴└┘━]+", " ", self.out + self.err)


Command = Callable[..., Said]


def in_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``semwatch ARGV...`` inside this process, from its entry point; spared is only the start of Python."""

    def command(*argv: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["semwatch", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Said(code or 0, said.out, said.err)

    return command


def spawn(*argv: object, cwd: Path, **environ: str) -> Said:
    """``semwatch ARGV...`` as a process."""
    done = subprocess.run(
        [sys.executable, "-m", "semwatch", *map(str, argv)],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return Said(done.returncode, done.stdout, done.stderr)


def write_recipe(path: Path, **values: object) -> Path:
    path.write_text(yaml.safe_dump({"name": "test", **values}))
    return path


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
