"""200 Magnetic-Tile images and every SEM TIFF of the public set through the running daemon: failures, rate, overlays.

Overlays stay in ``$SEMWATCH_OUT`` where it is set, to be looked at.
"""

import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from daemon import Daemon, make_site
from semwatch.store import results

N_MTD = 200


@pytest.mark.timeout(1800)
def test_real_images_through_the_daemon(repository: Path, data: Path, tmp_path: Path) -> None:
    folder = Path(os.environ.get("SEMWATCH_OUT", tmp_path)) / "real"
    shutil.rmtree(folder, ignore_errors=True)
    site = make_site(folder, repository, recipe={"name": "defaults"}, models={"repository": str(repository)})
    images = sorted((data / "MTD").rglob("*.jpg"))
    chosen = random.Random(0).sample(images, N_MTD) + sorted((data / "SEM-TIFF-metadata").glob("*.tif"))
    for image in chosen:
        site.put(f"{image.parent.name}-{image.parent.parent.name}-{image.name}", image.read_bytes())
    start = time.monotonic()
    with Daemon(site) as daemon:
        daemon.wait_ready()
        ready_s = time.monotonic() - start
        daemon.wait_for(lambda: len(site.reviews()) + len(site.reasons()) >= len(chosen), 1500)
        seconds = time.monotonic() - start - ready_s
        assert daemon.stop() == 0
    records = [json.loads(path.read_text()) for path in site.reviews()]
    ms = [sum(record["timings_ms"].values()) for record in records]
    table = Table(show_header=False, title="real images, shipped weights, default recipe")
    table.add_row("files in / results / quarantined", f"{len(chosen)} / {len(records)} / {len(site.reasons())}")
    table.add_row("start to ready", f"{ready_s:.1f} s")
    table.add_row("rate", f"{len(records) / seconds:.2f} files/s")
    table.add_row("one review, median / p95", f"{np.median(ms):.0f} / {np.percentile(ms, 95):.0f} ms")
    opened = [page["image_score"] > page["gate_threshold"] for record in records for page in record["pages"]]
    table.add_row("pages whose gate opened", f"{sum(opened)} of {len(opened)}")
    Console().print(table)
    overlays = [p.with_name(p.name.replace(".review.json", ".overlay.png")) for p in site.reviews()]
    results.contact_sheet(overlays[:: max(1, len(overlays) // 24)][:24], folder / "contact-sheet.png")
    assert site.reasons() == {}
