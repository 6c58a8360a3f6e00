"""Segment pictures: masks, overlays, coverage, probabilities, responsibilities.

    python predict.py a.jpg photos 'more/**/*.png' --out predictions
    python predict.py photos CHECKPOINT=best.pth EVAL_MODE=multi EVAL_FLIP=true
    python predict.py cat.jpg --responsibilities --bases 3,10,17    # figure 5
    python predict.py --export model.pt2             # for use without this folder

Folders are searched below for pictures; a file that is named is always tried. Into the
folder of --out come masks/NAME.png, with the classes' colours and the picture's size,
overlays/NAME.jpg, coverage.csv with each class's share of the pixels, and what else is
asked for. What is there already is kept. No data set is needed: the checkpoint tells
the classes. A word that begins with NAME= is a setting; write ./LR=1.jpg for a picture.
"""
import runtime


def add_options(parser) -> None:
    parser.add_argument('--out', default='predictions', metavar='DIR',
                        help='folder of the results (%(default)s)')
    parser.add_argument('--overwrite', action='store_true',
                        help='predict again what is there already')
    parser.add_argument('--no-overlays', action='store_true',
                        help='masks and coverage.csv only')
    parser.add_argument('--probabilities', action='store_true',
                        help='of every class, float16, as probabilities/NAME.npz')
    parser.add_argument('--responsibilities', action='store_true',
                        help='which basis looks where: responsibilities/NAME.png, .pdf '
                        'and .npz, and of several pictures responsibilities.png')
    parser.add_argument('--bases', default='', metavar='K,K,...',
                        help='bases to draw; otherwise the four most used ones')
    parser.add_argument('--memory', type=float, default=4, metavar='GB',
                        help='larger pictures are predicted in blocks (%(default)g)')
    parser.add_argument('--export', default='', metavar='FILE',
                        help='write the network as .pt2 (torch.export) or .onnx, check '
                        'it on the first picture, and predict nothing')
    parser.add_argument('--labels', action='store_true',
                        help='export labels instead of probabilities')


if __name__ == '__main__':
    args = runtime.read_command_line(__doc__, add_options, 'PICTURE')

import argparse
import contextlib
import os
import sys
import time
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import checkpoint
import drawing
import heads
import inference
import network
import settings
from prediction.pictures import (
    KINDS,
    MOST_PIXELS,
    Failure,
    Picture,
    as_text,
    candidates,
    find_files,
    read_ahead,
    read_picture,
    shrink,
)
from prediction.results import NoMore, Results, Shown, Store, name_pictures

MARGIN = 128                 # pixels around a block that are predicted with it
N_ROWS = 6                   # pictures in the overview of responsibilities


# -- the networks ----------------------------------------------------------------------

def load_networks(paths: list[Path], given: dict
                  ) -> tuple[list[network.Segmenter], list[str], list[int], list[str]]:
    """Build the networks of checkpoints; the settings are then those of the first.

    Args:
        paths: of the checkpoints.
        given: values of this command line.

    Returns:
        (nets, classes, palette, lines): in evaluation mode, what they all predict, and
        what is to be said of them, the last lines of each network.

    Raises:
        ValueError, FileNotFoundError: in a sentence.
    """
    nets, lines, about, found = [], [], [], []
    for path, content, more in checkpoint.load_each(paths, given):
        found.append(checkpoint.describe_classes(content))
        classes = found[0][0]
        if found[-1][0] != classes:
            raise ValueError(f'{path} predicts {len(found[-1][0])} classes that are '
                             f'not the {len(classes)} of {paths[0]}: only probabilities'
                             ' of the same classes can be averaged')
        net = network.build(len(classes), is_eval=True)
        checkpoint.load_net(net, content['net'], path)
        stages = settings.EVAL_STAGE_NUM or settings.STAGE_NUM
        lines += more
        about.append(f'{path}: step {content["step"]}, {len(classes)} classes, stride '
                     f'{net.stride}' + f', T = {stages}' * hasattr(net.head, 'emau'))
        nets.append(net)
    return nets, *found[0], lines + about


