"""Some of the faults that ``bench_triton_faults`` does to the line on Triton, those that are over soon."""

from pathlib import Path

import pytest

from triton_faults import CASES, Case, run

FAST = (
    "server killed (supervised)",
    "server hangs (SIGSTOP)",
    "head unloaded",
    "other weights under the same number",
    "damaged head published",
    "connection cut in an answer",
    "daemon stopped while it hangs",
)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.name in FAST])
def test_fault_loses_doubles_and_falsifies_nothing(
    case: Case, tmp_path: Path, installed: Path, tiny_repository: Path
) -> None:
    found = run(case, tmp_path, installed, tiny_repository, hang_s=4, n_files=16)
    assert (found.lost, found.doubled, found.wrong) == (0, 0, 0)
    assert found.results == found.files
    assert found.recovery_s is None or found.recovery_s < 15
