"""Measure the model in settings: what it costs, and how fast it runs here.

    python measure.py cost N_LAYERS=50               # parameters and operations
    python measure.py table1                         # of all heads, beside the paper
    python measure.py speed N_LAYERS=50 DATA_ROOT=... TRAIN_SPLIT=train

`speed` runs our loader, training step and evaluation in turn with the released code's
way of doing the same (float images, the whole picture resized in float, NCHW, fp32), so
that the ratios hold on a noisy machine. Both print a table and write JSON to LOG_DIR.
"""
import runtime


def add_options(parser) -> None:
    parser.add_argument('what', choices=('cost', 'table1', 'speed'))
    parser.add_argument('--size', type=int, default=513, metavar='PIXELS',
                        help='side of the image that is counted (513)')
    parser.add_argument('--only', default='loader,step,evaluation,memory',
                        help='parts of speed, with commas between')
    parser.add_argument('--rounds', type=int, default=5,
                        help='times that each side is run (5)')
    parser.add_argument('--step-batch', type=int, default=2,
                        help='crops of the measured training step (2)')


if __name__ == '__main__':
    args = runtime.read_command_line(__doc__, add_options)  # before the slow imports

import argparse
import copy
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

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
import settings
from measurement import cost

EVAL_SIZE = (513, 513)  # (h, w) of the picture that is evaluated, as in Table 1


# -- the released code's manner --------------------------------------------------------

def reference_sample(folder: dataset.Folder, index: int, draw: np.random.Generator
                     ) -> tuple[Tensor, Tensor]:
    """Load a training sample as the released code does: floats, resized whole."""
    crop = dataset.crop_size()
    with Image.open(folder.images[index]) as picture:
        image = torch.FloatTensor(np.array(picture.convert('RGB'))) / 255
    label = torch.FloatTensor(np.array(folder.read_label(index)))[None, None]
    image = (image - torch.tensor(settings.MEAN)) / torch.tensor(settings.STD)
    image = image.permute(2, 0, 1)[None]                           # (1, 3, h, w)
    scale = float(draw.choice(settings.SCALES))
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
    if draw.integers(2):
        image, label = image.flip(3), label.flip(3)
    return image[0], label[0, 0].long()


class ReferenceStep:
    """The released code's training step: fp32, NCHW, float images, plain SGD."""

    def __init__(self, n_classes: int, device: torch.device):
        import train
        self.net = network.build(n_classes).to(device)
        self.optimizer = torch.optim.SGD(train.group_parameters(self.net),
                                         lr=settings.LR, momentum=settings.LR_MOM)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """images (b, 3, c, c) float, labels (b, c, c) int64."""
        logits = self.net(images)
        loss = F.nll_loss(F.log_softmax(logits, 1), labels, reduction='none',
                          ignore_index=dataset.IGNORED).mean((1, 2)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.net.update_bases()


# -- speed -----------------------------------------------------------------------------

def alternate(sides: dict[str, Callable], rounds: int, device: torch.device
              ) -> dict[str, list[float]]:
    """Run the sides in turn, once to warm up and then `rounds` times.

    Returns:
        Seconds of each run of each side.
    """
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(part: str, seconds: dict[str, list[float]], n_images: int) -> dict:
    """Print images a second and, against the last side, the ratio round by round."""
    last = list(seconds)[-1]
    result = {}
    for name, runs in seconds.items():
        ratios = [b / a for a, b in zip(runs, seconds[last], strict=True)]
        speed, ratio = n_images / statistics.median(runs), statistics.median(ratios)
        result[name] = {'images_per_s': speed, 'ratio': ratio, 'seconds': runs}
        print(f'{part:12}{name:18}{speed:9.2f} images/s   {ratio:5.2f}x  '
              f'({min(ratios):.2f} .. {max(ratios):.2f})')
    return result


def measure_loader(rounds: int) -> dict:
    """Measure loading on one core, decoding alone beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder, n = dataset.open_split('train'), 32
    samples = dataset.TrainSet(folder, dataset.crop_size(), settings.SCALES,
                               settings.USE_FLIP, settings.MEAN, settings.SEED)
    order = dataset.StepSampler(len(folder), n, settings.SEED, 0, 0)
    state = {'step': 0, 'draw': np.random.default_rng(0)}

    def ours():
        state['step'] += 1
        return samples.__getitems__(order.places(state['step']))

    def decode():
        return [folder.read(i) for _, i in order.places(state['step'])]

    def theirs():
        batch = [reference_sample(folder, i, state['draw'])
                 for _, i in order.places(state['step'])]
        return torch.utils.data.default_collate(batch)

    seconds = alternate({'ours': ours, 'decoding alone': decode,
                         'reference manner': theirs}, rounds, torch.device('cpu'))
    torch.set_num_threads(threads)
    return report('loader', seconds, n)


def make_step(side: str, n_classes: int, device: torch.device, batch: int) -> Callable:
    """Return a function that does one training step in a side's manner."""
    import train
    crop = dataset.crop_size()
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, *crop, 3), dtype=torch.uint8,
                           generator=draw).permute(0, 3, 1, 2)
    labels = torch.randint(n_classes, (batch, *crop), dtype=torch.uint8,
                           generator=draw)
    if side == 'reference manner':
        step = ReferenceStep(n_classes, device)
        x, y = images.float().contiguous() / 255 - 0.5, labels.long()
        return lambda: step(x.to(device), y.to(device))
    settings.PRECISION = side.split()[-1]
    settings.BATCH_SIZE = batch
    session = train.Session(n_classes, device)
    return lambda: session.train_step(images, labels)


