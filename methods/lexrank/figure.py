"""A document as LexRank sees it: its sentence graph and scores, as one HTML fragment without scripts or requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.ranking.sentences import Passage, min_max
from prunelab.common.ranking.text import Background
from prunelab.methods.lexrank.method import LexRank

EXAMPLE = (
    "The council voted on Monday to repair the old swimming pool and keep it open.",
    "The swimming pool was built in 1964, and its roof has needed repair for ten years.",
    "Two thousand people had signed a letter that asked the council to keep the pool open.",
    "Engineers told the council in spring that snow on the old roof could close the pool.",
    "To repair the roof will cost the town one million, the engineers said.",
    "The council will sell a car park and pay half of the cost of the repair.",
    "People who swim there will pay more for a ticket, and the town pays the rest of the cost.",
    "The mayor called the vote of the council a good day for people who learned to swim in the pool.",
    "It rained for most of the afternoon.",
)
_SIZE, _MARGIN = 360, 30  # of the drawing, in its own units
_STYLE = """
.lexrank-graph{margin:0;max-width:44rem;font:inherit;color:inherit;--mark:var(--accent,#2563eb);--rest:#6b7280}
.lexrank-graph svg{display:block;width:100%;max-width:26rem;height:auto;margin:0 auto}
.lexrank-graph line{stroke:currentColor;stroke-linecap:round}
.lexrank-graph circle{fill:var(--rest)}.lexrank-graph .kept circle{fill:var(--mark)}
.lexrank-graph text{fill:#fff;font:600 11px system-ui,sans-serif;text-anchor:middle;dominant-baseline:central}
.lexrank-graph ol{list-style:none;margin:.75rem 0 0;padding:0}
.lexrank-graph li{display:grid;grid-template-columns:1.6rem 1fr 3.2rem;gap:.1rem .4rem}
.lexrank-graph li{padding:.35rem 0;line-height:1.35}
.lexrank-graph li>*{min-width:0;overflow-wrap:anywhere}
.lexrank-graph b,.lexrank-graph output{font-variant-numeric:tabular-nums}.lexrank-graph output{text-align:right}
.lexrank-graph i{grid-column:2/-1;height:.3rem;border-radius:.15rem;background:var(--rest)}
.lexrank-graph .kept i{background:var(--mark)}.lexrank-graph .kept span{font-weight:600}
.lexrank-graph figcaption{font-size:.9em;margin-top:.5rem}
""".replace("\n", "")


def graph(
    sentences: Sequence[str] = EXAMPLE,
    method: LexRank | None = None,
    keep: int = 3,
    background: Background | None = None,
) -> str:
    """The document's sentences on a circle in reading order, as large as their scores; lines are cosines above the
    threshold, the thicker the more alike; below, the sentences with their scores relative to the best.

    The `keep` sentences of the summary are marked by colour and in bold. Suits up to about 40 sentences.
    """
    if len(sentences) > 40:
        raise PrunelabError(f"{len(sentences)} sentences are too many for one figure; pass at most 40")
    method = method or LexRank()
    passage = Passage(tuple(sentences), background=background)
    scores = method.rank(passage)
    kept = set(method.plan(passage, Budget(keep, "count")).reduce.index[0].tolist())  # type: ignore[union-attr]
    relative = (scores / scores.max().clamp_min(1e-300)).tolist()
    sizes = [8 + 12 * s for s in min_max(scores).tolist()]
    cosines = method.similarity(passage).dense()

    number, centre = len(sentences), _SIZE / 2
    angles = [2 * math.pi * i / number - math.pi / 2 for i in range(number)]
    places = [(centre + (centre - _MARGIN) * math.cos(a), centre + (centre - _MARGIN) * math.sin(a)) for a in angles]
    lines, edges = [], 0
    for i in range(number):
        for j in range(i):
            if cosines[i, j] > method.threshold:
                (x1, y1), (x2, y2), c = places[i], places[j], float(cosines[i, j])
                edges += 1
                lines.append(
                    f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="{1 + 5 * c:.1f}"'
                    f' stroke-opacity="{min(0.2 + c, 0.9):.2f}">'
                    f"<title>{j + 1} and {i + 1}: cosine {c:.2f}</title></line>"
                )
    nodes, rows = [], []
    for i, (sentence, (x, y)) in enumerate(zip(sentences, places, strict=True)):
        mark = ' class="kept"' if i in kept else ""
        nodes.append(
            f'<g{mark}><title>{escape(sentence)}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="{sizes[i]:.1f}"/>'
            f'<text x="{x:.1f}" y="{y:.1f}">{i + 1}</text></g>'
        )
        rows.append(
            f"<li{mark}><b>{i + 1}</b><span>{escape(sentence)}</span><output>{relative[i]:.2f}</output>"
            f'<i style="width:{100 * relative[i]:.1f}%"></i></li>'
        )
    label = f"Graph of {number} sentences with {edges} links"
    return (
        f'<figure class="lexrank-graph"><style>{_STYLE}</style>'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" role="img" aria-label="{label}">{"".join(lines)}{"".join(nodes)}</svg>'
        f"<ol>{''.join(rows)}</ol><figcaption>Circles are sentences in reading order, larger with a higher score; "
        f"lines join sentences whose idf-weighted cosine is above {method.threshold:g}. The {len(kept)} marked "
        "sentences make the summary; scores are relative to the best.</figcaption></figure>"
    )


def example() -> dict[str, dict[str, str]]:
    """The figure of the example text, as a record keeps it."""
    return {"graph": {"html": graph()}}
