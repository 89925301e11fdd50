"""Questions about videos in folders that a reader brings: of Video-ChatGPT's zero-shot evaluation (`test_q.json`,
`test_a.json`), or with a list of questions with options.

Names and pairing follow the evaluation scripts of Video-LLaVA (PKU-YuanGroup/Video-LLaVA, scripts/v1_5/eval) and of
VNBench (joez17/VideoNIAH).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunelab.common.core.errors import PrunelabError

ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".gif")


def rows(folder: Path, videos: str, options: str | None = None) -> list[dict[str, Any]]:
    """Questions with their answers, the n-th of both files, and the path of the video that each is about, which lies in
    the folder's part `videos`. options: the file of questions that have some, each with the letter of the right one,
    its kind, and the sample that it asks of in one of several orders. Raises PrunelabError where a file or video is not
    there."""
    if options is not None:
        return _choices(folder / options, folder / videos)
    questions, answers = _listed(folder / "test_q.json"), _listed(folder / "test_a.json")
    if len(questions) != len(answers):
        raise PrunelabError(f"{folder} holds {len(questions)} questions and {len(answers)} answers; fetch it again")
    here = _films(folder / videos)
    return [
        {
            "question": question["question"],
            "answer": str(answer["answer"]),
            "video": _film(str(question["video_name"]), here, folder / videos),
        }
        for question, answer in zip(questions, answers, strict=True)
    ]


def _choices(path: Path, videos: Path) -> list[dict[str, Any]]:
    here = _films(videos)
    made = []
    for entry in _listed(path):
        name, options = Path(str(entry["video"])).stem, [str(option) for option in entry["options"]]
        if str(entry["gt"]) not in options:
            raise PrunelabError(f"{path}: the answer {entry['gt']} about {name} is none of its options")
        made.append(
            {
                "question": entry["question"],
                "options": options,
                "answer": chr(ord("A") + options.index(str(entry["gt"]))),
                "kind": str(entry["type"]),
                "sample": name,
                "video": _film(name, here, videos),
            }
        )
    return made


def _films(folder: Path) -> dict[str, str]:
    return {path.stem: str(path) for path in sorted(folder.glob("*")) if path.suffix.lower() in ENDINGS}


def _film(name: str, here: dict[str, str], folder: Path) -> str:
    if name not in here:
        raise PrunelabError(f"{folder} holds no video {name} ({', '.join(ENDINGS)})")
    return here[name]


def _listed(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise PrunelabError(
            f"{path} is no list of questions or answers; give the folder as its authors made it"
        ) from None
