"""Look-alikes of the data sets that paper-scale runs read: the same files, parts, splits, columns and types, few rows.

Those that come as Parquet are described in configs/look_alikes.yaml; `datasets`, which the extra `evaluation` brings,
writes them.
"""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import pickle
import random
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT, read_yaml
from prunelab.common.core.optional import optional
from prunelab.common.data import logiqa, segmentation
from prunelab.common.data.captions import LINES

ROWS = 6
CLASSES = [i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]  # COCO's numbers
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "for",
    "river",
    "city",
    "house",
    "tree",
    "stone",
    "water",
    "light",
    "music",
]


@cache
def described() -> dict[str, Any]:
    """configs/look_alikes.yaml: repositories with their parts."""
    return read_yaml((ROOT / "configs" / "look_alikes.yaml").read_text(encoding="utf8"))


def _text(seed: int, words: int = 12) -> str:
    lots = random.Random(seed)
    return " ".join(lots.choice(WORDS) for _ in range(words))


def _picture(seed: int, side: int = 336) -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def _jpeg(seed: int, side: int = 336) -> bytes:
    file = io.BytesIO()
    _picture(seed, side).save(file, "JPEG")
    return file.getvalue()


@cache
def _film(frames: int = 12, side: int = 224) -> bytes:
    """An MP4 file, large enough that a tenth of its tokens are some."""
    av, file = optional("av", "videos"), io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = side
        for seed in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(_picture(seed, side))))
        container.mux(stream.encode())
    return file.getvalue()


def value(column: Any, i: int) -> Any:
    """What a column holds in row `i`."""
    if isinstance(column, list):
        return column[i % len(column)]
    if isinstance(column, dict):
        return column["always"]
    kind, _, count = column.partition(" ")
    number = int(count or 12)
    made: dict[str, Callable[[], Any]] = {
        "text": lambda: _text(i, number),
        "texts": lambda: [_text(i + k) for k in range(number)],
        "question": lambda: f"{_text(i)}?",
        "id": lambda: str(i),
        "number": lambda: i,
        "film": lambda: f"{i}.mp4",
        "encoded": lambda: base64.b64encode(_jpeg(i)).decode(),
        "picture": lambda: _picture(i),
        "pictures": lambda: [_picture(i + k) for k in range(number)],
    }
    return made[kind]()


def parts(repository: str, folder: Path) -> None:
    """A repository of Parquet files with the card that names its configurations."""
    try:
        import datasets
    except ImportError:
        raise PrunelabError(
            f'the look-alike of {repository} is written by `datasets`; install it with pip install -e ".[evaluation]"'
        ) from None

    configs: dict[str, list[dict[str, str]]] = {}
    for config, part in described()[repository]["parts"].items():
        rows = [{name: value(column, i) for name, column in part["columns"].items()} for i in range(ROWS)]
        for split in part["splits"]:
            path = f"{config or 'data'}/{split}-00000-of-00001.parquet"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(folder / path)
            configs.setdefault(config or "default", []).append({"split": split, "path": path})
    card = {"configs": [{"config_name": config, "data_files": result} for config, result in configs.items()]}
    for archive, place in described()[repository].get("films", {}).items():
        named = place if "{}" in place else f"{place}/{{}}.mp4"
        _pack(folder / archive, {named.format(i): _film() for i in range(ROWS)})
    for archive, place in described()[repository].get("frames", {}).items():
        _pack(folder / archive, {f"{place}/{i}/{k:05}.jpg": _jpeg(k, 224) for i in range(ROWS) for k in range(12)})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n", encoding="utf-8")


