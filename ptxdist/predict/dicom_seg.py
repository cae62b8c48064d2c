"""Write a mask as a DICOM Segmentation object that refers to its radiograph.

Owns: what is written into a DICOM SEG (PS3.3 A.51). Refuses: radiographs without the ids that a reference needs
(DicomError). Needs the extra `seg` (highdicom).

The object belongs to the radiograph's study, so it has the patient's name and number as the radiograph does; no other
output of ptxdist has. Its own ids are derived from those of the radiograph, the models and the mask, so the same
prediction gives the same ids.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.multival import MultiValue
from pydicom.uid import PYDICOM_ROOT_UID, RE_VALID_UID, UID, ExplicitVRLittleEndian, generate_uid

from ptxdist import __version__
from ptxdist.dicom.parsing import with_preamble
from ptxdist.dicom.png import SIGNATURE
from ptxdist.errors import DicomError
from ptxdist.finding import PNEUMOTHORAX, FindingType

_SERIES_NUMBER = 9001  # far from those of acquisitions; no standard defines one

_REFERENCES = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
# Required, but may be empty (PS3.3 C.7.1.1, C.7.2.1); not all files have them.
_TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


def encode_segmentation(
    content: bytes, mask: npt.NDArray[np.bool_], models: Sequence[str], finding: FindingType = PNEUMOTHORAX
) -> bytes:
    """The DICOM SEG file of a mask bool (rows, columns) with at least one pixel, for the radiograph in `content`.

    `models` are the sha256 of the weights, which ids and description depend on. `finding` gives codes and texts. Raises
    DicomError when the source is a PNG, has no valid instance, series and study UID to refer to, or a header that
    cannot be copied from.
    """
    try:
        source = _read_source(content)
        return _encode(source, mask, models, finding)
    except DicomError:
        raise
    except Exception as error:  # highdicom and pydicom raise almost anything for odd headers
        raise DicomError(f"has a header from which no DICOM SEG can be made ({type(error).__name__})") from error


def _encode(source: pydicom.Dataset, mask: npt.NDArray[np.bool_], models: Sequence[str], finding: FindingType) -> bytes:
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    algorithm = hd.AlgorithmIdentificationSequence(
        name=f"ptxdist {finding.name} segmentation",
        family=codes.cid7162.ArtificialIntelligence,
        version=__version__,
        parameters={"weights": ",".join(digest[:16] for digest in models)},
    )
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label=finding.title,
        segmented_property_category=Code(finding.category[0], "SCT", finding.category[1]),
        segmented_property_type=Code(finding.code[0], "SCT", finding.code[1]),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )
    origin = [str(source.SOPInstanceUID), *models]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid values in the source
        result = hd.seg.Segmentation(
            source_images=[source],
            pixel_array=mask.view(np.uint8)[None],
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            series_instance_uid=generate_uid(entropy_srcs=["series", *origin]),
            series_number=_SERIES_NUMBER,
            sop_instance_uid=_uid_of("".join(origin), mask),
            instance_number=1,
            manufacturer="ptxdist",
            manufacturer_model_name="ptxdist",
            software_versions=__version__,
            device_serial_number=models[0][:16],
            content_label=re.sub("[^A-Z0-9 ]", "_", finding.name.upper())[:16].strip(),
            content_description="Research use only",
            series_description=f"{finding.title}, research use only",
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
        if "PatientOrientation" not in result:  # required without a plane orientation; empty when unknown
            result.PatientOrientation = source.get("PatientOrientation") or []
        file = BytesIO()
        result.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _uid_of(origin: str, mask: npt.NDArray[np.bool_]) -> UID:
    """`generate_uid` of the text and of the mask in hex, as a whole twice to four times as large as a radiograph."""
    digest = hashlib.sha512(origin.encode())
    for row in mask:
        digest.update(row.tobytes().hex().encode())
    return UID(f"{PYDICOM_ROOT_UID}{int(digest.hexdigest(), 16)}"[:64])


def _read_source(content: bytes) -> pydicom.Dataset:
    if content.startswith(SIGNATURE):
        raise DicomError("is a PNG, which a DICOM SEG cannot refer to")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = pydicom.dcmread(BytesIO(with_preamble(content)), stop_before_pixels=True, force=True)
        ids = {name: str(source.get(name, "") or "") for name in _REFERENCES}
    for name, value in ids.items():
        if not re.fullmatch(RE_VALID_UID, value):
            raise DicomError(f"has no valid {name}, which a DICOM SEG has to refer to")
    for name in _TYPE_2:
        if name not in source:
            setattr(source, name, "")
    # Values copied from the source have to be valid in the new object. The challenge's files have ages such as `62`.
    age = str(source.get("PatientAge", "") or "")
    if not re.fullmatch(r"\d{3}[DWMY]", age):
        source.PatientAge = f"{int(age):03d}Y" if re.fullmatch(r"\d{1,3}", age) else ""
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        value = source.get(name)
        if name in source and not (isinstance(value, MultiValue) and len(value) == 2 and min(map(float, value)) > 0):
            del source[name]
    return source
