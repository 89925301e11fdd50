"""What runs where: the table of methods and models says yes exactly where a method runs."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.common.tokens.adapters import adapter_for
from tests.contract.families import SERVICES
from tests.contract.support import pruners, table, verdict
from tests.contract.vlms import VLMS, images, prompt, typed, vlm


@pytest.mark.parametrize("family", VLMS)
def test_the_verdict_is_what_happens(family):
    model = vlm(family)
    given = typed(model, prompt(family, images(family, 1)))
    for method in pruners():
        said = verdict(method, family)
        if said == "yes":
            parts = method.build(adapter_for(model).info)
            with torch.no_grad(), apply(method, model, 0.5, services=SERVICES, parts=parts) as handle:
                left = model(**given).logits.shape[1]
                if left == given["input_ids"].shape[1] and not (method.eases or "saving" in method.exempt):
                    report = handle.report()  # tokens that only pass layers by are there again behind them
                    assert report.macs < report.dense_macs, method
        else:
            with pytest.raises(PrunelabError) as refused, apply(method, model, 0.5, services=SERVICES):
                pass
            assert str(refused.value) == said


def test_the_table_has_every_method_and_model():
    text = table()
    assert all(family in text.splitlines()[0] for family in VLMS)
    assert len(text.splitlines()) == 2 + len(pruners())
    rows = {line.split("`")[1].split("(")[0]: line.split("|")[2:-1] for line in text.splitlines()[2:]}
    assert [cell.strip() for cell in rows["FastV"]] == ["yes"] * len(VLMS)
    assert [cell.strip() for cell in rows["DivPrune"]] == ["yes"] * len(VLMS)
    assert [cell.strip() == "yes" for cell in rows["FasterVLM"]] == [True, True, False, False, False]