def _pack(path: Path, members: Mapping[str, bytes]) -> None:
    """An archive of these files, of the kind that its name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, content in members.items():
                packed.writestr(name.lstrip("/"), content)
        return
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name.lstrip("/"))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


# -- files of other kinds --------------------------------------------------------------------------------------------


def _lines(count: int, words: int) -> str:
    return "".join(f" {_text(i, words)} . \n" for i in range(count))


def wikitext(path: Path) -> None:
    """The archive that holds WikiText-2 as it is."""
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "valid", "test"):
            archive.writestr(f"wikitext-2-raw/wiki.{split}.raw", " = Stone = \n\n" + _lines(120, 60))


def c4(path: Path) -> None:
    """A shard of web pages."""
    pages = "".join(json.dumps({"text": _text(i, 400), "timestamp": "", "url": ""}) + "\n" for i in range(200))
    path.write_bytes(gzip.compress(pages.encode()))


def parquet_texts(path: Path) -> None:
    """Texts in a column of a Parquet file."""
    library = optional("pyarrow", "Parquet")
    table = library.table({"content": [_text(i, 400) for i in range(20)]})
    optional("pyarrow.parquet", "Parquet").write_table(table, path)


def instructions(path: Path) -> None:
    """A list of instructions with answers."""
    rows = [{"instruction": _text(i), "input": "", "output": _text(i + 1)} for i in range(24)]
    path.write_text(json.dumps(rows), encoding="utf-8")


def problems(folder: Path, entry: Mapping[str, Any]) -> None:
    """A file of problems under the columns that an entry of the catalogue names."""
    files = [entry["files"]] if isinstance(entry["files"], str) else entry["files"]
    for name in files:
        _problems(folder / str(name).replace("*", "some"), entry)


def _problems(path: Path, entry: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(ROWS):
        columns = [entry["ask"]] if isinstance(entry["ask"], str) else entry["ask"]
        row: dict[str, Any] = {name: f"{_text(i)}?" for name in columns}
        named = entry.get("choices", ())
        held = {letter: _text(i + k, 2) for k, letter in enumerate("ABCD")}
        row |= {named: held} if isinstance(named, str) else {name: _text(i + k, 2) for k, name in enumerate(named)}
        answer = f"so $\\boxed{{{i}}}$." if entry.get("boxed") else "B" if named else str(i)
        around = entry.get("behind", ""), entry.get("before", "")
        row |= {entry["answer"]: answer.join(around)} if "answer" in entry else {}
        row |= {name: str(constant) for name, constant in entry.get("where", {}).items()}
        if "tests" in entry:
            packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps([{"input": "2", "output": "2"}])))).decode()
            row |= {"public_test_cases": json.dumps([{"input": "1", "output": "1"}]), "private_test_cases": packed}
            row |= {"metadata": "{}", "starter_code": ""}
        rows.append(row)
    if path.suffix == ".parquet":
        table = optional("pyarrow", "Parquet").Table.from_pylist(rows)
        optional("pyarrow.parquet", "Parquet").write_table(table, path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps({str(i): row for i, row in enumerate(rows)}), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def dialogues(folder: Path) -> None:
    """Turns of dialogues as JSON lines."""
    rows = "".join(json.dumps({"id": str(i), "data": [_text(i), _text(i + 1, 30)]}) + "\n" for i in range(24))
    (folder / "train_0.jsonl").write_text(rows, encoding="utf-8")


def prompts(path: Path) -> None:
    """One prompt a line."""
    path.write_text("".join(f"{_text(i)}\n" for i in range(12)), encoding="utf-8")


def questions(path: Path) -> None:
    """Questions of the kinds of Spec-Bench."""
    kinds = ("writing", "translation", "summarization", "qa", "math_reasoning", "rag", "coding", "mbpp")
    rows = [{"question_id": i, "category": kind, "turns": [f"{_text(i)}?"]} for i, kind in enumerate(kinds)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def films(folder: Path, entry: Mapping[str, Any]) -> None:
    """Questions about videos of plain colours, in files as `data/video_questions` reads them."""
    import numpy as np

    from prunelab.common.data import videos

    (folder / entry["videos"]).mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"{_text(i)}?", "video_name": f"v{i}", "question_id": i} for i in range(ROWS)]
    answers = [{"answer": "river", "question_id": i} for i in range(ROWS)]
    for i in range(ROWS):
        with videos.library().open(str(folder / entry["videos"] / f"v{i}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 224, 224, "yuv420p"
            for shade in range(16):
                grey = np.full((224, 224, 3), 16 * shade, np.uint8)
                container.mux(stream.encode(videos.library().VideoFrame.from_ndarray(grey, format="rgb24")))
            container.mux(stream.encode())
    if "options" in entry:
        orders = (["tree", "sea", "sky", "sun"], ["sun", "sky", "sea", "tree"])
        questions = [
            {"video": f"{entry['videos']}/v{i}.mp4", "question": f"{_text(i)}?", "options": order, "gt": "tree",
             "type": "ret_edit1", "try": n}
            for i in range(ROWS) for n, order in enumerate(orders)
        ]  # fmt: skip
        (folder / entry["options"]).write_text(json.dumps(questions), encoding="utf-8")
        return
    (folder / "test_q.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "test_a.json").write_text(json.dumps(answers), encoding="utf-8")


def photographs(folder: Path) -> None:
    """The thousand classes of pictures, one folder each."""
    for label in range(1000):
        place = folder / f"n{label:08}"
        place.mkdir(parents=True, exist_ok=True)
        _picture(label, 32).save(place / f"{label}.JPEG")


def segmented(loader: str, folder: Path) -> None:
    """Pictures with a map of classes each, as `data/segmentation` finds them."""
    import numpy as np
    from PIL import Image

    layout = segmentation.LAYOUTS[loader]
    for name in (layout.images, layout.labels):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = [f"picture_{i}" for i in range(ROWS)]
    for i, name in enumerate(names):
        _picture(i, 96).save(folder / layout.images / f"{name}.jpg")
        marks = np.random.default_rng(i).integers(0, 5, (96, 96), dtype=np.uint8)
        Image.fromarray(marks).save(folder / layout.labels / f"{name}{layout.suffix}")
    if layout.listing is not None:
        (folder / layout.listing).parent.mkdir(parents=True, exist_ok=True)
        (folder / layout.listing).write_text("\n".join(names), encoding="utf-8")


def coco(folder: Path, entry: Mapping[str, Any]) -> None:
    """Pictures in COCO's layout, each with two boxes of its 80 classes and two captions."""
    images, notes = [], []
    (folder / entry["images"]).mkdir(parents=True, exist_ok=True)
    for i in range(32):
        _picture(i, 96).save(folder / entry["images"] / f"{i:012}.jpg")
        images.append({"id": i, "file_name": f"{i:012}.jpg", "height": 96, "width": 96})
        for k in range(2):
            box = {"bbox": [8 + 30 * k, 8, 40, 60], "area": 2400, "iscrowd": 0, "category_id": CLASSES[i % 80]}
            notes.append({"id": 2 * i + k, "image_id": i, "caption": _text(i), **box})
    path = folder / entry["annotations"]
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = [{"id": number, "name": f"class {number}"} for number in CLASSES]
    path.write_text(json.dumps({"images": images, "annotations": notes, "categories": classes}), encoding="utf-8")


