"""The bounds of transformers and torch: told once, and kept in one place with those of the package and the lock."""

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


@pytest.mark.parametrize(("release", "warned"), [("2.12.1+cu126", False), ("2.15.0", True), ("2.11.0", True)])
def test_torch_is_proven_as_it_is_locked(monkeypatch, release, warned):
    monkeypatch.setattr(versions, "version", lambda library: release)
    versions.warn_outside.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        versions.warn_outside("torch")
    assert [str(w.message).count("pytest tests/unit tests/contract") for w in found] == [1] * warned
    versions.warn_outside.cache_clear()
    lock = (Path(__file__).resolve().parents[3] / "requirements.lock").read_text()
    assert any(f"\ntorch=={minor}." in lock for minor in versions.PROVEN["torch"])


def test_the_package_allows_what_was_proven():
    root = Path(__file__).resolve().parents[3]
    first, last = versions.PROVEN["transformers"]
    major, minor = last.split(".")
    allowed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={first},<{major}.{int(minor) + 1}" in allowed
