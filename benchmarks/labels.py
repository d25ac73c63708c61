"""Whether labelling keeps a slow endpoint busy: `domainshuttle data label` against a made server on loopback.

Run by hand: python benchmarks/labels.py [--samples 1200] [--seconds 2] [--at-once 32] [--clips]

The server answers each question after `seconds`, a quarter more or less, as many at a time as are asked, like vLLM
with room for `at_once`. Busy is what its answers took in all, over `at_once` times the time: reading, decoding, the
stage's own work and the ends of its parts are what is missing to 100%.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from domainshuttle.pipelines.corpora.words import CAPTION_IS_INSTRUCTION, FROM_WORDS
from domainshuttle.pipelines.index.table import IndexMetadata, IndexRow, write_index
from domainshuttle.pipelines.media.decode import encode_jpeg, encode_mp4
from domainshuttle.pipelines.sample import RawSample, Reference, SampleInfo, Subject
from domainshuttle.pipelines.shards.tar import ShardWriter


def corpus(folder: Path, samples: int, clips: bool) -> None:
    """Edits of pictures of 1024x1024, or of clips of 49 frames of 480x832, with a reference of 512x512 each."""
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 255, (16, 16, 3), np.uint8).repeat(64, 0).repeat(64, 1)
    if clips:
        frames = np.stack([np.roll(smooth[:480, :832], 4 * number, 1) for number in range(49)])
        target, size, count, fps = encode_mp4(frames, 16.0), (480, 832), 49, 16.0
    else:
        target, size, count, fps = encode_jpeg(smooth), (1024, 1024), 1, None
    picture = encode_jpeg(smooth[:512, :512])
    infos = {}
    with ShardWriter(folder, "part-000000", 256 << 20) as writer:
        for number in range(samples):
            info = SampleInfo(
                caption=f"Change {number}: let the woman dance", source="made", kind="video" if clips else "image",
                fps=fps, frames=count, size=size, subjects=[Subject(id=0, word="subject", domain=1)],
                references=[Reference(file="ref0.jpg", subject=0, origin="photo", size=(512, 512))],
                scores={CAPTION_IS_INSTRUCTION: 1.0, FROM_WORDS: 1.0},
            )  # fmt: skip
            sample = RawSample(f"s{number}", info, {"mp4" if clips else "jpg": target, "ref0.jpg": picture})
            infos[sample.key] = info
            writer.write(sample.key, sample.members())
    bucket = "49x480x832" if clips else "1x480x832"
    rows = [IndexRow.of(entry, infos[entry.key], bucket) for entry in writer.entries]
    write_index(folder / "index.parquet", rows, IndexMetadata(corpus="made", stage="raw"))


class Meter:
    """When questions came and when they were answered."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.spans: list[tuple[float, float]] = []

    def busy(self, at_once: int, begin: float, end: float) -> float:
        """The share of `at_once` that was in work, over a time."""
        return sum(max(min(gone, end) - max(came, begin), 0) for came, gone in self.spans) / (at_once * (end - begin))


def serve(seconds: float, meter: Meter) -> ThreadingHTTPServer:
    """A server that answers in the form that the labels' questions ask for."""
    content = {"caption": "A woman dances.", "subjects": [{"word": "woman", "domain": "human"}], "score": 5}
    message = {"role": "assistant", "content": json.dumps(content)}
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": {}}
    body = json.dumps(answer).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet

        def do_POST(self) -> None:
            came = time.monotonic()
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(random.uniform(0.75, 1.25) * seconds)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            gone = time.monotonic()
            with meter.lock:
                meter.spans.append((came, gone))

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--seconds", type=float, default=2.0, help="of an answer")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--clips", action="store_true", help="clips instead of pictures")
    options = parser.parse_args()
    meter = Meter()
    with tempfile.TemporaryDirectory() as temporary, serve(options.seconds, meter) as server:
        folder = Path(temporary) / "raw"
        corpus(folder, options.samples, options.clips)
        settings = {
            "labeller": "endpoint", "endpoint.url": f"http://127.0.0.1:{server.server_address[1]}/v1",
            "endpoint.model": "made", "endpoint.at_once": options.at_once,
        }  # fmt: skip
        command = [sys.executable, "-m", "domainshuttle.platform.cli", "data", "label", str(folder)]
        began = time.monotonic()
        done = subprocess.run(
            [*command, *(part for key, value in settings.items() for part in ("--set", f"labels.{key}={value}"))],
            check=True,
            capture_output=True,
            text=True,
        )
        whole = time.monotonic() - began
        server.shutdown()
    came = sorted(span[0] for span in meter.spans)
    first, last = came[0], max(gone for _, gone in meter.spans)
    steady = meter.busy(options.at_once, came[len(came) // 10], came[9 * len(came) // 10])
    print(done.stdout)
    print(
        f"{len(came)} questions, {options.at_once} at once, answers of {options.seconds:g} s: "
        f"{meter.busy(options.at_once, first, last):.1%} busy from the first question to the last answer, "
        f"{last - first:.0f} s; {steady:.1%} while the second to the ninth tenth was asked; "
        f"the command took {whole:.0f} s"
    )
    for part in range(10):
        begin, end = (came[min(one * len(came) // 10, len(came) - 1)] for one in (part, part + 1))
        print(f"  tenth {part + 1}: {meter.busy(options.at_once, begin, end):.1%} over {end - begin:.0f} s")


if __name__ == "__main__":
    main()
