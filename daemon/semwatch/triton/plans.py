"""TensorRT plans on disk: one folder for each, with a manifest that says what it is.

    <engines>/<model>/<version>/<target>-<precision>-sm<capability>/model.plan     ``onnx-<precision>/`` has none
                                                                    model.onnx     what the plan was compiled from
                                                                    manifest.json  see ``Manifest``
                                                                    build.log      what TensorRT said
                                                                    timing.cache   full TensorRT only

`semwatch-train export` writes them; a folder appears by one rename, complete. A plan belongs to one compute capability
and one TensorRT release, and to the weights that it was compiled from: it is found by their hash, not by a version's
number. TensorRT seldom gives the same bytes twice: equal plan hashes are one build, equal ONNX hashes compute the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from semwatch.errors import ConfigError, ModelMismatch
from semwatch.models.model_repository import Meta
from semwatch.system.files import file_sha256

EngineTarget = Literal["onnx", "tensorrt", "tensorrt-rtx"]
Precision = Literal["fp32", "fp16", "bf16"]

PLAN, ONNX, MANIFEST, LOG, TIMING_CACHE = "model.plan", "model.onnx", "manifest.json", "build.log", "timing.cache"


class Batches(NamedTuple):
    """Batch sizes that a plan takes, and the one that it is tuned for."""

    smallest: int = 1
    tuned: int = 4
    largest: int = 16


OPEN_BATCHES = Batches(tuned=1, largest=4)
"""Of a model that takes fields at any size: they come one by one, and memory is kept for the largest batch."""


def batches_of(meta: Meta) -> Batches:
    """Batch sizes of the plans of a version."""
    return OPEN_BATCHES if meta.is_open else Batches()


class Difference(BaseModel):
    """Worst difference by output, relative to the output's largest value, over some inputs, judged in one way."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: Literal["noise", "images"]
    way: Literal["onnxruntime", "rounded", "gpu"]
    samples: int
    relative: Mapping[str, float]


class Manifest(BaseModel):
    """What an engine is, and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: Literal["detector", "encoder", "head"]
    version: int
    target: EngineTarget
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


class Plan(NamedTuple):
    """A plan that fits a published version."""

    path: Path
    manifest: Manifest

    @property
    def capability(self) -> str:
        """Compute capability of its GPU as Triton writes it, such as "8.9"."""
        whole, tenth = divmod(self.manifest.compute_capability or 0, 10)
        return f"{whole}.{tenth}"

    @property
    def file_name(self) -> str:
        """Its name beside ``model.onnx`` in Triton's view, where plans for several GPUs lie together."""
        return f"model_sm{self.manifest.compute_capability}.plan"


def read(folder: Path) -> Manifest:
    """Read an engine's manifest, after checking the files beside it against their hashes.

    Raises:
        ConfigError: the manifest or a file is absent, damaged, or not what it says.
    """
    manifest, path = read_manifest(folder), folder / MANIFEST
    hashes = {ONNX: manifest.onnx_sha256, **({PLAN: manifest.plan_sha256} if manifest.plan_sha256 else {})}
    try:
        changed = [name for name, sha256 in hashes.items() if file_sha256(folder / name) != sha256]
    except OSError as error:
        raise ConfigError(f"{path} cannot be used: {error}; export the engine again") from error
    if changed or (manifest.target != "onnx") != bool(manifest.plan_sha256):
        raise ConfigError(f"{path} describes other files than lie beside it ({', '.join(changed)}); export it again")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read an engine's manifest alone.

    Raises:
        ConfigError: it is absent or damaged.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{path} cannot be used: {error}; export the engine again") from error


def engines(out: Path) -> list[Manifest]:
    """All engines below a folder, by model, version and GPU.

    Raises:
        ConfigError: one of them is damaged.
    """
    return [read(path.parent) for path in sorted(out.glob(f"*/*/[!.]*/{MANIFEST}"))]


def plans_of(out: Path, meta: Meta, version: int, target: EngineTarget, precision: Precision) -> dict[str, Plan]:
    """The plans that were compiled from a version's weights, by compute capability such as "8.9"; at least one.

    A version published again with the same weights takes the plans of the first. Contents are not checked here.

    Raises:
        ModelMismatch: there is none, or those of this version were compiled from other weights, or a manifest is
            damaged.
    """
    found: dict[str, Plan] = {}
    foreign: list[Manifest] = []
    own = str(version)
    # Its own folder last: of plans with the same source, those made for this very number go before.
    for folder in sorted(out.glob(f"{meta.model}/[0-9]*/{target}-{precision}-sm*"), key=lambda f: f.parent.name == own):
        try:
            manifest = read_manifest(folder)
        except ConfigError as error:
            raise ModelMismatch(str(error)) from error
        if manifest.source_sha256 == meta.weights_sha256:
            plan = Plan(folder / PLAN, manifest)
            found[plan.capability] = plan
        elif folder.parent.name == own:
            foreign.append(manifest)
    if not found:
        raise ModelMismatch(_none_fits(out, meta, version, target, precision, foreign))
    return found


def _none_fits(
    out: Path, meta: Meta, version: int, target: str, precision: str, foreign: list[Manifest]
) -> str:  # fmt: skip
    mend = (
        f"compile them with `semwatch-train export --out {out} --target {target} --precision {precision} "
        f"--compute-capability ...`"
    )
    if foreign:
        return (
            f"the {target} plans for {meta.model} {version} in {out} were compiled from other weights (sha256 "
            f"{foreign[0].source_sha256[:12]}) than this version has ({meta.weights_sha256[:12]}); {mend}"
        )
    return f"there are no {precision} {target} plans for {meta.model} {version} in {out}; {mend}"
