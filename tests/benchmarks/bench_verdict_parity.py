"""The working tree against an earlier commit, bit for bit: the demo's lot and 300 synthetic images of at least 448 px.

Both trees judge the same files with the same weights, each in a process of its own with one thread to a network. The
images are rendered once, by the earlier commit, and kept in ``.cache``. The table counts, for each thing that a review
says, on how many images the two differ; the aim is none.

``SEMWATCH_PARITY_COMMIT`` names another commit than the one before the rooms. The earlier code reads the checkout's
model repository through links whose ``meta.json`` holds only the keys it knows; where that is not enough,
``SEMWATCH_PARITY_REPOSITORY`` names a repository that it can read.

This file is the program of the two processes as well: ``python bench_verdict_parity.py FOLDER`` (see ``_run_job``). Run
so, it imports from whichever tree stands on PYTHONPATH, at the places of today or at those of before.
"""

import hashlib
import importlib
import inspect
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
COMMIT = os.environ.get("SEMWATCH_PARITY_COMMIT", "4b6ac700568b232b91584688196d2655cd180a45")
DEMO_N, DEMO_SEED = 24, 7
"""What ``semwatch demo`` drops."""
SIZES_HW = (
    (448, 448), (448, 640), (480, 480), (512, 512), (512, 704), (520, 1160), (560, 448), (576, 576), (600, 1500),
    (612, 816), (640, 480), (641, 479), (700, 700), (720, 1280), (750, 500), (768, 768), (768, 1024), (800, 450),
    (820, 1230), (884, 1024), (896, 896), (960, 1280), (1000, 464), (1024, 768), (1024, 1024), (1080, 720),
    (1200, 450), (1280, 960), (1300, 1300), (1536, 1152),
)  # fmt: skip
PER_SIZE = 10
SEED = 4480
MIN_SIDE = 448
"""A field this large is shrunk on both axes, whichever way it is then looked at."""
THREADS = 1

# What a review says, as one record an image holds it; see ``_record``.
KINDS = (
    "decoded pixels", "field", "score map", "raw score", "gate threshold", "mask", "defects", "boxes", "areas",
    "peak scores", "crop windows", "crops", "soft masks", "features", "verdict kinds", "labels", "confidences",
    "p-values", "nearest classes",
)  # fmt: skip
Record = dict[str, Any]
Job = dict[str, Any]


@pytest.mark.timeout(3600)
def test_the_working_tree_judges_as_the_commit_before(repository: Path, tmp_path: Path) -> None:
    before, now = _tree_of(COMMIT, tmp_path / "before"), ROOT
    lots = {"demo lot": tmp_path / "lot", "300 synthetic images": _rendered(before, ROOT / ".cache")}
    made = ((before, lots["demo lot"]), (now, tmp_path / "lot now"))
    demo = ("-m", "semwatch_training", "synth", "--n", DEMO_N, "--seed", DEMO_SEED, "--out")
    assert [process.wait() for process in [_python(tree, *demo, folder) for tree, folder in made]] == [0, 0]
    assert _hashes(tmp_path / "lot now") == _hashes(lots["demo lot"]), "the two trees render another demo lot"

    given = os.environ.get("SEMWATCH_PARITY_REPOSITORY")
    shared = {"images": [str(path) for folder in lots.values() for path in _images(folder)], "threads": THREADS}
    jobs = [
        (before, {**shared, "repository": given or str(repository), "view": None if given else str(tmp_path / "view")}),
        (now, {**shared, "repository": str(repository), "view": None}),
    ]
    (weights_before, said_before), (weights_now, said_now) = _judged(jobs, tmp_path)
    assert weights_before == weights_now, "the two trees were given other weights"

    table = Table("", *lots, title=f"{COMMIT[:7]} against the working tree, {THREADS} thread to a network")
    names = {lot: {path.name for path in _images(folder)} for lot, folder in lots.items()}
    parts = [[(a, b) for a, b in zip(said_before, said_now, strict=True) if a["name"] in names[lot]] for lot in lots]
    pages: list[list[Record]] = [[page for a, _ in part for page in a["pages"]] for part in parts]
    table.add_row("images", *(str(len(part)) for part in parts))
    table.add_row("smallest side of a field, px", *(str(min(_side(page) for page in of)) for of in pages))
    table.add_row("pages whose gate opened", *(str(sum(page["is_open"] for page in of)) for of in pages))
    table.add_row("defects", *(str(sum(page["defects"] for page in of)) for of in pages))
    for kind in ("known", "unknown", "non-decidable", "defect-free"):
        counts = (sum(page["verdict kinds"].count(kind) for page in of) for of in pages)
        table.add_row(f"  of them {kind}", *map(str, counts))
    found = [differences(part) for part in parts]
    for kind in KINDS:
        table.add_row(f"images that differ: {kind}", *(str(len(of[kind])) for of in found))
    Console(width=110).print(table)
    for lot, of in zip(lots, found, strict=True):
        for kind, which in of.items():
            if which:
                Console().print(f"{lot}, {kind}: {', '.join(which[:5])}")

    assert [len(part) for part in parts] == [DEMO_N, len(SIZES_HW) * PER_SIZE]
    assert all(sum(page["defects"] for page in of) > 10 for of in pages)  # else equality would say little
    assert min(_side(page) for page in pages[1]) >= MIN_SIDE
    assert sum(len(which) for of in found for which in of.values()) == 0


