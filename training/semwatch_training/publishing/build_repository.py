"""Shipped weights to a model repository that serves: fetch the backbone, export, check, publish, skip what is there."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from semwatch.errors import ConfigError
from semwatch.models import head_bank, model_repository
from semwatch.models.head_bank import Bank
from semwatch_training.discovery.head import load_head
from semwatch_training.families.memory import memory_detector
from semwatch_training.families.memory.memory_detector import MemoryGraph, Trunks
from semwatch_training.families.ni import train_detector
from semwatch_training.families.smg_vit import self_supervision
from semwatch_training.families.smg_vit.smg_vit import EncoderForm, EncoderGraph, SmgVit
from semwatch_training.publishing.export import publish_detector, publish_encoder, publish_head
from semwatch_training.trunks import backbone
from semwatch_training.trunks.efficientnet import EfficientNet
from semwatch_training.trunks.vit import VisionTransformer

SHIPPED = Path(__file__).with_name("weights")
"""Folder of the weights that come with the package; MODEL_CARD.md there says how they were made."""
TRAINED = "trained_layers"
"""In an encoder's provenance: the hash of the file its last layers were taken from."""


def build(
    repository: Path, *, weights: Path, cache: Path, with_head: bool = True, memory: Path | None = None
) -> Iterator[str]:
    """Publish detector, encoder and head unless this very content is published already; yield a line for each.

    ``encoder.safetensors`` among the weights, if it is there, goes over the encoder's last layers; without it they are
    the trunk's own. ``memory`` is a file of ``memory_detector.save``, to serve in the place of the detector.

    Raises:
        ConfigError: weights are absent, or belong to another backbone or encoder.
        PublishError: an exported model differs from its original.
    """
    head_file = weights / "head.safetensors"
    trunk = backbone.load(cache)
    if memory is None:
        yield f"detector {_publish_trained(repository, weights / 'detector.safetensors', trunk, cache)}"
    else:
        yield f"detector {_publish_memory(repository, memory, trunk, cache)}"
    encoder_version, form = _publish_encoder(repository, weights / "encoder.safetensors", trunk, cache)
    yield f"encoder {encoder_version}"
    if not with_head:
        return
    head, encoder_form, provenance = load_head(head_file)
    if encoder_form != form:
        raise ConfigError(f"{head_file} was fitted on another encoder ({encoder_form}); fit it again")
    # An encoder published anew wants its head published anew: a head names the encoder's weights.
    encoder = model_repository.read_meta(repository, "encoder", encoder_version)
    bank, golden = (_bank(head_file, name) for name in (head_bank.BANK, head_bank.GOLDEN))
    sizes = f"{len(bank or ())} and {len(golden or ())} crops"
    made_from = f"{_sha256(head_file)} with {sizes} on encoder {encoder.weights_sha256}"
    if (version := _published(repository, "head", made_from)) is None:
        version = publish_head(
            head, repository, encoder_version=encoder_version, provenance={**provenance, "made_from": made_from},
            bank=bank, golden=golden,
        )  # fmt: skip
    yield f"head {version}"


def _publish_trained(repository: Path, path: Path, trunk: VisionTransformer, cache: Path) -> int:
    made_from = _sha256(path)
    if (version := _published(repository, "detector", made_from)) is not None:
        return version
    detector, normal_scores, provenance = train_detector.load(path)
    ours = {"backbone": backbone.WHEEL_SHA256, "branch_trunk": backbone.EFFICIENTNET_WHEEL_SHA256}
    foreign = [name for name, sha256 in ours.items() if provenance.get(name, sha256) != sha256]
    if foreign or detector.form.trunk != backbone.TRUNK_NAME:
        raise ConfigError(
            f"{path} was trained on another backbone ({', '.join(foreign) or detector.form.trunk}) than the one that "
            f"is built in; train it again without --trunk and --checkpoint"
        )
    return publish_detector(
        train_detector.with_trunk(trunk, detector, _second(cache, detector.form.branch is not None)),
        repository,
        normal_scores=normal_scores,
        provenance={**provenance, "made_from": made_from},
    )


def _publish_memory(repository: Path, path: Path, trunk: VisionTransformer, cache: Path) -> int:
    made_from = _sha256(path)
    if (version := _published(repository, "detector", made_from)) is not None:
        return version
    kept = memory_detector.load(path)
    graph = MemoryGraph(Trunks(trunk, backbone.load_efficientnet(cache)), kept)
    return publish_detector(
        graph, repository, normal_scores=kept.normal_scores, provenance={"engine": "memory", "made_from": made_from}
    )


def _publish_encoder(repository: Path, path: Path, trunk: VisionTransformer, cache: Path) -> tuple[int, str]:
    """The encoder's version, and what a head must have been fitted on to go with it."""
    form = EncoderForm()
    vit = SmgVit(trunk, form)
    provenance: dict[str, str | float | int] = {}
    if path.is_file():
        provenance = {**self_supervision.load(path, vit), TRAINED: model_repository.file_sha256(path)}
    text = form_text(form, trained=str(provenance.get(TRAINED, "")))
    made_from = hashlib.sha256(text.encode()).hexdigest()
    if (version := _published(repository, "encoder", made_from)) is None:
        graph = EncoderGraph(vit, _second(cache, form.second_trunk != ""))
        version = publish_encoder(graph, repository, provenance={**provenance, "made_from": made_from})
    return version, text


def _bank(head_file: Path, name: str) -> Bank | None:
    """Crops beside a head's weights, None where it came without."""
    path = head_file.with_suffix(f".{name}")
    return head_bank.read(path) if path.is_file() else None


def _second(cache: Path, wanted: bool) -> EfficientNet | None:
    return backbone.load_efficientnet(cache) if wanted else None


def form_text(form: EncoderForm, *, trained: str = "") -> str:
    """An encoder's form, its backbones and, if any, the hash of its trained layers' file as one comparable string."""
    hashes = {"backbone": backbone.WHEEL_SHA256, "second_backbone": backbone.EFFICIENTNET_WHEEL_SHA256}
    if trained:
        hashes[TRAINED] = trained
    return json.dumps({**asdict(form), **hashes}, sort_keys=True)


def served_form(repository: Path) -> str:
    """What a head fitted on the repository's newest encoder is tied to, see ``form_text``.

    Raises:
        ModelMismatch: there is no encoder.
        ConfigError: the encoder was built by another release.
    """
    provenance = model_repository.read_meta(
        repository, "encoder", model_repository.latest(repository, "encoder")
    ).provenance
    text = form_text(EncoderForm(), trained=str(provenance.get(TRAINED, "")))
    made_from = hashlib.sha256(text.encode()).hexdigest()
    if provenance.get("made_from", made_from) != made_from:
        raise ConfigError(f"the encoder in {repository} was built by another release; build the repository again")
    return text


def _published(repository: Path, model: str, made_from: str) -> int | None:
    """The latest version, if it is made of this: an older one is not what the daemon serves."""
    for version in model_repository.versions(repository, model)[-1:]:
        if model_repository.read_meta(repository, model, version).provenance.get("made_from") == made_from:
            return version
    return None


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"no weights at {path}; name the folder that holds them with --weights")
    return model_repository.file_sha256(path)
