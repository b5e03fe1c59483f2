"""The files of an installation and what stands in them: units, users, folders, documentation, first settings.

They come from the package that will serve: ``semwatch/systemd`` and ``semwatch/docs`` in a wheel, the repository's
``systemd`` and ``docs`` in a source tree, and ``semwatch/settings/examples``. Where they go:

    *.service *.timer *.path *.target   /etc/systemd/system
    *.sysusers.conf                     /etc/sysusers.d/semwatch.conf
    *.tmpfiles.conf                     /etc/tmpfiles.d/semwatch.conf, for a tool also semwatch-TOOL.conf
    *.md *.yaml drop-ins/*.conf         /usr/share/doc/semwatch: to read; a drop-in serves where a person puts it
    docs/*.md                           /usr/share/doc/semwatch/docs
    examples/site.yaml, recipe.yaml     /etc/semwatch, for a tool /etc/semwatch/TOOL
"""

import re
from pathlib import Path

from semwatch.errors import ConfigError

PREFIX = Path("/opt/semwatch")
"""What the units have written in them."""
UNITS = Path("/etc/systemd/system")
SYSUSERS = Path("/etc/sysusers.d")
TMPFILES = Path("/etc/tmpfiles.d")
DOCS = Path("/usr/share/doc/semwatch")
SETTINGS = Path("/etc/semwatch")
STATE = Path("/var/lib/semwatch")
DATA = Path("/srv/semwatch")
REPOSITORY = DATA / "model_repository"
REDIS_URL = "unix:///run/semwatch-redis/redis.sock"
"""Where semwatch-redis.service listens."""

_UNIT_SUFFIXES = (".service", ".timer", ".path", ".target")
_TAKEN = frozenset({"results", "drop", "model_repository", "learning", "quarantine"})
"""Names of folders that the site without a name has beside the tools'."""


def checked_tool(tool: str) -> str:
    """Return the name of a tool, ``""`` for the machine's only one, if it can name units, folders and keys.

    Raises:
        ConfigError: it cannot.
    """
    if tool and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,31}", tool):
        raise ConfigError(
            f"--tool {tool!a}: a tool's name is 1 to 32 of the characters A-Z a-z 0-9 _ - and does not begin "
            f"with - (it names the unit semwatch@NAME.service and folders)"
        )
    if tool in _TAKEN:
        raise ConfigError(f"--tool {tool}: a folder of semwatch has that name; give the tool another")
    return tool


def settings_folder(tool: str) -> Path:
    """Where the settings of a tool lie."""
    return SETTINGS / tool  # "" adds nothing


def systemd_folder(package: Path) -> Path:
    """Where a package keeps its units.

    Raises:
        ConfigError: it was built without them.
    """
    for folder in (package / "systemd", package.parents[1] / "systemd"):
        if (folder / "semwatch.service").is_file():
            return folder
    raise ConfigError(f"{package} has no folder systemd with the units; install semwatch from its wheel")


def doc_pages(package: Path) -> list[Path]:
    """The pages for users and operators that a package brings; early versions have one page, beside their units."""
    for folder in (package / "docs", package.parents[1] / "docs"):
        if (folder / "night.md").is_file():
            return sorted(folder.glob("*.md"))
    return []


def wanted(package: Path, *, prefix: Path, tools: tuple[str, ...], host: str = "") -> dict[Path, bytes]:
    """Every file of an installation by its path on the machine.

    Args:
        package: that is installed.
        prefix: of the program's versions.
        tools: with settings of their own.
        host: the machine's name, whose first part becomes the site's; "": the site keeps its default name.

    Raises:
        ConfigError: the package has no units, or cannot be read.
    """
    source = systemd_folder(package)
    try:
        texts = {file: _with_prefix(file.read_text("utf-8"), prefix) for file in _shipped(source)}
        files = {_place(file.relative_to(source)): text for file, text in texts.items()}
        for page in doc_pages(package):
            files[DOCS / "docs" / page.name] = _with_prefix(page.read_text("utf-8"), prefix)
        for tool in tools:
            examples = _examples_folder(package)
            site = (examples / "site.yaml").read_text("utf-8")
            files[settings_folder(tool) / "site.yaml"] = site_yaml(site, tool, host)
            files[settings_folder(tool) / "recipe.yaml"] = (examples / "recipe.yaml").read_text("utf-8")
            if tool:
                files[TMPFILES / f"semwatch-{tool}.conf"] = tool_folders(files[TMPFILES / "semwatch.conf"], tool)
    except (OSError, KeyError) as error:
        raise ConfigError(f"{package} is not whole ({error}); install semwatch from its wheel") from error
    return {path: text.encode() for path, text in sorted(files.items())}


