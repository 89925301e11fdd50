"""`board`: methods of a role compared on a model of one's own."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from prunelab.common.catalogue import lookup
from prunelab.common.cli import app
from prunelab.common.cli.comparing import reasons
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import comparing, listing
from prunelab.common.rehearsal import checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model in the hub's layout, with a text beside it."""
    place = tmp_path_factory.mktemp("model")
    small = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5}
    small |= {"num_attention_heads": 4, "max_position_embeddings": 256}
    checkpoints.transformers_model({"name": "LlamaForCausalLM", "arguments": small}, place, seen=False)
    (place / "text.txt").write_text("\n".join(f"w{30 + i % 97} w{40 + i % 89} yes no" for i in range(900)))
    return place


def ask(folder: Path, *more: str) -> tuple[int, str]:
    text = ("--text", str(folder / "text.txt"), "--samples", "3", "--length", "32")
    result = CliRunner().invoke(app, ["board", "--model", str(folder), *text, *more])
    if isinstance(result.exception, PrunelabError):
        return 2, str(result.exception)
    return result.exit_code, result.output


def test_methods_are_ranked_with_their_difference_and_what_refuses_says_why(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "board.csv"
    code, told = ask(folder, "--methods", "[mgw]*a*", "--out", str(out))
    assert code == 0 and "methods were not measured" in told and "budget in bits" not in told
    rows = {row["method"]: row for row in csv.DictReader(out.open())}
    assert rows["unpruned"]["value"] and not rows["unpruned"]["difference"]
    assert float(rows["wanda"]["cost"]) > 5 and rows["wanda"]["interval"]
    assert rows["gaprune"]["refused"] and not rows["gaprune"]["value"]
    lines = [line.split()[0] for line in told.splitlines() if line.split() and line.split()[0] in rows]
    values = [float(rows[name]["value"]) for name in lines if rows[name]["value"]]
    assert values == sorted(values) and len(values) > 2


def test_a_board_that_is_stopped_says_what_it_lacks_and_keeps_the_rest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*given: object) -> Iterator[comparing.Result]:
        yield comparing.Result("unpruned", 1.0)
        yield comparing.Result("wanda_sp", 2.0, 50.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "compare", stops)
    code, told = ask(folder, "--methods", "[mw]a*", "--out", str(tmp_path / "board.csv"))
    assert code == 130 and "3 methods were not reached: magnitude_sp, magnitude, wanda" in told
    assert len((tmp_path / "board.csv").read_text().splitlines()) == 3


def test_a_reason_is_told_once() -> None:
    refused = {"aim": "aim prunes at 'projected'", "ats": "ats prunes at 'patches'", "m3": "m3 prunes at 'projected'"}
    made = [comparing.Result("unpruned", 1.0), *(comparing.Result(name, refused=why) for name, why in refused.items())]
    told = {"prunes at 'projected'": ["aim", "m3"], "prunes at 'patches'": ["ats"]}
    assert reasons(made) == told and list(reasons(made)) == list(told)


@pytest.mark.parametrize("role", ["cache_pruner", "token_pruner", "draft_decoder"])
def test_caches_tokens_and_drafts_have_boards_as_well(role: str, folder: Path) -> None:
    question = comparing.Question(folder, role, "0.5", str(folder / "text.txt"), 2, 32)
    chosen = [m for m in listing.methods("*", role=role) if m.name in ("h2o", "window", "lazyllm", "token_recycling")]
    results = list(comparing.compare(question, chosen, lookup.settings({})))
    assert results[0].method == "unpruned" and results[0].value is not None
    assert all(r.value is not None and r.interval is not None for r in results[1:]) and len(results) > 1


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--role", "token_merger"), "no board is made of the role token_merger"),
        (("--methods", "nothing_like_it"), "no weight_pruner matches nothing_like_it"),
        (("--budget", "half"), "half"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(more: tuple[str, ...], told: str, folder: Path) -> None:
    code, said = ask(folder, *more)
    assert code == 2 and told in said


def test_an_encoder_is_no_language_model(folder: Path, tmp_path: Path) -> None:
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    BertModel(BertConfig(**small, num_attention_heads=2)).save_pretrained(tmp_path)
    for file in folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    result = CliRunner().invoke(app, ["board", "--model", str(tmp_path)])
    assert "is no whole BertLMHeadModel" in str(result.exception)


def test_a_missing_model_or_text_is_named(folder: Path) -> None:
    with pytest.raises(PrunelabError, match="does not exist"):
        comparing.check(comparing.Question(folder / "nowhere", "weight_pruner", "0.5"))
    with pytest.raises(PrunelabError, match="the text nothing"):
        comparing.check(comparing.Question(folder, "weight_pruner", "0.5", "nothing.txt"))
