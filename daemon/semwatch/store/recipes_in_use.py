"""Which recipe judges each source now, in ``<state_dir>/recipes.json``: for commands on the same machine.

{SOURCE: {"id": of the recipe in use, "refused": why the file as it is now is not used, or null}}
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from semwatch.system.files import write_whole

RECIPES = "recipes.json"


class InUse(NamedTuple):
    """What a running daemon judges a source by."""

    id: str
    refused: str | None
    """Why the file as it is now is not used; None: it is, or will be within seconds."""


def state(state_dir: Path, recipes: Mapping[str, InUse]) -> None:
    """Write down what is in use by source.

    Raises:
        OSError: the disk refused.
    """
    stated = {source: used._asdict() for source, used in recipes.items()}
    write_whole(state_dir / RECIPES, json.dumps(stated).encode())


def stated(state_dir: Path) -> dict[str, InUse]:
    """What the daemon last said to use, by source; empty where it never ran."""
    try:
        found = json.loads((state_dir / RECIPES).read_bytes())
        return {str(source): InUse(str(used["id"]), used["refused"]) for source, used in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