def image_text(folder: Path, entry: Mapping[str, Any]) -> None:
    """Pictures with annotations in the form of BLIP's: captions, or sentences about two pictures."""
    for i in range(24):
        path = folder / entry["images"] / "some" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        _picture(i, 96).save(path)
    for split in ("train", "test"):
        rows: list[dict[str, Any]] = []
        for i in range(24):
            name, other = f"some/{i}.jpg", f"some/{(i + 1) % 24}.jpg"
            texts = [_text(5 * i + k, 6) for k in range(5)]
            if split == "train" and i == 8:
                break
            if entry["kind"] == "pairs":
                rows.append({"images": [name, other], "sentence": _text(i, 8), "label": ["True", "False"][i % 2]})
            elif split == "train":
                rows.append({"image": name, "caption": texts[0], "image_id": str(i)})
            else:
                rows.append({"image": name, "caption": texts})
        path = folder / entry[split]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")


def logic(folder: Path) -> None:
    """Questions with four choices, in blocks of lines behind an empty one."""
    folder.mkdir(parents=True, exist_ok=True)
    choices = "\n".join(f"{letter}.the {word}" for letter, word in zip("ABCD", ("river", "city", "house", "tree")))
    blocks = [f"\n{letter}\n{_text(i, 40)}.\n{_text(i)}?\n{choices}\n" for i, letter in enumerate(logiqa.LETTERS)]
    for name in logiqa.FILES.values():
        (folder / name).write_text("".join(blocks), encoding="utf-8")


def captions(folder: Path) -> None:
    """One caption a line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LINES).write_text("".join(f"{_text(i)}\n" for i in range(200)), encoding="utf-8")


def duc(folder: Path) -> None:
    """Clusters of news stories in SGML with summaries, named as NIST names them."""
    for i in range(ROWS):
        (folder / "docs" / f"d3000{i}t").mkdir(parents=True, exist_ok=True)
        for k in range(3):
            story = "".join(f"<P>\n{_text(10 * i + k + n, 14).capitalize()}.\n</P>\n" for n in range(8))
            path = folder / "docs" / f"d3000{i}t" / f"APW1998{k:04}.000{k}"
            path.write_text(f"<DOC>\n<DOCNO> {k} </DOCNO>\n<TEXT>\n{story}</TEXT>\n</DOC>\n", encoding="latin-1")
        (folder / "models").mkdir(exist_ok=True)
        for author in "AB":
            summary = folder / "models" / f"D3000{i}.M.100.T.{author}"
            summary.write_text(f"{_text(i, 40)}.\n", encoding="latin-1")


FILES: Mapping[str, Callable[[Path], None]] = {
    "wikitext": wikitext, "c4": c4, "instructions": instructions, "ultrachat": dialogues,
    "parquet_texts": parquet_texts,
}  # fmt: skip
ENTRIES: Mapping[str, Callable[[Path, Mapping[str, Any]], None]] = {
    "problems": problems,
    "video_questions": films,
    "coco": coco,
    "coco_captions": coco,
    "image_text": image_text,
}  # as entries tell
FOLDERS: Mapping[str, Callable[[Path], None]] = {
    "imagenet_folder": photographs, "lines": prompts, "questions": questions, "caption_lines": captions, "duc": duc,
    "logiqa": logic,
    **{loader: partial(segmented, loader) for loader in segmentation.LAYOUTS},
}  # fmt: skip
