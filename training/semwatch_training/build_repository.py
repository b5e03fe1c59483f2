"""Shipped weights to a model repository that serves: fetch the backbone, export, check, publish, skip what is there."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from semwatch import model_repository
from semwatch.errors import ConfigError
from semwatch_training import backbone, train_detector
from semwatch_training.export import publish_detector, publish_encoder, publish_head
from semwatch_training.head import load_head
from semwatch_training.smg_vit import EncoderForm, EncoderGraph, SmgVit

SHIPPED = Path(__file__).with_name("weights")
"""Folder of the weights that come with the package; MODEL_CARD.md there says how they were made."""


def build(repository: Path, *, weights: Path, cache: Path, with_head: bool = True) -> Iterator[str]:
    """Publish detector, encoder and head unless this very content is published already; yield a line for each.

    Raises:
        ConfigError: weights are absent, or belong to another backbone or encoder.
        PublishError: an exported model differs from its original.
    """
    form = EncoderForm()
    detector_file, head_file = weights / "detector.safetensors", weights / "head.safetensors"
    trunk = backbone.load(cache)
    made_from = _sha256(detector_file)
    if (version := _published(repository, "detector", made_from)) is None:
        detector, normal_scores, provenance = train_detector.load(detector_file)
        trained_on = detector.form.trunk, provenance.get("backbone", backbone.WHEEL_SHA256)
        if trained_on != (backbone.TRUNK_NAME, backbone.WHEEL_SHA256):
            raise ConfigError(
                f"{detector_file} was trained on another backbone ({trained_on[0]}) than the one that is built in; "
                f"train it again without --trunk and --checkpoint"
            )
        version = publish_detector(
            train_detector.with_trunk(trunk, detector),
            repository,
            normal_scores=normal_scores,
            provenance={**provenance, "made_from": made_from},
        )
    yield f"detector {version}"
    made_from = hashlib.sha256(form_text(form).encode()).hexdigest()
    if (encoder_version := _published(repository, "encoder", made_from)) is None:
        graph = EncoderGraph(SmgVit(trunk, form))
        encoder_version = publish_encoder(graph, repository, provenance={"made_from": made_from})
    yield f"encoder {encoder_version}"
    if not with_head:
        return
    head, encoder_form, provenance = load_head(head_file)
    if encoder_form != form_text(form):
        raise ConfigError(f"{head_file} was fitted on another encoder ({encoder_form}); fit it again")
    # An encoder published anew wants its head published anew: a head names the encoder's weights.
    encoder = model_repository.read_meta(repository, "encoder", encoder_version)
    made_from = f"{_sha256(head_file)} on encoder {encoder.weights_sha256}"
    if (version := _published(repository, "head", made_from)) is None:
        version = publish_head(
            head, repository, encoder_version=encoder_version, provenance={**provenance, "made_from": made_from}
        )
    yield f"head {version}"


def form_text(form: EncoderForm) -> str:
    """An encoder's form and backbone as one comparable string."""
    return json.dumps({**asdict(form), "backbone": backbone.WHEEL_SHA256}, sort_keys=True)


def _published(repository: Path, model: str, made_from: str) -> int | None:
    for version in reversed(model_repository.versions(repository, model)):
        if model_repository.read_meta(repository, model, version).provenance.get("made_from") == made_from:
            return version
    return None


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"no weights at {path}; name the folder that holds them with --weights")
    return model_repository.file_sha256(path)
