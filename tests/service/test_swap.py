"""Which version serves, and how the embedded runtime changes its head while it answers."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from semwatch.errors import ModelMismatch, PublishError
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.inference import Embedded
from semwatch.models.swap import Swap


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_repository, tmp_path / "models")


def republish(repository: Path, **changes: object) -> int:
    """The same head once more under the next number, with another description."""
    folder = repository / "head" / str(model_repository.versions(repository, "head")[-1])
    meta = model_repository.read_meta(repository, "head", int(folder.name)).model_copy(update=changes)
    beside = {name: folder / name for name in (model_repository.PROBE, head_bank.BANK, head_bank.GOLDEN)}
    return model_repository.publish(repository, meta, folder / "model.onnx", beside=beside)


# --- which version serves --------------------------------------------------------------------------------------------


def test_without_pin_the_newest_version_serves(repository: Path) -> None:
    assert choice.choice(repository, "head") == 1
    assert republish(repository) == 2
    assert choice.choice(repository, "head") == 2


def test_pinned_version_serves_until_it_is_released(repository: Path) -> None:
    republish(repository)
    choice.pin(repository, "head", 1)
    assert choice.choice(repository, "head") == 1
    republish(repository)
    assert choice.choice(repository, "head") == 1
    choice.pin(repository, "head", None)
    assert choice.choice(repository, "head") == 3
    choice.pin(repository, "head", None)  # releasing twice does no harm


def test_version_that_is_not_there_cannot_be_pinned(repository: Path) -> None:
    with pytest.raises(ModelMismatch, match="version 7 is not in"):
        choice.pin(repository, "head", 7)


@pytest.mark.parametrize("text", ["", "zero", "0", "-1", "1 2"])
def test_pin_file_edited_into_nonsense_says_what_to_do(repository: Path, text: str) -> None:
    (repository / "head" / choice.PINNED).write_text(text)
    with pytest.raises(ModelMismatch, match="must hold a version number alone"):
        choice.choice(repository, "head")


def test_pin_of_a_deleted_version_says_how_to_release_it(repository: Path) -> None:
    (repository / "head" / choice.PINNED).write_text("5\n")
    with pytest.raises(ModelMismatch, match="models pin head --release"):
        choice.choice(repository, "head")


def test_rollback_withdraws_what_it_leaves_and_the_next_publication_serves_by_itself(repository: Path) -> None:
    republish(repository)
    assert choice.roll_back(repository, "head", "names pits bridges") == (2, 1)
    assert choice.why_withdrawn(repository, "head", 2) == "names pits bridges"
    assert republish(repository) == 3
    assert choice.choice(repository, "head") == 3


def test_rollback_moves_a_pin(repository: Path) -> None:
    for _ in range(2):
        republish(repository)
    choice.pin(repository, "head", 3)
    assert choice.roll_back(repository, "head", "worse") == (3, 2)
    assert choice.pin_of(repository, "head") == 2
    assert choice.why_withdrawn(repository, "head", 3) is None


def test_there_is_nothing_to_go_back_to_from_the_first_version(repository: Path) -> None:
    with pytest.raises(PublishError, match="nothing to go back to"):
        choice.roll_back(repository, "head", "worse")


def test_last_version_that_may_serve_and_a_pinned_one_cannot_be_withdrawn(repository: Path) -> None:
    with pytest.raises(PublishError, match="last version that may serve"):
        choice.withdraw(repository, "head", 1, "broken")
    republish(repository)
    choice.pin(repository, "head", 2)
    with pytest.raises(PublishError, match="release the pin"):
        choice.withdraw(repository, "head", 2, "broken")


def test_old_versions_go_but_for_the_one_in_service_and_the_one_before_it(repository: Path) -> None:
    for _ in range(5):
        republish(repository)
    assert choice.prune(repository, "head", keep=10) == []
    choice.pin(repository, "head", 3)
    assert choice.prune(repository, "head", keep=2) == [1, 4]
    assert model_repository.versions(repository, "head") == [2, 3, 5, 6]
    assert not [entry for entry in (repository / "head").iterdir() if entry.name.startswith(".gone")]


def test_number_of_a_withdrawn_version_is_never_given_again(repository: Path) -> None:
    republish(repository)
    choice.withdraw(repository, "head", 2, "broken")
    shutil.rmtree(repository / "head" / "2")
    assert republish(repository) == 3


def test_difference_names_classes_codes_and_what_they_were_made_of(repository: Path) -> None:
    old = model_repository.read_meta(repository, "head", 1)
    new = old.model_copy(
        update={"labels": (*old.labels[1:], "novel-1"), "codes": {"particle": 7}, "provenance": {"seed": 3}}
    )
    told = choice.difference(old, new)
    assert told["classes_added"] == ["novel-1"]
    assert told["classes_removed"] == [old.labels[0]]
    assert told["codes"] == {"particle": [None, 7]}
    assert told["provenance"] == {"seed": [None, 3]}
    assert told["same_encoder"] is True


# --- the swap --------------------------------------------------------------------------------------------------------


def test_nothing_new_is_no_swap(repository: Path) -> None:
    with Embedded(repository) as models:
        assert models.refresh() is None


def test_published_head_answers_at_once_with_its_own_labels(repository: Path) -> None:
    labels = model_repository.read_meta(repository, "head", 1).labels
    with Embedded(repository) as models:
        republish(repository, labels=tuple(f"new {label}" for label in labels))
        assert models.refresh() == Swap("head", 2)
        width = models.meta("head").inputs["features"].shape[0]
        answer = models.infer("head", {"features": np.zeros((1, width), np.float32)})
        assert (answer.version, answer.meta.labels[0]) == (2, f"new {labels[0]}")
        choice.roll_back(repository, "head", "worse")
        assert models.refresh() == Swap("head", 1)


def test_damaged_head_is_refused_once_and_the_old_one_goes_on(repository: Path) -> None:
    with Embedded(repository) as models:
        republish(repository)
        (repository / "head/2/model.onnx").write_bytes(b"no network")
        swap = models.refresh()
        assert swap is not None
        assert "not the file that was published" in (swap.refused or "")
        assert models.refresh() is None
        assert models.versions()["head"] == 1
        assert set(models.refused()) == {2}
        republish_from = repository / "head/1"
        meta = model_repository.read_meta(repository, "head", 1)
        assert model_repository.publish(repository, meta, republish_from / "model.onnx") == 3
        assert models.refresh() == Swap("head", 3)


def test_head_that_answers_its_probe_otherwise_is_refused(repository: Path) -> None:
    probe = model_repository.read_probe(repository, "head", 1)
    assert probe is not None
    inputs, outputs = probe
    assert set(outputs) == {"logits", "p_values"}
    with Embedded(repository) as models:
        republish(repository)
        lying = {**outputs, "logits": outputs["logits"] * 1.01}
        model_repository.write_probe(repository / "head/2" / model_repository.PROBE, inputs, lying)
        swap = models.refresh()
        assert swap is not None
        assert "answers its probe with another logits" in (swap.refused or "")


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut"])
def test_damaged_probe_is_refused(repository: Path, damage: bytes) -> None:
    with Embedded(repository) as models:
        republish(repository)
        (repository / "head/2" / model_repository.PROBE).write_bytes(damage)
        swap = models.refresh()
        assert swap is not None
        assert "probe.npz cannot be used" in (swap.refused or "")


def test_head_of_another_encoder_does_not_come_in(repository: Path) -> None:
    with Embedded(repository) as models:
        republish(repository, encoder_sha256="0" * 64)
        swap = models.refresh()
        assert swap is not None
        assert "another encoder" in (swap.refused or "")


def test_start_after_a_broken_publication_serves_the_head_before_it(repository: Path) -> None:
    republish(repository)
    (repository / "head/2/model.onnx").write_bytes(b"no network")
    with Embedded(repository) as models:
        assert models.versions()["head"] == 1
        assert set(models.refused()) == {2}
        assert models.refresh() is None
    choice.pin(repository, "head", 2)  # somebody insists: then the fault is said
    with pytest.raises(ModelMismatch, match="not the file that was published"):
        Embedded(repository)


def test_broken_pin_leaves_the_running_head_alone(repository: Path) -> None:
    with Embedded(repository) as models:
        (repository / "head" / choice.PINNED).write_text("nonsense")
        swap = models.refresh()
        assert swap is not None
        assert swap.refused is not None
        assert models.refresh() is None
        assert models.versions()["head"] == 1


def test_pin_of_the_recipe_goes_before_everything(repository: Path) -> None:
    republish(repository)
    with Embedded(repository, pins={"head": 1}) as models:
        republish(repository)
        assert models.refresh() is None
        assert models.versions()["head"] == 1


def test_answers_under_way_keep_the_labels_of_the_head_that_gave_them(repository: Path) -> None:
    """Four clients ask without pause while the head changes twenty times."""
    width = model_repository.read_meta(repository, "encoder", 1).outputs["features"].shape[0]
    wrong: list[object] = []
    stop = threading.Event()
    with Embedded(repository, threads=1) as models:

        def ask() -> None:
            rows = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
            while not stop.is_set():
                try:
                    answer = models.infer("head", {"features": rows})
                    if answer.version > 1 and not answer.meta.labels[0].startswith(f"v{answer.version} "):
                        wrong.append((answer.version, answer.meta.labels))
                except Exception as error:  # noqa: BLE001 - any failure is what the test looks for
                    wrong.append(error)

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        plain = model_repository.read_meta(repository, "head", 1).labels
        for version in range(2, 22):
            assert republish(repository, labels=tuple(f"v{version} {label}" for label in plain)) == version
            assert models.refresh() == Swap("head", version)
        stop.set()
        for client in clients:
            client.join(timeout=10)
    assert wrong == []


# --- the bank --------------------------------------------------------------------------------------------------------


def test_bank_comes_back_as_it_was_written(tmp_path: Path) -> None:
    bank = head_bank.Bank(np.eye(3, dtype=np.float32), ("a", "b", "a"), ("i", "j", "i"), ("", "ff", ""))
    head_bank.write(bank, tmp_path / "bank.npz")
    back = head_bank.read(tmp_path / "bank.npz")
    assert (back.labels, back.images, back.ids) == (bank.labels, bank.images, bank.ids)
    np.testing.assert_array_equal(back.features, bank.features)
    assert back.features.dtype == np.float32


def test_empty_bank_can_be_written_and_joined(tmp_path: Path) -> None:
    head_bank.write(head_bank.empty(3), tmp_path / "bank.npz")
    back = head_bank.read(tmp_path / "bank.npz")
    one = head_bank.Bank(np.ones((1, 3), np.float32), ("a",), ("i",), ("",))
    assert len(back) == 0
    assert head_bank.joined([back, one]).labels == ("a",)
    assert head_bank.renamed(one, {"a": "b"}).labels == ("b",)
    assert len(head_bank.chosen(one, np.array([False]))) == 0


def test_bank_that_is_absent_or_damaged_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match="fit one with"):
        head_bank.read(tmp_path / "bank.npz")
    (tmp_path / "bank.npz").write_bytes(b"nothing")
    with pytest.raises(ModelMismatch, match="cannot be used"):
        head_bank.read(tmp_path / "bank.npz")
    bad = head_bank.Bank(np.full((1, 2), np.nan, np.float32), ("a",), ("i",), ("",))
    head_bank.write(bad, tmp_path / "bank.npz")
    with pytest.raises(ModelMismatch, match="not finite"):
        head_bank.read(tmp_path / "bank.npz")


def test_bank_of_unequal_lists_is_no_bank() -> None:
    with pytest.raises(ValueError, match="2 labels need as many"):
        head_bank.Bank(np.zeros((1, 2), np.float32), ("a", "b"), ("i",), ("",))
