"""What containers say of a clip: crops with the size of the track, Dolby Vision, turns that the stream says, its
transparency, and files that only look like clips. Boxes and elements are made here by their definitions.

Run: python -m pytest tests/pipelines/media/test_container_tags.py
"""

import io
import shutil
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import ALPHA, CODECS, MIRRORED, TURNED, Codec, Traits, clip, scene
from PIL import Image

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media import conversions
from domainshuttle.pipelines.media.container_tags import Crop, matroska_tags
from domainshuttle.pipelines.media.conversions import noted_conversions
from domainshuttle.pipelines.media.decode import decode_image, decode_video

FRAMES = np.stack([scene(2 * number) for number in range(4)])
BASE = clip(CODECS[0], Traits(matrix=1, full=False), FRAMES)
CLEAN = (80, 48)
"""Width and height of the part that is shown, of 96x64; its centre is 2 to the left and 4 down."""


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


APERTURE = box(b"clap", struct.pack(">8i", CLEAN[0], 1, CLEAN[1], 1, -2, 1, 4, 1))


def with_entry(data: bytes, added: bytes, pasp: bool) -> bytes:
    """An MP4 with a box more in its sample entry, and with that of its pixels' shape or without."""
    made, at = bytearray(data), data.rindex(b"avcC") - 4
    assert data.index(b"mdat") < data.index(b"moov")  # so that no offset moves
    for kind in (b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov", b"avc1"):
        start = made.rindex(kind) - 4
        made[start : start + 4] = (int.from_bytes(made[start : start + 4], "big") + len(added)).to_bytes(4, "big")
    made[at:at] = added
    return bytes(made) if pasp else bytes(made).replace(b"pasp", b"free")


def with_track_size(data: bytes, width: int, height: int) -> bytes:
    made, at = bytearray(data), data.index(b"tkhd") + 4 + 76
    made[at : at + 8] = struct.pack(">II", width << 16, height << 16)
    return bytes(made)


@pytest.mark.parametrize("pasp", [True, False])
@pytest.mark.parametrize(
    ("track", "across"), [((96, 64), 1), (CLEAN, 1), ((2 * CLEAN[0], CLEAN[1]), 2), ((120, 48), Fraction(3, 2))]
)
def test_a_crop_goes_with_the_size_of_its_track(track: tuple[int, int], across: Fraction, pasp: bool) -> None:
    """The size of the track is that of the whole picture or, as QuickTime writes it, of the part that is shown."""
    shape = Fraction(across) if pasp else Fraction(1)
    data = clip(CODECS[0], Traits(aspect=shape, matrix=1, full=False), FRAMES)
    data = with_track_size(with_entry(data, APERTURE, pasp), *track)
    whole = decode_video(BASE, 2)
    left, top = (96 - 80) // 2 - 2, (64 - 48) // 2 + 4
    part = whole[1, top : top + 48, left : left + 80]
    expected = Image.fromarray(part).resize((round(80 * across), 48), Image.Resampling.LANCZOS)
    found = decode_video(data, 2)[1]
    assert found.shape[:2] == (48, round(80 * across))
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 2


def test_a_crop_of_nothing_is_not_counted() -> None:
    data = with_entry(BASE, box(b"clap", struct.pack(">8i", 96, 1, 64, 1, 0, 1, 0, 1)), True)
    with noted_conversions() as found:
        assert np.array_equal(decode_video(data, 2), decode_video(BASE, 2))
    assert conversions.CROPPED not in found


def dolby(profile: int, compatible: int) -> bytes:
    return bytes([1, 0, profile << 1, 0x2D, compatible << 4]) + bytes(19)


DOLBY = [(5, 0, True), (10, 0, True), (20, 0, True), (8, 1, False), (8, 4, False), (7, 6, False), (4, 2, False),
         (9, 2, False), (8, 0, False), (10, 1, False), (10, 4, False)]  # fmt: skip


@pytest.mark.parametrize(("profile", "compatible", "alone"), DOLBY)
def test_dolby_vision_that_is_nothing_else_is_refused(profile: int, compatible: int, alone: bool) -> None:
    kind = b"dvcC" if profile < 8 else b"dvvC" if profile < 20 else b"dvwC"
    data = with_entry(BASE, box(kind, dolby(profile, compatible)), True)
    if alone:
        with pytest.raises(DataError, match=f"Dolby Vision of profile {profile}"):
            decode_video(data, 2)
    else:
        assert np.array_equal(decode_video(data, 2), decode_video(BASE, 2))

    def element(number: str, content: bytes) -> bytes:
        return bytes.fromhex(number) + (len(content) | 1 << 56).to_bytes(8, "big") + content

    mapping = element("41E4", element("41E7", kind) + element("41ED", dolby(profile, compatible)))
    other = element("41E4", element("41E7", b"itu1") + element("41ED", bytes(9)))
    entry = element("AE", element("83", b"\1") + element("E0", element("B0", b"\x60")) + other + mapping)
    tags = matroska_tags(element("18538067", element("1654AE6B", entry)), 0)
    assert tags.dolby_vision == (profile if alone else None) and tags.aperture is None


def test_a_crop_in_matroska_stands_beside_dolby_vision() -> None:
    def element(number: str, content: bytes) -> bytes:
        return bytes.fromhex(number) + bytes([0x80 | len(content)]) + content

    mapping = element("41E4", element("41E7", b"dvvC") + element("41ED", dolby(8, 1)))
    entry = element("AE", element("83", b"\1") + mapping + element("E0", element("54BB", b"\2")))
    tags = matroska_tags(element("18538067", element("1654AE6B", entry)), 0)
    assert tags.aperture == Crop(2) and tags.dolby_vision is None


def with_orientation(data: bytes, turn: int, mirrored: tuple[bool, bool] = (False, False)) -> bytes:
    """An H.264 clip whose first frame has a display orientation (H.264, D.1.27): quarter turns against the clock."""
    bits = "0" + f"{mirrored[0]:d}{mirrored[1]:d}" + f"{turn * 16384 % 65536:016b}" + "010" + "0" + "1"
    bits += "0" * (-len(bits) % 8)
    payload = int(bits, 2).to_bytes(len(bits) // 8, "big")
    message = bytes([6, 47, len(payload)])
    for number, byte in enumerate(payload):  # no start code within
        message += b"\3" if number >= 2 and payload[number - 2 : number] == b"\0\0" and byte <= 3 else b""
        message += bytes([byte])
    message += b"\x80"
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, mode="w", format="mp4") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if not packet.size:
                continue
            content = (struct.pack(">I", len(message)) + message if number == 0 else b"") + bytes(packet)
            one = av.Packet(content)
            one.pts, one.dts, one.time_base, one.stream = packet.pts, packet.dts, packet.time_base, stream
            one.is_keyframe = packet.is_keyframe
            out.mux(one)
    return buffer.getvalue()


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_a_turn_that_the_stream_says_holds_for_the_frames_after_it(turn: int) -> None:
    found = decode_video(with_orientation(BASE, turn), 4)
    assert np.array_equal(found, np.rot90(decode_video(BASE, 4), turn, (1, 2)))


@pytest.mark.parametrize("mirrored", [(True, False), (False, True)])
def test_a_mirroring_that_the_stream_says_holds_too(mirrored: tuple[bool, bool]) -> None:
    found, plain = decode_video(with_orientation(BASE, 0, mirrored), 4), decode_video(BASE, 4)
    assert np.array_equal(found, plain[:, :, ::-1] if mirrored[0] else plain[:, ::-1])


@pytest.mark.parametrize(("orientation", "agree"), [(TURNED, False), (MIRRORED, False), ((0, -1, 1, 0), True)])
def test_container_and_stream_that_say_different_turns_are_refused(
    orientation: tuple[int, int, int, int], agree: bool
) -> None:
    data = with_orientation(clip(CODECS[0], Traits(orientation=orientation, matrix=1, full=False), FRAMES), 1)
    if agree:
        assert np.array_equal(decode_video(data, 4), np.rot90(decode_video(BASE, 4), 1, (1, 2)))
    else:
        with pytest.raises(DataError, match="say different turns"):
            decode_video(data, 4)


def test_fields_that_are_coded_as_frames_are_refused() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as out:
        options = {"x265-params": "interlace=tff:log-level=none:pools=none"}
        stream = out.add_stream("libx265", rate=8, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        for number in range(6):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(scene(number, 128, 128), format="rgb24")))
        out.mux(stream.encode())
    with pytest.raises(DataError, match="single fields"):
        decode_video(buffer.getvalue(), 2)


