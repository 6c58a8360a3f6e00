"""Other segmentation heads, called exactly as the EMA head, chosen by HEAD.

    python train.py HEAD=deeplabv3              # the same backbone, recipe and loop
    python measure.py table1                    # what each of them costs

A head takes the list of the backbone's four features and returns logits (b, classes,
h/os, w/os), those of DeepLabV3+ are (b, classes, h/4, w/4). Each is built as its
authors published it; its docstring says where it is not. Attention is computed in at
least float32, as EM is.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import ConvBNReLU
from emau import at_least_float32, disable_autocast


def resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Resize features (b, c, h, w) bilinearly."""
    return F.interpolate(x, size, mode='bilinear', align_corners=align_corners)


# -- convolutions ----------------------------------------------------------------------

class FCNHead(nn.Module):
    """A 3x3 convolution, dropout and the classifier, on one level of the features.

    On layer4 it is the plain network that all others are to beat, on layer3 the
    auxiliary head that mmsegmentation trains beside others.

    Args:
        in_channels: channels of each level of the features.
        n_classes: of the logits.
        level: index of the features it looks at, -1 is layer4.
        channels: of the 3x3 convolution.
        dropout: share of its channels dropped while training.
        bn_momentum: of its batch norm.
    """

    def __init__(self, in_channels: list[int], n_classes: int, level: int = -1,
                 channels: int = 256, dropout: float = 0.1, bn_momentum: float = 3e-4):
        super().__init__()
        self.level = level
        self.conv = ConvBNReLU(in_channels[level], channels, 3, bn_momentum=bn_momentum)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, n_classes, 1)

    def forward(self, feats: list[Tensor]) -> Tensor:
        """Four features of the backbone -> logits (b, classes, h', w') of its level."""
        return self.classifier(self.dropout(self.conv(feats[self.level])))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al., 2017, section 3.3).

    A 1x1 convolution, three 3x3 ones of growing dilation and the mean of the image,
    each with batch norm, side by side; a 1x1 convolution joins them.

    Args:
        in_channels: channels of the features.
        channels: of each branch and of the output.
        stride: pixels of the image per feature. The dilations are 6, 12 and 18 at 16
            and twice that at 8.
        bn_momentum: of every batch norm.
    """

    def __init__(self, in_channels: int, channels: int, stride: int,
                 bn_momentum: float):
        super().__init__()
        self.branches = nn.ModuleList([
            ConvBNReLU(in_channels, channels, 1, bn_momentum=bn_momentum),
            *(ConvBNReLU(in_channels, channels, 3, rate * 16 // stride, bn_momentum)
              for rate in (6, 12, 18))])
        self.pool = ConvBNReLU(in_channels, channels, 1, bn_momentum=bn_momentum)
        self.project = ConvBNReLU(5 * channels, channels, 1, bn_momentum=bn_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, channels, h, w)."""
        mean = self.pool(x.mean((2, 3), keepdim=True))
        return self.project(torch.cat([*(branch(x) for branch in self.branches),
                                       mean.expand(-1, -1, *x.shape[2:])], 1))


class DeepLabV3Head(nn.Module):
    """ASPP and the classifier (Chen et al., 2017: DeepLabV3).

    Args:
        in_channels: channels of each level of the features.
        n_classes: of the logits.
        stride: pixels of the image per feature.
        channels: of ASPP's branches.
        dropout: share of the last features' channels dropped while training.
        bn_momentum: of every batch norm.
    """

    def __init__(self, in_channels: list[int], n_classes: int, stride: int,
                 channels: int = 256, dropout: float = 0.1, bn_momentum: float = 3e-4):
        super().__init__()
        self.aspp = ASPP(in_channels[-1], channels, stride, bn_momentum)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, n_classes, 1)

    def forward(self, feats: list[Tensor]) -> Tensor:
        """Four features of the backbone -> logits (b, classes, h/os, w/os)."""
        return self.classifier(self.dropout(self.aspp(feats[-1])))


