"""The ways of loading, training and evaluating that measure.py compares.

`ours` is what train.py and eval.py do. `released code` is the way of the released
EMANet code: float images, the whole image resized in float, NCHW, fp32, the loss on
full-size logits. Rows that begin with `+` add our options to it, one after the other.
`torchvision` is torchvision's DeepLabV3, in our precision and otherwise as plainly.
"""
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import default_collate

import config
import dataset
import distributed
import inference
import loader
import metrics
import network
import settings
import train

RELEASED = 'released code'
# Our options, in the order in which they are added to the released code.
OPTIONS = {
    'step': ('loss_by_rows', 'channels_last', 'precision', 'fused_optimizer'),
    'evaluation': ('channels_last', 'fused_batch_norms', 'precision')}
# The loss of all implementations of the step; other settings are ours alone.
PLAIN_LOSS = {'ACCUMULATE': 1, 'AUX_WEIGHT': 0.0, 'CLASS_WEIGHTS': (1.0,),
              'OHEM_KEPT': 0.0, 'OHEM_BELOW': 0.0, 'LOSS_NORM': 'all', 'CLIP_GRAD': 0.0}


def list_implementations(part: str, is_options: bool, has_compiled: bool,
                         precision: str) -> dict[str, dict]:
    """Return the implementations of a part that are compared, the released code first.

    Args:
        part: loader, step, evaluation or multi.
        is_options: what each of our options is worth, instead of ours against others.
        has_compiled: ours by torch.compile too.
        precision: of all but the released code.

    Returns:
        For each name the last arguments of make_loader, make_step or make_evaluation.
    """
    found = {RELEASED: {'baseline': 'released'}}
    if part == 'loader':
        return {**found, 'decoding only': {'baseline': 'decoding'},
                'ours': {'baseline': ''}}
    ours = {'baseline': '', 'precision': precision}
    stride = settings.STRIDE
    if part == 'evaluation' and settings.EVAL_STRIDE:
        stride = settings.EVAL_STRIDE
    if is_options:
        found |= list_options(part, precision)
    elif part != 'multi' and stride == 8 and settings.N_LAYERS in (50, 101):
        found['torchvision'] = {'baseline': 'torchvision', 'precision': precision}
    found['ours'] = ours
    if has_compiled and part != 'multi':
        found['ours compiled'] = {**ours, 'is_compiled': True}
    return found


def list_options(part: str, precision: str) -> dict[str, dict]:
    """Return the released code with our options, each added to those before it."""
    found, arguments = {}, {'baseline': 'released'}
    for option in OPTIONS[part]:
        if option != 'precision':
            arguments = {**arguments, option: True}
            found[f'+ {option.replace("_", " ")}'] = arguments
        elif precision != 'fp32':  # the released code has that
            arguments = {**arguments, 'precision': precision}
            found[f'+ {precision}'] = arguments
    return found


# -- images and networks ---------------------------------------------------------------

def make_images(n: int, size: tuple[int, int], n_classes: int) -> tuple[Tensor, Tensor]:
    """Return smooth random images (n, 3, h, w) and random labels (n, h, w), uint8."""
    draw, images = torch.Generator().manual_seed(0), torch.zeros(n, 3, *size)
    for side in (4, 9, 24, 70):
        blobs = torch.randn(n, 3, side, side, generator=draw)
        images += F.interpolate(blobs, size, mode='bicubic')
    labels = torch.randint(n_classes, (n, *size), dtype=torch.uint8, generator=draw)
    return (128 + 40 * images).clamp(0, 255).byte(), labels


def normalise(images: Tensor) -> Tensor:
    """Bytes (n, 3, h, w) -> floats of mean 0 and standard deviation 1, as loaded."""
    mean, std = (torch.tensor(values)[:, None, None]
                 for values in (settings.MEAN, settings.STD))
    return (images / 255 - mean) / std


def pin(x: Tensor, device: torch.device) -> Tensor:
    """Return the tensor in memory from which a GPU can fetch it quickly."""
    return x.pin_memory() if device.type == 'cuda' else x


