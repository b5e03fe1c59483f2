"""A running daemon and the engineer beside it: a recipe edited, a lot judged again, the index that follows."""

from pathlib import Path

from daemon import SOURCE, Daemon, make_site, png
from semwatch.operations import requeue
from semwatch.operations.doctor import examine
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import load_site
from semwatch.store import corrections, results
from semwatch.store.corrections import Correction
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.store.result_index import INDEX, ResultIndex


def test_edited_recipe_is_refused_or_used_and_a_lot_judged_again(tmp_path: Path, tiny_repository: Path) -> None:
    made = make_site(tmp_path / "site", tiny_repository)
    site = load_site(made.file)
    recipe = site.folders[0].recipe
    first = load_recipe(recipe)
    made.put("lot7/a.png", png(1))

    def result() -> results.ReviewRecord:
        return results.read(results.review_path(site.results_dir, SOURCE, "lot7/a.png"))

    def problem() -> str:
        (check,) = (check for check in examine(site) if check.name == f"recipe of {SOURCE}")
        return "" if check.ok else check.remedy

    with Daemon(made) as daemon:
        daemon.wait_ready()
        daemon.wait_for(lambda: len(made.reviews()) == 1)
        text = recipe.read_text()
        recipe.write_text(f"{text}\nnonsense: 1\n")
        daemon.wait_for(lambda: "the edited recipe of" in daemon.log())
        assert f"{first.id} goes on" in daemon.log()
        recipe.write_text(f"{text}\nversion: 7\n")
        daemon.wait_for(lambda: "is judged by recipe" in daemon.log())
        second = load_recipe(recipe)
        assert second.id != first.id
        daemon.wait_for(lambda: not problem())

        target = results.review_path(site.results_dir, SOURCE, "lot7/a.png")
        missed = Correction(0, "particle", box_xyxy=(1, 1, 4, 4))
        results.change(
            target, lambda record: corrections.corrected(record, [missed], by="ada", utc="2026-03-01T08:00:00Z")
        )
        with Ledger(site.state_dir / LEDGER, exclusive=False) as ledger:
            assert requeue.review_again(site, ledger, "lot7").queued == 1
        daemon.wait_for(lambda: result().revision == 2)
        assert result().recipe.id == second.id
        assert [one.label for page in result().pages for one in page.missed] == ["particle"]
        assert results.read(results.revision_path(target, 1)).recipe.id == first.id
        assert daemon.stop() == 0
    with ResultIndex(site.state_dir / INDEX, read_only=True) as index:
        assert index.missed() == {"particle": 1}
        assert [file.recipe_id for file in index.files(f"{SOURCE}/lot7")] == [second.id]
