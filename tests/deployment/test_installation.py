import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from semwatch.cli import install as commands
from semwatch.deployment import installed_files, releases, systemctl
from semwatch.deployment.installation import copy_models
from semwatch.deployment.releases import Place
from semwatch.errors import ConfigError, ModelMismatch, SemwatchError, ServiceUnavailable
from semwatch.models import choice, crop_store, head_bank, model_repository
from semwatch.models.crop_store import KeptCrop
from semwatch.models.head_bank import Bank
from semwatch.models.model_repository import Meta
from semwatch.settings.fields import EXAMPLES
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import load_site
from semwatch.system.files import file_sha256

SITE = Path("/etc/semwatch/site.yaml")
UNIT = Path("/etc/systemd/system/semwatch.service")

app = typer.Typer()
app.command("install")(commands.install)
app.command("upgrade")(commands.upgrade_command)
app.command("uninstall")(commands.uninstall)


def semwatch(root: Path, name: str, *options: object) -> dict[Path, dict[str, str]]:
    """The files that a command tells of, by path."""
    told = said(root, name, *options)
    return {Path(row["path"]): row for row in told["files"]}


def said(root: Path, name: str, *options: object) -> dict:  # type: ignore[type-arg]
    ended = CliRunner().invoke(app, [name, "--root", str(root), "--json", *map(str, options)], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.output)  # type: ignore[no-any-return]


def actions(root: Path, name: str, *options: object) -> set[str]:
    return {row["action"] for row in semwatch(root, name, *options).values()}


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def at(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


# --- install ----------------------------------------------------------------------------------------------------------


def test_pages_for_operators_lie_where_units_and_alarms_point(tmp_path: Path) -> None:
    semwatch(tmp_path, "install")
    docs = Path("/usr/share/doc/semwatch")
    named = {Path(line.removeprefix("Documentation=file:")) for line in at(tmp_path, UNIT).read_text().splitlines()
             if line.startswith("Documentation=file:")}  # fmt: skip
    assert named == {docs / "docs/night.md"}
    guides = re.findall(r'guide: "([^"#]+)#', at(tmp_path, docs / "prometheus-rules.yaml").read_text())
    for page in [*named, *(docs / guide for guide in guides)]:
        assert at(tmp_path, page).is_file(), page
    linked = re.findall(r"\]\((\w+\.md)", at(tmp_path, docs / "docs/night.md").read_text())
    assert linked
    for name in linked:
        assert at(tmp_path, docs / "docs" / name).is_file(), name


def test_a_version_from_before_the_pages_can_still_be_laid_out(tmp_path: Path) -> None:
    package = tmp_path / "lib" / "python3.11" / "site-packages" / "semwatch"
    source = Path(installed_files.__file__).parents[1]
    shutil.copytree(installed_files.systemd_folder(source), package / "systemd")
    shutil.copytree(EXAMPLES, package / "examples")
    files = installed_files.wanted(package, prefix=Path("/opt/semwatch"), tools=("",))
    assert UNIT in files
    assert not [path for path in files if path.parent.name == "docs"]


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("sem-ws-07", "sem-ws-07"),
        ("ws7.fab3.example", "ws7"),
        ("örtchen 7", "rtchen-7"),
        ("localhost", "site"),
        ("localhost.localdomain", "site"),
        ("", "site"),
        ("-", "site"),
        ("w" * 80, "w" * 64),
    ],
)
def test_a_fresh_site_is_named_after_its_machine(tmp_path: Path, host: str, name: str) -> None:
    (tmp_path / "site.yaml").write_text(installed_files.site_yaml((EXAMPLES / "site.yaml").read_text(), "", host))
    assert load_site(tmp_path / "site.yaml").name == name


def test_install_writes_this_machines_name(tmp_path: Path) -> None:
    semwatch(tmp_path, "install")
    assert load_site(at(tmp_path, SITE)).name == (installed_files.site_name(platform.node()) or "site")


def test_an_example_without_a_name_is_laid_out_as_it_is() -> None:
    example = (EXAMPLES / "site.yaml").read_text()
    older = example.replace("#name: site\n", "")
    assert older != example
    assert installed_files.site_yaml(older, "", "ws7") == installed_files.site_yaml(older, "")


