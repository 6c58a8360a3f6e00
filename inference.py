"""Class probabilities of images: whole or by windows, at several scales, flipped.

    from inference import Predictor
    predictor = Predictor([net], device)    # net: a Segmenter in evaluation mode
    mask = predictor.predict([image])[0].argmax(1)[0]

eval.py, predict.py and the files for test servers all use what is here.
"""
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


def fuse_batch_norms(net: nn.Module, precision: str = 'fp32') -> nn.Module:
    """Fuse batch norms into the convolutions before them, for inference only.

    Args:
        net: in evaluation mode; is changed in place and cannot be trained afterwards.
            In each of its modules a batch norm belongs to the convolution that is
            registered right before it, on its own or as the last of a sequence.
        precision: fp32, bf16 or fp16. With bf16 and fp16 the weights of convolutions
            are stored in that type, so that autocast need not cast them in every call.

    Returns:
        The network.
    """
    for module in list(net.modules()):
        before = None  # (parent, name) of the convolution right before
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and before is not None:
                parent, conv = before
                setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), child))
                setattr(module, name, nn.Identity())
            before = (module, name)
            if isinstance(child, nn.Sequential) and len(child):
                before = (child, list(child._modules)[-1])
            if not isinstance(getattr(*before), nn.Conv2d):
                before = None
    if precision != 'fp32':
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.to(DTYPES[precision])
    return net


def padded_size(size: int, stride: int, align_corners: bool = True) -> int:
    """Return the smallest side, not below a size, that suits a network's stride.

    Args:
        size: of the side, in pixels.
        stride: of the network.
        align_corners: True gives k * stride + 1, where a feature lies on every
            stride-th pixel; False gives k * stride, where a feature lies in the middle
            of its block of pixels.
    """
    edge = 1 if align_corners else 0
    return (size + stride - 1 - edge) // stride * stride + edge  # ONNX: -1 // 2 is 0


@torch.inference_mode()
def predict_logits(net: nn.Module, image: Tensor) -> Tensor:
    """Return the logits of one image at its own size and a single scale.

    The image is normalised and padded right and bottom with zeros (the mean) to its
    padded_size; the padding is cut off again. A Predictor does the same faster.

    Args:
        net: a Segmenter in evaluation mode.
        image: (3, h, w) uint8, on any device.

    Returns:
        (classes, h, w) float32 on the network's device.
    """
    h, w = image.shape[1:]
    x = net.normalise(image[None].to(net.mean.device))
    bottom = padded_size(h, net.stride, net.align_corners) - h
    right = padded_size(w, net.stride, net.align_corners) - w
    return net(F.pad(x, (0, right, 0, bottom)))[0, :, :h, :w]


