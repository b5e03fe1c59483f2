"""A site as commit 4b6ac70, the one before the rooms, left it, and what is in it (``fixtures/make_site_before.py``).

The daemon was killed at its work, a cycle of learning too; Redis was away at the end, and people decided what no cycle
has taken up yet. Nothing here imports semwatch: the figures hold whatever the code makes of the site.
"""

import base64
import json
import tarfile
import time
from pathlib import Path

import redis

PACKED = Path(__file__).parents[1] / "fixtures" / "site_before.tar.xz"
PACKED_URL = "redis://127.0.0.1:6379/0"
LEARNER = "retrain-station-1"
"""The consumer of the cycle that was killed; its machine was called station-1."""
SOURCES = ("sem-1", "sem-2")
"""sem-2 has a recipe of its own, recipe-first.yaml, which pins head 1: it calls everything unknown."""

# --- state/ledger.sqlite, layout 2 -----------------------------------------------------------------------------------

WORK = {"DONE": 14, "QUARANTINED": 1, "SEEN": 2, "CLAIMED": 1}
WAITING_WORK = {
    ("sem-1", "lot7/broken.png"): ("SEEN", 0, "requeued"),
    ("sem-2", "lot8/hangs-1.png"): ("CLAIMED", 1, "the process died on it"),
    ("sem-2", "lot8/hangs-2.png"): ("SEEN", 1, "the process died on it"),
}
"""Each can be reviewed at once; broken.png goes back into quarantine."""
N_PATHS = 19
"""One more than work: sem-1/lot7/again.png has the content of 003.png."""
DROPPED_UNSEEN = ("sem-1/lot8/330.png", "sem-1/lot8/331.png")
"""Files in the drop folders that the ledger has never met."""
N_DROPPED = 21
OUTBOX = {"unknowns": 10, "results": 2}
"""Of sem-2/lot8/310.png and 311.png, reviewed while Redis was away."""
N_NOTED = 14
"""Twelve revisions of results, two heads published."""
AUDIT_WAITING = ("requeued", "cluster", "cluster")
"""Events of the audit lines that are in the ledger and not yet in audit.jsonl."""

# --- the rest of state/ and results/ ---------------------------------------------------------------------------------

N_AUDIT_LINES = 35
SERVING = {"detector": 1, "encoder": 1, "head": 4}
REREAD_HEADS = {"sem-1": 4, "sem-2": 1}
N_RESULTS, N_KEPT_REVISIONS, N_REASONS, N_LOT_TABLES = 14, 12, 2, 4
REVISIONS = {**{f"sem-1/lot7/{i:03d}.png": 3 for i in range(6)}}
"""Results that a later head has judged again; all others are in revision 1."""

# --- state/learning --------------------------------------------------------------------------------------------------

ARCHIVE = {"waiting": 12, "learned": 75, "rejected": 11, "explained": 8}
CLUSTERS = {
    "novel-1": ("named", "void", 27),
    "novel-2": ("named", "pit", 14),
    "novel-3": ("merged", "novel-3", 12),
    "novel-4": ("rejected", "novel-4", 11),
    "novel-5": ("learned", "novel-5", 10),
    "novel-6": ("rejected", "novel-6", 12),
    "novel-7": ("proposed", "novel-7", 8),
}
"""State, label and size; novel-3 is merged into novel-2. Head 4, which serves, knows novel-6 still."""
DECISIONS = (
    ("name", "novel-1", True),
    ("merge", "novel-3", True),
    ("reject", "novel-4", True),
    ("name", "novel-2", True),
    ("split", "novel-2", False),
    ("reject", "novel-6", False),
)
"""Kind, cluster, and whether a head obeys it; the two that none does wait for the next cycle."""
CLUSTERS_REVISION = 12
N_REPORTS = 2
WISHES = ("sem-1, recipe metal2: the unknown rate rose from 12 % to 41 % over the last 87 pages",)
"""Lines of retrain.wanted behind their time."""

# --- models/ ---------------------------------------------------------------------------------------------------------

HEADS = (1, 2, 3, 4, 5)
WITHDRAWN = {5: "pit is the wrong name"}
LABELS_SERVED = ("bridge", "defect-free", "novel-2", "novel-5", "novel-6", "particle", "void")

# --- Redis -----------------------------------------------------------------------------------------------------------

STREAMS = {"semwatch:unknowns": 15, "semwatch:results": 24, "semwatch:unknowns:dead": 1}
HELD = {LEARNER: 2, "given-back": 10}
"""Pending entries of semwatch:unknowns by consumer; the three others were never delivered."""
N_SENT_MARKS = 133


# --- what commit 4b6ac70 itself made of it ---------------------------------------------------------------------------

AFTER_START = {
    "work": {"DONE": 18, "QUARANTINED": 2},
    "audit lines": 43,
    "streams": {"semwatch:unknowns": 27, "semwatch:results": 30, "semwatch:unknowns:dead": 1},
}
"""Once the daemon has run with Redis there: outbox and audit queue are empty, no result was revised again."""
AFTER_CYCLE = {
    "outcome": "head 6 serves and knows pit (14 crops), novel-8 (12 crops)",
    "archive": {"waiting": 27, "learned": 63, "rejected": 23, "explained": 8},
    "unknowns": 27,
}
"""Once a cycle of seed 0 has run beside that daemon, as the learner that was killed; it obeys both decisions."""


def unpack(folder: Path, *, redis_url: str = PACKED_URL) -> Path:
    """Lay the site out in a folder, which need not exist; returns the site's own folder."""
    with tarfile.open(PACKED) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.0 to 3.11.3 have none
        archive.extractall(folder)
    site = folder / "site" / "site.yaml"
    text = site.read_text()
    assert PACKED_URL in text
    site.write_text(text.replace(PACKED_URL, redis_url))
    return site.parent


def restore(folder: Path, client: "redis.Redis", *, learner: str = LEARNER) -> None:
    """Put every key into an empty Redis: entries with their ids, the group, what its consumers hold, the sent marks.

    ``learner`` takes the place of the killed cycle's consumer; ``retrain-<this machine's name>`` finds its work again.
    """
    for key, kept in json.loads((folder / "redis.json").read_text()).items():
        client.restore(key, kept["ttl_s"] * 1000, base64.b64decode(kept["dump"]))
    if learner != LEARNER:
        stream, group = "semwatch:unknowns", "learners"
        for entry in client.xpending_range(stream, group, "-", "+", 1000, consumername=LEARNER):
            n_deliveries, now_ms = int(entry["times_delivered"]), int(time.time() * 1000)
            client.xclaim(
                stream, group, learner, 0, [entry["message_id"]], time=now_ms, retrycount=n_deliveries, justid=True
            )
        client.xgroup_delconsumer(stream, group, LEARNER)
