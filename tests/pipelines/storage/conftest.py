"""A store that fails when it is told to."""

from collections.abc import Iterator

import pytest
from faulty_s3 import QUICK, Proxy, serve_s3

from domainshuttle.pipelines.storage import files as storage


@pytest.fixture(scope="session")
def proxy() -> Iterator[Proxy]:
    with serve_s3() as proxy:
        yield proxy


@pytest.fixture
def store(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(storage, "LIMITS", QUICK)
    proxy.forget()
    yield proxy
    proxy.forget()
