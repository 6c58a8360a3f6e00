"""The ImageNet weights that a backbone starts from.

    python train.py PRETRAINED=models/resnet101-2a57e44d.pth
"""
import hashlib
import re
from pathlib import Path

import torch
from torch import Tensor

from backbone import BLOCKS, STEMS, ResNet
from config import UserError

DEEP_FILES = {50: 'resnet50-ebb6acbb.pth', 101: 'resnet101-2a57e44d.pth',
              152: 'resnet152-0d43d698.pth'}  # of PyTorch-Encoding


# -- which weights ---------------------------------------------------------------------

def choose_weights(pretrained: str, stem: str, n_layers: int, model_dir: str
                   ) -> tuple[str, str, str]:
    """Choose the stem and the ImageNet weights of a backbone, before it is built.

    Weights that are asked for explicitly are never replaced by others.

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
        UserError: says which file is wanted, where, and what was found.
    """
    if stem not in ('auto', *STEMS):
        raise UserError(f'STEM={stem} is none of auto, {", ".join(STEMS)}')
    if pretrained == 'none':
        stem = 'deep' if stem == 'auto' else stem
        return stem, '', (f'backbone: ResNet-{n_layers}, {stem} stem, trained from '
                          'scratch (PRETRAINED=none)')
    if pretrained == 'auto':
        stem, source = choose_auto(stem, n_layers, Path(model_dir))
    elif re.fullmatch(r'\w+', pretrained) and not Path(pretrained).is_file():
        stem, source = choose_torchvision(pretrained, stem)
    else:
        stem, source = choose_file(pretrained, stem)
    return stem, source, (f'backbone: ResNet-{n_layers}, {stem} stem, ImageNet weights '
                          f'{source}')


def choose_auto(stem: str, n_layers: int, folder: Path) -> tuple[str, str]:
    """Return stem and source for PRETRAINED=auto.

    The file of PyTorch-Encoding if it is there, otherwise torchvision's weights with
    the plain stem. The v1c stem needs the file of open-mmlab.
    """
    deep_name = DEEP_FILES.get(n_layers)
    if stem in ('auto', 'deep') and deep_name and (folder / deep_name).is_file():
        return 'deep', str(folder / deep_name)
    if stem in ('auto', 'plain'):
        return 'plain', 'IMAGENET1K_V1'
    if stem == 'v1c':
        files = sorted(folder.glob(f'resnet{n_layers}_v1c*.pth'))
        if files:
            return stem, str(files[-1])
        wanted = f'put resnet{n_layers}_v1c*.pth of open-mmlab into {folder}/'
    elif deep_name:
        wanted = f'put {deep_name} of PyTorch-Encoding into {folder}/'
    else:
        wanted = 'no such file is published for this depth'
    names = ', '.join(sorted(p.name for p in folder.glob('*.pth'))) or 'nothing'
    raise UserError(f'no ImageNet weights of ResNet-{n_layers} with the {stem} stem: '
                    f'{wanted} (found there: {names}), or take STEM=plain for '
                    "torchvision's weights, or PRETRAINED=none")


def choose_torchvision(name: str, stem: str) -> tuple[str, str]:
    """Return stem and source for the name of torchvision's weights."""
    if stem in ('deep', 'v1c'):
        file = 'a PyTorch-Encoding' if stem == 'deep' else 'an open-mmlab'
        raise UserError(f"STEM={stem}, but torchvision's weights {name} are of the "
                        f'plain stem: take STEM=plain, or {file} file as PRETRAINED')
    return 'plain', name


def choose_file(path: str, stem: str) -> tuple[str, str]:
    """Return stem and source for a file of weights."""
    if not Path(path).is_file():
        raise UserError(f'PRETRAINED={path} is not there: give a file that is, or '
                        'auto, none, IMAGENET1K_V1')
    if stem == 'auto':
        stem = describe_weights(read_weights(path))[0]
    return stem, path


# -- loading ---------------------------------------------------------------------------

