"""Pruning of key-value caches in transformers' decoders.

with applied(H2O(), model, Budget(0.25)) as handle:
    model.generate(**inputs)
print(handle.report())
"""

from prunelab.common.kv_cache.apply import CacheHandle, CacheReport, applied
from prunelab.common.kv_cache.bitmap import Bitmap
from prunelab.common.kv_cache.draft import Draft

__all__ = ["Bitmap", "CacheHandle", "CacheReport", "Draft", "applied"]
