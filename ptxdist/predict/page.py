"""findings.csv and index.html of a folder of predictions: what was found in all images of a command.

Owns: the order of the images, highest score first, on the page marked ones before flagged ones before others, and what
the page shows: pictures of the first `PICTURES` images, made of their files in overlays/, and a table of the next
`ROWS`. It is one file without scripts that fetches nothing; a click on a picture opens its file. File names are only
there when they are given: a file may be named after a patient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import cv2

from ptxdist import __version__, files
from ptxdist.predict.findings import Finding, overlay_path
from ptxdist.report.page import data_uri, style_sheet, templates_in
from ptxdist.rundir import FINDINGS_PAGE, FINDINGS_TABLE

TEMPLATES = Path(__file__).resolve().parent / "templates"
PICTURES, PICTURE_PX = 400, 384  # about 23 kB each
ROWS = 5000
COLUMNS = ("ImageId", "score", "probability", "marked", "area_px", "area_mm2", "side", "zone", "unlike", "flagged")


@dataclass(frozen=True)
class Context:
    """What a page says beside the findings: what was sought, by which models, at which point, the counts of files."""

    finding: str
    one: str
    models: tuple[str, ...]
    rule: str
    caution: str
    rejected: int
    repeated: int


@dataclass(frozen=True)
class _Shown:
    """One image on the page; `picture` is a data URI, "" for none."""

    finding: Finding
    name: str
    picture: str
    link: str

    @property
    def where(self) -> str:
        """Side and zone of the mask in words."""
        return ", ".join(filter(None, (self.finding.side, self.finding.zone)))


def write_table(out: Path, findings: Sequence[Finding], names: Mapping[str, str] | None) -> None:
    """Write findings.csv, highest score first; with `names`, of the files by image id, it has a column `file`."""
    head = (*COLUMNS[:1], *(("file",) if names is not None else ()), *COLUMNS[1:])
    rows = [
        (
            found.case_id,
            *((names[found.case_id],) if names is not None else ()),
            found.score,
            _known(found.calibrated),
            "yes" if found.area_px else "no",
            found.area_px,
            _known(found.area_mm2),
            *(_known(value) for value in (found.side, found.zone, found.unlike)),
            "yes" if found.flagged else "no",
        )
        for found in sorted(findings, key=lambda found: (-found.score, found.case_id))
    ]
    files.write_table(out / FINDINGS_TABLE, head, rows, lineterminator="\n")


def write_page(out: Path, findings: Sequence[Finding], names: Mapping[str, str] | None, context: Context) -> None:
    """Write index.html; `names` as for `write_table`."""
    ordered = sorted(findings, key=lambda found: (not found.area_px, not found.flagged, -found.score, found.case_id))
    shown = [_shown(out, found, names, number < PICTURES) for number, found in enumerate(ordered[: PICTURES + ROWS])]
    template = templates_in(TEMPLATES).get_template("predictions.html")
    text = template.render(
        context=context,
        pictures=[item for item in shown if item.picture],
        rest=[item for item in shown if not item.picture],
        images=len(findings),
        marked=sum(found.area_px > 0 for found in findings),
        flagged=sum(bool(found.flagged) and not found.area_px for found in findings),
        calibrated=any(found.calibrated is not None for found in findings),
        unlike=sum(found.unlike is not None for found in findings),
        style=style_sheet(),
        side_px=PICTURE_PX,
        version=__version__,
    )
    files.write_whole(out / FINDINGS_PAGE, text.encode())


def _shown(out: Path, found: Finding, names: Mapping[str, str] | None, is_first: bool) -> _Shown:
    path, picture = overlay_path(out, found.case_id), ""
    if is_first and path.is_file() and (whole := cv2.imread(str(path))) is not None:
        small = cv2.resize(whole, (PICTURE_PX, PICTURE_PX), interpolation=cv2.INTER_AREA)
        content = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
        picture = data_uri("image/jpeg", content)
    name = names[found.case_id] if names is not None else ""
    return _Shown(found, name, picture, quote(path.relative_to(out).as_posix()))


def _known(value: object) -> object:
    return "" if value is None else value