def site_yaml(example: str, tool: str, host: str = "") -> str:
    """The example site with the paths of the installation, the host's name, Redis on, and its comments."""
    if name := site_name(host):
        example = example.replace("\n#name: site\n", f"\nname: {name}\n")  # an older release's example has none
    text = _swap(example, "Redis and metrics are off until theirs goes.", "Metrics are off until theirs goes.")
    text = _swap(text, "#redis:\n  #url: redis://127.0.0.1:6379/0 ", f"redis:\n  url: {REDIS_URL}  ")
    if tool:
        text = _swap(text, f"path: {DATA}/drop/tool-a\n", f"path: {DATA}/{tool}/drop\n")
        text = _swap(text, "source: tool-a ", f"source: {tool} ")
        text = _swap(text, f"results_dir: {DATA}/results\n", f"results_dir: {DATA}/{tool}/results\n")
        text = _swap(text, f"state_dir: {STATE} ", f"state_dir: {STATE}/{tool} ")
        # tools on one machine share the Redis, not their queues
        text = _swap(text, "  #prefix: semwatch ", f"  prefix: semwatch-{tool} ")
    return text


def site_name(host: str) -> str:
    """What a site on a machine of this name is called; "" where the name tells nothing.

    >>> site_name("sem-ws-07.fab3.example"), site_name("localhost")
    ('sem-ws-07', '')
    """
    short = re.sub(r"[^A-Za-z0-9_-]+", "-", host.partition(".")[0]).lstrip("-")[:64]
    return "" if short == "localhost" else short


def tool_folders(tmpfiles: str, tool: str) -> str:
    """The folders of one tool, with the rights that tmpfiles.d gives to the unnamed one's."""
    moved = {
        f"{SETTINGS}": f"{SETTINGS}/{tool}",
        f"{STATE}": f"{STATE}/{tool}",
        f"{DATA}": f"{DATA}/{tool}",
        f"{DATA}/results": f"{DATA}/{tool}/results",
        f"{DATA}/drop/tool-a": f"{DATA}/{tool}/drop",
    }
    rows = [line.split() for line in tmpfiles.splitlines() if not line.startswith("#")]
    lines = [" ".join([row[0], moved[row[1]], *row[2:]]) for row in rows if len(row) > 1 and row[1] in moved]
    return "\n".join([f"# Folders of {tool} and their rights.", *lines, ""])


def _examples_folder(package: Path) -> Path:
    """Where a package keeps its first settings; a release before the rooms had them at its top."""
    new, old = package / "settings" / "examples", package / "examples"
    return old if old.is_dir() and not new.is_dir() else new


def _shipped(source: Path) -> list[Path]:
    known = (*_UNIT_SUFFIXES, ".conf", ".md", ".yaml")
    return sorted(file for folder in (source, source / "drop-ins") for file in folder.glob("*") if file.suffix in known)


def _place(name: Path) -> Path:
    if len(name.parts) > 1 or name.suffix in (".md", ".yaml"):
        return DOCS / name
    if name.suffix in _UNIT_SUFFIXES:
        return UNITS / name
    if name.name.endswith(".sysusers.conf"):
        return SYSUSERS / "semwatch.conf"
    if name.name.endswith(".tmpfiles.conf"):
        return TMPFILES / "semwatch.conf"
    return DOCS / name


def _with_prefix(text: str, prefix: Path) -> str:
    return re.sub(rf"{PREFIX}(?![\w.-])", lambda _: str(prefix), text)


def _swap(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise RuntimeError(f"the example site has changed: {old!r} does not stand in it once")
    return text.replace(old, new.ljust(len(old)) if old.endswith(" ") else new)  # comments stay in their column
