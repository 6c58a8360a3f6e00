"""Class probabilities of images: whole or by windows, at several scales, mirrored.

    from inference import Predictor
    predictor = Predictor([net], device)    # net: a Segmenter in evaluation mode
    mask = predictor.predict([image])[0].argmax(1)[0]

Predict first, score or draw second: eval.py, predict.py and the test server's files all
use what is here.
"""
import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}
POINTS = (0.0, 0.75, -0.75, 2.0)  # of Winograd's algorithm: see WinogradConv2d
WORTH = 256            # least number of channels for which it pays
PART = 1 << 22         # numbers that its patches are transformed at a time


def fold(net: nn.Module, precision: str = 'fp32', has_winograd: bool = False
         ) -> nn.Module:
    """Fold batch norms into the convolutions before them, for inference only.

    Args:
        net: in evaluation mode; is changed in place and cannot be trained afterwards.
            In each of its modules a batch norm belongs to the convolution that is
            registered right before it, on its own or as the last of a sequence.
        precision: bf16 and fp16 also keep the convolutions' weights so, which spares
            autocast the casting in every call.
        has_winograd: also compute convolutions by fewer products where that is known to
            pay on CPUs: see WinogradConv2d.

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
    if has_winograd:
        for module in list(net.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Conv2d) and WinogradConv2d.pays_for(child):
                    setattr(module, name, WinogradConv2d(child))
    if precision != 'fp32':
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, WinogradConv2d)):
                module.to(DTYPES[precision])
    return net


class WinogradConv2d(nn.Module):
    """A 3x3 convolution that keeps the size, by fewer products, for inference.

    Winograd's algorithm F(3x3, 3x3): 3 x 3 outputs and the 5 x 5 inputs that they see
    are taken as polynomials, which are multiplied by their values at 5 x 5 points: 25
    products for each pair of channels instead of 81. What is done before and after, per
    channel, is far less. It rounds by some 1e-6 of the output in float32, by 1e-2 in
    bfloat16, four times a plain convolution's; of the points tried, POINTS round least
    of those whose transforms bfloat16 holds exactly. The weights take 25 / 9 of their
    memory. Source: Lavin and Gray, Fast algorithms for convolutional neural networks,
    CVPR 2016; for the points, Barabasz et al., Error analysis and improving the
    accuracy of Winograd convolution for deep neural networks, 2020.

    Args:
        conv: 3x3, stride 1, padded with zeros by its dilation, one group.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.n_out, n_in = conv.weight.shape[:2]
        self.dilation, dtype = conv.dilation[0], conv.weight.dtype
        exact = torch.promote_types(dtype, torch.float32)
        before, kernel, after = (torch.from_numpy(np.kron(m, m)).to(exact)
                                 for m in winograd_matrices(POINTS))
        weight = kernel @ conv.weight.detach().to(exact).reshape(-1, 9).T
        self.register_buffer('weight', weight.view(25, self.n_out, n_in).to(dtype))
        self.register_buffer('bias', None if conv.bias is None else conv.bias.detach())
        self.register_buffer('before', before.to(dtype))           # (25, 25)
        self.register_buffer('after', after.to(dtype))             # (9, 25)

    @staticmethod
    def pays_for(conv: nn.Conv2d) -> bool:
        """Tell whether a convolution can be computed so, and is faster so: not with few
        channels, nor where a large dilation leaves few pixels to each of its grids."""
        d = conv.dilation[0]
        return (conv.kernel_size == (3, 3) and conv.stride == (1, 1)
                and conv.padding == conv.dilation == (d, d) and d <= 4
                and conv.groups == 1 and conv.padding_mode == 'zeros'
                and min(conv.in_channels, conv.out_channels) >= WORTH)

    @torch.compiler.disable  # of its loop over parts a compiler makes a huge graph
    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, n_out, h, w)."""
        b, c, h, w = x.shape
        d, x = self.dilation, x.permute(0, 2, 3, 1)                # (b, h, w, c)
        # With dilation d the pixels are d * d grids that do not see one another. A
        # patch is 5 x 5 pixels of a grid; the patches begin at every third.
        n_rows, n_columns = (-(-n // (3 * d)) for n in (h, w))
        right = 3 * d * n_columns - w + d
        y = x.new_empty(b, n_rows, 3, d, n_columns, 3, d, self.n_out,
                        dtype=self.weight.dtype)
        step = max(PART // (25 * b * n_columns * d * d * c), 1)
        for first in range(0, n_rows, step):                       # rows of patches
            last = min(first + step, n_rows)
            top, bottom = 3 * d * first - d, 3 * d * last + d
            part = F.pad(x[:, max(top, 0):bottom], (
                0, 0, d, right, max(-top, 0), max(bottom - h, 0)))
            part = part.reshape(b, -1, d, 3 * n_columns + 2, d, c)
            patches = part.unfold(1, 5, 3).unfold(3, 5, 3)  # (b, rows, d, ..., c, 5, 5)
            patches = patches.permute(6, 7, 0, 1, 2, 3, 4, 5).reshape(25, -1)
            values = (self.before @ patches).view(25, -1, c)
            values = values @ self.weight.mT                # (25, patches, n_out)
            found = self.after @ values.flatten(1)
            found = found.view(3, 3, b, last - first, d, n_columns, d, -1)
            y[:, first:last] = found.permute(2, 3, 0, 4, 5, 1, 6, 7)
        y = y.view(b, n_rows * 3 * d, -1, self.n_out)[:, :h, :w]
        y = y.contiguous() if self.bias is None else y + self.bias
        return y.permute(0, 3, 1, 2)


def winograd_matrices(points: Sequence[float]
                      ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the matrices of Winograd's algorithm for kernels of three.

    By Cook and Toom: y = after @ ((kernel @ g) * (before @ x)) is y[i] = sum over j of
    g[j] * x[i + j], where x has n + 1 numbers for n points, y has n - 1, and infinity
    is a point too.

    Args:
        points: different from one another.

    Returns:
        (before, kernel, after): (n + 1, n + 1), (n + 1, 3) and (n - 1, n + 1).
    """
    points, n = np.array(points, float), len(points)
    others = [np.delete(points, i) for i in range(n)]
    before = [[*np.poly(other)[::-1], 0] for other in others] + [np.poly(points)[::-1]]
    kernel = np.vander(points, 3, increasing=True)
    kernel /= [[np.prod(p - other)] for p, other in zip(points, others, strict=True)]
    after = np.vander(points, n - 1, increasing=True)
    return (np.array(before), np.vstack([kernel, [0, 0, 1]]),
            np.vstack([after, np.eye(n - 1)[-1]]).T)


