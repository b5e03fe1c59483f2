"""A TensorRT-for-RTX plan run on an NVIDIA GPU, for the python backend; imports nothing of semwatch.

The plan is the one compiled for this GPU's compute capability. Device memory is asked from the driver itself, by
ctypes: it is there wherever a GPU is, and TensorRT works in the same (primary) context. TensorRT captures a CUDA graph
for each batch size, and each size of an image that may have any, that it meets, and replays it from then on.
"""

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NO_GPU = "a TensorRT plan runs on an RTX GPU alone; serve with `semwatch triton up --target onnx-python` here"


class Cuda:
    """One GPU through NVIDIA's driver: its primary context and a stream.

    Args:
        device: number of the GPU.
        library: of the driver.

    Raises:
        RuntimeError: there is no driver, or no such GPU.
    """

    def __init__(self, device: int = 0, *, library: str = "libcuda.so.1") -> None:
        try:
            self._driver = ctypes.CDLL(library)
        except OSError as error:
            raise RuntimeError(f"this machine has no NVIDIA driver ({error}); {_NO_GPU}") from error
        self._device, self._context, self.stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        try:
            self._call("cuInit", ctypes.c_uint(0))
            self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(max(device, 0)))
        except RuntimeError as error:
            raise RuntimeError(f"NVIDIA's driver finds no GPU {max(device, 0)} ({error}); {_NO_GPU}") from error
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.enter()
        self._call("cuStreamCreate", ctypes.byref(self.stream), ctypes.c_uint(1))  # apart from the default stream

    def enter(self) -> None:
        """Work in this GPU's context on the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    @property
    def capability(self) -> str:
        """Compute capability, such as "8.9"."""
        return f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}"

    def allocate(self, n_bytes: int) -> int:
        """Address of new device memory; it goes with the process."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        return address.value

    def upload(self, address: int, array: Any) -> None:
        """Queue a copy of a contiguous array to the device."""
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), *_memory(array), self.stream)

    def download(self, array: Any, address: int) -> None:
        """Queue a copy from the device into a contiguous array."""
        pointer, n_bytes = _memory(array)
        self._call("cuMemcpyDtoHAsync_v2", pointer, ctypes.c_uint64(address), n_bytes, self.stream)

    def wait(self) -> None:
        """Wait for all that was queued."""
        self._call("cuStreamSynchronize", self.stream)

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            words = ctypes.c_char_p()
            self._driver.cuGetErrorString(ctypes.c_int(code), ctypes.byref(words))
            raise RuntimeError(f"{name}: {(words.value or b'error').decode()} ({code})")


