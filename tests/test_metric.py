"""The confusion matrix and its scores against matrices worked out by hand."""
import math

import numpy as np
import pytest
import torch

import metric


def naive_confusion(prediction, label, n):
    matrix = np.zeros((n, n), int)
    for p, t in zip(prediction.ravel().tolist(), label.ravel().tolist(), strict=True):
        if t < n:
            matrix[t][p] += 1
    return matrix


def test_confusion_by_hand():
    label = torch.tensor([[0, 0, 1], [2, 255, 1]], dtype=torch.uint8)
    found = torch.tensor([[0, 1, 1], [0, 2, 1]])
    matrix = metric.confusion(found, label, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]  # rows are truth
    assert matrix.dtype == torch.int64


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64])
def test_confusion_against_a_loop(dtype):
    draw = np.random.default_rng(0)
    label, found = draw.integers(0, 19, (9, 31)), draw.integers(0, 19, (9, 31))
    label[draw.random(label.shape) < 0.2] = 255
    matrix = metric.confusion(torch.from_numpy(found).to(dtype),
                              torch.from_numpy(label).to(dtype), 19)
    assert np.array_equal(matrix.numpy(), naive_confusion(found, label, 19))
    assert matrix.sum() == (label != 255).sum() < label.size


def test_labels_out_of_range_do_not_count():
    label = torch.tensor([0, 3, 4, 254, 255, -1])
    matrix = metric.confusion(torch.tensor([1, 1, 1, 1, 1, 1]), label, 4)
    assert matrix.tolist() == [[0, 1, 0, 0], [0] * 4, [0] * 4, [0, 1, 0, 0]]


@pytest.mark.parametrize('found', [(3, 4), (12,), (4, 3, 1)])
def test_other_shapes_are_refused(found):
    with pytest.raises(ValueError, match='differ in size') as caught:
        metric.confusion(torch.zeros(found), torch.zeros(4, 3), 2)
    assert str(found) in str(caught.value) and '(4, 3)' in str(caught.value)


def test_scores_by_hand():
    matrix = torch.tensor([[6, 2, 0, 0],    # class 3 is nowhere;
                           [1, 3, 0, 0],    # class 2 is true, and never found
                           [2, 2, 0, 0],
                           [0, 0, 0, 0]])
    scores = metric.score(matrix)
    assert scores['IoU'][:3] == pytest.approx([6 / 11, 3 / 8, 0])
    assert scores['acc'][:3] == pytest.approx([6 / 8, 3 / 4, 0])
    assert math.isnan(scores['IoU'][3]) and math.isnan(scores['acc'][3])
    assert scores['pAcc'] == pytest.approx(9 / 16)
    assert scores['mIoU'] == pytest.approx((6 / 11 + 3 / 8) / 3)  # of three classes
    assert scores['mAcc'] == pytest.approx((6 / 8 + 3 / 4) / 3)
    assert scores['fwIoU'] == pytest.approx(8 / 16 * 6 / 11 + 4 / 16 * 3 / 8)


def test_a_class_that_is_only_predicted_counts_as_wrong():
    scores = metric.score(torch.tensor([[3, 1], [0, 0]]))
    assert scores['IoU'] == pytest.approx([3 / 4, 0])
    assert scores['mIoU'] == pytest.approx(3 / 8)
    assert scores['mAcc'] == pytest.approx(3 / 4)  # it has no truth to be found
    assert math.isnan(scores['acc'][1])


def test_scores_of_perfection_and_of_nothing():
    scores = metric.score(torch.diag(torch.tensor([5, 1, 3])))
    assert all(scores[name] == pytest.approx(1)
               for name in ('pAcc', 'mAcc', 'mIoU', 'fwIoU'))
    scores = metric.score(torch.zeros(3, 3, dtype=torch.int64))
    assert all(math.isnan(scores[name]) for name in ('pAcc', 'mAcc', 'mIoU', 'fwIoU'))


def test_large_counts_are_exact():
    n = 2 ** 40 + 1
    assert metric.score(torch.tensor([[n, 1], [0, n]]))['IoU'][1] == n / (n + 1)


