"""Triton's model configuration, from the signatures that the daemon checks: one source for every target.

    onnx-python    python backend that runs ``model.onnx`` with ONNX Runtime on the processor
    tensorrt-rtx   python backend that runs a TensorRT-for-RTX plan, one for each compute capability
    tensorrt       Triton's own TensorRT backend, ``platform: "tensorrt_plan"``

Several versions of a model can serve side by side: a client asks for the one it has proven.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from semwatch.models.contract import FIELD_SIDES_PX
from semwatch.models.model_repository import Meta, Tensor
from semwatch.triton.plans import OPEN_BATCHES, Plan

Target = Literal["onnx-python", "tensorrt-rtx", "tensorrt"]
TARGETS: tuple[Target, ...] = get_args(Target)
MAX_BATCH = MappingProxyType({"detector": 16, "encoder": 16, "head": 256})
"""Largest batch of one request, by model; see ``max_batch``."""
PROFILE_BATCHES = (1, 4, 16)
"""Batch sizes that a plan's optimisation profiles are tuned for, as far as the model takes them."""
QUEUE_DELAY_US = 500
"""Longest that a request waits for others to share its run; none where images are not put together."""
QUEUE_TIMEOUT_S = 60
"""A request that waited longer is refused; clients set their own, shorter one."""
MAX_QUEUE = 64
"""A request that finds so many before it is refused at once: the daemon backs off, the drop folder is the buffer."""
LIVE, BACKLOG = 1, 2
"""Priorities: new files go before what was judged already and is judged again."""

INSTANCES = 2
"""Of each model. Triton 2.51 loses the wake-up for a request that comes while the only instance hands over its
answer, and lets it lie for 500 ms: with queue limits or priorities nothing is fetched ahead, which would hide that.
With a second instance the next request always has a place to go."""
_INSTANCE = MappingProxyType(
    {
        # One network at a time has all the cores, as in the daemon: two at once only evict each other's caches.
        "onnx-python": 'kind: KIND_CPU rate_limiter { resources [ { name: "cores" count: 1 global: true } ] }',
        # Our own backend takes the GPU itself: where there is none it says so in its own words, with what to do.
        "tensorrt-rtx": "kind: KIND_MODEL",
        "tensorrt": "kind: KIND_GPU",
    }
)
_TYPES = MappingProxyType({"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"})


def config_pbtxt(
    metas: Mapping[int, Meta],
    target: Target,
    *,
    threads: int | None = None,
    environment: Path | None = None,
    plans: Mapping[int, Mapping[str, Plan]] = MappingProxyType({}),
) -> str:
    """Write the ``config.pbtxt`` of one model.

    Args:
        metas: of the versions that shall serve, at least one, all of the same model.
        target: what runs the model.
        threads: processor threads of one network (``onnx-python``); None for all the machine has.
        environment: Python environment of the backend (python targets); None: the one on the server's ``PATH``.
        plans: of each version, by compute capability such as "8.9" (TensorRT targets), at least one. A GPU that one
            version has no plan for does not load that version.
    """
    meta = metas[max(metas)]
    tuned = [n for n in PROFILE_BATCHES if n <= max_batch(meta)]
    parts = [
        f"name: {_quoted(meta.model)}",
        'platform: "tensorrt_plan"' if target == "tensorrt" else 'backend: "python"',
        f"max_batch_size: {max_batch(meta)}",
        _tensors("input", [m.inputs for m in metas.values()]),
        _tensors("output", [m.outputs for m in metas.values()]),
        f"version_policy {{ specific {{ versions: [ {', '.join(map(str, metas))} ] }} }}",
        _batching(_preferred(meta, target)),
        _instances(target, tuned),
        _warmup(meta.inputs, [1] if target == "onnx-python" else tuned),
        *_parameters(metas, target, threads, environment, plans),
    ]
    if target == "tensorrt":
        named = ", ".join(f"{{ key: {_quoted(cc)} value: {_quoted(file)} }}" for cc, file in _files(plans).items())
        parts.append(f"cc_model_filenames [ {named} ]")
        parts.append("optimization { cuda { graphs: true } }")
    return "\n".join(parts) + "\n"


def max_batch(meta: Meta) -> int:
    """Largest batch of one request for this version; fewer where its fields have any size, see ``OPEN_BATCHES``."""
    return min(MAX_BATCH[meta.model], OPEN_BATCHES.largest) if meta.is_open else MAX_BATCH[meta.model]


def sha256_key(version: int) -> str:
    """Parameter that holds the content hash of a version's weights."""
    return f"weights_sha256.{version}"


def plan_sha256_key(version: int, capability: str) -> str:
    """Parameter that holds the content hash of a version's plan for one GPU: it tells a fleet's engines apart."""
    return f"plan_sha256.{version}.{capability}"


