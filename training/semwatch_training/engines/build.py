"""Published ONNX networks to TensorRT plans for a fleet of GPUs: converted, proven, compiled, placed whole.

What comes out, and where, see ``semwatch.triton.plans``.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, cast

import onnx
import torch
from onnx import ModelProto

from semwatch.errors import ConfigError, PublishError
from semwatch.models import choice, model_repository
from semwatch.models.model_repository import MODELS, Meta
from semwatch.system.clock import utc_now
from semwatch.system.files import place_folder, rename, write_whole
from semwatch.triton.plans import (
    LOG,
    MANIFEST,
    ONNX,
    PLAN,
    TIMING_CACHE,
    Difference,
    EngineTarget,
    Manifest,
    Precision,
    batches_of,
)
from semwatch_training.engines import onnx_precision, parity, tensorrt_compiler
from semwatch_training.engines.manifest import up_to_date
from semwatch_training.engines.parity import Batched
from semwatch_training.engines.tensorrt_compiler import TOOLKITS, compile_plan, load_toolkit
from semwatch_training.publishing.export import random_inputs
from semwatch_training.system.defaults import ENGINE_IMAGES
from semwatch_training.system.progress_bars import Progress

CONVERTER = 2
"""Raised when a conversion changes, so that old plans are compiled again."""
TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 1e-1}
"""Largest difference to fp32 that a converted network may show, relative to the output's largest value."""
N_NOISE = 2


class Made(NamedTuple):
    """One engine, and whether it was made just now."""

    manifest: Manifest
    is_new: bool


def export(
    repository: Path,
    out: Path,
    *,
    target: str,
    precision: str = "fp16",
    capabilities: Sequence[int] = (),
    models: Sequence[str] = MODELS,
    images: Path | None = None,
    n_images: int = ENGINE_IMAGES,
    progress: Progress,
) -> Iterator[Made]:
    """Convert, prove and compile the versions that serve; what is up to date is left alone.

    Everything that can be refused before the first compilation is.

    Args:
        repository: with detector and encoder; a head too unless ``models`` leaves it out.
        out: folder of all engines.
        target: what to make.
        precision: of the products; norms, sums and roots stay fp32.
        capabilities: of the fleet's GPUs, such as 89; none for ONNX.
        models: which to make.
        images: folder to prove conversions on; a synthetic lot without it.
        n_images: how many of them.
        progress: called before each engine.

    Raises:
        ConfigError: the target, precision or GPU is not possible, the message says what is.
        ModelMismatch: the repository has no such model, or a damaged one.
        PublishError: a converted network is too far from its original, or TensorRT refused it.
    """
    kind, chosen = check_order(target, precision, capabilities, models)
    toolkit = None if target == "onnx" else load_toolkit(target, capabilities)
    wanted = [
        _wanted(repository, model, kind, chosen, capability, toolkit)
        for model in MODELS
        if model in models
        for capability in (capabilities or (None,))
    ]
    for manifest in wanted:
        _check_exact(repository, manifest)
    inputs: dict[str, Batched] = {}
    ready: dict[str, _Prepared] = {}
    for k, manifest in enumerate(wanted):
        model = manifest.model
        progress(f"{model} {manifest.version} {manifest.folder.name}", k, len(wanted))
        if (kept := up_to_date(out, manifest)) is not None:
            yield Made(kept, False)
            continue
        inputs = inputs or _inputs(repository, images, n_images)
        if model not in ready:
            ready = {model: _prepare(repository, manifest, inputs[model])}
        yield Made(_make(out, manifest, ready[model], toolkit, inputs[model]), True)
    progress(f"{wanted[-1].model} done", len(wanted), len(wanted))


