"""The units as systemd itself reads and judges them, and what the files beside them promise."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from paths import ROOT
from semwatch.service.learning_side import EARLY_CYCLE
from semwatch.service.metrics import Metrics
from semwatch.settings.site import Limits, Redis, Site, load_site
from semwatch.settings.site import Triton as TritonSettings

UNITS = ROOT / "systemd"
DROP_INS = UNITS / "drop-ins"
RULES = yaml.safe_load((UNITS / "prometheus-rules.yaml").read_text())["groups"][0]["rules"]
GUIDE = ROOT / "docs" / "night.md"
OPERATOR_PAGES = [ROOT / "docs" / name for name in ("install.md", "night.md", "operations.md")]
PROGRAMS = "/opt/semwatch/current/bin"

DAEMONS = ("semwatch.service", "semwatch@.service")
CYCLES = ("semwatch-retrain.service", "semwatch-retrain@.service")
SERVICES = (*DAEMONS, *CYCLES, "semwatch-redis.service", "semwatch-triton.service")
ALL = sorted(file.name for file in UNITS.iterdir() if file.suffix in (".service", ".timer", ".path", ".target"))
WHERE = {  # drop-in: the units that it is for
    "gpu.conf": ("semwatch-triton.service",),
    "network-share.conf": DAEMONS,
    "triton.conf": DAEMONS,
    "remote-triton.conf": DAEMONS,
    "remote-redis.conf": (*DAEMONS, *CYCLES),
    "remote-metrics.conf": DAEMONS,
    "redis-port.conf": ("semwatch-redis.service",),
    "distribution-redis.conf": ("redis-server.service",),
}

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (Debian: systemd)"
)
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


def settings(text: str) -> dict[str, list[str]]:
    """Every value of every key of a unit, in order; continued lines are one, and an empty value forgets the earlier."""
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found[key] = [*found.get(key, []), value] if value else []
    return found


def unit(name: str, *drop_ins: str) -> dict[str, list[str]]:
    texts = [(UNITS / name).read_text(), *((DROP_INS / drop_in).read_text() for drop_in in drop_ins)]
    return settings("\n".join(texts))


def command(*argv: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, argv)), cwd=cwd, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """A machine's root as an installation leaves it, with systemd's own units and programs that can be started."""
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for name in ALL:
        shutil.copy(UNITS / name, units)
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    started = {settings((UNITS / name).read_text())["ExecStart"][0].split()[0] for name in SERVICES}
    for program in (*started, f"{PROGRAMS}/semwatch-train", "/usr/bin/redis-server"):
        path = tmp_path / program[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    return tmp_path


def verify(root: Path, name: str) -> str:
    """What systemd finds wrong with the unit, without what it says of the distribution's own."""
    instance = name.replace("@.", "@tool-a.")
    said = command("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", f"--root={root}", instance)
    lines = [line for line in said.stderr.splitlines() if "/usr/lib/systemd/system/" not in line]
    return "\n".join(lines) or ("" if said.returncode == 0 else f"exit status {said.returncode}")


# --- systemd's own judgement -----------------------------------------------------------------------------------------


@needs_systemd
def test_a_fault_in_a_unit_is_found(staged: Path) -> None:
    file = staged / "etc/systemd/system/semwatch.service"
    file.write_text(file.read_text().replace("WatchdogSec=60", "WatchdogSecs=60"))
    assert "WatchdogSecs" in verify(staged, "semwatch.service")


@needs_systemd
def test_a_program_that_is_not_there_is_found(staged: Path) -> None:
    (staged / PROGRAMS[1:] / "semwatch").unlink()
    assert "not executable" in verify(staged, "semwatch.service")


@needs_systemd
@pytest.mark.parametrize("name", ALL)
def test_systemd_finds_nothing_wrong(staged: Path, name: str) -> None:
    assert verify(staged, name) == ""


@needs_systemd
@pytest.mark.parametrize("drop_in", sorted(WHERE))
def test_systemd_finds_nothing_wrong_with_a_drop_in(staged: Path, drop_in: str) -> None:
    for name in WHERE[drop_in]:
        folder = staged / f"etc/systemd/system/{name}.d"
        folder.mkdir()
        shutil.copy(DROP_INS / drop_in, folder)
        if name == "redis-server.service":  # the distribution's, in short
            unit_file = "[Service]\nType=notify\nExecStart=/usr/bin/redis-server /etc/redis/redis.conf\n"
            (staged / "usr/lib/systemd/system" / name).write_text(unit_file)
        assert verify(staged, name) == ""


