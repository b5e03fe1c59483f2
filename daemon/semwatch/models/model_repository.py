"""The model repository: Triton's folder layout, with what the daemon must know of a model in a ``meta.json`` beside it.

    <repository>/<model>/<version>/model.onnx
    <repository>/<model>/<version>/meta.json  see ``Meta``
    <repository>/<model>/<version>/probe.npz  inputs, and what the original answered to them; checked at every load
    <repository>/head/<version>/*.npz         what the head was fitted on and proven on, see ``head_bank``
    <repository>/crops/<sha256>.npz           the crops of these, see ``crop_store``

What a model takes and gives is its own matter within ``contract``. Versions are whole numbers counted from 1. A version
folder appears by one rename, complete, and is never changed again: labels, calibration and weights of one version
cannot come apart. The model repository is code: only the learning side writes here, and every load checks the weights
against the hash in ``meta.json``.
"""

import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from semwatch.errors import ModelMismatch, PublishError, ServiceUnavailable
from semwatch.system.files import file_sha256, make_folder, place_folder

MODELS = ("detector", "encoder", "head")
WEIGHTS = "model.onnx"
META = "meta.json"
PROBE = "probe.npz"
"""Arrays ``input.<name>`` and ``output.<name>``: a few samples, and the answers of what the version was made from."""

MAX_META_BYTES = 64 << 20
MAX_ARRAYS_BYTES = 2 << 30
"""Larger files are not ours, and are refused unread."""
_VERSION = re.compile(r"[1-9][0-9]{0,8}")

OPEN = -1
"""A side of a tensor that may have any size."""

DType = Literal["uint8", "float32"]
Arrays = Mapping[str, NDArray[Any]]


class Tensor(BaseModel):
    """Name-less signature of one input or output; the batch axis is not in ``shape``.

    A side of -1 is open: any size that the contract allows, see ``contract.FIELD_SIDES_PX``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: DType
    shape: tuple[int, ...]

    @property
    def is_open(self) -> bool:
        """Whether a side of it is open."""
        return OPEN in self.shape

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether an item of this shape fits."""
        return len(shape) == len(self.shape) and all(own in (OPEN, n) for own, n in zip(self.shape, shape, strict=True))

    def sized(self, side: int) -> tuple[int, ...]:
        """Its shape, with open sides of this size."""
        return tuple(side if own == OPEN else own for own in self.shape)


class Meta(BaseModel):
    """Everything that travels with one version of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: Literal["detector", "encoder", "head"]
    created_utc: str
    weights_sha256: str = ""
    """Of ``model.onnx``; filled in by ``publish``."""
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    normal_scores: tuple[float, ...] = ()
    """Detector: raw scores of held-out normal images, what the gate's conformal threshold is computed from."""
    labels: tuple[str, ...] = ()
    """Head: class names in the order of its outputs."""
    codes: Mapping[str, int] = {}
    """Head: fab codes of classes that a person named; a recipe's class table goes before them."""
    encoder_sha256: str = ""
    """Head: the encoder's weights whose features it was trained on."""
    provenance: Mapping[str, str | float | int] = {}
    """How it was made: form, seed, data, command, metrics; of a learned head also its cycle, parent, what it learned
    and applied, and the best golden marks of its lineage: the next cycle reads these."""

    @property
    def is_open(self) -> bool:
        """Whether it takes an input at any size."""
        return any(tensor.is_open for tensor in self.inputs.values())

    @property
    def content_sha256(self) -> str:
        """Identity of the version: hash of all that shapes its answers and what is made of them, on any machine alike.

        Not of when and how it was made: the same weights under the same description are the same model.
        """
        content = self.model_dump(mode="json", exclude={"created_utc", "provenance", "schema_version"})
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def content_hash(self) -> str:
        """The first 16 digits of ``content_sha256``: what results, records and people are shown."""
        return self.content_sha256[:16]