class Network:
    """One version's plan, deserialised, with device memory for its largest batch of the largest images.

    Args:
        folder: of the version.
        parameters: of ``config.pbtxt``: "plan.8.9" names the file, "plan_sha256.<version>.8.9" its content hash.
        device: number of the GPU.

    Raises:
        RuntimeError: no GPU, no TensorRT for RTX, no plan for this GPU, a plan that is damaged or of another release,
            or too little memory.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, str], *, device: int = 0) -> None:
        self._cuda = Cuda(device)
        capability = self._cuda.capability
        made_by = parameters.get(f"plan_toolkit.{folder.name}.{capability}", "")
        plan = chosen_plan(folder, parameters, capability)
        trt = _toolkit(made_by)
        log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(log)  # an engine does not keep it alive
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise RuntimeError(
                f"TensorRT for RTX {trt.__version__} cannot read the plan for {capability} in {folder}, which "
                f"{made_by or 'another release'} compiled; export the plans again with this release"
            )
        settings = self._engine.create_runtime_config()
        settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._context = self._engine.create_execution_context(settings)
        if self._context is None:
            raise RuntimeError(
                f"the GPU has too little free memory for the plan in {folder}, which needs "
                f"{self._engine.device_memory_size_v2 / 1e6:.0f} MB to compute with"
            )
        names = [self._engine.get_tensor_name(k) for k in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.signature = {n for n in names if is_input[n]}, {n for n in names if not is_input[n]}
        self._types = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._shapes = {name: tuple(self._engine.get_tensor_shape(name))[1:] for name in names}
        # Of each profile and input: the smallest shape, the one it is tuned for, the largest.
        self._ranges = [
            {name: self._engine.get_tensor_profile_shape(name, k) for name in names if is_input[name]}
            for k in range(self._engine.num_optimization_profiles)
        ]
        first = next(name for name in names if is_input[name])
        self._profiles = [(shapes[first][0][0], shapes[first][2][0]) for shapes in self._ranges]
        self._addresses = self._placed()

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any]) -> list[Any]:
        """Answer a batch.

        Raises:
            RuntimeError: it is larger, or its images are, than any profile, or the GPU failed.
        """
        self._cuda.enter()  # Triton may call from another thread than the one that loaded
        n, stream = len(next(iter(inputs.values()))), self._cuda.stream.value
        sent = {name: self._shaped(name, array) for name, array in inputs.items()}
        shapes = self._set(profile_for(n, self._profiles), {name: array.shape for name, array in sent.items()})
        for name, array in sent.items():
            self._cuda.upload(self._addresses[name], array)
        for name, address in self._addresses.items():
            self._context.set_tensor_address(name, address)
        if not self._context.execute_async_v3(stream):
            self._cuda.wait()
            raise RuntimeError("TensorRT could not run the plan on this GPU")
        answers = {name: np.empty(shapes[name], self._types[name]) for name in self.signature[1]}
        for name, array in answers.items():
            self._cuda.download(array, self._addresses[name])
        self._cuda.wait()
        return [answers[name] for name in outputs]

    def _shaped(self, name: str, array: Any) -> Any:
        """An input as the plan takes it: a number per item has travelled as an axis of one."""
        sent = np.ascontiguousarray(array, self._types[name])
        return sent if -1 in self._shapes[name] else sent.reshape(len(sent), *self._shapes[name])

    def _set(self, profile: int, inputs: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Choose profile and shapes of the inputs; what is returned are the shapes of all tensors then."""
        if profile != self._context.active_optimization_profile:
            self._context.set_optimization_profile_async(profile, self._cuda.stream.value)
        for name, shape in inputs.items():
            if not self._context.set_input_shape(name, tuple(shape)):
                least, _, most = (tuple(each) for each in self._ranges[profile][name])
                raise RuntimeError(f"the plan takes no {name} of {tuple(shape)}, only of {least} to {most}")
        return {name: tuple(self._context.get_tensor_shape(name)) for name in self._types}

    def _placed(self) -> dict[str, int]:
        """Addresses of device memory for the largest that each tensor can be, by name."""
        n_bytes = dict.fromkeys(self._types, 0)
        for profile, ranges in enumerate(self._ranges):
            for name, shape in self._set(profile, {name: ranges[name][2] for name in ranges}).items():
                n_bytes[name] = max(n_bytes[name], int(np.prod(shape, dtype=np.int64)) * self._types[name].itemsize)
        return {name: self._cuda.allocate(size) for name, size in n_bytes.items()}


def chosen_plan(folder: Path, parameters: Mapping[str, str], capability: str) -> bytes:
    """The plan for a GPU of this compute capability, checked against its content hash.

    Raises:
        RuntimeError: there is none, or it is another file than was placed.
    """
    name = parameters.get(f"plan.{capability}")
    if name is None or not (folder / name).is_file():
        offered = ", ".join(sorted(key.removeprefix("plan.") for key in parameters if key.startswith("plan.")))
        raise RuntimeError(
            f"{folder} has no plan for this GPU, of compute capability {capability}, only for {offered or 'none'}; "
            f"add it with `semwatch-train export --target tensorrt-rtx --compute-capability "
            f"{capability.replace('.', '')}`"
        )
    plan = (folder / name).read_bytes()
    expected = parameters.get(f"plan_sha256.{folder.name}.{capability}")
    if hashlib.sha256(plan).hexdigest() != expected:
        raise RuntimeError(f"{folder / name} is not the plan that was placed (sha256 differs); start the server anew")
    return plan


def profile_for(n: int, profiles: Sequence[tuple[int, int]]) -> int:
    """Number of the tightest profile, of (smallest, largest) batches, that takes a batch of n.

    Raises:
        RuntimeError: none does.
    """
    fitting = [(most, k) for k, (least, most) in enumerate(profiles) if least <= n <= most]
    if not fitting:
        raise RuntimeError(f"the plan takes no batch of {n}, only of {' or '.join(f'{a} to {b}' for a, b in profiles)}")
    return min(fitting)[1]


def _toolkit(made_by: str) -> Any:
    try:
        import tensorrt_rtx  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: PLC0415
    except ImportError as error:
        version = f"=={made_by}" if made_by else ""
        raise RuntimeError(
            f"TensorRT for RTX is not in Triton's Python environment ({error}); install it there: "
            f"pip install tensorrt-rtx-cu13{version}"
        ) from error
    return tensorrt_rtx


def _memory(array: Any) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
