"""Engines on disk: one folder for each, with a manifest that says what it is.

    <out>/<model>/<version>/<target>-<precision>-sm<capability>/model.plan     ``onnx-<precision>/`` has none
                                                                model.onnx     what the plan was compiled from
                                                                manifest.json  see ``Manifest``
                                                                build.log      what TensorRT said
                                                                timing.cache   full TensorRT only

A folder appears by one rename, complete. A plan belongs to one compute capability and one TensorRT release. TensorRT
seldom gives the same bytes twice: equal plan hashes are one build, equal ONNX hashes compute the same.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from semwatch.errors import ConfigError
from semwatch.model_repository import file_sha256
from semwatch_training.engine_parity import Difference
from semwatch_training.tensorrt_compiler import Batches

Target = Literal["onnx", "tensorrt", "tensorrt-rtx"]
Precision = Literal["fp32", "fp16", "bf16"]

PLAN, ONNX, MANIFEST, LOG, TIMING_CACHE = "model.plan", "model.onnx", "manifest.json", "build.log", "timing.cache"


class Manifest(BaseModel):
    """What an engine is, and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: Literal["detector", "encoder", "head"]
    version: int
    target: Target
    precision: Precision
    compute_capability: int | None
    """Of the GPU, such as 89; None for ONNX."""
    toolkit_version: str
    """Of TensorRT, or of onnx for ONNX."""
    converter: int
    source_sha256: str
    """Of the published model.onnx."""
    batches: Batches
    onnx_sha256: str = ""
    plan_sha256: str = ""
    plan_bytes: int = 0
    seconds: float = 0.0
    """Compilation alone, conversion and its proof left out."""
    created_utc: str = ""
    tolerance: float
    parity: tuple[Difference, ...] = ()
    gpu: str = ""
    """Name of the GPU on which the plan was run against ONNX, or why it was not."""

    @property
    def engine_id(self) -> str:
        """Short content hash: tells the builds of a fleet apart."""
        return (self.plan_sha256 or self.onnx_sha256)[:12]

    @property
    def folder(self) -> Path:
        """Where it lies below the folder of all engines."""
        gpu = "" if self.compute_capability is None else f"-sm{self.compute_capability}"
        return Path(self.model, str(self.version), f"{self.target}-{self.precision}{gpu}")

    def same_making(self, other: "Manifest") -> bool:
        """Whether both say the same of what goes in; what came out may differ."""
        outcome = {"onnx_sha256", "plan_sha256", "plan_bytes", "seconds", "created_utc", "parity", "gpu"}
        return self.model_dump(exclude=outcome) == other.model_dump(exclude=outcome)


def up_to_date(out: Path, wanted: Manifest) -> Manifest | None:
    """The engine's manifest if it is there, whole, and made from the same; else None."""
    folder = out / wanted.folder
    try:
        kept = read(folder)
    except ConfigError:
        return None
    return kept if kept.same_making(wanted) else None


def read(folder: Path) -> Manifest:
    """Read an engine's manifest, after checking the files beside it against their hashes.

    Raises:
        ConfigError: the manifest or a file is absent, damaged, or not what it says.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
        hashes = {ONNX: manifest.onnx_sha256, **({PLAN: manifest.plan_sha256} if manifest.plan_sha256 else {})}
        changed = [name for name, sha256 in hashes.items() if file_sha256(folder / name) != sha256]
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{path} cannot be used: {error}; export the engine again") from error
    if changed or (manifest.target != "onnx") != bool(manifest.plan_sha256):
        raise ConfigError(f"{path} describes other files than lie beside it ({', '.join(changed)}); export it again")
    return manifest


def engines(out: Path) -> list[Manifest]:
    """All engines below a folder, by model, version and GPU.

    Raises:
        ConfigError: one of them is damaged.
    """
    return [read(path.parent) for path in sorted(out.glob(f"*/*/[!.]*/{MANIFEST}"))]
