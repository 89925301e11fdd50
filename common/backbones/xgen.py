"""XGen-7B (arXiv 2309.03450): a Llama whose tokenizer, which comes as code, is GPT-2's with runs of blanks and tabs.

As in CodeGen's vocabulary, whose numbers these are, 31 to 2 blanks and 9 to 2 tabs are one token each. They merge as
every pair does whose text is a token, the one that stands first in the vocabulary first. Marks for filling in and for
dialogue are left out: no prompt here holds one. Written down from what is known of the tokenizer, which could not be
fetched where this was written: it was compared with the algorithm, not with its output.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from prunelab.common.core.errors import PrunelabError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLANK, TAB = "Ġ", "ĉ"  # as byte-level vocabularies write them
RUNS = [BLANK * n for n in range(31, 1, -1)] + [TAB * n for n in range(9, 1, -1)]  # in the order of their ids
END = "<|endoftext|>"


def tokenizer(like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """XGen's tokenizer, of GPT-2's. Raises PrunelabError where that is no byte-pair encoding."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(like.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise PrunelabError("the tokenizer of its like merges no pairs; give GPT-2's")
    vocabulary: dict[str, int] = model["vocab"]
    first = max(vocabulary.values(), default=-1) + 1
    vocabulary |= {run: first + i for i, run in enumerate(RUNS)}
    given = [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    merges = [pair for pair in given if not _is_run("".join(pair))]
    merges += [
        (text[:cut], text[cut:])
        for text in vocabulary
        if _is_run(text)
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    model["merges"] = [list(pair) for pair in sorted(merges, key=lambda pair: vocabulary["".join(pair)])]
    model["ignore_merges"] = True  # what is a token as a whole is one, however it would merge
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=END)


def _is_run(text: str) -> bool:
    return len(text) > 1 and text in (BLANK * len(text), TAB * len(text))
