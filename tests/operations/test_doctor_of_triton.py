"""What `semwatch doctor` says of a site whose models run in Triton: against the real server, and without one."""

import json
import shutil
from pathlib import Path

from daemon import make_site
from semwatch.operations import doctor
from semwatch.operations.doctor import Check
from semwatch.settings.site import load_site
from semwatch.triton.server import LocalTriton
from semwatch.triton.view import Settings


def triton_checks(folder: Path, repository: Path, url: str) -> dict[str, Check]:
    models = {"repository": str(repository), "runtime": "triton", "triton": {"url": url, "timeout_s": 2}}
    site = make_site(folder, repository, models=models)
    found = doctor.examine(load_site(site.file))
    return {check.name: check for check in found if check.name in ("Triton", "models")}


def test_server_that_is_away_is_told_with_its_address(tiny_repository: Path, tmp_path: Path) -> None:
    checks = triton_checks(tmp_path / "site", tiny_repository, "127.0.0.1:9")
    assert not checks["Triton"].ok
    assert "no Triton answers at 127.0.0.1:9" in checks["Triton"].remedy
    assert not checks["models"].ok


def test_server_tells_its_version_what_it_holds_and_that_all_of_it_matches(
    installed: Path, tiny_repository: Path, tmp_path: Path
) -> None:
    repository = shutil.copytree(tiny_repository, tmp_path / "models")
    folder = tmp_path / "triton"
    folder.mkdir()
    (folder / "venv").symlink_to(installed / "venv")
    with LocalTriton(folder, repository, settings=Settings(threads=1)) as server:
        checks = triton_checks(tmp_path / "site", repository, server.url)
        assert checks["Triton"].ok
        assert checks["Triton"].detail.startswith("2.")
        assert checks["Triton"].detail.endswith(f"at {server.url} holds detector 1, encoder 1, head 1")
        assert checks["models"].detail == "detector 1, encoder 1, head 1: signatures, weights and probes match"

        other = shutil.copytree(tiny_repository, tmp_path / "others")
        weights = other / "head" / "1" / "meta.json"
        meta = json.loads(weights.read_text())
        meta["outputs"]["logits"]["shape"] = meta["outputs"]["p_values"]["shape"] = [99]
        meta["labels"] = [f"class {i}" for i in range(99)]
        weights.write_text(json.dumps(meta))
        wrong = triton_checks(tmp_path / "wrong", other, server.url)
        assert wrong["Triton"].ok
        assert "let the server serve this model repository" in wrong["models"].remedy