class DeepLabV3PlusHead(nn.Module):
    """ASPP, joined with the features of stride 4 (Chen et al., 2018: DeepLabV3+).

    The features of layer1 are reduced to 48 channels and stand beside ASPP's upsampled
    output; two 3x3 convolutions and the classifier follow at stride 4.

    Args:
        align_corners: of the upsampling of ASPP's output; True is the rule of the
            whole network here.
        others: as those of DeepLabV3Head.
    """

    def __init__(self, in_channels: list[int], n_classes: int, stride: int,
                 channels: int = 256, dropout: float = 0.1, bn_momentum: float = 3e-4,
                 align_corners: bool = True):
        super().__init__()
        self.align_corners = align_corners
        self.aspp = ASPP(in_channels[-1], channels, stride, bn_momentum)
        self.reduce = ConvBNReLU(in_channels[0], 48, 1, bn_momentum=bn_momentum)
        self.refine = nn.Sequential(
            ConvBNReLU(channels + 48, channels, 3, bn_momentum=bn_momentum),
            ConvBNReLU(channels, channels, 3, bn_momentum=bn_momentum))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, n_classes, 1)

    def forward(self, feats: list[Tensor]) -> Tensor:
        """Four features of the backbone -> logits (b, classes, h/4, w/4)."""
        fine = self.reduce(feats[0])                               # (b, 48, h/4, w/4)
        x = resize(self.aspp(feats[-1]), fine.shape[2:], self.align_corners)
        x = self.refine(torch.cat([x, fine], 1))
        return self.classifier(self.dropout(x))


# -- point-wise spatial attention ------------------------------------------------------

