"""The scores of a segmentation: confusion matrix, IoU, confidence interval, tables.

    from metrics import compute_scores, confusion_matrix
    compute_scores(confusion_matrix(prediction, label, n_classes=21))['mIoU']
"""
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

MEANS = ('pAcc', 'mAcc', 'fwIoU', 'mIoU')


def confusion_matrix(prediction: Tensor, label: Tensor, n_classes: int) -> Tensor:
    """Count pixels by true and predicted class.

    Args:
        prediction: any shape, 0 .. n_classes - 1.
        label: the same shape; pixels outside 0 .. n_classes - 1, as 255, do not count.
        n_classes: side of the matrix.

    Returns:
        (n_classes, n_classes) int64; rows are the truth, columns the prediction.

    Raises:
        ValueError: if the shapes differ.
    """
    if prediction.shape != label.shape:
        raise ValueError(f'prediction {tuple(prediction.shape)} and label '
                         f'{tuple(label.shape)} differ in size: they must be the same')
    label, prediction = label.flatten().long(), prediction.flatten().long()
    is_valid = (label >= 0) & (label < n_classes)
    # Other pixels go into one more bin, which is cut off.
    index = torch.where(is_valid, label * n_classes + prediction, n_classes ** 2)
    counts = index.new_zeros(n_classes ** 2 + 1)
    counts.scatter_add_(0, index, torch.ones_like(index))  # bincount would synchronise
    return counts[:-1].view(n_classes, n_classes)


def compute_scores(matrix: Tensor) -> dict[str, float | list[float]]:
    """Compute the usual scores of a confusion matrix.

    Args:
        matrix: (classes, classes), rows are the truth.

    Returns:
        pAcc, mAcc, mIoU and fwIoU (weighted by the classes' share of the truth), in
        0..1, and IoU and acc of each class. IoU is NaN for a class that is neither in
        the truth nor predicted, acc for one not in the truth; means leave NaN out.
    """
    matrix = matrix.double().cpu()
    correct, true, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou = correct / (true + predicted - correct)  # 0 / 0 is NaN: class not present
    acc = correct / true
    total = matrix.sum()
    fw_iou = (true / total * iou).nansum().item() if total else math.nan
    return {'pAcc': (correct.sum() / total).item(), 'mAcc': acc.nanmean().item(),
            'mIoU': iou.nanmean().item(), 'fwIoU': fw_iou,
            'IoU': iou.tolist(), 'acc': acc.tolist()}


class ConfusionMeter:
    """The confusion matrices of a split and the pixel counts of each of its images.

    Args:
        n_variants: predictions per image, as of several networks.
        n_images: of the split.
        n_classes: side of the matrices.
        device: where to count; nothing here synchronises with it.
    """

    def __init__(self, n_variants: int, n_images: int, n_classes: int,
                 device: torch.device | str = 'cpu'):
        self.matrices = torch.zeros(n_variants, n_classes, n_classes,
                                    dtype=torch.int64, device=device)
        # Pixels per class: correct, in the truth, in the prediction.
        self.counts = torch.zeros(n_images, n_variants, 3, n_classes,
                                  dtype=torch.int64, device=device)

    def update(self, index: int, predictions: Tensor, label: Tensor) -> None:
        """Count image `index` of the split: predictions (v, h, w), label (h, w)."""
        for variant, prediction in enumerate(predictions):
            matrix = confusion_matrix(prediction, label, len(self.matrices[0]))
            self.matrices[variant] += matrix
            self.counts[index, variant] = torch.stack(
                [matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def image_mious(counts: Tensor) -> Tensor:
    """Return the mIoU of each image, over the classes in its truth or prediction.

    Args:
        counts: (n, 3, classes) pixels of one variant, from ConfusionMeter.

    Returns:
        (n,) float64 in 0..1, NaN for an image without labelled pixels.
    """
    correct, true, predicted = counts.double().unbind(1)
    return (correct / (true + predicted - correct)).nanmean(1)


def bootstrap_interval(counts: Tensor, n_draws: int = 1000, seed: int = 0
                       ) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mIoU over the choice of images.

    Each bootstrap draw takes as many images as the split has, with replacement.

    Args:
        counts: (n, 3, classes) pixels of one variant, from ConfusionMeter.
        n_draws: number of draws.
        seed: of the draws.

    Returns:
        (low, high) in 0..1, by percentiles.
    """
    n = len(counts)
    rng = np.random.default_rng(seed)
    times_drawn = rng.multinomial(n, np.full(n, 1 / n), n_draws)   # (draws, n)
    sums = times_drawn.astype(float) @ counts.flatten(1).cpu().double().numpy()
    correct, true, predicted = sums.reshape(n_draws, 3, -1).transpose(1, 0, 2)
    with np.errstate(invalid='ignore'):
        mious = np.nanmean(correct / (true + predicted - correct), axis=1)
    return tuple(np.nanpercentile(mious, [2.5, 97.5]).tolist())


def evaluate(predict_labels: Callable[[list[Tensor]], list[Tensor]], batches: Iterable,
             meter: ConfusionMeter, callback: Callable | None = None) -> ConfusionMeter:
    """Predict every image of a split and count.

    Args:
        predict_labels: maps images (3, h, w) uint8 to classes (n_variants, h, w).
        batches: of loader.eval_loader: (indices, images, labels (h, w) uint8).
        meter: is updated.
        callback: called with (index, predictions, label) of each image, on the device.

    Returns:
        The meter.
    """
    device = meter.matrices.device
    for indices, images, labels in batches:
        outputs = predict_labels(images)
        for index, predictions, label in zip(indices, outputs, labels, strict=True):
            label = label.to(device, non_blocking=device.type == 'cuda')
            meter.update(index, predictions, label)
            if callback is not None:
                callback(index, predictions, label)
    return meter


def format_scores(scores: dict, classes: Sequence[str]) -> str:
    """Format the scores as text: a line per class, then the means, in percent."""
    rows = list(zip(classes, scores['IoU'], scores['acc'], strict=True))
    rows += [(name, scores[name]) for name in MEANS]
    text = format_table(('class', 'IoU', 'acc'), rows)
    if 'mIoU_low' in scores:
        low, high = 100 * scores['mIoU_low'], 100 * scores['mIoU_high']
        text += (f'   {low:.2f} .. {high:.2f} in 95 % of 1,000 bootstrap draws of the '
                 'images')
    return text


def format_comparison(all_scores: Sequence[dict], names: Sequence[str],
                      classes: Sequence[str]) -> str:
    """Format the IoU of several variants as text, one column each, in percent."""
    ious = [scores['IoU'] for scores in all_scores]
    rows = list(zip(classes, *ious, strict=True))
    for name in (*MEANS, 'mIoU_low', 'mIoU_high'):
        rows.append((name, *(scores[name] for scores in all_scores)))
    return format_table(('IoU', *names), rows)


def format_table(header: Sequence[str], rows: Sequence[tuple]) -> str:
    """Align rows (name, number, ...) under a header, the numbers in percent."""
    width = max(len(row[0]) for row in (header, *rows))
    widths = [max(len(name) + 1, 6) for name in header[1:]]
    lines = [' '.join([f'{header[0]:{width}}', *map(str.rjust, header[1:], widths)])]
    for name, *numbers in rows:
        cells = [f'{100 * x:{n}.2f}' for x, n in zip(numbers, widths, strict=False)]
        lines.append(' '.join([f'{name:{width}}', *cells]))
    return '\n'.join(lines)
