"""The training loss: pixel-wise cross-entropy with class weights and OHEM.

    loss = PixelLoss(weights=(1.0,), ohem_kept=0.25)
    loss(logits, labels).mean() / labels[0].numel()
"""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

N_ROWS = 64  # rows of the upsampled logits that are in memory at a time


class UpsampledCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy of bilinearly upsampled logits, with little memory.

    For logits (b, classes, h', w') in float32 or float64, labels (b, h, w) int64 and
    weights (b, h, w) it returns sums (b,), with their gradient by the logits:

        upsampled = F.interpolate(logits, labels.shape[1:], mode='bilinear',
                                  align_corners=align_corners)
        losses = F.cross_entropy(upsampled, labels, reduction='none')
        sums = (weights * losses).sum((1, 2))

    In those lines the upsampled logits, their softmax and its gradient are the largest
    tensors of a training step (22 MB each for an image of 513 x 513 and 21 classes).
    Here N_ROWS rows are upsampled at a time, and the forward pass also computes the
    gradient of the small logits, which is all that is saved. Upsampling is linear: a
    matrix product for each direction, and the transposed ones for the gradient.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, weights: Tensor,
                align_corners: bool) -> Tensor:
        """Compute the sums and, where it is needed, the gradient of the logits."""
        needs_gradient = ctx.needs_input_grad[0]
        down, right = upsample_matrices(logits, labels.shape[1:], align_corners)
        wide = (logits @ right).permute(2, 0, 1, 3)        # (h', b, classes, w)
        sums, gradient = logits.new_zeros(len(logits)), 0
        for top in range(0, down.shape[1], N_ROWS):
            rows = slice(top, top + N_ROWS)
            y = labels[:, rows].transpose(0, 1)[:, :, None]        # (r, b, 1, w)
            weight = weights[:, rows].transpose(0, 1)[:, :, None]
            x = F.log_softmax(upsample_rows(wide, down[:, rows]), 2)
            log_prob = x.gather(2, y)
            sums -= (log_prob * weight).sum((0, 2, 3))
            if needs_gradient:  # weight * (softmax - one-hot)
                x = x.exp_().scatter_(2, y, log_prob.expm1()).mul_(weight)
                gradient = gradient + down[:, rows] @ x.flatten(1)
        if needs_gradient:
            gradient = gradient.view_as(wide) @ right.T    # (h', b, classes, w')
            ctx.save_for_backward(gradient.permute(1, 2, 0, 3).contiguous())
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, sums_gradient: Tensor):
        """(b,) of the sums -> (b, classes, h', w') of the logits."""
        gradient, = ctx.saved_tensors
        return gradient * sums_gradient[:, None, None, None], None, None, None


def upsample_matrices(x: Tensor, size: tuple[int, int], align_corners: bool
                      ) -> tuple[Tensor, Tensor]:
    """Return the matrices (h', h), (w', w) that upsample x (b, c, h', w') to (h, w)."""
    return tuple(F.interpolate(torch.eye(n, dtype=x.dtype, device=x.device)[None],
                               n_large, mode='linear', align_corners=align_corners)[0]
                 for n, n_large in zip(x.shape[2:], size, strict=True))


def upsample_rows(wide: Tensor, down: Tensor) -> Tensor:
    """Upsample downwards: (h', b, c, w) and a matrix (h', r) -> (r, b, c, w)."""
    return (down.T @ wide.flatten(1)).unflatten(1, wide.shape[1:])


class PixelLoss(nn.Module):
    """Cross-entropy over the pixels of each image, weighted, or over its hardest ones.

    OHEM (online hard example mining) chooses the pixels per image, so the loss does not
    depend on how a batch is divided among devices.

    Args:
        weights: one per class, or a single one for all.
        ohem_kept: share of the valid pixels that OHEM keeps, the hardest; 0: off.
        ohem_below: OHEM keeps pixels with a true class less probable than this; 0: off.
        ohem_min: least number of pixels per image that OHEM keeps.
        ignored: label of the pixels without a loss.
    """

    def __init__(self, weights: Sequence[float] = (1.0,), ohem_kept: float = 0.0,
                 ohem_below: float = 0.0, ohem_min: int = 0, ignored: int = 255):
        super().__init__()
        self.ohem_kept, self.ohem_below = ohem_kept, ohem_below
        self.ohem_min, self.ignored = ohem_min, ignored
        table = torch.full((256,), float(weights[0]))
        table[:len(weights)] = torch.tensor(weights)
        table[ignored] = 0
        self.register_buffer('weights', table, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, align_corners: bool = True
                ) -> Tensor:
        """Compute the loss of each image.

        Args:
            logits: (b, classes, h', w'), float32 or float64.
            labels: (b, h, w), 0 .. classes - 1 or `ignored`.
            align_corners: of the upsampling, see network.upsample.

        Returns:
            (b,): the losses summed over the valid pixels of each image; with OHEM the
            mean over the kept pixels, times h * w.
        """
        labels, is_valid = labels.long(), labels != self.ignored
        weights = self.weights[labels].to(logits.dtype)            # (b, h, w)
        labels = labels.where(is_valid, 0)
        if self.ohem_kept or self.ohem_below:
            losses = self.pixel_losses(logits.detach(), labels, align_corners)
            is_kept = self.select_hard(losses, is_valid)
            n_kept = is_kept.sum((1, 2)).clamp(min=1)
            share = n_kept.to(weights.dtype) / labels[0].numel()
            weights = weights * is_kept / share[:, None, None]
        return UpsampledCrossEntropy.apply(logits, labels, weights, align_corners)

    @staticmethod
    def pixel_losses(logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
        """Return the cross-entropy of every pixel (b, h, w), without a gradient."""
        losses = torch.empty_like(labels, dtype=logits.dtype)
        down, right = upsample_matrices(logits, labels.shape[1:], align_corners)
        wide = (logits @ right).permute(2, 0, 1, 3)        # (h', b, classes, w)
        for top in range(0, down.shape[1], N_ROWS):
            rows = slice(top, top + N_ROWS)
            x = upsample_rows(wide, down[:, rows]).permute(1, 2, 0, 3)
            losses[:, rows] = F.cross_entropy(x, labels[:, rows], reduction='none')
        return losses

    def select_hard(self, losses: Tensor, is_valid: Tensor) -> Tensor:
        """Return which pixels OHEM keeps: (b, h, w) bool, like losses and is_valid."""
        losses = losses.masked_fill(~is_valid, -1).flatten(1)      # (b, n)
        n_valid = is_valid.sum((1, 2))                             # (b,)
        if self.ohem_kept:  # 0.02: the product may be rounded up
            n_kept = (self.ohem_kept * n_valid - 0.02).ceil().long()
        else:
            n_kept = (~(losses <= -math.log(self.ohem_below))).sum(1)  # NaN is kept
        n_kept = n_kept.clamp(min=self.ohem_min).minimum(n_valid)
        order = losses.argsort(1, descending=True)                 # the hardest first
        is_kept = torch.arange(len(losses[0]), device=losses.device) < n_kept[:, None]
        return torch.zeros_like(is_kept).scatter_(1, order, is_kept).view_as(is_valid)
