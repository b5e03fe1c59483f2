"""A site that can learn: tiny models, a real Redis, and unknowns whose features make blobs on axes of their own."""

import hashlib
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis
import yaml

from semwatch.classes.clusters import Clusters
from semwatch.classes.register import ClassRegister
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.head_bank import Bank
from semwatch.models.model_repository import Meta
from semwatch.service import learning_side
from semwatch.settings.recipe import UnknownRule
from semwatch.settings.site import Site, load_site
from semwatch.store.ledger import Ledger
from semwatch.streams.handoff import Handoff, Wish, wish_message
from semwatch.streams.records import DOUBTFUL, NAMED, UNKNOWNS, Fields, Record, decode, encode, pack
from semwatch.streams.unknowns import Consumer, Publisher
from semwatch_training.learning.archive import ARCHIVE, Archive

INPUT_PX, TOKENS = 56, 4
STREAM = "semwatch:unknowns"
# The tiny head is never as sure as the default asks for a dismissal.
RULE = UnknownRule(dismiss_probability=0.5)
RECIPE = {"name": "test", "unknown": {"dismiss_probability": 0.5}, "promotion": {"max_unknown_rate": 0.3}}


def unknown(i: int, axis: int, *, width: int, **changes: Any) -> Record:
    """Record number i of the blob on an axis; each is from an image of its own."""
    rng = np.random.default_rng(i)
    features = rng.normal(size=width).astype(np.float32)
    features[axis] += 6
    values: dict[str, Any] = {
        "id": f"{i:032x}",
        "created_utc": "2999-01-01T00:00:00Z",  # never too old, whatever the clock says
        "source": "sem-1",
        "path": f"lot/{i}.png",
        "sha256": hashlib.sha256(b"%d" % i).hexdigest(),
        "page": 0,
        "defect_id": 1,
        "box_xyxy": (10, 10, 30, 30),
        "crop_xyxy": (0, 0, 56, 56),
        "area_px": 300,
        "area_nm2": None,
        "pixel_nm": None,
        "image_score": 0.5,
        "peak_score": 0.7,
        "kind": "unknown",
        "nearest": (),
        "recipe_name": "test",
        "recipe_id": "0" * 16,
        "model_versions": {"detector": 1, "encoder": 1, "head": 1},
        "features": features,
        "soft_mask": rng.random((TOKENS, TOKENS), dtype=np.float32),
        "crop": rng.integers(0, 256, (INPUT_PX, INPUT_PX), dtype=np.uint8),
        "field_short_px": 200,
    }
    return Record(**{**values, **changes})


def notes_of(archive: Archive, ids: Sequence[str]) -> dict[str, str]:
    """What a person reads in an archive beside the state of each record."""
    with closing(sqlite3.connect(archive.path)) as db:
        marks = ", ".join("?" * len(ids))
        return dict(db.execute(f"SELECT id, state_note FROM unknowns WHERE id IN ({marks})", tuple(ids)))