def test_a_single_changed_bit_is_a_difference() -> None:
    values = np.linspace(0, 1, 6, dtype=np.float32)
    changed = values.copy()
    changed.view(np.uint32)[3] ^= 1
    one, other = ({"name": "a.tif", "pages": [{"score map": _digest(v), "labels": [1]}]} for v in (values, changed))
    assert differences([(one, one)]) == {kind: [] for kind in KINDS}
    assert differences([(one, other)])["score map"] == ["a.tif"]
    lost = {**one, "pages": []}
    assert differences([(one, lost)])["labels"] == ["a.tif"]


def differences(pairs: Sequence[tuple[Record, Record]]) -> dict[str, list[str]]:
    """Names of the images on which two records differ, by what they differ in; a page too few differs in all."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for one, other in pairs:
        assert one["name"] == other["name"]
        pages: list[tuple[Record, Record]] = list(zip_longest(one["pages"], other["pages"], fillvalue={}))
        for kind in KINDS:
            if any(a.get(kind) != b.get(kind) for a, b in pages):
                found[kind].append(one["name"])
    return found


# --- the two trees -------------------------------------------------------------------------------------------------


def _tree_of(commit: str, folder: Path) -> Path:
    """The package folders of a commit, laid out in a folder."""
    packed = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit, "daemon", "training"], capture_output=True, check=False, timeout=60
    )
    if packed.returncode:
        pytest.fail(f"commit {commit} is not in this clone: fetch its history, or set SEMWATCH_PARITY_COMMIT")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.0 to 3.11.3 have none
        archive.extractall(folder)
    return folder


def _python(tree: Path, *argv: object) -> subprocess.Popen[bytes]:
    """Python with the packages of a tree."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(str(tree / part) for part in ("daemon", "training"))}
    environ |= {"OMP_NUM_THREADS": str(THREADS), "SEMWATCH_PARITY_TREE": str(tree)}
    return subprocess.Popen([sys.executable, *map(str, argv)], env=environ, cwd=tree)


def _run(jobs: Sequence[tuple[Path, Job]], folder: Path) -> list[Path]:
    """Run jobs side by side, each in a process of its tree; returns the folders of what they wrote."""
    running = []
    for i, (tree, job) in enumerate(jobs):
        place = folder / f"job-{i}"
        place.mkdir(parents=True)
        (place / "job.json").write_text(json.dumps(job))
        running.append((place, _python(tree, Path(__file__).resolve(), place)))
    codes = [process.wait() for _, process in running]
    assert codes == [0] * len(codes)
    return [place for place, _ in running]


def _judged(jobs: Sequence[tuple[Path, Job]], folder: Path) -> list[tuple[dict[str, str], list[Record]]]:
    """Hashes of the weights that served, and one record for each image."""
    found = []
    for place in _run([(tree, {"do": "judge", **job}) for tree, job in jobs], folder):
        records = [json.loads(line) for line in (place / "records.jsonl").read_text().splitlines()]
        found.append((json.loads((place / "weights.json").read_text()), records))
    return found


def _rendered(tree: Path, cache: Path) -> Path:
    """Folder of the synthetic images; rendered by an earlier run, or now, two halves side by side."""
    plan = hashlib.sha256(json.dumps([COMMIT, SIZES_HW, PER_SIZE, SEED]).encode()).hexdigest()[:12]
    folder = cache / f"parity-{plan}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        halves = [list(range(first, len(SIZES_HW), 2)) for first in (0, 1)]
        _run([(tree, {"do": "render", "sizes": half, "into": str(partial)}) for half in halves], partial / "jobs")
        partial.rename(folder)
    return folder


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".tif", ".png"))


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _images(folder)}


def _side(page: Record) -> int:
    x0, y0, x1, y1 = page["field"]
    return int(min(x1 - x0, y1 - y0))


# --- inside one tree -----------------------------------------------------------------------------------------------


def _run_job(place: Path) -> None:
    """Do what ``job.json`` of a folder asks, and leave the answer beside it."""
    job = json.loads((place / "job.json").read_text())
    semwatch = importlib.import_module("semwatch")
    assert Path(str(semwatch.__file__)).is_relative_to(os.environ["SEMWATCH_PARITY_TREE"]), semwatch.__file__
    if job["do"] == "render":
        _render(job["sizes"], Path(job["into"]))
    else:
        _judge(job, place)


