"""Clips and pictures with traits of their own, against FFmpeg's filters, Pillow, Little CMS and the definitions.

Run: python -m pytest tests/pipelines/media/test_shown.py
"""

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from icc import profile
from PIL import Image, ImageCms, ImageOps

from domainshuttle.model.pictures import fit_reference as fit_in_frame
from domainshuttle.model.sampling import letterbox
from domainshuttle.pipelines.buckets import parse_bucket
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.media import colours
from domainshuttle.pipelines.media.container_tags import Crop, matroska_tags
from domainshuttle.pipelines.media.decode import Pixels, decode_image, decode_video, fit_reference

RNG = np.random.default_rng(0)
WIDE = profile(colours.ColourSpace(colours._OTHERS[12], 1.8))
SCENE = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (5, 6, 3), np.uint8)).resize((96, 64), Image.Resampling.BICUBIC)
)


def clip(
    frames: Pixels | None = None,
    codec: str = "libx264",
    form: str = "yuv444p",
    container: str = "mp4",
    **traits: object,
) -> bytes:
    """Six frames, or those given, with `traits` of the stream: `matrix`, `tags` (colours), `aspect`, `options`."""
    frames = np.stack([SCENE] * 6) if frames is None else frames
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=container) as out:
        stream = out.add_stream(codec, rate=Fraction(8), options=traits.get("options", {"crf": "2", "threads": "1"}))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], form
        if "matrix" in traits:
            stream.set_display_matrix(traits["matrix"])
        if "aspect" in traits:
            stream.codec_context.sample_aspect_ratio = traits["aspect"]
        for name, value in dict(traits.get("tags", {})).items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            out.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.ascontiguousarray(frame), format="rgb24" if frame.shape[-1] == 3 else "rgba"
                    )
                )
            )
        out.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("turned", range(1, 9))
def test_a_display_matrix_turns_and_mirrors_like_exif(turned: int) -> None:
    one, exif = 1 << 16, Image.Exif()
    a, b, c, d = {1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
                  5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)}[turned]  # fmt: skip
    exif[0x0112] = turned
    upright = Image.fromarray(SCENE)
    upright.info["exif"] = exif.tobytes()
    expected = np.asarray(ImageOps.exif_transpose(upright)).astype(int)
    found = decode_video(clip(matrix=(a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)), 2)[1]
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 3


def test_other_angles_are_refused() -> None:
    with pytest.raises(DataError, match="other than right angles"):
        decode_video(clip(matrix=(46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30)), 2)


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(12, 11), Fraction(40, 33)])
def test_pixels_that_are_not_square_are_stretched(aspect: Fraction) -> None:
    data = clip(aspect=aspect)
    height, width = (64, round(96 * aspect)) if aspect > 1 else (round(64 / aspect), 96)
    assert decode_video(data, 2).shape == (2, height, width, 3)
    bucket = parse_bucket("5x64x96")
    whole, fitted = decode_video(data, 5), decode_video(data, 5, fit=bucket)
    assert np.abs(fitted[2].astype(int) - np.asarray(ImageOps.fit(Image.fromarray(whole[2]), (96, 64)))).mean() < 4


@pytest.mark.parametrize("matrix", [1, 5, 6, 7, 9, 2])
@pytest.mark.parametrize("full", [False, True])
def test_matrix_and_range_are_obeyed(matrix: int, full: bool) -> None:
    """Flat fields of known Y, Cb and Cr, against the definition."""
    red, blue = {1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}.get(matrix, (0.299, 0.114))
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="matroska") as out:
        stream = out.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for number in range(4):
            frame = av.VideoFrame(64, 64, "yuv420p")
            for plane, level in zip(frame.planes, (120, 100 + number * 12, 150 - number * 9), strict=True):
                plane.update(bytes([level]) * plane.buffer_size)
            frame.colorspace, frame.color_range, frame.pts = matrix, 2 if full else 1, number
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    y, cb, cr = 120, np.arange(4) * 12 + 100, 150 - np.arange(4) * 9
    luma = y / 255 if full else (y - 16) / 219
    u, v = ((c - 128) / (255 if full else 224) for c in (cb, cr))
    r, b = luma + 2 * (1 - red) * v, luma + 2 * (1 - blue) * u
    g = (luma - red * r - blue * b) / (1 - red - blue)
    found = decode_video(buffer.getvalue(), 4)[:, 32, 32]
    assert np.abs(found - np.clip(np.stack([r, g, b], 1), 0, 1) * 255).max() <= 4


