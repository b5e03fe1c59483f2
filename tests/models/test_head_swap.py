"""The one rule of which head serves, apart from what loads it."""

from pathlib import Path

import pytest

import toy_family
from semwatch.errors import ModelMismatch
from semwatch.models import choice, model_repository
from semwatch.models.head_swap import NO_VERSION, HeadSwap, Swap
from semwatch.models.model_repository import Meta


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Heads 1 to 3 of one encoder."""
    toy_family.publish_encoder(tmp_path)
    for _ in range(3):
        toy_family.publish_head(tmp_path)
    return tmp_path


@pytest.fixture
def encoder(repository: Path) -> Meta:
    return model_repository.read_meta(repository, "encoder", 1)


def loads(*damaged: int):
    def load(version: int) -> str:
        if version in damaged:
            raise ModelMismatch(f"{version} is damaged")
        return f"head {version}"

    return load


def test_newest_serves_at_a_start(repository, encoder) -> None:
    assert HeadSwap(repository, {}).first("head", loads(), encoder) == "head 3"


def test_pinned_one_serves_or_nothing(repository, encoder) -> None:
    assert HeadSwap(repository, {"head": 2}).first("head", loads(), encoder) == "head 2"
    with pytest.raises(ModelMismatch, match="2 is damaged"):
        HeadSwap(repository, {"head": 2}).first("head", loads(2), encoder)


def test_deputy_serves_where_the_wanted_one_cannot_and_the_wanted_one_alone_is_refused(repository, encoder) -> None:
    heads = HeadSwap(repository, {})
    assert heads.first("head", loads(3, 2), encoder) == "head 1"
    assert heads.refused() == {3: "3 is damaged"}


def test_where_none_can_serve_the_wanted_one_says_why(repository, encoder) -> None:
    with pytest.raises(ModelMismatch, match="3 is damaged"):
        HeadSwap(repository, {}).first("head", loads(1, 2, 3), encoder)


def test_head_of_another_encoder_is_not_even_loaded(repository, encoder) -> None:
    stranger = encoder.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(ModelMismatch, match="another encoder"):
        HeadSwap(repository, {}).first("head", lambda version: pytest.fail(f"loaded {version}"), stranger)
    assert HeadSwap(repository, {}).first("head", loads(), None) == "head 3"  # nobody asks


def test_next_one_takes_over_once(repository, encoder) -> None:
    heads = HeadSwap(repository, {})
    assert heads.next(2, loads(), encoder) == (Swap("head", 3), "head 3")
    assert heads.next(3, loads(), encoder) == (None, None)


def test_one_that_cannot_is_refused_once_and_not_tried_again(repository, encoder) -> None:
    heads = HeadSwap(repository, {})
    assert heads.next(2, loads(3), encoder) == (Swap("head", 3, "3 is damaged"), None)
    assert heads.next(2, lambda version: pytest.fail(f"tried {version} again"), encoder) == (None, None)
    assert heads.refused() == {3: "3 is damaged"}


def test_one_that_must_wait_is_tried_again(repository, encoder) -> None:
    heads = HeadSwap(repository, {})
    assert heads.next(2, lambda _: None, encoder) == (None, None)
    assert heads.next(2, loads(), encoder) == (Swap("head", 3), "head 3")


def test_pin_that_cannot_be_read_is_said_once_and_the_old_head_goes_on(repository, encoder) -> None:
    heads = HeadSwap(repository, {})
    (repository / "head" / choice.PINNED).write_text("nonsense")
    swap, head = heads.next(3, loads(), encoder)
    assert (swap.version, head) == (NO_VERSION, None)
    assert "must hold a version number alone" in swap.refused
    assert heads.next(3, loads(), encoder) == (None, None)