def versions(repository: Path, model: str) -> list[int]:
    """Published versions of a model, ascending; empty where there are none.

    Raises:
        ServiceUnavailable: the folder cannot be read now.
    """
    folder = repository / model
    try:
        return sorted(
            int(entry.name) for entry in folder.iterdir() if _VERSION.fullmatch(entry.name) and (entry / META).is_file()
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ServiceUnavailable(f"the model repository {folder} cannot be read now: {error.strerror}") from error


def latest(repository: Path, model: str) -> int:
    """The newest version of a model.

    Raises:
        ModelMismatch: there is none.
    """
    found = versions(repository, model)
    if not found:
        raise ModelMismatch(
            f"no {model} in the model repository {repository}; build it with "
            f"`semwatch-train build --repository {repository}` or copy one there"
        )
    return found[-1]


def read_meta(repository: Path, model: str, version: int) -> Meta:
    """Read what travels with a version.

    Raises:
        ModelMismatch: the version is absent, incomplete or from another release.
    """
    path = repository / model / str(version) / META
    try:
        meta = Meta.model_validate_json(_whole(path, MAX_META_BYTES))
        _ = meta.content_sha256  # which a version is known by
    except FileNotFoundError as error:
        raise ModelMismatch(f"{model} version {version} is not in the model repository {repository}") from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ModelMismatch(f"{path} cannot be used: {str(error)[:500]}; publish the version again") from error
    if meta.model != model:
        raise ModelMismatch(f"{path} describes a {meta.model}, not a {model}")
    return meta


def weights_path(repository: Path, model: str, version: int, meta: Meta) -> Path:
    """Path of a version's weights, after checking them against their hash.

    Raises:
        ModelMismatch: the file is absent or not the one that was published.
    """
    path = repository / model / str(version) / WEIGHTS
    try:
        found = file_sha256(path)
    except OSError as error:
        raise ModelMismatch(f"cannot read the weights {path}: {error}") from error
    if found != meta.weights_sha256:
        raise ModelMismatch(f"{path} is not the file that was published (sha256 differs); publish the version again")
    return path


def read_probe(repository: Path, model: str, version: int) -> "tuple[Arrays, Arrays] | None":
    """Inputs and expected outputs of a version, by tensor name; None where it was published without.

    Raises:
        ModelMismatch: the file is damaged.
    """
    path = repository / model / str(version) / PROBE
    if not path.exists():
        return None
    arrays = read_arrays(path)
    inputs = {name.removeprefix("input."): array for name, array in arrays.items() if name.startswith("input.")}
    outputs = {name.removeprefix("output."): array for name, array in arrays.items() if name.startswith("output.")}
    return inputs, outputs


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of an npz file; nothing in it is executed.

    Raises:
        ModelMismatch: the file is absent or damaged.
    """
    try:
        content = _whole(path, MAX_ARRAYS_BYTES)
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error
    return arrays_in(content, path)


def arrays_in(content: bytes, where: object) -> dict[str, NDArray[Any]]:
    """The arrays in the content of an npz file; nothing in it is executed.

    Args:
        content: of the file, read before: numpy leaves a damaged archive open.
        where: what the file is called in messages.

    Raises:
        ModelMismatch: it is damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(info.file_size for info in archive.infolist()) > MAX_ARRAYS_BYTES:
                raise ValueError(f"its arrays have more than {MAX_ARRAYS_BYTES} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zip, zlib and numpy each raise their own on damaged bytes
        raise _unusable(where, error) from error
    odd = sorted(name for name, array in arrays.items() if not isinstance(array, np.ndarray) or not _is_text(array))
    if odd:
        raise ModelMismatch(f"{where} holds what is no array, or no text: {odd[0]!r}; publish the version again")
    return arrays


def _is_text(array: NDArray[Any]) -> bool:
    """Whether an array of text holds characters alone, as numpy does not see to it; any other array does."""
    if array.dtype.kind != "U" or array.nbytes == 0:
        return True
    return int(np.frombuffer(array.tobytes(), array.dtype.byteorder + "u4").max()) <= sys.maxunicode


def _unusable(where: object, error: Exception) -> ModelMismatch:
    return ModelMismatch(
        f"{where} cannot be used: {type(error).__name__}: {str(error)[:500]}; publish the version again"
    )


def _whole(path: Path, max_bytes: int) -> bytes:
    """The content of a file that is not larger than it may be.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger.
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return data


def write_probe(path: Path, inputs: "Arrays", outputs: "Arrays") -> None:
    """Write what ``read_probe`` reads."""
    named = {f"input.{k}": v for k, v in inputs.items()} | {f"output.{k}": v for k, v in outputs.items()}
    with path.open("wb") as file:
        np.savez(file, **named)  # type: ignore[arg-type]  # its stub takes a name for an option


def publish(repository: Path, meta: Meta, weights: Path, *, beside: Mapping[str, Path] = MappingProxyType({})) -> int:
    """Place a new version, whole, by one rename; the weights, and files to go ``beside`` them by name, are copied in.

    Returns:
        The new version number, one above the newest.

    Raises:
        PublishError: the disk refused, or another publisher took the number.
    """
    folder = repository / meta.model
    staging: Path | None = None
    try:
        make_folder(folder)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
        shutil.copyfile(weights, staging / WEIGHTS)
        for name, file in beside.items():
            shutil.copyfile(file, staging / name)
        whole = meta.model_copy(update={"weights_sha256": file_sha256(staging / WEIGHTS)})
        (staging / META).write_text(whole.model_dump_json(indent=1) + "\n")
        staging.chmod(0o755)
        version = _next(folder)
        place_folder(staging, folder / str(version))
    except OSError as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        raise PublishError(f"cannot publish a {meta.model} into {repository}: {error}") from error
    return version


def _next(folder: Path) -> int:
    """One above every number that was ever given: a withdrawn version that was deleted leaves its number behind."""
    numbers = (entry.name.removesuffix(".withdrawn") for entry in folder.iterdir())
    return max((int(number) for number in numbers if _VERSION.fullmatch(number)), default=0) + 1
