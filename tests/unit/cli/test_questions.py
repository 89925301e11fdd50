"""`python -m prunelab apply` on one's own images and videos, where a language model is asked about them."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from prunelab.common import testbeds
from prunelab.common.cli import questions as asking
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import questions
from prunelab.common.drawing import sheets
from prunelab.common.models import loading
from prunelab.common.tokens.inspection import Inspection, Stage
from tests.contract.vlms import checkpoint, processor

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An image and a moving GIF of the testbeds' own scenes, an MP4, and files that are neither."""
    folder = tmp_path_factory.mktemp("files")
    picture, video = (questions.draw(kind, "test", 1, 3)[0] for kind in ("picture", "video"))
    Image.fromarray(picture.shown[0].numpy()).save(folder / "picture.png")
    Image.fromarray(picture.shown[0].numpy()).convert("L").save(folder / "picture.jpg")
    frames = [Image.fromarray(frame.numpy()) for frame in video.shown]
    frames[0].save(folder / "video.gif", save_all=True, append_images=frames[1:], duration=80)
    film(folder / "video.mp4", video.shown.numpy())
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "broken.png").write_bytes((folder / "picture.png").read_bytes()[:60])
    return folder


def film(path: Path, frames: np.ndarray) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def untrained(monkeypatch):
    """The testbeds with weights at random: what is tested is not what they answer."""

    def load(identity, config):
        torch.manual_seed(0)
        return testbeds.get(identity["testbed"])().build().eval(), None

    monkeypatch.setattr(loading, "vision_language", load)


def ask(
    method, file, budget="0.25", question="which digit is seen first ?", model="digits_video_qa", frames=6, **options
):
    """What is printed, and the picture as parsed XML."""
    out, text = file.with_suffix(f".{method}.svg"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "console", Console(file=text, width=200, highlight=False))
        chosen = registry.create(method, **options)
        asking.run(chosen, file, Budget.parse(budget), out, model, question, frames, {"assets": ""})
    return text.getvalue(), ElementTree.parse(out).getroot()


def panels(picture):
    return picture.findall(f"{SVG}image")


@pytest.mark.parametrize("file", ["video.gif", "video.mp4"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "holitom", "quota", "pooled_tokens"])
def test_a_video_is_shown_frame_by_frame(untrained, files, method, file):
    said, picture = ask(method, files / file)
    assert said.startswith("which digit is seen first ?\nunpruned: ") and f"\n{method} at 0.25: " in said
    line = next(line for line in said.splitlines() if line.startswith("tokens of each frame"))
    tokens = [float(n) for n in line.partition(": ")[2].split()]
    count = questions.draw("video", "test", 1, 3)[0].shown.shape[0]
    assert len(tokens) == count
    assert 0 < sum(tokens) <= 16 * count
    assert len(panels(picture)) % count == 0 and len(panels(picture)) >= 2 * count
    assert picture.findall(f"{SVG}rect[@class='gone']")


@pytest.mark.parametrize("file", ["picture.png", "picture.jpg"])
def test_an_image_is_shown_before_and_after(untrained, files, file):
    said, picture = ask("fastv", files / file, question="how many digits are 3 ?", model="digits_qa")
    assert "unpruned: " in said and "fastv at 0.25: " in said and "MACs" in said
    assert len(panels(picture)) == 2 and picture.findall(f"{SVG}rect[@class='gone']")


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llava", ["picture.png"]),
        ("llava_next", ["picture.png"]),
        ("llava_onevision", ["picture.png", "video.mp4"]),
        ("llava_video", ["picture.png", "video.mp4"]),
        ("qwen2_5_vl", ["picture.png", "video.gif"]),
    ],
)
def test_any_local_folder_in_hub_layout(files, tmp_path, family, kinds):
    folder = checkpoint(tmp_path / family, family)
    for kind in kinds:
        said, picture = ask("divprune", files / kind, question="w20 w30 w40", model=str(folder))
        assert "w20 w30 w40\nunpruned: " in said and "divprune at 0.25: " in said
        assert "tokens" in said and len(panels(picture)) >= 2


