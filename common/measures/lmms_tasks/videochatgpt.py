"""VideoChatGPT-Bench with answers that a rule scores: correctness, detail and context of its general questions alike,
and of questions that are asked in two ways the answers to both."""

from __future__ import annotations

from lmms_eval.tasks.videochatgpt import utils

from prunelab.common.measures.lmms_tasks import video_answers

seen, question = utils.videochatgpt_doc_to_visual, utils.videochatgpt_doc_to_text
asked_twice = utils.videochatgpt_doc_to_text_consistency
process = video_answers.process
