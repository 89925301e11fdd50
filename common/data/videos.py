"""Frames of a video file, sampled uniformly over its length (PyAV, the extra `video`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data.images import rgb

UNREADABLE = "cannot be decoded; give a video that plays elsewhere (MP4, WebM, MKV, AVI, GIF)"


def frames(path: Path, count: int) -> NDArray[np.uint8]:
    """`count` frames [F, H, W, 3] in RGB at even distances, the first and the last of the video among them; all of
    them (F < count) of a shorter one, as lmms-eval's PyAV reader samples; scripts of LLaVA-NeXT repeat frames there.

    A folder of pictures is a video, too, frame by frame in the order of their names (MVBench has some).

    Raises PrunelabError for a count below 1, a file that is not there, does not decode or holds no frame.
    """
    if count < 1:
        raise PrunelabError(f"{count} frames of a video are asked for; ask for at least 1")
    if path.is_dir():
        return _pictures(path, count)
    if not path.is_file():
        raise PrunelabError(f"the video {path} does not exist")
    av = library()
    try:
        total = length(path)
        chosen = _decode(path, places(total, count))
        if len(chosen) < min(total, count):  # packets that decode to nothing: count what does
            total = len(_decode(path, None))
            chosen = _decode(path, places(total, count))
    except (av.error.FFmpegError, IndexError, ValueError) as error:  # IndexError: no video stream
        raise PrunelabError(f"the video {path} {UNREADABLE}") from error
    if not chosen:
        raise PrunelabError(f"the video {path} holds no frame that decodes; give one that plays elsewhere")
    return np.stack(chosen)


def _pictures(folder: Path, count: int) -> NDArray[np.uint8]:
    """Of the pictures of a folder the frames that are taken."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise PrunelabError(
            f"the folder {folder} holds no pictures; give one with the frames of a video as JPEG or PNG"
        )
    chosen: list[NDArray[np.uint8]] = []
    for path in (paths[place] for place in places(len(paths), count)):
        try:
            with Image.open(path) as picture:
                chosen.append(np.asarray(rgb(picture)))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
            raise PrunelabError(f"the frame {path} cannot be decoded; give one that opens elsewhere") from None
        if chosen[-1].shape != chosen[0].shape:
            raise PrunelabError(f"the frames of {folder} are of unlike sizes; bring them to one")
    return np.stack(chosen)


def places(total: int, count: int) -> list[int]:
    """Numbers of the frames that are taken of `total`: `count` at even distances, or all where there are fewer."""
    return [int(place) for place in np.linspace(0, total - 1, min(total, count), dtype=int)] if total else []


def length(path: Path) -> int:
    """Frames that the file holds, counted by its packets: a header's own count may be absent or wrong."""
    with library().open(str(path)) as container:
        stream = container.streams.video[0]
        return sum(packet.size > 0 for packet in container.demux(stream))


def seconds(path: Path) -> float:
    """How long the video is. Raises PrunelabError where it does not decode or does not say."""
    av = library()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if container.duration:
                return float(container.duration / av.time_base)
            if stream.average_rate:
                return length(path) / float(stream.average_rate)
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise PrunelabError(f"the video {path} {UNREADABLE}") from error
    raise PrunelabError(f"the video {path} says neither how long it is nor how many frames a second has")


def library() -> Any:
    """PyAV."""
    try:
        import av
    except ImportError:
        raise PrunelabError('videos need PyAV; install it with pip install -e ".[video]"') from None
    return av


def _decode(path: Path, wanted: list[int] | None) -> list[Any]:
    """The frames of these numbers as arrays [H, W, 3]; without numbers one empty place for each that decodes."""
    with library().open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if wanted is None:
            return [None for _ in container.decode(stream)]
        numbers, result = set(wanted), []
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                result.append(frame.to_ndarray(format="rgb24"))
            if wanted and number == wanted[-1]:
                break
        return result
