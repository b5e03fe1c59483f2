"""Thresholds for a purity: what is chosen, what it costs, how far it holds on other images, and how it is proposed."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from commands import Command
from little_site import LittleSite, little_site
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.line.classification import decide
from semwatch.operations import tune
from semwatch.operations.tune import Call
from semwatch.settings.recipe import Recipe, UnknownRule, load_recipe
from semwatch.settings.site import load_site
from semwatch.store.result_index import open_index

RULE = UnknownRule()


def calls_of(label: str, *pairs: tuple[float, str | None]) -> list[Call]:
    return [Call(f"{label}-{i}", label, sure, truth) for i, (sure, truth) in enumerate(pairs)]


def synthetic_lot(n: int, seed: int) -> list[Call]:
    """Truth follows confidence: void is overconfident, pit is as right as it says, scratch is a coin."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        label = str(rng.choice(["void", "pit", "scratch"]))
        sure = float(rng.uniform(0.5, 1))
        right = {"void": sure**4, "pit": sure, "scratch": 0.5}[label]
        made.append(Call(f"image-{i // 2}", label, sure, label if rng.random() < right else "residue"))
    return made


# --- the choice ------------------------------------------------------------------------------------------------------


def test_lowest_threshold_that_is_pure_enough_is_taken() -> None:
    calls = calls_of("void", *[(0.99 - i / 100, "void") for i in range(9)], (0.9, "pit"), (0.85, "pit"), (0.84, "pit"))
    assert tune.threshold_for(calls, 0.8, 0.9) == pytest.approx(0.9)  # 9 of 10
    assert tune.threshold_for(calls, 0.8, 0.95) == pytest.approx(0.91)  # 9 of 9
    assert tune.threshold_for(calls, 0.8, 0.5) == 0.8  # all of them: it stays where it was
    assert tune.threshold_for(calls[8:], 0.8, 0.9) is None
    assert tune.threshold_for([], 0.8, 0.9) is None


def test_equal_confidences_are_taken_or_left_together() -> None:
    calls = calls_of("void", *[(0.95, "void")] * 9, *[(0.9, "void")] * 3, *[(0.9, "pit")] * 3)
    assert tune.threshold_for(calls, 0.8, 0.9) == 0.95


def test_no_threshold_goes_below_what_the_recipe_asks_of_all() -> None:
    calls = calls_of("void", *[(0.6, "void")] * 40)
    found = tune.tune(calls, UnknownRule(), 0.9)
    assert (found.proposed, found.classes[0].n) == ({}, 0)


def test_figures_count_as_a_person_would() -> None:
    calls = [*calls_of("void", *[(0.99, "void")] * 40, *[(0.85, "pit")] * 10), *calls_of("pit", *[(0.95, "pit")] * 6)]
    found = tune.tune(calls, RULE, 0.9, n_undecided=4)
    void = found.classes[1]
    assert found.proposed == {"void": 0.99}
    assert (void.purity_now.count, void.purity_now.n) == (40, 50)
    assert (void.purity.count, void.purity.n, void.kept.count) == (40, 40, 40)
    assert (void.confused_with, void.readiness) == ((("pit", 10),), "ready")
    assert (found.purity_now.count, found.purity_now.n, found.purity.n) == (46, 56, 46)
    assert (found.contribution_now.count, found.contribution_now.n, found.contribution.count) == (56, 60, 46)


def test_classes_that_are_not_ready_say_why() -> None:
    calls = [
        *calls_of("pit", *[(0.9, "pit")] * 3),
        *calls_of("void", *[(0.9, "void")] * 10),
        *calls_of("scratch", *[(0.9, "scratch")] * 20, *[(0.95, "line")] * 20, *[(0.95, None)] * 2),
    ]
    pit, scratch, void = tune.tune(calls, RULE, 0.9).classes
    assert pit.readiness == "too few: 3 of its calls are judged, 36 or more prove a purity of 90%"
    assert scratch.readiness == "cannot be that pure: 20 of 22 wrong ones are line; the two overlap"
    assert void.readiness.startswith("likely, not proven: 10 calls can promise 69%")
    assert (pit.threshold, scratch.threshold, void.threshold) == (None, None, None)


