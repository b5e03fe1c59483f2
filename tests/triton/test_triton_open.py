"""Detectors that take a field at any size, on a real Triton: the same answers as embedded."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import toy_family
from semwatch.errors import ModelMismatch
from semwatch.models.contract import FIELD_SIDES_PX
from semwatch.models.inference import Embedded
from semwatch.models.model_repository import Arrays
from semwatch.triton.client import Triton
from semwatch.triton.config import max_batch
from semwatch_training.families.intrinsic.export import exported
from semwatch_training.publishing.export import publish
from tiny_models import intrinsic_graph
from triton_server import running

INTRINSIC, MEANS = {"detector": 1}, {"detector": 2}


@pytest.fixture(scope="module")
def served(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server that holds two of them: the intrinsic one with random weights, and patch means."""
    repository = tmp_path_factory.mktemp("open") / "models"
    assert publish(exported(intrinsic_graph(), normal_scores=[0.1]), repository) == 1
    assert toy_family.publish_open_detector(repository) == 2
    with running(installed, repository) as server:
        yield server.url, repository


def fields(n: int, height: int, width: int) -> Arrays:
    return {"image": np.random.default_rng(height).integers(0, 256, (n, height, width), dtype=np.uint8)}


def test_fields_of_two_sizes_are_answered_as_embedded(served: tuple[str, Path]) -> None:
    url, repository = served
    only = ("detector",)
    with (
        Triton(repository, url=url, pins=INTRINSIC, models=only) as triton,
        Embedded(repository, threads=1, pins=INTRINSIC, models=only) as embedded,
    ):
        for n, height, width in ((1, 128, 192), (3, 96, 64), (1, 128, 192)):
            ours, theirs = (models.infer("detector", fields(n, height, width)) for models in (triton, embedded))
            assert ours.id == theirs.id
            assert ours.outputs["score_map"].shape == (n, height // 8, width // 8)
            assert ours.outputs["raw_score"].shape == (n,)
            assert ours.outputs.keys() == theirs.outputs.keys()
            for name, values in theirs.outputs.items():
                np.testing.assert_allclose(ours.outputs[name], values, rtol=1e-4, atol=1e-4)


def test_more_of_the_largest_fields_than_a_request_holds_are_answered(served: tuple[str, Path]) -> None:
    url, repository = served
    side = FIELD_SIDES_PX.largest
    with Triton(repository, url=url, pins=MEANS, models=("detector",)) as triton:
        n = max_batch(triton.meta("detector")) + 1
        asked = fields(n, side, side)
        found = triton.infer("detector", asked).outputs
    means = asked["image"].reshape(n, side // 8, 8, side // 8, 8).mean(axis=(2, 4))
    expected = np.abs(means - means.mean(axis=(1, 2), keepdims=True))
    np.testing.assert_allclose(found["score_map"], expected, atol=1e-2)
    np.testing.assert_allclose(found["raw_score"], expected.max(axis=(1, 2)), atol=1e-2)


def test_no_field_at_all_is_answered_with_none(served: tuple[str, Path]) -> None:
    url, repository = served
    with Triton(repository, url=url, pins=MEANS, models=("detector",)) as triton:
        found = triton.infer("detector", fields(0, 64, 64)).outputs
    assert (found["score_map"].shape, found["raw_score"].shape) == ((0, 0, 0), (0,))


def test_wrong_kind_of_field_is_refused_before_it_is_sent(served: tuple[str, Path]) -> None:
    url, repository = served
    with Triton(repository, url=url, pins=MEANS, models=("detector",)) as triton:
        for image in (
            np.zeros((1, 64), np.uint8),
            np.zeros((1, 64, 64), np.float32),
            np.zeros((1, 3, 64, 64), np.uint8),
        ):
            with pytest.raises(ModelMismatch, match="the detector wants"):
                triton.infer("detector", {"image": image})


def test_fields_of_different_sizes_that_wait_together_get_their_own_answers(served: tuple[str, Path]) -> None:
    url, repository = served
    sizes = [(64, 64), (64, 128), (64, 64), (96, 64), (64, 128), (64, 64)]
    found: dict[int, Arrays] = {}
    with (
        Triton(repository, url=url, pins=INTRINSIC, models=("detector",), timeout_s=60) as triton,
        Embedded(repository, threads=1, pins=INTRINSIC, models=("detector",)) as embedded,
    ):
        asked = [
            {"image": np.random.default_rng(k).integers(0, 256, (1, *size), dtype=np.uint8)}
            for k, size in enumerate(sizes)
        ]

        def ask(k: int) -> None:
            found[k] = triton.infer("detector", asked[k]).outputs

        askers = [threading.Thread(target=ask, args=(k,)) for k in range(len(sizes))]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(60)
        for k, inputs in enumerate(asked):
            expected = embedded.infer("detector", inputs).outputs
            np.testing.assert_allclose(found[k]["score_map"], expected["score_map"], rtol=1e-4, atol=1e-4)
