"""Fixtures of whole runs: a tiny configuration with its corpora, and a run of it from beginning to end."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from running import cli, end_started

from domainshuttle.platform.commands.data import build_corpora, encode_corpora
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import RunConfig


@pytest.fixture(autouse=True)
def no_driver_outlives_its_test() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture(scope="session")
def tiny(tiny_yaml: Path, ray_cluster: None) -> Path:
    """The tiny configuration with its corpora built and encoded."""
    config = load_config(str(tiny_yaml))
    build_corpora(config)
    encode_corpora(config)
    return tiny_yaml


@pytest.fixture(scope="session")
def unbroken(tiny: Path) -> tuple[RunConfig, str]:
    """A run from beginning to end, and what it printed."""
    printed = cli("train", tiny)
    return load_config(str(tiny)), printed
