"""The catalogue of models and data sets: what a name in a paper's tables means at each scale. Imports no torch."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from prunelab.common.catalogue import hub, packaged, schema
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT, read_yaml
from prunelab.common.core.registry import choose

SCALES = ("smoke", "testbed", "real", "assets", "paper")
ELSEWHERE = ("real", "paper")  # scales whose runs are known by name where they cannot be made
DESCRIPTIVE = ("needs", "gb", "gated", "gpus", "size", "settings")  # keys of an entry that say nothing of its content
KEYS = ("papers", "scale", "results", "samples", "batch", "gpu", "programs")  # settings that are no folders


@cache
def _read(name: str) -> dict[str, Any]:
    path = ROOT / "configs" / name
    try:
        content = read_yaml(path.read_text(encoding="utf8"))
    except yaml.YAMLError as error:
        raise PrunelabError(f"configs/{name} is not valid YAML: {str(error).splitlines()[0]}") from None
    return content if name == "default.yaml" else dict(schema.check(name, content))


def pairs(items: Iterable[str]) -> dict[str, Any]:
    """`key=value` arguments as a mapping; values are read as YAML."""
    out: dict[str, Any] = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign:
            raise PrunelabError(f"write '{item}' as key=value")
        try:
            out[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise PrunelabError(f"the value of '{item}' is not valid YAML; quote it") from None
    return out


def settings(overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """configs/default.yaml, then PRUNELAB_<KEY> variables, then overrides; empty values do not override."""
    values = dict(_read("default.yaml"))
    for key in values:
        values[key] = os.environ.get(f"PRUNELAB_{key.upper()}") or values[key]
    for key, value in (overrides or {}).items():
        if key not in values:
            raise PrunelabError(f"there is no setting '{key}'; known: {', '.join(values)}")
        values[key] = value if value not in (None, "") else values[key]
    if values["scale"] not in SCALES:
        raise PrunelabError(f"there is no scale '{values['scale']}'; use one of {', '.join(SCALES)}")
    if values["samples"] not in ("", "full"):
        raise PrunelabError(f"there is no '{values['samples']}' of samples; write samples=full, or leave it out")
    for key in values:
        if key not in KEYS and values[key] and not Path(values[key]).is_dir():
            raise PrunelabError(
                f"the {key} folder {values[key]} does not exist; give --config {key}=DIR an existing one"
            )
    return values


def _entry(file: str, kind: str, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = choose(_read(file), name, kind)
    return entry


def model(name: str) -> dict[str, Any]:
    """A model's catalogue entry."""
    return _entry("models.yaml", "model", name)


def architecture(name: str) -> dict[str, Any]:
    """A copy of the architecture of a model, which costs are counted on."""
    entry = model(name)
    if "architecture" not in entry:
        raise PrunelabError(f"the model {name} has no architecture in configs/models.yaml; give it one to count on")
    return copy.deepcopy(dict(entry["architecture"]))


def dataset(name: str) -> dict[str, Any]:
    """A data set's catalogue entry."""
    return _entry("datasets.yaml", "data set", name)


def models() -> dict[str, Any]:
    """Every model's entry by name."""
    return _read("models.yaml")


def datasets() -> dict[str, Any]:
    """Every data set's entry by name."""
    return _read("datasets.yaml")


def of_tasks(tasks: Iterable[str]) -> list[str]:
    """The data sets that tasks of lm-evaluation-harness read: those whose `tasks` name them, or how they begin, and
    those of their `group`."""
    asked = list(tasks)
    wanted = [f"{task}_" for task in asked]
    return [
        name
        for name, entry in datasets().items()
        for begins in [tuple(f"{task}_" for task in entry.get("paper", {}).get("tasks", ()))]
        if begins and (any(task.startswith(begins) for task in wanted) or entry["paper"].get("group") in asked)
    ]


