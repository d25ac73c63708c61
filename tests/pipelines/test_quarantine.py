"""What is said of too many bad samples. Run: python -m pytest tests/pipelines/test_quarantine.py"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.quarantine import bad_share, require_good


@given(good=st.integers(0, 50), bad=st.integers(0, 50), most=st.sampled_from([0, 0.001, 0.0125, 0.05, 0.5, 1]))
def test_the_share_that_is_accepted_is_said_as_it_is_and_the_advice_holds(good: int, bad: int, most: float) -> None:
    reasons = [f"kind{number % 2}: detail" for number in range(bad)]
    if good and bad_share(bad, good) <= most:
        require_good("here", reasons, good, most, "table", "Repair")
        return
    with pytest.raises(DataError) as refused:
        require_good("here", reasons, good, most, "table", "Repair")
    said = str(refused.value)
    assert f"at most {most * 100:g}% may be" in said
    assert re.search(rf"here: {bad} of {good + bad} samples? (is|are) bad", said)
    assert ("1 of 1 sample is bad" in said) == (good + bad == bad == 1)
    if advice := re.search(r"--most-bad (\S+) ", said):
        require_good("here", reasons, good, float(advice[1]), "table", "Repair")
    assert bool(advice) == bool(good)
