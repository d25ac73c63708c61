"""What encoding took, and what follows from it.

Run: python -m pytest tests/pipelines/encoding/test_throughput.py
"""

from pathlib import Path

import pytest

from domainshuttle.pipelines.encoding.throughput import Throughput


def measured(threads: int = 1) -> Throughput:
    found = Throughput(threads=threads)
    found.add(20, 20_000, 8.0, {"read": 1.0, "decode": 7.0, "text": 0.5, "video": 4.0, "write": 0.5})
    found.add(20, 20_000, 8.0, {"read": 1.0, "decode": 7.0, "text": 0.5, "video": 4.0, "write": 0.5})
    return found


def test_the_bottleneck_is_the_slowest_stage_of_the_busier_side() -> None:
    one = measured()
    assert one.rate == pytest.approx(2.5) and one.bottleneck == "decode"
    assert one.stage_rates() == pytest.approx({"read": 20, "decode": 40 / 14, "text": 40, "video": 5, "write": 40})
    two = measured(threads=4)  # reading and decoding are shared by four, so the other side is the busier one
    assert two.bottleneck == "video" and two.stage_rates()["decode"] == pytest.approx(4 * 40 / 14)
    assert "Bottleneck: video" in two.sentence() and "bottleneck video" in two.note()
    assert Throughput().bottleneck == Throughput().note() == Throughput().sentence() == ""


def test_an_estimate_goes_on_at_the_measured_rate_and_size() -> None:
    size, hours = measured().estimate(950_000)
    assert size == 950_000_000 and hours == pytest.approx(950_000 / 2.5 / 3600)


def test_what_was_measured_is_kept_beside_the_corpus(tmp_path: Path) -> None:
    assert Throughput.load(tmp_path) is None
    measured(3).save(tmp_path)
    assert Throughput.load(tmp_path) == measured(3)
    (tmp_path / ".parts" / "throughput.json").write_text("{torn")
    assert Throughput.load(tmp_path) is None