def test_dry_run_shows_every_file_and_writes_nothing(tmp_path: Path) -> None:
    shown = semwatch(tmp_path, "install", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert {row["action"] for row in shown.values()} == {"new"}
    assert shown == semwatch(tmp_path, "install")


def test_what_install_tells_is_what_is_there(tmp_path: Path) -> None:
    told = semwatch(tmp_path, "install")
    there = {Path("/") / path for path in tree(tmp_path)} | {Path("/opt/semwatch/current")}
    assert there - {Path("/var/lib/semwatch-install/installed.json")} == set(told)
    assert {UNIT, SITE, Path("/etc/sysusers.d/semwatch.conf"), Path("/etc/tmpfiles.d/semwatch.conf")} < set(told)


def test_a_second_install_changes_nothing(tmp_path: Path) -> None:
    semwatch(tmp_path, "install")
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}
    assert actions(tmp_path, "install") == {"unchanged"}
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()} == before


def test_files_can_be_read_by_all_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        semwatch(tmp_path, "install")
    finally:
        os.umask(old)
    assert stat.S_IMODE(at(tmp_path, SITE).stat().st_mode) == 0o644


def test_an_edited_file_stays_and_ours_lies_beside_it(tmp_path: Path) -> None:
    semwatch(tmp_path, "install")
    ours = at(tmp_path, SITE).read_bytes()
    at(tmp_path, SITE).write_text("folders: [mine]\n")
    for _ in "twice":
        step = semwatch(tmp_path, "install")[SITE]
        assert (step["action"], step["beside"]) == ("kept", f"{SITE}.new")
        assert at(tmp_path, SITE).read_text() == "folders: [mine]\n"
        assert at(tmp_path, SITE).with_name("site.yaml.new").read_bytes() == ours


def test_the_new_file_goes_once_the_edit_is_undone(tmp_path: Path) -> None:
    semwatch(tmp_path, "install")
    ours = at(tmp_path, SITE).read_bytes()
    at(tmp_path, SITE).write_text("x")
    semwatch(tmp_path, "install")
    at(tmp_path, SITE).write_bytes(ours)
    steps = semwatch(tmp_path, "install")
    assert (steps[SITE]["action"], steps[Path(f"{SITE}.new")]["action"]) == ("unchanged", "removed")
    assert not at(tmp_path, Path(f"{SITE}.new")).exists()


def test_a_file_that_was_there_before_us_counts_as_edited(tmp_path: Path) -> None:
    at(tmp_path, SITE).parent.mkdir(parents=True)
    at(tmp_path, SITE).write_text("theirs")
    assert semwatch(tmp_path, "install")[SITE]["action"] == "kept"
    semwatch(tmp_path, "uninstall")
    assert at(tmp_path, SITE).read_text() == "theirs"


def test_a_masked_unit_stays_masked(tmp_path: Path) -> None:
    at(tmp_path, UNIT).parent.mkdir(parents=True)
    at(tmp_path, UNIT).symlink_to("/dev/null")
    assert semwatch(tmp_path, "install")[UNIT]["action"] == "kept"
    assert at(tmp_path, UNIT).readlink() == Path("/dev/null")


def test_install_puts_a_deleted_file_back(tmp_path: Path) -> None:
    semwatch(tmp_path, "install")
    at(tmp_path, UNIT).unlink()
    steps = semwatch(tmp_path, "install")
    assert steps.pop(UNIT)["action"] == "new"
    assert {step["action"] for step in steps.values()} == {"unchanged"}
    assert at(tmp_path, UNIT).exists()


def test_a_file_that_we_replace_keeps_the_rights_a_person_gave_it(tmp_path: Path) -> None:
    semwatch(tmp_path, "install")
    record = at(tmp_path, Path("/var/lib/semwatch-install/installed.json"))
    at(tmp_path, UNIT).chmod(0o600)
    at(tmp_path, UNIT).write_text("an older one of ours")
    told = json.loads(record.read_text())
    told["files"][str(UNIT)] = file_sha256(at(tmp_path, UNIT))
    record.write_text(json.dumps(told))
    assert semwatch(tmp_path, "install")[UNIT]["action"] == "replaced"
    assert stat.S_IMODE(at(tmp_path, UNIT).stat().st_mode) == 0o600


def test_another_version_is_sent_to_upgrade(tmp_path: Path) -> None:
    semwatch(tmp_path, "install")
    record = at(tmp_path, Path("/var/lib/semwatch-install/installed.json"))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"version": "0.0.9"}))
    with pytest.raises(ConfigError, match="use `semwatch upgrade`"):
        semwatch(tmp_path, "install")


