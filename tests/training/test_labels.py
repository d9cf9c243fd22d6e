"""Supervised losses: by hand, with gaps, with weights; and the head that answers."""

from __future__ import annotations

import math

import pytest
import torch
from processive.errors import ConfigError, InputError, ShapeError
from processive.models import TaskHead
from processive.models.task import sequence_means
from processive.sequences import PackedBatch, Vocabulary
from processive.training.objectives import (
    balanced_weights,
    binary_loss,
    class_loss,
    regression_loss,
)

NAN = math.nan
VOCABULARY = Vocabulary(("<bos>", "<eos>", "a", "b"), {"bos": "<bos>", "eos": "<eos>"})


def test_regression_by_hand():
    answers = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    total, weight = regression_loss(answers, torch.tensor([[0.0, NAN], [5.0, 4.5]]))
    assert (total.item(), weight.item()) == (1 + 4 + 0.25, 3)
    total.backward()
    assert answers.grad.tolist() == [[2.0, 0.0], [-4.0, -1.0]]  # a missing label has no gradient, not NaN


def test_yes_or_no_by_hand():
    answers = torch.tensor([[0.0, math.log(3)], [math.log(3), 2.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [1.0, NAN]])
    total, weight = binary_loss(answers, labels)
    assert weight == 3 and total.item() == pytest.approx(math.log(2) + math.log(4) + math.log(4 / 3))
    weights = torch.tensor([[1.0, 2.0], [5.0, 7.0]])
    total, weight = binary_loss(answers, labels, weights)
    assert weight == 2 + 5 + 2
    assert total.item() == pytest.approx(2 * math.log(2) + 5 * math.log(4) + 2 * math.log(4 / 3))
    total.backward()
    assert answers.grad.isfinite().all() and answers.grad[1, 1] == 0


def test_classes_by_hand():
    answers = torch.tensor([[0.0, 0.0, math.log(2)], [math.log(2), 0.0, 0.0], [9.0, 9.0, 9.0]], requires_grad=True)
    labels = torch.tensor([2.0, 1.0, NAN])
    total, weight = class_loss(answers, labels)
    assert weight == 2 and total.item() == pytest.approx(math.log(2) + math.log(4))
    total, weight = class_loss(answers, labels, torch.tensor([1.0, 3.0, 0.5]))
    assert weight == 3.5 and total.item() == pytest.approx(0.5 * math.log(2) + 3 * math.log(4))
    total.backward()
    assert answers.grad.isfinite().all() and not answers.grad[2].any()


def test_batches_add_up():
    answers, labels = torch.randn(9, 3), torch.tensor([0.0, 1, 2, NAN, 1, 1, 0, NAN, 2])
    weights = torch.tensor([1.0, 2.0, 4.0])
    whole = class_loss(answers, labels, weights)
    parts = [class_loss(answers[a:b], labels[a:b], weights) for a, b in [(0, 3), (3, 4), (4, 9)]]
    for n in range(2):
        assert sum(part[n] for part in parts).item() == pytest.approx(whole[n].item(), rel=1e-6)


@pytest.mark.parametrize("loss", [regression_loss, binary_loss, class_loss])
def test_no_label_at_all_is_zero_and_still_has_a_gradient(loss):
    answers = torch.randn(2, 3, requires_grad=True)
    total, weight = loss(answers, torch.full((2,) if loss is class_loss else (2, 3), NAN))
    assert total == 0 and weight == 0
    total.backward()
    assert not answers.grad.any()


def test_labels_that_are_refused():
    answers = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match="labels"):
        regression_loss(answers, torch.zeros(2, 1))
    with pytest.raises(InputError, match="0, 1 or NaN"):
        binary_loss(answers, torch.full((2, 3), 0.5))
    with pytest.raises(ShapeError, match="class_weights"):
        binary_loss(answers, torch.zeros(2, 3), torch.ones(2, 2))
    for label in (3.0, -1.0, 0.5):
        with pytest.raises(InputError, match="0 to 2"):
            class_loss(answers, torch.tensor([0.0, label]))
    with pytest.raises(ShapeError, match="labels"):
        class_loss(answers, torch.zeros(3))
    with pytest.raises(ShapeError, match="class_weights"):
        class_loss(answers, torch.zeros(2), torch.ones(2))
    with pytest.raises(ConfigError, match="sequence or token"):
        TaskHead(4, 1, level="word")


def test_balanced_weights_by_hand():
    found = balanced_weights(torch.tensor([[6.0, 2.0], [4.0, 0.0]]))
    assert torch.allclose(found, torch.tensor([[8 / 12, 2.0], [0.5, 0.0]]))


def test_means_leave_special_tokens_out():
    batch = PackedBatch.from_sequences([[0, 2, 3, 1], [], [0, 1], [3]])
    hidden = torch.tensor([[9.0], [1.0], [4.0], [9.0], [9.0], [9.0], [7.0]])
    assert sequence_means(hidden, batch, VOCABULARY).tolist() == [[2.5], [0.0], [0.0], [7.0]]


def test_a_head_answers_per_sequence_or_per_token():
    batch = PackedBatch.from_sequences([[0, 2, 3, 1], [0, 3, 1]])
    hidden = torch.randn(7, 8)
    head = TaskHead(8, 3).eval()
    found = head(hidden, batch, VOCABULARY)
    means = torch.stack([hidden[1:3].mean(0), hidden[5]])
    assert torch.allclose(found, head.out(torch.tanh(head.dense(means))), atol=1e-6)
    tokens = TaskHead(8, 1, level="token").eval()
    assert tokens(hidden, batch, VOCABULARY).shape == (7, 1)
