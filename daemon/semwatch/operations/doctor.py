"""How a site stands: ``status`` for a glance, ``examine`` for what to fix. Reads only; safe beside a running daemon."""

import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from semwatch.classes import clusters
from semwatch.errors import ConfigError, ForeignRecord, SemwatchError, ServiceUnavailable
from semwatch.intake import folder_rules
from semwatch.line import pipeline
from semwatch.models import choice
from semwatch.models.inference import Models
from semwatch.models.model_repository import MODELS
from semwatch.operations import labels
from semwatch.service import drift, gate_watch
from semwatch.service.delivery import connect_handoff, connect_publisher
from semwatch.service.gate_watch import GateWatch
from semwatch.service.models_in_service import load_models, versions_of
from semwatch.settings.recipe import Recipe, load_recipe
from semwatch.settings.site import DEFAULT_NAME, Folder, Site, check_outbox
from semwatch.store import pause, recipes_in_use, serving
from semwatch.store.hook_runs import HOOKS, HookRuns
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.streams.handoff import Cycle
from semwatch.system.clock import moment_of, utc_of

RATE_WINDOW_S = 300
MIN_RATE_WINDOW_S = 30
HOOK_DAYS = 7
"""For so long a run of a hook that was given up is said."""
LEDGER_FIGURES = ("reviews_per_minute", "seen", "claimed", "done", "quarantined", "unpublished_records")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    """What to do where it is not ok."""
    advice: str = ""
    """A warning: what would be better, though the line works."""


def status(site: Site) -> dict[str, object]:
    """Whether the daemon runs, waiting files, rate, queue depths, models chosen and in service, learning, disk left.

    The keys are always the same; None where something cannot be asked. ``redis`` has the depths of the queues, or says
    "not configured" or "away: ...".

    Raises:
        ConfigError: the ledger is broken.
        ServiceUnavailable: the ledger's disk fails.
    """
    path, is_running = site.state_dir / LEDGER, _is_running(site)
    with ExitStack() as held:
        ledger = held.enter_context(Ledger(path, read_only=True)) if path.exists() else None
        ages = {folder.source: _waiting_ages(folder, ledger) for folder in site.folders}
        figures = _ledger_figures(ledger) if ledger else dict.fromkeys(LEDGER_FIGURES)
    waiting = [age for found in ages.values() for age in found or ()]
    return {
        "daemon_running": is_running,
        "paused": _pause_in_words(site, is_running),
        "waiting_files": len(waiting),
        "oldest_waiting_s": round(max(waiting, default=0.0)),
        "folders_away": [source for source, found in ages.items() if found is None],
        **figures,
        "models": {model: _or_none(partial(choice.choice, site.models.repository, model)) for model in MODELS},
        **_serving_figures(site, is_running),
        **_learning_figures(site),
        "alarms": [text for _, texts in sorted(_alarms(site).items()) for text in texts],
        "gates": _gate_sentences(site),
        "disk_free_mb": _free_mb(site.results_dir),
        "redis": _redis_figures(site),
    }


def examine(site: Site) -> list[Check]:
    """Check everything the daemon needs before it can work, and everything a person can mend."""
    checks = [_name_check(site), *(_folder_check(folder) for folder in site.folders)]
    checks += [_writable("results folder", site.results_dir), _writable("state folder", site.state_dir)]
    checks += _outbox_checks(site)
    checks += [_disk_check(site), _ledger_check(site.state_dir / LEDGER), *_pause_checks(site)]
    if site.models.runtime == "triton":
        checks.append(_try("Triton", partial(_triton_in_words, site.models.triton.url)))
    checks += [*_model_checks(site), *_learning_checks(site), *_alarm_checks(site), *_hook_checks(site)]
    if site.redis is not None:
        checks.append(_redis_check(site))
    return checks


def _ledger_figures(ledger: Ledger) -> dict[str, object]:
    return {
        "reviews_per_minute": _rate(ledger, datetime.now(UTC)),
        **{state.lower(): n for state, n in ledger.counts().items()},
        "unpublished_records": ledger.n_unpublished(),
    }


