"""ActivityNet-QA with answers that a rule scores."""

from __future__ import annotations

from lmms_eval.tasks.activitynetqa import utils

from prunelab.common.measures.lmms_tasks import video_answers

seen, question = utils.activitynetqa_doc_to_visual, utils.activitynetqa_doc_to_text
process = video_answers.process
