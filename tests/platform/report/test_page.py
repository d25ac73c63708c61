"""Pages of reports: .venv/bin/python -m pytest tests/platform/report/test_page.py"""

from pathlib import Path

import pytest
from jinja2 import DictLoader, UndefinedError

from domainshuttle.platform.report import page


@pytest.fixture
def a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report as another room would add it: its own content in the shared layout."""
    environment = page._environment().overlay()
    mine = {
        "mine.html": '{% extends "layout.html" %}{% import "parts.html" as parts %}'
        "{% block content %}{{ parts.table(fields, rows) }}{{ parts.picture(png, alt) }}{% endblock %}"
    }
    shared = {name: environment.loader.get_source(environment, name)[0] for name in ("layout.html", "parts.html")}
    environment.loader = DictLoader({**shared, **mine})
    monkeypatch.setattr(page, "_environment", lambda: environment)


def test_a_report_fills_the_layout_and_all_it_fills_in_is_text(a_report: None, tmp_path: Path) -> None:
    values = {"fields": ["<i>a"], "rows": [["</td><script>"], ["\x1b\ud800\u202e&"]], "png": b"\x89PNG", "alt": '"><b>'}
    path = page.write_page(tmp_path / "new" / "page.html", "mine.html", title="{{ 7 * 7 }} <>", **values)
    text = path.read_text()
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert "<title>{{ 7 * 7 }} &lt;&gt;</title>" in text
    assert "<th>&lt;i&gt;a</th>" in text and "<td>&lt;/td&gt;&lt;script&gt;</td>" in text
    assert r"<td>\x1b\ud800\u202e&amp;</td>" in text
    assert 'alt="&#34;&gt;&lt;b&gt;" src="data:image/png;base64,iVBORw=="' in text


def test_a_page_is_there_whole_or_as_it_was(a_report: None, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(UndefinedError, match="rows"):
        page.write_page(path, "mine.html", title="x", fields=[], png=b"", alt="")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