def step_sides(device: torch.device) -> list[str]:
    """Return the sides of the training step, ours in the device's precision first."""
    best = runtime.pick_precision(device)
    return list(dict.fromkeys([f'ours {best}', 'ours fp32', 'reference manner']))


def measure_step(rounds: int, batch: int, device: torch.device, n_classes: int) -> dict:
    """Measure the training step on random bytes."""
    precision = settings.PRECISION
    sides = {side: make_step(side, n_classes, device, batch)
             for side in step_sides(device)}
    settings.PRECISION = precision
    return report('step', alternate(sides, rounds, device), batch)


def peak_memory(side: str, values: dict, batch: int, n_classes: int) -> float:
    """Return the peak memory in GB of two training steps, in a process of their own.

    On CUDA what torch has allocated, elsewhere the resident memory of the process.
    """
    runtime.apply(values)
    device = runtime.pick_device()
    step = make_step(side, n_classes, device, batch)
    step()
    step()
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == 'darwin' else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure_memory(batch: int, device: torch.device, n_classes: int) -> dict:
    """Measure the peak memory of the training step, each side in a fresh process."""
    values = {k: v for k, v in runtime.snapshot().items() if k != 'RECIPE'}
    result = {}
    for side in step_sides(device):
        result[side] = in_fresh_process(peak_memory, side, values, batch, n_classes)
    last = list(result.values())[-1]
    for side, peak in result.items():
        print(f'{"memory":12}{side:18}{peak:9.2f} GB         {peak / last:5.2f}x')
    return result


def measure_evaluation(rounds: int, device: torch.device, n_classes: int) -> dict:
    """Measure predicting and scoring one picture, also as a share of the device's speed
    in matrix products; with CHECKPOINT how far our precisions agree on the list."""
    draw = torch.Generator().manual_seed(0)
    image = smooth_picture(draw)
    label = torch.randint(n_classes, EVAL_SIZE, dtype=torch.uint8, generator=draw)
    plain = make_eval_net(n_classes, image)
    best = runtime.pick_precision(device)
    options = runtime.eval_options()
    predictors = {precision: inference.Predictor([copy.deepcopy(plain)], device,
                                                 precision, **options)
                  for precision in dict.fromkeys([best, 'fp32'])}
    plain.to(device)

    def ours(precision):
        tally = metric.Tally(1, 1, n_classes, device)
        batch = [(0,), (image,), (label,)]
        return metric.evaluate(predictors[precision].predict_labels, [batch], tally
                               ).matrices.cpu()

    def theirs():
        h, w = EVAL_SIZE
        x = plain.normalise(image[None].contiguous().to(device))
        grid = plain.stride, plain.align_corners
        x = F.pad(x, (0, inference.padded_size(w, *grid) - w,
                      0, inference.padded_size(h, *grid) - h))
        with torch.no_grad():
            y = plain(x).argmax(1)[0, :h, :w].cpu().numpy()
        return np.bincount(label.numpy().ravel() * n_classes + y.ravel(),
                           minlength=n_classes ** 2)

    sides = {f'ours {p}': (lambda p=p: ours(p)) for p in predictors}
    result = report('evaluation', alternate({**sides, 'reference manner': theirs},
                                            rounds, device), 1)
    operations = 2 * sum(cost.count_operations(copy.deepcopy(plain), EVAL_SIZE[0]))
    for precision in predictors if settings.EVAL_MODE == 'single' else ():
        peak, side = measure_peak(device, precision), result[f'ours {precision}']
        side['peak_flops'] = peak
        side['share_of_peak'] = operations * side['images_per_s'] / peak
        achieved = operations * side['images_per_s'] / 1e12
        print(f'{"":12}{precision} reaches {achieved:.3f} TFLOP/s, '
              f'{side["share_of_peak"]:.0%} of the {peak / 1e12:.3f} of a product of '
              'two 4096x4096 matrices')
    if settings.CHECKPOINT:
        result['agreement'] = measure_agreement(predictors)
        print(f'{"":12}{" and ".join(predictors)} name the same class at '
              f'{result["agreement"]:.2%} of the pixels')
    return result


