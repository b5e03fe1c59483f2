"""What a head was fitted on can be encoded again: crops kept by a cycle, and a head fitted for another encoder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis
from onnx import TensorProto, helper

import commands
import toy_family
from commands import Command, in_process
from learning_site import INPUT_PX, TOKENS, Lab, make_lab
from semwatch.errors import ConfigError, ModelMismatch
from semwatch.line import inputs
from semwatch.line.scaling import resize
from semwatch.models import crop_store, head_bank, model_repository
from semwatch.models.crop_store import KeptCrop
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch_training.__main__ import main
from semwatch_training.learning import cycle_report
from semwatch_training.learning.archive import ARCHIVE, Archive
from semwatch_training.learning.refit import encoded_again, refit
from semwatch_training.learning.retrain import run_cycle
from toy_family import byte, real

LEVELS = {"bridge": 40, "defect-free": 120, "particle": 200}
"""How bright the crops of a class are: an encoder of patch means tells them apart."""
SIDE = 32
"""Of the other encoder's crops, which are smaller than those that are kept."""


@pytest.fixture
def lab(tmp_path: Path, tiny_repository: Path, client: redis.Redis, server: EmbeddedRedis) -> Lab:
    return make_lab(tmp_path / "site", tiny_repository, client, server.url)


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(commands, "main", main)
    return in_process(capsys, monkeypatch)