def check_order(target: str, precision: str, capabilities: Sequence[int], models: Sequence[str]) -> (
    tuple[EngineTarget, Precision]
):  # fmt: skip
    """Return target and precision, if all of it is possible.

    Raises:
        ConfigError: it is not; the message says what is.
    """
    if target not in ("onnx", *TOOLKITS):
        raise ConfigError(f"no target {target!r}; there are onnx, {', '.join(TOOLKITS)}")
    if precision in ("int8", "fp8"):
        raise ConfigError(
            f"{precision} needs a calibration set and a measured loss of accuracy; this release has neither, so it is "
            f"refused rather than guessed. Use --precision fp16"
        )
    if precision not in TOLERANCE:
        raise ConfigError(f"no precision {precision!r}; there are {', '.join(TOLERANCE)}")
    if not models:
        raise ConfigError(f"name a model; there are {', '.join(MODELS)}")
    if unknown := sorted(set(models) - set(MODELS)):
        raise ConfigError(f"no model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    if target == "onnx":
        if capabilities:
            raise ConfigError("an ONNX file belongs to no GPU; leave --compute-capability out")
        return cast(EngineTarget, target), cast(Precision, precision)
    if not capabilities:
        raise ConfigError("a plan belongs to one kind of GPU; name them, such as --compute-capability 86,89,120")
    for capability in capabilities:
        tensorrt_compiler.check_gpu(TOOLKITS[target], precision, capability)
    return cast(EngineTarget, target), cast(Precision, precision)


def convert(source: ModelProto, precision: Precision) -> tuple[ModelProto, dict[str, ModelProto]]:
    """The network that is compiled, and by the way of judging it the networks that it is judged by.

    ONNX Runtime on the processor has no kernels for bf16: there, rounding alone is judged.
    """
    floats = onnx_precision.float_inputs(source)
    if precision == "fp32":
        return floats, {"onnxruntime": floats}
    lowered = onnx_precision.lower(floats, precision)
    judged = {"rounded": onnx_precision.lower(floats, precision, emulate=True)}
    return lowered, {"onnxruntime": lowered, **judged} if precision == "fp16" else judged


def check_parity(model: str, precision: Precision, found: Sequence[Difference]) -> None:
    """Refuse a conversion that moved an output too far.

    Raises:
        PublishError: it did.
    """
    rows = [(off, name, row) for row in found for name, off in row.relative.items()]
    too_far = [each for each in rows if not each[0] <= TOLERANCE[precision]]  # so that a NaN is too far
    if too_far:
        worst, output, row = max(too_far, key=lambda each: each[0])
        raise PublishError(
            f"the {model} in {precision} is refused: its {output} is off by {worst:.1e} of the largest value on "
            f"{row.samples} {row.inputs} ({row.way}), {TOLERANCE[precision]:.0e} allowed; use a finer precision"
        )


def sha256(content: bytes) -> str:
    """Content hash, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _wanted(
    repository: Path,
    model: str,
    target: EngineTarget,
    precision: Precision,
    capability: int | None,
    toolkit: ModuleType | None,
) -> Manifest:
    version = choice.choice(repository, model)
    meta = model_repository.read_meta(repository, model, version)
    return Manifest(
        model=meta.model,
        version=version,
        target=target,
        precision=precision,
        compute_capability=capability,
        toolkit_version=onnx.__version__ if toolkit is None else str(toolkit.__version__),
        converter=CONVERTER,
        source_sha256=meta.weights_sha256,
        batches=batches_of(meta),
        tolerance=TOLERANCE[precision],
    )


def _check_exact(repository: Path, wanted: Manifest) -> None:
    """Refuse a GPU for which the package compiles no fp32 products where the network asks for some.

    Raises:
        ConfigError: it does.
    """
    kit = TOOLKITS.get(wanted.target)
    if kit is None or wanted.compute_capability is None or wanted.compute_capability >= kit.fp32_since:
        return
    meta = model_repository.read_meta(repository, wanted.model, wanted.version)
    source = onnx.load(model_repository.weights_path(repository, wanted.model, wanted.version, meta))
    if onnx_precision.has_exact_products(source):
        raise ConfigError(
            f"the {wanted.model} computes statistics in fp32, and {kit.module} compiles no fp32 matrix products for "
            f"SM{wanted.compute_capability}; leave that GPU out and serve there with --target onnx-python, or with "
            f"plans of --target tensorrt"
        )


class _Prepared(NamedTuple):
    """A model that is ready to be compiled for any GPU."""

    meta: Meta
    source: ModelProto
    network: bytes
    parity: tuple[Difference, ...]


def _prepare(repository: Path, wanted: Manifest, inputs: Batched) -> _Prepared:
    """Convert a model and prove the conversion."""
    meta = model_repository.read_meta(repository, wanted.model, wanted.version)
    source = onnx.load(model_repository.weights_path(repository, wanted.model, wanted.version, meta))
    network, judged = convert(source, wanted.precision)
    noise = random_inputs(meta, batch=N_NOISE, seed=0)
    found = parity.judge(source, judged, {"noise": [noise], "images": inputs})
    check_parity(wanted.model, wanted.precision, found)
    return _Prepared(meta, source, network.SerializeToString(), tuple(found))


def _make(out: Path, wanted: Manifest, ready: _Prepared, toolkit: ModuleType | None, inputs: Batched) -> Manifest:
    folder = out / wanted.folder
    files = {ONNX: ready.network}
    done: dict[str, object] = {"created_utc": utc_now(), "onnx_sha256": sha256(ready.network), "parity": ready.parity}
    if toolkit is not None and wanted.compute_capability is not None:
        kit, old = TOOLKITS[wanted.target], folder / TIMING_CACHE
        timings = old.read_bytes() if kit.keeps_timings and old.is_file() else b""
        made = compile_plan(
            toolkit, kit, ready.network, wanted.compute_capability, wanted.batches, timings=timings
        )  # fmt: skip
        done |= {"plan_sha256": sha256(made.plan), "plan_bytes": len(made.plan), "seconds": round(made.seconds, 2)}
        files |= {PLAN: made.plan, LOG: "".join(f"{line}\n" for line in made.log).encode()}
        files |= {TIMING_CACHE: made.timings} if made.timings else {}
        ran, gpu_note = _on_gpu(toolkit, wanted, made.plan, ready, inputs)
        done |= {"gpu": gpu_note, "parity": (*ready.parity, *ran)}
    manifest = wanted.model_copy(update=done)
    _place(folder, files | {MANIFEST: (manifest.model_dump_json(indent=1) + "\n").encode()})
    return manifest


def _on_gpu(
    toolkit: ModuleType, wanted: Manifest, plan: bytes, ready: _Prepared, inputs: Batched
) -> tuple[list[Difference], str]:
    """Run a plan against its fp32 network where its GPU is at hand; else say why not."""
    here = tensorrt_compiler.gpu()
    if here != wanted.compute_capability:
        found = "no GPU" if here is None else f"a GPU of SM{here}"
        return [], f"skipped: this machine has {found}, the plan is for SM{wanted.compute_capability}"
    ran = parity.gpu_difference(toolkit, plan, ready.meta, ready.source, inputs)
    check_parity(wanted.model, wanted.precision, [ran])
    return [ran], str(torch.cuda.get_device_name())


def _place(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder whole; one that is there already makes way."""
    staging: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder.parent))
        for name, content in contents.items():
            write_whole(staging / name, content)
        staging.chmod(0o755)
        if folder.exists():
            rename(folder, before := staging.with_name(f"{staging.name}-before"))
            place_folder(staging, folder)
            shutil.rmtree(before)
        else:
            place_folder(staging, folder)
    except OSError as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        raise PublishError(f"cannot write the engine {folder}: {error}") from error


def _inputs(repository: Path, images: Path | None, n: int) -> dict[str, Batched]:
    """What each model is fed with when the line reviews images."""
    versions = {model: choice.choice(repository, model) for model in ("detector", "encoder")}
    return parity.looked_at(repository, versions, parity.read_pages(images, n))
