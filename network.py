"""The EMA head, and the network that is trained: backbone, head and loss.

    from network import build
    logits = build(n_classes=21, is_eval=True)(images)   # (b, 3, h, w) uint8
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heads
import settings
from backbone import ConvBNReLU, ResNet
from config import UserError, format_value
from emau import EMAU, at_least_float32, disable_autocast
from losses import PixelLoss


class EMAHead(nn.Module):
    """fc0, the EM attention unit, fc1 with dropout, and the classifier.

    Args:
        in_channels: channels of the backbone's last features.
        n_classes: of the logits.
        channels: of fc0 and the unit.
        fc1_channels: of fc1; 0 leaves fc1 and its dropout out (the paper's Table 1).
        dropout: share of fc1's channels dropped while training.
        bn_momentum: of every batch norm.
        concat: concatenate fc1's features with the backbone's and apply one more
            convolution before the classifier, as in mmsegmentation's EMAHead.
        unit: the other arguments of EMAU.
    """

    def __init__(self, in_channels: int, n_classes: int, channels: int = 512,
                 fc1_channels: int = 256, dropout: float = 0.1,
                 bn_momentum: float = 3e-4, concat: bool = False, **unit):
        super().__init__()
        self.fc0 = ConvBNReLU(in_channels, channels, 3, bn_momentum=bn_momentum)
        self.emau = EMAU(channels, bn_momentum=bn_momentum, **unit)
        self.fc1 = (ConvBNReLU(channels, fc1_channels, 3, bn_momentum=bn_momentum)
                    if fc1_channels else nn.Identity())
        out_channels = fc1_channels or channels
        self.conv_cat = None
        if concat:
            self.conv_cat = ConvBNReLU(in_channels + out_channels, out_channels, 3,
                                       bn_momentum=bn_momentum)
        self.dropout = nn.Dropout2d(dropout if fc1_channels else 0.0)
        self.classifier = nn.Conv2d(out_channels, n_classes, 1)

    def forward(self, feats: list[Tensor]) -> Tensor:
        """Four features of the backbone -> logits (b, classes, h/os, w/os)."""
        x = self.fc1(self.emau(self.fc0(feats[-1])))
        if self.conv_cat is not None:
            last = feats[-1]
            n_outputs = len(self.emau.output_stages())
            if n_outputs > 1:
                last = last.repeat(n_outputs, 1, 1, 1)
            x = self.conv_cat(torch.cat([last, x], 1))
        return self.classifier(self.dropout(x))

    def responsibilities(self, feats: list[Tensor]) -> Tensor:
        """Four features of the backbone -> z of each iteration (t, b, k, h/os, w/os).
        """
        x = self.fc0(feats[-1])
        zs = torch.stack(self.emau(x, return_z=True)[1])           # (t, b, n, k)
        return zs.transpose(2, 3).unflatten(3, x.shape[2:])

    def update_bases(self, is_finite: Tensor | bool = True) -> None:
        """Move the unit's bases after a whole batch: see EMAU.update_bases."""
        self.emau.update_bases(is_finite)


def upsample(logits: Tensor, size: tuple[int, int], align_corners: bool = True
             ) -> Tensor:
    """Upsample logits (b, classes, h', w') to (h, w), in at least float32."""
    return F.interpolate(at_least_float32(logits), size, mode='bilinear',
                         align_corners=align_corners)


class Segmenter(nn.Module):
    """Backbone, head and loss: from the bytes of an image to its logits.

    Args:
        backbone: images (b, 3, h, w) -> list of features.
        head: list of features -> logits (b, classes, h/os, w/os).
        stride: os, pixels of the image per feature.
        mean, std: of the pixels in 0..1, for each of red, green and blue.
        loss: (logits, labels, align_corners) -> (b,), the sum over each image's valid
            pixels; it upsamples the logits (b, classes, h/os, w/os) to the labels
            (b, h, w). None is the plain cross-entropy.
        aux: auxiliary head, training only.
        aux_weight: of its loss.
        align_corners: of the logits' upsampling. If True, use images with sides of
            k * stride + 1 pixels; if False, k * stride.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, stride: int,
                 mean: tuple[float, ...], std: tuple[float, ...],
                 loss: nn.Module | None = None, aux: nn.Module | None = None,
                 aux_weight: float = 0.0, align_corners: bool = True):
        super().__init__()
        self.backbone, self.head, self.stride = backbone, head, stride
        self.loss, self.aux, self.aux_weight = loss or PixelLoss(), aux, aux_weight
        self.align_corners = align_corners
        self.pixels = {'mean': mean, 'std': std}
        for name in self.pixels:
            self.register_buffer(name, torch.zeros(1, 3, 1, 1), False)
        self._apply(lambda tensor: tensor)

    def _apply(self, fn, *args, **kwargs):
        """Cast and move as any module does; compute mean and std again, unrounded."""
        super()._apply(fn, *args, **kwargs)
        for name, values in self.pixels.items():
            old = getattr(self, name)
            new = torch.tensor([255 * v for v in values], dtype=torch.float64)
            setattr(self, name, new.to(old.dtype).to(old.device).view(1, 3, 1, 1))
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """Bytes (b, 3, h, w) uint8 -> floats of mean 0 and deviation 1."""
        # contiguous planes: broadcasting to interleaved channels is slow
        images = images.contiguous().to(self.mean.dtype, copy=True)
        return images.sub_(self.mean).div_(self.std)

    def forward(self, images: Tensor, labels: Tensor | None = None
                ) -> Tensor | tuple[Tensor, Tensor]:
        """Segment images, and compute their loss if labels are given.

        Args:
            images: (b, 3, h, w), uint8, or floating point: normalised already.
            labels: (b, h, w), class indices or 255.

        Returns:
            Without labels the logits (b, classes, h, w) in at least float32. With
            labels (losses, logits): the cross-entropy summed over each image's valid
            pixels (b,), and the logits (b, classes, h/os, w/os) before upsampling.
        """
        x = self.normalise(images) if images.dtype == torch.uint8 else images
        feats = self.backbone(x)
        small = self.head(feats)                           # (b, classes, h/os, w/os)
        if labels is None:
            return upsample(small, images.shape[2:], self.align_corners)
        losses = self.compute_loss(small, labels)          # (b,)
        if self.aux is not None:
            aux_losses = self.compute_loss(self.aux(feats), labels)
            losses = losses + self.aux_weight * aux_losses
        return losses, small

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (b, classes, h/os, w/os), labels (b, h, w) -> losses (b,)."""
        with disable_autocast(logits.device.type):
            return self.loss(at_least_float32(logits), labels, self.align_corners)

    def set_stages(self, stages: tuple[int, ...]) -> None:
        """Evaluate with several numbers of EM iterations at once: see EMAU.

        Raises:
            UserError: if the head has no EM attention unit.
        """
        if not hasattr(self.head, 'emau'):
            raise UserError('the head of this network does no EM iterations, so their '
                             'number cannot be set: leave --stages out')
        self.head.emau.eval_stages = stages

    def update_bases(self, is_finite: Tensor | bool = True) -> None:
        """Update the bases of the head, if it has any, after a whole batch."""
        if hasattr(self.head, 'update_bases'):
            self.head.update_bases(is_finite)


def build_head(channels: list[int], n_classes: int, stride: int) -> nn.Module:
    """Build the head of settings.py.

    Args:
        channels: of the backbone's four features.
        n_classes: of the logits.
        stride: pixels of the image per feature of the last two.

    Raises:
        ValueError: for an unknown head, or settings that do not go together.
    """
    s = settings
    common = {'dropout': s.DROPOUT, 'bn_momentum': s.BN_MOM}
    if s.HEAD in ('ema', 'ema_mmseg'):
        return EMAHead(
            channels[-1], n_classes, s.HEAD_CHANNELS, s.FC1_CHANNELS, **common,
            concat=s.HEAD == 'ema_mmseg', bases=s.N_BASES, stages=s.STAGE_NUM,
            eval_stages=s.EVAL_STAGE_NUM, lambd=s.EM_LAMBDA, kernel=s.EM_KERNEL,
            norm=s.EM_NORM, update=s.EM_UPDATE, gradient=s.EM_GRADIENT,
            momentum=s.EM_MOM, renorm=s.EM_RENORM, conv1=s.EM_CONV1, auto_update=False)
    if s.HEAD == 'fcn':
        return heads.FCNHead(channels, n_classes, channels=s.HEAD_CHANNELS, **common)
    if s.HEAD in ('deeplabv3', 'deeplabv3plus'):
        if not s.FC1_CHANNELS:
            raise UserError(f'FC1_CHANNELS=0, but HEAD={s.HEAD} has branches of so '
                            'many channels: set it to 256, as its authors do')
        if s.HEAD == 'deeplabv3':
            return heads.DeepLabV3Head(channels, n_classes, stride, s.FC1_CHANNELS,
                                       **common)
        return heads.DeepLabV3PlusHead(channels, n_classes, stride, s.FC1_CHANNELS,
                                       align_corners=s.ALIGN_CORNERS, **common)
    if s.HEAD == 'psanet':
        if len(s.PSA_GRID) != 2 or min(s.PSA_GRID) < 2:
            raise UserError(f'PSA_GRID={format_value(s.PSA_GRID)}: rows and columns, '
                            'at least 2 each, are expected, as in 33,33')
        return heads.PSAHead(channels, n_classes, s.PSA_GRID, s.HEAD_CHANNELS,
                             align_corners=s.ALIGN_CORNERS, **common)
    if s.HEAD == 'nonlocal':
        unit = heads.NonLocal(s.HEAD_CHANNELS, s.BN_MOM)
    elif s.HEAD == 'a2':
        unit = heads.DoubleAttention(s.HEAD_CHANNELS, s.N_BASES, s.BN_MOM)
    else:
        raise UserError(f'HEAD={s.HEAD} is none of ema, ema_mmseg, fcn, deeplabv3, '
                        'deeplabv3plus, psanet, nonlocal, a2')
    return heads.UnitHead(channels, n_classes, unit, s.HEAD_CHANNELS, s.FC1_CHANNELS,
                          **common)


def build(n_classes: int, is_eval: bool = False) -> Segmenter:
    """Build the network of settings.py, with random weights.

    Args:
        n_classes: of the data set.
        is_eval: take the output stride of evaluation, and be in evaluation mode.

    Raises:
        UserError: for settings that do not go together.
    """
    s = settings
    if len(s.CLASS_WEIGHTS) not in (1, n_classes):
        raise UserError(f'CLASS_WEIGHTS has {len(s.CLASS_WEIGHTS)} numbers for '
                        f'{n_classes} classes: give one for each, or a single one')
    stem = 'deep' if s.STEM == 'auto' else s.STEM
    stride = s.STRIDE
    if is_eval and s.EVAL_STRIDE:
        stride = s.EVAL_STRIDE
    try:
        backbone = ResNet(s.N_LAYERS, stem, stride, s.MULTI_GRID, s.BN_MOM,
                          s.RECOMPUTE and not is_eval)
        head = build_head(backbone.channels, n_classes, stride)
    except ValueError as error:  # a value that a layer does not take
        raise UserError(str(error)) from None
    loss = PixelLoss(s.CLASS_WEIGHTS, s.OHEM_KEPT, s.OHEM_BELOW, s.OHEM_MIN)
    aux = None
    if s.AUX_WEIGHT:
        aux = heads.FCNHead(backbone.channels, n_classes, level=2, dropout=s.DROPOUT,
                            bn_momentum=s.BN_MOM)
    net = Segmenter(backbone, head, stride, s.MEAN, s.STD, loss, aux, s.AUX_WEIGHT,
                    s.ALIGN_CORNERS)
    return net.train(not is_eval)
