"""Calibration data of the shapes people hold are read as what they are, or refused by what is wrong with them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import prune
from prunelab.common.weights.corpora import Labelled, corpus
from prunelab.methods.gblm.method import GBLM
from prunelab.methods.wanda.method import Wanda
from tests.contract.references import images, language_model, token_ids, vit

IDS = token_ids()
MASK = torch.tensor([[1] * 12, [0] * 3 + [1] * 9, [1] * 7 + [0] * 5, [1] * 12])
PADDED = [row[mask.bool()] for row, mask in zip(IDS, MASK, strict=True)]


def same(found, wanted) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "data",
    [
        IDS,
        list(IDS),
        tuple(IDS),
        DataLoader(TensorDataset(IDS, IDS), batch_size=3),
        IDS.numpy(),
        list(IDS.numpy()),
        IDS.tolist(),
        IDS.int(),
        {"input_ids": IDS},
        {"input_ids": IDS.tolist()},
        [{"input_ids": row} for row in IDS],
        [{"input_ids": row[None], "attention_mask": torch.ones(1, 12)} for row in IDS.int()],
        BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "token_type_ids": 0 * IDS}),
        BatchEncoding({"input_ids": IDS.tolist(), "attention_mask": torch.ones_like(IDS).tolist()}),
        DataLoader(TensorDataset(IDS), batch_size=3),
        DataLoader([{"input_ids": row} for row in IDS], batch_size=2),
        [IDS[:1], IDS[1:]],
        (row for row in IDS),
    ],
    ids=lambda data: type(data).__name__,
)
def test_token_ids(data):
    if isinstance(data, dict | BatchEncoding) and "attention_mask" in data:
        data = {**data, "attention_mask": torch.as_tensor(data["attention_mask"]).long()}
    if isinstance(data, list) and isinstance(data[0], dict) and "attention_mask" in data[0]:
        data = [{**row, "attention_mask": row["attention_mask"].long()} for row in data]
    found = corpus(data).sequences
    assert same([row.long() for row in found], list(IDS))


def test_two_sequences_are_no_pair():
    assert same(corpus(tuple(IDS[:2])).sequences, list(IDS[:2]))
    assert same(corpus(list(IDS[:2])).sequences, list(IDS[:2]))


def test_padding_is_left_out():
    for data in (
        {"input_ids": IDS, "attention_mask": MASK},
        [{"input_ids": row, "attention_mask": mask} for row, mask in zip(IDS, MASK, strict=True)],
        DataLoader([{"input_ids": r, "attention_mask": m} for r, m in zip(IDS, MASK, strict=True)], batch_size=2),
    ):
        assert same(corpus(data).sequences, PADDED)
    a, b = language_model(), language_model()
    prune(Wanda(), a, 0.5, PADDED, progress=False)
    prune(Wanda(), b, 0.5, {"input_ids": IDS, "attention_mask": MASK}, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_labels_go_with_their_inputs():
    pairs = corpus([(row[None], row.flip(0)[None]) for row in IDS])
    assert same(pairs.sequences, list(IDS)) and all(torch.equal(i.label, i.inputs.flip(0)) for i in pairs.items)
    batch = corpus({"input_ids": IDS, "attention_mask": MASK, "labels": IDS})
    assert all(torch.equal(item.label, item.inputs) for item in batch.items)
    pictures = corpus(DataLoader(TensorDataset(images(4), torch.arange(4)), batch_size=3))
    assert [int(item.label) for item in pictures.items] == [0, 1, 2, 3]
    assert same(pictures.sequences, list(images(4))) and all(isinstance(item, Labelled) for item in pictures.items)
    assert same(corpus((images(1)[0], 2)).sequences, list(images(1)))
    with pytest.raises(PrunelabError, match="4 calibration samples have 3 labels"):
        corpus((images(4), torch.arange(3)))
    # What is not to be predicted has no part in the gradients.
    plain, masked = language_model(), language_model()
    quiet = IDS.clone()
    quiet[:, :8] = -100
    first, second = (
        prune(GBLM(), model, 0.5, data, progress=False)
        for model, data in ((plain, IDS), (masked, {"input_ids": IDS, "labels": quiet}))
    )
    assert "units only in" in first.diff(second)


def test_images():
    x = images(3)
    for data in (x, list(x), x.numpy(), {"pixel_values": x}, [{"pixel_values": one[None]} for one in x]):
        assert same(corpus(data).sequences, list(x))
    a, b = vit(), vit()
    prune(Wanda(), a, 0.5, x, progress=False)
    prune(Wanda(), b, 0.5, TensorDataset(x, torch.arange(3)), progress=False)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("a text", "a text is no calibration data"),
        (["one text", "two"], "a text is no calibration data"),
        (3, "a int is no calibration data"),
        (torch.rand(4, 12), r"float32 \[4, 12\]"),
        (IDS.bool(), r"bool \[4, 12\]"),
        (IDS[None, None], r"int64 \[1, 1, 4, 12\]"),
        ({"input_ids": IDS, "decoder_input_ids": IDS}, "decoder_input_ids, which is not read"),
        ({"input_ids": IDS, "token_type_ids": torch.ones_like(IDS)}, "leave pairs"),
        ([{"query": IDS, "positive": IDS[:2]}], "unlike numbers of query, positive"),
        ([(IDS[0], IDS[1], IDS[2])], "of 3 parts is unclear"),
    ],
    ids=lambda case: case if isinstance(case, str) else type(case).__name__,
)
def test_what_is_no_calibration_data_is_named_before_any_work(data, says):
    with pytest.raises(PrunelabError, match=says):
        prune(Wanda(), language_model(), 0.5, data, progress=False)


def test_rows_of_a_data_set_are_lists_with_labels_of_their_own():
    tokens = token_ids(3, 8)
    rows = [{"input_ids": x.tolist(), "attention_mask": [1] * 6 + [0] * 2, "labels": x.tolist()} for x in tokens]
    items = corpus(rows).items
    assert [item.inputs.tolist() for item in items] == tokens[:, :6].tolist()
    assert [item.label.tolist() for item in items] == tokens[:, :6].tolist()
    unlike = {"input_ids": [[3, 4, 5], [6, 7]], "labels": [[3, 4, 5], [6, 7]]}
    assert [item.label.tolist() for item in corpus(unlike).items] == unlike["labels"]
    with pytest.raises(PrunelabError, match="give one each"):
        corpus({"input_ids": tokens, "labels": tokens[:2]})