def block_pixels(memory: float, n_classes: int, n_weights: int, options: dict,
                 per_pair: float = 0.0) -> int:
    """Return how many pixels are predicted at a time, for a bound of memory.

    Measured with ResNet-50, stride 8, float32 on a CPU: the process takes 0.74 GB, its
    weights included, and at its peak 576 and 525 bytes more a pixel for 21 classes (1.0
    and 2.25 megapixels), 2273 for 171 (1.0); at scale 1.75 with mirror images,
    1.75 ** 2 * 2 = 6.1 times as much work, 3950; by windows of 513, 680 and 3440. While
    a block is computed there are 4 bytes a class of the one before. The formula gives
    740, 3140, 4510, 900 and 4500: the rest is for pictures that are read and written
    meanwhile. The picture itself and its mask are not in it: 4 bytes a pixel, and 10
    while it is decoded. So 12000 x 9000 pixels took 1.57 GB with --memory 1.3 (1.75
    while they were decoded) for 21 classes, and 2.06 with --memory 2.2 for 171; two of
    the blocks were computed, the others copied. That was without WINOGRAD, with which
    the weights take 0.13 GB more, and a pixel as much (656, without 673 bytes).

    Args:
        memory: GB, 1e9 bytes.
        n_classes: of the networks.
        n_weights: of the networks, as the Predictor keeps them.
        options: of the Predictor.
        per_pair: bytes for each pair of pixels, of a network in which every one sees
            every other (Non-local).

    Raises:
        ValueError: in a sentence, where not even the smallest block has room.
    """
    view = max(1, *options['scales']) ** 2 * (1 + options['use_flip'])
    per_class = 24 if any(options['window']) else 16  # as the windows overlap
    fixed, per_pixel = 0.8e9 + 4 * n_weights, view * (400 + per_class * n_classes)
    per_pair *= 0 if any(options['window']) else view ** 2
    least = (4 * MARGIN) ** 2
    needed = fixed + per_pixel * least + per_pair * least ** 2
    room = memory * 1e9 - fixed
    if not room >= needed - fixed:
        raise ValueError(f'--memory {memory:g}: at least {needed / 1e9 + 0.05:.1f} GB '
                         'are needed, or fewer and smaller EVAL_SCALES')
    n = room / per_pixel
    if per_pair:  # per_pixel * n + per_pair * n ** 2 = room
        half = per_pixel / per_pair / 2
        n = (half ** 2 + room / per_pair) ** 0.5 - half
    return int(min(n, MOST_PIXELS))


def predict_mask(predictor: inference.Predictor, image: np.ndarray, n_pixels: int,
                 store: Store | None) -> np.ndarray:
    """Return the most probable classes of a picture, and store the probabilities.

    Args:
        predictor: of one variant.
        image: (h, w, 3) uint8.
        n_pixels: of a block, at most.
        store: takes the probabilities, or None.

    Returns:
        (h, w) uint8.
    """
    h, w = image.shape[:2]
    mask = np.empty((h, w), np.uint8)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    with tqdm(total=h * w, desc=f'{w}x{h}', unit='pixel', unit_scale=True, leave=False,
              disable=True if h * w <= n_pixels else None) as bar:
        for rows, columns, found in predictor.predict_blocks(tensor, n_pixels, MARGIN):
            mask[rows, columns] = found[0].argmax(0).byte().cpu().numpy()
            if store:
                store.add(rows, columns, found[0].cpu().numpy())
            bar.update(mask[rows, columns].size)
    return mask


# -- responsibilities ------------------------------------------------------------------

def read_bases(text: str, n_bases: int) -> list[int]:
    """Read the numbers of --bases; none for ''."""
    bases = runtime.parse_value('--bases', text, (3, 10, 17)) if text else ()
    if bases and not 0 <= min(bases) <= max(bases) < n_bases:
        raise ValueError(f'--bases {text}: whole numbers from 0 to {n_bases - 1} with '
                         'commas between are expected, as in 3,10,17')
    return list(dict.fromkeys(bases))


