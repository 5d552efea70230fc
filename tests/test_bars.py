"""What bars write into a log."""

import io
import sys

from unclip_jax.common import bars
from unclip_jax.data.records import progress


def test_a_log_has_whole_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bars.bar(0.0, desc="first", total=3, unit="step") as bar:
        for _ in range(3):
            bar.update()
    with bars.bar(desc="second", total=1000, unit="step") as bar:  # over within ten seconds
        for _ in range(1000):
            bar.update()
    text = sys.stderr.getvalue()
    assert "\r" not in text and "\n\n" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines] == ["first"] * (len(lines) - 2) + ["second"] * 2
    assert "3/3" in lines[-3] and "0/1000" in lines[-2] and "1000/1000" in lines[-1]


def test_what_is_soon_over_leaves_nothing_in_a_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress("reading", " files", 5) as bar:
        bar.update(5)
    assert sys.stderr.getvalue() == ""
