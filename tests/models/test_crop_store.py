"""Crops kept beside the heads: written once, found again, never lost while a head names them."""

import hashlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from semwatch.errors import ModelMismatch, PublishError
from semwatch.models import choice, crop_store, head_bank, model_repository
from semwatch.models.crop_store import CropRef, KeptCrop
from semwatch.models.head_bank import Bank


def crops(n: int, *, side: int = 20, tokens: int = 4, seed: int = 0) -> list[KeptCrop]:
    rng = np.random.default_rng(seed)
    return [
        KeptCrop(
            rng.integers(0, 256, (side, side), dtype=np.uint8),
            rng.random((tokens, tokens), dtype=np.float32),
            rng.normal(size=2).astype(np.float32),
        )
        for _ in range(n)
    ]


def shards(repository: Path) -> set[str]:
    return {path.stem for path in (repository / crop_store.CROPS).glob("*.npz")}


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_no_crops_make_no_shard(tmp_path) -> None:
    assert crop_store.write(tmp_path, []) == []
    assert crop_store.read(tmp_path, []) == {}
    assert list(tmp_path.iterdir()) == []


def test_crop_comes_back_bit_for_bit_and_its_soft_mask_in_half_precision(tmp_path) -> None:
    given = crops(3)
    refs = crop_store.write(tmp_path, given)
    found = crop_store.read(tmp_path, refs)
    for ref, crop in zip(refs, given, strict=True):
        kept = found[ref]
        assert np.array_equal(kept.crop, crop.crop)
        assert np.array_equal(kept.size, crop.size)
        assert np.array_equal(kept.soft_mask, crop.soft_mask.astype(np.float16).astype(np.float32))
        assert (kept.soft_mask.dtype, kept.size.dtype, kept.field) == (np.float32, np.float32, None)


def test_crops_of_one_size_share_a_shard(tmp_path) -> None:
    given = [*crops(2), *crops(1, side=30), *crops(1, tokens=6), *crops(1, seed=9)]
    refs = crop_store.write(tmp_path, given)
    assert len({ref.shard for ref in refs}) == 3
    assert refs[0].shard == refs[1].shard == refs[4].shard
    found = crop_store.read(tmp_path, refs)
    assert [found[ref].crop.shape for ref in refs] == [crop.crop.shape for crop in given]
    assert np.array_equal(found[refs[4]].crop, given[4].crop)


def test_what_the_detector_said_is_kept_in_half_precision_and_apart_from_crops_without(tmp_path) -> None:
    rng = np.random.default_rng(3)
    of_detector = {name: rng.normal(size=7).astype(np.float32) for name in crop_store.OF_DETECTOR}
    given = [*crops(2), replace(crops(1, seed=5)[0], **of_detector)]
    refs = crop_store.write(tmp_path, given)
    assert len({ref.shard for ref in refs}) == 2
    found = crop_store.read(tmp_path, refs)
    assert [found[ref].field_features is None for ref in refs] == [True, True, False]
    for name, values in of_detector.items():
        assert np.array_equal(getattr(found[refs[2]], name), values.astype(np.float16).astype(np.float32))
    assert np.array_equal(found[refs[2]].crop, given[2].crop)
    with pytest.raises(ValueError, match="1 of 3 crops have field_features"):
        crop_store.encode(given)


def test_name_is_the_content_and_writing_again_changes_nothing(tmp_path) -> None:
    first = crop_store.write(tmp_path, crops(3))
    (path,) = (tmp_path / crop_store.CROPS).iterdir()
    before = path.read_bytes()
    assert hashlib.sha256(before).hexdigest() == path.stem == first[0].shard
    time.sleep(1.1)  # no moment may stand in the file
    assert crop_store.write(tmp_path, crops(3)) == first
    assert [path.read_bytes() for path in (tmp_path / crop_store.CROPS).iterdir()] == [before]


def test_shard_that_is_absent_or_was_changed_is_refused(tmp_path) -> None:
    (ref,) = crop_store.write(tmp_path, crops(1))
    with pytest.raises(ModelMismatch, match="has 1 crops, none of number 1"):
        crop_store.read(tmp_path, [CropRef(ref.shard, 1)])
    path = crop_store.path_of(tmp_path, ref.shard)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelMismatch, match="sha256 differs"):
        crop_store.read(tmp_path, [ref])
    with pytest.raises(ModelMismatch, match="crops are not there"):
        crop_store.read(tmp_path, [CropRef("0" * 64, 0)])


def test_disk_that_refuses_is_said(tmp_path) -> None:
    (tmp_path / crop_store.CROPS).write_text("a file in the way")
    with pytest.raises(PublishError, match="cannot keep crops"):
        crop_store.write(tmp_path, crops(1))


# --- banks that name them --------------------------------------------------------------------------------------------


def bank(n: int, refs: tuple[CropRef | None, ...] = ()) -> Bank:
    return Bank(np.ones((n, 3), np.float32), ("a",) * n, tuple(f"i{k}" for k in range(n)), ("",) * n, refs)