def _data_missing(entry: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if "setting" in entry and not config.get(entry["setting"]):
        return str(entry["needs"])
    if "folder" in entry and entry["loader"] == "lm_eval" and not _harness():
        return 'lm-evaluation-harness (pip install -e ".[evaluation]")'
    if "folder" in entry and not (Path(config["assets"] or "/nonexistent") / entry["folder"]).exists():
        return f"the assets folder with {entry['folder']} (--config assets=DIR)"
    return _hub_missing(entry, "dataset", config) if "hub" in entry else ""


def _harness() -> bool:
    """Whether lm-evaluation-harness is installed."""
    return importlib.util.find_spec("lm_eval") is not None


def _hub_missing(entry: Mapping[str, Any], kind: hub.Kind, config: Mapping[str, Any]) -> str:
    lacking = hub.missing(entry, kind, config)
    return f"{entry['needs']} and {lacking}" if lacking and "needs" in entry else lacking


def _model_missing(entry: Any, scale: str, config: Mapping[str, Any]) -> str:
    if scale == "testbed" and not _training(entry).exists():
        return f"the trained weights of the testbed {entry} (python -m prunelab train {entry})"
    if scale == "real":
        return packaged.missing(entry)
    if scale != "paper":
        return ""
    if "file" in entry and "hub" not in entry:
        if not (Path(config["checkpoints"] or "/nonexistent") / entry["file"]).exists():
            return f"{entry['file']} from {entry['source']} in the checkpoints folder (--config checkpoints=DIR)"
        return ""
    return _hub_missing(entry, "model", config)


@dataclass(frozen=True)
class Resolved:
    """A name of the catalogue at a scale. listed: whether there is an entry. identity: what names its content exactly,
    which goes into a run's address. missing: what it takes to have it here, in words. gpus: how many hold it."""

    identity: Mapping[str, Any]
    missing: str = ""
    listed: bool = True
    gpus: int = 1


_KNOWN: ContextVar[dict[tuple[str, str, str], Resolved] | None] = ContextVar("_KNOWN", default=None)


@contextmanager
def unchanging() -> Iterator[None]:
    """Inside the block each name is resolved once a scale: all calls have one configuration, and what is here stays."""
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def resolve(kind: hub.Kind, name: str, scale: str, config: Mapping[str, Any]) -> Resolved:
    """What a model or data set is at a scale, and whether it is here."""
    known = _KNOWN.get()
    if known is None:
        return _resolve(kind, name, scale, config)
    if (kind, name, scale) not in known:
        known[kind, name, scale] = _resolve(kind, name, scale, config)
    return known[kind, name, scale]


def _resolve(kind: hub.Kind, name: str, scale: str, config: Mapping[str, Any]) -> Resolved:
    scale = "testbed" if scale == "smoke" else scale
    entry = (model(name) if kind == "model" else dataset(name)).get(scale)
    if entry is None:
        return Resolved({}, f"{name}, which has no entry at {scale} scale", listed=False)
    missing = _model_missing(entry, scale, config) if kind == "model" else _data_missing(entry, config)
    if missing and scale not in ELSEWHERE:
        return Resolved({}, missing)
    result = _model(name, entry, scale, config) if kind == "model" else _data(entry, scale, config)
    return Resolved(result, missing, gpus=entry.get("gpus", 1) if scale == "paper" else 1)


def _model(name: str, entry: Any, scale: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if scale == "testbed":
        return {"testbed": entry, "sha256": _testbed_hash(str(entry))}
    if scale == "real":
        return {key: entry[key] for key in ("package", "file", "sha256")}
    if scale == "paper":
        result = _content(entry, "model", config)
    else:
        result = {"assets": entry} if isinstance(entry, str) else {"assets": entry["folder"], **entry}
        result.pop("folder", None)
        result["sha256"] = _assets_hash(config, result["assets"])
    if "file" in result and "architecture" in model(name):
        result["architecture"] = model(name)["architecture"]
    return result


def _data(entry: Mapping[str, Any], scale: str, config: Mapping[str, Any]) -> dict[str, Any]:
    result = _content(entry, "dataset", config)
    if "packages" in result:  # data cut from installed packages change with their versions
        result["versions"] = {package: _version(package) for package in result["packages"]}
    if "folder" in result:  # folders that several data sets share name theirs as `listed`
        result["sha256"] = _assets_hash(config, result.pop("listed", result["folder"]))
    return result


def surroundings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What lies outside this project and decides what is here or what it is: repositories of the hub, files of the
    user's folders, versions of the packages that data are cut from, and whether a package is there that asks them."""
    entries = [entry for name in datasets() for entry in dataset(name).values()]
    packages = {model(name)["real"]["package"] for name in models() if "real" in model(name)}
    return {
        "hub": hub.surroundings(config),
        "folders": {key: hub.listing(Path(config[key])) for key in ("assets", "checkpoints") if config[key]},
        "harness": _harness(),
        "versions": {package: _version(package) for entry in entries for package in entry.get("packages", ())}
        | {package: packaged.version(package) for package in sorted(packages)},
    }


def moved(ids: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether weights or data that an identity names by their content are others today, or are not here."""
    if "testbed" in ids:
        return not _training(ids["testbed"]).exists() or _testbed_hash(str(ids["testbed"])) != ids.get("sha256")
    if "package" in ids:
        return bool(packaged.missing(ids))
    if "assets" in ids or "folder" in ids:
        if not config["assets"]:
            raise PrunelabError("this run reads an assets folder; give --config assets=DIR")
        return ids.get("sha256") not in {*_assets_catalogue(str(config["assets"])).values(), "unlisted"}
    if "local" in ids:
        kind: hub.Kind = "dataset" if "loader" in ids else "model"
        return hub.identity(ids, kind, config) != {"local": ids["local"]}
    versions = ids.get("versions", {})
    return any(_version(package) != version for package, version in versions.items())


_version = cache(importlib.metadata.version)  # planning asks thousands of times, and each time a file is parsed


def _content(entry: Mapping[str, Any], kind: hub.Kind, config: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry says of the content itself, and not of how to come by it."""
    kept = {key: value for key, value in entry.items() if key not in DESCRIPTIVE}
    return {**kept, **hub.identity(entry, kind, config)} if "hub" in kept else kept


def _training(testbed: str) -> Path:
    return ROOT / "common" / "testbeds" / "weights" / testbed / "training.json"


@cache
def _testbed_hash(name: str) -> str:
    path = _training(name)
    if not path.exists():
        raise PrunelabError(f"the testbed {name} has no trained weights; run `python -m prunelab train {name}`")
    try:
        return str(json.loads(path.read_text())["sha256"])
    except (ValueError, KeyError, TypeError):
        raise PrunelabError(f"{path} is damaged; restore it or run `python -m prunelab train {name}`") from None


def _assets_hash(config: Mapping[str, Any], entry: str) -> str:
    return _assets_catalogue(str(config["assets"])).get(entry, "unlisted")


@cache
def _assets_catalogue(folder: str) -> dict[str, str]:
    path = Path(folder) / "catalogue.json"
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf8"))
        # An entry without a checksum tells of what a package brings; its files do not lie in the folder.
        return {str(entry["name"]): str(entry["sha256"]) for entry in entries if entry["name"] and "sha256" in entry}
    except (ValueError, KeyError, TypeError):
        raise PrunelabError(f"{path} is damaged; fetch the assets folder again") from None
