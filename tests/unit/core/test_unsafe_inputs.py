"""Inputs that would run code, read elsewhere or fill the memory are refused: nothing of them happens."""

from __future__ import annotations

import ast
import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from prunelab.common.backbones.checkpoint import read
from prunelab.common.catalogue import assets, lookup, schema
from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import documents, images, texts
from prunelab.common.experiments import papers
from prunelab.common.models import loading

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = lookup.settings({})


class Hostile:
    """An object that makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """A file that only code of an input would make."""
    path = tmp_path / "it ran"
    yield path
    assert not path.exists(), "code that came with an input was run"


@pytest.fixture
def folder(tmp_path):
    """A model folder that stands in for `own/model`, and what names it."""
    path = tmp_path / "hub" / "own" / "model"
    path.mkdir(parents=True)
    return path


def language(folder):
    return loading.language({"hub": "own/model", "local": ""}, {**SETTINGS, "hub": str(folder.parents[1])})


# -- pickles ---------------------------------------------------------------------------------------------------------


def test_the_hostile_object_is_what_it_says(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def test_pickled_weights_of_a_language_model_are_refused(folder, mark):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}))
    torch.save(Hostile(mark), folder / "pytorch_model.bin")
    with pytest.raises(PrunelabError, match="safetensors"):
        language(folder)


def test_pickled_tensors_are_read_where_the_catalogue_says_so_and_nothing_else(folder, mark):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    named = {"folder": str(folder), "pickled": True, "layout": "xgen"}
    with pytest.raises(PrunelabError, match="tokenizer of its own"):  # the model was read
        loading.language(named, SETTINGS)
    torch.save(Hostile(mark), folder / "pytorch_model.bin")
    with pytest.raises(PrunelabError, match="cannot be had"):
        loading.language(named, SETTINGS)


def test_pickled_weights_of_a_timm_model_are_refused(folder, mark):
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    torch.save(Hostile(mark), folder / "pytorch_model.bin")
    with pytest.raises(PrunelabError, match="pickled weights are not read"):
        loading.load({"hub": "own/model", "local": ""}, {**SETTINGS, "hub": str(folder.parents[1])})


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".bin", ".safetensors"])
def test_official_checkpoints_hold_tensors_or_are_refused(tmp_path, mark, suffix):
    torch.save({"model": Hostile(mark)}, tmp_path / f"a{suffix}")
    (tmp_path / f"b{suffix}").write_bytes(pickle.dumps(Hostile(mark)))
    for name in "ab":
        with pytest.raises(PrunelabError, match="cannot be read"):
            read(tmp_path / f"{name}{suffix}")


def test_weights_of_a_users_own_are_safetensors_or_are_refused(tmp_path, mark):
    torch.save(Hostile(mark), tmp_path / "weights.pt")
    with pytest.raises(PrunelabError, match="does not hold the weights"):
        loading.named("deit_tiny", tmp_path / "weights.pt", SETTINGS)


def test_arrays_of_objects_are_refused(tmp_path, mark):
    np.save(tmp_path / "a.npy", np.array([Hostile(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "a.npy")  # the default, which the sources below never change


# -- code that comes with a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unknown", "llama"])
def test_a_model_that_asks_for_its_own_code_is_refused(folder, mark, kind):
    """Whether transformers knows the kind or not: an unknown one is refused, a known one is read by its own class."""
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(code)
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": own}))
    with pytest.raises(PrunelabError, match="asks to run code" if kind == "unknown" else "safetensors"):
        language(folder)


def test_a_tokenizer_that_asks_for_its_own_code_is_refused(folder, mark):
    from transformers import AutoTokenizer

    (folder / "tokenization_own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    asked = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(asked))
    (folder / "config.json").write_text(json.dumps({"model_type": "unknown"}))
    with pytest.raises(PrunelabError, match=r"asks to run code|cannot be had"):
        loading.pretrained(AutoTokenizer, folder)


# -- names that lead elsewhere ---------------------------------------------------------------------------------------

ELSEWHERE = ["../secret", "a/../../b", "/etc/passwd", "~/x", "C:\\x", "https://x.org/y", "file:///x", "a\0b", "", " a"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_catalogues_name_no_path_outside(name):
    model = {"architecture": {"library": "timm", "name": "deit"}}
    broken = [
        ("models.yaml", {"m": {**model, "assets": name}}),
        ("models.yaml", {"m": {**model, "testbed": name}}),
        ("models.yaml", {"m": {**model, "adapter": name}}),
        ("models.yaml", {"m": {"paper": {"file": name, "source": "s", "licence": "mit"}}}),
        ("models.yaml", {"m": {"paper": {"hub": name, "licence": "mit"}}}),
        ("models.yaml", {"m": {"architecture": {"library": "backbones", "name": name}}}),
        ("datasets.yaml", {"d": {"assets": {"loader": "l", "licence": "mit", "folder": name}}}),
        ("datasets.yaml", {"d": {"paper": {"loader": "l", "licence": "mit", "hub": "a/b", "file": name}}}),
        ("datasets.yaml", {"d": {"paper": {"loader": "l", "licence": "mit", "setting": name, "needs": "n"}}}),
        ("datasets.yaml", {"d": {"assets": {"loader": "l", "licence": "mit", "annotations": name}}}),
        ("datasets.yaml", {"d": {"testbed": {"loader": "l", "packages": ["numpy", name]}}}),
        ("datasets.yaml", {"d": {"testbed": {"loader": name}}}),
        ("datasets.yaml", {name: {"testbed": {"loader": "l"}}}),
    ]
    for file, content in broken:
        with pytest.raises(PrunelabError, match=rf"configs/{file}, "):
            schema.check(file, content)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_a_data_set_stay_in_its_folder(tmp_path, name):
    with pytest.raises(PrunelabError, match="only names of files inside"):
        files.inside(tmp_path, name)


def test_data_sets_that_point_elsewhere_are_refused(tmp_path):
    sample = tmp_path / "imagenet"
    sample.mkdir()
    (sample / "labels.csv").write_text("file,wnid,label\n../../secret.png,n0,0\n")
    with pytest.raises(PrunelabError, match="leads out of its folder"):
        next(images.batches({"loader": "imagenet_sample", "folder": "imagenet"}, {"assets": tmp_path}, str, 1, 1))
    with pytest.raises(PrunelabError, match="leads out of its folder"):
        texts.load({"loader": "stories", "folder": "..", "file": "x.json"}, {"assets": tmp_path})
    listed = [{"name": "a", "sha256": "0", "files": [{"path": "../secret", "bytes": 1, "sha256": "0"}]}]
    (tmp_path / "catalogue.json").write_text(json.dumps(listed))
    with pytest.raises(PrunelabError, match="leads out of its folder"):
        assets.fault(tmp_path, assets.listed(tmp_path)[0])


def test_a_detection_set_that_points_elsewhere_is_refused(tmp_path):
    from prunelab.common.data import detection

    folder = tmp_path / "coco"
    folder.mkdir()
    told = {
        "images": [{"id": 1, "file_name": "../../x.jpg", "width": 8, "height": 8}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [],
    }
    (folder / "a.json").write_text(json.dumps(told))
    identity = {"loader": "coco", "folder": "coco", "images": "images", "annotations": "a.json"}
    with pytest.raises(PrunelabError, match="leads out of its folder"):
        detection.load(identity, {"assets": tmp_path}, None)


# -- files that unpack to more than they say -------------------------------------------------------------------------


def test_members_that_unpack_to_too_much_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(1 << 20))
        archive.writestr("text", b"small")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("bomb")
        member.size = 1 << 20
        archive.addfile(member, io.BytesIO(bytes(1 << 20)))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    for name in ("a.zip", "a.tar.gz"):
        with files.archive(tmp_path / name) as archive, pytest.raises(PrunelabError, match="unpacks to more than"):
            files.member(archive, "bomb", limit=1000)
    with files.archive(tmp_path / "a.zip") as archive:
        assert files.member(archive, "text", limit=5) == b"small"
        with pytest.raises(PrunelabError, match="has no file"):
            files.member(archive, "nothing")
    with files.archive(tmp_path / "a.tar.gz") as archive:
        assert files.names(archive) == ["bomb"], "links are no files"
        with pytest.raises(PrunelabError, match="has no file"):
            files.member(archive, "link")


def test_streams_that_unpack_to_too_much_are_refused(tmp_path):
    with gzip.open(tmp_path / "a.gz", "wb") as file:
        file.write(b"line\n" * 1000)
    assert sum(1 for _ in files.lines(tmp_path / "a.gz")) == 1000
    with pytest.raises(PrunelabError, match="unpacks to more than"):
        list(files.lines(tmp_path / "a.gz", limit=999))
    (tmp_path / "b.gz").write_bytes((tmp_path / "a.gz").read_bytes()[:-9])
    with pytest.raises(PrunelabError, match="cannot be read"):
        list(files.lines(tmp_path / "b.gz"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", b"nothing of the kind"])
def test_archives_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "opinosis").mkdir()
    (tmp_path / "opinosis" / "OpinosisDataset1.0_0.zip").write_bytes(content)
    with pytest.raises(PrunelabError, match="cannot be read"):
        documents.opinosis(tmp_path)


def test_names_in_an_archive_are_never_paths(tmp_path):
    """Opinosis with a member that would be written elsewhere, if anything were written."""
    (tmp_path / "opinosis").mkdir()
    with zipfile.ZipFile(tmp_path / "opinosis" / "OpinosisDataset1.0_0.zip", "w") as archive:
        archive.writestr("../../evil.txt", "x")
        archive.writestr("topics/a.txt.data", "The battery lasts long.\n")
        archive.writestr("summaries-gold/a/a.1.gold", "Long battery.")
    assert [document.id for document in documents.opinosis(tmp_path)] == ["a"]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["OpinosisDataset1.0_0.zip"]


def test_images_of_a_vast_size_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PrunelabError, match="cannot be decoded"):
        images.read(tmp_path / "a.png", lambda image: torch.zeros(1))


# -- YAML ------------------------------------------------------------------------------------------------------------


def test_yaml_makes_no_objects(tmp_path, mark, monkeypatch):
    hostile = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{json.dumps(str(mark))}]]"
    yaml.load("a: 1", yaml.SafeLoader)
    with pytest.raises(PrunelabError, match="not valid YAML"):
        lookup.pairs([f"scale={hostile}"])
    paper = tmp_path / "broken" / "paper.yaml"
    paper.parent.mkdir()
    paper.write_text(f"title: {hostile}\n")
    monkeypatch.setattr(papers, "METHODS", tmp_path)
    with pytest.raises(PrunelabError, match="not valid YAML"):
        papers.load("broken")


# -- what the sources never do ---------------------------------------------------------------------------------------


def calls():
    """(file, line, dotted name, keywords) of every call in the project's sources."""
    for package in ("common", "methods", "paper_tables", "benchmarks", "workflows"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                    yield path.relative_to(ROOT), node.lineno, ast.unparse(node.func), keywords


def test_no_source_reads_what_could_run():
    unsafe = []
    for path, line, name, keywords in calls():
        last = name.rpartition(".")[2]
        if (
            (name == "torch.load" and keywords.get("weights_only") is not True)
            or (name.startswith(("pickle.", "dill.", "joblib.", "marshal.", "shelve.")) and last != "dumps")
            or (name.startswith("yaml.") and last in ("load", "load_all", "unsafe_load", "full_load"))
            or name in ("eval", "exec", "os.system")
            or last in ("extractall", "unpack_archive")
            or keywords.get("allow_pickle") is True
            or keywords.get("trust_remote_code") is True
            or keywords.get("shell") is True
        ):  # fmt: skip
            unsafe.append(f"{path}:{line} {name}")
    assert not unsafe


def test_every_model_of_transformers_is_read_in_one_place():
    """`loading.pretrained` forbids code and network; the pruned models we saved ourselves have our own reader."""
    elsewhere = {
        str(path)
        for path, _, name, keywords in calls()
        if name.endswith(".from_pretrained") and keywords.get("trust_remote_code") is not False
    }
    assert elsewhere <= {"common/weights/io.py"}
