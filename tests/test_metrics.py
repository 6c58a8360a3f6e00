"""The confusion matrix and its scores against matrices worked out by hand."""
import math

import numpy as np
import pytest
import torch

import metrics

MEANS = ('pAcc', 'mAcc', 'mIoU', 'fwIoU')


def naive_confusion(prediction, label, n):
    matrix = np.zeros((n, n), int)
    for p, t in zip(prediction.ravel().tolist(), label.ravel().tolist(), strict=True):
        if 0 <= t < n:
            matrix[t][p] += 1
    return matrix


def test_confusion_matrix():
    label = torch.tensor([[0, 0, 1], [2, 255, 1]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1], [0, 2, 1]])
    matrix = metrics.confusion_matrix(prediction, label, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]  # rows are the truth
    assert matrix.dtype == torch.int64
    label = torch.tensor([0, 3, 4, 254, 255, -1])  # of 4 classes: the first two
    matrix = metrics.confusion_matrix(torch.ones(6, dtype=torch.int64), label, 4)
    assert matrix.tolist() == [[0, 1, 0, 0], [0] * 4, [0] * 4, [0, 1, 0, 0]]
    rng = np.random.default_rng(0)
    label, prediction = (torch.from_numpy(rng.integers(0, 19, (9, 31), np.uint8))
                         for _ in range(2))
    assert np.array_equal(metrics.confusion_matrix(prediction, label, 19).numpy(),
                          naive_confusion(prediction, label, 19))


def test_other_shapes_are_refused():
    for shape in ((3, 4), (12,), (4, 3, 1)):
        with pytest.raises(ValueError, match='differ in size'):
            metrics.confusion_matrix(torch.zeros(shape), torch.zeros(4, 3), 2)


def test_scores_by_hand():
    matrix = torch.tensor([[6, 2, 0, 0],    # class 3 is nowhere;
                           [1, 3, 0, 0],    # class 2 is true, and never predicted
                           [2, 2, 0, 0],
                           [0, 0, 0, 0]])
    scores = metrics.compute_scores(matrix)
    assert scores['IoU'][:3] == pytest.approx([6 / 11, 3 / 8, 0])
    assert scores['acc'][:3] == pytest.approx([6 / 8, 3 / 4, 0])
    assert math.isnan(scores['IoU'][3]) and math.isnan(scores['acc'][3])
    assert scores['pAcc'] == pytest.approx(9 / 16)
    assert scores['mIoU'] == pytest.approx((6 / 11 + 3 / 8) / 3)  # of three classes
    assert scores['mAcc'] == pytest.approx((6 / 8 + 3 / 4) / 3)
    assert scores['fwIoU'] == pytest.approx(8 / 16 * 6 / 11 + 4 / 16 * 3 / 8)

    scores = metrics.compute_scores(torch.tensor([[3, 1], [0, 0]]))
    assert scores['IoU'] == pytest.approx([3 / 4, 0])  # predicted only: counts as wrong
    assert scores['mIoU'] == pytest.approx(3 / 8)
    assert scores['mAcc'] == pytest.approx(3 / 4)      # it has no truth to be found
    assert math.isnan(scores['acc'][1])


def test_scores_at_the_limits():
    scores = metrics.compute_scores(torch.diag(torch.tensor([5, 1, 3])))
    assert all(scores[name] == pytest.approx(1) for name in MEANS)
    scores = metrics.compute_scores(torch.zeros(3, 3, dtype=torch.int64))
    assert all(math.isnan(scores[name]) for name in MEANS)
    n = 2 ** 40 + 1  # large counts are exact
    scores = metrics.compute_scores(torch.tensor([[n, 1], [0, n]]))
    assert scores['IoU'][1] == n / (n + 1)