class TorchvisionDeepLab(nn.Module):
    """torchvision's DeepLabV3 of the depth in settings, with random weights."""

    def __init__(self, n_classes: int):
        super().__init__()
        from torchvision.models import segmentation  # takes as long as torch itself
        build_net = getattr(segmentation, f'deeplabv3_resnet{settings.N_LAYERS}')
        self.net = build_net(weights=None, weights_backbone=None, num_classes=n_classes)
        self.stride, self.align_corners = 1, False  # images of any size, unpadded

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> logits (b, classes, h, w)."""
        return self.net(x)['out']


# (n_classes, is_eval) -> a network whose logits have the size of the image
BASELINES = {
    '': network.build,
    'released': network.build,
    'torchvision': lambda n_classes, is_eval: TorchvisionDeepLab(n_classes)}


def build(baseline: str, n_classes: int, images: Tensor, is_eval: bool) -> nn.Module:
    """Build the network of an implementation, with realistic features of the images."""
    distributed.set_seed(settings.SEED)
    net = BASELINES[baseline](n_classes, is_eval)
    set_statistics(net, images)
    return net.train(not is_eval)


@torch.no_grad()
def set_statistics(net: nn.Module, images: Tensor) -> None:
    """Give a random network features like a trained one's, of about unit variance.

    Batch norms take their running statistics from images (n, 3, h, w) uint8, and the
    last one of each residual block is scaled down. Otherwise features explode or vanish
    from block to block, and numbers that underflow make some operations much slower.
    """
    norms = [m for m in net.eval().modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.train()
        m.momentum = 1.0
    for module in net.modules():
        if hasattr(module, 'bn3'):
            module.bn3.weight.fill_(0.25)
    x = normalise(images[:2, :, :257, :257]).to(next(net.parameters()).device)
    net(torch.cat([x, x.flip(3)]))  # two at least: pooled features need a deviation
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


# -- loading ---------------------------------------------------------------------------

def load_as_released(data: dataset.SegmentationDataset, index: int,
                     draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Load a training sample as the released code does: floats, resized whole."""
    crop, scale = loader.crop_size(), float(draw.choice(settings.SCALES))
    with Image.open(data.images[index]) as image:
        image = torch.FloatTensor(np.array(image.convert('RGB'))) / 255
    image = (image - torch.tensor(settings.MEAN)) / torch.tensor(settings.STD)
    image = F.interpolate(image.permute(2, 0, 1)[None], scale_factor=scale,
                          mode='bilinear', align_corners=True)     # (1, 3, h, w)
    label = torch.FloatTensor(np.array(data.read_label(index)))[None, None]
    label = F.interpolate(label, scale_factor=scale, mode='nearest')
    h, w = image.shape[2:]
    pad = (0, max(crop[1] - w, 0), 0, max(crop[0] - h, 0))
    image, label = F.pad(image, pad), F.pad(label, pad, value=dataset.IGNORED)
    top, left = (draw.integers(n - side + 1)
                 for n, side in zip(image.shape[2:], crop, strict=True))
    rows, columns = slice(top, top + crop[0]), slice(left, left + crop[1])
    image, label = image[..., rows, columns], label[..., rows, columns]
    if settings.USE_FLIP and draw.integers(2):
        image, label = image.flip(3), label.flip(3)
    return image[0], label[0, 0].long()


def make_loader(data: dataset.SegmentationDataset, n: int, baseline: str) -> Callable:
    """Return a function that loads the next n samples, in this process."""
    batches = iter(loader.StepSampler(len(data), n, settings.SEED, 0, 1 << 30))
    if baseline == 'decoding':
        return lambda: [data.read(i) for _, i in next(batches)]
    if baseline == 'released':
        draw = np.random.default_rng(0)
        return lambda: default_collate([load_as_released(data, i, draw)
                                        for _, i in next(batches)])
    samples = loader.TrainSet(data, loader.crop_size(), settings.SCALES,
                              settings.USE_FLIP, settings.MEAN, settings.SEED)
    return lambda: samples.__getitems__(next(batches))


# -- training --------------------------------------------------------------------------

def make_step(n_classes: int, device: torch.device, n: int, baseline: str, **options
              ) -> Callable:
    """Return a function that does one step on n crops and returns its loss."""
    vars(settings).update(PLAIN_LOSS)
    images, labels = make_images(n, loader.crop_size(), n_classes)
    if not baseline:
        return our_step(n_classes, device, images, labels, **options)
    net = build(baseline, n_classes, images, is_eval=False).to(device)
    return plain_step(net, device, normalise(images), labels.long(), **options)


def plain_step(net: nn.Module, device: torch.device, images: Tensor, labels: Tensor,
               precision: str = 'fp32', channels_last: bool = False,
               loss_by_rows: bool = False, fused_optimizer: bool = False) -> Callable:
    """Return a function that does a training step plainly, with some options."""
    if channels_last:
        net.to(memory_format=torch.channels_last)
    images, labels = pin(images, device), pin(labels, device)
    groups = [{**group, 'lr': group['lr_mult'] * settings.LR}
              for group in train.group_parameters(net)]
    optimizer = torch.optim.SGD(groups, lr=settings.LR, momentum=settings.LR_MOM,
                                fused=True if fused_optimizer else None)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')

    def step() -> Tensor:
        x, y = images.to(device), labels.to(device)
        with distributed.autocast(device, precision):
            if loss_by_rows:
                loss = net(x, y)[0].sum() / y.numel()
            else:
                loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if hasattr(net, 'update_bases'):
            net.update_bases()
        return loss.detach()
    return step


