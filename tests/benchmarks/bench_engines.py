"""Seconds and sizes of the shipped networks' plans, for every GPU of a fleet, compiled without one."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from semwatch_training.engines import build

CAPABILITIES = (86, 89, 120)
MODELS = ("detector", "encoder")


@pytest.mark.timeout(3600)
def test_every_gpu_of_a_fleet(repository: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13")
    made = [
        each.manifest
        for each in build.export(
            repository, tmp_path, target="tensorrt-rtx", capabilities=CAPABILITIES, models=MODELS,
            images=data / "MTD", n_images=16, progress=lambda *_: None,
        )
    ]  # fmt: skip
    table = Table("model", *(f"SM{c}: s, MB" for c in CAPABILITIES), title="fp16 plans, batch 1 to 16, no GPU at hand")
    for model in MODELS:
        rows = {m.compute_capability: m for m in made if m.model == model}
        table.add_row(model, *(f"{rows[c].seconds:5.1f}  {rows[c].plan_bytes / 1e6:5.1f}" for c in CAPABILITIES))
    parity = Table("model", "inputs", "judged by", "n", "off by, of the largest value", title="fp16 against fp32")
    for row, model in [(row, m.model) for m in made if m.compute_capability == CAPABILITIES[0] for row in m.parity]:
        parity.add_row(
            model, row.inputs, row.way, str(row.samples), "  ".join(f"{k} {v:.1e}" for k, v in row.relative.items())
        )
    Console(width=120).print(table, parity)
    assert len({m.plan_sha256 for m in made}) == len(CAPABILITIES) * len(MODELS)
    assert np.isfinite([m.seconds for m in made]).all()