@needs_systemd
@pytest.mark.parametrize(
    ("name", "drop_ins", "threshold"),
    [
        *((name, (), 15) for name in SERVICES),
        *(
            (name, ("triton.conf", "remote-triton.conf", "remote-redis.conf", "network-share.conf"), 15)
            for name in DAEMONS
        ),
        ("semwatch-redis.service", ("redis-port.conf",), 15),
        ("semwatch-triton.service", ("gpu.conf",), 25),
    ],
)
def test_exposure_stays_below_the_threshold(
    tmp_path: Path, name: str, drop_ins: tuple[str, ...], threshold: int
) -> None:
    texts = [(UNITS / name).read_text(), *((DROP_INS / drop_in).read_text() for drop_in in drop_ins)]
    (tmp_path / name).write_text("\n".join(texts))
    said = command(
        "systemd-analyze", "security", "--no-pager", "--offline=true", f"--threshold={threshold}", tmp_path / name
    )
    assert said.returncode == 0, said.stdout.splitlines()[-1]


@needs_systemd
def test_a_bare_unit_is_above_the_threshold(tmp_path: Path) -> None:
    (tmp_path / "bare.service").write_text("[Service]\nExecStart=/bin/true\n")
    said = command("systemd-analyze", "security", "--offline=true", "--threshold=25", tmp_path / "bare.service")
    assert said.returncode != 0


@needs_systemd
def test_the_nightly_time_is_one_that_systemd_understands() -> None:
    for name in ("semwatch-retrain.timer", "semwatch-retrain@.timer"):
        (when,) = unit(name)["OnCalendar"]
        assert command("systemd-analyze", "calendar", when).returncode == 0


# --- what an outage, a fault and a hang lead to ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_no_unit_falls_with_another(name: str) -> None:
    found = unit(name)
    assert not {"Requires", "BindsTo", "Requisite"} & found.keys()
    assert found["PartOf"] == ["semwatch.target"]


@pytest.mark.parametrize("name", [*DAEMONS, "semwatch-redis.service", "semwatch-triton.service"])
def test_what_is_away_for_a_night_comes_back_and_wrong_settings_do_not_loop(name: str) -> None:
    found = unit(name)
    assert found["StartLimitIntervalSec"] == ["0"]
    assert found["Restart"][0] in ("on-failure", "always")
    assert "2" in found["RestartPreventExitStatus"][0].split()
    assert float(found["RestartSec"][0]) >= 1


@pytest.mark.parametrize("name", DAEMONS)
def test_bounds_of_the_daemon_leave_room_for_what_the_site_allows(name: str) -> None:
    found = unit(name)
    assert float(found["TimeoutStopSec"][0]) > Limits().stop_timeout_s + Redis(url="redis://h:1").timeout_s
    assert float(found["TimeoutStartSec"][0]) > 3 * TritonSettings().timeout_s
    assert found["Type"] == ["notify"]
    assert found["NotifyAccess"] == ["main"]
    assert found["RestartPreventExitStatus"] == ["2 3"]


def test_learning_never_goes_before_the_line() -> None:
    for name, daemon in zip(CYCLES, DAEMONS, strict=True):
        cycle, line = unit(name), unit(daemon)
        assert int(cycle["CPUWeight"][0]) * 20 <= int(line["CPUWeight"][0])
        assert int(cycle["IOWeight"][0]) * 20 <= int(line["IOWeight"][0])
        assert cycle["Slice"] == line["Slice"]  # weights are compared within one slice only
        assert int(cycle["OOMScoreAdjust"][0]) > int(line["OOMScoreAdjust"][0])
        assert cycle["MemoryMax"]


def test_cycles_of_several_tools_run_one_after_the_other() -> None:
    for name in CYCLES:
        assert unit(name)["ExecStart"][0].startswith("/usr/bin/flock --no-fork /srv/semwatch/model_repository ")


# --- paths ------------------------------------------------------------------------------------------------------------


def folders() -> dict[str, list[str]]:
    """tmpfiles.d: path -> mode, user, group."""
    rows = [row.split() for row in (UNITS / "semwatch.tmpfiles.conf").read_text().splitlines() if row[:1] == "d"]
    return {row[1]: row[2:5] for row in rows}


