"""Patient maps: columns are found by their names, and what is no patient is refused without naming anybody."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from ptxdist.errors import LabelError
from ptxdist.labels.patients import read_patients, without_patient


def write(folder: Path, content: str | bytes, name: str = "map.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_nih_names_are_reduced_to_the_patient(tmp_path: Path) -> None:
    text = "Kaggle_ID,NIH_ID\na,00028864_007.png\nb,00028864_011.png\n\nc, Jones \na,00028864_001.png\n"
    expected = {"a": "00028864", "b": "00028864", "c": "Jones"}
    assert read_patients(write(tmp_path, text)) == expected
    assert read_patients(write(tmp_path, gzip.compress(text.encode()), "map.csv.gz")) == expected


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex", "i{n},No Finding,0,{p},60,M"),
        ("ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth", "i{n},0,2014,{n},{p},1950"),
        ("subject_id,study_id,dicom_id", "{p},{n},i{n}"),
        ("PatientID,SOPInstanceUID", "{p},i{n}"),
        ("StudyInstanceUID,SOPInstanceUID,PatientName,PatientID", "1.2,i{n},same,{p}"),
        (" patient ,file", "{p},i{n}"),
        ("whatever,Patient-No.", "i{n},{p}"),
        ("image,who", "i{n},person{p}"),
        ("ImageId,PatientId", "i{n},{p:08d}"),
    ],
)
def test_columns_are_found_by_their_names(tmp_path: Path, header: str, row: str) -> None:
    rows = [row.format(n=number, p=number // 3) for number in range(9)]
    found = read_patients(write(tmp_path, "\n".join(["\ufeff" + header, *rows])))
    assert list(found) == [f"i{number}" for number in range(9)]
    assert [found[f"i{number}"] == found["i0"] for number in range(9)] == [True] * 3 + [False] * 6


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "expected two columns"),
        ("id\na\n", "expected two columns, image id and patient, found 1"),
        ("id,patient\n", "has no rows"),
        ("id,patient\na,1\na,2\n", "line 3: a has two different patients"),
        ('id,patient\na,1\nb,"2\nc,3\n', "line 3: the file ends within quotes"),
        ("id,patient\na,\n", "line 2: expected an image id and a patient"),
        ("id,x,patient\na,1\n", "line 2: expected an image id and a patient"),
        (b"id,patient\n\xff,1\n", "cannot be read as a CSV file"),
        (
            "ImageId, EncodedPixels\na,-1\n",
            "no column of patients; name one column PatientID and one ImageId, found: Im",
        ),
        ("image_id,rad_id\na,R1\n", "no column of patients"),
        ("new_filename,ImageId,has_pneumo\na,b,1\n", "found: new_filename, ImageId, has_pneumo"),
        ("Image Index,Finding Labels\na,Hernia\n", "no column of patients"),
        ("ImageID,StudyID\na,1\n", "no column of patients"),
        ("Path,Sex,Age\na,M,60\n", "no column of patients"),
        ("id,patient_id,subject_id\na,1,2\n", "several columns of patients"),
        ("1.2.276.0.7230010.3.1.4.1,00028864_007.png\n1.3,2\n", "the first line must name the columns"),
        ("id,patient\na,M\nb,F\n", "the values of the column 'patient' look like findings, views"),
        ("id,patient\na,PA\nb,AP\n", "not like patients; give a table with a column PatientID"),
        ("id,patient\na,No Finding\nb,Pneumothorax|Effusion\nc,Mass\n", "not like patients"),
        ("id,patient\na,062Y\nb,031Y\n", "not like patients"),
        ("id,patient\na,-1\nb,5 3 9 1\n", "not like patients"),
        ("id,years\na,62\nb,31\n", "the values of the column 'years' look like"),
        ("id,patient\na,2020-01-05\nb,1/3/2020\n", "look like findings, views, ages, dates, files"),
        ("id,patient\na,5. Mar\nb,05-Mar\n", "look like findings, views, ages, dates"),
        ("id,patient\na,05.01.2020\nb,1/3/20\nc,2020-01-05 10:30\n", "look like findings, views, ages, dates"),
        ("id,who\na,p10/p1001/s1\nb,p10/p1002/s2\n", "look like findings, views, ages, dates, files"),
        ("id;patient\na;1\n", "found 1; the columns must be separated by commas"),
        ("id,patient\na,patient1/study1/v.jpg\nb,x.dcm\n", "look like findings, views, ages, dates, files"),
        ("c00,P0\nc01,P1\n", "the first line must name the columns"),
        ("id,patient\na,P1\nb,1.23E+10\n", "line 3: it has a patient whose number a spreadsheet has rounded"),
        *((f"id,patient\na,P1\nb,{nobody}\n", "line 3: it has no patient") for nobody in ("NaN", "#N/A", "none", "-")),
        *(
            (
                f"id,patient\na,{one}\nb,P0\nc,{other}\n",
                "lines 2 and 4: the patients differ only in case, blanks, zeros",
            )
            for one, other in (
                *(("P1", "p1"), ("Doe J", "Doe  J"), ("Doe J", "Doe\xa0J"), ("M\xfcller", "Mu\u0308ller")),
                *(("P1", "P\u200b1"), ("1000", "001000"), ("1000", "1000.0"), ("'1000", "1000")),
            )
        ),
    ],
)
def test_wrong_patient_map_is_refused_with_file_and_line(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(LabelError) as caught:
        read_patients(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)


def test_a_map_of_other_images_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "id,patient\na,1\n")
    assert read_patients(path, ["a", "b"]) == {"a": "1"}
    with pytest.raises(LabelError, match="none of the 2 images in it; its image ids are others"):
        read_patients(path, ["b", "c"])


def test_what_only_looks_alike_stays_apart(tmp_path: Path) -> None:
    patients = ["1.2.3", "1.2.3.0", "12.3", "P-1", "P1", "100", "10"]
    path = write(tmp_path, "id,patient\n" + "".join(f"i{number},{who}\n" for number, who in enumerate(patients)))
    assert list(read_patients(path).values()) == patients


@pytest.mark.parametrize(
    "form", ["{a:02}-{b:02}-{c:02}", "{a:03}-{b:02}-{c:04}", "OP/2023/{c:04}", "pneumo_{c}", "1 Marti{c}"]
)
def test_numbers_of_hospitals_are_no_dates_and_no_findings(tmp_path: Path, form: str) -> None:
    patients = [form.format(a=17 * n % 100, b=31 * n % 100, c=53 * n % 100) for n in range(40)]
    path = write(tmp_path, "id,MRN\n" + "".join(f"i{number},{who}\n" for number, who in enumerate(patients)))
    assert list(read_patients(path).values()) == patients


def test_no_patient_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "id,patient\na,Quagmire\na,Zebulon\n")
    with pytest.raises(LabelError) as caught:
        read_patients(path)
    assert "Quagmire" not in str(caught.value)
    assert "Zebulon" not in str(caught.value)


def test_images_without_a_patient_are_counted_and_three_named(tmp_path: Path) -> None:
    path = tmp_path / "map.csv"
    path.write_text("ImageId,PatientID\na,P1\nb,P2\n")
    assert without_patient(path, ["a", "b"]) == ""
    assert without_patient(path, ["a", "c", "d", "e", "f"]).startswith(
        f"{path} has no patient for 4 of 5 images (c, d, e, …); they keep"
    )
    with pytest.raises(LabelError, match="none of the 1 images in it"):
        without_patient(path, ["c"])
