"""Header of a file -> does it say that this is a frontal chest radiograph?

Owns: that rule. Refuses: what says that it shows something else (DicomError). Called by: `predict.server`.

`preprocess` and `predict` take every grayscale image: who names a file or a folder knows what it is. Onto a page
anything can be dropped, and a network gives an answer to anything. So the modality has to be one of radiography (PS3.3
C.7.3.1.1.1), and body part (PS3.16 annex L) and view position must not name another part or another view. Where these
two are missing, or say what no standard knows, the file is taken: many sound files do.
"""

from __future__ import annotations

import re

from ptxdist.dicom import tags
from ptxdist.dicom.png import SIGNATURE
from ptxdist.dicom.radiograph import read_header
from ptxdist.dicom.tags import read_tags
from ptxdist.errors import DicomError

MODALITIES = ("CR", "DX", "RG")
# Words of the standard, which may be repeated in a sentence; any other one may be a name.
_OTHER_MODALITIES = frozenset({
    "CT", "ES", "IO", "MG", "MR", "NM", "OP", "OT", "PR", "PT", "PX", "RF", "RTIMAGE", "SEG", "SR", "US", "XA", "XC",
})  # fmt: skip
_OTHER_PARTS = frozenset({
    "ABDOMEN", "ABDOMENPELVIS", "ANKLE", "ARM", "BREAST", "CALCANEUS", "CLAVICLE", "COCCYX", "CSPINE", "CTSPINE",
    "ELBOW", "EXTREMITY", "EYE", "FACE", "FEMUR", "FIBULA", "FINGER", "FOOT", "FOREARM", "HAND", "HEAD", "HEADNECK",
    "HEEL", "HIP", "HUMERUS", "JAW", "KNEE", "LEG", "LSPINE", "LSSPINE", "LUMBAR", "MANDIBLE", "MAXILLA",
    "NASOPHARYNX", "NECK", "ORBIT", "PATELLA", "PELVIS", "SACRUM", "SCAPULA", "SHOULDER", "SINUS", "SKULL", "SPINE",
    "SSPINE", "TEETH", "THIGH", "THUMB", "TIBIA", "TLSPINE", "TOE", "TSPINE", "ULNA", "WRIST", "ZYGOMA",
})  # fmt: skip
_CHEST = frozenset({"CHEST", "LUNG", "LUNGS", "RIB", "RIBS", "THORAX"})
_OTHER_VIEWS = frozenset({"LL", "RL", "LLO", "RLO", "LAT", "LATERAL", "OBLIQUE"})


def refuse_other_than_chest(content: bytes) -> None:
    """DicomError, with the reason, for a file's content that is no DICOM image or says that it is no frontal chest."""
    if not content:
        raise DicomError("is empty (0 bytes)")
    if content.startswith(SIGNATURE):
        raise DicomError("is a PNG, which does not say what it shows; give a DICOM file, or use `ptxdist predict`")
    read_header(content, b"")  # what is no single grayscale image has a better reason of its own
    file = read_tags(content, pixels=False)
    modality = file.text(tags.MODALITY).upper()
    if modality not in MODALITIES:
        said = f"is of modality {modality}" if modality in _OTHER_MODALITIES else "does not name a known modality"
        raise DicomError(f"{said}; a chest radiograph is one of {', '.join(MODALITIES)}")
    words = re.findall(r"[A-Z]+", file.text(tags.BODY_PART).upper())
    other = _OTHER_PARTS.intersection([*words, "".join(words)])
    if other and not _CHEST.intersection(words):
        raise DicomError(f"shows another part of the body than the chest ({min(other)})")
    view = file.text(tags.VIEW).upper()
    if view in _OTHER_VIEWS:
        raise DicomError(f"is a lateral or oblique view ({view}); the model was made for frontal ones (PA, AP)")
