"""A first site: its settings, its recipe and its folders, checked before they are kept."""

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import yaml

from semwatch.errors import ConfigError
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import Site, load_site
from semwatch.system import files

SITE, RECIPE = "site.yaml", "recipe.yaml"


@dataclass(frozen=True, slots=True)
class Answers:
    """What has to be known; relative paths start at the folder of the site."""

    name: str
    drop: str
    source: str
    models: str
    results: str
    state: str
    recipe: str
    redis: str
    """Address; empty: none."""


def proposed(folder: Path) -> Answers:
    """What is taken where nothing else is said."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname()).strip("-.")[:64] or "site-1"
    models = next(
        (str(found.resolve()) for found in (folder / "model_repository", Path("model_repository")) if found.is_dir()),
        "model_repository",
    )
    return Answers(host, "drop", "sem-1", models, "results", "state", "layer-1", "")


def refuse_what_is_there(folder: Path) -> None:
    """Refuse a folder that has a site already.

    Raises:
        ConfigError: it has.
    """
    there = [str(folder / name) for name in (SITE, RECIPE) if os.path.lexists(folder / name)]
    if there:
        are = "are" if len(there) > 1 else "is"
        raise ConfigError(f"{' and '.join(there)} {are} there already, and left alone: edit, or give another folder")


def make(folder: Path, answers: Answers) -> Site:
    """Write recipe and settings, make the folders, and return the site; nothing is left where it is refused.

    Raises:
        ConfigError: there is one already, an answer cannot be used, or a folder cannot be made.
    """
    refuse_what_is_there(folder)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in ((RECIPE, _recipe_text(answers)), (SITE, _site_text(answers))):
            written.append(folder / name)
            files.write_whole(folder / name, text.encode())
        site = load_site(folder / SITE)
        load_recipe(folder / RECIPE)
        for path in (*(one.path for one in site.folders), site.results_dir, site.state_dir):
            path.mkdir(parents=True, exist_ok=True)
    except (ConfigError, OSError) as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{error.filename} cannot be made: {error.strerror}") from error
    return site


def _site_text(answers: Answers) -> str:
    redis = "#redis:\n  #url: redis://127.0.0.1:6379/0\n"
    if answers.redis:
        redis = f"redis:\n  url: {_scalar(answers.redis)}\n"
    return f"""# Site settings of semwatch, made by `semwatch init`. Every key: docs/settings.md.
# A relative path starts at the folder of this file.

name: {_scalar(answers.name)}

folders:
  - path: {_scalar(answers.drop)}   # where the tool drops its images; it is only read
    source: {_scalar(answers.source)}   # the tool's name
    recipe: {RECIPE}
    #completeness: steady   # how a file shows that it is whole: steady, rename or marker
    #polling: false         # true on SMB, NFS and SSHFS shares

results_dir: {_scalar(answers.results)}
state_dir: {_scalar(answers.state)}   # on a local disk

models:
  repository: {_scalar(answers.models)}

# Redis takes the records, and unknown defects are learned from there.
{redis}
# Prometheus reads at http://127.0.0.1:9464/metrics.
#metrics: {{}}
"""


def _recipe_text(answers: Answers) -> str:
    return f"""# Recipe of semwatch, made by `semwatch init`: how the images of one layer and step are judged.
# Every key: docs/settings.md. `semwatch recipe check --recipe {RECIPE}` checks an edit.

name: {_scalar(answers.recipe)}
version: 1

# Your class codes, by the label that `semwatch models labels` lists:
#classes:
  #particle: {{code: 10}}
  #scratch: {{code: 11}}
  #defect-free: {{code: 0, doi: false}}
#unknown_code: 999
#non_decidable_code: 998
"""


def _scalar(text: str) -> str:
    """Text as YAML takes it, in quotes where it needs them."""
    dumped = yaml.safe_dump(text, default_flow_style=True, allow_unicode=True, width=10_000)
    return dumped.removesuffix("\n").removesuffix("\n...")
