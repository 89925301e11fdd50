"""Speculative decoding: any `DraftDecoder` on any causal language model of transformers with a dynamic cache.

    out = decoding.generate(method, model, ids, max_new_tokens=128)      # tokens, out.mat, out.steps, out.seconds
    with decoding.applied(method, model) as handle: model.generate(ids)  # handle.report()

`decoding.baselines` decodes the same prompts as transformers does by itself.
"""

from prunelab.common.speculative import baselines
from prunelab.common.speculative.loop import Decoded, DecodingHandle, Session, applied, generate
from prunelab.common.speculative.reader import Reader

__all__ = ["Decoded", "DecodingHandle", "Reader", "Session", "applied", "baselines", "generate"]
