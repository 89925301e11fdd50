"""Checkpoints in the layout of LLaVA's own code: a look-alike is the model that transformers has."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from prunelab.common.backbones.llava_layout import NAMES, padded
from prunelab.common.core.errors import PrunelabError
from prunelab.common.models import loading
from tests.contract.vlms import images, prompt, vlm
from tests.unit.tasks.test_visual_tasks import checkpoint

OFFICIAL = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
}


def official(model, folder, words: int):
    """The model's weights in two shards under the names of LLaVA's code, with tables that older releases saved and a
    vocabulary of so many words."""
    named = {}
    for name, weight in model.state_dict().items():
        start = next((start for start in OFFICIAL if name.startswith(start)), "")
        cut = weight[:words] if name in ("lm_head.weight", "model.language_model.embed_tokens.weight") else weight
        named[OFFICIAL.get(start, start) + name.removeprefix(start)] = cut.contiguous().clone()
    named["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava_llama"}')
    names = sorted(named)
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({name: named[name] for name in chosen}, folder / f"model-{part}.safetensors")
    return {"folder": str(folder), "layout": "llava_layout"}


def test_a_look_alike_says_what_the_model_says(tmp_path):
    like = {"folder": str(checkpoint(tmp_path / "like", "llava"))}
    torch.manual_seed(0)
    model = vlm("llava")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    words = model.config.text_config.vocab_size - 4
    identity = official(model, tmp_path / "official", words)
    read, processor = loading.vision_language(identity, {}, like)
    given = prompt("llava", images("llava", 2))
    with torch.no_grad():
        found, wanted = read(**given).logits, model(**given).logits
    assert torch.equal(found[..., :words], wanted[..., :words]) and type(processor).__name__ == "LlavaProcessor"
    assert bool((found[..., words:] <= found[..., :words].amax(-1, keepdim=True)).all()), (
        "new words are never likeliest"
    )
    with pytest.raises(PrunelabError, match="name the `processor`"):
        loading.vision_language(identity, {})
    (tmp_path / "official" / "model-1.safetensors").unlink()
    with pytest.raises(PrunelabError, match="missing"):
        loading.vision_language(identity, {}, like)


def test_tables_are_padded_by_their_mean():
    table = torch.randn(5, 3)
    assert torch.allclose(padded(table, 7)[5:], table.mean(0).expand(2, -1), atol=1e-6)
    assert padded(table, 5) is table and len(NAMES) == 5
