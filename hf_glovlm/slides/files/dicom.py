"""DICOM: the series that a file belongs to, out of its header."""

import struct
from pathlib import Path
from typing import BinaryIO

_SERIES = 0x0020000E  # SeriesInstanceUID
_SYNTAX = 0x00020010  # TransferSyntaxUID
_IMPLICIT = b"1.2.840.10008.1.2"
_OTHER = (b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99")  # big-endian, deflated
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_ITEM, _ENDS = 0xFFFEE000, (0xFFFEE00D, 0xFFFEE0DD)
_UNDEFINED = 0xFFFFFFFF
_MOST = 20_000  # elements that are looked at; the series stands among the first hundreds


def read_series(path: Path) -> str | None:
    """UID of the series of a DICOM file; `None` where it is no DICOM, damaged or states none.

    Source: DICOM PS3.10, 7.1 (file meta information) and PS3.5, 7 (data elements, sequences).
    """
    try:
        with path.open("rb") as file:
            return _find_series(file) if file.read(132)[128:] == b"DICM" else None
    except (OSError, struct.error):
        return None


def _find_series(file: BinaryIO) -> str | None:
    """Value of the element outside of any sequence, as those name series of other files."""
    syntax, depth, is_meta = b"", 0, True
    for _ in range(_MOST):
        group, element = struct.unpack("<HH", file.read(4))
        tag = group << 16 | element
        if is_meta and group != 2:
            is_meta = False
            if syntax in _OTHER:
                return None
        length = _read_length(file, tag, is_meta or syntax != _IMPLICIT)
        if tag in _ENDS:
            depth = max(0, depth - 1)
        elif length == _UNDEFINED:  # a sequence or an item, up to its own end
            depth += 1
        elif depth == 0 and tag in (_SERIES, _SYNTAX):
            value = file.read(min(length, 64)).rstrip(b"\0 ")
            if tag == _SERIES:
                return value.decode("ascii", "replace") or None
            syntax = value
        elif depth == 0 and not is_meta and tag > _SERIES:
            return None  # elements stand in order
        else:
            file.seek(length, 1)
    return None


def _read_length(file: BinaryIO, tag: int, explicit: bool) -> int:
    """Length of an element's value, which is read next."""
    length: int
    if explicit and tag not in (_ITEM, *_ENDS):
        if file.read(2) not in _LONG:
            (length,) = struct.unpack("<H", file.read(2))
            return length
        file.read(2)
    (length,) = struct.unpack("<I", file.read(4))
    return length
