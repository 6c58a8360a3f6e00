"""What is minimised, and what is reported: the loss, the confusion matrix, the scores.

    from metric import confusion, score
    score(confusion(prediction, label, n_classes=21))['mIoU']
"""
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MEANS = ('pAcc', 'mAcc', 'fwIoU', 'mIoU')
N_ROWS = 64  # of enlarged logits that the loss makes at a time


class EnlargedCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy of the pixels of logits that are enlarged bilinearly.

    The enlarged logits, their softmax and its gradient would be the largest tensors of
    a training step (22 MB an image each, for 21 classes and 513 x 513 pixels). Here
    some rows of them are made at a time, and the same pass sums up the gradient of the
    small logits, which is all that is kept. Enlarging is two matrix products, as it is
    linear in rows and in columns; so its gradient is the two transposed ones.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, weights: Tensor,
                align_corners: bool) -> Tensor:
        """Score each image.

        Args:
            logits: (b, classes, h', w'), at least float32.
            labels: (b, h, w) int64, classes.
            weights: (b, h, w) of the pixels; where it is 0 the label does not matter.
            align_corners: as of F.interpolate.

        Returns:
            (b,): the weighted losses summed over the pixels of each image.
        """
        needs_gradient = ctx.needs_input_grad[0]
        down, right = enlarging(logits, labels.shape[1:], align_corners)
        wide = (logits @ right).permute(2, 0, 1, 3)                # (h', b, classes, w)
        sums, gradient = logits.new_zeros(len(logits)), 0
        for top in range(0, down.shape[1], N_ROWS):
            rows = slice(top, top + N_ROWS)
            y = labels[:, rows].transpose(0, 1)[:, :, None]        # (r, b, 1, w)
            weight = weights[:, rows].transpose(0, 1)[:, :, None]
            x = F.log_softmax(enlarge_rows(wide, down[:, rows]), 2)
            true = x.gather(2, y)
            sums -= (true * weight).sum((0, 2, 3))
            if needs_gradient:  # weight * (softmax - one-hot)
                x = x.exp_().scatter_(2, y, true.expm1()).mul_(weight)
                gradient = gradient + down[:, rows] @ x.flatten(1)
        if needs_gradient:
            gradient = gradient.view_as(wide) @ right.T    # (h', b, classes, w')
            ctx.save_for_backward(gradient.permute(1, 2, 0, 3).contiguous())
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        """(b,) of the sums -> (b, classes, h', w') of the small logits."""
        of_sums, = ctx.saved_tensors
        return of_sums * gradient[:, None, None, None], None, None, None


def enlarging(x: Tensor, size: tuple[int, int], align_corners: bool
              ) -> tuple[Tensor, Tensor]:
    """Return the matrices (h', h) and (w', w) that enlarge (b, c, h', w') to (h, w)."""
    return tuple(F.interpolate(torch.eye(n, dtype=x.dtype, device=x.device)[None],
                               wanted, mode='linear', align_corners=align_corners)[0]
                 for n, wanted in zip(x.shape[2:], size, strict=True))


