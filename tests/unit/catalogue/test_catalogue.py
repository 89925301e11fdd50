"""The catalogues: every entry is sound and says what it takes, and a broken one is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from prunelab.common.catalogue import assets, hub, lookup, schema
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import prefetch

SETTINGS = lookup.settings({})
HERE = os.environ.get("PRUNELAB_ASSETS", "")
needs_assets = pytest.mark.skipif(not HERE, reason="needs PRUNELAB_ASSETS, a folder of small real checkpoints and data")


def published():
    """(name, paper entry) of every model and data set that has one."""
    for names in (lookup.models(), lookup.datasets()):
        yield from ((name, entry["paper"]) for name, entry in names.items() if "paper" in entry)


def test_every_published_entry_says_what_it_takes():
    for name, entry in published():
        assert entry["licence"], name
        if "hub" in entry:
            assert entry.get("gb") or name in lookup.datasets(), f"{name}: how many GB?"
            assert "revision" not in entry, f"{name}: revisions belong into the lock"
        else:
            assert entry.get("needs") or (entry.get("file") and entry.get("source")), name


def test_names_between_entries_exist():
    from prunelab.common import testbeds

    models = lookup.models()
    for name, entry in models.items():
        if "base" in entry:
            assert entry["base"] in models, name
        for key, folder in (("adapter", "common/tokens/adapters"), ("weight_adapter", "common/weights/adapters")):
            if key in entry:
                assert (lookup.ROOT / folder / f"{entry[key]}.py").exists(), name
        if "testbed" in entry:
            assert entry["testbed"] in testbeds.testbeds(), name
    for name, entry in lookup.datasets().items():
        setting = entry.get("paper", {}).get("setting")
        assert setting is None or setting in SETTINGS, name


def test_the_lock_file_is_sound_and_names_entries_alone():
    known = {entry["hub"] for _, entry in published() if "hub" in entry}
    locked = hub.lock()
    assert {*locked.models, *locked.datasets} <= known


BROKEN = [
    ("models.yaml", {"m": {"colour": "red"}}, r"m.colour: Extra"),
    ("models.yaml", {"m": {"paper": {"hub": "a/b"}}}, r"m.paper.licence"),
    ("models.yaml", {"m": {"paper": {"licence": "mit"}}}, r"give `hub`, or `file` with its `source`"),
    ("models.yaml", {"m": {"paper": {"hub": "a/b", "licence": "mit", "revision": "main"}}}, r"m.paper.revision"),
    ("models.yaml", {"m": {"paper": {"hub": "a/b", "licence": "mit", "gb": -1.0}}}, r"m.paper.gb"),
    ("models.yaml", {"m": {"paper": {"hub": "a/b", "licence": "mit", "trust_remote_code": True}}}, r"Extra inputs"),
    ("models.yaml", {"m": {"architecture": {"library": "os", "name": "system"}}}, r"m.architecture.library"),
    ("models.yaml", {"m": {"architecture": {"library": "timm", "name": "a b"}}}, r"m.architecture.name"),
    ("models.yaml", ["m"], r"top level"),
    ("datasets.yaml", {"d": {"testbed": {}}}, r"d.testbed.loader"),
    ("datasets.yaml", {"d": {"paper": {"loader": "l", "licence": "mit", "setting": "d"}}}, r"needs `needs`"),
    ("datasets.yaml", {"d": {"assets": {"loader": "l", "folder": "f"}}}, r"names no licence"),
    ("datasets.yaml", {"d": {"elsewhere": {"loader": "l"}}}, r"d.elsewhere"),
]


@pytest.mark.parametrize(("file", "content", "message"), BROKEN)
def test_a_broken_catalogue_is_named(file, content, message):
    with pytest.raises(PrunelabError, match=message) as told:
        schema.check(file, content)
    assert len(str(told.value).splitlines()) == 1 and str(told.value).startswith(f"configs/{file}, ")


def test_who_changes_an_architecture_changes_a_copy():
    """Anchors of the file make models share parts."""
    before = lookup.architecture("llava_1_5_7b")
    lookup.architecture("instructblip_vicuna_7b")["arguments"]["text_config"]["num_hidden_layers"] = 1
    lookup.architecture("llava_1_5_7b")["arguments"]["text_config"]["num_hidden_layers"] = 1
    assert lookup.architecture("llava_1_5_7b") == before


def test_a_catalogue_that_is_no_yaml_is_named(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "models.yaml").write_text("a: [")
    monkeypatch.setattr(lookup, "ROOT", tmp_path)
    lookup._read.cache_clear()
    try:
        with pytest.raises(PrunelabError, match=r"configs/models.yaml is not valid YAML"):
            lookup.models()
    finally:
        lookup._read.cache_clear()


def test_what_only_describes_an_entry_is_not_its_identity(monkeypatch):
    before = lookup.resolve("model", "llama_7b", "paper", SETTINGS)
    monkeypatch.setitem(lookup.models()["llama_7b"]["paper"], "gb", 99.0)
    monkeypatch.setitem(lookup.datasets()["wikitext2"]["paper"], "needs", "patience")
    assert lookup.resolve("model", "llama_7b", "paper", SETTINGS) == before


# -- assets ------------------------------------------------------------------------------------------------------------


def test_an_asset_is_read_by_tables_or_by_tests_and_never_by_neither():
    read, reasons = assets.uses(), assets.tests_only()
    assert not set(read) & set(reasons)
    assert all(len(reason) > 10 for reason in reasons.values())


@needs_assets
def test_every_entry_of_the_assets_has_a_use():
    listed = {entry["name"] for entry in assets.listed(Path(HERE))}
    assert listed == {*assets.uses(), *assets.tests_only()}


@needs_assets
def test_real_assets_are_whole(capsys):
    assets.verify({**SETTINGS, "assets": HERE}, Console(width=200))
    out = capsys.readouterr().out
    assert out.count("checked") >= 20 and "not in the catalogue" not in out


@pytest.fixture
def folder(tmp_path):
    """An assets folder of one entry with two files."""
    import hashlib

    (tmp_path / "a").mkdir()
    files = []
    for name, content in (("a/one.txt", b"one"), ("a/two.txt", b"two")):
        (tmp_path / name).write_bytes(content)
        files.append({"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    sums = "".join(f"{file['sha256']}  {file['path']}\n" for file in files)
    entry = {"name": "a", "sha256": hashlib.sha256(sums.encode()).hexdigest(), "files": files, "licence": "mit"}
    (tmp_path / "catalogue.json").write_text(json.dumps([entry]))
    return tmp_path


def test_damaged_assets_are_named(folder):
    settings, console = {**SETTINGS, "assets": str(folder)}, Console(quiet=True)
    assets.verify(settings, console)
    (folder / "a" / "two.txt").write_bytes(b"twa")
    with pytest.raises(PrunelabError, match=r"a: a/two.txt is damaged"):
        assets.verify(settings, console)
    (folder / "a" / "two.txt").unlink()
    with pytest.raises(PrunelabError, match=r"a: lacks a/two.txt"):
        assets.verify(settings, console)
    (folder / "catalogue.json").write_text("[{}]")
    with pytest.raises(PrunelabError, match="is damaged"):
        assets.verify(settings, console)
    with pytest.raises(PrunelabError, match="nothing to download for the assets scale"):
        assets.verify({**SETTINGS, "assets": ""}, console)


def test_files_that_are_right_one_for_one_but_not_together_are_told(folder):
    entries_ = json.loads((folder / "catalogue.json").read_text())
    entries_[0]["files"].pop()
    (folder / "catalogue.json").write_text(json.dumps(entries_))
    with pytest.raises(PrunelabError, match="not those of the whole"):
        assets.verify({**SETTINGS, "assets": str(folder)}, Console(quiet=True))


def test_sizes_are_the_hubs_once_it_told_them(monkeypatch):
    item = prefetch.Item("model", "llama_7b", lookup.model("llama_7b")["paper"], ())
    assert item.gigabytes == 13.5 and not item.files
    files = {"model.safetensors": hub.File(size=2_000_000_000), "code.py": hub.File(size=9_000_000_000)}
    locked = hub.Lock(models={"huggyllama/llama-7b": hub.Locked(revision="0" * 40, files=files, whole=True)})
    monkeypatch.setattr(hub, "lock", lambda: locked)
    assert item.gigabytes == 2.0 and set(item.files) == {"model.safetensors"}
