"""The ways of loading, training and evaluating that measure.py sets side by side.

Ours is what train.py and eval.py do. The reference manner is the released code's: float
images, the whole picture resized in float, NCHW, fp32, the loss on the full-size
logits. Between the two stand our options, each added to those before it. And there is
torchvision's DeepLabV3, trained and run as its users do, by its own code.

A manner is a name, such as `ours bf16`; what it makes is a function that does one step,
or evaluates some pictures, and returns what came out of it.
"""
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import checkpoint
import dataset
import inference
import metric
import network
import runtime
import settings

REFERENCE = 'reference manner'
FEWER = '+ fewer products'    # see inference.WinogradConv2d
KEPT = '+ freed memory kept'  # see runtime.keep_freed_memory; both are for CPUs
# Settings that no other manner has; in the measured step they are as here.
OURS_ALONE = {'ACCUMULATE': 1, 'AUX_WEIGHT': 0.0, 'CLASS_WEIGHTS': (1.0,),
              'OHEM_KEPT': 0.0, 'OHEM_BELOW': 0.0, 'LOSS_NORM': 'all',
              'CLIP_GRAD': 0.0}
# What is added to the reference manner, one after the other; {} is the precision.
STEP_OPTIONS = {'+ loss by rows': {'by_rows': True},
                '+ channels last': {'channels_last': True},
                '+ {}': {'precision': '{}'},
                '+ fused optimizer': {'is_fused': True},
                KEPT: {}}
EVALUATION_OPTIONS = {'+ channels last': {'channels_last': True},
                      '+ batch norms folded': {'is_folded': True},
                      '+ {}': {'precision': '{}'},
                      FEWER: {'has_winograd': True},
                      KEPT: {}}


def list_manners(part: str, is_options: bool, precision: str, is_cpu: bool = True
                 ) -> list[str]:
    """Return the manners of a part that are set side by side, the reference first.

    Args:
        part: loader, step, evaluation or multi.
        is_options: what each option is worth, instead of ours against others.
        precision: the device's best.
        is_cpu: whether the device is a CPU.
    """
    if part == 'loader':
        return [REFERENCE, *(['+ crop before resizing'] if is_options else []), 'ours']
    precisions = list(dict.fromkeys([precision, 'fp32']))
    if is_options:
        last = ['', ' compiled'] if part != 'multi' else ['']
        return [REFERENCE, *options_of(part, precision, is_cpu),
                *(f'ours {precision}{more}' for more in last)]
    ours = [f'ours {precision}' for precision in precisions]
    if part == 'multi':
        return [REFERENCE, ours[0]]
    stride = part == 'evaluation' and settings.EVAL_STRIDE or settings.STRIDE
    has_theirs = settings.N_LAYERS in (50, 101) and stride == 8  # theirs is always 8
    theirs = [f'torchvision {precision}' for precision in precisions]
    return [REFERENCE, *(theirs if has_theirs else []), *ours]


def options_of(part: str, precision: str, is_cpu: bool = True) -> dict[str, dict]:
    """Return what is added one after the other, without what changes nothing here.

    Args:
        part: step, evaluation or multi.
        precision: the device's best.
        is_cpu: whether the device is a CPU.
    """
    table = STEP_OPTIONS if part == 'step' else EVALUATION_OPTIONS
    idle = {'+ {}'} if precision == 'fp32' else set()
    idle |= set() if is_cpu else {FEWER, KEPT}
    idle |= set() if settings.WINOGRAD and precision != 'fp16' else {FEWER}
    return {name.format(precision): {key: precision if value == '{}' else value
                                     for key, value in values.items()}
            for name, values in table.items() if name not in idle}


def options_until(name: str, part: str, precision: str) -> dict:
    """Return the options of a manner, those added before it included."""
    found = {}
    if name != REFERENCE:
        for option, values in options_of(part, precision).items():
            found |= values
            if option == name:
                break
    return found


def precision_of(name: str, part: str, precision: str) -> str:
    """Return the precision of a manner, where `precision` is the device's best."""
    if name.startswith('+'):
        return options_until(name, part, precision).get('precision', 'fp32')
    return next((word for word in name.split() if word in inference.DTYPES), 'fp32')


def has_winograd(name: str, part: str, precision: str) -> bool:
    """Tell whether a manner of evaluating computes convolutions by fewer products, on a
    CPU whose best precision is given."""
    if name.startswith('ours'):
        return settings.WINOGRAD and 'fp16' not in name
    if name.startswith('torchvision'):
        return False
    return 'has_winograd' in options_until(name, part, precision)


# -- loading ---------------------------------------------------------------------------

