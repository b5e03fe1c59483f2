"""What every runtime asks of a model version before it may serve, and of every batch before it is sent."""

from collections.abc import Mapping

import numpy as np

from semwatch.errors import ModelMismatch
from semwatch.models.contract import check_pair
from semwatch.models.model_repository import Arrays, Meta

MAX_LABEL_CHARS = 200
MAX_PROBE_DIFFERENCE = 1e-3
"""Largest difference to the expected answer, relative to its largest value."""


def check_inputs(meta: Meta, inputs: Arrays) -> None:
    """Refuse a batch that the model does not take.

    Raises:
        ModelMismatch: names, dtypes or shapes are others than in ``meta``.
    """
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in meta.inputs.items()}
    given = {name: (str(array.dtype), array.shape[1:]) for name, array in inputs.items()}
    fits = expected.keys() == given.keys() and all(
        given[name][0] == tensor.dtype and tensor.holds(given[name][1]) for name, tensor in meta.inputs.items()
    )
    if not fits:
        raise ModelMismatch(f"the {meta.model} wants {expected} per item, got {given}")


def check_fit(encoder: Meta, head: Meta) -> None:
    """Refuse a head that was not trained on this encoder's features.

    Raises:
        ModelMismatch: it belongs to another encoder, or names no classes.
    """
    if head.encoder_sha256 != encoder.weights_sha256:
        raise ModelMismatch(
            "this head was trained on another encoder's features; pin the encoder it belongs to in the recipe, or "
            "fit a head on this encoder with `semwatch-train head`"
        )
    check_labels(head)


def check_labels(head: Meta) -> None:
    """Refuse a head whose classes are not those that it answers for.

    Raises:
        ModelMismatch: it names none, one twice, another number than it answers for, or one that is no name.
    """
    again = "publish it again"
    if not head.labels:
        raise ModelMismatch(f"the head's meta.json names no classes; {again}")
    if len(set(head.labels)) != len(head.labels):
        raise ModelMismatch(f"the head's meta.json names a class twice; {again}")
    for output in ("logits", "p_values"):
        tensor = head.outputs.get(output)
        if tensor is not None and tensor.shape != (len(head.labels),):
            raise ModelMismatch(
                f"the head's meta.json names {len(head.labels)} classes, its {output} have the shape {tensor.shape}; "
                f"{again}"
            )
    names = (*head.labels, *head.codes)
    odd = [name for name in names if not (0 < len(name) <= MAX_LABEL_CHARS and name.isprintable())]
    if odd:
        raise ModelMismatch(f"the head's meta.json names a class {odd[0][:40]!r}, which is no name; {again}")
    if any(abs(code) >= 2**63 for code in head.codes.values()):
        raise ModelMismatch(f"the head's meta.json has a code beyond 64 bits; {again}")


def check_beside(meta: Meta, others: Mapping[str, Meta]) -> None:
    """Refuse a version that does not go with the versions of the other models beside it; absent ones are not asked.

    Raises:
        ModelMismatch: see ``check_fit`` and ``contract.check_pair``.
    """
    beside = {**others, meta.model: meta}
    if meta.model == "head" and "encoder" in beside:
        check_fit(beside["encoder"], meta)
    if meta.model != "head" and "detector" in beside and "encoder" in beside:
        check_pair(beside["detector"], beside["encoder"])


def check_probe(name: str, expected: Arrays, answered: Arrays) -> None:
    """Refuse a version that answers its probe otherwise than the network it was made from.

    Args:
        name: model and version, for the message.
        expected: what the probe says, by output.
        answered: what the version said.

    Raises:
        ModelMismatch: an output is absent, of another shape, or off by more than ``MAX_PROBE_DIFFERENCE``.
    """
    try:
        _compare(name, expected, answered)
    except (TypeError, ValueError, ArithmeticError) as error:  # numpy on arrays that hold no numbers
        raise ModelMismatch(f"the probe of {name} cannot be compared ({error}); publish it again") from error


def _compare(name: str, expected: Arrays, answered: Arrays) -> None:
    for output, values in expected.items():
        if output not in answered or answered[output].shape != values.shape:
            raise ModelMismatch(f"{name} gives no {output} of the shape that its probe says; publish it again")
        largest = max(float(np.abs(values).max(initial=0)), 1e-6)
        difference = float(np.abs(answered[output] - values).max(initial=0)) / largest
        if not difference <= MAX_PROBE_DIFFERENCE:
            raise ModelMismatch(
                f"{name} answers its probe with another {output} than the network it was made from (off by "
                f"{difference:.1e} of the largest value, {MAX_PROBE_DIFFERENCE:.0e} allowed); publish it again"
            )
