"""The code of every method's README: it imports what is there, its calls of the facade name methods, options and
budgets that exist, and every other name is one that a reader brings along."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import prunelab
from prunelab.common.core import index, registry

BLOCKS = {
    f"{path.parent.name}-{number}": block
    for path in sorted(index.METHODS.glob("*/README.md"))
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
}
# What a reader has: a model, what it reads, and the texts or token ids of a calibration set.
BROUGHT = {
    "model", "small_model", "fine_tuned", "pre_trained", "image_model", "processor", "image_processor", "tokenizer",
    "images", "mask", "targets", "sizes", "parts", "prompt", "prompts", "ids", "token_ids", "batches", "text",
    "documents", "background", "question", "seconds", "video_frames", "frame_at", "samples", "data", "arguments",
    "answers", "embeddings", "class_logits", "rewards", "early", "peft_model", "caption_model", "reference",
    "base_model", "clip", "answer_loss", "captions", "image_logits", "text_logits", "tokens", "policy", "episode",
    "optimizer",
}  # fmt: skip


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls of `prunelab.<function>(...)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "prunelab":
                yield node.func.attr, node


def literal(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_block_says_what_is_there(block):
    tree = ast.parse(block)
    assert max(map(len, block.splitlines())) <= 120
    space: dict[str, object] = {}
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in imports:
        library = (node.names[0].name if isinstance(node, ast.Import) else str(node.module)).partition(".")[0]
        if importlib.util.find_spec(library):
            exec(compile(ast.Module([node], []), "README.md", "exec"), space)
        else:  # a library that the block says is not among ours
            assert "not among our requirements" in block
            space |= {alias.asname or alias.name: None for alias in node.names}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stored = {name.id for name in names if isinstance(name.ctx, ast.Store)} | set(space)
    stored |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert {name.id for name in names} - stored - set(dir(builtins)) <= BROUGHT
    for function, call in calls(tree):
        taken = inspect.signature(getattr(prunelab, function)).parameters
        given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        if function in ("apply", "prune", "summarise", "create", "supports") and isinstance(literal(call.args[0]), str):
            options = {key: literal(value) for key, value in given.items() if key not in taken}
            registry.create(str(literal(call.args[0])), **options)
        if function in ("apply", "prune", "summarise") and literal(call.args[2]) is not None:
            prunelab.Budget.of(literal(call.args[2]))


def test_every_method_that_can_be_applied_runs_from_its_readme():
    """Each folder with a README that shows code shows one of its own methods."""
    for path in sorted(Path(index.METHODS).glob("*/README.md")):
        own = {entry.name for entry in index.entries().values() if entry.slug == path.parent.name}
        blocks = [block for name, block in BLOCKS.items() if name.rpartition("-")[0] == path.parent.name]
        classes = {index.entries()[name].class_name for name in own}
        shown = any(f'"{n}"' in b for n in own for b in blocks) or any(c in b for c in classes for b in blocks)
        assert not blocks or shown, path
