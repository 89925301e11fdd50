"""The assets folder: whether its files are as listed, and what each entry is for. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import file_digest, inside


def uses() -> dict[str, list[str]]:
    """The models and data sets of the catalogues that are read from an entry of the assets, by its name."""
    results: dict[str, list[str]] = {}
    for name, entry in lookup.models().items():
        if "assets" in entry:
            where = entry["assets"]
            results.setdefault(where if isinstance(where, str) else where["folder"], []).append(name)
    for name, entry in lookup.datasets().items():
        for at in ("assets", "real"):
            if "folder" in entry.get(at, {}):
                results.setdefault(entry[at].get("listed", entry[at]["folder"]), []).append(name)
    return results


def tests_only() -> dict[str, str]:
    """Entries that no table reads, with the reason."""
    content: dict[str, str] = yaml.safe_load((lookup.ROOT / "configs" / "assets.yaml").read_text(encoding="utf8"))
    return content


def listed(folder: Path) -> list[dict[str, Any]]:
    """The entries of the folder's catalogue. Raises PrunelabError where it is absent or not what it should be."""
    path = folder / "catalogue.json"
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf8"))
        entries = [entry for entry in entries if entry["name"] and "sha256" in entry]  # others come with a package
        for entry in entries:
            str(entry["name"]), str(entry["sha256"]), [(f["path"], f["bytes"], f["sha256"]) for f in entry["files"]]
    except OSError:
        raise PrunelabError(f"{folder} holds no catalogue.json; give --config assets=DIR an assets folder") from None
    except (ValueError, KeyError, TypeError):
        raise PrunelabError(f"{path} is damaged; fetch the assets folder again") from None
    return entries


def fault(folder: Path, entry: Mapping[str, Any]) -> str:
    """What is wrong with the files of an entry, in words; '' where all are as listed, one for one and together."""
    for file in entry["files"]:
        path = inside(folder, file["path"])
        if not path.is_file():
            return f"lacks {file['path']}"
        if path.stat().st_size != file["bytes"] or file_digest(path) != file["sha256"]:
            return f"{file['path']} is damaged"
    sums = "".join(f"{f['sha256']}  {f['path']}\n" for f in sorted(entry["files"], key=lambda f: f["path"]))
    return (
        ""
        if hashlib.sha256(sums.encode()).hexdigest() == entry["sha256"]
        else "its checksums are not those of the whole"
    )


def verify(config: Mapping[str, Any], console: Console) -> None:
    """Show every entry of the assets folder, checked. Raises PrunelabError with all that is missing or damaged."""
    if not config["assets"]:
        raise PrunelabError(
            "there is nothing to download for the assets scale; give --config assets=DIR to check a folder"
        )
    folder, read, reasons = Path(config["assets"]), uses(), tests_only()
    table, faults = Table("entry", "MB", "licence", "state", "read by"), []
    for entry in listed(folder):
        name, wrong = entry["name"], fault(folder, entry)
        if wrong:
            faults.append(f"{name}: {wrong}")
        used = ", ".join(read.get(name, [])) or f"tests only: {reasons.get(name, 'not in the catalogue')}"
        table.add_row(name, f"{entry.get('bytes', 0) / 1e6:.2f}", entry.get("licence", ""), wrong or "checked", used)
    console.print(table)
    if faults:
        raise PrunelabError(f"{folder} is not whole: {'; '.join(faults)}; fetch these entries again")
