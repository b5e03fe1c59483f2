"""Arrays and errors between this client and a Triton server."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferInput, InferResult
from tritonclient.utils import InferenceServerException

from semwatch.errors import ModelMismatch
from semwatch.models.model_repository import Arrays, Meta, Tensor

DTYPES = {"uint8": "UINT8", "float32": "FP32"}
RETRIED = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")
"""gRPC's words for a server that is away, ending, or slow; everything else would only fail again."""
_BUSY = ("maximum queue size", "timeout expired")
"""What an UNAVAILABLE says that comes from a living server."""
_DEAD = "Stub process"
"""What a server says that lost the process of a model; it starts none before the model is loaded again."""


def parts(inputs: Arrays, largest: int) -> Iterator[Arrays]:
    """Cut a batch into ones that Triton takes whole; an empty batch into none."""
    n = len(next(iter(inputs.values())))
    for start in range(0, n, largest):
        yield {name: array[start : start + largest] for name, array in inputs.items()}


def joined(meta: Meta, answers: Sequence[Arrays]) -> dict[str, NDArray[np.float32]]:
    """Put the answers of parts together again; of none, empty arrays of the right shapes."""
    if len(answers) == 1:
        return dict(answers[0])
    if not answers:
        return {name: np.empty((0, *tensor.sized(0)), tensor.dtype) for name, tensor in meta.outputs.items()}
    return {name: np.concatenate([answer[name] for answer in answers]) for name in meta.outputs}


def to_input(name: str, array: NDArray[Any]) -> InferInput:
    """One input of a request; a number per item travels as an axis of one."""
    shape = array.shape if array.ndim > 1 else (*array.shape, 1)
    tensor = InferInput(name, list(shape), DTYPES[str(array.dtype)])
    tensor.set_data_from_numpy(array.reshape(shape))
    return tensor


def read(result: InferResult, meta: Meta, version: int, n: int) -> dict[str, NDArray[np.float32]]:
    """The outputs of an answer, of the shapes that the repository says.

    Raises:
        ModelMismatch: they are empty, of other shapes, or another version's.
    """
    answered = result.get_response().model_version
    if answered != str(version):
        raise ModelMismatch(f"Triton was asked for {meta.model} {version} and answered with version {answered!r}")
    outputs = {}
    for name, tensor in meta.outputs.items():
        try:
            values = result.as_numpy(name)
        except ValueError:  # fewer bytes than the shape needs
            values = np.empty(0, np.float32)
        if values is None or values.size == 0:
            raise ModelMismatch(
                f"Triton's {meta.model} {version} gave an empty {name}: its Python environment holds numpy 2, with "
                f"which every output arrives empty; install 'numpy<2' there, or run `semwatch triton setup`"
            )
        if tensor.is_open:
            fits, shape = values.shape[:1] == (n,) and tensor.holds(values.shape[1:]), values.shape
        else:
            fits, shape = values.size == n * int(np.prod(tensor.shape)), (n, *tensor.shape)
        if not fits:
            raise ModelMismatch(
                f"Triton's {meta.model} {version} gave a {name} of shape {values.shape} for {n} items of "
                f"{tensor.shape}; let the server serve this model repository"
            )
        outputs[name] = values.reshape(shape)
    return outputs


def is_same(tensor: Tensor, datatype: str, dims: tuple[int, ...]) -> bool:
    """Whether the server's tensor can hold ours; it says -1 where its versions differ."""
    shape = tensor.shape or (1,)
    fits = len(dims) == len(shape) and all(theirs in (-1, ours) for theirs, ours in zip(dims, shape, strict=True))
    return fits and datatype == DTYPES[tensor.dtype]


def code(error: InferenceServerException) -> str:
    """Return gRPC's word for an error, such as "UNAVAILABLE"."""
    return str(error.status() or "").removeprefix("StatusCode.")


def is_absent(error: InferenceServerException) -> bool:
    """Whether the server says that it has no such model or version."""
    return code(error) == "NOT_FOUND" or "is not found" in str(error) or "no available versions" in str(error)


def is_busy(error: InferenceServerException) -> bool:
    """Whether a living server says that too many wait before this request."""
    return code(error) in RETRIED and any(word in str(error) for word in _BUSY)


def is_dead(error: InferenceServerException) -> bool:
    """Whether the server says that it lost the process of this model."""
    return _DEAD in str(error)


def words(error: Exception | None) -> str:
    """Return what an error says, for a message."""
    if isinstance(error, InferenceServerException):
        return f"{code(error)}: {error.message()}"
    return "no try was left" if error is None else str(error)