def test_nothing_judged_and_no_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="nobody has judged a defect that the head gave a class"):
        tune.tune([], RULE, 0.9)
    for target in (0, 1, -1, 90, math.nan):
        with pytest.raises(ConfigError, match="give a share between 0 and 1"):
            tune.tune(synthetic_lot(50, 0), RULE, target)


def test_held_out_purity_is_what_an_independent_lot_shows() -> None:
    """Chosen on one lot and judged on another: the held-out check says it beforehand, the choice itself is too good."""
    said, chosen, shown = [], [], []
    for seed in range(20):
        found = tune.tune(synthetic_lot(240, seed), RULE, 0.9)
        rule = UnknownRule(class_confidence=found.proposed)
        other = [call for call in synthetic_lot(4000, 1000 + seed) if call.confidence >= rule.needed(call.label)]
        shown.append(sum(call.truth == call.label for call in other) / len(other))
        assert found.held_out.held_out is not None
        said.append(found.held_out.held_out)
        chosen.append(found.purity.value)
    optimism, remaining = np.mean(chosen) - np.mean(shown), np.mean(said) - np.mean(shown)
    assert optimism > 0.005
    assert abs(remaining) < 0.03
    assert np.mean(said) < np.mean(chosen)


def test_overconfident_class_gets_the_higher_threshold_and_reaches_its_purity_elsewhere() -> None:
    found = tune.tune(synthetic_lot(4000, 1), RULE, 0.9)
    assert set(found.proposed) == {"void", "pit"}  # scratch is a coin
    assert found.proposed["void"] > found.proposed["pit"] > 0.8
    other = synthetic_lot(8000, 2)
    for label, threshold in found.proposed.items():
        named = [call for call in other if call.label == label and call.confidence >= threshold]
        assert sum(call.truth == label for call in named) / len(named) == pytest.approx(0.9, abs=0.05)


# --- the line obeys it -----------------------------------------------------------------------------------------------


def test_class_below_its_own_threshold_is_non_decidable_and_others_are_as_before() -> None:
    logits = np.array([2.2, 0.0], np.float32)  # 0.9 for the first
    p_values = np.array([0.5, 0.5], np.float32)
    labels = ["void", "pit"]
    strict = UnknownRule(class_confidence={"void": 0.95})
    assert decide(logits, p_values, labels, RULE).label == "void"
    verdict = decide(logits, p_values, labels, strict)
    assert (verdict.kind, verdict.label, verdict.nearest[0].label) == ("non-decidable", None, "void")
    assert decide(logits, p_values, labels[::-1], strict).label == "pit"
    assert decide(logits * 2, p_values, labels, strict).label == "void"


def test_lower_threshold_of_a_class_does_not_undercut_the_one_of_all() -> None:
    rule = UnknownRule(decide_confidence=0.8, class_confidence={"void": 0.3})
    assert (rule.needed("void"), rule.needed("pit")) == (0.8, 0.8)
    assert decide(np.zeros(2, np.float32), np.ones(2, np.float32), ["void", "pit"], rule).kind == "non-decidable"


def test_thresholds_are_part_of_the_recipes_identity() -> None:
    other = Recipe(unknown=UnknownRule(class_confidence={"void": 0.95}))
    assert other.id != Recipe().id
    with pytest.raises(TypeError):
        other.unknown.class_confidence["pit"] = 0.9  # type: ignore[index]


# --- the proposal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "name: a  # the layer\n",
        "name: a\nunknown:\n  significance: 0.1  # ours\nclasses: {void: {code: 3}}\n",
        "name: a\nunknown:  # rule\n  class_confidence:\n    pit: 0.9\n\n    void: 0.85\n  significance: 0.1\ncrop: {}",
        "name: a\nunknown: {significance: 0.1}\n",
        "name: a\nunknown:\n",
    ],
)
def test_proposal_is_the_recipe_with_the_thresholds_and_nothing_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "before.yaml").write_text(text)
    made = tune.proposal(text, {"void": 0.93, "odd: name": 0.97})
    (tmp_path / "after.yaml").write_text(made)
    before, after = load_recipe(tmp_path / "before.yaml"), load_recipe(tmp_path / "after.yaml")
    wanted = {**before.unknown.class_confidence, "void": 0.93, "odd: name": 0.97}
    assert dict(after.unknown.class_confidence) == wanted
    unknown = before.unknown.model_copy(update={"class_confidence": after.unknown.class_confidence})
    assert after == before.model_copy(update={"unknown": unknown})
    if "{significance" not in text:
        assert all(comment in made for comment in ("# the layer", "# ours", "# rule") if comment in text)


