"""A little site with everything a command can show: results, refused files, unknowns, clusters, two heads."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import redis

from cluster_files import T0, three
from daemon import SOURCE, Site, make_site, png
from factories import make_review, make_verdict, messages
from semwatch.classes.register import ClassRegister
from semwatch.models.relabel import relabel
from semwatch.operations import correct
from semwatch.service.lot_tables import row_of
from semwatch.settings.site import load_site
from semwatch.store import results
from semwatch.store.audit import AuditLog
from semwatch.store.corrections import Correction
from semwatch.store.ledger import Ledger
from semwatch.streams.handoff import Handoff
from semwatch.streams.unknowns import Publisher
from semwatch.system.files import file_sha256, stamp_of

UTC = "2026-03-01T08:00:00Z"
LOT = "LOT-2026-0301-A7"
REASON = "neither TIFF, PNG, JPEG nor BMP: its first bytes are those of a text, so the tool may have written a log"


@dataclass(frozen=True, slots=True)
class LittleSite:
    site: Site
    images: tuple[str, ...]


def little_site(folder: Path, repository: Path, client: redis.Redis, url: str) -> LittleSite:
    """Three images reviewed, two refused, one with the content of another; the first corrected by a person."""
    models = shutil.copytree(repository, folder / "models")
    relabel(models, {"bridge": "novel-1"}, {}, utc=T0)
    made = make_site(folder / "site", models, redis_url=url)
    made.results.parent.mkdir(parents=True)
    made.state.mkdir(parents=True, exist_ok=True)
    AuditLog(made.state / "audit.jsonl").close()
    ClassRegister(Handoff(client), folder / "learning", owner="cycle").change(lambda _: three())
    images = tuple(f"{LOT}/wafer{i:02}/defect_{i:04}_topdown.png" for i in range(3))
    kinds = [make_verdict("known", "particle"), make_verdict("unknown"), make_verdict("known", "bridge")]
    with Ledger(made.state / "ledger.sqlite") as ledger:
        for i, name in enumerate(images):
            file = made.put(name, png(i))
            claim = ledger.claim(SOURCE, name, sha256=file_sha256(file), stamp=stamp_of(file.lstat()), now_utc=UTC)
            review = replace(make_review(3, source=SOURCE, path=name, verdicts=kinds, seed=i), sha256=claim.sha256)
            written = results.write(review, results_dir=made.results.parent)
            row = row_of(written.json, made.results.parent, is_new=True)
            ledger.finish(claim, outbox=[], audit={"event": "reviewed", "sha256": claim.sha256}, now_utc=UTC, row=row)
            Publisher(client).publish(messages(review))
        for name in (f"{LOT}/wafer00/log_of_the_tool_{i}.png" for i in range(2)):
            file = made.put(name, name.encode())
            claim = ledger.claim(SOURCE, name, sha256=file_sha256(file), stamp=stamp_of(file.lstat()), now_utc=UTC)
            of = {"source": SOURCE, "path": name, "sha256": claim.sha256}
            results.write_reason(
                results_dir=made.results.parent, **of, reason=REASON, attempts=1, size=8, quarantined_utc=UTC
            )
            ledger.quarantine(claim, REASON, audit={"event": "quarantined", **of}, now_utc=UTC)
        copy = f"{LOT}/wafer02/copy.png"
        file = made.put(copy, png(0))
        ledger.claim(SOURCE, copy, sha256=file_sha256(file), stamp=stamp_of(file.lstat()), now_utc=UTC)
        of = {"source": SOURCE, "path": copy, "sha256": file_sha256(file)}
        results.write_duplicate(
            results_dir=made.results.parent, **of, original=images[0], is_refused=False, noted_utc=UTC
        )
        ledger.duplicate_noted(SOURCE, copy)
        work = ledger.find(part=images[0])[0][1]
    settings = load_site(made.file)
    correct.correct(settings, work, [Correction(0, "particle", 1), Correction(0, None, 3)])
    return LittleSite(made, images)
