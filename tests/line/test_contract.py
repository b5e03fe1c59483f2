"""Any model whose contract the line can keep is served; any other is refused before it is loaded."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

import toy_family
from semwatch.defects import Review
from semwatch.errors import ModelMismatch
from semwatch.line import inputs
from semwatch.line.pipeline import review
from semwatch.line.scaling import resize
from semwatch.models import contract, model_repository
from semwatch.models.contract import check_contract
from semwatch.models.crop_store import KeptCrop
from semwatch.models.inference import Embedded
from semwatch.models.model_repository import Arrays, Meta
from semwatch.settings.recipe import Recipe
from semwatch.streams import records
from toy_family import CROP_PX, DETECTOR_PX, FIELD_HW, WIDTH, byte, real

OPEN = Recipe.model_validate({"gate": {"threshold": 0.0}})


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_family.publish_all(tmp_path_factory.mktemp("toys"))


def page() -> np.ndarray:
    """A gray field with one bright disc."""
    pixels = np.full((300, 400), 90, np.uint8)
    cv2.circle(pixels, (150, 120), 30, 220, cv2.FILLED)
    return pixels


def reviewed(models: Embedded) -> Review:
    data = cv2.imencode(".png", page())[1].tobytes()
    sha256 = hashlib.sha256(data).hexdigest()
    return review(
        data, source="t", path="a.png", sha256=sha256, recipe=OPEN, models=models, reviewed_utc="2025-01-01T00:00:00Z"
    )


# ---- a family of its own ----


def test_family_with_a_contract_of_its_own_runs_through_the_whole_line(toys) -> None:
    asked: dict[str, Arrays] = {}
    with Embedded(toys, threads=1) as models:
        infer = models.infer

        def noted(model: str, given: Arrays, *, backlog: bool = False):
            asked[model] = given
            return infer(model, given, backlog=backlog)

        models.infer = noted  # type: ignore[method-assign]
        (found,) = reviewed(models).pages
    assert {model: {name: array.shape for name, array in given.items()} for model, given in asked.items()} == {
        "detector": {"image": (1, DETECTOR_PX, DETECTOR_PX)},
        "encoder": {"crop": (1, CROP_PX, CROP_PX), "field": (1, *FIELD_HW)},
        "head": {"features": (1, WIDTH)},
    }
    assert np.array_equal(asked["encoder"]["field"][0], resize(page(), FIELD_HW))
    assert found.score_map.values.shape == (DETECTOR_PX // 8, DETECTOR_PX // 8)
    (defect,) = found.defects
    x0, y0, x1, y1 = defect.box_xyxy
    assert min(125 - x0, 95 - y0, x1 - 175, y1 - 145) >= 0
    assert np.array_equal(defect.crop, asked["encoder"]["crop"][0])
    assert defect.features.shape == (WIDTH,)
    assert defect.soft_mask.shape == (inputs.TOKENS, inputs.TOKENS)  # nobody asked: records and people look at it


def test_more_that_a_model_says_is_ignored(toys) -> None:
    with Embedded(toys, threads=1) as models:
        assert set(models.meta("detector").outputs) == {"score_map", "raw_score", "patches"}
        assert reviewed(models).pages[0].score_map.raw_score > 0


def test_what_a_foreign_family_calls_unknown_travels_as_a_record(toys) -> None:
    with Embedded(toys, threads=1) as models:
        said = reviewed(models)
    for record in records.records(said):
        assert records.decode(records.encode(record)).features.shape == (WIDTH,)


def test_pixels_come_as_floating_point_where_a_model_says_so() -> None:
    meta = meta_of("detector", {"image": real(20, 30)}, {"score_map": real(2, 3), "raw_score": real()})
    (image,) = inputs.for_detector(meta, page()).values()
    assert (image.dtype, image.shape, image.max()) == (np.float32, (1, 20, 30), 220)


# ---- what the detector says of the whole field ----

ROWS = DETECTOR_PX // 8
SAYS = {
    "score_map": real(ROWS, ROWS),
    "raw_score": real(),
    "field_features": real(ROWS),
    "patch_features": real(1, ROWS, ROWS),
}


def test_what_the_detector_says_reaches_encoder_and_record(tmp_path) -> None:
    toy_family.publish_detector(tmp_path, outputs=SAYS)
    toy_family.publish_listening_encoder(tmp_path)
    toy_family.publish_head(tmp_path)
    with Embedded(tmp_path, threads=1) as models:
        said = reviewed(models)
        (defect,) = said.pages[0].defects
        asked = inputs.for_detector(models.meta("detector"), page())
        patches = models.infer("detector", asked).outputs["patch_features"][0, 0]
    assert defect.field_features is not None
    assert defect.region_features is not None
    np.testing.assert_allclose(defect.field_features, patches.mean(axis=1), rtol=1e-5)
    assert patches.mean() + 50 < defect.region_features[0] <= patches.max()  # of the bright disc, not of the field
    np.testing.assert_array_equal(defect.features[-ROWS - 1 :], [*defect.field_features, *defect.region_features])
    for record in records.records(said):
        back = records.decode(records.encode(record))
        np.testing.assert_array_equal(back.field_features, defect.field_features)
        np.testing.assert_array_equal(back.region_features, defect.region_features)


def test_what_no_encoder_asks_for_is_not_carried(tmp_path) -> None:
    toy_family.publish_all(tmp_path)
    toy_family.publish_detector(tmp_path, outputs=SAYS)
    with Embedded(tmp_path, threads=1) as models:
        assert models.versions()["detector"] == 2
        said = reviewed(models)
    assert [(defect.field_features, defect.region_features) for defect in said.pages[0].defects] == [(None, None)]
    for record in records.records(said):
        assert not {b"field_features", b"region_features"} & records.encode(record).keys()


@pytest.mark.parametrize(
    ("of_detector", "of_encoder", "words"),
    [
        ({}, {}, "this detector gives no `field_features` to make them of: build detector and encoder of one release"),
        ({"outputs": SAYS}, {"width": 9}, "of width 9, and this detector's `field_features` have 12"),
        (
            {"outputs": {name: t for name, t in SAYS.items() if name != "patch_features"}},
            {},
            "asks for `region_features`, and this detector gives no `patch_features`",
        ),
        (
            {"outputs": SAYS, "provenance": {"field_features": "means"}},
            {"provenance": {"field_features": "Gram matrices"}},
            r"of another kind \(Gram matrices\) than this detector gives \(means\)",
        ),
    ],
)
def test_encoder_that_would_hear_other_things_than_it_was_made_for_is_refused(
    tmp_path, of_detector, of_encoder, words
) -> None:
    toy_family.publish_detector(tmp_path, **of_detector)
    toy_family.publish_listening_encoder(tmp_path, **of_encoder)
    with pytest.raises(ModelMismatch, match=words):
        Embedded(tmp_path, threads=1, models=("detector", "encoder"))
    Embedded(tmp_path, threads=1, models=("encoder",)).close()  # alone it hurts nobody


# ---- what is refused, and when ----


def test_encoder_that_asks_for_the_phase_of_the_moon_is_refused_in_words(tmp_path) -> None:
    toy_family.publish_detector(tmp_path)
    toy_family.publish_encoder(tmp_path, phase_of_the_moon=real(1))
    with pytest.raises(
        ModelMismatch,
        match=r"^this encoder asks for `phase_of_the_moon`, which the line cannot give; what it can give: "
        r"`crop`, `soft_mask`, `size`, `field`, `field_features`, `region_features`$",
    ):
        Embedded(tmp_path, threads=1, models=("detector", "encoder"))


def test_refusal_comes_before_the_weights_are_read(tmp_path) -> None:
    toy_family.publish_encoder(tmp_path, moon=real(1))
    (tmp_path / "encoder/1/model.onnx").write_bytes(b"damaged")
    with pytest.raises(ModelMismatch, match="moon"):
        Embedded(tmp_path, threads=1, models=("encoder",))


def test_head_that_needs_more_than_features_is_refused_and_the_one_before_serves(toys, tmp_path) -> None:
    toy_family.publish_all(tmp_path)
    meta = model_repository.read_meta(tmp_path, "head", 1)
    asking = meta.model_copy(update={"inputs": {**meta.inputs, "pixel_nm": real(1)}})
    model_repository.publish(tmp_path, asking, tmp_path / "head/1/model.onnx")
    with Embedded(tmp_path, threads=1) as models:
        assert models.versions()["head"] == 1
        assert models.refused()[2].startswith("this head asks for `pixel_nm`, which the line cannot give")


def meta_of(model, given, said) -> Meta:
    return Meta(model=model, created_utc="now", inputs=given, outputs=said)


MAPS = {"score_map": real(12, 12), "raw_score": real()}


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        (meta_of("detector", {}, MAPS), "takes no input"),
        (meta_of("detector", {"image": byte(96, 96)}, {"score_map": real(12, 12)}), "gives no `raw_score`; the line"),
        (meta_of("detector", {"image": byte(96, 96)}, {}), "gives no `score_map`, `raw_score`"),
        (meta_of("detector", {"image": byte(3, 96, 96)}, MAPS), "image as 3 x 96 x 96 of uint8; the line gives"),
        (meta_of("detector", {"image": byte(0, 96)}, MAPS), "image as 0 x 96"),
        (meta_of("detector", {"image": byte(96, 96)}, {**MAPS, "raw_score": real(1)}), "raw_score as 1 of float32"),
        (
            meta_of("detector", {"image": byte(96, 96)}, {**MAPS, "score_map": byte(9, 9)}),
            "score_map as 9 x 9 of uint8",
        ),
        (meta_of("detector", {"image": byte(96, 96)}, {**MAPS, "domain_p": real(2)}), "domain_p as 2 of float32"),
        (meta_of("encoder", {"crop": byte(40, 41)}, {"features": real(9)}), "any x any, square, uint8 or float32"),
        (meta_of("encoder", {"size": real(3)}, {"features": real(9)}), "size as 3 of float32; the line gives log2"),
        (meta_of("encoder", {"soft_mask": byte(16, 16)}, {"features": real(9)}), "soft_mask as 16 x 16 of uint8"),
        (meta_of("encoder", {"image": byte(40, 40)}, {"features": real(9)}), "asks for `image`, which the line cannot"),
        (
            meta_of("detector", {"image": byte(96, 96)}, {**MAPS, "field_features": real(3, 3)}),
            "field_features as 3 x 3 of float32",
        ),
        (meta_of("head", {"features": real(9)}, {"logits": real(2)}), "gives no `p_values`"),
    ],
)
def test_contract_that_the_line_cannot_keep_is_refused_in_words(meta, words) -> None:
    with pytest.raises(ModelMismatch) as refusal:
        check_contract(meta)
    assert words in str(refusal.value)


def test_shipped_contracts_can_be_kept(repository) -> None:
    for model in model_repository.MODELS:
        check_contract(model_repository.read_meta(repository, model, model_repository.latest(repository, model)))


# ---- the table and its builders ----


def test_line_builds_every_input_that_the_contract_offers() -> None:
    built = {
        "detector": set(inputs.OF_FIELD),
        "encoder": set(inputs.OF_VIEW),
        "head": set(inputs.for_head(np.zeros(1))),
    }
    assert built == {model: set(offered) for model, offered in contract.INPUTS.items()}
    assert set(contract.OF_A_CROP) < set(contract.INPUTS["encoder"])


def test_kept_crop_cannot_show_an_encoder_its_field(toys) -> None:
    encoder = model_repository.read_meta(toys, "encoder", 1)
    kept = KeptCrop(np.zeros((CROP_PX, CROP_PX), np.uint8), np.zeros((4, 4), np.float32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="2 of 2 crops have no field"):
        inputs.for_encoder(encoder, [kept, kept])