def _place(name: str, *modules: str) -> Any:
    """A name from the first of these modules that this tree has."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # it is there, and what it imports is not
    raise ModuleNotFoundError(f"{name} is in none of {', '.join(modules)}")


def _render(sizes: Sequence[int], into: Path) -> None:
    lot_images = importlib.import_module("semwatch_training.synthetic").lot_images
    for i in sizes:
        # An info bar is taken for one by its looks: images of the smallest size must not lose a row to a mistake.
        bars = 0.0 if min(SIZES_HW[i]) == MIN_SIDE else 0.4
        for image in lot_images(
            n=PER_SIZE, seed=SEED + i, size_hw=SIZES_HW[i], info_bar_share=bars, png_share=0.4, defect_free_share=0.2
        ):
            (into / image.name).write_bytes(image.content)


def _judge(job: Job, place: Path) -> None:
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(1)
    review = _place("review", "semwatch.line.pipeline", "semwatch.pipeline")
    load_recipe = _place("load_recipe", "semwatch.settings.recipe", "semwatch.settings.site", "semwatch.config")
    embedded = _place("Embedded", "semwatch.models.inference", "semwatch.inference")
    repository = Path(job["repository"])
    if job["view"]:
        repository = _view(repository, Path(job["view"]))
    (place / "recipe.yaml").write_text("name: demo\n")
    recipe = load_recipe(place / "recipe.yaml")
    with embedded(repository, threads=job["threads"]) as models, (place / "records.jsonl").open("w") as out:
        served = {m: repository / m / str(version) / "model.onnx" for m, version in models.versions().items()}
        weights = {model: hashlib.sha256(path.read_bytes()).hexdigest() for model, path in served.items()}
        (place / "weights.json").write_text(json.dumps(weights))
        for path in map(Path, job["images"]):
            data = path.read_bytes()
            said = {"source": "parity", "tool": "parity", "site": "parity", "path": path.name}
            said |= {"sha256": hashlib.sha256(data).hexdigest(), "reviewed_utc": "2026-01-01T00:00:00Z"}
            taken = inspect.signature(review).parameters
            found = review(data, recipe=recipe, models=models, **{k: v for k, v in said.items() if k in taken})
            out.write(json.dumps({"name": path.name, "pages": [_record(page, models) for page in found.pages]}) + "\n")


def _view(repository: Path, view: Path) -> Path:
    """The repository as links, each ``meta.json`` with only the keys that this tree's ``Meta`` knows."""
    known = _place("Meta", "semwatch.models.model_repository", "semwatch.model_repository").model_fields
    for meta in sorted(repository.glob("*/*/meta.json")):
        folder = view / meta.parent.relative_to(repository)
        folder.mkdir(parents=True)
        for file in meta.parent.iterdir():
            if file != meta:
                (folder / file.name).symlink_to(file.resolve())
        whole = {key: value for key, value in json.loads(meta.read_text()).items() if key in known}
        for tensors in ("inputs", "outputs"):
            whole[tensors] = {n: {k: t[k] for k in ("dtype", "shape")} for n, t in whole[tensors].items()}
        (folder / meta.name).write_text(json.dumps(whole))
    for file in repository.glob("*/*"):  # which version serves
        if file.is_file():
            (view / file.relative_to(repository)).symlink_to(file.resolve())
    return view


def _record(page: Any, models: Any) -> Record:
    """Everything that is said of a page: numbers whole, floats by their bits, arrays by a hash of theirs."""
    defects, verdicts = page.defects, [defect.verdict for defect in page.defects]
    p_values = [[neighbour.p_value.hex() for neighbour in verdict.nearest] for verdict in verdicts]
    if defects:  # of every class, not of the nearest alone
        head = models.infer("head", {"features": np.stack([defect.features for defect in defects])})
        p_values.append([_digest(head.outputs[name]) for name in ("logits", "p_values")])
    return {
        "is_open": page.score_map.raw_score > page.gate_threshold,
        "decoded pixels": _digest(page.micrograph.pixels),
        "field": list(page.micrograph.field_xyxy),
        "score map": _digest(page.score_map.values),
        "raw score": page.score_map.raw_score.hex(),
        "gate threshold": float(page.gate_threshold).hex(),
        "mask": _digest(page.mask),
        "defects": len(defects),
        "boxes": [list(defect.box_xyxy) for defect in defects],
        "areas": [(d.area_px, None if d.area_nm2 is None else float(d.area_nm2).hex()) for d in defects],
        "peak scores": [float(defect.peak_score).hex() for defect in defects],
        "crop windows": [list(defect.crop_xyxy) for defect in defects],
        "crops": [_digest(defect.crop) for defect in defects],
        "soft masks": [_digest(defect.soft_mask) for defect in defects],
        "features": [_digest(defect.features) for defect in defects],
        "verdict kinds": [verdict.kind for verdict in verdicts],
        "labels": [verdict.label for verdict in verdicts],
        "confidences": [verdict.confidence.hex() for verdict in verdicts],
        "p-values": p_values,
        "nearest classes": [[(n.label, n.probability.hex()) for n in verdict.nearest] for verdict in verdicts],
    }


def _digest(array: NDArray[Any]) -> str:
    """Hash over type, shape and every bit of an array."""
    whole = np.ascontiguousarray(array)
    return hashlib.sha256(f"{whole.dtype} {whole.shape} ".encode() + whole.tobytes()).hexdigest()


if __name__ == "__main__":
    _run_job(Path(sys.argv[1]))