@pytest.mark.parametrize("matrix", [8, 10])
def test_other_matrices_are_refused(matrix: int) -> None:
    with pytest.raises(DataError, match=f"colour matrix {matrix} of H.273"):
        decode_video(clip(tags={"colorspace": matrix}), 2)


def test_interlaced_frames_show_no_combs() -> None:
    """A bar that moves between the two fields of each frame: lines of one picture, not of two."""
    frames = np.full((8, 64, 96, 3), 30, np.uint8)
    for number in range(8):
        for field in (0, 1):
            at = 8 * number + 4 * field
            frames[number, field::2, at : at + 16] = 220
    data = clip(
        frames,
        "libx264",
        "yuv420p",
        options={"crf": "4", "threads": "1", "x264-params": "tff=1", "flags": "+ildct+ilme"},
    )
    found = decode_video(data, 6)[4].astype(int)
    comb = np.abs(np.diff(frames[4].astype(int), axis=0)).mean()
    assert np.abs(np.diff(found, axis=0)).mean() < comb / 4


def test_transparent_clips_are_laid_on_white() -> None:
    frames = np.concatenate([np.stack([SCENE] * 6), np.full((6, 64, 96, 1), 255, np.uint8)], axis=-1)
    frames[:, :, 48:, 3] = 0
    for codec, form, container in (
        ("qtrle", "argb", "mov"),
        ("png", "rgba", "mov"),
        ("libvpx-vp9", "yuva420p", "webm"),
    ):
        data = clip(frames, codec, form, container, options={"crf": "4", "b": "0"} if "vpx" in codec else {})
        found = decode_video(data, 3)[2].astype(int)
        assert (found[:, 56:] > 245).all(), codec
        assert np.abs(found[:, :40] - SCENE[:, :40]).mean() < 8, codec


def test_matroska_crops() -> None:
    """EBML made here: a segment with one video track, cropped by 2, 4, 6 and 8."""

    def element(number: str, content: bytes) -> bytes:
        return bytes.fromhex(number) + bytes([0x80 | len(content)]) + content

    video = b"".join(element(n, bytes([v])) for n, v in (("54BB", 2), ("54AA", 4), ("54CC", 6), ("54DD", 8)))
    tracks = element("1654AE6B", element("AE", element("83", b"\1") + element("E0", video)))
    assert matroska_tags(element("18538067", tracks), 0).aperture == Crop(2, 4, 6, 8)


