"""What learning keeps would grow for ever: settled unknowns and reports leave after their time."""

import shutil
from datetime import datetime, timedelta
from pathlib import Path

from semwatch.classes.clusters import Clusters
from semwatch.settings.site import Learning
from semwatch.system.clock import utc_of
from semwatch_training.learning.archive import Archive

REPORTS = "cycles"
"""Folder of the cycles' reports; a name is the cycle's moment, so names sort by time."""
UNLEARNED = ("proposed", "rejected")


def tidy(folder: Path, archive: Archive, found: Clusters, settings: Learning, *, now_utc: str) -> int:
    """Delete what is older than the settings keep; return how many unknowns left the archive.

    What waits is never deleted, nor crops of a cluster that no head knows: without its crops, what a person has
    rejected would be proposed again. A report that cannot be deleted stays.

    Args:
        folder: what learning keeps.
        archive: open for writing.
        found: the found classes.
        settings: ``keep_days``, ``keep_reports``.
        now_utc: ISO 8601, seconds, Z.

    Raises:
        ConfigError, ServiceUnavailable: the archive cannot be used.
    """
    before = datetime.fromisoformat(now_utc) - timedelta(days=settings.keep_days)
    n_pruned = archive.prune(utc_of(before), keep=_needed(found))
    for report in sorted(_folders(folder / REPORTS))[: -settings.keep_reports]:
        shutil.rmtree(report, ignore_errors=True)
    return n_pruned


def _needed(found: Clusters) -> list[str]:
    """Crops of clusters that no bank holds."""
    return [member for cluster in found.clusters if cluster.state in UNLEARNED for member in cluster.members]


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
