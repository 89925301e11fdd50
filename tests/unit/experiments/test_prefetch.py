"""Prefetch against a hub in miniature: lock, tell, download, resume, refuse; then everything runs without it."""

from __future__ import annotations

import socket
import sys

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

from prunelab.common import cli
from prunelab.common.catalogue import hub, lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import planning, prefetch, runner, schema
from prunelab.common.experiments.run import Run
from prunelab.common.models import loading
from tests.unit.experiments.hub_server import COMMIT, serving

QUIET = Console(quiet=True)
MODEL = {
    "config.json": b'{"model_type": "none"}',
    "model.safetensors": bytes(range(256)) * 4096,
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit",
    "README.md": b"words",
}
TEXT = {"en/part.json.gz": b"\x1f\x8b not really", "other.json.gz": b"something else"}
ENTRIES = {
    "tiny": {"hub": "own/tiny", "licence": "mit", "gb": 0.002},
    "twin": {"hub": "own/tiny", "licence": "mit"},
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub with one model and one data set, both in the catalogues, and empty caches."""
    for name, entry in ENTRIES.items():
        monkeypatch.setitem(lookup.models(), name, {"paper": entry})
    text = {"loader": "c4", "hub": "own/text", "file": "en/part.json.gz", "licence": "ODC-BY"}
    monkeypatch.setitem(lookup.datasets(), "text", {"paper": text})
    monkeypatch.setattr(hub, "LOCK", tmp_path / "lock.yaml")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub client's pauses between attempts
    with serving({"models/own/tiny": dict(MODEL), "datasets/own/text": dict(TEXT)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


@pytest.fixture
def config(tmp_path):
    return {**lookup.settings({}), "results": str(tmp_path / "results"), "scale": "paper"}


@pytest.fixture
def wanted(monkeypatch):
    """The items of an imagined table that reads the model twice, under two names, and the data set."""

    def found(_config=None):
        return [
            prefetch.Item("model", "tiny", lookup.model("tiny")["paper"], ("p: T",)),
            prefetch.Item("model", "twin", lookup.model("twin")["paper"], ("p: U",)),
            prefetch.Item("dataset", "text", lookup.dataset("text")["paper"], ("p: T",)),
        ]

    monkeypatch.setattr(prefetch, "items", found)
    return found


def at_paper_scale(kind, name, config):
    return lookup.resolve(kind, name, "paper", config)


def whole(config) -> bool:
    return not any(at_paper_scale(*what, config).missing for what in (("model", "tiny"), ("dataset", "text")))


def test_lock_and_download(server, config, wanted, capsys):
    assert "a pinned revision of own/tiny (python -m prunelab prefetch --lock)" in str(
        at_paper_scale("model", "tiny", config).missing
    )
    prefetch.run(config, Console(width=200), lock=True, yes=True)
    told, _, done = capsys.readouterr().out.partition("to download: 2 repositories, 0.00105 GB")
    assert "own/tiny" in told and "mit" in told and "ODC-BY" in told and "p: U" in told, "told before it starts"
    assert "licences: ODC-BY, mit" in done and "model.safetensors" in done
    assert whole(config)
    assert sorted(server.downloads()) == ["config.json", "model.safetensors", "part.json.gz"], "no pickle, no code"
    locked = hub.lock().models["own/tiny"]
    assert (
        locked.revision == COMMIT
        and locked.licence == "mit"
        and set(locked.files) == {"config.json", "model.safetensors"}
    )
    assert set(hub.lock().datasets["own/text"].files) == {"en/part.json.gz"}

    model, data = (at_paper_scale(*what, config).identity for what in (("model", "tiny"), ("dataset", "text")))
    assert model["revision"] == COMMIT and "gb" not in model
    folder = hub.folder(model, "model", config)
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert hub.file(data, "dataset", config).read_bytes() == TEXT["en/part.json.gz"]


def test_what_is_here_asks_the_hub_nothing(server, config, wanted, monkeypatch, capsys):
    prefetch.run(config, QUIET, lock=True, yes=True)
    server.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prefetch.run(config, Console(width=200), lock=True, yes=True)
    assert not server.asked and "to download: 0 repositories" in capsys.readouterr().out


def test_a_locked_revision_stays(server, config, wanted):
    prefetch.resolve(wanted()[:1])
    before = hub.LOCK.read_text()
    server.repositories["models/own/tiny"]["config.json"] = b"{}"
    prefetch.run(config, QUIET, lock=True, dry=True)
    assert hub.LOCK.read_text() == before, "--dry-run changes nothing"
    with pytest.raises(PrunelabError, match=r"config.json of own/tiny came with a wrong checksum"):
        prefetch.run(config, QUIET, lock=True, yes=True)
    assert hub.lock().models["own/tiny"].files["config.json"].size == len(MODEL["config.json"])


def test_a_cut_connection_goes_on_where_it_stopped(server, config, wanted, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    server.cut.add("model.safetensors")
    prefetch.run(config, QUIET, lock=True, yes=True)
    ranges = [asked for method, path, asked in server.asked if method == "GET" and path.endswith("model.safetensors")]
    assert ranges[0] == "" and ranges[-1].startswith("bytes=") and int(ranges[-1][6:-1]) > 0
    assert whole(config)


def test_an_interrupted_download_keeps_the_files_that_are_complete(server, config, wanted, monkeypatch):
    prefetch.resolve(wanted())
    taken = server.repositories["models/own/tiny"].pop("model.safetensors")
    with pytest.raises(PrunelabError, match="no such file of own/tiny"):
        prefetch.run(config, QUIET, yes=True)
    assert not whole(config), "half of a repository is not at hand"
    assert str(at_paper_scale("model", "tiny", config).missing).startswith("a download of own/tiny")
    server.repositories["models/own/tiny"]["model.safetensors"] = taken
    server.asked.clear()
    prefetch.run(config, QUIET, yes=True)
    assert server.downloads() == ["model.safetensors"] and whole(config)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])  # large files and small ones, by their own hash
def test_a_corrupt_download_is_refused_and_thrown_away(server, config, wanted, tmp_path, name):
    server.corrupt.add(name)
    with pytest.raises(PrunelabError, match=f"{name} of own/tiny came with a wrong checksum and was thrown away"):
        prefetch.run(config, QUIET, lock=True, yes=True)
    assert not whole(config)
    assert not list((tmp_path / "cache").rglob(f"snapshots/*/{name}"))
    bad = MODEL[name][:-1] + bytes([MODEL[name][-1] ^ 1])
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.read_bytes() == bad]
    server.corrupt.clear()
    prefetch.run(config, QUIET, yes=True)
    assert whole(config)


def test_a_file_that_went_bad_since_is_fetched_again(server, config, wanted, tmp_path):
    prefetch.run(config, QUIET, lock=True, yes=True)
    storage = hub.storage(tmp_path / "cache", "own/tiny", "model")
    (storage / hub.RECEIPT).unlink()  # as where another tool downloaded it
    blob = next(storage.glob("snapshots/*/model.safetensors")).resolve()
    blob.write_bytes(b"x" * blob.stat().st_size)
    prefetch.run(config, QUIET, yes=True)
    assert blob.read_bytes() == MODEL["model.safetensors"] and whole(config)


def test_what_is_gated_says_what_to_do_and_the_rest_is_fetched(server, config, wanted, capsys):
    server.gated.add("models/own/tiny")
    with pytest.raises(PrunelabError, match=rf"own/tiny is gated: accept its terms at {server.address}/own/tiny"):
        prefetch.run(config, Console(width=200), lock=True, yes=True)
    assert "- own/tiny is gated" in capsys.readouterr().out, "told before it starts"
    assert not at_paper_scale("dataset", "text", config).missing
    assert not whole(config)


def test_a_repository_that_is_not_shown_is_named(server, config, wanted, monkeypatch):
    del server.repositories["models/own/tiny"]
    with pytest.raises(PrunelabError, match="the hub shows no own/tiny"):
        prefetch.run(config, QUIET, lock=True, yes=True)
    assert not hub.LOCK.exists(), "nothing is locked by halves"


def test_a_hub_that_does_not_answer_is_one_line_and_leaves_nothing(
    server, config, wanted, monkeypatch, tmp_path, capsys
):
    server.hangs = 3.0
    monkeypatch.setattr(prefetch, "TIMEOUT", 0.2)
    monkeypatch.setattr(sys, "argv", ["common", "prefetch", "--lock", "--yes", "--config", f"results={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and "does not answer" in error
    assert not hub.LOCK.exists() and not (tmp_path / "cache").exists()


def test_a_hub_that_falls_silent_while_downloading_leaves_nothing_half(server, config, wanted, monkeypatch, tmp_path):
    prefetch.resolve(wanted())
    with socket.socket() as unused:  # an address at which nobody listens
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(PrunelabError, match=r"not downloaded: the hub .* does not answer"):
            prefetch.run(config, QUIET, yes=True)
    assert not whole(config)
    assert not [
        p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name not in (hub.RECEIPT, "CACHEDIR.TAG")
    ]


def test_offline_nothing_can_be_locked(server, config, wanted, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PrunelabError, match="HF_HUB_OFFLINE is set"):
        prefetch.run(config, QUIET, lock=True, yes=True)
    assert not server.asked


def test_nothing_starts_unasked(server, config, wanted, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(PrunelabError, match="say --yes"):
        prefetch.run(config, QUIET, lock=True)
    assert not server.downloads()


def test_a_disk_that_is_too_small_is_told_before(server, config, wanted, monkeypatch):
    prefetch.resolve(wanted())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(PrunelabError, match="make room"):
        prefetch.run(config, QUIET, yes=True)
    assert not server.downloads()


def test_a_damaged_lock_is_told(server, config):
    hub.LOCK.write_text("models: {own/tiny: {revision: main}}")
    with pytest.raises(PrunelabError, match=r"lock.yaml is damaged"):
        at_paper_scale("model", "tiny", config)


# -- a folder of the user's --------------------------------------------------------------------------------------------


def test_a_folder_stands_in_plain_or_in_the_hubs_layout(tmp_path, config, monkeypatch, server):
    own = {**config, "hub": str(tmp_path / "own")}
    plain = tmp_path / "own" / "own" / "tiny"
    plain.mkdir(parents=True)
    (plain / "model.safetensors").write_bytes(b"weights")
    assert not at_paper_scale("model", "tiny", own).missing
    first = at_paper_scale("model", "tiny", own).identity
    assert "revision" not in first and first["local"], "it never counts as the published revision"
    assert hub.folder(first, "model", own) == plain

    layout = tmp_path / "own" / "datasets--own--text" / "snapshots" / "abc" / "en"
    layout.mkdir(parents=True)
    (layout / "part.json.gz").write_bytes(b"text")
    assert not at_paper_scale("dataset", "text", own).missing
    data = at_paper_scale("dataset", "text", own).identity
    assert hub.file(data, "dataset", own) == layout / "part.json.gz"

    hub.fingerprint.cache_clear()
    (plain / "model.safetensors").write_bytes(b"other w")
    assert at_paper_scale("model", "tiny", own).identity != first, "other content is another run"


def test_a_folder_with_the_published_checksums_is_the_published_revision(server, config, wanted, tmp_path, monkeypatch):
    """As on a machine without network, to which the files and the lock were carried."""
    own = {**config, "hub": str(tmp_path / "own")}
    folder = tmp_path / "own" / "own" / "tiny"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(MODEL[name])
    prefetch.resolve(wanted()[:2])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "local" in at_paper_scale("model", "tiny", own).identity, "until it is looked through"
    prefetch.run(own, QUIET, yes=True)
    found = at_paper_scale("model", "tiny", own).identity
    assert found["revision"] == COMMIT and hub.folder(found, "model", own) == folder

    (folder / hub.RECEIPT).unlink()
    (folder / "config.json").write_bytes(b"{}")
    prefetch.run(own, QUIET, yes=True)
    assert "local" in at_paper_scale("model", "tiny", own).identity


def test_half_of_a_download_stands_in_for_nothing(server, config, wanted, tmp_path):
    own = {**config, "hub": str(tmp_path / "own")}
    (tmp_path / "own").mkdir()
    prefetch.resolve(wanted())
    server.corrupt.add("model.safetensors")
    with pytest.raises(PrunelabError, match="wrong checksum"):
        prefetch.run(own, QUIET, yes=True)
    assert hub.stand_in("own/tiny", "model", own) is None and at_paper_scale("model", "tiny", own).missing
    server.corrupt.clear()
    prefetch.run(own, QUIET, yes=True)
    assert at_paper_scale("model", "tiny", own).identity["revision"] == COMMIT


def test_a_row_of_the_paper_scale_runs_on_a_local_checkpoint(tmp_path, config, monkeypatch):
    """Wanda's perplexity of a Llama, end to end and without any hub, on a tiny model and text of the reader's."""
    import gzip
    import json
    import zipfile

    from tokenizers import Tokenizer
    from tokenizers import models as bpe
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nothing"))
    torch.manual_seed(0)
    folder = tmp_path / "hub" / "meta-llama" / "Llama-2-7b-hf"
    shape = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    letters = {chr(i): i for i in range(128)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe.BPE(letters, []))).save_pretrained(folder)
    wiki = tmp_path / "hub" / "ggml-org" / "ci"
    wiki.mkdir(parents=True)
    with zipfile.ZipFile(wiki / "wikitext-2-raw-v1.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", " = Title = \n \n Some text of no use. \n" * 20)
    pages = tmp_path / "hub" / "allenai" / "c4" / "en"
    pages.mkdir(parents=True)
    with gzip.open(pages / "c4-train.00000-of-01024.json.gz", "wt") as file:
        file.write(json.dumps({"text": "A page of some length, to calibrate with. " * 10}) + "\n")

    own = {**config, "hub": str(tmp_path / "hub")}
    run = planning.resolve(
        "perplexity", "paper", own, schema.Configuration(method="wanda", budget="0.5"), model="llama2_7b",
        data="wikitext2", settings={"length": 64, "calibration": 2, "calibration_data": "c4"},
    )  # fmt: skip
    assert isinstance(run, Run) and not run.needs
    assert {kind for kind, _ in run.names} == {"model", "dataset"} and run.stand_in
    found = runner.execute(run, own)
    metrics = runner.provenance.read(found)["metrics"]
    assert metrics["perplexity"]["value"] == pytest.approx(128, rel=0.5) and metrics["sparsity"]["value"] == 50
    with pytest.raises(PrunelabError, match="cannot be had here"):
        loading.language(run.ids["model"], config)


# -- what tables read ----------------------------------------------------------------------------------------------


def test_the_tables_of_a_paper_name_what_they_read(config):
    found = {item.name: item for item in prefetch.items({**config, "papers": "wanda,zero_tprune,lexrank"})}
    assert {"llama2_7b", "c4", "wikitext2", "deit_small", "imagenet", "duc2004"} <= set(found)
    assert found["llama2_7b"].tables == ("wanda: wikitext2_ppl",)
    assert any(table.startswith("zero_tprune: ") for table in found["imagenet"].tables)
    assert found["imagenet"].state(config) == "by hand" and found["c4"].state(config) == "unlocked"
    assert not {item.name for item in prefetch.items({**config, "papers": "lexrank"})} & {"llama2_7b", "c4"}


def test_a_look_needs_no_network(config, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    prefetch.run({**config, "papers": "wanda,zero_tprune"}, Console(width=250), dry=True)
    out = capsys.readouterr().out
    assert "Llama 2 community licence" in out and "unlocked: " in out and "imagenet=DIR" in out


def test_tasks_of_the_harness_name_their_data(config):
    assert lookup.of_tasks(["boolq", "arc_easy", "longbench_trec"]) == ["boolq", "arc", "longbench"]
    assert lookup.of_tasks(["boolq2", "mine"]) == []
    run = planning.resolve(
        "zero_shot", "paper", config, schema.Configuration(), model="llama_7b", settings={"tasks": ["piqa", "gsm8k"]}
    )
    assert isinstance(run, Run)
    assert run.names == (("model", "llama_7b"), ("dataset", "piqa"), ("dataset", "gsm8k"))
    assert "revision of baber/piqa" in run.needs and run.ids["data of gsm8k"]["hub"] == "openai/gsm8k"


def test_the_harness_reads_its_data_from_the_folder_that_stands_in(tmp_path, config, monkeypatch):
    """BoolQ of the harness, on two questions of our own and a tiny model, without any hub."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness, the extra `evaluation`")
    import json

    from tokenizers import Tokenizer
    from tokenizers import models as bpe
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    torch.manual_seed(0)
    folder = tmp_path / "hub" / "huggyllama" / "llama-7b"
    shape = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    letters = {chr(i): i for i in range(128)}
    spoken = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(bpe.BPE(letters, [])), bos_token="\x01", eos_token="\x02"
    )
    spoken.save_pretrained(folder)
    data = tmp_path / "hub" / "aps" / "super_glue"
    data.mkdir(parents=True)
    rows = [{"question": f"is {i} even", "passage": "Numbers.", "idx": i, "label": i % 2} for i in range(6)]
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: boolq\n  data_files:\n"
        "  - {split: train, path: train.jsonl}\n  - {split: validation, path: validation.jsonl}\n---\n"
    )
    own = {**config, "hub": str(tmp_path / "hub")}
    run = planning.resolve(
        "zero_shot", "paper", own, schema.Configuration(), model="llama_7b", settings={"tasks": ["boolq"]}
    )
    assert isinstance(run, Run) and not run.needs

    found = runner.measure(run, own)
    assert found["boolq acc"]["value"] in [round(100 * i / 6, 4) for i in range(7)]
