"""Pruning of key-value caches in transformers' decoders.

with applied(H2O(), model, Budget(0.25)) as handle:
    model.generate(**inputs)
print(handle.report())
"""

from common.caches.apply import CacheHandle, CacheReport, applied
from common.caches.bitmap import Bitmap
from common.caches.draft import Draft

__all__ = ["Bitmap", "CacheHandle", "CacheReport", "Draft", "applied"]
