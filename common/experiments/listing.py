"""Which methods there are, with their papers; imports no torch."""

from __future__ import annotations

from fnmatch import fnmatchcase

from prunelab.common.core import index
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import papers, schema


def methods(pattern: str = "*", *, role: str = "", family: str = "", tag: str = "") -> list[index.Entry]:
    """The methods whose name matches a shell pattern, of a role, of a paper's family, or with a taxonomy value (`value`
    or `axis=value`). Raises PrunelabError where a role, family or tag is none that any method has."""
    known = list(index.entries().values())
    about = {entry.slug: paper(entry.slug) for entry in known}
    roles = {entry.role for entry in known}
    families = {paper.family for paper in about.values() if paper}
    tags = {f"{axis}={v}" for p in about.values() if p for axis, values in p.taxonomy.items() for v in values}
    for value, all_values, what in ((role, roles, "role"), (family, families, "family")):
        if value and value not in all_values:
            raise PrunelabError(f"no method matches the {what} '{value}'; there are {', '.join(sorted(all_values))}")
    if tag and not any(_tagged(each, tag) for each in tags):
        raise PrunelabError(f"no method matches the tag '{tag}'; there are {', '.join(sorted(tags))}")
    return [
        entry
        for entry in known
        if fnmatchcase(entry.name, pattern)
        and role in ("", entry.role)
        and (not family or getattr(about[entry.slug], "family", "") == family)
        and (not tag or any(_tagged(t, tag) for t in _tags(about[entry.slug])))
    ]


def paper(slug: str) -> schema.About | None:
    """The head of a folder's paper; None while it has no paper.yaml yet."""
    return papers.about(slug) if (papers.METHODS / slug / "paper.yaml").is_file() else None


def _tags(paper: schema.About | None) -> list[str]:
    return [f"{axis}={v}" for axis, values in paper.taxonomy.items() for v in values] if paper else []


def _tagged(tag: str, wanted: str) -> bool:
    return wanted in (tag, tag.partition("=")[2])