@dataclass(frozen=True)
class Lab:
    """One site, and questions to what a cycle leaves behind."""

    folder: Path
    client: redis.Redis

    @property
    def file(self) -> Path:
        return self.folder / "site.yaml"

    @property
    def site(self) -> Site:
        return load_site(self.file)

    @property
    def repository(self) -> Path:
        return self.folder / "models"

    @property
    def learning(self) -> Path:
        return self.folder / "state" / "learning"

    @property
    def width(self) -> int:
        return model_repository.read_meta(self.repository, "encoder", 1).outputs["features"].shape[0]

    # --- what goes in ------------------------------------------------------------------------------------------------

    def blob(self, axis: int, n: int, *, first: int | None = None, **changes: Any) -> list[Record]:
        """n unknowns that look alike; add them with ``add``."""
        start = 1000 * axis if first is None else first
        return [unknown(start + i, axis, width=self.width, **changes) for i in range(n)]

    def add(self, found: Sequence[Record]) -> None:
        """Queue records, each in the stream of its kind."""
        streams = [(DOUBTFUL if r.kind in NAMED else UNKNOWNS, r) for r in found]
        Publisher(self.client).publish([(stream, r.id, pack(encode(r))) for stream, r in streams])

    def recipe(self, **values: Any) -> None:
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **values}))

    def change(self, **values: Any) -> None:
        """Change settings of the site, whole sections."""
        self.file.write_text(yaml.safe_dump({**yaml.safe_load(self.file.read_text()), **values}))

    # --- what came out -----------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        return choice.choice(self.repository, "head")

    def versions(self) -> list[int]:
        return model_repository.versions(self.repository, "head")

    @property
    def meta(self) -> Meta:
        """Of the head in service."""
        return model_repository.read_meta(self.repository, "head", self.version)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted(self.meta.labels))

    def bank(self, name: str = head_bank.BANK) -> Bank:
        return head_bank.read(self.repository / "head" / str(self.version) / name)

    def learned_ids(self, label: str | None = None) -> list[str]:
        """Record ids in bank and golden set of the head in service, as often as they stand there."""
        crops = [self.bank(), self.bank(head_bank.GOLDEN)]
        return [i for c in crops for i, of in zip(c.ids, c.labels, strict=True) if i and label in (None, of)]

    def n_waiting(self) -> int:
        return int(self.client.xlen(STREAM))

    def claimable(self) -> dict[str, int]:
        """Deliveries by record id of all that anybody could claim at once; they are given back."""
        other = Consumer(self.client, UNKNOWNS, decode, name="somebody")
        claimed = other.claim(10_000, min_idle_s=3600)
        while more := other.claim(10_000, min_idle_s=3600):
            claimed += more
        other.give_back(claimed)
        return {item.record.id: item.n_deliveries for item in claimed}

    def dead_reasons(self) -> dict[str, str]:
        """Why, by record id, of all that was put aside."""
        letters = Consumer(self.client, UNKNOWNS, decode, name="somebody").dead()
        return {letter.fields.get(b"id", b"").decode(): letter.error for letter in letters}

    def clusters(self) -> dict[str, tuple[str, str]]:
        """State and label by id."""
        return {k.id: (k.state, k.label) for k in self.found().clusters}

    def found(self) -> Clusters:
        """The state that daemon and learning share."""
        return self.register().read()

    def register(self) -> ClassRegister:
        """The daemon's side of it."""
        return learning_side.register_of(self.site, self.handoff(), "test")

    def handoff(self) -> Handoff:
        return Handoff(self.client)

    def wish(self, sentence: str) -> None:
        """Let the drift watch ask for a cycle."""
        wish = Wish(site="site", source="sem-1", utc="2026-01-03T00:00:00Z", sentence=sentence)
        Publisher(self.client).publish([wish_message(wish)])

    def wishes(self) -> list[str]:
        return [wish.sentence for wish in self.handoff().wishes().values()]

    def states(self) -> dict[str, int]:
        with Archive(self.learning / ARCHIVE, read_only=True) as archive:
            return {state: n for state, n in archive.counts().items() if n}

    def audit_lines(self, event: str = "head published") -> list[str]:
        path = self.folder / "state" / "ledger.sqlite"
        path.parent.mkdir(exist_ok=True)
        with Ledger(path, exclusive=False) as ledger:  # as a daemon does at its start
            learning_side.note_published_heads(ledger, self.repository, self.version)
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return [line for (line,) in db.execute("SELECT line FROM audit ORDER BY seq") if event in line]


def make_lab(folder: Path, models: Path, client: redis.Redis, url: str, **changes: Any) -> Lab:
    """A site with a model repository of its own."""
    shutil.copytree(models, folder / "models")
    (folder / "drop").mkdir()
    settings = {
        "folders": [{"path": "drop", "source": "sem-1", "recipe": "recipe.yaml", "completeness": "rename"}],
        "results_dir": "results",
        "state_dir": "state",
        "models": {"repository": "models", "threads": 1},
        "redis": {"url": url, "timeout_s": 2},
        "learning": {"min_unknowns": 30, "swap_timeout_s": 20},
        "limits": {"min_free_mb": 0},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump({**settings, **changes}))
    lab = Lab(folder, client)
    lab.recipe()
    return lab


def add_raw(client: redis.Redis, fields: Fields) -> None:
    """Put an entry into the queue that no publisher of ours would."""
    client.xadd(STREAM, dict(fields))  # type: ignore[arg-type]  # the stub's dict is invariant