def _rate(ledger: Ledger, now: datetime) -> float:
    """Reviews a minute, since the first one of the last ``RATE_WINDOW_S``: a line that has just begun is not slow."""
    n, first_utc = ledger.reviews_since(utc_of(now - timedelta(seconds=RATE_WINDOW_S)))
    if first_utc is None:
        return 0.0
    passed_s = (now - moment_of(first_utc)).total_seconds()
    return round(n / max(passed_s, MIN_RATE_WINDOW_S) * 60, 1)


def _pause_in_words(site: Site, is_running: bool | None) -> str | None:
    """Why a running daemon takes no file, and since when; None where it takes files, or does not run."""
    found = pause.stated(site.state_dir) if is_running else None
    return None if found is None else f"{found[0].reason} since {found[1]}: {found[0].sentence}"


def _pause_checks(site: Site) -> Iterator[Check]:
    """Whether a running daemon takes files."""
    is_running = _is_running(site)
    if is_running:
        why = _pause_in_words(site, is_running)
        remedy = "see docs/night.md, SemwatchPaused; it goes on by itself once the cause is gone"
        yield Check("line", why is None, why or "takes files", "" if why is None else remedy)


def _redis_figures(site: Site) -> dict[str, int] | str:
    """Depths of the queues, or why there are none."""
    try:
        depths = _depths(site)
    except SemwatchError as error:
        return f"away: {error}"
    return "not configured" if depths is None else depths


def _waiting_ages(folder: Folder, ledger: Ledger | None) -> list[float] | None:
    """Seconds since each file that waits was put there; None where the folder cannot be read."""
    watched = folder_rules.Folder(**folder.model_dump(exclude={"recipe"}))
    try:
        found = list(folder_rules.walk(watched, ""))
    except OSError:
        return None
    files = [(path, watched.stamp(status)) for path, status in found]
    settled = ledger.settled(folder.source, files) if ledger else set()
    # ctime, because copies keep the mtime of their original
    return [max(time.time() - status.st_ctime, 0.0) for path, status in found if path not in settled]


def _serving_figures(site: Site, is_running: bool | None) -> dict[str, object]:
    """What the daemon said that it serves and has refused; a daemon that is gone serves nothing."""
    versions, refused = serving.announced(site.state_dir) if is_running else ({}, {})
    return {"in_service": versions or None, "refused_heads": {str(v): why for v, why in refused.items() if v > 0}}


def _learning_figures(site: Site) -> dict[str, object]:
    """What learning has said of itself; None where there is no Redis, or it is away."""
    with ExitStack() as held:
        handoff = connect_handoff(site)
        if handoff is None:
            return dict.fromkeys(("unknowns", "last_cycle", "wishes"))
        held.enter_context(handoff)
        cycle = _or_none(handoff.last_cycle)
        wishes = _or_none(handoff.wishes)
    return {
        "unknowns": dict(cycle.unknowns) if isinstance(cycle, Cycle) else None,
        "last_cycle": cycle.model_dump(exclude={"unknowns", "sentence"}) if isinstance(cycle, Cycle) else None,
        "wishes": [wish.sentence for wish in wishes.values()] if isinstance(wishes, dict) else None,
    }


def _alarms(site: Site) -> dict[str, list[str]]:
    """What the daemon's drift watch has alarmed about and what has not come back, by source of the site."""
    ours = {folder.source for folder in site.folders}
    return {source: texts for source, texts in drift.alarmed(site.state_dir / drift.STATE).items() if source in ours}


def _alarm_checks(site: Site) -> Iterator[Check]:
    """Alarms of each source as advice: the line works, what it is given does not."""
    for source, texts in sorted(_alarms(site).items()):
        advice = "see docs/night.md, SemwatchNoImage, SemwatchBadQuality and SemwatchDrift" if texts else ""
        yield Check(f"images of {source}", True, "; ".join(texts) or "no alarm", advice=advice)


