"""Which encoders there are by name, and what they say of themselves without being loaded. Nothing here brings torch."""

import json
from pathlib import Path

BLOCK_DCT, BYTE_UMT5 = "block-dct", "byte-umt5"
"""The names of the two encoders that need no weights from elsewhere."""
BYTE_UMT5_WIDTH = 64


def text_width(source: str) -> int | None:
    """Channels of what a text encoder gives; None for one of the hub, and for a folder that does not say."""
    if source == BYTE_UMT5:
        return BYTE_UMT5_WIDTH
    folder = Path(source).expanduser()
    for config in (folder / "text_encoder" / "config.json", folder / "config.json"):
        if config.is_file():
            width = json.loads(config.read_text()).get("d_model")
            return width if isinstance(width, int) else None
    return None