def example() -> Site:
    return load_site(ROOT / "daemon/semwatch/settings/examples/site.yaml")


@pytest.mark.parametrize(
    ("name", "drop_ins"),
    [
        *((name, ()) for name in SERVICES),
        *((name, (drop_in,)) for drop_in, names in WHERE.items() for name in names if name in SERVICES),
    ],
)
def test_what_a_unit_may_write_is_a_folder_that_tmpfiles_makes_for_its_user(
    name: str, drop_ins: tuple[str, ...]
) -> None:
    found = unit(name, *drop_ins)
    user, groups = found["User"][0], {found["Group"][0], *found.get("SupplementaryGroups", [])}
    for path in found.get("ReadWritePaths", []):
        if path.startswith("-"):  # a share
            continue
        mode, owner, group = folders()[path.replace("/%i", "")]
        assert owner == user or (group in groups and int(mode, 8) & 0o020), path


def test_units_write_where_the_example_site_says() -> None:
    site, daemon, cycle = example(), unit("semwatch.service"), unit("semwatch-retrain.service")
    assert daemon["ReadWritePaths"] == [str(site.results_dir)]
    assert f"/var/lib/{daemon['StateDirectory'][0]}" == str(site.state_dir)
    assert cycle["ReadWritePaths"] == [str(site.models.repository)]
    assert cycle["StateDirectory"] == daemon["StateDirectory"]
    assert {str(site.folders[0].path), str(site.results_dir), str(site.models.repository)} <= folders().keys()
    assert unit("semwatch-retrain.path")["PathChanged"] == [str(site.state_dir / EARLY_CYCLE)]


def test_no_daemon_may_write_models_or_drop_folders() -> None:
    site = example()
    for name in DAEMONS:
        writable = [Path(path) for path in unit(name)["ReadWritePaths"]]
        for kept in (site.models.repository, *(folder.path for folder in site.folders)):
            assert not any(kept.is_relative_to(path) for path in writable)
        assert unit(name)["ProtectSystem"] == ["strict"]


def test_template_differs_from_the_unit_of_a_single_tool_by_its_name_alone() -> None:
    for name in ("semwatch.service", "semwatch-retrain.service", "semwatch-retrain.path", "semwatch-retrain.timer"):
        one, many = unit(name), unit(name.replace(".", "@.", 1))
        for key in one.keys() - {"Description", "After", "TimeoutStartSec"}:
            assert [value.replace("/%i", "") for value in many[key]] == one[key], (name, key)
        assert one.keys() == many.keys()


def test_every_user_and_group_is_made() -> None:
    text = (UNITS / "semwatch.sysusers.conf").read_text()
    made = {row.split()[1] for row in text.splitlines() if row[:1] in ("u", "g")} | {"root"}
    named = {name for unit_name in SERVICES for key in ("User", "Group") for name in unit(unit_name)[key]}
    named |= {name for _, user, group in folders().values() for name in (user, group)}
    assert named <= made


@needs_systemd
def test_systemd_makes_users_and_folders_with_their_rights(tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None or command("id", "-u").stdout.strip() != "0":
        pytest.skip("only root may make users and folders of others")
    (tmp_path / "etc").mkdir()
    shutil.copy(UNITS / "semwatch.sysusers.conf", tmp_path / "etc/s.conf")
    sysusers = command("systemd-sysusers", f"--root={tmp_path}", tmp_path / "etc/s.conf")
    assert sysusers.returncode == 0, sysusers.stderr
    shutil.copy(UNITS / "semwatch.tmpfiles.conf", tmp_path / "etc/t.conf")
    made = command("systemd-tmpfiles", "--create", f"--root={tmp_path}", tmp_path / "etc/t.conf")
    assert made.returncode == 0, made.stderr
    for path, (mode, *_) in folders().items():
        assert (tmp_path / path[1:]).stat().st_mode & 0o7777 == int(mode, 8), path


# --- alarms and the guide ---------------------------------------------------------------------------------------------


def measured() -> set[str]:
    """Every name that a daemon's endpoint can show."""
    registry: CollectorRegistry = Metrics(["tool-a"]).registry
    names = set()
    for family in registry.collect():
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + end for end in ends}
    return names


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alarm_asks_for_what_the_daemon_measures(rule: dict[str, str]) -> None:
    named = set(re.findall(r"\bsemwatch_\w+", rule["expr"]))
    assert named or "up{" in rule["expr"]
    assert named <= measured()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alarm_leads_to_its_section_of_the_guide(rule: dict[str, dict[str, str]]) -> None:
    assert rule["annotations"]["guide"] == f"docs/{GUIDE.name}#{str(rule['alert']).lower()}"
    assert f"\n### {rule['alert']}\n" in GUIDE.read_text()


