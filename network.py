"""The EM attention unit, the head around it, and the network that is trained.

    from network import EMAU                # the paper's unit, in anyone's project
    y = EMAU(512, bases=64, stages=3)(x)    # (b, 512, h, w) -> (b, 512, h, w)

Letters are the paper's: x the features, z the responsibilities, mu the bases; n = h*w
pixels, k bases, c channels, T stages.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import heads
import settings
from backbone import ConvBNReLU, ResNet, at_least_float32, in_full_precision
from metric import PixelLoss

EPS = 1e-6  # added to both denominators, as in the released code


class EMAU(nn.Module):
    """Expectation-Maximization Attention Unit (paper, sections 4 and 5; figure 2).

    conv1, T iterations of A_E and A_M started from the kept bases, A_R, ReLU, conv2
    with batch norm, the residual, ReLU. The unit owns its bases `mu` and their update.
    The EM arithmetic is done in float32 (or float64) whatever the features' type, and
    the bases stay float32 in a network that is cast to half.

    Args:
        channels: of the input and of the output, C.
        bases: K.
        stages: T while training, at least 1.
        eval_stages: T at evaluation; 0 is `stages`. Several, as (1, 3, 8), give an
            output for each of them, one after another along the batch.
        scale: lambda of eq. 12. Infinity in the limit makes A_E one-hot (K-means).
        kernel: of eq. 11. 'exp_dot' exp(lambda a.b), the paper's; 'dot' max(a.b, 0);
            'euclidean' exp(-lambda |a - b|^2), the softmax of the negative squared
            distance, which is the RBF kernel with sigma^2 = 1 / lambda.
        norm: of each basis after A_M (section 5.3): 'l2', 'layer_norm' or 'none'.
        update: of the kept bases (section 5.2, figure 3): 'moving_average' (eq. 15),
            'back_propagation' (the bases are a parameter) or 'never'.
        gradient: through the iterations: 'none', 'last' (only the last one) or 'full'.
        momentum: alpha of eq. 15, the share of the old bases.
        renorm: normalise the batch mean of eq. 15 before it is averaged in.
        conv1: 'fixed' (random), 'trained', 'absent', or 'auto': trained where the
            gradient reaches it.
        bn_momentum: of conv2's batch norm.
        auto_update: move the bases in each training forward. False leaves it to the
            training loop, which calls `update_bases` when it has the whole batch.

    Paper: conv1 is a learned convolution. Here: with gradient='none', the default, it
    keeps its random weights, because the released code iterates under no_grad and so
    never trains it.

    Raises:
        ValueError: for an unknown choice, or a pair that cannot train.
    """

    def __init__(self, channels: int, bases: int = 64, stages: int = 3,
                 eval_stages: int | tuple[int, ...] = 0, scale: float = 1.0,
                 kernel: str = 'exp_dot', norm: str = 'l2',
                 update: str = 'moving_average', gradient: str = 'none',
                 momentum: float = 0.9, renorm: bool = False, conv1: str = 'auto',
                 bn_momentum: float = 0.1, auto_update: bool = True):
        super().__init__()
        for name, value, choices in (
                ('kernel', kernel, ('exp_dot', 'dot', 'euclidean')),
                ('norm', norm, ('l2', 'layer_norm', 'none')),
                ('update', update, ('moving_average', 'back_propagation', 'never')),
                ('gradient', gradient, ('none', 'last', 'full')),
                ('conv1', conv1, ('auto', 'fixed', 'trained', 'absent'))):
            if value not in choices:
                raise ValueError(f'EMAU: {name}={value!r} is none of '
                                 f'{", ".join(choices)}')
        several = eval_stages if isinstance(eval_stages, tuple) else (eval_stages or 1,)
        if stages < 1 or bases < 1 or min(several, default=0) < 1:
            raise ValueError(f'EMAU: {bases} bases, {stages} stages and {eval_stages} '
                             'at evaluation: bases and stages must be at least 1, '
                             'evaluation stages 0 (the same) or more')
        if update == 'back_propagation' and gradient != 'full':
            raise ValueError(
                'EMAU: bases updated by back_propagation need a gradient through all '
                f"iterations, but gradient={gradient!r}: set it to 'full'")
        if conv1 == 'trained' and gradient == 'none':
            raise ValueError("EMAU: conv1='trained', but gradient='none' lets nothing "
                             "reach it: set the gradient to 'last' or 'full', or conv1 "
                             "to 'fixed'")
        if kernel == 'dot' and scale != 1:
            raise ValueError(f'EMAU: lambda={scale} has no effect on the dot kernel, '
                             'it cancels in the normalisation: leave it at 1')
        self.channels = channels
        self.stages, self.eval_stages = stages, eval_stages or stages
        self.scale, self.kernel, self.norm = scale, kernel, norm
        self.update, self.gradient, self.momentum = update, gradient, momentum
        self.renorm, self.auto_update = renorm, auto_update

        self.conv1 = None if conv1 == 'absent' else nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False),
                                   nn.BatchNorm2d(channels, momentum=bn_momentum))
        for m in (self.conv1, self.conv2[0]):
            if m is not None:
                nn.init.normal_(m.weight, 0, math.sqrt(2 / channels))
        if self.conv1 is not None:
            self.conv1.requires_grad_(conv1 == 'trained' or
                                      conv1 == 'auto' and gradient != 'none')

        mu = self.normalise(torch.randn(1, channels, bases) * math.sqrt(2 / bases))
        if update == 'back_propagation':
            self.mu = nn.Parameter(mu)                             # (1, c, k)
        else:
            self.register_buffer('mu', mu)
        # What eq. 15 averages: the sum of mu^(T) over images, and their number. And the
        # share of the pixels that each basis is responsible for: summed likewise, and
        # as it was in the last batch.
        self.register_buffer('mu_sum', torch.zeros(1, channels, bases), False)
        self.register_buffer('n_images', torch.zeros(1), False)
        self.register_buffer('usage_sum', torch.zeros(bases), False)
        self.register_buffer('usage', torch.full((bases,), 1 / bases), False)

    def _apply(self, fn, *args, **kwargs):
        """Cast and move as any module does, but keep the bases at least float32."""
        names = ('mu', 'mu_sum', 'n_images', 'usage_sum', 'usage')
        exact = [getattr(self, name).detach().clone() for name in names]
        super()._apply(fn, *args, **kwargs)
        for name, tensor in zip(names, exact, strict=True):
            new = getattr(self, name)
            if new.dtype in (torch.float16, torch.bfloat16):
                new.data = tensor.to(new.device)
        return self

    def normalise(self, mu: Tensor) -> Tensor:
        """Normalise each basis over its channels (section 5.3).

        Args:
            mu: (b, c, k).
        """
        if self.norm == 'l2':
            return mu / (EPS + mu.norm(dim=1, keepdim=True))
        if self.norm == 'layer_norm':
            # not mu.shape[1], which ONNX does not know beforehand
            return F.layer_norm(mu.transpose(1, 2), (self.channels,)).transpose(1, 2)
        return mu

    def expect(self, x: Tensor, mu: Tensor) -> Tensor:
        """A_E, eq. 11 and 12: the responsibility of each basis for each pixel.

        Args:
            x: (b, n, c) features.
            mu: (b, c, k) bases.

        Returns:
            z: (b, n, k), not negative, sums to 1 over the bases.
        """
        if self.kernel == 'dot':
            z = (x @ mu).clamp(min=0) + EPS  # a pixel far from all is shared evenly
            return z / z.sum(dim=2, keepdim=True)
        scaled = self.scale * mu  # lambda here: c * k numbers, not n * k
        if self.kernel == 'euclidean':
            # |x - mu|^2 less |x|^2, which is the same for all bases and cancels
            return F.softmax(x @ (2 * scaled) - (scaled * mu).sum(1, True), dim=2)
        return F.softmax(x @ scaled, dim=2)

    def maximise(self, x: Tensor, z: Tensor) -> Tensor:
        """A_M, eq. 13: the bases that the responsibilities make, normalised.

        Args:
            x: (b, n, c) features.
            z: (b, n, k) responsibilities.

        Returns:
            mu: (b, c, k).
        """
        # divided after the product: c * k numbers, not n * k
        mu = x.transpose(1, 2) @ z / (EPS + z.sum(dim=1, keepdim=True))
        return self.normalise(mu)

    def reconstruct(self, z: Tensor, mu: Tensor) -> Tensor:
        """A_R, eq. 14: each pixel as the mixture of bases responsible for it.

        Args:
            z: (b, n, k) responsibilities.
            mu: (b, c, k) bases.

        Returns:
            (b, n, c).
        """
        return z @ mu.transpose(1, 2)

    def iterate(self, x: Tensor, stages: int) -> tuple[list[Tensor], list[Tensor]]:
        """Run T times A_E and A_M, each image from the kept bases.

        Args:
            x: (b, n, c) features.
            stages: T.

        Returns:
            (mus, zs): the bases (b, c, k) and the responsibilities (b, n, k) of each
            iteration.
        """
        mu = self.mu.expand(x.shape[0], -1, -1)                    # (b, c, k)
        mus, zs = [], []
        for t in range(1, stages + 1):
            is_kept = self.gradient == 'full' or self.gradient == 'last' and t == stages
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_kept):
                z = self.expect(x, mu)                             # (b, n, k)
                mu = self.maximise(x, z)                           # (b, c, k)
            mus.append(mu)
            zs.append(z)
        return mus, zs

    def wanted_stages(self) -> tuple[int, ...]:
        """Return the T of each output of a forward: several only at evaluation."""
        stages = self.stages if self.training else self.eval_stages
        return stages if isinstance(stages, tuple) else (stages,)

    def forward(self, x: Tensor, return_z: bool = False
                ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Apply the unit.

        Args:
            x: (b, c, h, w) features.
            return_z: return the responsibilities too.

        Returns:
            (b, c, h, w), not negative; with `return_z` a pair of it and a list of T
            tensors (b, n, k), the responsibilities of each iteration, the pixels in
            reading order: z.unflatten(1, (h, w)) is a map.
        """
        identity, size = x, x.shape[2:]
        wanted = self.wanted_stages()
        has_grad = torch.is_grad_enabled() and self.gradient != 'none'
        with torch.set_grad_enabled(has_grad):
            if self.conv1 is not None:
                x = self.conv1(x)
            x = x.flatten(2).transpose(1, 2)                       # (b, n, c)
            with in_full_precision(x.device.type):
                x = at_least_float32(x)
                mus, zs = self.iterate(x, max(wanted))
                y = torch.cat([self.reconstruct(zs[t - 1], mus[t - 1])
                               for t in wanted])                   # (b, n, c)
        if self.training:
            if self.update == 'moving_average':
                self.mu_sum += mus[-1].detach().sum(0, keepdim=True)
            self.usage_sum += zs[-1].detach().mean(1).sum(0)
            self.n_images += len(x)
            if self.auto_update:
                self.update_bases()
        if len(wanted) > 1:
            identity = identity.repeat(len(wanted), 1, 1, 1)
        y = y.to(identity.dtype).transpose(1, 2).unflatten(2, size)  # (b, c, h, w)
        y = F.relu(self.conv2(F.relu(y)).add_(identity))
        return (y, zs) if return_z else y

    @torch.no_grad()
    def update_bases(self, is_sound: Tensor | bool = True) -> None:
        """Move the kept bases towards the mean of mu^(T), eq. 15.

        The mean is over all images since the last call, of all ranks where
        torch.distributed runs; so every rank ends with the same bases. Where they are
        not moved by averaging only `usage` is brought up to date.

        Args:
            is_sound: where this is False the bases stay as they were.
        """
        total = torch.cat([self.mu_sum.flatten(), self.usage_sum, self.n_images])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        is_sound = (total[-1] > 0) & is_sound
        mean, usage = (total[:-1] / total[-1]).split([self.mu.numel(), len(self.usage)])
        self.usage.copy_(torch.where(is_sound, usage, self.usage))
        if self.update == 'moving_average':
            mean = mean.view_as(self.mu)                           # (1, c, k)
            if self.renorm:
                mean = self.normalise(mean)
            mu = self.momentum * self.mu + (1 - self.momentum) * mean
            self.mu.copy_(torch.where(is_sound, mu, self.mu))
        for tensor in (self.mu_sum, self.usage_sum, self.n_images):
            tensor.zero_()


