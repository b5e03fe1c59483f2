"""EfficientNet-Lite2: folding, padding, shapes; the real weights where they are at hand."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from paths import ROOT
from semwatch_training.trunks import backbone, efficientnet
from semwatch_training.trunks.efficientnet import BATCH_NORM_EPS, STAGES, STEM_CHANNELS, STRIDES, EfficientNet, SameConv

CACHE = ROOT / ".cache"


def random_checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint in the package's own key layout, with batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def conv(name: str, norm: str, out: int, inn: int, kernel: int) -> None:
        fan_in = inn * kernel * kernel
        state[f"{name}.weight"] = torch.randn(out, inn, kernel, kernel, generator=generator) / fan_in**0.5
        state[f"{norm}.weight"] = torch.rand(out, generator=generator) + 0.5
        state[f"{norm}.bias"] = torch.randn(out, generator=generator)
        state[f"{norm}.running_mean"] = torch.randn(out, generator=generator)
        state[f"{norm}.running_var"] = torch.rand(out, generator=generator) + 0.5

    conv("_conv_stem", "_bn0", STEM_CHANNELS, 3, 3)
    channels, block = STEM_CHANNELS, 0
    for stage in STAGES:
        for _ in range(stage.repeats):
            prefix, inner = f"_blocks.{block}", channels * stage.expansion
            if stage.expansion > 1:
                conv(f"{prefix}._expand_conv", f"{prefix}._bn0", inner, channels, 1)
            conv(f"{prefix}._depthwise_conv", f"{prefix}._bn1", inner, 1, stage.kernel)
            conv(f"{prefix}._project_conv", f"{prefix}._bn2", stage.channels, inner, 1)
            channels, block = stage.channels, block + 1
    return state


def plain_forward(state: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """The network written out: three equal channels, batch norms unfolded, TensorFlow's SAME padding computed."""

    def step(x: Tensor, conv: str, norm: str, stride: int = 1, *, depthwise: bool = False) -> Tensor:
        weight = state[f"{conv}.weight"]
        side, kernel = x.shape[-1], weight.shape[-1]
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        x = functional.pad(x, (total // 2, total - total // 2) * 2)
        x = functional.conv2d(x, weight, stride=stride, groups=x.shape[1] if depthwise else 1)
        named = [state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *named, eps=BATCH_NORM_EPS)

    x = (image.float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)
    x = functional.relu6(step(x, "_conv_stem", "_bn0", 2))
    found, block = [], 0
    for stage in STAGES:
        for index in range(stage.repeats):
            prefix, y = f"_blocks.{block}", x
            if stage.expansion > 1:
                y = functional.relu6(step(y, f"{prefix}._expand_conv", f"{prefix}._bn0"))
            stride = stage.stride if index == 0 else 1
            y = functional.relu6(step(y, f"{prefix}._depthwise_conv", f"{prefix}._bn1", stride, depthwise=True))
            y = step(y, f"{prefix}._project_conv", f"{prefix}._bn2")
            x = x + y if x.shape == y.shape else y
            block += 1
        found.append(x)
    return found


def images(side: int) -> Tensor:
    return torch.randint(0, 256, (2, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", [32, 48, 96])
def test_folded_gray_network_equals_the_one_written_out(side: int) -> None:
    state = random_checkpoint()
    trunk = efficientnet.load(efficientnet.convert(state))
    with torch.no_grad():
        found = trunk(images(side), (1, 2, 3, 4, 5))
        expected = plain_forward(state, images(side))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_only_the_asked_stages_come_back_at_their_strides() -> None:
    trunk = EfficientNet().eval()
    with torch.no_grad():
        third, fifth = trunk(images(64), (3, 5))
    assert third.shape == (2, STAGES[2].channels, 64 // STRIDES[2], 64 // STRIDES[2])
    assert fifth.shape == (2, STAGES[4].channels, 64 // STRIDES[4], 64 // STRIDES[4])


def test_stride_two_pads_less_before_than_after() -> None:
    assert SameConv(1, 1, 3, stride=2).same == (0, 1, 0, 1)
    assert SameConv(1, 1, 5, stride=2).same == (1, 2, 1, 2)
    assert SameConv(1, 1, 5).same == (2, 2, 2, 2)


def test_grid_averages_fine_maps_and_interpolates_coarse_ones() -> None:
    fine = torch.arange(16.0).reshape(1, 1, 4, 4)
    coarse = torch.full((1, 2, 1, 1), 7.0)
    grid = efficientnet.grid_features([fine, coarse], 2)
    assert grid.shape == (1, 4, 3)
    assert grid[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert grid[0, :, 1:].eq(7.0).all()


def test_foreign_state_is_refused() -> None:
    state = efficientnet.convert(random_checkpoint())
    del state["stem.bias"]
    with pytest.raises(RuntimeError, match=r"stem\.bias"):
        efficientnet.load(state)


@pytest.mark.skipif(
    not (CACHE / backbone.EFFICIENTNET_FILE_NAME).exists(), reason="the weights are fetched by `make models`"
)
def test_real_weights_tell_an_edge_from_a_flat_field() -> None:
    trunk = backbone.load_efficientnet(CACHE)
    flat = torch.full((1, 64, 64), 90, dtype=torch.uint8)
    edge = flat.clone()
    edge[:, :, 32:] = 200
    with torch.no_grad():
        on_flat, on_edge = trunk(flat, (3,))[0], trunk(edge, (3,))[0]
    changed = (on_edge - on_flat).abs().mean(dim=(0, 1, 2))
    assert changed[3:5].mean() > 2 * changed[0]
