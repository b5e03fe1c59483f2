"""Memory of a running daemon over thousands of small images: growth after the first tenth, and the peak."""

import os
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console
from rich.table import Table

from daemon import Daemon, make_site, png
from semwatch.streams.embedded_redis import EmbeddedRedis

N = int(os.environ.get("SEMWATCH_MEMORY_IMAGES", "3000"))


@pytest.mark.timeout(5400)
def test_memory_is_flat(tiny_repository: Path, tmp_path: Path) -> None:
    repository = Path(os.environ.get("SEMWATCH_MEMORY_REPOSITORY", tiny_repository))
    samples: list[tuple[int, int]] = []
    with EmbeddedRedis(tmp_path / "redis") as server:
        site = make_site(tmp_path / "site", repository, redis_url=server.url)
        with Daemon(site) as daemon:
            daemon.wait_ready()
            process = psutil.Process(daemon.process.pid)
            for start in range(0, N, 100):
                for index in range(start, start + 100):
                    site.put(f"{index}.png", png(index, side=128))
                daemon.wait_for(lambda done=start + 100: len(list(site.results.glob("*.review.json"))) >= done, 600)
                samples.append((start + 100, process.memory_info().rss))
            peak = int((Path("/proc") / str(process.pid) / "status").read_text().split("VmHWM:")[1].split()[0]) * 1024
            assert daemon.stop() == 0
    shutil.rmtree(tmp_path / "site")
    early = samples[N // 1000 - 1 if N >= 1000 else 0][1]
    table = Table("images", "resident MB", "against the first tenth")
    for n, rss in samples[:: max(1, len(samples) // 10)]:
        table.add_row(str(n), f"{rss / 1e6:.0f}", f"{rss / early - 1:+.1%}")
    Console().print(table)
    growth = max(rss for n, rss in samples if n > N // 10) / early - 1
    trend = np.polyfit([n for n, _ in samples], [rss for _, rss in samples], 1)[0]
    Console().print(
        f"peak {peak / 1e6:.0f} MB; growth after {N // 10} images {growth:+.1%}; trend {trend:.0f} bytes an image"
    )
    assert growth < 0.05
