"""Faults of the line on a real Triton: files in, results out, lost, doubled, wrong, and the time until it goes on.

Each case runs the daemon with its own Redis beside a real server, drops 40 images while something is broken and mended,
and compares every result with what the embedded runtime says of the same file by the same version of the models.
SEMWATCH_HANG_S: how long SIGSTOP lasts. SEMWATCH_FAULT: do only the cases with this in their names.
"""

import os
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from paths import ROOT
from semwatch.triton.setup import set_up
from triton_faults import CASES, run
from triton_line import N_FILES

HANG_S = float(os.environ.get("SEMWATCH_HANG_S", "30"))
ONLY = os.environ.get("SEMWATCH_FAULT", "")
INSTALLED = ROOT / ".cache" / "triton"


@pytest.mark.timeout(3000)
def test_no_fault_loses_doubles_or_falsifies_a_result(tmp_path: Path, tiny_repository: Path) -> None:
    set_up(INSTALLED)
    table = Table("case", "files", "results", "lost", "doubled", "wrong", "recovery s", "daemon ended with")
    table.title = f"{len(CASES)} faults, {N_FILES} files each, SIGSTOP {HANG_S:g} s"
    unsound = []
    for number, case in enumerate(CASES):
        if ONLY not in case.name:
            continue
        try:
            found = run(case, tmp_path / str(number), INSTALLED, tiny_repository, hang_s=HANG_S)
        except Exception as error:  # noqa: BLE001 - the table shall show every case
            print(f"--- {case.name}\n{error!r}")
            unsound.append(case.name)
            table.add_row(case.name, "failed: see above")
            continue
        recovery = "-" if found.recovery_s is None else f"{found.recovery_s:.1f}"
        counts = (found.files, found.results, found.lost, found.doubled, found.wrong)
        table.add_row(case.name, *map(str, counts), recovery, " ".join(map(str, found.exits)))
        if not found.is_sound:
            unsound.append(case.name)
    Console(width=140).print(table)
    assert unsound == []
