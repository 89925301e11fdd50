"""A table as plain text in cells, and the two forms in which people take it elsewhere: Markdown and LaTeX.

Cells hold text as it is; each form escapes what its readers would take for markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

LONG = 40  # rows of LaTeX that fit a page; beyond, a table breaks over pages


class Notes:
    """Numbered notes below a table, each once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, text: str) -> str:
        """The mark of a note, which is added where it is new."""
        return f"({self._numbers.setdefault(text, len(self._numbers) + 1)})"

    @property
    def texts(self) -> list[str]:
        """The notes in order of their numbers."""
        return list(self._numbers)


@dataclass(frozen=True)
class Grid:
    """Header and rows of equal length; `right` marks columns of numbers."""

    name: str
    head: Sequence[str]  # paragraphs above: caption, note
    header: Sequence[str]
    right: Sequence[bool]
    rows: Sequence[Sequence[str]]
    legend: Sequence[str] = ()
    notes: Sequence[str] = field(default=())


# -- Markdown --------------------------------------------------------------------------------------------------------


def escape_markdown(text: object) -> str:
    """Text inside a Markdown table."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(str(text).split()))


def markdown(grid: Grid) -> str:
    """A page: name, paragraphs, table, legend, notes."""
    rule = "|".join("--:" if right else "---" for right in grid.right)
    table = [_markdown_row(grid.header), f"|{rule}|", *map(_markdown_row, grid.rows)]
    notes = [f"{i}. {escape_markdown(text)}" for i, text in enumerate(grid.notes, 1)]
    parts = [f"# {escape_markdown(grid.name)}", *(escape_markdown(text) for text in grid.head if text)]
    return "\n\n".join([*parts, *("\n".join(block) for block in (table, grid.legend, notes) if block)]) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(escape_markdown, cells))} |"


# -- LaTeX -----------------------------------------------------------------------------------------------------------

_LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "[": "{[}", "]": "{]}", "*": "{*}",  # behind a line's end they would be its arguments
    "|": r"\textbar{}", "`": r"\textasciigrave{}",
    '"': r"\textquotedbl{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "≈": r"$\approx$",
    "≤": r"$\leq$", "≥": r"$\geq$", "→": r"$\to$", "·": r"$\cdot$", "–": "--", "—": "---", "…": r"\dots{}",
    "●": r"$\bullet$", "▲": r"$\blacktriangle$", "◌": r"$\circ$", "◇": r"$\diamond$", "□": r"$\square$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "²": "$^2$", "α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$",
    "λ": r"$\lambda$", "τ": r"$\tau$",
}  # fmt: skip


def escape_latex(text: object) -> str:
    """Text in a cell or caption; white space, and so every line end, becomes one space."""
    escaped = "".join(_LATEX.get(sign, sign) for sign in re.sub("-(?=-)", "-\0", " ".join(str(text).split())))
    return escaped.replace("\0", "{}")  # two hyphens would be set as a dash


def latex(grid: Grid, label: str) -> str:
    """A table in the style of booktabs, to be `\\input`; a long one breaks over pages."""
    spec, row = "".join("r" if right else "l" for right in grid.right), r" \\"
    header = " & ".join(map(escape_latex, grid.header)) + row
    body = [" & ".join(map(escape_latex, cells)) + row for cells in grid.rows]
    caption = r"\caption{" + " ".join(escape_latex(text) for text in (grid.name + ".", *grid.head[:1])) + "}"
    below = [*grid.legend, *(f"({i}) {text}" for i, text in enumerate(grid.notes, 1))]
    small = [r"\footnotesize", *(escape_latex(text) + r"\par" for text in below)]
    inner = [r"\toprule", header, r"\midrule"]
    named = caption + r"\label{tab:" + label + "}"
    if len(body) > LONG:
        lines = [r"\begin{longtable}{" + spec + "}", named + row, *inner, r"\endhead", *body, r"\bottomrule"]
        lines += [r"\end{longtable}", r"\begingroup", *small, r"\endgroup"]
    else:
        lines = [r"\begin{table}", r"\centering", named, r"\begin{tabular}{" + spec + "}", *inner, *body]
        lines += [r"\bottomrule", r"\end{tabular}", r"\par\medskip", r"\raggedright", *small, r"\end{table}"]
    needs = "booktabs, longtable" if len(body) > LONG else "booktabs"
    return "\n".join([f"% needs: {needs}, amssymb, textcomp with T1 fonts; UTF-8", *lines]) + "\n"