def transparent(container: str = "webm") -> bytes:
    opacity = np.broadcast_to(np.linspace(0, 255, 96).astype(np.uint8)[:, None], (4, 64, 96, 1))
    return clip(ALPHA[0], Traits(matrix=1, full=False), np.concatenate([FRAMES, opacity], -1))


def test_transparency_that_stands_in_matroskas_tags_is_obeyed() -> None:
    """Copies by older FFmpegs have it as a tag of the track, in capitals, and not in the track itself."""
    data = transparent()
    assert np.abs(decode_video(data, 2).astype(int) - FRAMES[:2]).mean() > 30  # on white
    element, name = bytes.fromhex("53C08101"), b"DURATION"
    assert data.count(element) == 1 and data.count(name) == 1
    at = data.rindex(bytes.fromhex("67C8"), 0, data.index(name))  # a SimpleTag of TagName and TagString
    size = data[at + 2] & 0x7F
    tag = bytes.fromhex("45A38A") + b"ALPHA_MODE" + bytes.fromhex("448781") + b"1"
    spare = size - len(tag)
    tag += bytes([0xEC, 0x80 | (spare - 2)]) + bytes(spare - 2)  # and a Void
    made = data[: at + 3] + tag + data[at + 3 + size :]
    made = made.replace(element, bytes.fromhex("EC820000"))
    with av.open(io.BytesIO(made)) as source:
        assert source.streams.video[0].metadata.get("ALPHA_MODE") == "1"
    assert np.array_equal(decode_video(made, 2), decode_video(data, 2))


