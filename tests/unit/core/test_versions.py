"""The bounds of transformers: told once, and kept in one place with those of the package."""

from __future__ import annotations

import tomllib
import warnings
from pathlib import Path

import pytest

from prunelab.common.core import versions


@pytest.mark.parametrize(
    ("release", "warned"), [("5.19.3", True), ("5.20.0", False), ("5.24.1", False), ("5.25.0", True)]
)
def test_releases_outside_the_proven_ones_get_one_line_once(monkeypatch, release, warned):
    monkeypatch.setattr(versions, "version", lambda library: release)
    versions.warn_outside.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        versions.warn_outside("transformers")
        versions.warn_outside("transformers")
    assert len(told) == warned
    for warning in told:
        assert f"transformers {release} is outside 5.20 to 5.24" in str(warning.message)
        assert "\n" not in str(warning.message)
    versions.warn_outside.cache_clear()


def test_the_package_allows_what_was_proven():
    root = Path(__file__).resolve().parents[3]
    first, last = versions.PROVEN["transformers"]
    major, minor = last.split(".")
    allowed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={first},<{major}.{int(minor) + 1}" in allowed