def _hook_checks(site: Site) -> Iterator[Check]:
    """Whether the programs of hooks can be run, and what was given up of late."""
    hooks = {"on_lot_done": site.hooks.on_lot_done, "on_alarm": site.hooks.on_alarm}
    for name, argv in hooks.items():
        if argv and not os.access(argv[0], os.X_OK):
            remedy = f"make it a program that the daemon's user may run, or change hooks.{name} in the site settings"
            yield Check(f"hook {name}", False, f"{argv[0]} cannot be run", remedy)
    if site.host_event is not None and importlib.util.find_spec("secsgem") is None:
        yield Check("host event", False, "secsgem is not installed", "pip install 'semwatch[secsgem]'")
    path = site.state_dir / HOOKS
    if not path.exists():
        return
    try:
        with HookRuns(path, read_only=True) as runs:
            since = utc_of(datetime.now(UTC) - timedelta(days=HOOK_DAYS))
            given_up = [run for run in runs.given_up() if run.utc >= since]
            waiting = runs.waiting()
    except SemwatchError as error:
        yield Check("hooks", False, str(error), "delete it, the daemon makes it anew; runs that waited are lost")
        return
    last = "".join(f"; {run.hook} of {run.variables.get('lot') or run.utc}: {run.why}" for run in given_up[:1])
    advice = "mend the program: what was given up is not run again" if given_up else ""
    yield Check("hooks", True, f"{waiting} waiting, {len(given_up)} given up of late{last}", advice=advice)


def _is_running(site: Site) -> bool | None:
    """Say whether a daemon of this machine holds the ledger.

    The kernel's table answers: to try the lock, even for a moment, could turn away a daemon that starts just then.
    """
    lock = site.state_dir / f"{LEDGER}.lock"
    if not lock.exists():
        return False
    try:
        held = Path("/proc/locks").read_text()
    except OSError:
        return None
    return re.search(rf"FLOCK +ADVISORY +WRITE +-?\d+ \S+:{lock.stat().st_ino} ", held) is not None


def _folder_check(folder: Folder) -> Check:
    name = f"drop folder {folder.source}"
    if folder.path.exists() and not folder.path.is_dir():
        return Check(name, False, f"{folder.path} is not a folder", "give the folder's path in the site settings")
    if not folder.path.is_dir():
        return Check(
            name, False, f"{folder.path} is not there", "create it, or mount the share; the daemon waits for it"
        )
    if not os.access(folder.path, os.R_OK | os.X_OK):
        return Check(name, False, f"{folder.path} cannot be read", "give the daemon's user read and search rights")
    return Check(name, True, str(folder.path))


def _name_check(site: Site) -> Check:
    if site.name != DEFAULT_NAME:
        return Check("name", True, site.name)
    advice = "give the site a name of its own, `name` in the site settings: a fab tells its records apart by it"
    return Check("name", True, f"{site.name}, like every site that nobody has named", advice=advice)


def _writable(name: str, folder: Path) -> Check:
    place = _existing(folder)
    if not place.is_dir():
        return Check(name, False, f"{place} is not a folder", "move it away, or give another path in the site settings")
    if not os.access(place, os.W_OK | os.X_OK):
        return Check(name, False, f"{place} cannot be written", "give the daemon's user write rights there")
    return Check(name, True, str(folder))


def _outbox_checks(site: Site) -> Iterator[Check]:
    """Whether what is written back can get where the recipes want it."""
    for folder in site.folders:
        name = f"KLARFs of {folder.source}"
        recipe = _or_none(partial(load_recipe, folder.recipe))
        if not isinstance(recipe, Recipe):
            continue  # said by the check of the recipes
        settings = recipe.klarf
        try:
            check_outbox(site.folders, settings.outbox, folder.recipe)
        except ConfigError as error:
            yield Check(name, False, str(error), "give another folder as klarf.outbox of the recipe")
            continue
        if settings.pattern is not None and settings.outbox is not None:
            is_there = os.access(settings.outbox, os.W_OK | os.X_OK)
            where = f"{settings.outbox}" if is_there else f"{settings.outbox} is not there, or cannot be written"
            yield Check(
                name, is_there, where, "" if is_there else "make it, mount it, or give the daemon's user rights"
            )


