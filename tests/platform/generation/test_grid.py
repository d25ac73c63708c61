"""The pictures of samples side by side: python -m pytest tests/platform/generation/test_grid.py"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domainshuttle.pipelines.media.decode import opened_clip, shown_frames
from domainshuttle.platform.generation.grid import GridRow, _at_share, _at_time, write_grid


def row(frames: int, height: int = 32, width: int = 32) -> GridRow:
    """A clip that turns from black to white, and the clip that it is compared with."""
    levels = np.linspace(0, 255, frames).astype(np.uint8)
    clip = np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))
    return GridRow("a clip", "none", [clip[0]], clip, clip)


@pytest.mark.parametrize("lengths", [(5, 1), (1, 5), (5, 9), (2, 2), (1, 1)])
def test_clips_of_several_lengths_and_sizes_stand_in_one_grid(tmp_path: Path, lengths: tuple[int, int]) -> None:
    """Held-out samples of a corpus of pictures and clips: each is generated in the size of its own."""
    written = write_grid([row(lengths[0]), row(lengths[1], 48, 16)], tmp_path, 8.0)
    assert [path.name for path in written] == ["grid.png", "grid.mp4"][: 1 + (max(lengths) > 1)]
    columns = 1 + min(3, max(lengths)) + 1
    page = np.asarray(Image.open(tmp_path / "grid.png"))
    assert page.shape[1] == 190 + columns * 136 + 8
    if max(lengths) > 1:
        assert (page == 255).all(-1).sum() > 128  # a last frame is white
        with opened_clip((tmp_path / "grid.mp4").read_bytes(), "grid") as clip:
            assert len(list(shown_frames(clip))) == 3 * max(lengths)


def test_frames_are_chosen_by_time() -> None:
    clip = np.arange(9).reshape(9, 1, 1, 1)
    assert [int(_at_share(share, clip).item()) for share in (0.0, 0.5, 1.0)] == [0, 4, 8]
    assert [int(_at_time(time, clip[:3]).item()) for time in range(5)] == [0, 1, 2, 2, 2]