def find_responsibilities(predictor: inference.Predictor, image: np.ndarray,
                          bases: list[int]) -> Shown:
    """Return which basis is responsible for which pixel of a picture, seen as it is.

    Args:
        predictor: its first network is asked.
        image: (h, w, 3) uint8.
        bases: to draw; none are the four that are most responsible for most pixels.
    """
    net, (h, w) = predictor.nets[0], image.shape[:2]
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    with torch.inference_mode(), predictor.autocast():
        x = net.normalise(predictor.fetch(tensor)[None])
        sides = [inference.padded_size(n, net.stride, net.align_corners) - n
                 for n in (w, h)]
        feats = net.backbone(F.pad(x, (0, sides[0], 0, sides[1])))
        maps = net.head.responsibilities(feats)[:, 0]              # (t, k, h', w')
    rows, columns = ((n - 1) // net.stride + 1 for n in (h, w))  # none on the padding
    maps = maps[..., :rows, :columns].float().cpu().numpy()
    winners = drawing.partition(maps[-1], net.stride, (h, w))
    usage = np.bincount(winners.ravel(), minlength=maps.shape[1]) / winners.size
    most = np.argsort(-usage, kind='stable')[:4].tolist()
    return Shown(image, maps, net.stride, usage, bases or most)


# -- all of it -------------------------------------------------------------------------

class Work:
    """Predicts pictures one after another, while others are read and written.

    Args:
        predictor: gives one variant.
        results: the folder.
        n_pixels: that are computed at a time, at most.
        bases: to draw; none are each picture's most used ones.
    """

    def __init__(self, predictor: inference.Predictor, results: Results, n_pixels: int,
                 bases: list[int]):
        self.predictor, self.results, self.n_pixels = predictor, results, n_pixels
        self.bases, self.n_written, self.failures, self.jobs = bases, 0, [], deque()
        self.rows = []  # of the overview

    def run(self, pictures: list[Picture]) -> None:
        """Predict and write pictures; one that fails is noted.

        Raises:
            NoMore: where nothing can be written any more.
        """
        with (ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(2) as writers,
              tqdm(total=len(pictures), desc='predicting', unit='picture',
                   disable=None) as self.bar):
            try:
                for picture, job in read_ahead(pictures, readers, self.n_pixels // 4):
                    self.see(picture, job, writers)
                    self.settle(4)
                self.settle(0)
            finally:  # after Ctrl-C, or where nothing can be written
                readers.shutdown(wait=False, cancel_futures=True)
                with contextlib.suppress(NoMore):
                    self.settle(0)

    def see(self, picture: Picture, job: Future, writers: ThreadPoolExecutor) -> None:
        """Compute what a picture lacks and have it written."""
        try:
            image = job.result()
            is_alone = image is None
            if is_alone:  # a large picture is the only one in memory
                self.settle(0)
                image = read_picture(picture.path, MOST_PIXELS)
            parts = self.compute(picture, image)
        except NoMore:
            raise
        except (ValueError, OSError) as error:
            self.fail(picture, error)
            return
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error):
                raise
            self.fail(picture, 'the memory does not hold it: lower --memory or '
                      'EVAL_BATCH, or set EVAL_WINDOW=513')
            return
        self.jobs.append((picture, parts[0], writers.submit(
            self.results.write_all, picture, image, *parts)))
        if is_alone:
            self.settle(0)

    def compute(self, picture: Picture, image: np.ndarray
                ) -> tuple[np.ndarray, Store | None, Shown | None]:
        """Return the mask (h, w) and what else a picture lacks."""
        store = shown = mask = None
        if 'probabilities' in picture.lacks:
            store = Store(self.results.out, as_text(picture.path), self.results.classes,
                          image.shape[:2])
        h, w = image.shape[:2]
        if (store or 'masks' in picture.lacks) and h * w > self.n_pixels:
            tqdm.write(f'{picture.path}: {w}x{h} is predicted in blocks, and each sees '
                       'only its part: raise --memory, or shrink such pictures first')
        if store or 'masks' in picture.lacks:
            mask = predict_mask(self.predictor, image, self.n_pixels, store)
        if 'masks' not in picture.lacks:
            mask = self.results.read_mask(picture)
            if mask.shape != image.shape[:2]:
                raise ValueError('its mask is of another size, as if the picture had '
                                 'been changed: give --overwrite')
        if 'responsibilities' in picture.lacks:
            small, = shrink(self.n_pixels, image)
            shown = find_responsibilities(self.predictor, small, self.bases)
            h, w = small.shape[:2]
            tqdm.write(f'{picture.path}: {shown.tell()}' + (
                f'; seen at {w}x{h}, as large as the memory allows'
                if small is not image else ''))
            if len(self.rows) < N_ROWS:
                self.rows.append((small, shown.maps[-1:].copy(), shown.bases))
        return mask, store, shown

    def settle(self, n: int) -> None:
        """Wait until no more than n pictures are still being written."""
        while len(self.jobs) > n:
            picture, mask, job = self.jobs.popleft()
            try:
                job.result()
            except NoMore:
                raise
            except (ValueError, OSError, MemoryError) as error:
                self.fail(picture, f'its results cannot be written ({error})')
                continue
            self.results.count(picture, mask)
            self.n_written += 1
            self.bar.update()

    def fail(self, picture: Picture, error: Exception | str) -> None:
        self.failures.append(Failure(picture.path, str(error)))
        self.bar.update()


def export_network(args: argparse.Namespace, files: list[str]) -> int:
    """Write the network as a program of its own, and check it on a picture."""
    from prediction import deploy
    nets, classes, palette, lines = load_networks(checkpoint.find_checkpoints(),
                                                  args.given)
    if len(nets) > 1:
        raise ValueError(f'--export {args.export} takes one network, not {len(nets)}: '
                         'give one CHECKPOINT')
    if files:
        picture = read_picture(files[0], MOST_PIXELS)
    else:  # of blobs, so that there is something to see
        draw = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
        picture = np.asarray(Image.fromarray(draw).resize((500, 375)))
    print(*lines, *deploy.export(
        nets[0], args.export, torch.from_numpy(picture.copy()).permute(2, 0, 1),
        {'classes': classes, 'palette': palette, 'settings': runtime.snapshot()},
        args.labels), sep='\n')
    return 0


def main(args: argparse.Namespace) -> int:
    """Predict the pictures of the command line into the folder of --out.

    Returns:
        0, or 1 where a picture failed.
    """
    warnings.filterwarnings('ignore', module='PIL')
    warnings.filterwarnings('ignore', 'The given NumPy array is not writable')
    files, failures = find_files(args.others, args.out)
    if args.export and not failures:
        return export_network(args, list(files))
    if args.labels and not args.export:
        raise ValueError('--labels is for --export: masks are labels already')
    if not files or args.export:
        told = [f'{failure.path}: {failure.sentence}' for failure in failures[:3]]
        raise ValueError('; '.join(told) or 'no picture is given: name files, folders '
                         "or patterns, as in `python predict.py photos 'more/*.png'`")
    paths = checkpoint.find_checkpoints()
    nets, classes, palette, lines = load_networks(paths, args.given)
    options, bases = runtime.eval_options(), []
    if args.bases and not args.responsibilities:
        raise ValueError('--bases chooses what --responsibilities draws: give that too')
    if args.responsibilities:
        if len(nets) > 1:
            raise ValueError('--responsibilities shows the bases of one network: give '
                             'one CHECKPOINT')
        if not hasattr(nets[0].head, 'emau'):
            raise ValueError(f'{paths[0]} has no EM attention unit, so there are no '
                             'responsibilities: leave --responsibilities out')
        bases = read_bases(args.bases, nets[0].head.emau.mu.shape[2])
        drawing.new_figure(1, 1)  # is matplotlib there?
    device = runtime.pick_device()
    precision = runtime.pick_precision(device)
    predictor = inference.Predictor(nets, device, precision, is_averaged=True,
                                    **options)
    n_weights = sum(tensor.numel() for net in nets for tensor in
                    (*net.parameters(), *net.buffers()))
    per_pair = max((8 / net.stride ** 4 for net in nets for module in net.modules()
                    if isinstance(module, heads.NonLocal)), default=0.0)
    n_pixels = block_pixels(args.memory, len(classes), n_weights, options, per_pair)
    lock = runtime.lock(args.out, '--out')
    results = Results(args.out, classes, palette, '; '.join(
        [*lines[-len(nets):], f'scales {runtime.show_value(options["scales"])}'
         f'{", mirrored too" * settings.EVAL_FLIP}']))

    # Name the pictures, and see what is there of them.
    names, refused = name_pictures(files, results)
    failures += refused
    wanted = [kind for kind in KINDS if kind == 'masks' or kind == 'overlays'
              and not args.no_overlays or getattr(args, kind, False)]
    pictures = [Picture(path, name, results.find_lacking(name, wanted, args.overwrite))
                for path, name in names.items()]
    kept = [picture for picture in pictures if not picture.lacks]
    n_kept = len(kept)
    n_others = sum('masks' not in picture.lacks and
                   results.info(picture.name).get('network') != results.made_by
                   for picture in pictures)
    print(*lines, sep='\n')
    print(f'{len(pictures)} pictures, {len(kept)} of them done already; scales '
          f'{runtime.show_value(options["scales"])}'
          f'{", mirrored too" * settings.EVAL_FLIP}; {precision} on {device}; blocks '
          f'of at most {n_pixels / 1e6:.1f} megapixels', flush=True)
    apart = [f'{path} as {name}' for path, name in names.items()
             if name != candidates(path, files[path])[0]]
    if apart:
        print(f'{len(apart)} pictures have a longer name, as another has the shorter: '
              f'{"; ".join(apart[:5])}{"; ..." * (len(apart) > 5)}')

    # Predict, draw and write.
    work = Work(predictor, results, n_pixels, bases)
    began = time.perf_counter()
    try:
        for picture in kept:
            if picture.name not in results.rows:
                try:
                    results.count(picture, results.read_mask(picture))
                except ValueError as error:
                    n_kept -= 1
                    failures.append(Failure(picture.path, str(error)))
        work.run([picture for picture in pictures if picture.lacks])
    except KeyboardInterrupt:
        print(f'stopped: {work.n_written} written; the same command goes on')
        raise
    finally:
        with contextlib.suppress(NoMore):  # what stopped it is told
            results.write_table()
    overview = results.out / 'responsibilities.png'
    if len(work.rows) > 1 and os.path.realpath(overview) not in map(os.path.realpath,
                                                                    files):
        if args.overwrite or not overview.exists():
            figure = drawing.responsibility_overview(work.rows, nets[0].stride)
            results.write_figure(overview.with_suffix(''), figure)
            print(f'the first {len(work.rows)} pictures together: {overview}, .pdf')
        else:
            print(f'{overview} is kept: give --overwrite to draw it again')

    # Tell.
    failures += work.failures
    if n_kept or n_others:
        print(f'{n_kept} pictures were kept as they are, --overwrite predicts them '
              'again' + f'; NOTE: {n_others} of the masks that were kept are of '
              'another network or other scales' * bool(n_others))
    for path, sentence in failures:
        print(f'failed: {path}: {sentence}', file=sys.stderr)
    print(f'{work.n_written} written, {n_kept} kept, {len(failures)} failed, in '
          f'{time.perf_counter() - began:.1f} s: {args.out}')
    lock.close()
    return int(bool(failures))


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')  # names can hold anything
    Image.MAX_IMAGE_PIXELS = None  # MOST_PIXELS holds instead
    runtime.run(main, args)
