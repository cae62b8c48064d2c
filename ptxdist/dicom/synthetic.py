"""UIDs of phantoms: they have the form of the challenge's, and show that `ptxdist phantom` wrote a file.

Owns: that form. DCMTK numbers the objects of a program run one after the other: in the challenge's files the series
comes before the study, in phantoms after it. The image id of a phantom may be one of a given label table.
"""

from __future__ import annotations

import re

_FORM = "1.2.276.0.7230010.3.1.{}.8323329.{}.{}.{}"
_STUDY, _SERIES, _IMAGE = 2, 3, 4
_FIRST = 100_000
_UID = re.compile(re.escape(_FORM).replace(r"\{\}", "([0-9]{1,12})"))


def phantom_uids(process: int, second: int, number: int) -> tuple[str, str, str]:
    """UIDs of study, series and image of the phantom `number` of a data set, written at some `second`."""
    first = _FIRST + 3 * number
    study, series, image = (_FORM.format(kind, process, second, first + kind) for kind in (_STUDY, _SERIES, _IMAGE))
    return study, series, image


def is_phantom(study: str, series: str) -> bool:
    """Whether these are the UIDs of study and series of a phantom."""
    first, second = (_UID.fullmatch(uid) for uid in (study, series))
    if first is None or second is None:
        return False
    kind, process, when, number = map(int, first.groups())
    is_numbered = number >= _FIRST + _STUDY and (number - _FIRST - _STUDY) % 3 == 0
    return kind == _STUDY and is_numbered and tuple(map(int, second.groups())) == (_SERIES, process, when, number + 1)
