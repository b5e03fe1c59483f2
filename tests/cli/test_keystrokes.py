"""From "a lot landed" to "five corrections made and on their way to learning": how much a person types."""

import json
from pathlib import Path

import redis

from commands import Command
from little_site import LOT, little_site
from semwatch.store.ledger import Ledger
from semwatch.streams.embedded_redis import EmbeddedRedis

TYPED = (
    f"semwatch lot {LOT}",
    "semwatch correct defect_0000_topdown.png 2 particle",
    "semwatch correct defect_0001_topdown.png 2 bridge",
    "semwatch correct defect_0001_topdown.png 3 --not-a-defect",
    "semwatch correct defect_0002_topdown.png 1 bridge",
    "semwatch correct defect_0002_topdown.png 2 particle",
)
"""The site stands in SEMWATCH_SITE. The nightly timer learns: no command; or `semwatch-train retrain`, 23 keys more."""


def keystrokes() -> int:
    """Each character, and the return key; nothing completed, nothing taken from the history of the shell."""
    return sum(len(line) + 1 for line in TYPED)


def test_five_corrections_take_six_commands(
    semwatch: Command, tmp_path: Path, tiny_repository: Path, client: redis.Redis, server: EmbeddedRedis, monkeypatch
) -> None:
    made = little_site(tmp_path, tiny_repository, client, server.url)
    monkeypatch.setenv("SEMWATCH_SITE", str(made.site.file))

    def leaving() -> int:
        with Ledger(made.site.state / "ledger.sqlite", read_only=True) as ledger:
            return len([one for _, one in ledger.unpublished(100) if one.stream == "corrections"])

    before = leaving()
    codes = [semwatch(*line.split()[1:]).code for line in TYPED]
    assert codes == [1, 0, 0, 0, 0, 0]  # the lot is not complete: two of its files were refused
    assert leaving() - before == 5
    figures = json.loads((Path(__file__).parents[2] / "docs/figures.json").read_text())
    (row,) = (row for group in figures["groups"] for row in group["figures"] if row["id"] == "five-corrections")
    assert f"{len(TYPED)} commands, {keystrokes()} keystrokes" in row["result"]