def publish_encoder(repository: Path, **more: object) -> int:
    """An encoder of another family: patch means of a small crop, weighed by nothing."""
    asked = {"crop": byte(SIDE, SIDE), "size": real(2), **more}
    nodes = [
        helper.make_node("Cast", ["crop"], ["gray"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["gray", "full"], ["unit"]),
        helper.make_node("Unsqueeze", ["unit", "one"], ["plane"]),
        helper.make_node("AveragePool", ["plane"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("Concat", ["means", "size"], ["features"], axis=1),
    ]
    constants = {"one": np.array([1], np.int64), "full": np.float32(255)}
    width = (SIDE // 8) ** 2 + 2
    return toy_family.publish(
        repository, "encoder", asked, {"features": real(width)}, nodes, constants, provenance={"frozen_width": width}
    )


def looks(label: str, n: int, seed: int) -> list[KeptCrop]:
    """Crops as bright as their class."""
    rng = np.random.default_rng(seed)
    return [
        KeptCrop(
            rng.integers(LEVELS[label] - 20, LEVELS[label] + 20, (INPUT_PX, INPUT_PX), dtype=np.uint8),
            rng.random((TOKENS, TOKENS), dtype=np.float32),
            np.float32([-3, -4]),
        )
        for _ in range(n)
    ]


def keep_all(repository: Path, *, but: str = "") -> int:
    """Publish the head once more, with a crop kept for every row of its banks, ``but`` those of one class."""
    folder, beside = repository / "head" / "1", {}
    for first, name in ((0, head_bank.BANK), (1000, head_bank.GOLDEN)):
        bank = head_bank.read(folder / name)
        crops = [looks(label, 1, seed=first + i)[0] for i, label in enumerate(bank.labels)]
        refs = crop_store.write(repository, crops)
        kept = tuple(None if label == but else ref for label, ref in zip(bank.labels, refs, strict=True))
        beside[name] = repository.parent / name
        head_bank.write(replace(bank, crops=kept), beside[name])
    meta = model_repository.read_meta(repository, "head", 1)
    return model_repository.publish(repository, meta, folder / "model.onnx", beside=beside)


# --- a cycle keeps what it learns ------------------------------------------------------------------------------------


def test_cycle_keeps_the_crops_that_it_learns_and_the_golden_ones(lab: Lab, monkeypatch) -> None:
    monkeypatch.setattr(cycle_report, "MAX_POINTS", 40)
    monkeypatch.setattr(cycle_report, "DPI", 25)
    lab.add([*lab.blob(5, 24), *lab.blob(6, 20)])
    assert run_cycle(lab.site).status == "learned"
    for name in (head_bank.BANK, head_bank.GOLDEN):
        bank = lab.bank(name)
        assert [ref is not None for ref in bank.crops] == [bool(id_) for id_ in bank.ids]
        found = head_bank.crops_of(bank, lab.repository)
        with Archive(lab.learning / ARCHIVE, read_only=True) as archive:
            for id_, kept in zip(bank.ids, found, strict=True):
                if kept is not None:
                    record = archive.read(id_)
                    assert np.array_equal(kept.crop, record.crop)
                    np.testing.assert_allclose(kept.soft_mask, record.soft_mask, rtol=1e-3, atol=1e-6)
                    np.testing.assert_allclose(kept.size, np.log2([56 / 200, 300**0.5 / 200]), rtol=1e-6)
    n_kept = sum(ref is not None for name in (head_bank.BANK, head_bank.GOLDEN) for ref in lab.bank(name).crops)
    assert n_kept == 44


def test_crops_of_a_cycle_that_was_refused_leave_no_shard(lab: Lab, monkeypatch) -> None:
    monkeypatch.setattr(cycle_report, "MAX_POINTS", 40)
    monkeypatch.setattr(cycle_report, "DPI", 25)
    lab.recipe(promotion={"max_unknown_rate": 1e-9}, unknown={"significance": 0.5})
    lab.add([*lab.blob(5, 24), *lab.blob(6, 20)])
    assert run_cycle(lab.site).status == "refused"
    assert not (lab.repository / crop_store.CROPS).exists()


# --- another encoder looks at them -----------------------------------------------------------------------------------


def test_head_is_fitted_for_another_encoder_and_names_what_it_sees(lab: Lab, train: Command) -> None:
    keep_all(lab.repository)
    encoder = publish_encoder(lab.repository)
    result = train("refit", "--repository", lab.repository, "--encoder", encoder)
    assert (result.code, "head 3 reads encoder 2; both serve from the daemon's next start" in result.words) == (0, True)
    assert "left out" not in result.words
    before = head_bank.read(lab.repository / "head" / "2" / head_bank.BANK)
    after = head_bank.read(lab.repository / "head" / "3" / head_bank.BANK)
    assert (after.labels, after.images, after.crops) == (before.labels, before.images, before.crops)
    assert after.features.shape == (len(before), (SIDE // 8) ** 2 + 2)
    with Embedded(lab.repository, threads=1) as models:
        assert models.versions() == {"detector": 1, "encoder": 2, "head": 3}
        for label in LEVELS:
            fresh = [replace(crop, crop=resize(crop.crop, (SIDE, SIDE))) for crop in looks(label, 20, seed=10_000)]
            asked = inputs.for_encoder(models.meta("encoder"), fresh)
            features = models.infer("encoder", asked).outputs["features"]
            answer = models.infer("head", {"features": features})
            named = [answer.meta.labels[k] for k in answer.outputs["logits"].argmax(axis=1)]
            assert named == [label] * 20


def test_head_stays_with_the_encoder_that_it_was_fitted_on_where_no_other_is_named(lab: Lab) -> None:
    encoder = model_repository.read_meta(lab.repository, "encoder", 1).weights_sha256
    publish_encoder(lab.repository)  # the newest, which this head does not fit
    made = refit(lab.repository, without=["bridge"])
    assert model_repository.read_meta(lab.repository, "head", made.version).encoder_sha256 == encoder


def test_encoding_again_gives_the_features_that_the_encoder_gives_the_line(lab: Lab) -> None:
    """With the encoder that the crops were cut for, nothing differs but the soft mask's last digits."""
    rng = np.random.default_rng(0)
    crops = [
        KeptCrop(
            rng.integers(0, 256, (INPUT_PX, INPUT_PX), dtype=np.uint8),
            rng.random((TOKENS, TOKENS), dtype=np.float32),
            rng.normal(size=2).astype(np.float32),
        )
        for _ in range(19)
    ]
    refs = crop_store.write(lab.repository, crops)
    with Embedded(lab.repository, threads=1, models=("encoder",)) as models:
        expected = models.infer("encoder", inputs.for_encoder(models.meta("encoder"), crops)).outputs["features"]
        bank = Bank(np.zeros((19, lab.width), np.float32), ("a",) * 19, ("i",) * 19, ("",) * 19, tuple(refs))
        found = encoded_again(bank, lab.repository, models).features
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.99999


def test_class_whose_crops_nobody_kept_is_refused_until_it_is_given_up(lab: Lab, train: Command) -> None:
    encoder = publish_encoder(lab.repository)
    with pytest.raises(ConfigError, match=r"too few crops of bridge \(0\), defect-free \(0\), particle \(0\) are kept"):
        refit(lab.repository, encoder=encoder)
    keep_all(lab.repository, but="bridge")
    with pytest.raises(ConfigError, match=r"too few crops of bridge \(0\) are kept, 5 of a class are needed"):
        refit(lab.repository, encoder=encoder)
    result = train("refit", "--repository", lab.repository, "--encoder", encoder, "--without", "bridge")
    assert result.code == 0, result.words
    assert lab.labels == ("defect-free", "particle")


def test_crops_that_nobody_kept_are_left_out_and_counted(lab: Lab) -> None:
    keep_all(lab.repository)
    folder = lab.repository / "head" / "2"
    bank = head_bank.read(folder / head_bank.BANK)
    some = tuple(None if i < 6 else ref for i, ref in enumerate(bank.crops))
    head_bank.write(replace(bank, crops=some), folder / head_bank.BANK)
    made = refit(lab.repository, encoder=publish_encoder(lab.repository))
    assert made.n_left_out == 6
    assert len(head_bank.read(lab.repository / "head" / str(made.version) / head_bank.BANK)) == len(bank) - 6


def test_encoder_that_wants_the_field_cannot_look_at_kept_crops(lab: Lab) -> None:
    keep_all(lab.repository)
    encoder = publish_encoder(lab.repository, field=byte(40, 40))
    with pytest.raises(ConfigError, match="encoder 2 asks for field, which no kept crop has"):
        refit(lab.repository, encoder=encoder)


def test_encoder_that_asks_about_the_field_takes_the_crops_that_were_kept_with_an_answer(lab: Lab) -> None:
    keep_all(lab.repository)
    encoder = publish_encoder(lab.repository, field_features=real(3))
    with pytest.raises(ConfigError, match=r"too few crops of bridge \(0\), defect-free \(0\), particle \(0\) are kept"):
        refit(lab.repository, encoder=encoder)
    said = np.float32([1, 2, 3])
    crops = [*looks("bridge", 2, seed=0), *(replace(c, field_features=said) for c in looks("bridge", 3, seed=9))]
    refs = tuple(crop_store.write(lab.repository, crops))
    bank = Bank(np.zeros((5, lab.width), np.float32), ("a",) * 5, tuple("abcde"), ("",) * 5, refs)
    with Embedded(lab.repository, threads=1, models=("encoder",), pins={"encoder": encoder}) as models:
        assert encoded_again(bank, lab.repository, models).images == ("c", "d", "e")


def test_absent_encoder_shard_and_request_are_refused(lab: Lab, train: Command) -> None:
    keep_all(lab.repository)
    with pytest.raises(ModelMismatch, match="encoder version 9 is not in the model repository"):
        refit(lab.repository, encoder=9)
    next((lab.repository / crop_store.CROPS).iterdir()).unlink()
    with pytest.raises(ModelMismatch, match="crops are not there"):
        refit(lab.repository, encoder=publish_encoder(lab.repository))
    result = train("refit", "--repository", lab.repository)
    assert (result.code, "give a class to leave out, --without, or" in result.words) == (2, True)
    assert lab.versions() == [1, 2]
