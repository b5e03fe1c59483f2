"""The secret of a server never stands in its command line: tried on another program, and watched all along."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from semwatch.errors import ConfigError
from semwatch.system import child_server
from semwatch.triton import control

SECRET = "s3cret-s3cret-s3cret-s3cret"
PYTHON = str(Path(sys.executable).resolve())


def test_the_program_knows_its_options_and_no_command_line_shows_them() -> None:
    seen, is_over = set[bytes](), threading.Event()
    before = {entry.name for entry in Path("/proc").iterdir()}  # numbers of processes begin anew one day

    def spy() -> None:
        while not is_over.is_set():
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and entry.name not in before:
                    try:
                        seen.add((entry / "cmdline").read_bytes())
                    except OSError:
                        continue

    watching = threading.Thread(target=spy)
    watching.start()
    program = "import json, os, sys; assert 'LD_PRELOAD' not in os.popen('env').read(); print(json.dumps(sys.argv[1:]))"
    try:
        with control.gate() as gate:
            process = subprocess.Popen(
                child_server.dying_with_us(
                    *gate.command(PYTHON), "-I", "-c", program, "--first", *control.options(SECRET), "--last"
                ),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **control.variables(SECRET)},
            )
            gate.open_to(process, PYTHON, SECRET)
        said, _ = process.communicate(timeout=60)
    finally:
        is_over.set()
        watching.join()
    first, grpc, http, last = json.loads(said)
    assert (first, last) == ("--first", "--last")
    assert grpc.startswith("--grpc-restricted-protocol=")
    assert http.startswith("--http-restricted-api=")
    assert grpc.endswith(f":{control.KEY}={SECRET}")
    assert http.endswith(f":{control.KEY}={SECRET}")
    assert any(b"=xxxxxxxx" in line for line in seen)
    assert not [line for line in seen if SECRET.encode() in line]


def test_a_program_that_ends_at_the_gate_is_said() -> None:
    with control.gate() as gate:
        process = subprocess.Popen(["/bin/false"])
        process.wait(10)
        with pytest.raises(ConfigError, match="cannot be kept out of its command line"):
            gate.open_to(process, "/bin/false", SECRET)
