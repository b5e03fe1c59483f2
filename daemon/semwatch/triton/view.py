"""The folder that Triton reads: a view of the model repository, which itself is never touched.

    <view>/view.json                        what the view was made for, see ``Settings``
    <view>/<model>/config.pbtxt             generated, see ``config``
    <view>/<model>/<version>/model.onnx     hard link to the published file, a copy on another disk
    <view>/<model>/<version>/model_sm89.plan    TensorRT targets: the same of each plan compiled from it, see ``plans``
    <view>/<model>/<version>/model.py       our python backend, and
    <view>/<model>/<version>/semwatch_network.py    what it runs

Hard links rather than symbolic ones: a container sees what is mounted alone. Only versions that a client asked for
stand here, at most ``MAX_PLACED`` of a model, those placed last.
"""

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from semwatch.errors import ConfigError, ModelMismatch
from semwatch.models import choice, model_repository
from semwatch.models.model_repository import MODELS, WEIGHTS, Meta
from semwatch.system import files
from semwatch.triton import config as triton_config
from semwatch.triton import plans as triton_plans
from semwatch.triton.config import Target
from semwatch.triton.plans import Plan, Precision

_FILES = Path(__file__).with_name("backend")
BACKEND = _FILES / "model.py"
_NETWORKS: Mapping[Target, Path] = MappingProxyType(
    {"onnx-python": _FILES / "onnx_network.py", "tensorrt-rtx": _FILES / "plan_network.py"}
)
"""What our python backend runs; Triton's own TensorRT backend needs neither."""
SETTINGS, CONFIG, LOCK = "view.json", "config.pbtxt", ".lock"
MAX_PLACED = 3
"""Versions of one model that are held in memory together: the new one, the one before, one that a recipe pins."""
LOCK_TIMEOUT_S = 10.0
_POLL_S = 0.02
_POLICY = re.compile(r"version_policy \{ specific \{ versions: \[ ([\d, ]+) \] \} \}")


class Settings(BaseModel):
    """What a view was made for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    target: Target = "onnx-python"
    """What runs detector and encoder. The head runs in ONNX Runtime always: it is a few thousand products, and each
    cycle of learning brings a new one that nobody has compiled."""
    engines: Path | None = None
    """Folder that `semwatch-train export` wrote; the TensorRT targets need one."""
    precision: Precision = "fp16"
    """Of the plans that are taken."""
    threads: int | None = None
    """Processor threads of one network; None: all the machine has."""
    environment: Path | None = None
    """Python environment of the backend; None: the one on the server's ``PATH``."""

    @model_validator(mode="after")
    def _plans_lie_somewhere(self) -> Self:
        if self.target != "onnx-python" and self.engines is None:
            raise ValueError(f"the target {self.target} needs the folder of its plans; name it with --engines")
        return self

    def target_of(self, model: str) -> Target:
        """What runs a model."""
        return "onnx-python" if model == "head" else self.target


