"""The soft-mask guided encoder, as it is published."""

import json
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from semwatch.models.contract import FIELD_FEATURES, REGION_FEATURES
from semwatch.models.model_repository import Meta, Tensor
from semwatch.system import files
from semwatch.system.clock import utc_now
from semwatch_training.families.exported import Exported, Provenance, flat
from semwatch_training.families.smg_vit import self_supervision
from semwatch_training.families.smg_vit.smg_vit import EncoderForm, EncoderGraph, SmgVit
from semwatch_training.trunks import backbone
from semwatch_training.trunks.backbone import Backbones
from semwatch_training.trunks.efficientnet import FIELD_KIND, FIELD_WIDTH, PATCH_WIDTH

FAMILY = "smg_vit"
TRAINED = "trained_layers"
"""In an encoder's provenance: the hash of the file its last layers were taken from."""


def exported(graph: EncoderGraph, *, provenance: Provenance = MappingProxyType({}), form: str = "") -> Exported:
    """An encoder; ``form``: see ``form_text``."""
    shape, trunk = graph.vit.form, graph.vit.trunk.shape
    side = shape.input_px // trunk.patch
    asked = {
        "crop": Tensor(dtype="uint8", shape=(shape.input_px, shape.input_px)),
        "soft_mask": Tensor(dtype="float32", shape=(side, side)),
        "size": Tensor(dtype="float32", shape=(2,)),
    }
    made: dict[str, str | float | int] = {"family": FAMILY, **flat(asdict(shape)), "frozen_width": graph.frozen_width}
    if shape.field:
        asked[FIELD_FEATURES] = Tensor(dtype="float32", shape=(FIELD_WIDTH,))
        asked[REGION_FEATURES] = Tensor(dtype="float32", shape=(PATCH_WIDTH,))
        made[FIELD_FEATURES] = FIELD_KIND
    meta = Meta(
        model="encoder",
        created_utc=utc_now(),
        inputs=asked,
        outputs={"features": Tensor(dtype="float32", shape=(graph.width,))},
        provenance={**made, **provenance},
    )
    return Exported(graph, meta, form)


def read(path: Path | None, backbones: Backbones) -> Exported:
    """See ``exported.Export.read``; without a file the last layers are the trunk's own."""
    form = EncoderForm()
    vit = SmgVit(backbones.vit, form)
    provenance: dict[str, str | float | int] = {}
    if path is not None:
        provenance = {**self_supervision.load(path, vit), TRAINED: files.file_sha256(path)}
    graph = EncoderGraph(vit, backbones.efficientnet if form.second_trunk else None)
    return exported(graph, provenance=provenance, form=form_of(provenance))


def default_form() -> EncoderForm:
    """The form that is built and trained where nobody asks for another."""
    return EncoderForm()


def form_of(provenance: Provenance) -> str:
    """See ``exported.EncoderExport.form_of``."""
    return form_text(EncoderForm(), trained=str(provenance.get(TRAINED, "")))


def form_text(form: EncoderForm, *, trained: str = "") -> str:
    """An encoder's form, its backbones and, if any, the hash of its trained layers' file as one comparable string."""
    hashes = {"backbone": backbone.WHEEL_SHA256, "second_backbone": backbone.EFFICIENTNET_WHEEL_SHA256}
    if trained:
        hashes[TRAINED] = trained
    return json.dumps({**asdict(form), **hashes}, sort_keys=True)
