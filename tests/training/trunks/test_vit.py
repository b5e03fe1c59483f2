import pytest
import torch
from safetensors.torch import save_file

from semwatch.errors import ConfigError
from semwatch_training.trunks.vit import TRUNKS, TrunkShape, VisionTransformer, load_trunk

# Key layouts as the official checkpoint files have them (blocks.0 stands for every block).
DINOV2 = {
    "cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight",
    "norm.bias", "blocks.0.norm1.weight", "blocks.0.norm1.bias", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias",
    "blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias", "blocks.0.ls1.gamma", "blocks.0.norm2.weight",
    "blocks.0.norm2.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc2.weight",
    "blocks.0.mlp.fc2.bias", "blocks.0.ls2.gamma",
}  # fmt: skip
SWIGLU = {f"blocks.0.mlp.{name}.{kind}" for name in ("w12", "w3") for kind in ("weight", "bias")}
MLP = {key for key in DINOV2 if ".mlp." in key}
DINOV3 = DINOV2 - {"pos_embed"} | {"storage_tokens", "rope_embed.periods", "blocks.0.attn.qkv.bias_mask"}


def small(shape: TrunkShape) -> TrunkShape:
    return TrunkShape(
        64, 2, 2, shape.patch, shape.position_grid and 5, shape.n_registers, shape.swiglu, shape.antialias
    )


def first_block_keys(trunk: VisionTransformer) -> set[str]:
    return {key for key in trunk.state_dict() if not key.startswith("blocks.") or key.startswith("blocks.0.")}


@pytest.mark.parametrize("name", TRUNKS)
def test_keys_are_those_of_the_official_file(name: str) -> None:
    shape = small(TRUNKS[name])
    expected = DINOV3 if shape.position_grid == 0 else DINOV2
    if shape.position_grid and shape.n_registers:
        expected = expected | {"register_tokens"}
    if shape.swiglu:
        expected = expected - MLP | SWIGLU
    assert first_block_keys(VisionTransformer(shape)) == expected


@pytest.mark.parametrize("name", TRUNKS)
def test_every_trunk_gives_one_token_per_patch_of_a_rectangle(name: str) -> None:
    shape = small(TRUNKS[name])
    trunk = VisionTransformer(shape).eval()
    first, last = trunk(torch.randn(2, 3, 3 * shape.patch, 4 * shape.patch), [0, 1])
    assert first.shape == last.shape == (2, 12, 64)
    assert torch.isfinite(last).all()


def test_giant_feed_forward_has_the_official_width() -> None:
    with torch.device("meta"):
        trunk = VisionTransformer(TRUNKS["dinov2_vitg14"])
    assert trunk.state_dict()["blocks.0.mlp.w12.weight"].shape == (8192, 1536)


def test_dinov3_key_bias_is_switched_off() -> None:
    trunk = VisionTransformer(small(TRUNKS["dinov3_vits16"])).eval()
    images = torch.randn(1, 3, 32, 32)
    before = trunk(images, [1])[0]
    with torch.no_grad():
        trunk.blocks[0].attn.qkv.bias[64:128] += 100
    assert torch.equal(before, trunk(images, [1])[0])


def test_rotary_positions_depend_on_place_and_learned_grid_is_kept_at_its_own_size() -> None:
    rotary = VisionTransformer(small(TRUNKS["dinov3_vits16"]))
    sin, cos = rotary.rope((2, 3))
    assert sin.shape == cos.shape == (6, 32)
    assert torch.allclose(sin**2 + cos**2, torch.ones_like(sin), atol=1e-6)
    assert len({tuple(row.tolist()) for row in sin}) == 6
    learned = VisionTransformer(small(TRUNKS["dinov2_vits14"]))
    torch.nn.init.normal_(learned.pos_embed)
    assert torch.equal(learned._positions((5, 5)), learned.pos_embed[:, 1:])


def test_side_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of the patch, 14"):
        VisionTransformer(small(TRUNKS["dinov2_vits14"])).embed(torch.zeros(1, 3, 28, 30))


def test_checkpoint_loads_strictly_from_both_file_kinds(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(TRUNKS, "small", small(TRUNKS["dinov2_vits14_reg"]))
    state = VisionTransformer(TRUNKS["small"]).state_dict()
    torch.save(state, tmp_path / "a.pth")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        loaded = load_trunk("small", tmp_path / name)
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    del state["norm.bias"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(ConfigError, match=r"(?s)not a checkpoint of small.*norm\.bias"):
        load_trunk("small", tmp_path / "b.pth")


def test_unknown_name_and_missing_file_say_what_to_do(tmp_path) -> None:
    with pytest.raises(ConfigError, match="choose one of dinov2_vits14"):
        load_trunk("resnet", tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="does not exist"):
        load_trunk("dinov2_vits14", tmp_path / "a.pth")


def test_checkpoint_that_executes_code_is_not_executed(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"cls_token": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="not a checkpoint"):
        load_trunk("dinov2_vits14", tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()