def padded_size(size: int, stride: int, align_corners: bool = True) -> int:
    """Return the least side, not below a size, at which features lie evenly.

    With aligned corners that is a multiple of the stride plus 1, and a feature lies on
    every stride-th pixel exactly; without them a multiple, and each feature is taken to
    lie in the middle of its block of pixels.
    """
    edge = 1 if align_corners else 0
    return (size + stride - 1 - edge) // stride * stride + edge  # ONNX: -1 // 2 is 0


@torch.inference_mode()
def predict_logits(net: nn.Module, image: Tensor) -> Tensor:
    """Return the logits of one image at its own size, plainly (FACTS: single scale).

    The image is padded right and bottom with the mean, which is 0 after normalising, to
    its padded_size; the padding is cut off again. A Predictor gives the same, faster,
    and more.

    Args:
        net: a Segmenter in evaluation mode.
        image: (3, h, w) uint8, on any device.

    Returns:
        (classes, h, w) float32 on the network's device.
    """
    h, w = image.shape[1:]
    x = net.normalise(image[None].to(net.mean.device))
    right, bottom = (padded_size(n, net.stride, net.align_corners) - n for n in (w, h))
    x = F.pad(x, (0, right, 0, bottom))
    return net(x)[0, :, :h, :w]


def places(size: int, window: int, step: float) -> list[int]:
    """Return where windows begin so that they cover a side, the last one at its end.

    Args:
        size: pixels of the side.
        window: pixels of a window; 0, or no less than `size`, is one for all.
        step: share of the window from one to the next, at most; they stand evenly.
    """
    if not 0 < window < size:
        return [0]
    n = -(-(size - window) // max(int(window * step), 1)) + 1
    return [round(i * (size - window) / (n - 1)) for i in range(n)]


def cut_windows(size: tuple[int, int], window: tuple[int, int], step: float
                ) -> list[tuple[slice, slice]]:
    """Return the windows (rows, columns) that cover an image of a size: see places."""
    sides = []
    for n, side in zip(size, window, strict=True):
        side_or_all = side if 0 < side < n else n
        sides.append([slice(start, start + side_or_all)
                      for start in places(n, side, step)])
    return [(rows, columns) for rows in sides[0] for columns in sides[1]]


class Predictor:
    """Predicts the classes of images with one network or several.

    An image is seen at every scale, as it is and mirrored if wanted, whole or by
    windows. Of each such view the padding, right and bottom with the mean (FACTS:
    single scale), is cut off again; the probabilities are averaged over windows and
    mirror images at the view's size, then over scales at the image's own.

    Every result has a first dimension v, the variants: the networks one after another,
    and of each the numbers of iterations, if its unit was given several.

    Args:
        nets: Segmenters in evaluation mode; they are folded, so are of no other use.
        device: where to compute.
        precision: fp32, bf16 or fp16.
        scales: of the image's sides.
        use_flip: see every view mirrored too, left to right.
        window: (h, w) in pixels of sliding windows over the scaled image; 0 is all.
        step: share of a window's side from one window to the next, at most.
        batch: views of like size that are computed together, at most.
        channels_last: memory order of the convolutions' tensors.
        is_compiled: by torch.compile.
        is_averaged: give the mean over all variants as the only one.
        has_winograd: on CPUs, compute convolutions by fewer products where it pays.
    """

    def __init__(self, nets: Sequence[nn.Module], device: torch.device | str = 'cpu',
                 precision: str = 'fp32', scales: Sequence[float] = (1.0,),
                 use_flip: bool = False, window: tuple[int, int] = (0, 0),
                 step: float = 2 / 3, batch: int = 1, channels_last: bool = True,
                 is_compiled: bool = False, is_averaged: bool = False,
                 has_winograd: bool = True):
        has_winograd &= torch.device(device).type == 'cpu' and precision != 'fp16'
        self.nets = [fold(net, precision, has_winograd).to(device) for net in nets]
        if channels_last:
            for net in self.nets:
                net.to(memory_format=torch.channels_last)
        self.runs = [torch.compile(net, dynamic=True) if is_compiled else net
                     for net in self.nets]
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
            found = [self.look(net, run, images)
                     for net, run in zip(self.nets, self.runs, strict=True)]
            return [self.average(torch.cat(variants))
                    for variants in zip(*found, strict=True)]

    def predict_labels(self, images: list[Tensor]) -> list[Tensor]:
        """Return the most probable classes of images at their own sizes.

        Args:
            images: (3, h, w) uint8 each, on any device.

        Returns:
            For each image (v, h, w) int64, on the predictor's device.
        """
        is_plain = self.scales == (1.0,) and not self.use_flip and not (
            self.is_averaged or any(self.window))
        if not is_plain:
            return [found.argmax(1) for found in self.predict(images)]
        with torch.inference_mode(), self.autocast():  # logits will do
            found = [self.score(net, run, [net.normalise(self.fetch(image)[None])
                                           for image in images])
                     for net, run in zip(self.nets, self.runs, strict=True)]
            return [torch.cat([one.argmax(1) for one in variants])
                    for variants in zip(*found, strict=True)]

    def predict_blocks(self, image: Tensor, n_pixels: int, margin: int
                       ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Predict an image that is too large for the memory, a block at a time.

        Args:
            image: (3, h, w) uint8.
            n_pixels: of a block, its margins included, at most (but no side of a block
                is less than four margins).
            margin: pixels around a block that are predicted with it and not returned;
                it is rounded up to the stride, and blocks begin at multiples of it, so
                that at scale 1 the features lie where they lie in the whole image.

        Yields:
            (rows, columns, probabilities): a place of the image, each pixel of it in
            one block only, and (v, classes, rows, columns). An image of no more than
            n_pixels is one block.
        """
        h, w = image.shape[1:]
        if h * w <= n_pixels:
            yield slice(0, h), slice(0, w), self.predict([image])[0]
            return
        stride = max(net.stride for net in self.nets)
        margin = -(-margin // stride) * stride
        least = 4 * margin
        width = min(w, max(int(n_pixels ** 0.5), n_pixels // h, least))
        height = min(h, max(n_pixels // width, least))
        edges = [cut_blocks(h, height, margin, stride),
                 cut_blocks(w, width, margin, stride)]
        for top, bottom in edges[0]:
            for left, right in edges[1]:
                y, x = max(top - margin, 0), max(left - margin, 0)
                part = image[:, y:bottom + margin, x:right + margin]
                found = self.predict([part])[0]
                yield (slice(top, bottom), slice(left, right),
                       found[..., top - y:bottom - y, left - x:right - x])

    # -- one network -------------------------------------------------------------------

    def fetch(self, image: Tensor) -> Tensor:
        """Bring an image to the device."""
        return image.to(self.device, non_blocking=self.device.type == 'cuda')

    def look(self, net: nn.Module, run: nn.Module, images: list[Tensor]
             ) -> list[Tensor]:
        """Return (v, classes, h, w) probabilities of images by one network."""
        whole = [net.normalise(self.fetch(image)[None]) for image in images]
        plans = [list(Counter(scaled_size(image.shape[1:], scale)
                              for scale in self.scales).items())
                 for image in images]  # (size, times) each: small images repeat one
        means, n_seen = [None] * len(images), [0] * len(images)
        for turn in range(max(map(len, plans))):
            todo = [i for i, plan in enumerate(plans) if turn < len(plan)]
            found = self.look_once(net, run, [resize(whole[i], plans[i][turn][0])
                                              for i in todo])
            for i, new in zip(todo, found, strict=True):
                new = resize(new, images[i].shape[1:])
                n = plans[i][turn][1]
                n_seen[i] += n
                # this running mean is exact where all are equal
                means[i] = new if turn == 0 else means[i].lerp_(new, n / n_seen[i])
        return means

    def look_once(self, net: nn.Module, run: nn.Module, views: list[Tensor]
                  ) -> list[Tensor]:
        """Return the probabilities of views (1, 3, h, w) at their size, of windows and
        mirror images averaged."""
        windows = [cut_windows(view.shape[2:], self.window, self.step)
                   for view in views]
        if len(views) > 1 and max(map(len, windows)) > 1:  # each fills batches itself
            return [self.look_once(net, run, [view])[0] for view in views]
        parts = [view[:, :, rows, columns] for view, cuts in
                 zip(views, windows, strict=True) for rows, columns in cuts]
        if self.use_flip:
            parts += [part.flip(3) for part in parts]
        found = self.score(net, run, parts)
        for i, part in enumerate(found):  # one by one: all of them are large
            found[i] = part.softmax(1)
        if self.use_flip:
            half = len(found) // 2
            found = [(a + b.flip(3)) / 2
                     for a, b in zip(found[:half], found[half:], strict=True)]
        found, results = iter(found), []
        for view, cuts in zip(views, windows, strict=True):
            if len(cuts) == 1:
                results.append(next(found))
                continue
            some = [next(found) for _ in cuts]
            total = some[0].new_zeros(*some[0].shape[:2], *view.shape[2:])
            counts = total.new_zeros(view.shape[2:])
            for (rows, columns), part in zip(cuts, some, strict=True):
                total[:, :, rows, columns] += part
                counts[rows, columns] += 1
            results.append(total.div_(counts))
        return results

    def score(self, net: nn.Module, run: nn.Module, views: list[Tensor]
              ) -> list[Tensor]:
        """Return the logits (v, classes, h, w) of normalised views (1, 3, h, w).

        Views that are padded to the same size are computed together: each is what it
        would be alone, because EM sees the padding.
        """
        groups = {}
        for i, view in enumerate(views):
            size = tuple(padded_size(n, net.stride, net.align_corners)
                         for n in view.shape[2:])
            groups.setdefault(size, []).append(i)
        results: list[Tensor] = [None] * len(views)
        for (height, width), members in groups.items():
            for first in range(0, len(members), self.batch):
                chosen = members[first:first + self.batch]
                batch = torch.cat([
                    F.pad(views[i], (0, width - views[i].shape[3],
                                     0, height - views[i].shape[2])) for i in chosen])
                logits = run(batch).unflatten(0, (-1, len(chosen)))
                for j, i in enumerate(chosen):
                    h, w = views[i].shape[2:]
                    results[i] = logits[:, j, :, :h, :w]           # (v, classes, h, w)
        return results

    def average(self, found: Tensor) -> Tensor:
        """Return (v, classes, h, w), or its mean over v where that is wanted."""
        if not self.is_averaged:
            return found
        mean = found[0]
        for i, other in enumerate(found[1:], 2):
            mean = mean.lerp(other, 1 / i)  # exact where all are equal
        return mean[None]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate (b, c, h, w) linearly to a size, pixel centres at halves as in
    training; of its own size it stays itself."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode='bilinear')


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """Return the sides of a scaled image, at least 1 pixel each."""
    return tuple(max(round(n * scale), 1) for n in size)


def cut_blocks(size: int, block: int, margin: int, stride: int
               ) -> list[tuple[int, int]]:
    """Return (first, last + 1) of the parts of a side, each at most `block` with its
    margins, of about equal size, and beginning at multiples of the stride."""
    most = (block - 2 * margin) // stride * stride
    n = 1 if block >= size else -(-size // most)
    step = -(-size // n // stride) * stride
    return [(first, min(first + step, size)) for first in range(0, size, step)]
