"""LexLIP beyond its golden cases: a dual encoder trained here, its inverted index, and what queues and momentum do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import digits
from prunelab.common.training.distillation import flops
from prunelab.methods.lexlip.method import (
    InvertedIndex,
    LexLIP,
    bottleneck,
    enqueued,
    follow,
    lexicon,
    phase_one,
    recall,
)

WORDS = 60


@pytest.fixture(scope="module")
def trained():
    """Lexicon vectors of test images of digits, and of their names, behind a short training, by weight of the FLOPS."""

    def encoders(weight):
        torch.manual_seed(0)
        image, text = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, WORDS)), nn.Embedding(10, WORDS)
        optimizer = torch.optim.AdamW([*image.parameters(), *text.parameters()], lr=5e-3)
        pixels, labels = digits.digits("train")
        for step in range(150):
            batch = torch.stack([(labels == d).nonzero().squeeze(1)[step % 100] for d in range(10)])
            vectors = lexicon(image(pixels[batch].flatten(1))[:, None]), lexicon(text(labels[batch])[:, None])
            loss = phase_one(vectors[1], vectors[0], weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        test, answers = digits.digits("test")
        with torch.no_grad():
            return lexicon(image(test.flatten(1))[:, None]), lexicon(text(torch.arange(10))[:, None]), answers

    return {weight: encoders(weight) for weight in (0.0, 2.0)}


def test_names_find_their_digits_through_the_index(trained):
    images, names, answers = trained[2.0]
    order, scores = InvertedIndex(images, Budget(1.0)).search(names, 5)
    dense = nn.functional.normalize(names, dim=-1) @ nn.functional.normalize(images, dim=-1).T
    assert torch.allclose(torch.from_numpy(scores), dense.topk(5, -1).values, atol=1e-5)
    assert (answers[torch.from_numpy(order)] == torch.arange(10)[:, None]).float().mean() > 0.9
    back, _ = InvertedIndex(names, Budget(1.0)).search(images, 1)
    assert recall(back, answers.tolist(), 1) > 0.7, "0.76 to 0.9 by processor, and 0.1 by chance"


def test_the_penalty_shortens_postings_and_fewer_terms_still_find(trained):
    (plain, _, _), (images, names, answers) = trained[0.0], trained[2.0]
    unit = [nn.functional.normalize(vectors, dim=-1) for vectors in (plain, images)]
    assert float(flops(unit[1])) < float(flops(unit[0]))
    whole, few = InvertedIndex(images, Budget(1.0)), InvertedIndex(images, Budget(4, "count"))
    assert few.nbytes < whole.nbytes
    order, _ = few.search(names, 3, Budget(4, "count"))
    assert (answers[torch.from_numpy(order)] == torch.arange(10)[:, None]).float().mean() >= 0.7


def test_the_heaviest_terms_of_a_vector_stay():
    vector = torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0])
    assert LexLIP().plan(vector, Budget(2, "count")).reduce.index.tolist() == [[1, 4]]
    assert LexLIP().plan(vector, Budget(1.0)).reduce.index.tolist() == [[1, 2, 4]], "a weight of 0 never stays"
    assert torch.allclose(LexLIP().rank(torch.tensor([[1.0, -2.0], [3.0, -1.0]])), torch.tensor([3.0, 0.0]).log1p())


def test_padding_has_no_say():
    logits, mask = torch.randn(2, 4, 9), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.allclose(lexicon(logits, mask)[0], lexicon(logits[:1, :2])[0])
    words = torch.randn(9, 3, requires_grad=True)
    assert not bottleneck(logits, words, mask).requires_grad


def test_queues_and_momentum():
    queue, keys = torch.zeros(3, 8), torch.eye(3)
    after, pointer = enqueued(queue, keys, 6)
    assert pointer == 0 and after[:, 6:].T.tolist() == [[1, 0, 0], [0, 1, 0]] and not bool(queue.any())
    assert enqueued(queue, keys, 2)[1] == 5
    slow, fast = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = 0.9 * slow.weight.detach() + 0.1 * fast.weight.detach()
    follow(slow, fast, 0.9)
    assert torch.allclose(slow.weight, expected)


def test_queries_of_another_vocabulary_are_refused():
    with pytest.raises(PrunelabError, match="queries have 4 words"):
        InvertedIndex(torch.rand(3, 5), Budget(1.0)).search(torch.rand(2, 4), 1)
