"""Detectors to stand beside the served one on real images: what they say of the same fields, kept on disk."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from semwatch.errors import ConfigError, ModelMismatch
from semwatch.line import detection
from semwatch.line.scaling import resize
from semwatch.models.inference import Embedded
from semwatch.system import files
from semwatch_training.evaluation import detectors, training_free
from semwatch_training.evaluation.real_line import Seen
from semwatch_training.families.exported import family_of
from semwatch_training.families.intrinsic import train_intrinsic
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicGraph
from semwatch_training.families.ni import export as ni_export
from semwatch_training.families.ni import train_detector
from semwatch_training.system.progress_bars import Progress
from semwatch_training.trunks import backbone

FOLDS = 5
SAVED_EVERY = 50
MIN_NORMALS = 5
"""Clean images of a process from which a bank is made."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What one detector says of one field."""

    raw: float
    score_map: NDArray[np.float32]
    """(h, w)"""


Scores = dict[str, Scored]
"""By name of the image; an image that the detector could not judge is absent."""


class KeptMaps:
    """Score maps of detectors that never change, on disk.

    Args:
        path: of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._is_new = path, False
        self._maps: dict[str, NDArray[np.float32]] = {}
        if path is not None and path.exists():
            with np.load(path, allow_pickle=False) as file:
                self._maps = {name: file[name] for name in file.files}

    def get(self, key: str, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """The map of a key, made where it is not there."""
        if key not in self._maps:
            self._maps[key], self._is_new = make(), True
        return self._maps[key]

    def save(self) -> None:
        """Write what is new."""
        if self._path is not None and self._is_new:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            np.savez(content, **self._maps)  # type: ignore[arg-type]  # names of arrays, not options
            files.write_whole(self._path, content.getvalue())
            self._is_new = False


def training_free_scores(seen: Sequence[Seen], cache: Path, kept: KeptMaps, *, progress: Progress) -> dict[str, Scores]:
    """Scores of every image by the engines that see nothing but the image they judge."""
    features = _Features(cache)
    found: dict[str, Scores] = {name: {} for name in training_free.ENGINES}
    for done, one in enumerate(seen, start=1):
        for name, engine in training_free.ENGINES.items():
            made = kept.get(_key(name, one.field), lambda engine=engine, one=one: engine(features.of(one)))  # type: ignore[misc]
            found[name][one.image.name] = Scored(float(made.max()), made)
        features.forget()
        if done % SAVED_EVERY == 0:
            kept.save()
        progress("training-free", done, len(seen))
    kept.save()
    return found


def nearest_patch_scores(
    seen: Sequence[Seen], folds: NDArray[np.intp], cache: Path, kept: KeptMaps, *, progress: Progress
) -> Scores:
    """Scores of the images of one process by the nearest patch of its clean ones, save those of its own fold.

    Args:
        seen: of one process.
        folds: (n,) near duplicates are of one fold.
        cache: where the trunk is kept.
        kept: score maps.
        progress: called after every image.

    Returns:
        Nothing where there are fewer than ``MIN_NORMALS`` clean images, or a fold holds all of them.
    """
    clean = [index for index, one in enumerate(seen) if one.image.defective is False]
    if len(clean) < MIN_NORMALS or any(all(folds[i] == fold for i in clean) for fold in np.unique(folds)):
        return {}
    features = _Features(cache)
    found: Scores = {}
    done = 0
    for fold in np.unique(folds):
        normals = [seen[index] for index in clean if folds[index] != fold]
        names = hashlib.sha256("\n".join(_digest(one.field) for one in normals).encode()).hexdigest()
        bank: list[NDArray[np.float32]] = []

        def make(
            one: Seen, normals: list[Seen] = normals, bank: list[NDArray[np.float32]] = bank
        ) -> NDArray[np.float32]:
            if not bank:
                bank.append(training_free.bank_of([features.of(normal) for normal in normals]))
            return training_free.nearest_patch(features.of(one), bank[0])

        for index in np.flatnonzero(folds == fold).tolist():
            one = seen[index]
            made = kept.get(_key(f"{training_free.NEAREST} {names}", one.field), lambda one=one: make(one))  # type: ignore[misc]
            found[one.image.name] = Scored(float(made.max()), made)
            done += 1
            progress("nearest patch", done, len(seen))
    kept.save()
    return found


def before_scores(before: Path, seen: Sequence[Seen], cache: Path, *, progress: Progress) -> Scores:
    """Scores of another detector, such as that of the release before.

    Args:
        before: a model repository whose detector is to be asked; or the detector.safetensors of another time, where
            this version still reads that format.
        seen: the images.
        cache: where trunks are kept.
        progress: called after every image.

    Raises:
        ConfigError: neither of these.
    """
    ask = _safetensors(before, cache) if before.is_file() else _of_repository(before)
    found: Scores = {}
    for done, one in enumerate(seen, start=1):
        found[one.image.name] = ask(one.field)
        progress("before", done, len(seen))
    return found


def _safetensors(path: Path, cache: Path) -> Callable[[NDArray[np.uint8]], Scored]:
    if family_of(path, otherwise=ni_export.FAMILY) == train_intrinsic.FAMILY:
        return _intrinsic(path, cache)
    detector, _, _ = train_detector.load(path)
    trunks = detectors.trunks(cache)
    graph = train_detector.with_trunk(trunks.vit, detector, trunks.efficientnet)
    side = detector.form.input_px

    def ask(field: NDArray[np.uint8]) -> Scored:
        with torch.no_grad():
            score_map, raw = graph(torch.from_numpy(resize(field, (side, side))[None]))
        return Scored(float(raw[0]), score_map[0].numpy())

    return ask


def _intrinsic(path: Path, cache: Path) -> Callable[[NDArray[np.uint8]], Scored]:
    detector, _, _ = train_intrinsic.load(path)
    score = train_intrinsic.own_scale(IntrinsicGraph(backbone.load_efficientnet(cache), detector).eval())

    def ask(field: NDArray[np.uint8]) -> Scored:
        found = score(field)
        return Scored(found.raw_score, found.values)

    return ask


def _of_repository(folder: Path) -> Callable[[NDArray[np.uint8]], Scored]:
    """The detector of a model repository as the line asks it; one that is no longer served is asked directly."""
    if not any(folder.glob("detector/*/model.onnx")):
        raise ConfigError(
            f"{folder}: no model repository with detector/<version>/model.onnx, and no detector.safetensors; get one "
            f"with `git show COMMIT:training/semwatch_training/weights/detector.safetensors > before.safetensors`"
        )
    try:
        models = Embedded(folder, models=("detector",))
    except ModelMismatch:
        return _onnx(folder)

    def ask(field: NDArray[np.uint8]) -> Scored:
        found, _ = detection.detect(field, models)
        return Scored(found.raw_score, found.values)

    return ask


def _onnx(folder: Path) -> Callable[[NDArray[np.uint8]], Scored]:
    path = max(folder.glob("detector/*/model.onnx"), key=lambda path: path.stat().st_mtime)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (asked,) = session.get_inputs()
    height, width = asked.shape[1:3]
    if not isinstance(height, int) or not isinstance(width, int):
        raise ConfigError(f"{path} is of a contract that this version does not serve, and its input has no fixed size")

    def ask(field: NDArray[np.uint8]) -> Scored:
        score_map, raw = session.run(["score_map", "raw_score"], {asked.name: resize(field, (height, width))[None]})
        return Scored(float(raw[0]), score_map[0])

    return ask


class _Features:
    """Features of fields, those of the last ones at hand."""

    def __init__(self, cache: Path) -> None:
        self._backbones = backbone.Backbones(cache)
        self._known: dict[str, training_free.Features] = {}

    def of(self, one: Seen) -> training_free.Features:
        if one.image.name not in self._known:
            self._known[one.image.name] = training_free.features(self._backbones.efficientnet, one.field)
        return self._known[one.image.name]

    def forget(self) -> None:
        self._known = {}


def _digest(field: NDArray[np.uint8]) -> str:
    return hashlib.sha256(f"{field.shape} ".encode() + np.ascontiguousarray(field).tobytes()).hexdigest()[:32]


def _key(engine: str, field: NDArray[np.uint8]) -> str:
    text = f"{training_free.VERSION} {engine} {_digest(field)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]
