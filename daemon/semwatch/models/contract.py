"""The contract between a model and the line: the inputs that the line can give to each role, the outputs that it needs.

A model's ``meta.json`` names its inputs and outputs. The line builds exactly the inputs that it names, at the shapes
and dtypes that it names, and reads the outputs below; others are allowed and ignored. So a new family of models is
served without a change of the line. Both runtimes check a version against this table before they load it; the builders
of the inputs are in ``line.inputs``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from semwatch.errors import ModelMismatch
from semwatch.models.model_repository import OPEN, DType, Meta, Tensor


class FieldSides(NamedTuple):
    """What the sides of a field may be that is given to a detector whose image is open."""

    multiple: int = 16
    smallest: int = 64
    typical: int = 1024
    largest: int = 1536


FIELD_SIDES_PX = FieldSides()
"""Engines are compiled for this range, and tuned for the typical size; a larger field is given in tiles."""


@dataclass(frozen=True, slots=True)
class Input:
    """One input that the line can give; the batch axis is left out."""

    shape: tuple[int | None, ...]
    """None: the size that the model names."""
    dtypes: tuple[DType, ...]
    what: str
    """For people."""
    is_square: bool = False
    may_be_open: bool = False
    """Whether a model may take it at any size."""


_GRAY: tuple[DType, ...] = ("uint8", "float32")
"""Gray levels 0 to 255 in either type; a model normalises for itself."""

INPUTS: Mapping[str, Mapping[str, Input]] = MappingProxyType(
    {
        "detector": MappingProxyType(
            {"image": Input((None, None), _GRAY, "the field of view, resized or at its own scale", may_be_open=True)}
        ),
        "encoder": MappingProxyType(
            {
                "crop": Input((None, None), _GRAY, "the square window around a defect, resized", is_square=True),
                "soft_mask": Input((None, None), ("float32",), "the defect's heat in that window", is_square=True),
                "size": Input((2,), ("float32",), "log2 of window side and root mask area over the field's short side"),
                "field": Input((None, None), _GRAY, "the whole field of view that the defect lies in, resized"),
                "field_features": Input((None,), ("float32",), "what the detector says of that whole field"),
                "region_features": Input((None,), ("float32",), "what the detector says of the defect's places"),
            }
        ),
        "head": MappingProxyType({"features": Input((None,), ("float32",), "the encoder's features of a defect")}),
    }
)
"""By role and name."""

OUTPUTS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "detector": MappingProxyType({"score_map": 2, "raw_score": 0}),
        "encoder": MappingProxyType({"features": 1}),
        "head": MappingProxyType({"logits": 1, "p_values": 1}),
    }
)
"""Number of axes of each output that the line reads, by role and name; all of them are float32."""

OPTIONAL: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {"detector": MappingProxyType({"domain_p": 0, "field_features": 1, "patch_features": 3})}
)
"""The same of outputs that the line reads where a model gives them; see ``defects.ScoreMap``."""

FIELD_FEATURES, PATCH_FEATURES, REGION_FEATURES = "field_features", "patch_features", "region_features"
"""What a detector may say: of a whole field (D,), and of each place (C, h, w), which is averaged over a defect.

An encoder may ask for the first and for that average. In the provenance of both models ``field_features`` names the
kind of all this: an encoder takes no other than it was made for.
"""

OF_A_CROP = ("crop", "soft_mask", "size", "field_features", "region_features")
"""Inputs that a kept crop may still have: its field is gone."""


def check_contract(meta: Meta) -> None:
    """Refuse a model that asks for what the line cannot give, or does not say what the line needs to hear.

    Raises:
        ModelMismatch: with the input or output in question, and which ones there are.
    """
    offered = INPUTS[meta.model]
    unknown = sorted(meta.inputs.keys() - offered.keys())
    if unknown:
        raise ModelMismatch(
            f"this {meta.model} asks for {_listed(unknown)}, which the line cannot give; what it can give: "
            f"{_listed(offered)}"
        )
    if not meta.inputs:
        raise ModelMismatch(f"this {meta.model} takes no input; give it one of {_listed(offered)}")
    for name, tensor in meta.inputs.items():
        if fault := _fault(tensor, offered[name]):
            raise ModelMismatch(f"this {meta.model} asks for {name} as {fault}")
    needed = OUTPUTS[meta.model]
    absent = [name for name in needed if name not in meta.outputs]
    if absent:
        raise ModelMismatch(
            f"this {meta.model} gives no {_listed(absent)}; the line reads {_listed(needed)} of a {meta.model}"
        )
    optional = OPTIONAL.get(meta.model, {})
    for name, n_axes in (*needed.items(), *((name, optional[name]) for name in optional if name in meta.outputs)):
        given = meta.outputs[name]
        if len(given.shape) != n_axes or given.dtype != "float32":
            raise ModelMismatch(
                f"this {meta.model} gives {name} as {_in_words(given)}; the line reads {n_axes} axes of float32 an item"
            )


def check_pair(detector: Meta, encoder: Meta) -> None:
    """Refuse an encoder that asks for what this detector does not say.

    Raises:
        ModelMismatch: it says nothing, or other things than the encoder was made for.
    """
    remedy = "build detector and encoder of one release, or pin an encoder that does not ask for them"
    for name, source in ((FIELD_FEATURES, FIELD_FEATURES), (REGION_FEATURES, PATCH_FEATURES)):
        asked, given = encoder.inputs.get(name), detector.outputs.get(source)
        if asked is None:
            continue
        if given is None:
            raise ModelMismatch(
                f"this encoder asks for `{name}`, and this detector gives no `{source}` to make them of: {remedy}"
            )
        if given.shape[0] != asked.shape[0]:
            raise ModelMismatch(
                f"this encoder asks for `{name}` of width {asked.shape[0]}, and this detector's `{source}` have "
                f"{given.shape[0]}: {remedy}"
            )
        theirs, ours = (meta.provenance.get(FIELD_FEATURES) for meta in (detector, encoder))
        if theirs is not None and ours is not None and theirs != ours:
            raise ModelMismatch(
                f"this encoder was made for features of another kind ({ours}) than this detector gives ({theirs}): "
                f"{remedy}"
            )


def _fault(asked: Tensor, offered: Input) -> str | None:
    """What is wrong with the shape or dtype of an input, None where it can be given."""
    fits = len(asked.shape) == len(offered.shape) and all(
        size == offer or (offer is None and (size > 0 or (size == OPEN and offered.may_be_open)))
        for size, offer in zip(asked.shape, offered.shape, strict=True)
    )
    is_right = not offered.is_square or len(set(asked.shape)) == 1
    if fits and is_right and asked.dtype in offered.dtypes:
        return None
    sides = " x ".join("any" if size is None else str(size) for size in offered.shape)
    square = ", square" if offered.is_square else ""
    return f"{_in_words(asked)}; the line gives {offered.what}: {sides}{square}, {' or '.join(offered.dtypes)}"


def _in_words(tensor: Tensor) -> str:
    sides = " x ".join("any" if side == OPEN else str(side) for side in tensor.shape)
    return f"{sides or 'one value'} of {tensor.dtype}"


def _listed(names: "list[str] | Mapping[str, object]") -> str:
    return ", ".join(f"`{name}`" for name in names)