def our_step(n_classes: int, device: torch.device, images: Tensor, labels: Tensor,
             precision: str, is_compiled: bool = False) -> Callable:
    """Return a function that does a step of train.py."""
    config.apply_settings({'BATCH_SIZE': len(images), 'PRECISION': precision,
                           'COMPILE': is_compiled})
    session = train.Session(n_classes, device)
    set_statistics(session.model, images)
    session.model.train()
    images, labels = pin(images, device), pin(labels, device)

    def step() -> Tensor:
        session.step = 0  # always the learning rate of the first step
        return session.train_step(images, labels)[0].mean()
    return step


# -- evaluating ------------------------------------------------------------------------

def make_evaluation(n_classes: int, device: torch.device, images: Tensor,
                    labels: Tensor, is_multi: bool, baseline: str, **options
                    ) -> Callable:
    """Return a function that predicts images and returns their confusion matrix.

    Args:
        images, labels: (n, 3, h, w) and (n, h, w) uint8.
        is_multi: at the scales of EVAL_SCALES and flipped, instead of as they are.
        baseline: key of BASELINES; '' is ours.
    """
    net = build(baseline, n_classes, images, is_eval=True)
    make = plain_evaluation if baseline else our_evaluation
    return make(net, n_classes, device, images, labels, is_multi, **options)


def compute_logits(net: nn.Module, x: Tensor) -> Tensor:
    """Normalised image (1, 3, h, w) -> logits (1, classes, h, w)."""
    h, w = x.shape[2:]
    height, width = (inference.padded_size(n, net.stride, net.align_corners)
                     for n in (h, w))
    return net(F.pad(x, (0, width - w, 0, height - h)))[:, :, :h, :w]


def sum_probs(net: nn.Module, x: Tensor) -> Tensor:
    """The same -> the sum of the probabilities of all scales, flipped too."""
    total = 0
    for scale in settings.EVAL_SCALES:
        size = inference.scaled_size(x.shape[2:], scale)
        view = F.interpolate(x, size, mode='bilinear')
        probs = compute_logits(net, view).softmax(1)
        probs += compute_logits(net, view.flip(3)).softmax(1).flip(3)
        total += F.interpolate(probs, x.shape[2:], mode='bilinear')
    return total


def plain_evaluation(net: nn.Module, n_classes: int, device: torch.device,
                     images: Tensor, labels: Tensor, is_multi: bool,
                     precision: str = 'fp32', channels_last: bool = False,
                     fused_batch_norms: bool = False) -> Callable:
    """Return a function that predicts plainly, view by view, with some options."""
    if fused_batch_norms:
        inference.fuse_batch_norms(net, precision)
    net.to(device)
    if channels_last:
        net.to(memory_format=torch.channels_last)
    images = pin(normalise(images), device)
    predict = sum_probs if is_multi else compute_logits

    @torch.no_grad()
    def evaluate() -> Tensor:
        matrix = np.zeros(n_classes ** 2, int)
        for image, label in zip(images, labels, strict=True):
            with distributed.autocast(device, precision):
                scores = predict(net, image[None].to(device))
            predicted = scores.argmax(1).cpu().numpy().ravel()
            true = label.numpy().ravel().astype(int)
            is_valid = true < n_classes
            matrix += np.bincount(true[is_valid] * n_classes + predicted[is_valid],
                                  minlength=len(matrix))
        return torch.from_numpy(matrix).view(n_classes, n_classes)
    return evaluate


def our_evaluation(net: nn.Module, n_classes: int, device: torch.device, images: Tensor,
                   labels: Tensor, is_multi: bool, precision: str,
                   is_compiled: bool = False) -> Callable:
    """Return a function that predicts as eval.py does."""
    scales = settings.EVAL_SCALES if is_multi else (1.0,)
    options = {**config.eval_options(), 'scales': scales, 'use_flip': is_multi,
               'window': (0, 0), 'is_compiled': is_compiled}
    predictor = inference.Predictor([net], device, precision, **options)
    images, labels = list(pin(images, device)), list(pin(labels, device))

    def evaluate() -> Tensor:
        meter = metrics.ConfusionMeter(1, len(images), n_classes, device)
        batch = range(len(images)), images, labels
        metrics.evaluate(predictor.predict_labels, [batch], meter)
        return meter.matrices[0].cpu()
    return evaluate