class EMAHead(nn.Module):
    """fc0, the EM attention unit, fc1 with dropout, and the classifier fc2.

    Args:
        n_in: channels of the backbone's last features.
        n_classes: of the logits.
        channels: of fc0 and the unit.
        fc1_channels: of fc1; 0 leaves fc1 and its dropout out (the paper's Table 1).
        dropout: share of fc1's channels dropped while training.
        bn_momentum: of every batch norm.
        concat: see fc1's features beside the backbone's in one more convolution before
            the classifier, as in mmsegmentation's EMAHead.
        unit: the other arguments of EMAU.
    """

    def __init__(self, n_in: int, n_classes: int, channels: int = 512,
                 fc1_channels: int = 256, dropout: float = 0.1,
                 bn_momentum: float = 3e-4, concat: bool = False, **unit):
        super().__init__()
        self.fc0 = ConvBNReLU(n_in, channels, 3, bn_momentum=bn_momentum)
        self.emau = EMAU(channels, bn_momentum=bn_momentum, **unit)
        self.fc1 = (ConvBNReLU(channels, fc1_channels, 3, bn_momentum=bn_momentum)
                    if fc1_channels else nn.Identity())
        n_out = fc1_channels or channels
        self.conv_cat = (ConvBNReLU(n_in + n_out, n_out, 3, bn_momentum=bn_momentum)
                         if concat else None)
        self.dropout = nn.Dropout2d(dropout if fc1_channels else 0.0)
        self.fc2 = nn.Conv2d(n_out, n_classes, 1)

    def forward(self, feats: list[Tensor]) -> Tensor:
        """Four features of the backbone -> logits (b, classes, h/os, w/os)."""
        x = self.fc1(self.emau(self.fc0(feats[-1])))
        if self.conv_cat is not None:
            n = len(self.emau.wanted_stages())             # outputs of the unit
            beside = feats[-1].repeat(n, 1, 1, 1) if n > 1 else feats[-1]
            x = self.conv_cat(torch.cat([beside, x], 1))
        return self.fc2(self.dropout(x))

    def responsibilities(self, feats: list[Tensor]) -> Tensor:
        """Four features of the backbone -> z of each iteration (t, b, k, h/os, w/os).
        """
        x = self.fc0(feats[-1])
        zs = torch.stack(self.emau(x, return_z=True)[1])           # (t, b, n, k)
        return zs.transpose(2, 3).unflatten(3, x.shape[2:])

    def update_bases(self, is_sound: Tensor | bool = True) -> None:
        """Move the unit's bases after a whole batch: see EMAU.update_bases."""
        self.emau.update_bases(is_sound)


