"""A model's identity is its content: the same on every machine, another as soon as an answer could be another."""

import pytest

from semwatch.models import model_repository
from semwatch.models.inference import Embedded
from semwatch.models.model_repository import Meta, Tensor

ROW, PAIR = Tensor(dtype="float32", shape=(9,)), Tensor(dtype="float32", shape=(2,))
HEAD = Meta(
    model="head", created_utc="2025-01-01T00:00:00Z", weights_sha256="a" * 64, inputs={"features": ROW},
    outputs={"logits": PAIR, "p_values": PAIR}, labels=("bridge", "void"), codes={"bridge": 7, "void": 8},
    encoder_sha256="e" * 64, provenance={"seed": 1},
)  # fmt: skip


def test_when_and_how_a_model_was_made_are_no_part_of_it() -> None:
    again = HEAD.model_copy(update={"created_utc": "2030-01-01T00:00:00Z", "provenance": {"seed": 2, "by": "me"}})
    assert again.content_sha256 == HEAD.content_sha256


def test_order_of_keys_is_no_part_of_it() -> None:
    turned = {"outputs": {"p_values": PAIR, "logits": PAIR}, "codes": {"void": 8, "bridge": 7}}
    assert HEAD.model_copy(update=turned).content_sha256 == HEAD.content_sha256


@pytest.mark.parametrize(
    "change",
    [
        {"weights_sha256": "b" * 64},
        {"labels": ("void", "bridge")},
        {"codes": {"bridge": 7}},
        {"encoder_sha256": "f" * 64},
        {"inputs": {"features": PAIR}},
        {"outputs": {"logits": PAIR, "p_values": PAIR, "more": ROW}},
        {"model": "encoder"},
        {"normal_scores": (0.5,)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_all_that_shapes_an_answer_is_part_of_it(change) -> None:
    assert HEAD.model_copy(update=change).content_sha256 != HEAD.content_sha256


def test_sixteen_digits_of_it_are_shown() -> None:
    assert len(HEAD.content_sha256) == 64
    assert HEAD.content_hash == HEAD.content_sha256[:16]


def test_republished_version_has_another_number_and_the_same_hash(tiny_repository, tmp_path) -> None:
    meta = model_repository.read_meta(tiny_repository, "detector", 1)
    for _ in range(2):
        version = model_repository.publish(tmp_path, meta, tiny_repository / "detector/1/model.onnx")
    assert version == 2
    assert model_repository.read_meta(tmp_path, "detector", 2).content_hash == meta.content_hash


def test_runtime_says_the_hash_beside_the_number(tiny_repository) -> None:
    with Embedded(tiny_repository, threads=1) as models:
        expected = {model: models.meta(model).content_hash for model in model_repository.MODELS}
        assert models.hashes() == expected
        assert len(set(expected.values())) == 3