def test_an_mp4_crops_by_its_clean_aperture() -> None:
    data = bytearray(clip(container="mp4", form="yuv420p"))
    aperture = struct.pack(">I4s8i", 40, b"clap", 80, 1, 48, 1, -2, 1, 4, 1)
    at = data.rindex(b"avcC") - 4
    for kind in (b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov", b"avc1"):
        start = data.rindex(kind) - 4
        data[start : start + 4] = (int.from_bytes(data[start : start + 4], "big") + 40).to_bytes(4, "big")
    assert data.index(b"mdat") < data.index(b"moov")  # so that no offset moves
    data[at:at] = aperture
    found = decode_video(bytes(data), 2)[1].astype(int)
    assert found.shape == (48, 80, 3)
    assert np.abs(found - SCENE[12:60, 6:86]).mean() < 4


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(levels: np.ndarray, depth: int, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """[h,w,c] as a PNG, levels of `depth` bits."""
    rows = []
    for row in levels.reshape(len(levels), -1):
        bits = "".join(format(int(level), f"0{depth}b") for level in row)
        bits += "0" * (-len(bits) % 8)
        rows.append(b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big"))
    head = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], depth, colour_type, 0, 0, 0)
    body = b"".join(chunk(*one) for one in chunks) + chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(("depth", "colour_type"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_one_transparent_level_is_white_and_no_other(depth: int, colour_type: int) -> None:
    levels = RNG.integers(0, 1 << depth, (6, 9, 1 if colour_type == 0 else 3))
    hidden = levels[2, 3]
    levels[0, 0] = hidden ^ 1  # of 16 bits: another level with the same upper 8
    note = struct.pack(f">{len(hidden)}H", *map(int, hidden))
    most = (1 << depth) - 1
    expected = np.where((levels == hidden).all(-1, keepdims=True), 255, levels * 255 / most)
    found = decode_image(png(levels, depth, colour_type, (b"tRNS", note)))
    assert np.abs(found - np.broadcast_to(expected, found.shape)).max() <= 1


def levels_by(space: colours.ColourSpace) -> bytes:
    gamma = struct.pack(">I", round(100_000 / float(space.curve)))
    points = (*space.chromaticities[6:], *space.chromaticities[:6])
    chromaticities = struct.pack(">8I", *(round(100_000 * value) for value in points))
    return png(SCENE.astype(int), 8, 2, (b"gAMA", gamma), (b"cHRM", chromaticities))


@pytest.mark.parametrize("gamma", [1.8, 2.2, 2.6])
@pytest.mark.parametrize("primaries", [4, 9, 12])
def test_gamma_and_chromaticities_are_what_little_cms_makes_of_them(gamma: float, primaries: int) -> None:
    space = colours.ColourSpace(colours._OTHERS[primaries], gamma)
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile(space)))
    image = ImageCms.profileToProfile(Image.fromarray(SCENE), source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert image is not None
    error = np.abs(decode_image(levels_by(space)).astype(int) - np.asarray(image))
    assert error.mean() < 1 and np.percentile(error, 99) <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_icc_profiles_are_obeyed_wherever_they_are(kind: str, mode: str) -> None:
    data, icc = io.BytesIO(), profile(colours.ColourSpace(colours._OTHERS[12], 1.8))
    Image.fromarray(SCENE).convert(mode).save(data, kind, icc_profile=icc, quality=95)
    picture = Image.open(io.BytesIO(data.getvalue())).convert("RGB")
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    expected = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    found = decode_image(data.getvalue())
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 3
    assert np.abs(found.astype(int) - np.asarray(picture)).max() > 10


def test_profiles_that_can_not_be_used_are_refused() -> None:
    for icc in (b"none at all", profile(colours.ColourSpace(colours.BT709, 2.2))[:200]):
        data = io.BytesIO()
        Image.fromarray(SCENE).save(data, "PNG", icc_profile=icc)
        with pytest.raises(DataError, match="its ICC profile"):
            decode_image(data.getvalue())


def moved_behind_frame(jpeg: bytes) -> bytes:
    """A JPEG whose EXIF, XMP and ICC profile stand between the frame's header and the pixels, which is as good."""
    at, segments = 2, []
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        segments.append(jpeg[at:end])
        at = end
    segments.sort(key=lambda segment: segment[1] in (0xE1, 0xE2))
    return jpeg[:2] + b"".join(segments) + jpeg[at:]


def with_profile_parts(jpeg: bytes, *parts: tuple[int, int, bytes]) -> bytes:
    """A JPEG with parts of an ICC profile: the number of each, how many there are, and its bytes."""
    noted = (b"ICC_PROFILE\0" + bytes([number, count]) + content for number, count, content in parts)
    return jpeg[:20] + b"".join(b"\xff\xe2" + (len(one) + 2).to_bytes(2, "big") + one for one in noted) + jpeg[20:]


def test_notes_of_a_jpeg_hold_wherever_they_stand_before_its_pixels() -> None:
    exif, data, plain = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(SCENE).save(data, "JPEG", quality=95, exif=exif, icc_profile=WIDE)
    assert np.array_equal(decode_image(moved_behind_frame(data.getvalue())), decode_image(data.getvalue()))
    Image.fromarray(SCENE).save(plain, "JPEG", quality=95)
    swapped = with_profile_parts(plain.getvalue(), (2, 2, WIDE[200:]), (1, 2, WIDE[:200]))
    upright = decode_image(data.getvalue()).swapaxes(0, 1)[:, ::-1]
    assert np.array_equal(decode_image(swapped), upright[::-1, ::-1])


@pytest.mark.parametrize("parts", [[1], [2], [1, 1], [1, 2, 2]])
def test_a_profile_of_which_a_part_is_missing_is_refused(parts: list[int]) -> None:
    data = io.BytesIO()
    Image.fromarray(SCENE).save(data, "JPEG", quality=95)
    cut = with_profile_parts(data.getvalue(), *((number, 2, WIDE[:200]) for number in parts))
    with pytest.raises(DataError, match="of its ICC profile the parts"):
        decode_image(cut)


@pytest.mark.parametrize("content", [b"", b"\1"])
def test_a_note_of_a_profile_without_its_number_is_refused(content: bytes) -> None:
    data, note = io.BytesIO(), b"ICC_PROFILE\0" + content
    Image.fromarray(SCENE).save(data, "JPEG", quality=95)
    frame, marker, rest = data.getvalue().partition(b"\xff\xc4")  # Pillow itself refuses it before the frame's header
    with pytest.raises(DataError, match="its ICC profile is damaged"):
        decode_image(frame + b"\xff\xe2" + (len(note) + 2).to_bytes(2, "big") + note + marker + rest)


@pytest.mark.parametrize("content", [b"none" * 30, zlib.compress(b"")])
def test_a_pngs_profile_that_can_not_be_unpacked_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="its ICC profile"):
        decode_image(png(SCENE.astype(int), 8, 2, (b"iCCP", b"x\0\0" + content)))


def test_cmyk_is_what_pillow_makes_of_it() -> None:
    data = io.BytesIO()
    Image.fromarray(SCENE).convert("CMYK").save(data, "JPEG", quality=95)
    expected = Image.open(io.BytesIO(data.getvalue())).convert("RGB")
    assert np.array_equal(decode_image(data.getvalue()), np.asarray(expected))


def test_hdr_by_cicp_keeps_what_sdr_can_show() -> None:
    """Cards as PQ, 203 cd/m2 being SDR white, by the definition in float64; highlights are neither cut off nor grey."""
    cards = np.array([[[200, 50, 50], [50, 200, 50], [50, 50, 200], [128, 128, 128], [20, 20, 20], [255, 255, 255]]])
    level = cards / 255
    light = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    wide = light @ np.linalg.inv(colours._to_bt709(colours._OTHERS[9])).T * 203 / 10000
    power = np.clip(wide, 0, 1) ** (2610 / 16384)
    coded = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    data = png(np.rint(coded * 65535).astype(int), 16, 2, (b"cICP", bytes([9, 16, 0, 1])))
    found = decode_image(data).astype(int)
    assert np.abs(found[:, :5] - cards[:, :5]).max() <= 2
    assert (found[0, 5] == 243).all()


@pytest.mark.parametrize("coding", [(9, 16, 9, 1), (9, 16, 0, 0), (10, 1, 0, 1), (1, 9, 0, 1)])
def test_codings_that_are_not_read_are_refused(coding: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"cICP|H\.273"):
        decode_image(png(SCENE.astype(int), 8, 2, (b"cICP", bytes(coding))))


def test_pictures_whose_pixels_are_not_square_are_refused() -> None:
    with pytest.raises(DataError, match="not square"):
        decode_image(png(SCENE.astype(int), 8, 2, (b"pHYs", struct.pack(">IIB", 200, 100, 0))))
    data = io.BytesIO()
    Image.fromarray(SCENE).save(data, "JPEG", dpi=(204, 98))
    with pytest.raises(DataError, match="not square"):
        decode_image(data.getvalue())


def tiff(turned: int, kind: int) -> bytes:
    """EXIF with nothing but an orientation, as SHORT (3) or LONG (4)."""
    value = struct.pack("<HH", turned, 0) if kind == 3 else struct.pack("<I", turned)
    return b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHI", 0x0112, kind, 1) + value + bytes(4)


def oriented(place: str, turned: int) -> bytes:
    """SCENE with its orientation said in some place."""
    exif, data = tiff(turned, 4 if place.endswith("LONG") else 3), io.BytesIO()
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
    ) % turned
    kind = place.split()[0]
    if kind != "PNG":
        note = {"xmp": xmp} if place.endswith("XMP") else {"exif": b"Exif\0\0" + exif}
        Image.fromarray(SCENE).save(data, kind, **note)
        return data.getvalue()
    Image.fromarray(SCENE).save(data, "PNG")
    raw = b"\nexif\n%8d\n" % (len(exif) + 6) + (b"Exif\0\0" + exif).hex().encode() + b"\n"
    late = {
        "PNG before": chunk(b"eXIf", exif),
        "PNG after": chunk(b"eXIf", exif),
        "PNG raw profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        "PNG raw APP1": chunk(b"zTXt", b"Raw profile type APP1\0\0" + zlib.compress(raw)),
        "PNG XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }[place]
    made = data.getvalue()
    at = made.rindex(b"IEND") - 4 if place == "PNG after" else made.index(b"IDAT") - 4
    return made[:at] + late + made[at:]


@pytest.mark.parametrize("turned", [2, 3, 6, 8])
@pytest.mark.parametrize(
    "place",
    ["JPEG", "JPEG LONG", "JPEG XMP", "WEBP", "WEBP LONG", "WEBP XMP", "PNG before", "PNG after", "PNG raw profile",
     "PNG raw APP1", "PNG XMP"],
)  # fmt: skip
def test_an_orientation_is_obeyed_wherever_pillow_finds_it(place: str, turned: int) -> None:
    data = oriented(place, turned)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    found = decode_image(data)
    assert found.shape == upright.shape and np.abs(found.astype(int) - upright).max() <= 4
    if "raw APP1" not in place:
        assert (upright.shape[0] == 96) == (turned > 4)  # that Pillow does find it
        assert (
            np.abs(
                found.astype(int)
                - np.asarray(Image.open(io.BytesIO(oriented(place, 1))).convert("RGB").resize(found.shape[1::-1]))
            ).mean()
            > 10
        )


@pytest.mark.parametrize("frame", [(32, 32), (32, 48)])
def test_references_are_fitted_alike_in_training_and_generation(frame: tuple[int, int]) -> None:
    bucket = parse_bucket(f"1x{frame[0]}x{frame[1]}")
    for height in range(1, 144, 3):
        for width in range(1, 144, 3):
            picture = np.resize(SCENE, (height, width, 3))
            trained = fit_reference(picture, bucket)
            assert np.array_equal(trained, fit_in_frame(picture, *frame))
            shown = letterbox(Image.fromarray(picture), *frame)
            assert np.array_equal(((shown + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), trained)


@pytest.mark.parametrize("turned", range(1, 9))
def test_cameras_pictures_are_the_same_in_training_and_generation(turned: int) -> None:
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turned
    Image.fromarray(SCENE).save(
        data, "PNG", exif=exif.tobytes(), icc_profile=profile(colours.ColourSpace(colours._OTHERS[12], 2.2))
    )
    trained = fit_reference(decode_image(data.getvalue()), parse_bucket("1x32x48"))
    shown = letterbox(Image.open(io.BytesIO(data.getvalue())), 32, 48)
    assert np.array_equal(((shown + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), trained)
