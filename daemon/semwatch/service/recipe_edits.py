"""Recipes that are edited while the daemon runs: noticed, checked, then used from the next image on, or refused loudly.

A file counts once it has been the same for two looks, so one that an editor is still writing is not refused. What is
refused leaves the recipe in use as it is, and is looked at again when the file changes.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from semwatch.errors import ConfigError, SemwatchError
from semwatch.line import pipeline
from semwatch.service.models_in_service import ModelsInService
from semwatch.settings.recipe import Recipe, load_recipe
from semwatch.settings.site import Folder, check_outbox
from semwatch.store import recipes_in_use
from semwatch.store.ledger import Ledger
from semwatch.store.recipes_in_use import InUse
from semwatch.system.clock import utc_now
from semwatch.system.journal import about

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0

_Stamp = tuple[int, int, int] | None


class RecipeEdits:
    """What has become of the recipe files; for the one thread of the loop.

    Args:
        folders: of the site; each names a recipe file.
        recipes: in use, by source; ``use`` puts new ones in.
        models: that must fit them.
        ledger: takes an audit line for each that is used.
        state_dir: where commands read what is in use.
    """

    def __init__(
        self,
        folders: Sequence[Folder],
        recipes: dict[str, Recipe],
        models: ModelsInService,
        ledger: Ledger,
        state_dir: Path,
    ) -> None:
        self._folders, self._recipes, self._models, self._ledger = folders, recipes, models, ledger
        files = self._files = {folder.source: folder.recipe for folder in folders}
        self._state_dir = state_dir
        self._checked = {source: _stamp(file) for source, file in files.items()}
        self._seen = dict(self._checked)
        self._refused: dict[str, str] = {}
        self._new: dict[str, Recipe] = {}
        self._next = 0.0
        self._is_stated = False

    def look(self) -> bool:
        """Look at the files now and then; True where a new recipe waits to be used."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LOOK_EVERY_S
            for source, file in self._files.items():
                before, self._seen[source] = self._seen[source], _stamp(file)
                if self._seen[source] == before != self._checked[source]:
                    self._checked[source] = before
                    self._check(source, file)
            self._say()
        return bool(self._new)

    def use(self) -> None:
        """Judge by the new recipes from now on; no image may be under review.

        Raises:
            ServiceUnavailable: the ledger's disk is away; nothing has changed.
        """
        for source, recipe in list(self._new.items()):
            before = self._recipes[source]
            audit = {"event": "recipe", "utc": utc_now(), "source": source, "recipe": recipe.name}
            self._ledger.note(audit={**audit, "recipe_id": recipe.id, "before": before.id})
            self._recipes[source] = self._new.pop(source)
            extra = about("recipe", source, recipe=recipe.name, recipe_id=recipe.id)
            log.warning("%s is judged by recipe %s now, id %s", source, recipe.name, recipe.id, extra=extra)
        self._is_stated = False
        self._say()

    def _check(self, source: str, file: Path) -> None:
        self._refused.pop(source, None)
        self._new.pop(source, None)
        self._is_stated = False
        now = self._recipes[source]
        try:
            recipe = load_recipe(file)
            check_outbox(self._folders, recipe.klarf.outbox, file)
            if recipe.pins != now.pins:
                raise ConfigError(f"{file}: other models are pinned, which takes a restart of the daemon")
            pipeline.gate_threshold(recipe, self._models.of(recipe))
        except SemwatchError as error:
            self._refused[source] = str(error)
            extra = about("recipe refused", source, recipe=now.name, recipe_id=now.id)
            log.error("the edited recipe of %s is not used, %s goes on: %s", source, now.id, error, extra=extra)
            return
        if recipe != now:
            self._new[source] = recipe

    def _say(self) -> None:
        if self._is_stated:
            return
        used = {source: InUse(recipe.id, self._refused.get(source)) for source, recipe in self._recipes.items()}
        try:
            recipes_in_use.state(self._state_dir, used)
            self._is_stated = True
        except OSError:
            self._is_stated = False  # again at the next look


def _stamp(file: Path) -> _Stamp:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