def _disk_check(site: Site) -> Check:
    free_mb = _free_mb(site.results_dir)
    if free_mb is None:
        return Check("disk", False, f"{site.results_dir} cannot be reached", "mount the share, or mend its disk")
    detail = f"{free_mb} MB free, the line pauses under {site.limits.min_free_mb}"
    return Check("disk", free_mb >= site.limits.min_free_mb, detail, "free some space or lower limits.min_free_mb")


def _ledger_check(path: Path) -> Check:
    if not path.exists():
        return Check("ledger", True, "none yet, the daemon makes it")

    def look() -> str:
        with Ledger(path, read_only=True) as ledger:
            return _counted(ledger.counts().items())

    return _try("ledger", look)


def _model_checks(site: Site) -> Iterator[Check]:
    """Each recipe; the models that they need, loaded once; the gate that comes of both."""
    recipes: dict[str, Recipe] = {}
    for folder in site.folders:
        try:
            recipe = recipes[folder.source] = load_recipe(folder.recipe)
            yield _recipe_check(site, folder, recipe)
        except ConfigError as error:
            yield Check(f"recipe of {folder.source}", False, "cannot be used", str(error))
    try:
        models = load_models(site.models, recipes.values() or [Recipe()])
    except SemwatchError as error:
        yield Check("models", False, "cannot be used", str(error))
        return
    versions = {", ".join(f"{model} {n}" for model, n in loaded.versions().items()) for loaded in models.values()}
    proven = ": signatures, weights and probes match" if site.models.runtime == "triton" else ""
    yield Check("models", True, "; ".join(sorted(versions)) + proven)
    for version, why in sorted({item for loaded in models.values() for item in loaded.refused().items()}):
        yield Check(
            f"head {version}",
            False,
            f"cannot serve: {why}",
            "take it back with `semwatch models rollback`, or publish it again",
        )
    if _is_running(site):
        yield _service_check(versions_of(models), serving.announced(site.state_dir)[0])
    for source, recipe in recipes.items():
        yield _gate_check(f"gate of {source}", recipe, models[recipe.pins], _gates(site))


def _recipe_check(site: Site, folder: Folder, recipe: Recipe) -> Check:
    """Whether a recipe that can be read is the one in use, and whether its class table fits the models."""
    name, detail = f"recipe of {folder.source}", f"{recipe.name} version {recipe.version}, id {recipe.id}"
    used = recipes_in_use.stated(site.state_dir).get(folder.source) if _is_running(site) else None
    if used is not None and used.id != recipe.id:
        why = used.refused or "the daemon takes an edited recipe over within seconds; look again"
        return Check(name, False, f"{detail}; the daemon judges by id {used.id}", why)
    faults = labels.faults(recipe, labels.of_models(site.models.repository))
    if faults:
        remedy = "correct the label in `classes`; `semwatch models labels` lists those that there are"
        return Check(name, False, f"{detail}; {'; '.join(faults)}", remedy)
    return Check(name, True, detail)


def _triton_in_words(url: str) -> str:
    """The server and what it holds; that signatures and weights match, loading the models proves."""
    try:
        from semwatch.triton.inquiry import ask_server  # noqa: PLC0415 - an extra that an embedded site does not install
    except ImportError as error:
        raise ConfigError("runtime: triton needs its client: pip install 'semwatch[triton]'") from error
    state = ask_server(url)
    held = ", ".join(f"{model} {' '.join(map(str, ready)) or 'none'}" for model, ready in state.ready.items())
    return f"{state.version} at {url} holds {held}"


def _service_check(fit: Mapping[str, int], announced: Mapping[str, int]) -> Check:
    """Compare what the daemon serves with what would serve after a start."""
    late = [f"{model} {announced.get(model)} instead of {n}" for model, n in fit.items() if announced.get(model) != n]
    if late:
        return Check("in service", False, f"the daemon serves {', '.join(late)}", "restart the daemon, or see its log")
    return Check("in service", True, "the daemon serves these")