def test_bank_names_its_crops_through_every_operation(tmp_path) -> None:
    refs = crop_store.write(tmp_path, crops(3))
    whole = bank(4, (refs[0], None, refs[1], refs[2]))
    head_bank.write(whole, tmp_path / "bank.npz")
    back = head_bank.read(tmp_path / "bank.npz")
    assert back.crops == whole.crops
    assert head_bank.chosen(back, np.array([3, 1])).crops == (refs[2], None)
    assert head_bank.joined([back, bank(1)]).crops == (*whole.crops, None)
    assert head_bank.renamed(back, {"a": "b"}).crops == whole.crops
    found = head_bank.crops_of(back, tmp_path)
    assert [crop is None for crop in found] == [False, True, False, False]
    assert np.array_equal(found[3].crop, crops(3)[2].crop)


def test_bank_of_an_older_release_reads_as_one_whose_crops_nobody_kept(tmp_path) -> None:
    head_bank.write(bank(2), tmp_path / "bank.npz")
    with np.load(tmp_path / "bank.npz") as file:
        old = {name: file[name] for name in file.files if not name.startswith("crop_")}
    np.savez(tmp_path / "old.npz", **old)
    assert head_bank.read(tmp_path / "old.npz").crops == (None, None)
    assert crop_store.named_by(tmp_path / "old.npz") == set()
    assert head_bank.crops_of(head_bank.read(tmp_path / "old.npz"), tmp_path) == [None, None]


def test_as_many_places_as_labels_or_none() -> None:
    with pytest.raises(ValueError, match="places of crops"):
        bank(2, (None,))
    assert head_bank.empty(3).crops == ()


# --- what is deleted -------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_repository, tmp_path / "models")


def publish(repository: Path, refs: list[CropRef], golden: list[CropRef]) -> int:
    """The head once more, with banks that name these crops."""
    folder = repository / "head" / str(model_repository.latest(repository, "head"))
    paths = {}
    for name, of_bank in ((head_bank.BANK, refs), (head_bank.GOLDEN, golden)):
        paths[name] = repository.parent / name
        head_bank.write(bank(len(of_bank), tuple(of_bank)), paths[name])
    meta = model_repository.read_meta(repository, "head", int(folder.name))
    return model_repository.publish(repository, meta, folder / "model.onnx", beside=paths)


def grow_old(repository: Path) -> None:
    for path in (repository / crop_store.CROPS).iterdir():
        os.utime(path, (0, time.time() - 2 * crop_store.MIN_AGE_S))


def test_shard_goes_with_the_last_head_that_names_it(repository) -> None:
    shared, alone, proof = (crop_store.write(repository, crops(2, seed=seed)) for seed in range(3))
    names = [refs[0].shard for refs in (shared, alone, proof)]
    publish(repository, [*shared, *alone], shared)  # 2
    publish(repository, shared, proof)  # 3
    publish(repository, shared, shared)  # 4
    grow_old(repository)
    assert choice.prune(repository, "head", keep=10) == []
    assert shards(repository) == set(names)
    assert choice.prune(repository, "head", keep=2) == [1, 2]
    assert shards(repository) == {names[0], names[2]}
    publish(repository, shared, shared)  # 5
    assert choice.prune(repository, "head", keep=2) == [3]
    assert shards(repository) == {names[0]}


def test_version_in_service_keeps_its_crops_however_old_it_is(repository) -> None:
    refs = crop_store.write(repository, crops(2))
    served = publish(repository, refs, refs)
    choice.pin(repository, "head", served)
    for _ in range(3):
        publish(repository, [], [])
    grow_old(repository)
    choice.prune(repository, "head", keep=1)
    assert served in model_repository.versions(repository, "head")
    assert shards(repository) == {refs[0].shard}


def test_young_shard_is_kept_though_no_head_names_it_yet(repository) -> None:
    (ref,) = crop_store.write(repository, crops(1))
    choice.prune(repository, "head", keep=10)
    assert shards(repository) == {ref.shard}
    grow_old(repository)
    crop_store.write(repository, crops(1))  # another head is about to name it
    choice.prune(repository, "head", keep=10)
    assert shards(repository) == {ref.shard}
    grow_old(repository)
    choice.prune(repository, "head", keep=10)
    assert shards(repository) == set()


def test_nothing_is_deleted_while_a_bank_cannot_be_read(repository) -> None:
    (ref,) = crop_store.write(repository, crops(1))
    version = publish(repository, [ref], [])
    (repository / "head" / str(version) / head_bank.BANK).write_bytes(b"damaged")
    grow_old(repository)
    choice.prune(repository, "head", keep=10)
    assert shards(repository) == {ref.shard}


def test_other_models_leave_the_crops_alone(repository) -> None:
    crop_store.write(repository, crops(1))
    grow_old(repository)
    choice.prune(repository, "encoder", keep=1)
    assert len(shards(repository)) == 1


# --- other repositories ----------------------------------------------------------------------------------------------


def test_named_shards_are_copied_once_and_no_others(repository, tmp_path) -> None:
    named, other = (crop_store.write(repository, crops(2, seed=seed)) for seed in range(2))
    publish(repository, named, [])
    target = tmp_path / "elsewhere"
    banks = head_bank.banks_of(repository)
    assert [path.stem for path in crop_store.copy(repository, target, banks)] == [named[0].shard]
    assert crop_store.copy(repository, target, banks) == []
    assert other[0].shard not in shards(target)
    assert np.array_equal(crop_store.read(target, named)[named[1]].crop, crops(2)[1].crop)