@pytest.fixture
def there(tmp_path: Path, tiny_repository: Path, client, server) -> LittleSite:
    return little_site(tmp_path, tiny_repository, client, server.url)


def fill(there: LittleSite) -> None:
    """Judged defects of void by the hundred, straight into the index."""
    with open_index(there.site.state / "results.sqlite") as index, index._file.transaction() as db:
        for i in range(60):
            sure, truth = (0.97, "void") if i < 45 else (0.85, "pit")
            db.execute(
                "INSERT INTO files (lot, name, stamp, outcome, source, path, sha256, utc) VALUES (?,?,?,?,?,?,?,?)",
                ("sem-1/x", f"{i}.json", "", "reviewed", "sem-1", f"x/{i}", "", "2026-01-01T00:00:00Z"),
            )
            db.execute(
                "INSERT INTO defects (file, lot, page, defect_id, kind, label, confidence, nearest, box, area_px,"
                " is_judged, human_label)"
                " VALUES (last_insert_rowid(), 'sem-1/x', 0, 1, ?, ?, ?, 'void', '[0,0,1,1]', 1, 1, ?)",
                ("known" if i % 2 else "non-decidable", "void" if i % 2 else None, sure, truth),
            )


def test_command_proposes_on_the_screen_and_writes_only_beside(semwatch: Command, there: LittleSite) -> None:
    fill(there)
    recipe = load_site(there.site.file).folders[0].recipe
    before = recipe.read_text()
    argv = ("recipe", "tune", "--site", there.site.file, "--purity", 0.9)
    said = semwatch(*argv)
    assert said.code == 0
    for part in ("void 0.8 0.97", "void: ready (wrong: pit 15)", "+ void: 0.97", "--write puts it beside"):
        assert part in said.words, said.out
    assert sorted(recipe.parent.glob("*.yaml")) == sorted({recipe, there.site.file})
    told = semwatch(*argv, "--write", "--json").json
    written = Path(told["written"])
    assert (recipe.read_text(), written.name) == (before, "recipe.proposed.yaml")
    assert dict(load_recipe(written).unknown.class_confidence) == told["proposed"] == {"void": 0.97}
    again = semwatch(*argv, "--write")
    assert (again.code, "is there already" in again.words) == (2, True)


def test_command_without_corrections_says_where_they_come_from(semwatch: Command, there: LittleSite) -> None:
    said = semwatch("recipe", "tune", "--site", there.site.file, "--purity", 0.9, "--lot", "LOT-2026-0301-A7", "--json")
    assert said.code == 0  # one of void is judged
    assert said.json["proposed"] == {}
    assert "too few" in said.json["classes"][0]["readiness"]
    said = semwatch("recipe", "tune", "--site", there.site.file, "--purity", 0.9, "--recipe", "other.yaml")
    assert (said.code, "name one of the site's recipes" in said.words) == (2, True)


def test_golden_set_of_the_shipped_head_gives_calls(repository: Path, tmp_path: Path) -> None:
    from daemon import make_site

    site = load_site(make_site(tmp_path / "site", repository).file)
    calls, n_unknown = tune.golden_calls(site, RULE)
    assert len(calls) > 100
    assert n_unknown >= 0
    assert DEFECT_FREE not in {call.label for call in calls}
    found = tune.tune(calls, RULE, 0.95, n_undecided=n_unknown)
    assert found.purity.value >= found.purity_now.value
    assert yaml.safe_load(tune.proposal("name: a\n", found.proposed or {"void": 0.9}))