def enlarge_rows(wide: Tensor, down: Tensor) -> Tensor:
    """Enlarge downwards: (h', b, c, w) and a matrix (h', r) -> (r, b, c, w)."""
    return (down.T @ wide.flatten(1)).unflatten(1, wide.shape[1:])


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
        self.ignored = ignored
        table = torch.full((256,), float(weights[0]))
        table[:len(weights)] = torch.tensor(weights)
        table[ignored] = 0
        self.register_buffer('weights', table, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, align_corners: bool = True
                ) -> Tensor:
        """Score each image.

        Args:
            logits: (b, classes, h', w'), at least float32; they are enlarged to the
                labels' size.
            labels: (b, h, w), 0 .. classes - 1 or `ignored`.
            align_corners: of the enlarging, see network.enlarge.

        Returns:
            (b,): the losses summed over the valid pixels of each image; with OHEM the
            mean over the kept ones, times h * w.
        """
        labels, is_valid = labels.long(), labels != self.ignored
        weights = self.weights[labels].to(logits.dtype)            # (b, h, w)
        labels = labels.where(is_valid, 0)
        if self.kept or self.below:
            losses = self.pixel_losses(logits.detach(), labels, align_corners)
            is_kept = self.choose(losses, is_valid)
            n_kept = is_kept.sum((1, 2)).clamp(min=1)
            share = n_kept.to(weights.dtype) / labels[0].numel()
            weights = weights * is_kept / share[:, None, None]
        return EnlargedCrossEntropy.apply(logits, labels, weights, align_corners)

    @staticmethod
    def pixel_losses(logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
        """Return the cross-entropy of every pixel (b, h, w), without a gradient."""
        losses = torch.empty_like(labels, dtype=logits.dtype)
        down, right = enlarging(logits, labels.shape[1:], align_corners)
        wide = (logits @ right).permute(2, 0, 1, 3)                # (h', b, classes, w)
        for top in range(0, down.shape[1], N_ROWS):
            rows = slice(top, top + N_ROWS)
            x = enlarge_rows(wide, down[:, rows]).permute(1, 2, 0, 3)
            losses[:, rows] = F.cross_entropy(x, labels[:, rows], reduction='none')
        return losses

    def choose(self, losses: Tensor, is_valid: Tensor) -> Tensor:
        """Return which pixels OHEM keeps: (b, h, w) bool, as losses and is_valid."""
        losses = losses.masked_fill(~is_valid, -1).flatten(1)      # (b, n)
        n_valid = is_valid.sum((1, 2))                             # (b,)
        if self.kept:
            n_kept = (self.kept * n_valid - 0.02).ceil().long()    # 0.02: float32 errs
        else:
            n_kept = (~(losses <= -math.log(self.below))).sum(1)  # NaN is kept
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
    return count(index, n_classes ** 2 + 1)[:-1].view(n_classes, n_classes)


def count(index: Tensor, n: int) -> Tensor:
    """Return how often each of 0 .. n - 1 is in an int64 tensor: (n,) int64."""
    if index.device.type == 'cpu':
        return torch.bincount(index, minlength=n)
    # elsewhere bincount waits for the device
    return index.new_zeros(n).scatter_add_(0, index, torch.ones_like(index))


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


class Tally:
    """The confusion matrices of a split, and what each image adds to its scores.

    Nothing here waits for the device.

    Args:
        n_variants: that are scored side by side, as networks.
        n_images: of the split.
        n_classes: side of the matrices.
        device: where to count.
    """

    def __init__(self, n_variants: int, n_images: int, n_classes: int,
                 device: torch.device | str = 'cpu'):
        self.matrices = torch.zeros(n_variants, n_classes, n_classes,
                                    dtype=torch.int64, device=device)
        # pixels of each class: rightly predicted, in the truth, in the prediction
        self.counts = torch.zeros(n_images, n_variants, 3, n_classes,
                                  dtype=torch.int64, device=device)

    def add(self, index: int, predictions: Tensor, label: Tensor) -> None:
        """Count an image: its place in the split, (v, h, w) and (h, w) of it."""
        for variant, prediction in enumerate(predictions):
            matrix = confusion(prediction, label, len(self.matrices[0]))
            self.matrices[variant] += matrix
            self.counts[index, variant] = torch.stack(
                [matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def image_scores(counts: Tensor) -> Tensor:
    """Return the mIoU of each image, over the classes of its truth and prediction.

    Args:
        counts: (n, 3, classes) pixels of one variant, as of Tally.

    Returns:
        (n,) float64 in 0..1, NaN where an image has no labelled pixel.
    """
    hit, truth, found = counts.double().unbind(1)
    return (hit / (truth + found - hit)).nanmean(1)


def bootstrap(counts: Tensor, n_draws: int = 1000, seed: int = 0, share: float = 0.95
              ) -> tuple[float, float]:
    """Return the confidence interval of the mIoU over images.

    The split is drawn anew with replacement, as many images as it has, and scored: how
    much the mIoU would vary with the pictures, the network being the same.

    Args:
        counts: (n, 3, classes) pixels of one variant, as of Tally.
        n_draws: of splits.
        seed: of the draws.
        share: of the draws inside the interval.

    Returns:
        (low, high) in 0..1, by percentiles.
    """
    n = len(counts)
    draw = np.random.default_rng(seed)
    times = draw.multinomial(n, np.full(n, 1 / n), n_draws)        # (draws, n)
    sums = times.astype(float) @ counts.flatten(1).cpu().double().numpy()
    hit, truth, found = sums.reshape(n_draws, 3, -1).transpose(1, 0, 2)
    with np.errstate(invalid='ignore'):
        mious = np.nanmean(hit / (truth + found - hit), axis=1)
    rest = 50 * (1 - share)
    return tuple(np.nanpercentile(mious, [rest, 100 - rest]).tolist())


def evaluate(predict_labels: Callable[[list[Tensor]], list[Tensor]], batches: Iterable,
             tally: Tally, see: Callable | None = None) -> Tally:
    """Predict every image of a split and count.

    Args:
        predict_labels: images (3, h, w) uint8 -> (v, h, w) classes of each.
        batches: of dataset.eval_loader: (indices, images, labels (h, w) uint8).
        tally: is added to.
        see: called with (index, predictions, label) of every image, on the device.

    Returns:
        The tally.
    """
    device = tally.matrices.device
    for indices, images, labels in batches:
        found = predict_labels(images)
        for index, predictions, label in zip(indices, found, labels, strict=True):
            label = label.to(device, non_blocking=device.type == 'cuda')
            tally.add(index, predictions, label)
            if see is not None:
                see(index, predictions, label)
    return tally


def table(scores: dict, classes: Sequence[str]) -> str:
    """Return the scores as text: a line a class, then the means, in percent."""
    width = max(len(name) for name in (*classes, 'fwIoU'))
    rows = [f'{"class":{width}}    IoU    acc']
    rows += [f'{name:{width}} {100 * iou:6.2f} {100 * acc:6.2f}'
             for name, iou, acc in zip(classes, scores['IoU'], scores['acc'],
                                       strict=True)]
    rows += [f'{name:{width}} {100 * scores[name]:6.2f}' for name in MEANS]
    if 'mIoU_low' in scores:
        rows[-1] += (f'   {100 * scores["mIoU_low"]:.2f} .. '
                     f'{100 * scores["mIoU_high"]:.2f} in 95 % of 1,000 bootstrap '
                     'draws of the images')
    return '\n'.join(rows)


def compare(scored: Sequence[dict], names: Sequence[str], classes: Sequence[str]
            ) -> str:
    """Return the IoU of several variants as text, a column each, in percent."""
    width = max(len(name) for name in (*classes, 'mIoU_high'))
    widths = [max(len(name), 6) + 2 for name in names]
    rows = [('IoU', names)]
    rows += [(label, [f'{100 * scores["IoU"][i]:.2f}' for scores in scored])
             for i, label in enumerate(classes)]
    rows += [(label, [f'{100 * scores[label]:.2f}' for scores in scored])
             for label in (*MEANS, 'mIoU_low', 'mIoU_high')]
    return '\n'.join(f'{label:{width}}' + ''.join(
        f'{cell:>{n}}' for cell, n in zip(cells, widths, strict=True))
        for label, cells in rows)