def test_damage_of_transparent_clips_is_heard() -> None:
    data, refused = transparent(), 0
    with av.open(io.BytesIO(data)) as source:
        packets = [(packet.pos, packet.size) for packet in source.demux(video=0) if packet.size]
    for pos, size in packets:
        made = bytearray(data)
        at = data.index(bytes(data[pos : pos + 4]), pos)
        made[at + 12 : at + min(size, 60)] = bytes(min(size, 60) - 12)
        try:
            decode_video(bytes(made), 4)
        except DataError:
            refused += 1
    assert refused >= 1


@pytest.mark.parametrize(
    ("brand", "what"), [("avif", "AVIF"), ("avis", "AVIF"), ("heic", "HEIF"), ("mif1", "HEIF"), ("crx ", "CR3")]
)
def test_pictures_in_mp4s_boxes_are_named_and_no_clips(brand: str, what: str) -> None:
    data = box(b"ftyp", brand.encode() + bytes(4)) + BASE[32:]
    for decode in (lambda: decode_video(data, 2), lambda: decode_image(data)):
        with pytest.raises(DataError, match=f"it is .*{what}"):
            decode()


def copied(data: bytes, folder: Path, *options: str, kind: str = "mp4") -> bytes:
    """A clip through the FFmpeg program, which copies its packets."""
    if not shutil.which("ffmpeg"):
        pytest.skip("needs the FFmpeg program")
    (folder / "in").write_bytes(data)
    command = ["ffmpeg", "-v", "error", "-y", "-r", "8", "-i", "in", "-c", "copy", *options, "-f", kind, "out"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "out").read_bytes()


