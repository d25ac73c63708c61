"""ICC profiles, made here by the definition."""

import struct

import numpy as np

from domainshuttle.pipelines.media import colours


def profile(space: colours.ColourSpace) -> bytes:
    """An ICC profile of those colours, made here: a matrix for D50 and a gamma."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    xyz, d50 = colours._to_xyz(space.chromaticities), np.array([0.9642, 1, 0.8249])
    to_d50 = np.linalg.inv(bradford) @ np.diag((bradford @ d50) / (bradford @ xyz.sum(1))) @ bradford @ xyz

    def s15(values: np.ndarray) -> bytes:
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(float(space.curve) * 256)) + b"\0\0"
    tags = {
        b"desc": b"desc\0\0\0\0\0\0\0\2a\0" + bytes(78),
        b"wtpt": b"XYZ \0\0\0\0" + s15(d50),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
    }
    for name, column in zip((b"r", b"g", b"b"), to_d50.T, strict=True):
        tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + s15(column), name + b"TRC": curve}
    table, body = b"", b""
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    size = 132 + len(table) + len(body)
    head = (
        struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
        + bytes(12)
        + b"acsp"
        + bytes(28)
        + s15(d50)
        + bytes(48)
    )
    return head + struct.pack(">I", len(tags)) + table + body