def test_evaluate():
    draw = np.random.default_rng(1)
    samples, predictions = [], {}
    for i, (h, w) in enumerate([(4, 5), (3, 7)]):
        image = torch.from_numpy(draw.integers(0, 256, (3, h, w), np.uint8))
        image[0, 0, 0] = i
        label = draw.integers(0, 3, (h, w), np.uint8)
        label[0, :2] = 255
        predictions[i] = draw.random((3, h, w))
        samples.append((image, torch.from_numpy(label)))
    seen = []

    def predict(images):  # two variants: the second one mixes classes up
        masks = [torch.from_numpy(predictions[int(x[0, 0, 0])].argmax(0))
                 for x in images]
        return [torch.stack([mask, (mask + 1) % 3]) for mask in masks]

    batches = [((1,), *([x] for x in samples[1])), ((0,), *([x] for x in samples[0]))]
    together = [((0, 1), *zip(*samples, strict=True))]
    tally = metric.evaluate(predict, batches, metric.Tally(2, 2, 3),
                            lambda *words: seen.append(words))
    masks = [predictions[i].argmax(0) for i in (0, 1)]
    for variant in (0, 1):
        each = [naive_confusion((mask + variant) % 3, sample[1].numpy(), 3)
                for mask, sample in zip(masks, samples, strict=True)]
        matrix = tally.matrices[variant].numpy()
        assert np.array_equal(matrix, sum(each)) and matrix.dtype == np.int64
        assert matrix.sum() == 20 + 21 - 4
        for i, own in enumerate(each):
            assert np.array_equal(tally.counts[i, variant].numpy(), [
                [own[c, c] for c in range(3)], own.sum(1), own.sum(0)])
    assert [words[0] for words in seen] == [1, 0]
    for i, found, label in seen:
        assert torch.equal(label, samples[i][1])
        assert np.array_equal(found[0].numpy(), masks[i])
    again = metric.evaluate(predict, together, metric.Tally(2, 2, 3))
    assert torch.equal(again.matrices, tally.matrices)
    assert torch.equal(again.counts, tally.counts)


def test_scores_of_images():
    counts = torch.tensor([[[3, 0, 0], [4, 0, 1], [3, 2, 0]],   # 3/4, 0/2, 0/1
                           [[0, 0, 0], [0, 0, 0], [0, 0, 0]],   # no label
                           [[0, 5, 0], [0, 5, 0], [0, 5, 0]]])  # perfect
    found = metric.image_scores(counts)
    assert abs(found[0] - 0.25) < 1e-12 and found[1].isnan() and found[2] == 1


def test_bootstrap_is_the_spread_over_images():
    draw = np.random.default_rng(3)
    truth = draw.integers(50, 100, (60, 2))
    hit = (truth * draw.random((60, 2))).astype(int)
    found = hit + (truth - hit)[:, ::-1]  # two classes: what one misses the other gets
    counts = torch.from_numpy(np.stack([hit, truth, found], 1))
    low, high = metric.bootstrap(counts, 2000, seed=1)

    def miou(rows):
        h, t, f = hit[rows].sum(0), truth[rows].sum(0), found[rows].sum(0)
        return np.mean(h / (t + f - h))

    loop = np.random.default_rng(8)
    naive = [miou(loop.integers(0, 60, 60)) for _ in range(2000)]
    assert low < miou(np.arange(60)) < high
    width = np.quantile(naive, 0.975) - np.quantile(naive, 0.025)
    assert abs(low - np.quantile(naive, 0.025)) < 0.1 * width
    assert abs(high - np.quantile(naive, 0.975)) < 0.1 * width
    assert metric.bootstrap(counts, 2000, seed=1) == (low, high)
    same = metric.bootstrap(counts[:1].repeat(9, 1, 1))  # equal images do not vary
    assert abs(same[1] - same[0]) < 1e-12


def test_table_shows_each_class():
    scores = metric.score(torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]]))
    text = metric.table(scores, ('background', 'a long name of a class', 'nothing'))
    rows = {line[:22].strip(): line[22:].split() for line in text.splitlines()}
    assert rows == {'class': ['IoU', 'acc'], 'background': ['66.67', '75.00'],
                    'a long name of a class': ['50.00', '75.00'],
                    'nothing': ['nan', 'nan'], 'pAcc': ['75.00'], 'mAcc': ['75.00'],
                    'fwIoU': ['61.11'], 'mIoU': ['58.33']}
    with pytest.raises(ValueError):
        metric.table(scores, ('background', 'one too few'))