def test_kept_cells_are_clear_and_others_pale():
    black = Image.new("RGB", (40, 20))
    stage = Stage("before the decoder", [1.25, 4.0], [torch.tensor([[1.0, 0.0], [0.5, 3.0]]), torch.ones(2, 2)])
    found = Inspection("an answer " * 40, "another", [4.0, 4.0], [stage], None)
    drawn = sheets.standalone(asking.drawing([black] * 2, found, ["a question <b>", found.dense], "a title"))
    picture = ElementTree.fromstring(drawn)
    assert len(panels(picture)) == 4
    gone = [float(cell.get("opacity")) for cell in picture.findall(f"{SVG}rect[@class='gone']")]
    assert gone == [0.9, 0.45], "of four cells one is gone and one half"
    assert len(picture.findall(f"{SVG}rect[@class='more']")) == 1, "more than it had is tinted"
    words = [line.text for line in picture.findall(f"{SVG}text")]
    assert {"a question <b>", "1.2 of 4", "4 of 4", "before the decoder: 5.2 tokens"} <= set(words)
    assert float(panels(picture)[0].get("width")) == 2 * float(panels(picture)[0].get("height")), "the picture's shape"


def test_mistakes_are_one_line(untrained, files, tmp_path):
    cases = [
        ({"question": "which cat is seen first ?"}, "video.gif", "does not know the word 'cat'; ask with: which digit"),
        ({}, "picture.png", "asked about a video; give one, or use --model digits_qa"),
        ({"model": "digits_qa"}, "video.gif", "asked about a single image; give one, or use --model digits_video_qa"),
        ({}, "broken.mp4", "cannot be decoded"),
        ({"model": ""}, "broken.mp4", "cannot be decoded"),
        ({"model": "digits_qa"}, "broken.png", "broken.png"),
        ({"model": "digits_vit"}, "picture.png", "digits_vit answers no questions; use --model digits_qa"),
        ({"budget": "1.5"}, "video.gif", "out of range"),
        ({"method": "fastervlm"}, "video.gif", "no class token"),
        ({"method": "holitom", "budget": "0.0", "similarity": 1.0}, "video.gif", "give a larger one"),
        ({"method": "quota", "model": "digits_qa"}, "picture.png", "weighs the frames of a video"),
        ({"frames": 0, "model": "FOLDER"}, "video.mp4", "ask for at least 1"),
    ]
    for options, file, text in cases:
        if options.get("model") == "FOLDER":
            options["model"] = str(tmp_path)
            (tmp_path / "config.json").write_text("{}")
        with pytest.raises(PrunelabError) as error:
            ask(**{"method": "divprune", "file": files / file, **options})
        assert text in str(error.value), text
        assert "\n" not in str(error.value)


def test_a_processor_without_a_template_or_videos():
    class Plain:
        chat_template = None

    shown = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(PrunelabError, match="no chat template"):
        asking.processed(Plain(), None, shown, "what ?")
    with pytest.raises(PrunelabError, match="this model reads no videos; give a single image"):
        asking.processed(processor("llava"), None, shown, "what ?")


def test_the_command_line_asks_a_shipped_testbed(files, capsys, monkeypatch):
    """The image testbed as it ships knows what its own scene shows, and says so from the command line."""
    from prunelab.common import cli

    sample = questions.draw("picture", "test", 1, 3)[0]
    file, out = str(files / "picture.png"), files / "cli.svg"
    monkeypatch.setenv("COLUMNS", "200")
    args = ["apply", "divprune", file, "0.5", "--question", sample.question, "--out", str(out)]
    cli.app(args, standalone_mode=False)
    said = capsys.readouterr().out
    assert f"unpruned: {sample.word}\n" in said and out.is_file()