def load_weights(backbone: ResNet, source: str, model_dir: str) -> str:
    """Load the ImageNet weights that `choose_weights` named into a backbone, strictly.

    Args:
        backbone: the network to fill.
        source: a file, or a name of torchvision's weights, which are looked for in
            `model_dir`, then downloaded through torchvision's own cache.
        model_dir: folder.

    Returns:
        A line for the log: the file, and how many tensors it gave.

    Raises:
        UserError: for weights of another depth or stem, a name that torchvision does
            not have, a file that does not match the hash in its name, or weights that
            cannot be downloaded.
    """
    if Path(source).is_file():
        state = read_weights(source)
    else:
        state, source = fetch_torchvision(backbone.n_layers, source, model_dir)
    stem, n_layers = describe_weights(state)
    kind = f'ResNet-{n_layers}' if n_layers else 'a ResNet of unknown depth'
    if (stem, n_layers) != (backbone.stem, backbone.n_layers):
        raise UserError(
            f'{source} holds {kind} with the {stem} stem, but ResNet-'
            f'{backbone.n_layers} with the {backbone.stem} stem is wanted: change '
            'N_LAYERS and STEM, or PRETRAINED')
    state = {k: v for k, v in state.items() if not k.startswith('fc.')}
    own = backbone.state_dict()
    other = [k for k in own if k in state and own[k].shape != state[k].shape]
    if other:
        raise UserError(
            f'{source} is a ResNet-{n_layers} of another width: {other[0]} is '
            f'{tuple(state[other[0]].shape)}, expected {tuple(own[other[0]].shape)}; '
            'take the weights of the plain ResNet')
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith('num_batches_tracked')]
    if missing or unexpected:
        raise UserError(f'{source} is no complete ResNet-{n_layers}: missing '
                        f'{missing[:3]}, unexpected {unexpected[:3]}; get it again')
    return f'loaded {len(state)} tensors of {source}'


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a file of weights; check it against the hash in its name, if there is one.

    Returns:
        The tensors, those of open-mmlab's v1c stem under torchvision's names.

    Raises:
        UserError: if the hash differs or the file cannot be read.
    """
    match = re.search(r'-([0-9a-f]{8,64})\.pth$', Path(path).name)
    if match:
        digest = hash_file(path)
        if not digest.startswith(match[1]):
            raise UserError(f'{path} is damaged: its sha256 starts with {digest[:8]}, '
                            f'its name says {match[1]}; get the file again, or rename '
                            'it to go without this check')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds here
        raise UserError(f'{path} cannot be read as weights '
                        f'({type(error).__name__}): get the file again') from error
    state = state.get('state_dict', state) if isinstance(state, dict) else {}
    if not any(str(k).startswith('layer1.') for k in state):
        raise UserError(f'{path} holds no ResNet: it has no key that starts with '
                        'layer1.; PRETRAINED wants ImageNet weights, a trained EMANet '
                        'goes to CHECKPOINT of eval.py')
    return {re.sub(r'^stem\.', 'conv1.', re.sub(r'^stem\.7\.', 'bn1.', str(k))): v
            for k, v in state.items()}


def hash_file(path: str) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def describe_weights(state: dict[str, Tensor]) -> tuple[str, int]:
    """Return (stem, depth) of a ResNet's weights by their keys; depth 0 is unknown."""
    stem = 'plain'
    if 'conv1.0.weight' in state:
        stem = 'v1c' if len(state['conv1.0.weight']) == STEMS['v1c'][0] else 'deep'
    counts = tuple(1 + max((int(k.split('.')[1]) for k in state
                            if k.startswith(f'layer{i}.')), default=-1)
                   for i in (1, 2, 3, 4))
    is_bottleneck = 'layer1.0.conv3.weight' in state
    for n_layers, blocks in BLOCKS.items():
        if blocks == counts and is_bottleneck == (n_layers >= 50):
            return stem, n_layers
    return stem, 0


def fetch_torchvision(n_layers: int, name: str, model_dir: str
                      ) -> tuple[dict[str, Tensor], str]:
    """Return torchvision's ImageNet weights and the file or URL they come from."""
    from torchvision.models import get_model_weights  # takes as long as torch itself

    known = get_model_weights(f'resnet{n_layers}')
    if name not in known.__members__:
        raise UserError(f"PRETRAINED={name} is neither a file nor torchvision's "
                        f'weights of ResNet-{n_layers}: choose from auto, none, '
                        f'{", ".join(known.__members__)}, or give a file')
    weights = known[name]
    file = Path(model_dir) / Path(weights.url).name
    if file.is_file():
        return read_weights(str(file)), str(file)
    try:
        return weights.get_state_dict(progress=True, check_hash=True), weights.url
    except (OSError, RuntimeError) as error:
        raise UserError(
            f'could not fetch {weights.url} ({error}): put that file into {model_dir}/ '
            'by hand, or train from scratch with PRETRAINED=none') from error