def _learning_checks(site: Site) -> Iterator[Check]:
    """What learning has found, and how its last cycle ended; nothing without Redis or before the first cycle."""
    handoff = connect_handoff(site)
    if handoff is None:
        return
    with handoff:
        try:
            cycle = handoff.last_cycle()
            state = handoff.classes()
            found = clusters.Clusters() if state is None else clusters.parsed(state, "the state of the found classes")
        except (ConfigError, ForeignRecord) as error:
            yield Check("learning", False, "cannot be used", str(error))
            return
        except ServiceUnavailable:
            return  # the check of Redis says so
    if cycle is None and not found.clusters:
        return
    yield Check("clusters", True, f"{len(found.clusters)} found so far")
    if cycle is not None:
        yield Check("unknowns", True, _counted(cycle.unknowns.items()) or "none kept yet")
        yield Check("last cycle", True, _cycle_in_words(cycle))


def _cycle_in_words(cycle: Cycle) -> str:
    head = f", head {cycle.version}" if cycle.version is not None else ""
    return f"{cycle.outcome}{head}, {cycle.utc}" + "".join(f"; {why}" for why in cycle.reasons)


def _gates(site: Site) -> GateWatch:
    return GateWatch.load(site.state_dir / gate_watch.STATE, is_owner=False)


def _gate_sentences(site: Site) -> dict[str, str]:
    """What each source's own scores say of its gate; sources whose recipe cannot be read are left out."""
    gates, sentences = _gates(site), {}
    for folder in site.folders:
        recipe = _or_none(partial(load_recipe, folder.recipe))
        if isinstance(recipe, Recipe):
            sentences[folder.source] = gates.sentence(recipe)
    return sentences


def _gate_check(name: str, recipe: Recipe, models: Models, gates: GateWatch) -> Check:
    """The gate's threshold and where it came from; advice where the stream's own scores propose quite another one."""
    detector = models.hashes()["detector"]
    try:
        stream = gates.threshold(recipe, detector)
        threshold, source = pipeline.gate_of(recipe, models, stream_threshold=stream)
    except SemwatchError as error:
        return Check(name, False, "cannot be used", str(error))
    detail, found = f"opens above {threshold:.4g}, which is the {source}'s", gates.proposal(recipe, detector)
    if found is None or stream is not None or found.low <= threshold <= found.high:
        return Check(name, True, f"{detail}; {gates.sentence(recipe, detector)}")
    remedy = f"look at overlays of images between the two, then set gate.threshold: {found.threshold:.6g} in the recipe"
    return Check(name, True, detail, advice=f"{gates.sentence(recipe, detector)}. To take it over: {remedy}")


def _redis_check(site: Site) -> Check:
    try:
        depths = _depths(site) or {}
    except ServiceUnavailable as error:
        remedy = "start it, or correct redis.url in the site settings; until then records wait in the ledger"
        return Check("Redis", False, str(error), remedy)
    except SemwatchError as error:
        return Check("Redis", False, "cannot be used", str(error))
    return Check("Redis", True, "answers; " + ", ".join(f"{name} {n}" for name, n in depths.items()))


def _depths(site: Site) -> dict[str, int] | None:
    publisher = connect_publisher(site)
    return None if publisher is None else {name: depth.length for name, depth in publisher.depths().items()}


def _counted(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{n} {what.lower()}" for what, n in counts)


def _free_mb(folder: Path) -> int | None:
    """Room on the disk of a folder; None where it cannot be asked."""
    try:
        return round(shutil.disk_usage(_existing(folder)).free / 1e6)
    except OSError:
        return None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    # Not Path.exists, which raises where a share is away.
    return next(place for place in (folder, *folder.parents) if os.access(place, os.F_OK) or place == place.parent)


def _try(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except SemwatchError as error:
        return Check(name, False, "cannot be used", str(error))


def _or_none(look: Callable[[], object]) -> object:
    try:
        return look()
    except SemwatchError:
        return None
