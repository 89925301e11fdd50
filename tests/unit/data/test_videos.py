"""Frames of videos: made here, and the clips of the assets; what does not decode is refused in one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import videos

av = pytest.importorskip("av", reason="PyAV is not installed (the extra `video`)")
CLIPS = {"sample_demo_1": (243, 640), "sample_demo_3": (146, 640), "QzulzuWr0Zw_20_45": (376, 480)}


def film(path: Path, frames: int, options: dict[str, str] | None = None) -> Path:
    """A video whose frames get brighter one by one."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "mpeg4" if path.suffix != ".webm" else "libvpx-vp9", rate=5, options=options or {}
        )
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            grey = np.full((48, 64, 3), 10 + number * 200 // frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_folder_of_pictures_is_a_video(tmp_path):
    for number in (2, 0, 1):
        Image.new("RGB", (8, 6), (100 * number, 0, 0)).save(tmp_path / f"{number:05}.png")
    found = videos.frames(tmp_path, 2)
    assert found.shape == (2, 6, 8, 3) and found[:, 0, 0, 0].tolist() == [0, 200]
    assert videos.frames(tmp_path, 8).shape[0] == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrunelabError, match="holds no pictures"):
        videos.frames(tmp_path / "empty", 2)


def test_frames_in_a_folder_may_have_16_bits_and_are_of_one_size_and_readable(tmp_path):
    for number in range(3):
        Image.fromarray(np.full((6, 8), 20_000 * number, np.uint16)).save(tmp_path / f"{number}.png")
    assert videos.frames(tmp_path, 3)[:, 0, 0, 0].tolist() == [0, 78, 156], "scaled, where Pillow would cut them off"
    Image.new("L", (8, 7)).save(tmp_path / "3.png")
    with pytest.raises(PrunelabError, match="unlike sizes"):
        videos.frames(tmp_path, 4)
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.raises(PrunelabError, match=r"3\.png cannot be decoded"):
        videos.frames(tmp_path, 4)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "webm"])
def test_frames_lie_evenly_between_the_first_and_the_last(tmp_path, suffix):
    path = film(tmp_path / f"film.{suffix}", 20)
    found = videos.frames(path, 5)
    assert found.shape == (5, 48, 64, 3) and found.dtype == np.uint8
    levels = found.mean((1, 2, 3))
    wanted = [10 + number * 200 // 20 for number in (0, 4, 9, 14, 19)]
    assert np.abs(levels - wanted).max() < 4
    assert videos.length(path) == 20


def test_a_short_video_gives_all_its_frames_and_one_frame_is_the_first(tmp_path):
    path = film(tmp_path / "film.mp4", 6)
    assert len(videos.frames(path, 32)) == 6
    assert videos.places(6, 1) == [0] and len(videos.frames(path, 1)) == 1
    assert videos.places(0, 4) == []


def test_a_container_that_promises_more_than_decodes_is_sampled_over_what_there_is(tmp_path, monkeypatch):
    path = film(tmp_path / "film.mp4", 10)
    whole = videos.frames(path, 4)
    monkeypatch.setattr(videos, "length", lambda path: 40)
    assert np.array_equal(videos.frames(path, 4), whole)


def test_what_does_not_decode_is_refused(tmp_path, monkeypatch):
    text = tmp_path / "notes.mp4"
    text.write_text("no video at all\n" * 50)
    half = tmp_path / "half.mp4"
    half.write_bytes(film(tmp_path / "film.mp4", 30).read_bytes()[:1500])
    empty = tmp_path / "empty.mp4"
    empty.touch()
    for path in (text, half, empty):
        with pytest.raises(PrunelabError, match=rf"{path.name} cannot be decoded; give a video that plays elsewhere"):
            videos.frames(path, 4)
    with pytest.raises(PrunelabError, match="does not exist"):
        videos.frames(tmp_path / "nothing.mp4", 4)
    with pytest.raises(PrunelabError, match="at least 1"):
        videos.frames(half, 0)
    monkeypatch.setattr(videos, "_decode", lambda path, wanted: [])
    with pytest.raises(PrunelabError, match="holds no frame that decodes"):
        videos.frames(tmp_path / "film.mp4", 4)


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(PrunelabError, match="cannot be decoded"):
        videos.frames(path, 4)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    path = film(tmp_path / "film.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PrunelabError, match=r"\[video\]"):
        videos.frames(path, 2)


@pytest.mark.parametrize("name", CLIPS)
def test_real_clips_decode_to_the_frames_at_their_places(name):
    path = Path(os.environ.get("PRUNELAB_ASSETS") or "nowhere") / "video" / f"{name}.mp4"
    if not path.exists():
        pytest.skip("the clips are not at hand (PRUNELAB_ASSETS)")
    total, width = CLIPS[name]
    assert videos.length(path) == total
    found = videos.frames(path, 8)
    assert found.shape == (8, 360, width, 3)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(every) == total
    assert all(np.array_equal(a, every[place]) for a, place in zip(found, videos.places(total, 8), strict=True))
