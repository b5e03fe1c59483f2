"""The folder that Triton reads: a view of the model repository, which itself is never touched.

    <view>/view.json                        what the view was made for, see ``Settings``
    <view>/<model>/config.pbtxt             generated, see ``config``
    <view>/<model>/<version>/model.onnx     hard link to the published file, a copy on another disk
    <view>/<model>/<version>/model.py       our python backend

Hard links rather than symbolic ones: a container sees what is mounted alone. Only versions that a client asked for
stand here, at most ``MAX_PLACED`` of a model, those placed last.
"""

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from semwatch import model_repository
from semwatch.errors import ConfigError, ModelMismatch
from semwatch.model_repository import WEIGHTS, Meta
from semwatch.triton import config as triton_config

BACKEND = Path(__file__).with_name("backend") / "model.py"
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
    target: Literal["onnx-python"] = "onnx-python"
    threads: int | None = None
    """Processor threads of one network; None: all the machine has."""
    environment: Path | None = None
    """Python environment of the backend; None: the one on the server's ``PATH``."""


class View:
    """A view on disk; several processes may place versions in it."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self._repository = folder, repository

    def prepare(self, settings: Settings) -> None:
        """Make the folder and write down what it is for; versions that stand in it stay.

        Raises:
            ConfigError: the disk refused.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            model_repository.write_whole(self.folder / SETTINGS, settings.model_dump_json().encode())
        except OSError as error:
            raise ConfigError(f"Triton's view {self.folder} cannot be made: {error}") from error

    def placed(self, model: str) -> list[int]:
        """Versions that Triton shall hold, in the order in which they were placed."""
        try:
            found = _POLICY.search((self.folder / model / CONFIG).read_text())
        except FileNotFoundError:
            return []
        return [int(version) for version in found[1].split(",")] if found else []

    def place(self, model: str, version: int) -> None:
        """Let Triton hold this version too, from its next load on.

        Raises:
            ModelMismatch: the version is absent or damaged.
            ConfigError: the disk refused.
        """
        meta = model_repository.read_meta(self._repository, model, version)
        weights = model_repository.weights_path(self._repository, model, version, meta)
        with self._held():
            self._link(weights, self.folder / model / str(version))
            kept = [v for v in self.placed(model) if v != version and self._is_whole(model, v)]
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
                metas, settings.target, threads=settings.threads, environment=settings.environment
            )
            model_repository.write_whole(folder / CONFIG, text.encode())
        for entry in folder.iterdir():
            if entry.is_dir() and not (entry.name.isdigit() and int(entry.name) in versions):
                shutil.rmtree(entry, ignore_errors=True)  # Triton has what it serves in memory

    def _link(self, weights: Path, version: Path) -> None:
        version.parent.mkdir(exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=version.parent))
        try:
            os.link(weights, staging / WEIGHTS)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(weights, staging / WEIGHTS)
        shutil.copyfile(BACKEND, staging / BACKEND.name)
        staging.chmod(0o755)
        shutil.rmtree(version, ignore_errors=True)
        staging.rename(version)

    def _meta(self, model: str, version: int) -> Meta:
        return model_repository.read_meta(self._repository, model, version)

    def _is_whole(self, model: str, version: int) -> bool:
        try:
            self._meta(model, version)
        except ModelMismatch:  # pruned meanwhile
            return False
        return (self.folder / model / str(version) / WEIGHTS).is_file()

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


def beside(repository: Path) -> Path:
    """Where the view of a model repository stands unless told otherwise."""
    repository = repository.absolute()
    return repository.with_name(f"{repository.name}.triton")
