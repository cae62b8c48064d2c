"""Check of a DICOM header for a frontal chest radiograph, for files that are uploaded to the viewer.

Owns: that rule. Refuses: files whose header names another modality, body part or view (DicomError).

`preprocess` and `predict` accept every grayscale image, since their user has chosen the files. Any file can be dropped
on the viewer's page, and a network gives an answer to any image. Therefore the modality has to be one of radiography
(PS3.3 C.7.3.1.1.1), and body part (PS3.16 annex L) and view position must not name another part or another view. Files
in which these two are missing or are not defined in the standard are accepted: many valid files have such headers. A
PNG has no header, so it is accepted, and the viewer says that nobody has checked what it shows.
"""

from __future__ import annotations

import re

from ptxdist.dicom import tags
from ptxdist.dicom.tags import Tags
from ptxdist.errors import DicomError

MODALITIES = ("CR", "DX", "RG")
# Terms of the standard, which a message may repeat; any other value may be a name.
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


def refuse_other_than_chest(file: Tags | None) -> None:
    """Raise DicomError, with the reason, unless a header is that of a frontal chest radiograph; None is a PNG's."""
    if file is None:
        return
    modality = file.text(tags.MODALITY).upper()
    if modality not in MODALITIES:
        said = f"is of modality {modality}" if modality in _OTHER_MODALITIES else "does not name a known modality"
        raise DicomError(f"{said}; a chest radiograph is one of {', '.join(MODALITIES)}")
    words = re.findall(r"[A-Z]+", file.text(tags.BODY_PART).upper())
    other = _OTHER_PARTS.intersection([*words, "".join(words)])
    if other and not _CHEST.intersection(words):
        raise DicomError(f"shows another body part than the chest ({min(other)})")
    view = file.text(tags.VIEW).upper()
    if view in _OTHER_VIEWS:
        raise DicomError(f"is a lateral or oblique view ({view}); the model was trained on frontal views (PA, AP)")
