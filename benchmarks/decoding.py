"""How much CPU the decoding of a training clip takes: PyAV, by threads, against torchcodec where it is installed.

Run by hand: python benchmarks/decoding.py clip [--frames 81 --height 480 --width 832]
torchcodec needs FFmpeg's shared libraries: `pip install torchcodec==0.13.0` (its CPU build) and LD_LIBRARY_PATH.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable

import av
import numpy as np

from domainshuttle.pipelines.media.decode import Pixels, decode_video, encode_mp4


def moving_clip(frames: int, height: int, width: int, fps: float) -> bytes:
    """An H.264 clip with texture, motion and some noise, of a bit rate like footage's."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 8 + 40, width // 8 + 40, 3), np.uint8)
    scene = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    grain = rng.normal(0, 4, (height, width, 3))
    clip = []
    for number in range(frames):
        frame = scene[2 * number : 2 * number + height, 3 * number : 3 * number + width]
        clip.append(np.clip(frame + np.roll(grain, 7 * number, axis=1), 0, 255).astype(np.uint8))
    return encode_mp4(np.stack(clip), fps, crf=20)


def with_pyav(threads: str, data: bytes, frames: int) -> Pixels:
    """As `decode_video`, with another way of threading."""
    chosen = []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = threads
        for frame in container.decode(stream):
            chosen.append(frame.to_ndarray(format="rgb24"))
            if len(chosen) == frames:
                break
    return np.stack(chosen)


def with_torchcodec(threads: int, data: bytes, frames: int) -> Pixels:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="approximate")
    return decoder.get_frames_in_range(0, frames).data.numpy()


def measure(decode: Callable[[], Pixels], rounds: int) -> tuple[float, float]:
    """Median (CPU, wall) milliseconds of one clip."""
    decode()
    cpu, wall = [], []
    for _ in range(rounds):
        began = time.process_time(), time.perf_counter()
        decode()
        cpu.append(time.process_time() - began[0])
        wall.append(time.perf_counter() - began[1])
    return statistics.median(cpu) * 1e3, statistics.median(wall) * 1e3


def clip(args: argparse.Namespace) -> None:
    data = moving_clip(args.frames, args.height, args.width, 16.0)
    ways: dict[str, Callable[[], Pixels]] = {
        "decode_video (ours)": lambda: decode_video(data, args.frames),
        **{f"PyAV {kind}": lambda kind=kind: with_pyav(kind, data, args.frames) for kind in ("NONE", "SLICE", "AUTO")},
    }
    try:
        import torchcodec
    except (ImportError, RuntimeError) as error:
        print(f"torchcodec is left out: {str(error).splitlines()[0]}")
    else:
        for threads in (1, 0):
            ways[f"torchcodec {torchcodec.__version__}, threads={threads}"] = lambda threads=threads: with_torchcodec(
                threads, data, args.frames
            )
    bits = len(data) * 8 / (args.frames / 16.0)
    print(f"{args.frames} frames of {args.height}x{args.width}, H.264, {bits / 1e6:.1f} Mbit/s at 16 fps")
    for name, decode in ways.items():
        cpu, wall = measure(decode, args.rounds)
        print(f"{name:34s} {cpu:7.0f} ms CPU {wall:7.0f} ms wall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("clip", help="decode one clip again and again")
    one.add_argument("--frames", type=int, default=81)
    one.add_argument("--height", type=int, default=480)
    one.add_argument("--width", type=int, default=832)
    one.add_argument("--rounds", type=int, default=7)
    one.set_defaults(run=clip)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