def make_eval_net(n_classes: int, image: Tensor) -> network.Segmenter:
    """Return the network of CHECKPOINT, or a random one that behaves like one."""
    if settings.CHECKPOINT:
        net = network.build(n_classes, is_eval=True)
        state = checkpoint.load(settings.CHECKPOINT)['net']
        checkpoint.load_net(net, state, settings.CHECKPOINT)
        return net
    runtime.seed(settings.SEED)
    net = network.build(n_classes, is_eval=True)
    settle(net, image)
    return net


def measure_agreement(predictors: dict[str, inference.Predictor]) -> float:
    """Return the share of pixels that all precisions name alike, on 20 pictures."""
    folder, same = dataset.open_split('val'), []
    for index in range(0, len(folder), -(-len(folder) // 20)):
        image = torch.from_numpy(folder.read_image(index).copy()).permute(2, 0, 1)
        found = [predictor.predict_labels([image])[0]
                 for predictor in predictors.values()]
        same += [(found[0] == other).float().mean().item() for other in found[1:]]
    return statistics.mean(same) if same else 1.0


def measure_peak(device: torch.device, precision: str, side: int = 4096) -> float:
    """Return the FLOP/s of a product of two square matrices, the best of several.

    It is computed as a product and as a 1x1 convolution, for which a CPU has another
    library, and which may be the faster one.
    """
    dtype = inference.DTYPES.get(precision, torch.float32)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    image, weight = a.view(1, side, -1, 64), b[:, :, None, None]
    image, weight = (x.contiguous(memory_format=torch.channels_last)
                     for x in (image, weight))
    with torch.no_grad():
        seconds = alternate({'product': lambda: a @ b,
                             'convolution': lambda: F.conv2d(image, weight)}, 5, device)
    return 2 * side ** 3 / min(min(runs) for runs in seconds.values())


def smooth_picture(draw: torch.Generator) -> Tensor:
    """Return a picture (3, h, w) uint8 of colour blobs at several scales."""
    picture = torch.zeros(1, 3, *EVAL_SIZE)
    for side in (4, 9, 24, 70):
        blobs = torch.randn(1, 3, side, side, generator=draw)
        picture += F.interpolate(blobs, EVAL_SIZE, mode='bicubic')
    return (128 + 40 * picture[0]).clamp(0, 255).byte()


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
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
        m.train()
    net(image[None])
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    net.eval()


def in_fresh_process(run: Callable, *values):
    """Return run(*values) of a process of its own: what ran before leaves no trace."""
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(run, *values).result()


def measure_part(part: str, values: dict, rounds: int, batch: int) -> dict:
    """Measure one part of speed with the given settings."""
    runtime.apply(values)
    device, n_classes = runtime.pick_device(), len(dataset.get_facts()['classes'])
    if part == 'loader':
        return measure_loader(rounds)
    if part == 'memory':
        return measure_memory(batch, device, n_classes)
    if part == 'step':
        return measure_step(rounds, batch, device, n_classes)
    return measure_evaluation(rounds, device, n_classes)


def main(args: argparse.Namespace) -> None:
    """Measure, print, and write LOG_DIR/measure_<what>.json."""
    if settings.CHECKPOINT:
        found = checkpoint.load(settings.CHECKPOINT)['settings']
        checkpoint.adopt_architecture(found)
    if args.what == 'cost':
        result = cost.measure_cost(args.size)
    elif args.what == 'table1':
        result = cost.measure_table_1(args.size)
        result['environment'] = runtime.describe_environment(runtime.pick_device())
    else:
        parts = args.only.split(',')
        unknown = set(parts) - {'loader', 'step', 'evaluation', 'memory'}
        if unknown:
            raise ValueError(f'--only {args.only}: {", ".join(sorted(unknown))} is '
                             'none of loader, step, evaluation, memory')
        device = runtime.pick_device()
        if 'loader' in parts:  # say what is missing before anything takes time
            dataset.open_split('train')
        if 'evaluation' in parts and settings.CHECKPOINT:
            dataset.open_split('val')
        print(f'ResNet-{settings.N_LAYERS}, stride {settings.STRIDE}, crops of '
              f'{settings.CROP_SIZE}, pictures of {EVAL_SIZE[1]}x{EVAL_SIZE[0]}')
        values = {k: v for k, v in runtime.snapshot().items() if k != 'RECIPE'}
        result = {part: in_fresh_process(measure_part, part, values, args.rounds,
                                         args.step_batch)
                  for part in ('loader', 'memory', 'step', 'evaluation')
                  if part in parts}
        result['environment'] = runtime.describe_environment(device)
        for key, value in result['environment'].items():
            print(f'{key}: {value}')
    out = Path(settings.LOG_DIR)
    out.mkdir(parents=True, exist_ok=True)
    result['settings'] = runtime.snapshot()
    files = {'md': result.pop('markdown', ''), 'json': runtime.as_json(result) + '\n'}
    for kind, text in files.items():
        if text:
            runtime.write_text(out / f'measure_{args.what}.{kind}', text)
    print('numbers: ' + ', '.join(f'{out}/measure_{args.what}.{kind}'
                                  for kind, text in files.items() if text))


if __name__ == '__main__':
    runtime.run(main, args)
