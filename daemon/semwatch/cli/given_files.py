"""Image files that are named on the command line, alone or by their folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from semwatch.intake import folder_rules
from semwatch.settings.site import IMAGE_SUFFIXES
from semwatch.store import results


def image_files(paths: list[Path]) -> dict[str, Path]:
    """Files to review, each once, by the name that its result gets: relative to the folder that holds them all."""
    tops = [path if path.is_dir() else path.parent for path in paths]
    above = os.path.commonpath([os.path.normpath(top.absolute()) for top in tops])
    found = (file for path in paths for file in (sorted(_inside(path)) if path.is_dir() else [path]))
    return {Path(os.path.relpath(file, above)).as_posix(): file for file in found}


def _inside(folder: Path) -> Iterator[Path]:
    """Image files below a folder; what writers have not finished and overlays of earlier reviews are none."""
    for file in folder.rglob("*"):
        if file.suffix.lower() not in IMAGE_SUFFIXES or file.name.endswith(results.OVERLAY):
            continue
        if file.is_file() and not any(map(folder_rules.is_temporary, file.relative_to(folder).parts)):
            yield file