def test_a_record_that_is_damaged_is_told(tmp_path: Path) -> None:
    semwatch(tmp_path, "install")
    at(tmp_path, Path("/var/lib/semwatch-install/installed.json")).write_text("{")
    with pytest.raises(ConfigError, match=r"installed\.json cannot be used"):
        semwatch(tmp_path, "install")


# --- settings and tools -----------------------------------------------------------------------------------------------


def test_first_settings_load_and_point_at_the_layout(tmp_path: Path) -> None:
    semwatch(tmp_path, "install")
    site = load_site(at(tmp_path, SITE))
    assert site.folders[0].path == Path("/srv/semwatch/drop/tool-a")
    assert (site.results_dir, site.state_dir) == (Path("/srv/semwatch/results"), Path("/var/lib/semwatch"))
    assert site.models.repository == Path("/srv/semwatch/model_repository")
    assert site.redis is not None
    assert site.redis.url == "unix:///run/semwatch-redis/redis.sock"
    assert load_recipe(site.folders[0].recipe) == load_recipe(EXAMPLES / "recipe.yaml")
    assert at(tmp_path, SITE).read_text().count("#") > 30  # the comments came along


def test_each_tool_has_settings_folders_and_queues_of_its_own(tmp_path: Path) -> None:
    semwatch(tmp_path, "install", "--tool", "sem-1")
    steps = semwatch(tmp_path, "install", "--tool", "sem_2")
    assert steps[Path("/etc/semwatch/sem-1/site.yaml")]["action"] == "unchanged"
    one, two = (load_site(at(tmp_path, Path(f"/etc/semwatch/{tool}/site.yaml"))) for tool in ("sem-1", "sem_2"))
    assert not at(tmp_path, SITE).exists()
    assert (one.folders[0].source, one.folders[0].path) == ("sem-1", Path("/srv/semwatch/sem-1/drop"))
    assert one.redis is not None
    assert two.redis is not None
    assert one.redis.prefix != two.redis.prefix
    assert {one.state_dir, one.results_dir}.isdisjoint({two.state_dir, two.results_dir})
    folders = at(tmp_path, Path("/etc/tmpfiles.d/semwatch-sem-1.conf")).read_text()
    rows = {line.split()[1]: line.split()[2:5] for line in folders.splitlines() if line.startswith("d")}
    assert {str(one.folders[0].path), str(one.results_dir), str(one.state_dir)} < set(rows)
    assert rows[str(one.results_dir)][1:] == ["semwatch", "semwatch"]


@pytest.mark.parametrize("name", ["-x", "a b", "a/b", "..", "a.b", "ä", "x" * 33, "results", "drop", "a\n"])
def test_a_tool_that_cannot_name_a_unit_or_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--tool"):
        installed_files.checked_tool(name)


def test_units_start_what_lies_in_another_prefix(tmp_path: Path) -> None:
    semwatch(tmp_path, "install", "--prefix", "/srv/opt/sw")
    unit = at(tmp_path, UNIT).read_text()
    assert "/srv/opt/sw/current/bin/semwatch run" in unit
    assert "/opt/semwatch" not in unit
    with pytest.raises(ConfigError, match="--prefix /srv/opt/sw"):
        semwatch(tmp_path, "install")