def enlarge(logits: Tensor, size: tuple[int, int], align_corners: bool = True
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
            pixels of the logits (b, classes, h/os, w/os), which it enlarges to the
            labels (b, h, w); None is the plain cross-entropy.
        aux: a second head, trained beside the first and not asked at inference.
        aux_weight: of its loss.
        align_corners: of the logits' upsampling. With them images of a multiple of the
            stride plus 1 pixels are seen best, without them of a multiple.
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
        """Cast and move as any module does; the constants are made anew, exactly."""
        super()._apply(fn, *args, **kwargs)
        for name, values in self.pixels.items():
            old = getattr(self, name)
            new = torch.tensor([255 * v for v in values], dtype=torch.float64)
            setattr(self, name, new.to(old.dtype).to(old.device).view(1, 3, 1, 1))
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """Bytes (b, 3, h, w) uint8 -> floats of mean 0 and deviation 1."""
        # planes of one colour each: three interleaved ones are slow to broadcast to
        images = images.contiguous().to(self.mean.dtype, copy=True)
        return images.sub_(self.mean).div_(self.std)

    def forward(self, images: Tensor, labels: Tensor | None = None
                ) -> Tensor | tuple[Tensor, Tensor]:
        """Segment images, and score them where labels are given.

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
            return enlarge(small, images.shape[2:], self.align_corners)
        losses = self.score(small, labels)                 # (b,)
        if self.aux is not None:
            losses = losses + self.aux_weight * self.score(self.aux(feats), labels)
        return losses, small

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (b, classes, h/os, w/os), labels (b, h, w) -> losses (b,)."""
        with in_full_precision(logits.device.type):
            return self.loss(at_least_float32(logits), labels, self.align_corners)

    def set_stages(self, stages: tuple[int, ...]) -> None:
        """Evaluate with several numbers of EM iterations at once: see EMAU.

        Raises:
            ValueError: where the head has no EM attention unit.
        """
        if not hasattr(self.head, 'emau'):
            raise ValueError('the head of this network does no EM iterations, so their '
                             'number cannot be set: leave --stages out')
        self.head.emau.eval_stages = stages

    def update_bases(self, is_sound: Tensor | bool = True) -> None:
        """Update what the head keeps besides weights, after a whole batch."""
        if hasattr(self.head, 'update_bases'):
            self.head.update_bases(is_sound)


def build_head(n_in: list[int], n_classes: int, stride: int) -> nn.Module:
    """Build the head of settings.py.

    Args:
        n_in: channels of the backbone's four features.
        n_classes: of the logits.
        stride: pixels of the image per feature of the last two.

    Raises:
        ValueError: in a sentence, for a head that is not known or cannot be.
    """
    common = {'dropout': settings.DROPOUT, 'bn_momentum': settings.BN_MOM}
    head, channels = settings.HEAD, settings.HEAD_CHANNELS
    fc1_channels, grid = settings.FC1_CHANNELS, settings.PSA_GRID
    if head in ('ema', 'ema_mmseg'):
        return EMAHead(
            n_in[-1], n_classes, channels, fc1_channels, **common,
            concat=head == 'ema_mmseg', bases=settings.N_BASES,
            stages=settings.STAGE_NUM, eval_stages=settings.EVAL_STAGE_NUM,
            scale=settings.EM_LAMBDA, kernel=settings.EM_KERNEL, norm=settings.EM_NORM,
            update=settings.EM_UPDATE, gradient=settings.EM_GRADIENT,
            momentum=settings.EM_MOM, renorm=settings.EM_RENORM,
            conv1=settings.EM_CONV1, auto_update=False)
    if head == 'fcn':
        return heads.FCNHead(n_in, n_classes, channels=channels, **common)
    if head in ('deeplabv3', 'deeplabv3plus'):
        if not fc1_channels:
            raise ValueError(f'FC1_CHANNELS=0, but HEAD={head} has branches of so many '
                             'channels: set it to 256, as its authors do')
        make = (heads.DeepLabV3Head if head == 'deeplabv3' else
                heads.DeepLabV3PlusHead)
        return make(n_in, n_classes, stride, fc1_channels, **common)
    if head == 'psanet':
        if len(grid) != 2 or min(grid) < 2:
            raise ValueError(f'PSA_GRID={",".join(map(str, grid))}: rows and columns, '
                             'at least 2 each, are expected, as in 33,33')
        return heads.PSAHead(n_in, n_classes, grid, channels, **common)
    if head == 'nonlocal':
        unit = heads.NonLocal(channels, settings.BN_MOM)
    elif head == 'a2':
        unit = heads.DoubleAttention(channels, settings.N_BASES, settings.BN_MOM)
    else:
        raise ValueError(f'HEAD={head} is none of ema, ema_mmseg, fcn, deeplabv3, '
                         'deeplabv3plus, psanet, nonlocal, a2')
    return heads.UnitHead(n_in, n_classes, unit, channels, fc1_channels, **common)


def build(n_classes: int, is_eval: bool = False) -> Segmenter:
    """Build the network of settings.py, with random weights.

    Args:
        n_classes: of the data set.
        is_eval: take the output stride of evaluation, and be in evaluation mode.

    Raises:
        ValueError: in a sentence, for settings that do not go together.
    """
    stem = 'deep' if settings.STEM == 'auto' else settings.STEM
    stride = is_eval and settings.EVAL_STRIDE or settings.STRIDE
    backbone = ResNet(settings.N_LAYERS, stem, stride, settings.MULTI_GRID,
                      settings.BN_MOM, settings.RECOMPUTE and not is_eval)
    head = build_head(backbone.channels, n_classes, stride)
    if len(settings.CLASS_WEIGHTS) not in (1, n_classes):
        raise ValueError(f'CLASS_WEIGHTS has {len(settings.CLASS_WEIGHTS)} numbers for '
                         f'{n_classes} classes: give one for each, or a single one')
    loss = PixelLoss(settings.CLASS_WEIGHTS, settings.OHEM_KEPT, settings.OHEM_BELOW,
                     settings.OHEM_MIN)
    aux = None
    if settings.AUX_WEIGHT:
        aux = heads.FCNHead(backbone.channels, n_classes, level=2,
                            dropout=settings.DROPOUT, bn_momentum=settings.BN_MOM)
    net = Segmenter(backbone, head, stride, settings.MEAN, settings.STD, loss, aux,
                    settings.AUX_WEIGHT, settings.ALIGN_CORNERS)
    return net.train(not is_eval)