def test_evaluate():
    rng, images, labels, masks = np.random.default_rng(1), [], [], []
    for i, size in enumerate([(4, 5), (3, 7)]):
        images.append(torch.full((3, *size), i, dtype=torch.uint8))
        labels.append(torch.from_numpy(rng.integers(0, 4, size, np.uint8)))
        masks.append(torch.from_numpy(rng.integers(0, 3, size)))
    calls = []

    def predict(images):  # two variants: the second one mixes classes up
        predictions = [masks[int(image[0, 0, 0])] for image in images]
        return [torch.stack([mask, (mask + 1) % 3]) for mask in predictions]

    one_by_one = [((i,), (images[i],), (labels[i],)) for i in (1, 0)]
    for batches in (one_by_one, [((1, 0), images[::-1], labels[::-1])]):
        meter = metrics.evaluate(predict, batches, metrics.ConfusionMeter(2, 2, 3),
                                 lambda *args: calls.append(args))
        for variant in (0, 1):
            each = [naive_confusion((mask + variant) % 3, label, 3)
                    for mask, label in zip(masks, labels, strict=True)]
            assert np.array_equal(meter.matrices[variant].numpy(), sum(each))
            assert np.array_equal(meter.counts[:, variant].numpy(), [
                [matrix.diagonal(), matrix.sum(1), matrix.sum(0)] for matrix in each])
    assert [index for index, _, _ in calls] == [1, 0, 1, 0]
    for i, predictions, label in calls:
        assert torch.equal(label, labels[i]) and torch.equal(predictions[0], masks[i])


def test_scores_of_images():
    counts = torch.tensor([[[3, 0, 0], [4, 0, 1], [3, 2, 0]],   # 3/4, 0/2, 0/1
                           [[0, 0, 0], [0, 0, 0], [0, 0, 0]],   # no label
                           [[0, 5, 0], [0, 5, 0], [0, 5, 0]]])  # perfect
    mious = metrics.image_mious(counts)
    assert abs(mious[0] - 0.25) < 1e-12 and mious[1].isnan() and mious[2] == 1


def test_bootstrap_is_the_spread_over_images():
    rng = np.random.default_rng(3)
    true = rng.integers(50, 100, (60, 2))
    correct = (true * rng.random((60, 2))).astype(int)
    predicted = correct + (true - correct)[:, ::-1]  # of two classes
    counts = torch.from_numpy(np.stack([correct, true, predicted], 1))
    low, high = metrics.bootstrap_interval(counts, 2000, seed=1)

    def miou(rows):
        c, t, p = correct[rows].sum(0), true[rows].sum(0), predicted[rows].sum(0)
        return np.mean(c / (t + p - c))

    loop = np.random.default_rng(8)
    naive = np.quantile([miou(loop.integers(0, 60, 60)) for _ in range(2000)],
                        [0.025, 0.975])
    assert low < miou(np.arange(60)) < high
    assert np.abs(naive - (low, high)).max() < 0.1 * (naive[1] - naive[0])
    assert metrics.bootstrap_interval(counts, 2000, seed=1) == (low, high)
    same = metrics.bootstrap_interval(counts[:1].repeat(9, 1, 1))  # equal images
    assert abs(same[1] - same[0]) < 1e-12


def test_tables():
    scores = metrics.compute_scores(torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]]))
    scores.update(mIoU_low=0.5, mIoU_high=0.625)
    classes = ('cat', 'a long name', 'nothing')
    lines = metrics.format_scores(scores, classes).splitlines()
    assert [line.rsplit(maxsplit=2) for line in lines[:4]] == [
        ['class', 'IoU', 'acc'], ['cat', '66.67', '75.00'],
        ['a long name', '50.00', '75.00'], ['nothing', 'nan', 'nan']]
    assert lines[4:7] == ['pAcc         75.00', 'mAcc         75.00',
                          'fwIoU        61.11']
    assert lines[7].startswith('mIoU         58.33   50.00 .. 62.50 in 95 %')
    lines = metrics.format_comparison([scores] * 2, ['one', 'another'],
                                      classes).splitlines()
    assert lines[0].split() == ['IoU', 'one', 'another']
    assert lines[1].split() == ['cat', '66.67', '66.67']
    assert lines[-1].split() == ['mIoU_high', '62.50', '62.50']