def test_guide_explains_no_alarm_that_is_not_there() -> None:
    assert set(re.findall(r"^### (Semwatch\w+)$", GUIDE.read_text(), re.M)) == {rule["alert"] for rule in RULES}


def test_operator_pages_name_files_that_are_there() -> None:
    text = "\n".join(page.read_text() for page in OPERATOR_PAGES)
    assert set(re.findall(r"drop-ins/([\w-]+\.conf)", text)) == set(WHERE)
    assert sorted(WHERE) == sorted(file.name for file in DROP_INS.iterdir())
    for name in re.findall(r"\bsemwatch[\w@-]*\.(?:service|timer|path|target)\b", text):
        assert re.sub(r"@[\w-]*\.", "@.", name) in ALL, name


@needs_promtool
def test_prometheus_accepts_the_rules() -> None:
    said = command("promtool", "check", "rules", UNITS / "prometheus-rules.yaml")
    assert said.returncode == 0, said.stderr


CASES = {  # alert: series that make it fire within 65 minutes, and those that must not
    "SemwatchDown": ('up{job="semwatch"}', "0x65", "1x65"),
    "SemwatchImageWaits": ("semwatch_oldest_waiting_seconds", "0+60x65", "0x65"),
    "SemwatchPaused": ('semwatch_paused{reason="results away"}', "0x55 1x10", "0x50 1x3 0x12"),
    "SemwatchFilesFail": ('semwatch_errors_total{service="file"}', "0+2x65", "0x30 0+1x10 10x25"),
    "SemwatchLineWaits": ('semwatch_errors_total{service="line"}', "0+1x65", "3x65"),
    "SemwatchRecordsWait": ("semwatch_unpublished_records", "5x65", "0x10 5x5 0x50"),
    "SemwatchQuarantine": ('semwatch_quarantined_total{source="a"}', "0x30 0+1x35", "0x64 1"),
    "SemwatchDiskFull": ("semwatch_disk_free_bytes", "9e9-1e7x65", "9e9x65"),
    "SemwatchHeadRefused": ('semwatch_swap_refused_total{model="head"}', "_x60 1x5", "1x65"),
    "SemwatchDrift": ('semwatch_drift_alarms_total{source="a",what="score"}', "0x60 1x5", "1x65"),
    "SemwatchNoImage": ('semwatch_drift{source="a",what="no image"}', "0x60 1x5", "0.8x65"),
    "SemwatchBadQuality": ('semwatch_drift{source="a",what="bad quality"}', "0x40 1.2x25", "0.95x65"),
    "SemwatchManyUnknown": ('semwatch_reviews_total{source="a",verdict="unknown"}', "0+2x65", "0+0x65"),
    "SemwatchSlow": ('semwatch_stage_seconds_bucket{stage="detect",le="+Inf"}', "0+2x65", "0x65"),
    "SemwatchClock": ("semwatch_last_review_timestamp_seconds", "9000x65", "3000x65"),
}


@needs_promtool
@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_alarm_fires_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    series, bad, good = CASES[alert]
    also = []
    if alert == "SemwatchSlow":
        also = [{"series": 'semwatch_stage_seconds_bucket{stage="detect",le="10.0"}', "values": "0x65"}]
    for values, fires in ((bad, True), (good, False)):
        tests = {
            "rule_files": [str(UNITS / "prometheus-rules.yaml")],
            "tests": [
                {
                    "interval": "1m",
                    "input_series": [{"series": series, "values": values}, *also],
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})',
                            "eval_time": "65m",
                            "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                        }
                    ],
                }
            ],
        }
        (tmp_path / "case.yaml").write_text(yaml.safe_dump(tests))
        said = command("promtool", "test", "rules", tmp_path / "case.yaml")
        assert said.returncode == 0, (fires, said.stdout + said.stderr)