@pytest.mark.parametrize("prefix", ["opt", "/opt/a b", "/opt/%n", "/home/me/x", "/tmp/x", "/", "/opt/../x"])
def test_a_prefix_that_units_cannot_name_or_see_is_refused(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--prefix"):
        semwatch(tmp_path, "install", "--prefix", prefix)


def test_a_package_without_units_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder systemd"):
        installed_files.wanted(tmp_path / "lib" / "semwatch", prefix=Path("/opt/semwatch"), tools=("",))


@pytest.fixture
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published repository; nothing here runs the networks, so their weights are a few bytes."""
    folder = tmp_path_factory.mktemp("built")
    weights = folder / "weights"
    weights.write_bytes(b"weights")
    for model in ("detector", "encoder", "head", "head"):
        meta = Meta.model_validate({"model": model, "created_utc": "2026-01-01T00:00:00Z", "inputs": {}, "outputs": {}})
        model_repository.publish(folder / "models", meta, weights)
    choice.withdraw(folder / "models", "head", 1, "poor")
    return folder / "models"


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_are_published_once_and_never_overwritten(tmp_path: Path, built: Path) -> None:
    assert said(tmp_path, "install", "--models", built, "--dry-run")["models"]
    assert list(tmp_path.iterdir()) == []
    repository = at(tmp_path, Path("/srv/semwatch/model_repository"))
    repository.mkdir(parents=True)
    repository.chmod(0o2750)
    copied = said(tmp_path, "install", "--models", built)["models"]
    assert {stat.S_IMODE((repository / model).stat().st_mode) for model in model_repository.MODELS} == {0o2750}
    assert {name.partition("/")[0] for name in copied} == {"detector", "encoder", "head"}
    for name in copied:
        model, _, version = name.partition("/")
        meta = model_repository.read_meta(repository, model, int(version))
        assert model_repository.weights_path(repository, model, int(version), meta).stat().st_mode & 0o444 == 0o444
    assert choice.why_withdrawn(repository, "head", 1) == "poor"
    assert choice.choice(repository, "head") == 2
    mine = repository / copied[0] / "mine"
    mine.write_text("x")
    assert said(tmp_path, "install", "--models", built)["models"] == []
    assert mine.exists()
    assert not list(repository.glob("*/.staging-*"))


def test_crops_that_the_heads_were_fitted_on_come_along_readable_for_all(tmp_path: Path, built: Path) -> None:
    rng = np.random.default_rng(0)
    crop = KeptCrop(
        rng.integers(0, 256, (20, 20), dtype=np.uint8), np.zeros((4, 4), np.float32), np.zeros(2, np.float32)
    )
    named, other = (crop_store.write(built, [each]) for each in (crop, replace(crop, size=np.ones(2, np.float32))))
    bank = Bank(np.ones((1, 3), np.float32), ("a",), ("i",), ("",), tuple(named))
    head_bank.write(bank, built / "head" / "2" / head_bank.BANK)
    repository = at(tmp_path, Path("/srv/semwatch/model_repository"))
    semwatch(tmp_path, "install", "--models", built)
    path = crop_store.path_of(repository, named[0].shard)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [each.stem for each in path.parent.iterdir()] == [named[0].shard] != [other[0].shard]
    (kept,) = head_bank.crops_of(head_bank.read(repository / "head" / "2" / head_bank.BANK), repository)
    assert kept is not None
    assert np.array_equal(kept.crop, crop.crop)
    assert said(tmp_path, "install", "--models", built)["models"] == []


def test_weights_that_are_not_the_published_ones_are_not_copied(tmp_path: Path, built: Path) -> None:
    (built / "head" / "2" / "model.onnx").write_bytes(b"other")
    with pytest.raises(ModelMismatch, match="sha256 differs"):
        copy_models(Place(root=tmp_path), built, dry_run=False)
    assert model_repository.versions(at(tmp_path, Path("/srv/semwatch/model_repository")), "head") == [1]


def test_a_folder_without_models_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match="has no detector, encoder, head"):
        copy_models(Place(root=tmp_path), tmp_path, dry_run=False)


# --- uninstall --------------------------------------------------------------------------------------------------------


def test_uninstall_leaves_nothing_of_an_untouched_installation(tmp_path: Path) -> None:
    semwatch(tmp_path, "install", "--tool", "a")
    semwatch(tmp_path, "install", "--tool", "b")
    assert actions(tmp_path, "uninstall", "--dry-run") == {"removed"}
    assert at(tmp_path, UNIT).exists()
    assert actions(tmp_path, "uninstall") == {"removed"}
    assert tree(tmp_path) == {}
    assert not at(tmp_path, Path("/opt/semwatch/current")).is_symlink()
    for folder in ("/etc/semwatch", "/usr/share/doc/semwatch", "/var/lib/semwatch-install"):
        assert not at(tmp_path, Path(folder)).exists()


def test_uninstall_keeps_data_and_edits_and_says_how_they_go(tmp_path: Path, built: Path) -> None:
    semwatch(tmp_path, "install", "--models", built)
    at(tmp_path, SITE).write_text("mine")
    ledger = at(tmp_path, Path("/var/lib/semwatch/ledger.sqlite"))
    ledger.parent.mkdir(parents=True)
    ledger.write_text("data")
    own = at(tmp_path, UNIT).parent / "semwatch.service.d"
    own.mkdir()
    told = said(tmp_path, "uninstall")
    assert at(tmp_path, SITE).read_text() == "mine"
    assert ledger.exists()
    stays = ("/etc/semwatch", "/var/lib/semwatch", "/srv/semwatch", "/etc/systemd/system/semwatch.service.d")
    assert told["stays"] == [f"rm -rf {tmp_path}{path}" for path in stays]


def test_purge_removes_edited_settings_but_no_data(tmp_path: Path, built: Path) -> None:
    semwatch(tmp_path, "install", "--models", built)
    at(tmp_path, SITE).write_text("mine")
    semwatch(tmp_path, "uninstall", "--purge")
    assert not at(tmp_path, SITE).parent.exists()
    assert at(tmp_path, Path("/srv/semwatch/model_repository/head")).is_dir()


def test_one_tool_of_several_is_uninstalled_alone(tmp_path: Path) -> None:
    semwatch(tmp_path, "install", "--tool", "a")
    semwatch(tmp_path, "install", "--tool", "b")
    gone = semwatch(tmp_path, "uninstall", "--tool", "a")
    assert set(gone) == {
        *(Path(f"/etc/semwatch/a/{name}") for name in ("site.yaml", "recipe.yaml")),
        Path("/etc/tmpfiles.d/semwatch-a.conf"),
    }
    assert not at(tmp_path, Path("/etc/semwatch/a")).exists()
    assert actions(tmp_path, "install", "--tool", "b") == {"unchanged"}
    with pytest.raises(ConfigError, match="is not installed; there are b"):
        semwatch(tmp_path, "uninstall", "--tool", "a")


@pytest.mark.parametrize("command", ["upgrade", "uninstall"])
def test_where_nothing_is_installed_that_is_said(command: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no installation here"):
        semwatch(tmp_path, command)


# --- what the machine must have ---------------------------------------------------------------------------------------


def test_a_version_that_lives_elsewhere_is_told_the_commands(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "0.1.0"], check=True, timeout=60)
    check = (
        "import sys; from pathlib import Path; from semwatch.deployment.releases import Place, check_own_environment\n"
        "check_own_environment(Place(Path(sys.argv[1])), sys.argv[2])"
    )
    site_packages = str(Path(installed_files.__file__).parents[2])

    def checked(version: str) -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [tmp_path / "0.1.0" / "bin" / "python", "-c", check, tmp_path, version]
        environ = {**os.environ, "PYTHONPATH": site_packages}
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)

    assert checked("0.1.0").stderr == ""
    refused = checked("0.2.0").stderr
    assert f"python3 -m venv {tmp_path}/0.2.0" in refused
    assert "pip install --no-index" in refused


def test_a_version_is_found_by_its_number_or_the_others_are_named(tmp_path: Path) -> None:
    at_ = Place(root=tmp_path)
    with pytest.raises(ConfigError, match="there: none"):
        releases.release_in_prefix(at_, "0.1.0")
    put_version(tmp_path, "0.1.0")
    assert releases.release_in_prefix(at_, "0.1.0").package.name == "semwatch"
    for wrong in ("0.2.0", "../0.1.0", "", "current"):
        with pytest.raises(ConfigError, match=r"there: 0\.1\.0"):
            releases.release_in_prefix(at_, wrong)


def test_a_machine_without_systemd_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(systemctl, "BOOTED", tmp_path / "none")
    with pytest.raises(ConfigError, match="systemd does not run this machine"):
        CliRunner().invoke(app, ["install", "--dry-run"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("command", "error", "words"),
    [
        (["no-such-systemctl"], ConfigError, "is not on this machine"),
        (["sh", "-c", "echo Access denied >&2; exit 4"], ServiceUnavailable, r"failed \(4\): Access denied"),
        (["sleep", "30"], ServiceUnavailable, "did not end within 0.2 s"),
    ],
)
def test_what_a_tool_of_systemd_does_wrong_is_told_in_words(
    command: list[str], error: type[SemwatchError], words: str
) -> None:
    with pytest.raises(error, match=words):
        systemctl.call(*command, timeout_s=0.2)


def put_version(root: Path, version: str) -> Path:
    """A version in the prefix, as pip lays it out; returns its package."""
    home = root / "opt" / "semwatch" / version
    package = home / "lib" / "python3.11" / "site-packages" / "semwatch"
    for folder in (package, home / "bin"):
        folder.mkdir(parents=True)
    for file in (package / "__init__.py", home / "bin" / "semwatch"):
        file.touch(0o755)
    return package
