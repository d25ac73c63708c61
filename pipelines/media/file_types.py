"""What a picture or clip is, by its first bytes, and which decoder may therefore open it.

Names and extensions are the sender's, and a decoder that guesses may take one that runs what is in the file (Pillow
hands EPS to Ghostscript) or opens others (FFmpeg's playlists). So only what is named here is decoded, by its own
decoder.
"""

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.sample import Buffer

_HEAD = 32
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
"""What the first box of a QuickTime or MP4 file may be."""
_PICTURE_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"mif1", b"msf1", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF"),
    b"crx ": "Canon's raw picture CR3",
}
"""What is no clip though its boxes are MP4's, by the brand of the first one."""
_FOREIGN = {
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"ffconcat": "an FFmpeg playlist",
    b"#EXTM3U": "an HLS playlist",
    b"[playlist]": "a playlist",
    b"<?xml": "XML",
    b"<": "HTML or XML",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "PDF",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"OggS": "Ogg",
    b"FLV": "FLV",
    b"\x47": "an MPEG transport stream",
    b"\0\0\1\xba": "an MPEG program stream",
    b"\0\0\1\xb3": "a bare MPEG stream",
    b"\0\0\0\1": "a bare H.264 or H.265 stream",
    b"PK\x03\x04": "a zip file",
    b"\x1f\x8b": "a gzip file",
}


def picture_format(data: Buffer, name: str) -> str:
    """'JPEG', 'PNG' or 'WEBP', as Pillow calls them; raises DataError that says what else was found."""
    head = bytes(data[:_HEAD])
    if head.startswith(b"\xff\xd8"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    raise DataError(f"{name}: not a readable JPEG, PNG or WebP picture: it is {_found(head)}")


def clip_format(data: Buffer, name: str) -> str:
    """FFmpeg's demuxer: 'mov' for MP4 and QuickTime, 'matroska' for that and WebM; raises DataError that says what else
    was found."""
    head = bytes(data[:_HEAD])
    if head[4:8] in _BOXES and _brand(head) not in _PICTURE_BRANDS:
        return "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    raise DataError(f"{name}: not a readable clip: expected MP4, QuickTime, Matroska or WebM; it is {_found(head)}")


def _brand(head: bytes) -> bytes:
    return head[8:12] if head[4:8] == b"ftyp" else b""


def _found(head: bytes) -> str:
    """What a file's first bytes are, for a message."""
    if not head.strip(b"\0"):
        return "zeros" if head else "empty"
    if head[:4] == b"RIFF":
        return f"RIFF {head[8:12].decode('ascii', 'replace').strip()}"
    if head[4:8] in _BOXES:
        return _PICTURE_BRANDS.get(_brand(head), "MP4 or QuickTime")
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "Matroska or WebM"
    if head.startswith(b"\xff\xd8"):
        return "JPEG"
    if head.startswith(b"\x89PNG"):
        return "PNG"
    known = next((what for start, what in _FOREIGN.items() if head.startswith(start)), None)
    return f"{known or 'unknown'} (it begins with {head[:12]!r})"
