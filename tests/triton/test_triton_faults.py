"""Some of the faults that ``bench_triton_faults`` does to the line on Triton, those that are over soon."""

from pathlib import Path
from typing import Any

import pytest

from triton_faults import CASES, Case, run

QUICK = "connection cut in an answer"
SOON_OVER = (
    QUICK,
    "server killed (supervised)",
    "server hangs (SIGSTOP)",
    "head unloaded",
    "other weights under the same number",
    "damaged head published",
    "daemon stopped while it hangs",
)


def _parameter(case: Case) -> Any:
    return pytest.param(case, id=case.name, marks=() if case.name == QUICK else pytest.mark.slow)


@pytest.mark.parametrize("case", [_parameter(case) for case in CASES if case.name in SOON_OVER])
def test_fault_loses_doubles_and_falsifies_nothing(
    case: Case, tmp_path: Path, installed: Path, tiny_repository: Path
) -> None:
    found = run(case, tmp_path, installed, tiny_repository, hang_s=4, n_files=16)
    assert (found.lost, found.doubled, found.wrong) == (0, 0, 0)
    assert found.results == found.files
    assert found.recovery_s is None or found.recovery_s < 15
