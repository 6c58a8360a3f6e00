"""The confusion matrix and the scores that are read off it.

    from metric import confusion, score
    score(confusion(prediction, label, n_classes=21))['mIoU']
"""
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def confusion(prediction: Tensor, label: Tensor, n_classes: int) -> Tensor:
    """Count pixels by true and predicted class.

    Args:
        prediction: any shape, classes 0 .. n_classes - 1.
        label: the same shape; pixels outside 0 .. n_classes - 1 (255) do not count.
        n_classes: side of the matrix.

    Returns:
        (n_classes, n_classes) int64; rows are truth, columns prediction.

    Raises:
        ValueError: for shapes that differ.
    """
    if prediction.shape != label.shape:
        raise ValueError(f'prediction {tuple(prediction.shape)} and label '
                         f'{tuple(label.shape)} differ in size: score them at the '
                         'label\'s size')
    label, prediction = label.flatten().long(), prediction.flatten().long()
    valid = (label >= 0) & (label < n_classes)
    # pixels that do not count fall into one more bin, which is cut off
    index = torch.where(valid, label * n_classes + prediction, n_classes ** 2)
    counts = torch.bincount(index, minlength=n_classes ** 2 + 1)[:-1]
    return counts.view(n_classes, n_classes)


def score(matrix: Tensor) -> dict[str, float | list[float]]:
    """Return the usual scores of a confusion matrix.

    Args:
        matrix: (classes, classes), rows are truth.

    Returns:
        pAcc, mAcc, mIoU and fwIoU (weighted by the classes' share of the truth), in
        0..1, and IoU and acc for each class. A class that is neither in the truth nor
        predicted has IoU NaN and does not count in the means; likewise acc without
        truth.
    """
    matrix = matrix.double().cpu()
    hit, truth, found = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou = hit / (truth + found - hit)  # 0 / 0 is NaN: a class that is nowhere
    acc = hit / truth
    total = matrix.sum()
    return {'pAcc': (hit.sum() / total).item(), 'mAcc': acc.nanmean().item(),
            'mIoU': iou.nanmean().item(),
            'fwIoU': (truth / total * iou).nansum().item() if total else math.nan,
            'IoU': iou.tolist(), 'acc': acc.tolist()}


def evaluate(predict: Callable[[Tensor], Tensor], samples: Iterable,
             n_classes: int, see: Callable | None = None) -> Tensor:
    """Predict every picture of a split and sum the confusion matrices.

    Args:
        predict: image (3, h, w) uint8 -> (classes, h, w) probabilities or logits.
        samples: triples (image, label (h, w) uint8, name).
        n_classes: side of the matrix.
        see: called with (name, image, label, prediction) of every picture.

    Returns:
        (n_classes, n_classes) int64 on the CPU, rows are truth.
    """
    total = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for image, label, name in samples:
        prediction = predict(image).argmax(0).cpu()                # (h, w)
        total += confusion(prediction, label, n_classes)
        if see is not None:
            see(name, image, label, prediction)
    return total


def table(scores: dict, classes: Sequence[str]) -> str:
    """Return the scores as text: a line a class, then the means, in percent."""
    width = max(len(name) for name in (*classes, 'fwIoU'))
    rows = [f'{"class":{width}}    IoU    acc']
    rows += [f'{name:{width}} {100 * iou:6.2f} {100 * acc:6.2f}'
             for name, iou, acc in zip(classes, scores['IoU'], scores['acc'],
                                       strict=True)]
    rows += [f'{name:{width}} {100 * scores[name]:6.2f}'
             for name in ('pAcc', 'mAcc', 'fwIoU', 'mIoU')]
    return '\n'.join(rows)
