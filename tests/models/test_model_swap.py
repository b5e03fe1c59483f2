"""The one rule of which version serves, apart from what loads it."""

from pathlib import Path

import pytest

import toy_family
from semwatch.errors import ModelMismatch
from semwatch.models import choice, model_repository
from semwatch.models.checks import check_beside
from semwatch.models.swap import NO_VERSION, ModelSwap, Swap


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Heads 1 to 3 of one encoder."""
    toy_family.publish_encoder(tmp_path)
    for _ in range(3):
        toy_family.publish_head(tmp_path)
    return tmp_path


@pytest.fixture
def fits(repository: Path):
    """The check against the encoder in service."""
    encoder = model_repository.read_meta(repository, "encoder", 1)
    return lambda meta: check_beside(meta, {"encoder": encoder})


def loads(*damaged: int):
    def load(version: int) -> str:
        if version in damaged:
            raise ModelMismatch(f"{version} is damaged")
        return f"head {version}"

    return load


def test_newest_serves_at_a_start(repository, fits) -> None:
    assert ModelSwap(repository, {}).first("head", loads(), fits) == "head 3"


def test_pinned_one_serves_or_nothing(repository, fits) -> None:
    assert ModelSwap(repository, {"head": 2}).first("head", loads(), fits) == "head 2"
    with pytest.raises(ModelMismatch, match="2 is damaged"):
        ModelSwap(repository, {"head": 2}).first("head", loads(2), fits)


def test_deputy_serves_where_the_wanted_one_cannot_and_the_wanted_one_alone_is_refused(repository, fits) -> None:
    heads = ModelSwap(repository, {})
    assert heads.first("head", loads(3, 2), fits) == "head 1"
    assert heads.refused("head") == {3: "3 is damaged"}


def test_where_none_can_serve_the_wanted_one_says_why(repository, fits) -> None:
    with pytest.raises(ModelMismatch, match="3 is damaged"):
        ModelSwap(repository, {}).first("head", loads(1, 2, 3), fits)


def test_head_of_another_encoder_is_not_even_loaded(repository) -> None:
    encoder = model_repository.read_meta(repository, "encoder", 1)
    stranger = encoder.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(ModelMismatch, match="another encoder"):
        ModelSwap(repository, {}).first(
            "head", lambda version: pytest.fail(f"loaded {version}"), lambda m: check_beside(m, {"encoder": stranger})
        )
    assert ModelSwap(repository, {}).first("head", loads(), lambda m: check_beside(m, {})) == "head 3"  # nobody asks


def test_next_one_takes_over_once(repository, fits) -> None:
    heads = ModelSwap(repository, {})
    assert heads.next("head", 2, loads(), fits) == (Swap("head", 3), "head 3")
    assert heads.next("head", 3, loads(), fits) == (None, None)


def test_one_that_cannot_is_refused_once_and_not_tried_again(repository, fits) -> None:
    heads = ModelSwap(repository, {})
    assert heads.next("head", 2, loads(3), fits) == (Swap("head", 3, "3 is damaged"), None)
    assert heads.next("head", 2, lambda version: pytest.fail(f"tried {version} again"), fits) == (None, None)
    assert heads.refused("head") == {3: "3 is damaged"}


def test_one_that_must_wait_is_tried_again(repository, fits) -> None:
    heads = ModelSwap(repository, {})
    assert heads.next("head", 2, lambda _: None, fits) == (None, None)
    assert heads.next("head", 2, loads(), fits) == (Swap("head", 3), "head 3")


def test_pin_that_cannot_be_read_is_said_once_and_the_old_head_goes_on(repository, fits) -> None:
    heads = ModelSwap(repository, {})
    (repository / "head" / choice.PINNED).write_text("nonsense")
    swap, head = heads.next("head", 3, loads(), fits)
    assert (swap.version, head) == (NO_VERSION, None)
    assert "must hold a version number alone" in swap.refused
    assert heads.next("head", 3, loads(), fits) == (None, None)


def test_pin_that_cannot_be_read_at_a_start_lets_the_version_serve_that_did_before(repository, fits) -> None:
    (repository / "head" / choice.PINNED).write_text("nonsense")
    heads = ModelSwap(repository, {}, before={"head": 2})
    assert heads.first("head", loads(), fits) == "head 2"
    assert "must hold a version number alone" in heads.refused("head")[NO_VERSION]
    assert heads.next("head", 2, loads(), fits) == (None, None), "it was said"
    (repository / "head" / choice.PINNED).unlink()
    assert heads.next("head", 2, loads(), fits) == (Swap("head", 3), "head 3")
    (repository / "head" / choice.PINNED).write_text("nonsense")
    for before in ({}, {"head": 9}):
        with pytest.raises(ModelMismatch, match="must hold a version number alone"):
            ModelSwap(repository, {}, before=before).first("head", loads(), fits)
    (repository / "head" / "2.withdrawn").write_text("bad")
    with pytest.raises(ModelMismatch):
        ModelSwap(repository, {}, before={"head": 2}).first("head", loads(), fits)


def test_it_is_known_without_loading_whether_another_version_waits(repository, fits) -> None:
    heads = ModelSwap(repository, {})
    assert heads.waits("head", 2)
    assert not heads.waits("head", 3)
    heads.next("head", 2, loads(3), fits)
    assert not heads.waits("head", 2), "a refused one is not tried again"
    (repository / "head" / choice.PINNED).write_text("nonsense")
    assert heads.waits("head", 2), "that the pin cannot be read is still to be said"
    heads.next("head", 2, loads(), fits)
    assert not heads.waits("head", 2)


def test_refusals_of_one_model_are_not_those_of_another(repository, fits) -> None:
    swaps = ModelSwap(repository, {})
    swaps.next("head", 2, loads(3), fits)
    assert swaps.refused("head") == {3: "3 is damaged"}
    assert swaps.refused("detector") == {}
