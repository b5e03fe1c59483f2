"""The format of ``<klarf>.lot.json``: what became of every defect that a KLARF names, written with each revision."""

import json
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from semwatch.defects import VerdictKind
from semwatch.store.review_record import Number, RecipeRecord, Sha256

SCHEMA_VERSION: Final = 1
LOT_JSON = ".lot.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LotDefect(_Record):
    """One defect of the KLARF."""

    id: int = Field(description="DEFECTID.")
    verdict: VerdictKind | None = Field(description="As in review.json; null: there is none, and reason says why.")
    label: str | None = Field(description="Class name; null: unknown, non-decidable, or no verdict.")
    code: int | None = Field(description="What was written into the target column; null: its cell is as it was.")
    by: Literal["model", "person"] | None = Field(description="Whose verdict it is.")
    confidence: Number | None = Field(description="Of the model; null where a person judged, or nothing was found.")
    image: str | None = Field(description="Image that shows it, relative to the drop folder.")
    page: int | None = Field(description="Of that image, from 0.")
    defect_id: int | None = Field(description="Which of the defects on that page; null: none, or one that was missed.")
    reason: str = Field(description="Why there is no verdict, or no code for it; empty where there are both.")


class LotWafer(_Record):
    """One wafer of the KLARF."""

    wafer_id: str | None
    slot: int | None
    defects: tuple[LotDefect, ...]


class LotRecord(_Record):
    """Everything said of one KLARF."""

    schema_version: Literal[1] = SCHEMA_VERSION
    site: str
    source: str = Field(description="Name of the tool.")
    path: str = Field(description="Of the KLARF, relative to the drop folder.")
    sha256: Sha256 = Field(description="Of the KLARF as it was taken.")
    lot_id: str | None
    step_id: str | None
    device_id: str | None
    recipe: RecipeRecord
    revision: Annotated[int, Field(ge=1)]
    why: str = Field(description="What made this revision.")
    taken_utc: str = Field(description="When the KLARF was read.")
    due_utc: str = Field(description="From when an image that has not come is missing.")
    written_utc: str
    target_column: str
    klarf: tuple[str, ...] = Field(description="Files that were written with it, by name; empty: none.")
    klarf_fault: str = Field(default="", description="Why no KLARF could be written; empty where there is no fault.")
    codes_without_class: tuple[int, ...] = Field(description="Codes written that the file's table of classes lacks.")
    missing: tuple[str, ...] = Field(description="Images that the KLARF names and that have not come.")
    late: tuple[str, ...] = Field(description="Images that came at due_utc or later.")
    wafers: tuple[LotWafer, ...]


SCHEMA_PATH = Path(__file__).with_name("schemas") / "lot.schema.json"


def schema_text() -> str:
    """Return the published JSON schema, made from the models.

    After a change of the models:
    ``python -c 'from semwatch.store import lot_record as r; r.SCHEMA_PATH.write_text(r.schema_text())'``.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | LotRecord.model_json_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