def window_starts(size: int, window: int, step: float) -> list[int]:
    """Return where windows start so that they cover a side evenly, up to its end.

    Args:
        size: of the side, in pixels.
        window: side of a window, in pixels; 0, or `size` or more, is one for all.
        step: distance between two starts, at most, as a share of the window.
    """
    if not 0 < window < size:
        return [0]
    n = -(-(size - window) // max(int(window * step), 1)) + 1
    return [round(i * (size - window) / (n - 1)) for i in range(n)]


def make_windows(size: tuple[int, int], window: tuple[int, int], step: float
                 ) -> list[tuple[slice, slice]]:
    """Return the windows (rows, columns) that cover an image: see window_starts."""
    h, w = size
    height, width = window
    if not 0 < height < h:
        height = h
    if not 0 < width < w:
        width = w
    windows = []
    for top in window_starts(h, height, step):
        for left in window_starts(w, width, step):
            windows.append((slice(top, top + height), slice(left, left + width)))
    return windows


class Predictor:
    """Predict the classes of images with one network or several.

    Each image is resized to every scale, and flipped too if wanted, then predicted as a
    whole or by sliding windows. Every input is padded right and bottom with the mean,
    and the padding is cut off again. Probabilities are averaged over windows and flips
    at the resized size, then over scales at the image's own size.

    Every result has a first dimension v of variants: the networks one after another,
    and for each network its numbers of EM iterations, if it has several.

    Args:
        nets: Segmenters in evaluation mode; their batch norms are fused in place.
        device: where to compute.
        precision: fp32, bf16 or fp16.
        scales: of the image's sides.
        use_flip: average with the prediction of the image flipped left to right.
        window: (h, w) in pixels of sliding windows over the resized image; 0 is all.
        step: distance between two windows, at most, as a share of the window's side.
        batch: inputs of the same padded size computed together, at most.
        channels_last: memory format of the convolutions.
        is_compiled: use torch.compile.
        is_averaged: return the mean over all variants as the only variant.
    """

    def __init__(self, nets: Sequence[nn.Module], device: torch.device | str = 'cpu',
                 precision: str = 'fp32', scales: Sequence[float] = (1.0,),
                 use_flip: bool = False, window: tuple[int, int] = (0, 0),
                 step: float = 2 / 3, batch: int = 1, channels_last: bool = True,
                 is_compiled: bool = False, is_averaged: bool = False):
        self.nets = [fuse_batch_norms(net, precision).to(device) for net in nets]
        if channels_last:
            for net in self.nets:
                net.to(memory_format=torch.channels_last)
        self.forwards: list[Callable[[Tensor], Tensor]] = list(self.nets)
        if is_compiled:
            self.forwards = [torch.compile(net, dynamic=True) for net in self.nets]
        self.device, self.precision = torch.device(device), precision
        self.scales, self.use_flip = tuple(scales), use_flip
        self.window, self.step, self.batch = window, step, batch
        self.is_averaged = is_averaged

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context that computes in the predictor's precision."""
        if self.precision == 'fp32':
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def predict(self, images: list[Tensor]) -> list[Tensor]:
        """Return the class probabilities of images at their own sizes.

        Args:
            images: (3, h, w) uint8 each, on any device.

        Returns:
            For each image (v, classes, h, w) float32, sums to 1 over the classes.
        """
        with torch.inference_mode(), self.autocast():
            probs = [self.predict_probs(net, forward, images)
                     for net, forward in zip(self.nets, self.forwards, strict=True)]
            return [self.average(torch.cat([probs_of_net[i] for probs_of_net in probs]))
                    for i in range(len(images))]

    def predict_labels(self, images: list[Tensor]) -> list[Tensor]:
        """Return the most probable classes of images at their own sizes.

        Args:
            images: (3, h, w) uint8 each, on any device.

        Returns:
            For each image (v, h, w) int64, on the predictor's device.
        """
        needs_probs = (self.scales != (1.0,) or self.use_flip or self.is_averaged
                       or any(self.window))
        if needs_probs:
            return [probs.argmax(1) for probs in self.predict(images)]
        with torch.inference_mode(), self.autocast():
            labels = [[] for _ in images]
            for net, forward in zip(self.nets, self.forwards, strict=True):
                views = [net.normalise(self.fetch(image)[None]) for image in images]
                logits = self.forward_logits(net, forward, views)
                for i in range(len(images)):
                    labels[i].append(logits[i].argmax(1))
            return [torch.cat(variants) for variants in labels]

    def predict_blocks(self, image: Tensor, n_pixels: int, margin: int
                       ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Predict an image that is too large for the memory, a block at a time.

        Args:
            image: (3, h, w) uint8.
            n_pixels: in a block with its margins, at most (but no side of a block is
                less than four margins).
            margin: pixels around a block that are predicted with it and not returned;
                it is rounded up to the stride, and blocks begin at multiples of it, so
                that at scale 1 the features lie where they lie in the whole image.

        Yields:
            (rows, columns, probs): the place of a block, and its probabilities (v,
            classes, rows, columns). Each pixel is in one block. An image of no more
            than n_pixels is one block.
        """
        h, w = image.shape[1:]
        if h * w <= n_pixels:
            yield slice(0, h), slice(0, w), self.predict([image])[0]
            return
        stride = max(net.stride for net in self.nets)
        margin = -(-margin // stride) * stride
        width = min(w, max(int(n_pixels ** 0.5), n_pixels // h, 4 * margin))
        height = min(h, max(n_pixels // width, 4 * margin))
        for top, bottom in split_side(h, height, margin, stride):
            for left, right in split_side(w, width, margin, stride):
                y, x = max(top - margin, 0), max(left - margin, 0)
                block = image[:, y:bottom + margin, x:right + margin]
                probs = self.predict([block])[0]
                yield (slice(top, bottom), slice(left, right),
                       probs[..., top - y:bottom - y, left - x:right - x])

    def fetch(self, image: Tensor) -> Tensor:
        """Copy an image to the device."""
        return image.to(self.device, non_blocking=self.device.type == 'cuda')

    # -- one network -------------------------------------------------------------------

    def predict_probs(self, net: nn.Module, forward: Callable, images: list[Tensor]
                      ) -> list[Tensor]:
        """Return (v, classes, h, w) probabilities of images, averaged over scales.

        Args:
            net: one of `nets`.
            forward: the network itself, or compiled.
            images: (3, h, w) uint8 each.
        """
        inputs = [net.normalise(self.fetch(image)[None]) for image in images]
        # (size, count) for each scale; scales of small images can give the same size
        sizes = []
        for image in images:
            counts = Counter(scaled_size(image.shape[1:], s) for s in self.scales)
            sizes.append(list(counts.items()))
        means, n_added = [None] * len(images), [0] * len(images)
        for k in range(max(map(len, sizes))):
            indices = [i for i in range(len(images)) if k < len(sizes[i])]
            views = [resize(inputs[i], sizes[i][k][0]) for i in indices]
            probs = self.predict_view(net, forward, views)
            for i, view_probs in zip(indices, probs, strict=True):
                view_probs = resize(view_probs, images[i].shape[1:])
                count = sizes[i][k][1]
                n_added[i] += count
                if k == 0:
                    means[i] = view_probs
                else:  # a running mean, exact where all are equal
                    means[i].lerp_(view_probs, count / n_added[i])
        return means

    def predict_view(self, net: nn.Module, forward: Callable, views: list[Tensor]
                     ) -> list[Tensor]:
        """Return the probabilities (v, classes, h, w) of normalised views (1, 3, h, w),
        averaged over windows and flips."""
        windows = [make_windows(view.shape[2:], self.window, self.step)
                   for view in views]
        if len(views) > 1 and max(map(len, windows)) > 1:
            # The windows of one view are enough to fill batches.
            return [self.predict_view(net, forward, [view])[0] for view in views]
        crops = []
        for view, view_windows in zip(views, windows, strict=True):
            crops += [view[:, :, rows, columns] for rows, columns in view_windows]
        probs = self.predict_crops(net, forward, crops)
        results, first = [], 0
        for view, view_windows in zip(views, windows, strict=True):
            last = first + len(view_windows)
            results.append(average_windows(view.shape[2:], view_windows,
                                           probs[first:last]))
            first = last
        return results

    def predict_crops(self, net: nn.Module, forward: Callable, crops: list[Tensor]
                      ) -> list[Tensor]:
        """Return the probabilities of crops (1, 3, h, w), averaged over flips."""
        n = len(crops)
        if self.use_flip:
            crops = crops + [crop.flip(3) for crop in crops]
        probs = self.forward_logits(net, forward, crops)
        for i in range(len(probs)):  # one by one, because they are large
            probs[i] = probs[i].softmax(1)
        if not self.use_flip:
            return probs
        return [(probs[i] + probs[n + i].flip(3)) / 2 for i in range(n)]

    def forward_logits(self, net: nn.Module, forward: Callable, views: list[Tensor]
                       ) -> list[Tensor]:
        """Return the logits (v, classes, h, w) of normalised views (1, 3, h, w).

        Views of the same padded size are computed together. Views of different padded
        sizes are not padded to a common one, because EM would see the padding.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for i, view in enumerate(views):
            size = tuple(padded_size(n, net.stride, net.align_corners)
                         for n in view.shape[2:])
            groups.setdefault(size, []).append(i)
        results: list[Tensor] = [None] * len(views)
        for (height, width), members in groups.items():
            for first in range(0, len(members), self.batch):
                indices = members[first:first + self.batch]
                padded = []
                for i in indices:
                    h, w = views[i].shape[2:]
                    padded.append(F.pad(views[i], (0, width - w, 0, height - h)))
                logits = forward(torch.cat(padded))       # (v * b, classes, H, W)
                logits = logits.unflatten(0, (-1, len(indices)))
                for j, i in enumerate(indices):
                    h, w = views[i].shape[2:]
                    results[i] = logits[:, j, :, :h, :w]  # (v, classes, h, w)
        return results

    def average(self, probs: Tensor) -> Tensor:
        """Return (v, classes, h, w), or its mean over v if the predictor averages."""
        if not self.is_averaged:
            return probs
        mean = probs[0]
        for n, variant in enumerate(probs[1:], 2):
            mean = mean.lerp(variant, 1 / n)  # exact where all are equal
        return mean[None]


def average_windows(size: tuple[int, int], windows: list[tuple[slice, slice]],
                    probs: list[Tensor]) -> Tensor:
    """Return the mean over the windows that cover each pixel.

    Args:
        size: (h, w) of the result.
        windows: (rows, columns) of each.
        probs: of each, (v, classes, rows, columns).

    Returns:
        (v, classes, h, w).
    """
    if len(windows) == 1:
        return probs[0]
    total = probs[0].new_zeros(*probs[0].shape[:2], *size)
    counts = total.new_zeros(size)
    for (rows, columns), window_probs in zip(windows, probs, strict=True):
        total[:, :, rows, columns] += window_probs
        counts[rows, columns] += 1
    return total.div_(counts)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (b, c, h, w) bilinearly with half-pixel centres, as in training."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode='bilinear')


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """Return the sides of a resized image, at least 1 pixel each."""
    return tuple(max(round(n * scale), 1) for n in size)


def split_side(size: int, block: int, margin: int, stride: int
               ) -> list[tuple[int, int]]:
    """Split a side into parts (first, last + 1) of about equal size.

    Each is at most `block` with its margins, and begins at a multiple of the stride.
    """
    n = 1
    if block < size:
        n = -(-size // ((block - 2 * margin) // stride * stride))
    step = -(-size // n // stride) * stride
    return [(first, min(first + step, size)) for first in range(0, size, step)]
