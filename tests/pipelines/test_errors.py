"""Texts of errors without secrets.

Run: python -m pytest tests/pipelines/test_errors.py
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domainshuttle.pipelines.errors import mask_secrets, one_line, without_user


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("no connection to http://me:pw@host:5000/x", "no connection to http://***@host:5000/x"),
        ("s3://AKIAUSER:se%2Fcret@bucket/x", "s3://***@bucket/x"),
        ("s3://AKIAUSER:se/cret@bucket/x", "s3://***@bucket/x"),
        ("s3://AKIAUSER:se+cr/e?t#@bucket/x y", "s3://***@bucket/x y"),
        ("postgresql://me@host/db: 'http://a:b@c'", "postgresql://***@host/db: 'http://***@c'"),
        ("az://box/x?client_secret=abc&port=1", "az://box/x?client_secret=***&port=1"),
        ("http://h/x?a=1&X-Amz-Signature=ab%2F&sig=xy", "http://h/x?a=1&X-Amz-Signature=***&sig=***"),
        ("s3://bucket/a@b/c and me@home:/x", "s3://bucket/a@b/c and me@home:/x"),
        ("s3://bucket/x?region=eu-west-1", "s3://bucket/x?region=eu-west-1"),
    ],
)
def test_what_is_masked(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked
    assert mask_secrets(masked) == masked


ALPHABET = st.text(st.characters(codec="ascii", exclude_characters="'\" ", exclude_categories=["Cc"]), min_size=8)


@given(ALPHABET, st.sampled_from(["s3", "http", "postgresql+psycopg2"]), st.sampled_from(["", "/x", "/x?region=eu"]))
def test_no_password_is_left(password: str, scheme: str, path: str) -> None:
    secret = f"{password}SECRET{password}"
    assert mask_secrets(f"at {scheme}://user:{secret}@host{path} failed") == f"at {scheme}://***@host{path} failed"
    assert without_user(f"{scheme}://user:{secret}@host{path}") == f"{scheme}://host{path}"
    assert "SECRET" not in one_line(OSError(f"{scheme}://user:{secret}@host{path}\nmore"))


@given(st.sampled_from(["secret", "token", "sas_token", "AWS-Secret-Access-Key", "password"]), ALPHABET)
def test_no_parameter_is_left(name: str, value: str) -> None:
    value = re.sub("[&@]", "", value) + "SECRET"
    assert mask_secrets(f"az://box/x?{name}={value}&port=1") == f"az://box/x?{name}=***&port=1"
