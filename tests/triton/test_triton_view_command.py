"""`semwatch triton view`: the folder for NVIDIA's container, with what is in it and what is left out."""

import shutil
from pathlib import Path

from commands import Command


def test_view_holds_each_model_with_its_configuration(semwatch: Command, tiny_repository: Path, tmp_path: Path) -> None:
    said = semwatch("triton", "view", "--repository", tiny_repository, "--view", tmp_path / "view", "--threads", 2)
    assert said.code == 0
    for model in ("detector", "encoder", "head"):
        assert (tmp_path / "view" / model / "1" / "model.onnx").is_file()
        assert f'name: "{model}"' in (tmp_path / "view" / model / "config.pbtxt").read_text()


def test_plans_are_asked_for_and_looked_for(semwatch: Command, tiny_repository: Path, tmp_path: Path) -> None:
    options = ("--repository", tiny_repository, "--view", tmp_path / "view", "--target", "tensorrt")
    said = semwatch("triton", "view", *options)
    assert said.code == 2
    assert "--engines" in said.words
    (tmp_path / "engines").mkdir()
    said = semwatch("triton", "view", *options, "--engines", tmp_path / "engines")
    assert said.code == 1
    assert "detector is left out" in said.words
    assert (tmp_path / "view" / "head" / "config.pbtxt").is_file()


def test_model_that_is_damaged_is_left_out_by_name(semwatch: Command, tiny_repository: Path, tmp_path: Path) -> None:
    repository = shutil.copytree(tiny_repository, tmp_path / "models")
    (repository / "encoder" / "1" / "model.onnx").write_bytes(b"garbage")
    said = semwatch("triton", "view", "--repository", repository)
    assert said.code == 1
    assert "encoder is left out" in said.words
    assert (tmp_path / "models.triton" / "detector" / "config.pbtxt").is_file()


def test_server_from_the_wheel_says_that_it_has_no_tensorrt_backend(
    semwatch: Command, tiny_repository: Path, tmp_path: Path
) -> None:
    options = ("--folder", tmp_path, "--repository", tiny_repository, "--target", "tensorrt", "--engines", tmp_path)
    said = semwatch("triton", "serve", *options)
    assert said.code == 2
    assert "no TensorRT backend" in said.words
