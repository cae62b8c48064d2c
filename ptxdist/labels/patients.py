"""Reading patient maps: which image is of which patient, from a CSV file whose columns are found by their names.

Owns: the names of the columns. Refuses: a column that is not of patients, since groups that are no patients would
certify that nothing leaks (LabelError with the columns or the line, never with a patient).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ptxdist.errors import LabelError
from ptxdist.labels.tables import image_id, open_text, table_rows

_NIH_IMAGE = re.compile(r"(\d{8})_\d{3,4}(\.\w+)?")  # NIH ChestX-ray14: the first eight digits are the patient
_NOBODY = re.compile(r"#?n/?a!?|nan|<na>|null|none|nil|unknown|missing|[-?.]+", re.IGNORECASE)
_ROUNDED = re.compile(r"\d(\.\d+)?E\+\d+", re.IGNORECASE)  # a long number after a visit to a spreadsheet
# Names are compared in lower case, letters and digits only; earlier ones are preferred.
_WHO = r"(anon(ym(ized|ised|ous))?|dicom|hashed|deid(entified)?|original)?(patient|subject|person|participant|pt)s?"
_PATIENT = (rf"{_WHO}id", rf"{_WHO}(uid|key|code|hash|no|nr|num|number|identifier)?", r"pid|mrn|nihid", rf"{_WHO}name")
_IMAGE = (
    r"sop(instance)?u?id|instanceuid",
    r"(image|img|dicom|kaggle|radiograph|xray|cxr)(index|u?id)",
    r"(image|img|dicom|radiograph|xray|cxr)?(file|filename|name|path)?|caseid|id|uid|case|key|index",
)
_OTHER = re.compile(  # in the name of the second of two columns
    "study|series|exam|visit|date|time|follow|accession|sex|gender|age|birth|view|position|projection|modality|label|"
    "finding|diagnos|class|target|pneumo|disease|report|encoded|pixel|mask|rle|area|split|fold|set|site|hospital|"
    "institut|device|scanner|manufact|rad|reader|annotator|path|dir|file|url|image|sop|instance|row|col|width|height"
)
_NO_IDS = re.compile(  # values, in lower case
    r"m|f|o|u|male|female|other|unknown|pa|ap|ll|rl|lat|lateral|ap supine|portable|-1|true|false|yes|no|normal|"
    r"abnormal|0?\d\d[ymwd]|train|val|valid|validation|test|\d+( \d+){3,}|no finding|\D*(pneumo|effusion|atelecta|"
    r"nodule|cardiomeg|consolid|infiltrat|edema|emphysem|fibrosis|pleura|hernia)\D*"
)
_DAY, _YEAR = r"(0?[1-9]|[12]\d|3[01])", r"(19|20)\d\d"
_DATE = re.compile(  # not 12-34-56 or OP/2023/0123, which are numbers of patients
    rf"({_YEAR}([-/.]{_DAY}){{2}}|({_DAY}[-/.]){{2}}{_YEAR}|({_DAY}/){{2}}\d\d)([ t]\d.*)?|"
    r"\d\d?[-. ]+(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|oct(ober)?|"
    r"nov(ember)?|dec(ember)?)([-. ]+\d+)?"
)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".tif", ".tiff")


def read_patients(path: Path, ids: Collection[str] = ()) -> dict[str, str]:
    """Patient of each image id, from a CSV with a header; `.gz` is accepted.

    The column of patients is found by its name (`PatientID`, `Patient ID`, `subject_id`, `NIH_ID` and others), and so
    is that of images. Of two columns, one can have any name; two without a known name are taken for image and patient
    unless the second name or its values are of something else. NIH image names (`00028864_007.png`) are reduced to
    their patient. Raises LabelError for a file without such columns, with values that are no ids, without a header or
    rows, a row without an id or a patient, an id with two patients, a patient in two spellings, and if none of the
    `ids` is in it.
    """
    patients: dict[str, str] = {}
    lines: dict[str, int] = {}  # of each patient, the first one
    with open_text(path) as file:
        rows = table_rows(path, file)
        _, header = next(rows, (0, []))
        image_column, patient_column = _columns(path, header)
        for line, row in rows:
            if not row:
                continue
            if len(row) <= max(image_column, patient_column) or not (
                row[image_column].strip() and row[patient_column].strip()
            ):
                raise LabelError(f"{path}, line {line}: expected an image id and a patient")
            case_id, patient = image_id(path, line, row[image_column]), row[patient_column].strip()
            match = _NIH_IMAGE.fullmatch(patient.rpartition("/")[2])
            patient = match.group(1) if match else patient
            if patients.setdefault(case_id, patient) != patient:
                raise LabelError(f"{path}, line {line}: {case_id} has two different patients")
            lines.setdefault(patient, line)
    if not patients:
        raise LabelError(f"{path}: the patient map has no rows")
    _refuse_spellings(path, lines)
    named = header[patient_column].strip()
    values = {patient.lower() for patient in patients.values()}
    is_known = any(re.fullmatch(pattern, _plain(named)) for pattern in _PATIENT)
    no_ids = sum(_is_no_id(value) or (not is_known and value.count("/") > 1) for value in values)
    if 2 * no_ids > len(values) or (not is_known and all(map(_is_small, values))):
        raise LabelError(
            f"{path}: the values of the column {named!r} look like findings, views, ages, dates, files or visits, not "
            "like patients; give a table with a column PatientID"
        )
    if ids and not patients.keys() & set(ids):
        raise LabelError(f"{path}: none of the {len(ids)} images in it; its image ids are others")
    return patients


def _refuse_spellings(path: Path, lines: Mapping[str, int]) -> None:
    """Raise LabelError for what stands for no patient, and for two patients that are probably one.

    `lines` are those of all patients. Ids that differ only in case, blanks, signs that cannot be seen, apostrophes, or
    as numbers in zeros at their start or `.0` at their end, are of one patient; so Excel and pandas change them.
    """
    found: dict[str, int] = {}
    for patient, line in lines.items():
        if _NOBODY.fullmatch(patient) or _ROUNDED.fullmatch(patient):
            what = "no patient" if _NOBODY.fullmatch(patient) else "a patient whose number a spreadsheet has rounded"
            raise LabelError(f"{path}, line {line}: it has {what}; correct the row, or remove it")
        plain = patient.casefold()
        if not (plain.isascii() and plain.isalnum()):
            plain = unicodedata.normalize("NFKC", plain)
            plain = "".join(sign for sign in plain if sign.isprintable() and sign not in " '\"")
            plain = re.sub(r"^(\d+)\.0+$", r"\1", plain)
        if plain.isdecimal():
            plain = plain.lstrip("0")
        if (first := found.setdefault(plain, line)) != line:
            raise LabelError(
                f"{path}, lines {first} and {line}: the patients differ only in case, blanks, zeros or the like, and "
                "are probably one; write each patient in one way"
            )


def without_patient(path: Path, ids: Collection[str]) -> str:
    """How many of the images the table at `path` lacks, with three of them, as a sentence; "" if it has all of them.

    Raises LabelError as `read_patients` does.
    """
    known = read_patients(path, ids)
    missing = [case_id for case_id in ids if case_id not in known]
    if not missing:
        return ""
    more = ", …" if len(missing) > 3 else ""
    return (
        f"{path} has no patient for {len(missing):,} of {len(ids):,} images ({', '.join(missing[:3])}{more}); they "
        "keep the patient that the cache has for them"
    )


def _columns(path: Path, header: Sequence[str]) -> tuple[int, int]:
    """Places of the image id and of the patient; LabelError if they cannot be known."""
    if len(header) < 2:
        hint = "; the columns must be separated by commas" if re.search(r"[;\t|]", "".join(header)) else ""
        raise LabelError(f"{path}: expected two columns, image id and patient, found {len(header)}{hint}")
    names = [_plain(name) for name in header]
    patients = _find(names, _PATIENT)
    is_row = not patients and len(header) == 2 and all(re.search(r"\d", name) for name in header)
    ids = (_NIH_IMAGE.fullmatch(name.strip()) or re.fullmatch(r"\d+(\.\d+){3,}", name.strip()) for name in header)
    if is_row or any(ids):
        raise LabelError(f"{path}: the first line must name the columns, for example ImageId,PatientID")
    if not patients and len(header) == 2 and not _OTHER.search(names[1]):
        patients = [1]
    if len(patients) != 1:
        found = "several columns" if patients else "no column"
        raise LabelError(
            f"{path}: {found} of patients; name one column PatientID and one ImageId, found: "
            f"{', '.join(name.strip() for name in header[:12])}{', …' if len(header) > 12 else ''}"
        )
    images = [place for place in _find(names, _IMAGE) if place != patients[0]]
    return images[0] if images else int(patients[0] == 0), patients[0]


def _find(names: Sequence[str], patterns: Sequence[str]) -> list[int]:
    """Places of the names that match the first pattern that any matches."""
    found = ([place for place, name in enumerate(names) if re.fullmatch(pattern, name)] for pattern in patterns)
    return next(filter(None, found), [])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _is_no_id(value: str) -> bool:
    """Whether a value, in lower case, is something else than an id."""
    return not value.isdecimal() and (
        value.endswith(_SUFFIXES) or bool(_NO_IDS.fullmatch(value) or _DATE.fullmatch(value))
    )


def _is_small(value: str) -> bool:
    """Whether a value may be an age or a number of visits."""
    return bool(re.fullmatch(r"0*\d{1,2}(\.0)?|0*1[01]\d", value))
