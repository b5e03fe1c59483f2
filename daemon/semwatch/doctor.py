"""How a site stands: ``status`` for a glance, ``examine`` for what to fix. Reads only; safe beside a running daemon."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from semwatch import incoming, model_repository, pipeline
from semwatch.config import Folder, Site, load_recipe
from semwatch.errors import SemwatchError
from semwatch.inference import Embedded
from semwatch.ledger import Ledger
from semwatch.model_repository import MODELS
from semwatch.service import LEDGER, connect_publisher

RATE_WINDOW_S = 300


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def status(site: Site) -> dict[str, object]:
    """Waiting files, rate, queue depths, model versions, disk left; None where something cannot be asked."""
    state: dict[str, object] = {
        "models": {
            model: _or_none(partial(model_repository.latest, site.models.repository, model)) for model in MODELS
        },
        "disk_free_mb": round(shutil.disk_usage(_existing(site.results_dir)).free / 1e6),
        "redis": _or_none(lambda: _depths(site)),
    }
    ledger_path = site.state_dir / LEDGER
    if not ledger_path.exists():
        return {"ledger": "none yet: the daemon has not run", **state}
    with Ledger(ledger_path, read_only=True) as ledger:
        waiting = [age for folder in site.folders for age in _waiting_ages(folder, ledger)]
        since = (datetime.now(UTC) - timedelta(seconds=RATE_WINDOW_S)).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "waiting_files": len(waiting),
            "oldest_waiting_s": round(max(waiting, default=0.0)),
            "reviews_per_minute": round(ledger.n_done_since(since) / RATE_WINDOW_S * 60, 1),
            **{state.lower(): n for state, n in ledger.counts().items()},
            "unpublished_records": ledger.n_unpublished(),
            **state,
        }


def examine(site: Site) -> list[Check]:
    """Check everything the daemon needs before it can work, and everything a person can mend."""
    checks = [_folder_check(folder) for folder in site.folders]
    checks += [
        _writable("results folder", site.results_dir),
        _writable("state folder", site.state_dir),
        _disk_check(site),
        _try("recipes", lambda: ", ".join(f"{f.source}: {load_recipe(f.recipe).id}" for f in site.folders)),
        _try("models", lambda: _models(site)),
        _try("gate", lambda: _gates(site)),
    ]
    if site.redis is not None:
        checks.append(_try("Redis", lambda: f"answers; {_depths(site)}"))
    return checks


def _folder_check(folder: Folder) -> Check:
    name = f"drop folder {folder.source}"
    if not folder.path.is_dir():
        return Check(
            name, False, f"{folder.path} is not there", "create it, or mount the share; the daemon waits for it"
        )
    if not os.access(folder.path, os.R_OK | os.X_OK):
        return Check(name, False, f"{folder.path} cannot be read", "give the daemon's user read and search rights")
    return Check(name, True, str(folder.path))


def _writable(name: str, folder: Path) -> Check:
    place = _existing(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        return Check(name, False, f"{place} cannot be written", "give the daemon's user write rights there")
    return Check(name, True, str(folder))


def _disk_check(site: Site) -> Check:
    free_mb = shutil.disk_usage(_existing(site.results_dir)).free / 1e6
    detail = f"{free_mb:.0f} MB free, the line pauses under {site.limits.min_free_mb}"
    return Check("disk", free_mb >= site.limits.min_free_mb, detail, "free some space or lower limits.min_free_mb")


def _models(site: Site) -> str:
    said = []
    for pins in {load_recipe(folder.recipe).pins for folder in site.folders}:
        with Embedded(site.models.repository, pins=pins.model_dump()) as models:
            said.append(", ".join(f"{model} {version}" for model, version in models.versions().items()))
    return "; ".join(said)


def _gates(site: Site) -> str:
    said = []
    for recipe in {folder.recipe: load_recipe(folder.recipe) for folder in site.folders}.values():
        with Embedded(site.models.repository, pins=recipe.pins.model_dump()) as models:
            said.append(f"{recipe.name} opens above {pipeline.gate_threshold(recipe, models):.4f}")
    return "; ".join(said)


def _depths(site: Site) -> str | None:
    publisher = connect_publisher(site)
    if publisher is None:
        return None
    return ", ".join(f"{name} {depth.length}" for name, depth in publisher.depths().items())


def _waiting_ages(folder: Folder, ledger: Ledger) -> list[float]:
    watched = incoming.Folder(**folder.model_dump(exclude={"recipe"}))
    if not folder.path.is_dir():
        return []
    return [
        time.time() - found.st_mtime
        for path, found in incoming.walk(watched, "")
        if not ledger.is_settled(folder.source, path, found.st_size, found.st_mtime_ns)
    ]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _try(name: str, look: Callable[[], object]) -> Check:
    try:
        return Check(name, True, str(look()))
    except SemwatchError as error:
        return Check(name, False, "not usable", str(error))


def _or_none(look: Callable[[], object]) -> object:
    try:
        return look()
    except SemwatchError:
        return None