@pytest.mark.parametrize("codec", [CODECS[0], CODECS[2], CODECS[3], CODECS[6]], ids=lambda codec: codec.label)
@pytest.mark.parametrize(("left", "right", "top", "bottom"), [(2, 0, 0, 0), (4, 6, 2, 8), (34, 2, 16, 2)])
def test_a_window_of_the_stream_shows_no_more_than_itself(
    codec: Codec, left: int, right: int, top: int, bottom: int, tmp_path: Path
) -> None:
    """Also where what is cut at the left is no multiple of 64 bytes, of which FFmpeg's library shows the rest."""
    sides = f"crop_left={left}:crop_right={right}:crop_top={top}:crop_bottom={bottom}"
    whole = clip(codec, Traits(matrix=1, full=False), FRAMES)
    window = copied(whole, tmp_path, "-bsf:v", f"{'hevc' if codec.name == 'libx265' else 'h264'}_metadata={sides}")
    expected = decode_video(whole, 2)[:, top : 64 - bottom, left : 96 - right]
    found = decode_video(window, 2)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 0.1  # 10 bits are dithered by their place


@pytest.mark.parametrize("shapes", [(1, 2), (Fraction(4, 3), 1)])
def test_pixels_that_change_their_shape_are_refused(shapes: tuple[Fraction, Fraction], tmp_path: Path) -> None:
    streams = [
        copied(clip(CODECS[0], Traits(aspect=Fraction(one), matrix=1, full=False), FRAMES), tmp_path, kind="h264")
        for one in shapes
    ]
    joined = copied(b"".join(streams), tmp_path)
    for data in (joined, joined.replace(b"pasp", b"free")):
        with pytest.raises(DataError, match="change their shape"):
            decode_video(data, 6)


def test_parts_of_a_track_that_say_other_crops_are_refused() -> None:
    data, aperture = (
        bytearray(with_entry(BASE, APERTURE, True)),
        box(b"clap", struct.pack(">8i", *[40, 1] * 2, *[0, 1] * 2)),
    )
    at = data.rindex(b"stsd") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    entry = bytes(data[at + 16 : at + size])
    other = entry.replace(APERTURE, aperture)
    data[at + 12 : at + 16] = (2).to_bytes(4, "big")
    data[at + size : at + size] = other
    for kind in (b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        start = data.rindex(kind) - 4
        data[start : start + 4] = (int.from_bytes(data[start : start + 4], "big") + len(other)).to_bytes(4, "big")
    with pytest.raises(DataError, match="parts of its track have other crops"):
        decode_video(bytes(data), 4)


HDR10 = "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1):max-cll=1000,400"


@pytest.mark.parametrize(
    ("said", "light", "refused"),
    [
        ((9, 16, 9), "", ""),
        ((9, 16, 9), HDR10, ""),
        ((1, 1, 1), HDR10, ""),  # what a tool that tone-maps leaves
        ((2, 2, 1), HDR10, "names no transfer function"),
        ((9, 16, 2), "", "no matrix"),
        ((9, 14, 2), "", "no matrix"),
        ((2, 18, 2), "", "no matrix"),
    ],
)
def test_hdr_that_is_named_in_part_is_not_guessed(said: tuple[int, int, int], light: str, refused: str) -> None:
    primaries, transfer, matrix = said
    parameters = f"log-level=none:pools=none:colorprim={primaries}:transfer={transfer}:colormatrix={matrix}:{light}"
    codec = Codec("libx265", "yuv420p10le", "matroska", {"crf": "4", "x265-params": parameters})
    data = clip(codec, Traits(matrix=matrix), FRAMES[:1])
    if refused:
        with pytest.raises(DataError, match=refused):
            decode_video(data, 1)
    else:
        assert decode_video(data, 1).shape == (1, 64, 96, 3)
