"""The embedded data hold as many samples as the boards ask of them, by default and where they decide."""

from __future__ import annotations

import pytest

from prunelab.common.catalogue import lookup
from prunelab.common.data import texts
from prunelab.common.experiments import plans
from prunelab.common.models import loading


@pytest.mark.parametrize("samples", ["", "full"])
def test_the_embedded_texts_hold_what_boards_read(samples):
    config = lookup.settings({"samples": samples, "scale": "testbed"})
    asked = {}
    for run in plans.of(config).runs.values():
        if run.scale == "testbed" and run.task in ("cache", "perplexity") and not run.needs:
            key = (repr(run.ids["data"]), run.settings["length"])
            known = asked.setdefault(key, [run, 0])
            known[1] = max(known[1], run.settings.get("samples") or 0)
    assert asked
    tokenizers = {}
    for (_, length), (run, most) in asked.items():
        name = repr(run.ids["model"])
        if name not in tokenizers:
            tokenizers[name] = loading.language(run.ids["model"], config)[1]
        held = len(texts.sequences(run.ids["data"], config, tokenizers[name], length))
        assert most <= held, f"{run.method} on {run.names}: {most} sequences of {length}, there are {held}"