class PSABranch(nn.Module):
    """One direction of PSANet: the pixels' features, and what each asks of the others.

    Args:
        in_channels: channels of the features.
        grid: rows and columns that attention works on.
        channels: of what is passed on.
        bn_momentum: of every batch norm.
        align_corners: of the resizing to the grid.
    """

    def __init__(self, in_channels: int, grid: tuple[int, int], channels: int,
                 bn_momentum: float, align_corners: bool):
        super().__init__()
        self.grid, self.align_corners = grid, align_corners
        n_offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.reduce = ConvBNReLU(in_channels, channels, 1, bn_momentum=bn_momentum)
        self.attend = nn.Sequential(
            ConvBNReLU(channels, channels, 1, bn_momentum=bn_momentum),
            nn.Conv2d(channels, n_offsets, 1, bias=False))

    def forward(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and attention.

        Args:
            x: (b, in_channels, h, w).
            indices: (n * n,) see PSAHead.

        Returns:
            (b, channels, n) and (b, n, n), n = rows * columns of the grid; [:, j, i] is
            what pixel i gives to pixel j, before the softmax.
        """
        x = resize(self.reduce(x), self.grid, self.align_corners)  # (b, c, rows, cols)
        n = self.grid[0] * self.grid[1]
        maps = self.attend(x).flatten(1)                           # (b, offsets * n)
        weights = maps.index_select(1, indices).unflatten(1, (n, n))
        return x.flatten(2), weights


class PSAHead(nn.Module):
    """Bi-directional point-wise spatial attention (Zhao et al., 2018: PSANet).

    Each pixel predicts a weight for every offset around it, and so for every pixel of
    the image. Collect: a pixel gathers the others by its own weights; distribute: it is
    given the others by theirs. Both, projected, stand beside the features.

    Its authors halve the features' sides, so that crops of one size fit the predicted
    offsets. Here: the features are resized to a fixed grid, by default what the halving
    makes of 513x513 crops at stride 8, because images of any size and either output
    stride shall be evaluated by it.

    Args:
        in_channels: channels of each level of the features.
        n_classes: of the logits.
        grid: rows and columns that attention works on.
        channels: of what is passed on, and of the last convolution.
        dropout: share of the last features' channels dropped while training.
        bn_momentum: of every batch norm.
        concat: concatenate the features with the attention's output. Without it the
            head costs what Table 1 of the EMANet paper says of PSANet.
        align_corners: of the resizing to the grid and back.
    """

    def __init__(self, in_channels: list[int], n_classes: int,
                 grid: tuple[int, int] = (33, 33), channels: int = 512,
                 dropout: float = 0.1, bn_momentum: float = 3e-4, concat: bool = True,
                 align_corners: bool = True):
        super().__init__()
        self.concat, self.align_corners = concat, align_corners
        last = in_channels[-1]
        self.collect = PSABranch(last, grid, channels, bn_momentum, align_corners)
        self.distribute = PSABranch(last, grid, channels, bn_momentum, align_corners)
        self.project = ConvBNReLU(2 * channels, last, 1, bn_momentum=bn_momentum)
        self.conv = ConvBNReLU(2 * last if concat else last, channels, 3,
                               bn_momentum=bn_momentum)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, n_classes, 1)
        # For each pair (j, i) of pixels: the index of the weight that pixel i predicts
        # for pixel j among its weights for all offsets.
        rows, columns = grid
        y, x = torch.arange(rows), torch.arange(columns)
        y, x = y[:, None] - y + rows - 1, x[:, None] - x + columns - 1  # [j, i]
        offsets = y[:, None, :, None] * (2 * columns - 1) + x[None, :, None, :]
        n = rows * columns
        indices = offsets.reshape(n, n) * n + torch.arange(n)
        self.register_buffer('indices', indices.flatten(), persistent=False)

    @staticmethod
    def mix(x: Tensor, weights: Tensor) -> Tensor:
        """Mix pixels x (b, c, n) by weights (b, n, n), each column's after a softmax.
        """
        with disable_autocast(x.device.type):
            return at_least_float32(x) @ at_least_float32(weights).softmax(1)

    def forward(self, feats: list[Tensor]) -> Tensor:
        """Four features of the backbone -> logits (b, classes, h/os, w/os)."""
        x = feats[-1]
        values, weights = self.collect(x, self.indices)
        collected = self.mix(values, weights)                      # (b, c, n)
        values, weights = self.distribute(x, self.indices)
        distributed = self.mix(values, weights.transpose(1, 2))    # (b, c, n)
        both = torch.cat([collected, distributed], 1).unflatten(2, self.collect.grid)
        both = self.project(both.to(x.dtype))                # (b, in_channels, r, c)
        both = resize(both, x.shape[2:], self.align_corners)
        x = torch.cat([x, both], 1) if self.concat else both
        return self.classifier(self.dropout(self.conv(x)))


# -- units that take the EM attention unit's place -------------------------------------

class NonLocal(nn.Module):
    """The Non-local block with embedded Gaussian (Wang et al., 2018; figure 2).

    Every pixel is the mixture of all pixels like it: EM attention whose bases are the
    pixels themselves, without A_M and with one iteration (EMANet, section 6.2.2).

    Args:
        channels: of the input and of the output; inside there are half as many.
        bn_momentum: of the batch norm, which starts at zero as its authors have it.
    """

    def __init__(self, channels: int, bn_momentum: float = 0.1):
        super().__init__()
        n = max(channels // 2, 1)
        self.query = nn.Conv2d(channels, n, 1)
        self.key = nn.Conv2d(channels, n, 1)
        self.value = nn.Conv2d(channels, n, 1)
        self.out = nn.Sequential(nn.Conv2d(n, channels, 1, bias=False),
                                 nn.BatchNorm2d(channels, momentum=bn_momentum))
        nn.init.zeros_(self.out[1].weight)

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix the values by how like their keys are to each query.

        Args:
            query, key: (b, n, c) and (b, m, c).
            value: (b, m, d).

        Returns:
            (b, n, d).
        """
        return F.softmax(query @ key.transpose(1, 2), 2) @ value

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) -> the same."""
        query, key, value = (layer(x).flatten(2).transpose(1, 2)   # (b, n, c/2)
                             for layer in (self.query, self.key, self.value))
        with disable_autocast(x.device.type):
            y = self.attend(*map(at_least_float32, (query, key, value))).to(x.dtype)
        return x + self.out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class DoubleAttention(nn.Module):
    """The A2 block (Chen et al., 2018; eq. 16 of the EMANet paper).

    Gather: each of k maps, a softmax over the pixels, sums the features up into one
    vector. Distribute: each pixel is a mixture of these vectors, a softmax over them.

    Args:
        channels: of the input and of the output; the features that are gathered are a
            quarter of them.
        bases: k; its authors take a quarter of the channels here too, we as many as the
            EM attention unit has.
        bn_momentum: of the batch norm.
    """

    def __init__(self, channels: int, bases: int = 64, bn_momentum: float = 0.1):
        super().__init__()
        if bases < 1:
            raise ValueError(f'N_BASES={bases}: the A2 block needs 1 or more maps')
        n = max(channels // 4, 1)
        self.phi = nn.Conv2d(channels, n, 1)
        self.theta = nn.Conv2d(channels, bases, 1)
        self.rho = nn.Conv2d(channels, bases, 1)
        self.out = nn.Sequential(nn.Conv2d(n, channels, 1, bias=False),
                                 nn.BatchNorm2d(channels, momentum=bn_momentum))

    @staticmethod
    def gather(x: Tensor, theta: Tensor) -> Tensor:
        """Sum the features up: x (b, n, c), theta (b, n, k) -> (b, c, k)."""
        return x.transpose(1, 2) @ F.softmax(theta, 1)

    @staticmethod
    def distribute(mu: Tensor, rho: Tensor) -> Tensor:
        """Mix what was gathered: mu (b, c, k), rho (b, n, k) -> (b, n, c)."""
        return F.softmax(rho, 2) @ mu.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) -> the same."""
        phi, theta, rho = (layer(x).flatten(2).transpose(1, 2)     # (b, n, c or k)
                           for layer in (self.phi, self.theta, self.rho))
        with disable_autocast(x.device.type):
            phi, theta, rho = map(at_least_float32, (phi, theta, rho))
            y = self.distribute(self.gather(phi, theta), rho).to(x.dtype)
        return x + self.out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class UnitHead(nn.Module):
    """The EM attention head with another unit: fc0, unit, fc1, dropout, classifier.

    Args:
        in_channels: channels of each level of the features.
        n_classes: of the logits.
        unit: (b, channels, h, w) -> the same.
        channels: of fc0 and the unit.
        fc1_channels: of fc1; 0 leaves fc1 and its dropout out.
        dropout: share of fc1's channels dropped while training.
        bn_momentum: of every batch norm.
    """

    def __init__(self, in_channels: list[int], n_classes: int, unit: nn.Module,
                 channels: int, fc1_channels: int = 256, dropout: float = 0.1,
                 bn_momentum: float = 3e-4):
        super().__init__()
        self.fc0 = ConvBNReLU(in_channels[-1], channels, 3, bn_momentum=bn_momentum)
        self.unit = unit
        self.fc1 = (ConvBNReLU(channels, fc1_channels, 3, bn_momentum=bn_momentum)
                    if fc1_channels else nn.Identity())
        self.dropout = nn.Dropout2d(dropout if fc1_channels else 0.0)
        self.classifier = nn.Conv2d(fc1_channels or channels, n_classes, 1)

    def forward(self, feats: list[Tensor]) -> Tensor:
        """Four features of the backbone -> logits (b, classes, h/os, w/os)."""
        x = self.unit(self.fc0(feats[-1]))
        return self.classifier(self.dropout(self.fc1(x)))
