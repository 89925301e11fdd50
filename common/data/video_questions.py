"""Questions about videos in the folders of Video-ChatGPT's zero-shot evaluation: `test_q.json`, `test_a.json`, videos.

Names and pairing follow the evaluation scripts of Video-LLaVA (PKU-YuanGroup/Video-LLaVA, scripts/v1_5/eval).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunelab.common.core.errors import PrunelabError

ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".gif")


def rows(folder: Path, videos: str) -> list[dict[str, str]]:
    """Questions with their answers, the n-th of both files, and the path of the video that each is about, which lies in
    the folder's part `videos`. Raises PrunelabError where a file or video is not there."""
    questions, answers = _listed(folder / "test_q.json"), _listed(folder / "test_a.json")
    if len(questions) != len(answers):
        raise PrunelabError(f"{folder} holds {len(questions)} questions and {len(answers)} answers; fetch it again")
    here = {path.stem: path for path in sorted((folder / videos).glob("*")) if path.suffix.lower() in ENDINGS}
    made = []
    for question, answer in zip(questions, answers, strict=True):
        name = str(question["video_name"])
        if name not in here:
            raise PrunelabError(f"{folder / videos} holds no video {name} ({', '.join(ENDINGS)})")
        made.append({"question": question["question"], "answer": str(answer["answer"]), "video": str(here[name])})
    return made


def _listed(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise PrunelabError(
            f"{path} is no list of questions or answers; give the folder as its authors made it"
        ) from None
