"""`semwatch correct` and `quality`: people's verdicts beside the model's, and what they say of it."""

import dataclasses
import json
import re
from typing import Annotated

import typer

from semwatch.cli.logs import find, named_places
from semwatch.cli.options import JsonOption, SiteOption, counted, in_share, say, show_table
from semwatch.defects import Box
from semwatch.errors import ConfigError
from semwatch.operations import correct as correction
from semwatch.operations import lots, quality
from semwatch.operations.quality import Quality
from semwatch.settings.site import Site, load_site
from semwatch.store import results
from semwatch.store.corrections import Correction
from semwatch.store.ledger import LEDGER, Ledger, Work
from semwatch.store.result_index import INDEX, open_index


def correct(
    site: SiteOption,
    image: Annotated[str, typer.Argument(help="As for `logs`: path, file name, or digits of the sha256.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[DEFECT] [LABEL]", help="Its number in the overlay, and its class.")
    ] = None,
    not_a_defect: Annotated[bool, typer.Option("--not-a-defect", help="It is none.")] = False,
    missed: Annotated[str | None, typer.Option(metavar="X,Y,W,H", help="A defect that was not found, in px.")] = None,
    confirm: Annotated[bool, typer.Option("--confirm", help="All other verdicts on the image are right.")] = False,
    page: Annotated[int, typer.Option(min=0, help="Of a file with several.")] = 0,
    new: Annotated[bool, typer.Option("--new", help="Take a label that no model and no class table knows.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a defect is: `correct a.tif 2 void`, `correct a.tif 2 --not-a-defect`,
    `correct a.tif --missed 40,60,25,25 void`, `correct a.tif --confirm`.

    Your word stands beside the model's, with your name and the time; given again, the last counts. With --not-a-defect,
    --missed takes a missed one back.
    """
    settings = load_site(site)
    given = _verdicts(list(words or []), not_a_defect, missed, page, is_confirmed=confirm)
    work = _work(settings, image)
    if confirm:
        target = results.review_path(settings.results_dir, work.source, work.path)
        named = {one.defect_id for one in given}
        given += [
            one for one in correction.confirmed(results.read(target)) if one.page != page or one.defect_id not in named
        ]
    done = correction.correct(settings, work, given, is_new_label=new or (confirm and not words))
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(done), "result": str(done.result)}))
        return
    say(f"{done.source}/{done.path}, by {done.by}:")
    for change in done.changes:
        what = f"defect {change['defect_id']}" if "defect_id" in change else "a missed defect"
        model = f", the model says {change['model']}" if change["model"] else ""
        before = f", before {change['from']}" if change["from"] else ""
        say(f"  page {change['page']}, {what}: {change['to']}{model}{before}")
    if done.without_crop:
        say(f"  learning gets no crop of it: {done.without_crop}")
    if not done.changes:
        say("  there was nothing left to confirm")


def quality_command(
    site: SiteOption,
    lot: Annotated[str | None, typer.Option(help="Of one lot; of all without it.")] = None,
    at_least: Annotated[
        float | None, typer.Option(min=0, max=1, help="End with 1 where the purity of a class is surely below this.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show purity, accuracy and escapes per class, from the defects that people have judged.

    The brackets hold the exact interval of 95 %. Judge a sample drawn without looking, and confirm what is right as
    well (`correct IMAGE --confirm`): who corrects nothing but errors measures errors alone.
    """
    settings = load_site(site)
    with open_index(settings.state_dir / INDEX) as index:
        chosen = None if lot is None else lots.refreshed(settings, index, lots.find(settings, index, lot))
        found = quality.measure(index, chosen)
    impure = [one.label for one in found.classes if at_least is not None and one.purity.high < at_least]
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(found), "impure": impure}))
    else:
        _show_quality(found)
        if impure:
            say(f" {', '.join(impure)}", (f"purity below {at_least:.0%}:", "red"))
    if impure:
        raise typer.Exit(1)


def _show_quality(found: Quality) -> None:
    say(f"{counted(found.n_judged, 'defect')} judged by people, {found.n_missed} missed added")
    if not found.n_judged + found.n_missed:
        say("nothing is known yet: `semwatch correct` takes verdicts")
        return
    rows = [(one.label, in_share(one.purity), in_share(one.accuracy), in_share(one.escapes)) for one in found.classes]
    show_table(("class", "purity", "accuracy", "escapes"), rows)
    say(f"false alarms: {in_share(found.false_alarms)}; escapes: {in_share(found.escapes)}")


def _verdicts(
    words: list[str], not_a_defect: bool, missed: str | None, page: int, *, is_confirmed: bool
) -> list[Correction]:
    """What the arguments say.

    Raises:
        ConfigError: they do not fit together.
    """
    if is_confirmed and not words and missed is None and not not_a_defect:
        return []
    if missed is not None:
        if len(words) != (0 if not_a_defect else 1):
            raise ConfigError(
                "--missed x,y,w,h takes the class alone: `semwatch correct IMAGE --missed 40,60,25,25 void`"
            )
        return [Correction(page, None if not_a_defect else words[0], box_xyxy=_box(missed))]
    if len(words) != (1 if not_a_defect else 2) or not re.fullmatch(r"\d{1,6}", words[0]):
        raise ConfigError(
            "give the number of a defect and its class (`semwatch correct IMAGE 2 void`), or its number and "
            "--not-a-defect, or --missed x,y,w,h and a class, or --confirm"
        )
    return [Correction(page, None if not_a_defect else words[1], int(words[0]))]


def _box(text: str) -> Box:
    if not re.fullmatch(r"\d{1,6}(,\d{1,6}){3}", text.replace(" ", "")):
        raise ConfigError(f"{text!r} is no box: write x,y,w,h in whole pixels, such as 40,60,25,25")
    x, y, width, height = map(int, text.replace(" ", "").split(","))
    return x, y, x + width, y + height


def _work(site: Site, image: str) -> Work:
    """The one image that is meant.

    Raises:
        ConfigError: none is, or several.
    """
    path = site.state_dir / LEDGER
    if not path.exists():
        raise ConfigError(f"no ledger at {path}: the daemon has not run yet")
    with Ledger(path, read_only=True) as ledger:
        found = find(ledger, image, named_places(site, image))
    if len(found) != 1:
        fits = ", ".join(f"{work.source}/{path}" for path, work in found[:5])
        why = f"{len(found)} images fit {image!r}: {fits}; give a whole path" if found else f"no image fits {image!r}"
        raise ConfigError(f"{why}; `semwatch logs` shows what there is")
    return found[0][1]