class View:
    """A view on disk; several processes may place versions in it."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self._repository = folder, repository

    def prepare(self, settings: Settings) -> None:
        """Make the folder and write down what it is for; versions that stand in it stay if the same shall run them.

        Raises:
            ConfigError: the disk refused.
        """
        if settings.engines is not None:  # other processes read this from other working directories
            settings = settings.model_copy(update={"engines": settings.engines.absolute()})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._runs_the_same(settings):
                for config in self.folder.glob(f"*/{CONFIG}"):
                    config.unlink()
            files.write_whole(self.folder / SETTINGS, settings.model_dump_json().encode())
        except OSError as error:
            raise ConfigError(f"Triton's view {self.folder} cannot be made: {error}") from error

    def fill(self, settings: Settings) -> dict[str, str]:
        """Prepare, and place the version of each model that serves; returns why by model where one cannot be placed.

        Raises:
            ConfigError: the disk refused.
        """
        self.prepare(settings)
        refused = {}
        for model in MODELS:
            try:
                self.place(model, choice.choice(self._repository, model))
            except ModelMismatch as error:
                refused[model] = str(error)
        return refused

    def placed(self, model: str) -> list[int]:
        """Versions that Triton shall hold, in the order in which they were placed."""
        try:
            found = _POLICY.search((self.folder / model / CONFIG).read_text())
        except FileNotFoundError:
            return []
        return [int(version) for version in found[1].split(",")] if found else []

    def place(self, model: str, version: int) -> None:
        """Let Triton hold this version too, from its next load on; versions with another signature leave.

        Raises:
            ModelMismatch: the version is absent or damaged, or has no plan that was compiled from it.
            ConfigError: the disk refused.
        """
        meta = model_repository.read_meta(self._repository, model, version)
        weights = model_repository.weights_path(self._repository, model, version, meta)
        plans = self._plans(meta, version)
        with self._held():
            self._link(weights, plans, self.folder / model / str(version))
            kept = [v for v in self.placed(model) if v != version and self._is_whole(model, v)]
            kept = [v for v in kept if triton_config.may_share(self._meta(model, v), meta)]
            self._configure(model, [*kept, version][-MAX_PLACED:])

    def remove(self, model: str, version: int) -> None:
        """Let Triton forget this version from its next load on.

        Raises:
            ConfigError: the disk refused.
        """
        with self._held():
            self._configure(model, [v for v in self.placed(model) if v != version and self._is_whole(model, v)])

    def _configure(self, model: str, versions: list[int]) -> None:
        folder = self.folder / model
        if not versions:
            (folder / CONFIG).unlink(missing_ok=True)
        else:
            metas = {version: self._meta(model, version) for version in versions}
            settings = self._settings()
            text = triton_config.config_pbtxt(
                metas, settings.target_of(model), threads=settings.threads, environment=settings.environment,
                plans={version: self._plans(meta, version) for version, meta in metas.items()},
            )  # fmt: skip
            files.write_whole(folder / CONFIG, text.encode())
        for entry in folder.iterdir():
            if entry.is_dir() and not (entry.name.isdigit() and int(entry.name) in versions):
                shutil.rmtree(entry, ignore_errors=True)  # Triton has what it serves in memory

    def _link(self, weights: Path, plans: Mapping[str, Plan], version: Path) -> None:
        version.parent.mkdir(exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=version.parent))
        for source, name in [(weights, WEIGHTS), *((plan.path, plan.file_name) for plan in plans.values())]:
            try:
                os.link(source, staging / name)
            except OSError:  # another disk, or one without hard links
                shutil.copyfile(source, staging / name)
        if damaged := [plan for plan in plans.values() if not _is_placed(plan, staging)]:
            raise ModelMismatch(f"{damaged[0].path} is not what its manifest says (sha256 differs); export it again")
        if network := _NETWORKS.get(self._settings().target_of(version.parent.name)):
            shutil.copyfile(BACKEND, staging / "model.py")
            shutil.copyfile(network, staging / "semwatch_network.py")
        staging.chmod(0o775)  # the server may be another user of the view's group
        shutil.rmtree(version, ignore_errors=True)
        files.place_folder(staging, version)

    def _plans(self, meta: Meta, version: int) -> Mapping[str, Plan]:
        settings = self._settings()
        target = settings.target_of(meta.model)
        if target == "onnx-python" or settings.engines is None:
            return {}
        return triton_plans.plans_of(settings.engines, meta, version, target, settings.precision)

    def _meta(self, model: str, version: int) -> Meta:
        return model_repository.read_meta(self._repository, model, version)

    def _is_whole(self, model: str, version: int) -> bool:
        try:
            plans = self._plans(self._meta(model, version), version)
        except ModelMismatch:  # pruned meanwhile, or without plans
            return False
        folder = self.folder / model / str(version)
        return (folder / WEIGHTS).is_file() and all(_is_placed(plan, folder) for plan in plans.values())

    def _runs_the_same(self, wanted: Settings) -> bool:
        try:
            before = self._settings()
        except ConfigError:  # none yet, or another release's
            return False
        return (before.target, before.engines, before.precision) == (wanted.target, wanted.engines, wanted.precision)

    def _settings(self) -> Settings:
        path = self.folder / SETTINGS
        try:
            return Settings.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(f"{path} cannot be used: {error}; `semwatch triton up` writes it anew") from error

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Change the view alone; what the disk refuses is said as a ``ConfigError``."""
        try:
            with (self.folder / LOCK).open("ab") as lock:
                self._take(lock.fileno())
                yield
        except OSError as error:
            raise ConfigError(f"Triton's view {self.folder} cannot be changed: {error}") from error

    def _take(self, descriptor: int) -> None:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)


def _is_placed(plan: Plan, folder: Path) -> bool:
    """Whether this very plan lies in a version's folder of the view: one that was compiled anew is another."""
    placed = folder / plan.file_name
    return placed.is_file() and files.file_sha256(placed) == plan.manifest.plan_sha256


def beside(repository: Path) -> Path:
    """Where the view of a model repository stands by default."""
    repository = repository.absolute()
    return repository.with_name(f"{repository.name}.triton")
