"""What the line gives to models: exactly the inputs that a model's contract names, at the shapes and dtypes it names.

Which inputs there are stands in ``models.contract``; a model that asks for another is not loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from semwatch.line.scaling import resize
from semwatch.models.contract import FIELD_FEATURES, REGION_FEATURES
from semwatch.models.model_repository import Arrays, Meta, Tensor

CROP_PX, TOKENS = 224, 16
"""Sides of crop and soft mask for an encoder that asks for neither: people and records look at them all the same."""


class View(Protocol):
    """One defect as encoders may see it."""

    @property
    def crop(self) -> NDArray[np.uint8]:
        """(S, S) gray."""

    @property
    def soft_mask(self) -> NDArray[np.float32]:
        """(t, t) in [0, 1]."""

    @property
    def size(self) -> NDArray[np.float32]:
        """(2,), see ``classification.size_feature``."""

    @property
    def field(self) -> NDArray[np.uint8] | None:
        """(H, W) gray: the whole field, None where the encoder does not ask for it."""

    @property
    def field_features(self) -> NDArray[np.float32] | None:
        """(D,) what the detector says of the whole field, None where the encoder does not ask for it."""

    @property
    def region_features(self) -> NDArray[np.float32] | None:
        """(C,) what the detector says of the defect's places, None where the encoder does not ask for it."""


OF_FIELD: Mapping[str, Callable[[NDArray[np.uint8], Tensor], NDArray[np.uint8]]] = MappingProxyType(
    {"image": lambda field, asked: field if asked.is_open else resize(field, (asked.shape[0], asked.shape[1]))}
)
"""How each input of a detector is made of the field."""

OF_VIEW: Mapping[str, Callable[[View], "NDArray[np.uint8] | NDArray[np.float32] | None"]] = MappingProxyType(
    {
        "crop": lambda view: view.crop,
        "soft_mask": lambda view: view.soft_mask,
        "size": lambda view: view.size,
        "field": lambda view: view.field,
        "field_features": lambda view: view.field_features,
        "region_features": lambda view: view.region_features,
    }
)
"""Which part of a view each input of an encoder is; ``crop_px``, ``tokens``, ``whole_field`` say how large to cut."""


def for_detector(detector: Meta, field: NDArray[np.uint8]) -> Arrays:
    """What a detector asks for of one field (H, W) gray, or of one tile of it: a batch of one."""
    asked = detector.inputs
    return {name: OF_FIELD[name](field, asked[name])[np.newaxis].astype(asked[name].dtype) for name in asked}


def for_encoder(encoder: Meta, views: Sequence[View]) -> Arrays:
    """What an encoder asks for of n >= 1 views, stacked.

    Raises:
        ValueError: it asks for the field, or what the detector says of it, and a view has none.
    """
    made = {}
    for name, asked in encoder.inputs.items():
        parts = [part for part in map(OF_VIEW[name], views) if part is not None]
        if len(parts) < len(views):
            raise ValueError(f"{len(views) - len(parts)} of {len(views)} crops have no {name}")
        made[name] = np.stack(parts).astype(asked.dtype)
    return made


def absent(encoder: Meta, view: View) -> list[str]:
    """What an encoder asks for and a view does not have; a kept crop never has its field."""
    return sorted(name for name in encoder.inputs if OF_VIEW[name](view) is None)


def for_head(features: NDArray[np.float32]) -> Arrays:
    """What a head asks for of features (n, D)."""
    return {"features": features}


def crop_px(encoder: Meta) -> int:
    """Side of the crops that an encoder looks at."""
    return encoder.inputs["crop"].shape[0] if "crop" in encoder.inputs else CROP_PX


def tokens(encoder: Meta) -> int:
    """Side of the soft masks that an encoder looks at."""
    return encoder.inputs["soft_mask"].shape[0] if "soft_mask" in encoder.inputs else TOKENS


def whole_field(encoder: Meta, field: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The field (H, W) at the size that an encoder asks for; None where it does not ask."""
    asked = encoder.inputs.get("field")
    return None if asked is None else resize(field, (asked.shape[0], asked.shape[1]))


def listens(encoder: Meta) -> bool:
    """Whether an encoder asks for what the detector says."""
    return FIELD_FEATURES in encoder.inputs or REGION_FEATURES in encoder.inputs
