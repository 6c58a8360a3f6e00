"""What is minimised, and what is reported: the loss, the confusion matrix, the scores.

    from metric import confusion, score
    score(confusion(prediction, label, n_classes=21))['mIoU']
"""
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelLoss(nn.Module):
    """Cross-entropy over the pixels of each image, weighted, or of its hard ones.

    With OHEM (online hard example mining) an image's loss is the mean over the pixels
    that are kept. They are chosen in each image by itself, so that it does not matter
    how a batch is divided.

    Args:
        weights: of the classes; a single one is for all.
        kept: share of the valid pixels that OHEM keeps, the hardest; 0 is off.
        below: OHEM keeps those whose true class is less probable than this; 0 is off.
        least: pixels of an image that OHEM keeps at least, if there are so many valid.
        ignored: the label of pixels that are not learned.
    """

    def __init__(self, weights: Sequence[float] = (1.0,), kept: float = 0.0,
                 below: float = 0.0, least: int = 0, ignored: int = 255):
        super().__init__()
        self.kept, self.below, self.least = kept, below, least
        self.ignored, self.is_weighted = ignored, any(w != 1 for w in weights)
        table = torch.full((256,), float(weights[0]))
        table[:len(weights)] = torch.tensor(weights)
        self.register_buffer('weights', table, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Score each image.

        Args:
            logits: (b, classes, h, w), at least float32.
            labels: (b, h, w), 0 .. classes - 1 or `ignored`.

        Returns:
            (b,): the losses summed over the valid pixels of each image; with OHEM the
            mean over the kept ones, times h * w.
        """
        labels = labels.long()
        losses = F.cross_entropy(logits, labels, reduction='none',
                                 ignore_index=self.ignored)        # (b, h, w)
        weighted = losses * self.weights[labels] if self.is_weighted else losses
        if not (self.kept or self.below):
            return weighted.sum((1, 2))
        is_kept = self.choose(losses.detach(), labels != self.ignored)
        n_kept = is_kept.sum((1, 2)).clamp(min=1)
        return (weighted * is_kept).sum((1, 2)) / n_kept * labels[0].numel()

    def choose(self, losses: Tensor, is_valid: Tensor) -> Tensor:
        """Return which pixels OHEM keeps: (b, h, w) bool, as losses and is_valid."""
        losses = losses.masked_fill(~is_valid, -1).flatten(1)      # (b, n)
        n_valid = is_valid.sum((1, 2))                             # (b,)
        if self.kept:
            n_kept = (self.kept * n_valid - 0.02).ceil().long()    # 0.02: float32 errs
        else:
            n_kept = (losses > -math.log(self.below)).sum(1)
        n_kept = n_kept.clamp(min=self.least).minimum(n_valid)
        order = losses.argsort(1, descending=True)                 # the hardest first
        is_kept = torch.arange(len(losses[0]), device=losses.device) < n_kept[:, None]
        return torch.zeros_like(is_kept).scatter_(1, order, is_kept).view_as(is_valid)


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
