"""The dilated ResNets.

    from backbone import ResNet
    feats = ResNet(50, stem='plain', stride=16)(images)[-1]   # (b, 2048, h/16, w/16)

The modules are named as in torchvision and in PyTorch-Encoding, so that the ImageNet
weights of either load without renaming: conv1, bn1, layer1 .. layer4. The blocks are
torchvision's, written out because the dilation and the momentum of the statistics are
chosen for each block.
"""
import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3),
          152: (3, 8, 36, 3)}
STEMS = {'deep': (64, 64, 128), 'v1c': (32, 32, 64), 'plain': (64,)}  # channels


class ConvBNReLU(nn.Module):
    """A convolution without bias that keeps the size, batch norm and ReLU.

    Args:
        in_channels, out_channels: channels.
        kernel: side of the kernel, odd.
        dilation: of the kernel.
        bn_momentum: share of the new batch in the running statistics.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3,
                 dilation: int = 1, bn_momentum: float = 0.1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel,
                              padding=kernel // 2 * dilation, dilation=dilation,
                              bias=False)
        self.bn = nn.BatchNorm2d(out_channels, momentum=bn_momentum)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, out_channels, h, w), not negative."""
        return self.relu(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity: the block of depths 18 and 34."""
    expansion = 1

    def __init__(self, in_channels, width, stride, dilation, downsample, bn_momentum):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, dilation, dilation,
                               bias=False)
        self.bn1 = nn.BatchNorm2d(width, momentum=bn_momentum)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width, momentum=bn_momentum)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)).add_(identity))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride and the dilation), 1x1, beside the identity."""
    expansion = 4

    def __init__(self, in_channels, width, stride, dilation, downsample, bn_momentum):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, momentum=bn_momentum)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width, momentum=bn_momentum)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4, momentum=bn_momentum)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)).add_(identity))


class ResNet(nn.Module):
    """ResNet whose last layers are dilated instead of strided.

    Args:
        n_layers: 18, 34, 50, 101 or 152.
        stem: 'deep', three 3x3 convolutions of 64, 64 and 128 channels, 'v1c', of 32,
            32 and 64 (mmsegmentation's ResNetV1c), or 'plain', one 7x7 of 64.
        stride: pixels of the image per feature of layer4, 8 or 16.
        multi_grid: factors of the dilation of layer4's blocks; as many as there are
            blocks are used.
        bn_momentum: share of the new batch in the running statistics.
        recompute: activation checkpointing of each block: less memory, the same
            gradients.

    Raises:
        ValueError: for another depth, stem or stride, or too short a multi_grid.
    """

    def __init__(self, n_layers: int = 101, stem: str = 'deep', stride: int = 8,
                 multi_grid: Sequence[int] = (1, 2, 4), bn_momentum: float = 3e-4,
                 recompute: bool = False):
        super().__init__()
        # checkpointed blocks stay out of a compiled graph
        self.checkpoint = torch.compiler.disable(checkpoint) if recompute else None
        if n_layers not in BLOCKS:
            raise ValueError(f'no ResNet has {n_layers} layers here: choose one of '
                             f'{", ".join(map(str, BLOCKS))}')
        if stem not in STEMS:
            raise ValueError(f"the stem is 'deep', 'v1c' or 'plain', not {stem!r}")
        if stride not in (8, 16):
            raise ValueError(f'the output stride is 8 or 16, not {stride}')
        blocks = BLOCKS[n_layers]
        if len(multi_grid) < blocks[3]:
            raise ValueError(f'multi_grid has {len(multi_grid)} factors, layer4 of '
                             f'ResNet-{n_layers} has {blocks[3]} blocks: give a factor '
                             'for each')
        self.block = BasicBlock if n_layers < 50 else Bottleneck
        self.n_layers, self.stem, self.bn_momentum = n_layers, stem, bn_momentum
        self.conv1 = self._make_stem()
        self.in_channels = STEMS[stem][-1]  # of the next layer, while they are built
        self.bn1 = nn.BatchNorm2d(self.in_channels, momentum=bn_momentum)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

        # The first block of a dilated layer keeps half its rate: its features come
        # from the layer before, which is not dilated as much.
        rate3, rate4 = (2, 4) if stride == 8 else (1, 2)
        dilations3 = [max(rate3 // 2, 1)] + [rate3] * (blocks[2] - 1)
        dilations4 = [rate4 * grid for grid in multi_grid[:blocks[3]]]
        dilations4[0] = max(dilations4[0] // 2, 1)
        self.layer1 = self._make_layer(64, 1, [1] * blocks[0])
        self.layer2 = self._make_layer(128, 2, [1] * blocks[1])
        self.layer3 = self._make_layer(256, 1 if stride == 8 else 2, dilations3)
        self.layer4 = self._make_layer(512, 1, dilations4)
        self.channels = [width * self.block.expansion for width in (64, 128, 256, 512)]
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    def _make_stem(self):
        if self.stem == 'plain':
            return nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        one, two, three = STEMS[self.stem]
        return nn.Sequential(
            nn.Conv2d(3, one, 3, 2, 1, bias=False),
            nn.BatchNorm2d(one, momentum=self.bn_momentum), nn.ReLU(inplace=True),
            nn.Conv2d(one, two, 3, 1, 1, bias=False),
            nn.BatchNorm2d(two, momentum=self.bn_momentum), nn.ReLU(inplace=True),
            nn.Conv2d(two, three, 3, 1, 1, bias=False))

    def _make_layer(self, width, stride, dilations):
        layer, out_channels = [], width * self.block.expansion
        for i, dilation in enumerate(dilations):
            downsample = None
            if i == 0 and (stride != 1 or self.in_channels != out_channels):
                downsample = nn.Sequential(
                    nn.Conv2d(self.in_channels, out_channels, 1, stride, bias=False),
                    nn.BatchNorm2d(out_channels, momentum=self.bn_momentum))
            layer.append(self.block(self.in_channels, width, stride if i == 0 else 1,
                                    dilation, downsample, self.bn_momentum))
            self.in_channels = out_channels
        return nn.Sequential(*layer)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of layer1 .. layer4.

        Args:
            x: (b, 3, h, w) normalised images.

        Returns:
            Four tensors (b, self.channels[i], h/s, w/s): s is 4, 8, then 8 or 16, the
            last two alike; a size that does not divide is rounded up.
        """
        # ReLU after the pooling, on a quarter of the pixels: the result is the same
        x = self.relu(self.maxpool(self.bn1(self.conv1(x))))  # (b, 64 or 128, h/4, w/4)
        feats = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                if self.checkpoint and torch.is_grad_enabled():
                    contexts = functools.partial(checkpoint_contexts, block)
                    x = self.checkpoint(block, x, use_reentrant=False,
                                        preserve_rng_state=False, context_fn=contexts)
                else:
                    x = block(x)
            feats.append(x)
        return feats


def checkpoint_contexts(block: nn.Module) -> tuple:
    """Return the contexts of a block's forward pass and of its recomputation."""
    return contextlib.nullcontext(), frozen_statistics(block)


@contextlib.contextmanager
def frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms as they are."""
    norms = [(m, m.momentum, m.num_batches_tracked.clone()) for m in block.modules()
             if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    for norm, _, _ in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
