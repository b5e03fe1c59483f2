"""The index of the results at its size: a page of 1,000,000 defects, an insert, a rebuild, a lot of 5,000 images.

    python tests/benchmarks/bench_result_index.py [--images 200000] [--rebuild 100000] [--lot 5000]

The peer is the tree of JSON files, read by the same code: a lot of 5,000 images by ``lot_table.iter_lot``.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import yaml

from factories import make_review, make_verdict
from semwatch.operations import lots
from semwatch.settings.site import load_site
from semwatch.store import lot_table
from semwatch.store.result_index import BATCH, INDEX, ResultIndex, open_index, rebuild
from semwatch.store.review_record import ReviewRecord, to_record

LABELS = ("particle", "pit", "void", "scratch", "residue")
N_DEFECTS = 5


def record_of(i: int, template: ReviewRecord, lot: str) -> ReviewRecord:
    """The result of image i: its defects have labels and confidences of their own."""
    (page,) = template.pages
    defects = tuple(
        defect.model_copy(
            update={
                "verdict": defect.verdict.model_copy(
                    update={"label": LABELS[(i + k) % len(LABELS)], "confidence": ((i * 7 + k * 13) % 100) / 100}
                )
            }
        )
        for k, defect in enumerate(page.defects)
    )
    return template.model_copy(
        update={
            "path": f"{lot}/{i:07}.tif",
            "sha256": f"{i:064x}",
            "pages": (page.model_copy(update={"defects": defects}),),
        }
    )


def milliseconds(work: Callable[[], object], n: int = 20) -> float:
    """Median of n runs."""
    taken = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--rebuild", type=int, default=100_000)
    parser.add_argument("--lot", type=int, default=5_000)
    asked = parser.parse_args()
    template = to_record(make_review(N_DEFECTS, verdicts=[make_verdict("known")]))
    with tempfile.TemporaryDirectory() as folder:
        big(Path(folder), template, asked.images)
    with tempfile.TemporaryDirectory() as folder:
        tree(Path(folder), template, asked.rebuild, asked.lot)


def big(folder: Path, template: ReviewRecord, n_images: int) -> None:
    """An index of many lots of 500 images."""
    with open_index(folder / INDEX) as index:
        taken_s = 0.0
        for first in range(0, n_images, BATCH):
            lot = f"lot{first // 500:05}"
            batch = [
                (f"{i:07}.tif.review.json", "1 1 1", record_of(i, template, lot)) for i in range(first, first + BATCH)
            ]
            start = time.perf_counter()
            index.put(f"tool-a/{lot}", batch)
            taken_s += time.perf_counter() - start
        n = index.counts()["defects"]
        print(f"insert, a batch of {BATCH} images: {taken_s / n * 1e3:.3f} ms a defect ({n:,} defects)")
        print(f"size of the file: {(folder / INDEX).stat().st_size / n:.0f} bytes a defect")
        middle = index.defects(limit=1)[0].id + n // 2
        show_pages(index, middle)


def show_pages(index: ResultIndex, middle: int) -> None:
    """Filtered pages of 100, from the middle of the index."""
    lot = index.lots()[-1]
    questions: dict[str, Callable[[], object]] = {
        "label": lambda: index.defects(label="void", after=middle),
        "label and lot": lambda: index.defects(label="void", lot=lot),
        "kind and confidence": lambda: index.defects(kind="known", max_confidence=0.05, after=middle),
        "label and confidence (none is)": lambda: index.defects(label="pit", max_confidence=-1),
        "judged by people (none is)": lambda: index.defects(is_judged=True),
        "label that is not there": lambda: index.defects(label="nothing"),
        "everything, from the start": index.defects,
    }
    for name, ask in questions.items():
        print(f"a page of 100, {name}: {milliseconds(ask):.1f} ms")


def tree(folder: Path, template: ReviewRecord, n_images: int, n_lot: int) -> None:
    """Results on disk: one lot of its size, the others of 500 images."""
    results_dir = folder / "results"
    for i in range(n_images):
        lot = "big" if i < n_lot else f"lot{i // 500:05}"
        path = results_dir / "tool-a" / lot / f"{i:07}.tif.review.json"
        if i % 500 == 0 or i == n_lot:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record_of(i, template, lot).model_dump_json(indent=2))
    with open_index(folder / "state" / INDEX) as index:
        start = time.perf_counter()
        list(rebuild(index, results_dir))
        taken_s = time.perf_counter() - start
        print(f"rebuild from {n_images:,} results: {taken_s:.0f} s, {taken_s / n_images * 1e3:.2f} ms a result")
        start = time.perf_counter()
        list(rebuild(index, results_dir))
        print(f"the same again, nothing has changed: {time.perf_counter() - start:.1f} s")
    (folder / "drop" / "big").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: bench\n")
    settings = {
        "folders": [{"source": "tool-a", "path": str(folder / "drop"), "recipe": str(folder / "recipe.yaml")}],
        "results_dir": str(results_dir),
        "state_dir": str(folder / "state"),
        "models": {"repository": str(folder)},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(settings))
    site = load_site(folder / "site.yaml")
    at_a_glance = milliseconds(lambda: lots.show(site, "big"), 9)
    peer = milliseconds(lambda: list(lot_table.iter_lot(results_dir / "tool-a" / "big")), 1)
    print(f"a lot of {n_lot:,} images at a glance: {at_a_glance:.0f} ms; reading its JSON files: {peer:.0f} ms")
    command = [sys.executable, "-m", "semwatch", "lot", "big", "--site", str(folder / "site.yaml")]
    print(f"the whole command: {statistics.median(processor_ms(command) for _ in range(9)):.0f} ms of processor time")


def processor_ms(command: list[str]) -> float:
    """Processor time of a program."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3


if __name__ == "__main__":
    main()
