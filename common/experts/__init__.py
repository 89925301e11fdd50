"""Pruning at run time of the experts that tokens of a mixture-of-experts model chose.

with applied(method, model, Budget(0.8)) as handle:
    model.generate(**inputs)
print(handle.report())
"""

from prunelab.common.experts.apply import ExpertHandle, ExpertReport, applied

__all__ = ["ExpertHandle", "ExpertReport", "applied"]