def reference_sample(folder: dataset.Folder, index: int, draw: np.random.Generator,
                     is_cropped_first: bool = False) -> tuple[Tensor, Tensor]:
    """Load a training sample as the released code does: floats, resized whole."""
    crop = dataset.crop_size()
    with Image.open(folder.images[index]) as picture:
        image = torch.FloatTensor(np.array(picture.convert('RGB'))) / 255
    label = torch.FloatTensor(np.array(folder.read_label(index)))[None, None]
    scale = float(draw.choice(settings.SCALES))
    if is_cropped_first:
        h, w = (min(n, -int(-side // scale))
                for n, side in zip(image.shape, crop, strict=False))
        top, left = (draw.integers(n - side + 1)
                     for n, side in zip(image.shape, (h, w), strict=False))
        image = image[top:top + h, left:left + w]
        label = label[..., top:top + h, left:left + w]
    image = (image - torch.tensor(settings.MEAN)) / torch.tensor(settings.STD)
    image = image.permute(2, 0, 1)[None]                           # (1, 3, h, w)
    image = F.interpolate(image, scale_factor=scale, mode='bilinear',
                          align_corners=True)
    label = F.interpolate(label, scale_factor=scale, mode='nearest')
    h, w = image.shape[2:]
    pad = (0, max(crop[1] - w, 0), 0, max(crop[0] - h, 0))
    image, label = F.pad(image, pad), F.pad(label, pad, value=dataset.IGNORED)
    top, left = (draw.integers(n - side + 1)
                 for n, side in zip(image.shape[2:], crop, strict=True))
    image = image[..., top:top + crop[0], left:left + crop[1]]
    label = label[..., top:top + crop[0], left:left + crop[1]]
    if settings.USE_FLIP and draw.integers(2):
        image, label = image.flip(3), label.flip(3)
    return image[0], label[0, 0].long()


def make_loading(name: str, folder: dataset.Folder, n: int) -> Callable:
    """Return a function that loads the next n samples, in this process.

    `decoding alone` decodes the same pictures and masks, and does nothing with them.
    """
    samples = dataset.TrainSet(folder, dataset.crop_size(), settings.SCALES,
                               settings.USE_FLIP, settings.MEAN, settings.SEED)
    steps = iter(dataset.StepSampler(len(folder), n, settings.SEED, 0, 1 << 30))
    draw = np.random.default_rng(0)
    if name == 'ours':
        return lambda: samples.__getitems__(next(steps))
    if name == 'decoding alone':
        return lambda: [folder.read(i) for _, i in next(steps)]
    is_cropped_first = name != REFERENCE
    return lambda: torch.utils.data.default_collate(
        [reference_sample(folder, i, draw, is_cropped_first) for _, i in next(steps)])


# -- training --------------------------------------------------------------------------

class PlainStep:
    """A training step as one would write it, with some of our options.

    Args:
        logits_of: (network, images) -> logits of the images' size, or small ones.
        net: on the device.
        groups: of parameters for SGD, with `times`, the factor of their rate.
        device: where it is.
        precision: fp32, bf16 or fp16.
        channels_last: memory order of the convolutions' tensors.
        by_rows: take our loss, which enlarges the small logits itself.
        is_fused: take the fused optimizer.
    """

    def __init__(self, logits_of: Callable, net: nn.Module, groups: list,
                 device: torch.device, precision: str = 'fp32',
                 channels_last: bool = False, by_rows: bool = False,
                 is_fused: bool = False):
        self.logits_of, self.net, self.by_rows = logits_of, net, by_rows
        self.device, self.precision = device, precision
        if channels_last:
            net.to(memory_format=torch.channels_last)
        groups = [{**group, 'lr': group['times'] * settings.LR} for group in groups]
        self.optimizer = torch.optim.SGD(groups, lr=settings.LR,
                                         momentum=settings.LR_MOM,
                                         **({'fused': True} if is_fused else {}))
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """images (b, 3, c, c) float, labels (b, c, c) int64 -> the loss."""
        images, labels = images.to(self.device), labels.to(self.device)
        with runtime.autocast(self.device, self.precision):
            if self.by_rows:
                loss = self.net(images, labels)[0].sum() / labels.numel()
            else:
                logits = self.logits_of(self.net, images)
                losses = F.cross_entropy(logits, labels, reduction='none',
                                         ignore_index=dataset.IGNORED)
                loss = losses.mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if hasattr(self.net, 'update_bases'):
            self.net.update_bases()
        return loss.detach()


def make_batch(n: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """Return images (n, 3, c, c) and labels (n, c, c), random bytes."""
    crop, draw = dataset.crop_size(), torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, *crop, 3), dtype=torch.uint8, generator=draw)
    labels = torch.randint(n_classes, (n, *crop), dtype=torch.uint8, generator=draw)
    return images.permute(0, 3, 1, 2), labels


def make_step(name: str, n_classes: int, device: torch.device, n: int) -> Callable:
    """Return a function that does one training step in a manner and returns its loss.

    Args:
        name: of the manner.
        n_classes: of the labels.
        device: where to compute.
        n: crops of a batch.
    """
    import train
    images, labels = make_batch(n, n_classes)
    if device.type == 'cuda':
        images, labels = images.pin_memory(), labels.pin_memory()
    if name.startswith('ours'):
        before = runtime.snapshot()
        settings.BATCH_SIZE = n
        settings.PRECISION = precision_of(name, 'step', '')
        settings.COMPILE = name.endswith('compiled')
        session = train.Session(n_classes, device)
        vars(settings).update(before)

        def step():
            session.step = 0  # however often: the rate of the first step
            session.train_step(images, labels)
            return session.loss
        return step
    x, y = torch.stack(normalise(list(images))), labels.long()
    if device.type == 'cuda':
        x, y = x.pin_memory(), y.pin_memory()
    runtime.seed(settings.SEED)
    if name.startswith('torchvision'):
        net = build_torchvision(n_classes).train().to(device)
        step = PlainStep(lambda net, images: net(images)['out'], net,
                         [{'params': list(net.parameters()), 'times': 1.0}], device,
                         precision_of(name, 'step', ''))
    else:
        net = network.build(n_classes).to(device)
        options = options_until(name, 'step', runtime.pick_precision(device))
        step = PlainStep(lambda net, images: net(images), net,
                         train.group_parameters(net), device, **options)
    return lambda: step(x, y)


def build_torchvision(n_classes: int) -> nn.Module:
    """Return torchvision's DeepLabV3 of the depth in settings, with random weights."""
    from torchvision.models import segmentation
    make = {50: segmentation.deeplabv3_resnet50,
            101: segmentation.deeplabv3_resnet101}[settings.N_LAYERS]
    return make(weights=None, weights_backbone=None, num_classes=n_classes)


# -- evaluating ------------------------------------------------------------------------

class PlainEvaluation:
    """The evaluation as one would write it, with some of our options.

    Args:
        logits_of: (network, images) -> logits of the images' size.
        net: in evaluation mode, on the device; is changed.
        device: where it is.
        n_classes: of the labels.
        stride, align_corners: images are padded for: see inference.padded_size.
        scales, use_flip: each view is computed by itself, probabilities are averaged.
        precision, channels_last, is_folded, has_winograd: our options; the last is for
            a folded network, whose weights are kept in the precision.
    """

    def __init__(self, logits_of: Callable, net: nn.Module, device: torch.device,
                 n_classes: int, stride: int, align_corners: bool = True,
                 scales: Sequence[float] = (1.0,), use_flip: bool = False,
                 precision: str = 'fp32', channels_last: bool = False,
                 is_folded: bool = False, has_winograd: bool = False):
        self.logits_of, self.device, self.n_classes = logits_of, device, n_classes
        self.net = (inference.fold(net, precision, has_winograd) if is_folded else net)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.grid, self.precision = (stride, align_corners), precision
        self.scales, self.use_flip = tuple(scales), use_flip

    def see(self, x: Tensor) -> Tensor:
        """(1, 3, h, w) normalised -> logits (1, classes, h, w)."""
        h, w = x.shape[2:]
        x = F.pad(x, (0, inference.padded_size(w, *self.grid) - w,
                      0, inference.padded_size(h, *self.grid) - h))
        return self.logits_of(self.net, x)[:, :, :h, :w]

    @torch.no_grad()
    def __call__(self, images: list[Tensor], labels: list[Tensor]) -> Tensor:
        """Normalised images (3, h, w), labels (h, w) -> confusion matrix."""
        total = np.zeros(self.n_classes ** 2, int)
        for image, label in zip(images, labels, strict=True):
            x = image[None].to(self.device)
            with runtime.autocast(self.device, self.precision):
                if self.scales == (1.0,) and not self.use_flip:
                    scores = self.see(x)
                else:
                    scores = 0
                    for scale in self.scales:
                        size = inference.scaled_size(x.shape[2:], scale)
                        scaled = F.interpolate(x, size, mode='bilinear')
                        chances = self.see(scaled).softmax(1)
                        if self.use_flip:
                            chances += self.see(scaled.flip(3)).softmax(1).flip(3)
                        scores += F.interpolate(chances, x.shape[2:], mode='bilinear')
            found = scores.argmax(1)[0].cpu().numpy().ravel()
            label = label.numpy().ravel().astype(int)
            is_valid = label < self.n_classes
            total += np.bincount(label[is_valid] * self.n_classes + found[is_valid],
                                 minlength=len(total))
        return torch.from_numpy(total).view(self.n_classes, -1)


def make_evaluation(name: str, part: str, n_classes: int, device: torch.device,
                    images: list[Tensor], labels: list[Tensor]) -> Callable:
    """Return a function that predicts and scores pictures in a manner.

    Args:
        name: of the manner.
        part: evaluation: single scale; multi: the scales of EVAL_SCALES, mirrored.
        n_classes: of the labels.
        device: where to compute.
        images: (3, h, w) uint8 each, of one size.
        labels: (h, w) uint8 each.

    Returns:
        A function that returns the confusion matrix, on the host.
    """
    if device.type == 'cuda':
        images, labels = ([x.pin_memory() for x in some] for some in (images, labels))
    views = {} if part == 'evaluation' else {'scales': settings.EVAL_SCALES,
                                             'use_flip': True}
    if name.startswith('ours'):
        options = {**runtime.eval_options(), 'scales': (1.0,), 'use_flip': False,
                   'window': (0, 0), 'is_compiled': name.endswith('compiled'),
                   **views}
        predictor = inference.Predictor([make_net(n_classes, images[0])], device,
                                        precision_of(name, part, ''), **options)

        n = settings.EVAL_BATCH
        batches = [(range(i, min(i + n, len(images))), images[i:i + n], labels[i:i + n])
                   for i in range(0, len(images), n)]

        def evaluate():
            tally = metric.Tally(1, len(images), n_classes, device)
            return metric.evaluate(predictor.predict_labels, batches, tally
                                   ).matrices[0].cpu()
        return evaluate
    if name.startswith('torchvision'):
        runtime.seed(settings.SEED)
        net = build_torchvision(n_classes)
        x = normalise(images)
        settle(net, x[0])
        plain = PlainEvaluation(
            lambda net, x: net(x)['out'], net.to(device), device, n_classes, 1, False,
            precision=precision_of(name, part, ''))  # it takes any size as it is
        return lambda: plain(x, labels)
    net = make_net(n_classes, images[0])
    grid = net.stride, net.align_corners
    options = options_until(name, part, runtime.pick_precision(device))
    plain = PlainEvaluation(lambda net, x: net(x), net.to(device), device, n_classes,
                            *grid, **views, **options)
    x = normalise(images)
    return lambda: plain(x, labels)


def normalise(images: list[Tensor]) -> list[Tensor]:
    """Bytes (3, h, w) -> floats of mean 0 and deviation 1, as a loader would."""
    mean, std = (torch.tensor(values)[:, None, None]
                 for values in (settings.MEAN, settings.STD))
    return [(image.contiguous() / 255 - mean) / std for image in images]


def make_net(n_classes: int, image: Tensor) -> network.Segmenter:
    """Return the network of CHECKPOINT, or a random one that behaves like one."""
    runtime.seed(settings.SEED)
    net = network.build(n_classes, is_eval=True)
    if settings.CHECKPOINT:
        state = checkpoint.load(settings.CHECKPOINT)['net']
        checkpoint.load_net(net, state, settings.CHECKPOINT)
    else:
        settle(net, image)
    return net


@torch.no_grad()
def settle(net: nn.Module, image: Tensor) -> None:
    """Give a random network activations like a trained one's, on a picture.

    Batch norms take the picture's statistics, the last one of each residual branch is
    scaled down. Without that the activations grow from block to block.
    """
    for module in net.modules():
        last = getattr(module, 'bn3', None)
        if last is not None:
            last.weight.fill_(0.25)
    norms = [m for m in net.eval().modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
        m.train()
    part = image[:, :129, :129]  # of the image, to spare memory
    net(torch.stack([part, part.flip(2)]))  # two: pooled pixels want a deviation
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    net.eval()


def make_pictures(n: int, size: tuple[int, int], n_classes: int
                  ) -> tuple[list[Tensor], list[Tensor]]:
    """Return n pictures (3, h, w) uint8 of colour blobs at several scales, and labels
    (h, w) uint8 at random."""
    draw, images = torch.Generator().manual_seed(0), []
    for _ in range(n):
        picture = torch.zeros(1, 3, *size)
        for side in (4, 9, 24, 70):
            blobs = torch.randn(1, 3, side, side, generator=draw)
            picture += F.interpolate(blobs, size, mode='bicubic')
        images.append((128 + 40 * picture[0]).clamp(0, 255).byte())
    labels = torch.randint(n_classes, (n, *size), dtype=torch.uint8, generator=draw)
    return images, list(labels)