def may_share(one: Meta, other: Meta) -> bool:
    """Whether two versions of a model can stand under one configuration: Triton has one for all versions of a model.

    They take the same inputs, and give outputs of the same names, dtypes and numbers of axes: heads differ in classes.
    """

    def outputs(meta: Meta) -> dict[str, tuple[str, int]]:
        return {name: (tensor.dtype, len(tensor.shape)) for name, tensor in meta.outputs.items()}

    return dict(one.inputs) == dict(other.inputs) and outputs(one) == outputs(other)


def dims(shapes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The dims that fit every version: -1 where versions differ, as the number of classes of heads does.

    Raises:
        ValueError: the versions differ in the number of axes.
    """
    return tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))


def _tensors(kind: str, of_versions: Sequence[Mapping[str, Tensor]]) -> str:
    rows = []
    for name, tensor in of_versions[-1].items():
        shape = dims([tensors[name].shape for tensors in of_versions if name in tensors])
        # Triton has no scalars: one number per item travels as an axis of one.
        sized = f"dims: [ {', '.join(map(str, shape))} ]" if shape else "dims: [ 1 ] reshape { shape: [ ] }"
        rows.append(f"  {{ name: {_quoted(name)} data_type: {_TYPES[tensor.dtype]} {sized} }}")
    return f"{kind} [\n" + ",\n".join(rows) + "\n]"


def _preferred(meta: Meta, target: Target) -> Sequence[int]:
    """Sizes to which requests are put together; none: as many as wait."""
    if target == "onnx-python":
        # On a processor four images together take no less than four alone, and each would wait for all of them.
        return () if meta.model == "head" else (1,)
    return [size for size in PROFILE_BATCHES if 1 < size <= max_batch(meta)]


def _batching(preferred: Sequence[int]) -> str:
    sizes = f"  preferred_batch_size: [ {', '.join(map(str, preferred))} ]\n" if preferred else ""
    return (
        "dynamic_batching {\n"
        f"{sizes}"
        # With a delay, Triton would put together what waited longer, whatever the preferred size.
        f"  max_queue_delay_microseconds: {0 if preferred == (1,) else QUEUE_DELAY_US}\n"
        f"  priority_levels: {BACKLOG}\n"
        f"  default_priority_level: {LIVE}\n"
        "  default_queue_policy {\n"
        f"    timeout_action: REJECT default_timeout_microseconds: {QUEUE_TIMEOUT_S * 1_000_000}\n"
        f"    allow_timeout_override: true max_queue_size: {MAX_QUEUE}\n"
        "  }\n"
        "}"
    )


def _instances(target: Target, tuned: Sequence[int]) -> str:
    where = _INSTANCE[target]
    if target == "tensorrt":  # a profile for each tuned batch, in their order; Triton takes the one nearest to a batch
        where += f" profile: [ {', '.join(_quoted(str(profile)) for profile, _ in enumerate(tuned))} ]"
    return f"instance_group [ {{ count: {INSTANCES} {where} }} ]"


def _warmup(inputs: Mapping[str, Tensor], batches: Sequence[int]) -> str:
    """A version is ready once it has answered these; open sides have the size that fields mostly have."""
    tensors = "\n".join(
        f"    inputs {{ key: {_quoted(name)} value {{ data_type: {_TYPES[tensor.dtype]} "
        f"dims: [ {', '.join(map(str, tensor.sized(FIELD_SIDES_PX.typical) or (1,)))} ] random_data: true }} }}"
        for name, tensor in inputs.items()
    )
    rows = [f'  {{\n    name: "batch of {n}" batch_size: {n}\n{tensors}\n  }}' for n in batches]
    return "model_warmup [\n" + ",\n".join(rows) + "\n]"


def _parameters(
    metas: Mapping[int, Meta],
    target: Target,
    threads: int | None,
    environment: Path | None,
    plans: Mapping[int, Mapping[str, Plan]],
) -> list[str]:
    found = {sha256_key(version): meta.weights_sha256 for version, meta in metas.items()}
    if target == "onnx-python" and threads is not None:
        found["threads"] = str(threads)
    if target != "tensorrt" and environment is not None:
        found["EXECUTION_ENV_PATH"] = str(environment)
    if target == "tensorrt-rtx":
        found |= {f"plan.{capability}": file for capability, file in _files(plans).items()}
    for version, of_version in plans.items():
        for capability, plan in of_version.items():
            found[plan_sha256_key(version, capability)] = plan.manifest.plan_sha256
            found[f"plan_toolkit.{version}.{capability}"] = plan.manifest.toolkit_version
    return [
        f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
        for key, value in found.items()
    ]


def _files(plans: Mapping[int, Mapping[str, Plan]]) -> dict[str, str]:
    """Name of the plan in every version's folder, by compute capability."""
    return {capability: plan.file_name for of_version in plans.values() for capability, plan in of_version.items()}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
