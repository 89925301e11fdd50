"""Video-MME's short, medium and long videos apart, asked as all together: the library has its long ones apart, and
shows their subtitles."""

from __future__ import annotations

from functools import partial

from lmms_eval.tasks.videomme import utils

asked_with_subtitles = utils.videomme_doc_to_text_subtitle
seen, question, process = utils.videomme_doc_to_visual, utils.videomme_doc_to_text, utils.videomme_process_results
score = utils.videomme_aggregate_results
short, medium, long = (partial(utils.videmme_process_docs_base, type=length) for length in ("short", "medium", "long"))
