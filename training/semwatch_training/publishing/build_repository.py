"""Shipped weights to a model repository that serves: fetch the backbone, export, check, publish, skip what is there."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from semwatch.errors import ConfigError
from semwatch.models import crop_store, head_bank, model_repository
from semwatch.models.head_bank import Bank
from semwatch.system import files
from semwatch_training.discovery.head_run import CROPS_SUFFIX
from semwatch_training.families.exported import EncoderExport, export_of, family_of
from semwatch_training.publishing.export import publish, publish_head
from semwatch_training.publishing.head_families import load_head
from semwatch_training.trunks.backbone import Backbones

"""Folder of the weights that come with the package; MODEL_CARD.md there says how they were made."""
ENCODER = "smg_vit"
"""Family of the encoder where no file names another."""


def build(
    repository: Path,
    *,
    weights: Path,
    cache: Path,
    with_head: bool = True,
    memory: Path | None = None,
    encoder: str | None = None,
) -> Iterator[str]:
    """Publish detector, encoder and head unless this very content is published already; yield a line for each.

    Which family a file belongs to stands in its header. ``encoder.safetensors`` among the weights, if it is there, goes
    over the encoder's last layers; without it they are the trunk's own. ``memory`` is a file of another detector, such
    as ``memory_detector.save`` writes, to serve in the place of ``detector.safetensors``. ``encoder`` is the family of
    the encoder, None: that of its file.

    Raises:
        ConfigError: weights are absent, of an unknown family, or belong to another backbone or encoder.
        PublishError: an exported model differs from its original.
    """
    head_file, backbones = weights / "head.safetensors", Backbones(cache)
    if memory is None:
        yield f"detector {_publish_detector(repository, weights / 'detector.safetensors', 'ni', backbones)}"
    else:
        yield f"detector {_publish_detector(repository, memory, 'memory', backbones)}"
    encoder_version, form = _publish_encoder(repository, weights / "encoder.safetensors", encoder, backbones)
    yield f"encoder {encoder_version}"
    if not with_head:
        return
    head, encoder_form, provenance = load_head(head_file)
    if encoder_form != form:
        raise ConfigError(f"{head_file} was fitted on another encoder ({encoder_form}); fit it again")
    # An encoder published anew wants its head published anew: a head names the encoder's weights.
    served = model_repository.read_meta(repository, "encoder", encoder_version)
    bank, golden = (_bank(head_file, name) for name in (head_bank.BANK, head_bank.GOLDEN))
    _place_crops(repository, head_file.with_suffix(CROPS_SUFFIX), bank, golden)
    sizes = f"{len(bank or ())} and {len(golden or ())} crops"
    made_from = f"{_sha256(head_file)} with {sizes} on encoder {served.weights_sha256}"
    if (version := _published(repository, "head", made_from)) is None:
        version = publish_head(
            head, repository, encoder_version=encoder_version, provenance={**provenance, "made_from": made_from},
            bank=bank, golden=golden,
        )  # fmt: skip
    yield f"head {version}"


def _publish_detector(repository: Path, path: Path, otherwise: str, backbones: Backbones) -> int:
    """The detector's version; ``otherwise``: the family of a file that names none."""
    made_from = _sha256(path)
    if (version := _published(repository, "detector", made_from)) is not None:
        return version
    exported = export_of(family_of(path, otherwise=otherwise)).read(path, backbones)
    return publish(exported, repository, provenance={"made_from": made_from})


def _publish_encoder(repository: Path, path: Path, family: str | None, backbones: Backbones) -> tuple[int, str]:
    """The encoder's version, and what a head must have been fitted on to go with it."""
    trained = path if path.is_file() else None
    export = export_of(family or family_of(path, otherwise=ENCODER))
    if not hasattr(export, "form_of"):
        raise ConfigError(f"{family} is no family of encoders; name {ENCODER} or another one of them")
    exported = export.read(trained, backbones)
    made_from = hashlib.sha256(exported.form.encode()).hexdigest()
    if (version := _published(repository, "encoder", made_from)) is None:
        version = publish(exported, repository, provenance={"made_from": made_from})
    return version, exported.form


def _bank(head_file: Path, name: str) -> Bank | None:
    """Crops beside a head's weights, None where it came without."""
    path = head_file.with_suffix(f".{name}")
    return head_bank.read(path) if path.is_file() else None


def _place_crops(repository: Path, shard: Path, *banks: Bank | None) -> None:
    """Put the crops beside a head's weights into the repository, if its banks name them."""
    if not shard.is_file():
        return
    content = shard.read_bytes()
    named = {ref.shard for bank in banks if bank is not None for ref in bank.crops if ref is not None}
    if hashlib.sha256(content).hexdigest() not in named:
        raise ConfigError(f"{shard} holds other crops than this head was fitted on; fit it again, or delete the file")
    crop_store.place(repository, content)


def served_form(repository: Path) -> str:
    """What a head fitted on the repository's newest encoder is tied to, see ``exported.Exported.form``.

    Raises:
        ModelMismatch: there is no encoder.
        ConfigError: the encoder was built by another release.
    """
    newest = model_repository.latest(repository, "encoder")
    provenance = model_repository.read_meta(repository, "encoder", newest).provenance
    export = cast(EncoderExport, export_of(str(provenance.get("family", ENCODER))))
    text = export.form_of(provenance)
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
    return files.file_sha256(path)
