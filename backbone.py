"""The dilated ResNets, and the ImageNet weights that they start from.

    from backbone import ResNet
    feats = ResNet(50, stem='plain', stride=16)(images)[-1]   # (b, 2048, h/16, w/16)

The modules are named as in torchvision and in PyTorch-Encoding, so that the weights of
either load without renaming: conv1, bn1, layer1 .. layer4.
"""
import contextlib
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3),
          152: (3, 8, 36, 3)}
DEEP_FILES = {50: 'resnet50-ebb6acbb.pth', 101: 'resnet101-2a57e44d.pth',
              152: 'resnet152-0d43d698.pth'}  # of PyTorch-Encoding
STEMS = {'deep': (64, 64, 128), 'v1c': (32, 32, 64), 'plain': (64,)}  # channels


def at_least_float32(x: Tensor) -> Tensor:
    """Return half and bfloat16 tensors as float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def in_full_precision(device_type: str) -> contextlib.AbstractContextManager:
    """Switch autocast off, where it is on; an exported program has no such step."""
    if (torch.amp.is_autocast_available(device_type)
            and torch.is_autocast_enabled(device_type)):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


class ConvBNReLU(nn.Module):
    """A convolution without bias that keeps the size, batch norm and ReLU.

    Args:
        n_in, n_out: channels.
        kernel: side of the kernel, odd.
        dilation: of the kernel.
        bn_momentum: share of the new batch in the running statistics.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int = 3, dilation: int = 1,
                 bn_momentum: float = 0.1):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2 * dilation,
                              dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(n_out, momentum=bn_momentum)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n_in, h, w) -> (b, n_out, h, w), not negative."""
        return self.relu(self.bn(self.conv(x)))


class SumOfRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; its gradient is summed likewise."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOfRanks.apply(gradient)


class RankBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose batch is that of all ranks, for devices that have none of torch.

    The arithmetic is that of torch.nn.SyncBatchNorm, which is for GPUs. Every rank must
    have as many images of the same size.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> the same."""
        if not self.training:
            return super().forward(x)
        full = x if x.dtype == torch.float64 else x.float()
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = SumOfRanks.apply(full.sum((0, 2, 3))) / n           # (c,)
        centred = full - mean[:, None, None]
        var = SumOfRanks.apply(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_batch_norms(net: nn.Module, device_type: str) -> nn.Module:
    """Return the network with batch norms over the images of all ranks."""
    if device_type == 'cuda':
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = RankBatchNorm2d  # the tensors stay what they are
    return net


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity: the block of depths 18 and 34."""
    expansion = 1

    def __init__(self, n_in, width, stride, dilation, downsample, bn_momentum):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, 3, stride, dilation, dilation, bias=False)
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

    def __init__(self, n_in, width, stride, dilation, downsample, bn_momentum):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, 1, bias=False)
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
        recompute: compute the inside of each block again for the backward pass instead
            of keeping it: less memory, the same gradients.

    Raises:
        ValueError: for another depth, stem or stride, or too short a multi_grid.
    """

    def __init__(self, n_layers: int = 101, stem: str = 'deep', stride: int = 8,
                 multi_grid: Sequence[int] = (1, 2, 4), bn_momentum: float = 3e-4,
                 recompute: bool = False):
        super().__init__()
        # what is recomputed stays out of a compiled graph
        self.again = torch.compiler.disable(checkpoint) if recompute else None
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
        self.bn_momentum = bn_momentum
        self.n_layers, self.stem = n_layers, stem
        self.n_in = STEMS[stem][-1]
        if stem == 'plain':
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        else:
            one, two, three = STEMS[stem]
            self.conv1 = nn.Sequential(
                nn.Conv2d(3, one, 3, 2, 1, bias=False),
                nn.BatchNorm2d(one, momentum=bn_momentum), nn.ReLU(inplace=True),
                nn.Conv2d(one, two, 3, 1, 1, bias=False),
                nn.BatchNorm2d(two, momentum=bn_momentum), nn.ReLU(inplace=True),
                nn.Conv2d(two, three, 3, 1, 1, bias=False))
        self.bn1 = nn.BatchNorm2d(self.n_in, momentum=bn_momentum)
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

    def _make_layer(self, width, stride, dilations):
        layer, n_out = [], width * self.block.expansion
        for i, dilation in enumerate(dilations):
            downsample = None
            if i == 0 and (stride != 1 or self.n_in != n_out):
                downsample = nn.Sequential(
                    nn.Conv2d(self.n_in, n_out, 1, stride, bias=False),
                    nn.BatchNorm2d(n_out, momentum=self.bn_momentum))
            layer.append(self.block(self.n_in, width, stride if i == 0 else 1, dilation,
                                    downsample, self.bn_momentum))
            self.n_in = n_out
        return nn.Sequential(*layer)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of layer1 .. layer4.

        Args:
            x: (b, 3, h, w) normalised images.

        Returns:
            Four tensors (b, self.channels[i], h/s, w/s): s is 4, 8, then 8 or 16, the
            last two alike; a size that does not divide is rounded up.
        """
        # ReLU after the pooling, on a quarter of the pixels: it gives the same
        x = self.relu(self.maxpool(self.bn1(self.conv1(x))))  # (b, 64 or 128, h/4, w/4)
        feats = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                if self.again and torch.is_grad_enabled():
                    x = self.again(block, x, use_reentrant=False,
                                   preserve_rng_state=False,
                                   context_fn=functools.partial(first_and_again, block))
                else:
                    x = block(x)
            feats.append(x)
        return feats


def first_and_again(block: nn.Module) -> tuple:
    """Return the contexts of a block's first pass and of its recomputation."""
    return contextlib.nullcontext(), without_statistics(block)


@contextlib.contextmanager
def without_statistics(block: nn.Module):
    """Keep batch norms from counting a batch into their statistics a second time."""
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


# -- ImageNet weights ------------------------------------------------------------------

def choose_weights(pretrained: str, stem: str, n_layers: int, model_dir: str
                   ) -> tuple[str, str, str]:
    """Decide which ImageNet weights a backbone starts from, before it is built.

    `auto` takes the deep-stem file where `model_dir` holds it, otherwise torchvision's
    weights with the plain stem; for the v1c stem it wants the file of open-mmlab. What
    is asked for explicitly is never replaced.

    Args:
        pretrained: auto, none, a name of torchvision's weights (IMAGENET1K_V1), or a
            file.
        stem: deep, v1c, plain or auto.
        n_layers: depth of the backbone.
        model_dir: folder that is searched.

    Returns:
        (stem, source, sentence): the stem to build; a file, a torchvision name, or ''
        for none; and a line for the log.

    Raises:
        ValueError, FileNotFoundError: in a sentence that says which file is wanted,
        where, and what was found.
    """
    if stem not in ('auto', *STEMS):
        raise ValueError(f'STEM={stem} is none of auto, {", ".join(STEMS)}')
    folder = Path(model_dir)
    deep_name = DEEP_FILES.get(n_layers)
    v1c_files = sorted(folder.glob(f'resnet{n_layers}_v1c*.pth'))
    if pretrained == 'none':
        stem = 'deep' if stem == 'auto' else stem
        return stem, '', f'backbone: ResNet-{n_layers}, {stem} stem, trained from ' \
                         'scratch (PRETRAINED=none)'
    if pretrained == 'auto':
        if stem == 'v1c' and v1c_files:
            source = str(v1c_files[-1])
        elif stem in ('auto', 'deep') and deep_name and (folder / deep_name).is_file():
            source, stem = str(folder / deep_name), 'deep'
        elif stem in ('deep', 'v1c'):
            found = ', '.join(sorted(p.name for p in folder.glob('*.pth'))) or 'nothing'
            wanted = (f'put {deep_name} of PyTorch-Encoding into {folder}/' if deep_name
                      else 'no such file is published for this depth')
            if stem == 'v1c':
                wanted = f'put resnet{n_layers}_v1c*.pth of open-mmlab into {folder}/'
            raise FileNotFoundError(
                f'no ImageNet weights of ResNet-{n_layers} with the {stem} stem: '
                f'{wanted} (found there: {found}), or take STEM=plain for '
                'torchvision\'s weights, or PRETRAINED=none')
        else:
            source, stem = 'IMAGENET1K_V1', 'plain'
    elif re.fullmatch(r'\w+', pretrained) and not Path(pretrained).is_file():
        if stem in ('deep', 'v1c'):
            file = 'a PyTorch-Encoding' if stem == 'deep' else 'an open-mmlab'
            raise ValueError(
                f'STEM={stem}, but torchvision\'s weights {pretrained} are of the '
                f'plain stem: take STEM=plain, or {file} file as PRETRAINED')
        source, stem = pretrained, 'plain'
    else:
        if not Path(pretrained).is_file():
            raise FileNotFoundError(f'PRETRAINED={pretrained} is not there: give a '
                                    'file that is, or auto, none, IMAGENET1K_V1')
        source = pretrained
        if stem == 'auto':
            stem = describe_weights(read_weights(source))[0]
    return stem, source, (f'backbone: ResNet-{n_layers}, {stem} stem, ImageNet weights '
                          f'{source}')


def load_weights(backbone: ResNet, source: str, model_dir: str) -> str:
    """Load the ImageNet weights named by `choose_weights` into a backbone, strictly.

    Args:
        backbone: the network to fill.
        source: a file, or a name of torchvision's weights, which are looked for in
            `model_dir`, then fetched through torchvision's own cache.
        model_dir: folder.

    Returns:
        A line for the log: the file, and how many tensors it gave.

    Raises:
        ValueError: weights of another depth or stem, a name that torchvision does not
            have, a file that does not match the hash in its name.
        OSError: weights that cannot be fetched.
    """
    if Path(source).is_file():
        state = read_weights(source)
    else:
        state, source = fetch_torchvision(backbone.n_layers, source, model_dir)
    stem, n_layers = describe_weights(state)
    kind = f'ResNet-{n_layers}' if n_layers else 'a ResNet of unknown depth'
    if (stem, n_layers) != (backbone.stem, backbone.n_layers):
        raise ValueError(
            f'{source} holds {kind} with the {stem} stem, but ResNet-'
            f'{backbone.n_layers} with the {backbone.stem} stem is wanted: change '
            'N_LAYERS and STEM, or PRETRAINED')
    state = {k: v for k, v in state.items() if not k.startswith('fc.')}
    own = backbone.state_dict()
    other = [k for k in own if k in state and own[k].shape != state[k].shape]
    if other:
        raise ValueError(
            f'{source} is a ResNet-{n_layers} of another width: {other[0]} is '
            f'{tuple(state[other[0]].shape)}, expected {tuple(own[other[0]].shape)}; '
            'take the weights of the plain ResNet')
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith('num_batches_tracked')]
    if missing or unexpected:
        raise ValueError(f'{source} is no complete ResNet-{n_layers}: missing '
                         f'{missing[:3]}, unexpected {unexpected[:3]}; get it again')
    return f'loaded {len(state)} tensors of {source}'


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a file of weights, checked against the hash in its name if there is one.

    Returns:
        The tensors, those of open-mmlab's v1c stem under torchvision's names.

    Raises:
        ValueError: in a sentence, where the hash differs or the file cannot be read.
    """
    match = re.search(r'-([0-9a-f]{8,64})\.pth$', Path(path).name)
    if match:
        with open(path, 'rb') as f:
            digest = hashlib.sha256()
            while chunk := f.read(1 << 20):
                digest.update(chunk)
        if not digest.hexdigest().startswith(match[1]):
            raise ValueError(f'{path} is damaged: its sha256 starts with '
                             f'{digest.hexdigest()[:8]}, its name says {match[1]}; get '
                             'the file again, or rename it to go without this check')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds here
        raise ValueError(f'{path} cannot be read as weights '
                         f'({type(error).__name__}): get the file again') from error
    state = state.get('state_dict', state) if isinstance(state, dict) else {}
    if not any(str(k).startswith('layer1.') for k in state):
        raise ValueError(f'{path} holds no ResNet: it has no key that starts with '
                         'layer1.; PRETRAINED wants ImageNet weights, a trained '
                         'EMANet goes to CHECKPOINT of eval.py')
    return {re.sub(r'^stem\.', 'conv1.', re.sub(r'^stem\.7\.', 'bn1.', str(k))): v
            for k, v in state.items()}


def describe_weights(state: dict[str, Tensor]) -> tuple[str, int]:
    """Return (stem, depth) of a ResNet's weights, read off their keys."""
    stem = 'plain'
    if 'conv1.0.weight' in state:
        stem = 'v1c' if len(state['conv1.0.weight']) == STEMS['v1c'][0] else 'deep'
    counts = tuple(1 + max((int(k.split('.')[1]) for k in state
                            if k.startswith(f'layer{i}.')), default=-1)
                   for i in (1, 2, 3, 4))
    kind = Bottleneck if 'layer1.0.conv3.weight' in state else BasicBlock
    for n_layers, blocks in BLOCKS.items():
        if blocks == counts and (kind is Bottleneck) == (n_layers >= 50):
            return stem, n_layers
    return stem, 0


def fetch_torchvision(n_layers: int, name: str, model_dir: str
                      ) -> tuple[dict[str, Tensor], str]:
    """Return torchvision's ImageNet weights and where they come from."""
    from torchvision.models import get_model_weights
    known = get_model_weights(f'resnet{n_layers}')
    if name not in known.__members__:
        raise ValueError(f'PRETRAINED={name} is neither a file nor torchvision\'s '
                         f'weights of ResNet-{n_layers}: choose from auto, none, '
                         f'{", ".join(known.__members__)}, or give a file')
    weights = known[name]
    file = Path(model_dir) / Path(weights.url).name
    if file.is_file():
        return read_weights(str(file)), str(file)
    try:
        return weights.get_state_dict(progress=True, check_hash=True), weights.url
    except (OSError, RuntimeError) as error:
        raise OSError(
            f'could not fetch {weights.url} ({error}): put that file into {model_dir}/ '
            'by hand, or train from scratch with PRETRAINED=none') from error
