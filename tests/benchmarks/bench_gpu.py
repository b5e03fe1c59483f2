"""The GPU run as a check: time against the arithmetic floor of the same card, same run."""

from functools import partial
from pathlib import Path

import pytest
import torch

from gpu_run import networks
from gpu_run import run as whole_run
from gpu_run.run import Order
from paths import ROOT

ALLOWED = {1: 3.0, 16: 2.0}
"""Times the floor for detector and encoder of ViT-B, by batch."""


@pytest.mark.timeout(1800)
def test_both_networks_of_vit_b_stay_near_the_floor(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    cache = ROOT / ".cache"
    pairs = [partial(networks.make, size, cache) for size in networks.SIZES]
    report = whole_run.run(tmp_path, pairs, "cuda", Order())
    print(whole_run.table(report))
    for name, share in report.gflop_check.items():
        assert share == pytest.approx(1, rel=whole_run.COUNT_TOLERANCE), name
    both = [row for row in report.rows if (row.size, row.part) == ("vit-b", "both")]
    for batch, allowed in ALLOWED.items():
        assert min(row.ratio for row in both if row.batch == batch) <= allowed, f"batch {batch}"
