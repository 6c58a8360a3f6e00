"""Heads beside the EMA head, each called exactly as it is: features -> logits.

    head = FCNHead([256, 512, 1024, 2048], 21, level=2)
    logits = head(backbone(images))                    # (b, 21, h/os, w/os)
"""
from collections.abc import Sequence

from torch import Tensor, nn

from backbone import ConvBNReLU


class FCNHead(nn.Module):
    """A 3x3 convolution, dropout and the classifier, on one level of the features.

    On layer3 it is the auxiliary head that mmsegmentation trains beside others.

    Args:
        n_in: channels of each level of the features.
        n_classes: of the logits.
        level: index of the features it looks at, -1 is layer4.
        channels: of the 3x3 convolution.
        dropout: share of its channels dropped while training.
        bn_momentum: of its batch norm.
    """

    def __init__(self, n_in: Sequence[int], n_classes: int, level: int = -1,
                 channels: int = 256, dropout: float = 0.1, bn_momentum: float = 3e-4):
        super().__init__()
        self.level = level
        self.conv = ConvBNReLU(n_in[level], channels, 3, bn_momentum=bn_momentum)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, n_classes, 1)

    def forward(self, feats: list[Tensor]) -> Tensor:
        """Four features of the backbone -> logits (b, classes, h', w') of its level."""
        return self.classify(self.dropout(self.conv(feats[self.level])))
