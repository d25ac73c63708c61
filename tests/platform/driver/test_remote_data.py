"""A configuration whose data are in a store: what it says of them, and what it refuses.

Run: python -m pytest tests/platform/driver/test_remote_data.py
"""

from pathlib import Path

import pytest

from domainshuttle.pipelines.errors import DataError
from domainshuttle.platform.commands.data import build_corpora
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import ConfigError, RunConfig

DATA = "s3://bucket/a%20b/corpora?endpoint_override=http://10.0.0.7:9000"


def test_a_uri_stays_as_it_is_and_a_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", [f"data={DATA}"])
    assert config.data == DATA
    assert (
        config.corpus("sprites-images", "encoded").folder
        == "s3://bucket/a%20b/corpora/sprites-images/encoded?endpoint_override=http://10.0.0.7:9000"
    )
    assert RunConfig.model_validate(config.model_dump(mode="json")).data == DATA
    assert config.digest() == load_config("demo").digest()
    near = load_config("demo", ["data=here/there"])
    assert near.corpus("sprites-images", "raw").folder == str(tmp_path / "here/there/sprites-images/raw")


@pytest.mark.parametrize("keys", ["AKIAUSER:se%2Fcret@", "AKIAUSER:se/cret@"])
def test_access_keys_are_refused_since_the_configuration_is_saved(keys: str) -> None:
    with pytest.raises(ConfigError, match="give them as AWS_ACCESS_KEY_ID") as caught:
        load_config("demo", [f"data=s3://{keys}bucket/corpora"])
    assert "cret" not in str(caught.value).replace("AWS_SECRET", "")
    assert "AKIAUSER" not in str(caught.value)


def test_what_needs_a_folder_says_so() -> None:
    with pytest.raises(ConfigError, match=r"output=s3://bucket/runs is in a store: give a folder"):
        load_config("demo", ["output=s3://bucket/runs?region=eu-west-1"])
    config = load_config("demo", [f"data={DATA}"])
    with pytest.raises(DataError, match=r"building sprites-images needs a local or shared folder.*--set data=FOLDER"):
        build_corpora(config, ["sprites-images"])
