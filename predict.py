"""Segment pictures: masks, overlays, coverage, probabilities, responsibilities.

    python predict.py a.jpg photos 'more/**/*.png' --out predictions
    python predict.py photos CHECKPOINT=best.pth EVAL_MODE=multi EVAL_FLIP=true
    python predict.py cat.jpg --responsibilities --bases 3,10,17    # figure 5
    python predict.py --export model.pt2             # for use without this folder

Folders are searched below for pictures; a file that is named is always tried. The
folder of --out gets masks/NAME.png, with the classes' colours and the picture's size,
overlays/NAME.jpg, coverage.csv with each class's share of the pixels, and what else is
asked for. Results that are there already are kept. No data set is needed. A word that
begins with NAME= is a setting; write ./LR=1.jpg for a picture.
"""
import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoint
import config
import distributed
import drawing
import inference
import network
import settings
from config import UserError
from prediction import deploy
from prediction.pictures import (
    MAX_PIXELS,
    SUFFIXES,
    Picture,
    PictureError,
    find_files,
    name_results,
    read_picture,
)
from prediction.pipeline import Pipeline, count_block_pixels, to_tensor
from prediction.results import ResultFolder


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this script."""
    add = parser.add_argument
    add('--out', default='predictions', metavar='DIR',
        help='folder of the results (%(default)s)')
    add('--overwrite', action='store_true', help='predict again what is there already')
    add('--no-overlays', dest='overlays', action='store_false',
        help='masks and coverage.csv only')
    add('--probabilities', action='store_true',
        help='of every class, float16, as probabilities/NAME.npz')
    add('--responsibilities', action='store_true',
        help='which basis is where: responsibilities/NAME.png, .pdf and .npz, and of '
        'several pictures responsibilities.png')
    add('--bases', default='', metavar='K,K,...',
        help='bases to draw; otherwise the four most used ones')
    add('--memory', type=float, default=8, metavar='GB',
        help='larger pictures are predicted in blocks (%(default)g)')
    add('--export', default='', metavar='FILE',
        help='write the network as .pt2 (torch.export) or .onnx, check it on the first '
        'picture, and predict nothing')
    add('--labels', action='store_true', help='export labels instead of probabilities')


# -- checking --------------------------------------------------------------------------

def check_options(args: argparse.Namespace, files: dict[str, str],
                  failures: list[tuple[str, str]]) -> None:
    """Raise UserError for options that do not go together, or without a picture."""
    if args.labels and not args.export:
        raise UserError('--labels is for --export: masks are labels already')
    if args.bases and not args.responsibilities:
        raise UserError('--bases chooses what --responsibilities draws: give that too')
    if failures and (args.export or not files):
        raise UserError('; '.join(f'{word}: {text}' for word, text in failures[:3]))
    if not files and not args.export:
        raise UserError('no picture is given: name files, folders or patterns, as in '
                        "`python predict.py photos 'more/*.png'`")


def load_networks(paths: list[Path], overrides: dict
                  ) -> tuple[list[network.Segmenter], list[str], list[int], list[str]]:
    """Build the networks of checkpoints; the settings are then those of the first.

    Returns:
        (nets, classes, palette, lines): in evaluation mode; what they all predict; 768
        numbers; and a line for each network.

    Raises:
        UserError: if a checkpoint cannot be loaded or has other classes.
    """
    nets, class_lists, lines, palette = [], [], [], []
    for path, content, differences in checkpoint.load_all(paths, overrides):
        classes, own_palette = checkpoint.get_classes(content)
        class_lists.append(classes)
        palette = palette or own_palette
        if classes != class_lists[0]:
            raise UserError(f'{path} predicts {len(classes)} classes that are not the '
                            f'{len(class_lists[0])} of {paths[0]}: only probabilities '
                            'of the same classes can be averaged')
        net = network.build(len(classes), is_eval=True)
        checkpoint.load_net(net, content['net'], path)
        nets.append(net)
        line = (f'{path}: step {content["step"]}, {len(classes)} classes, stride '
                f'{net.stride}')
        if hasattr(net.head, 'emau'):
            line += f', T = {settings.EVAL_STAGE_NUM or settings.STAGE_NUM}'
        lines.append(line)
        print('\n'.join([*differences, line]))
    return nets, class_lists[0], palette, lines


def read_bases(text: str, nets: list[network.Segmenter]) -> list[int]:
    """Return the numbers of --bases, [] for '', if responsibilities can be drawn.

    Raises:
        UserError: for several networks, one without bases, or a number out of range.
    """
    drawing.new_figure(1, 1)  # is matplotlib installed?
    if len(nets) > 1:
        raise UserError('--responsibilities shows the bases of one network: give one '
                        'CHECKPOINT')
    if not hasattr(nets[0].head, 'emau'):
        raise UserError('the network has no EM attention unit, so there are no '
                        'responsibilities: leave --responsibilities out')
    if not text:
        return []
    bases = config.parse_value('--bases', text, (3, 10, 17))
    n_bases = nets[0].head.emau.mu.shape[2]
    if min(bases) < 0 or max(bases) >= n_bases:
        raise UserError(f'--bases {text}: whole numbers from 0 to {n_bases - 1} with '
                        'commas between are expected, as in 3,10,17')
    return list(dict.fromkeys(bases))


# -- the two tasks ---------------------------------------------------------------------

def export_network(args: argparse.Namespace, files: dict[str, str]) -> None:
    """Write the network as a program of its own, and check it on a picture."""
    nets, classes, palette, _ = load_networks(checkpoint.find_checkpoints(),
                                              args.overrides)
    if len(nets) > 1:
        raise UserError(f'--export {args.export} takes one network, not {len(nets)}: '
                        'give one CHECKPOINT')
    distributed.prepare_cpu(torch.device('cpu'))
    if files:
        path = next(iter(files))
        try:
            image = read_picture(path, MAX_PIXELS)
        except PictureError as error:
            raise UserError(f'{path}: {error}') from error
    else:  # blobs of colours
        blobs = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
        image = np.asarray(Image.fromarray(blobs).resize((500, 375)))
    metadata = {'classes': classes, 'palette': palette, 'settings': config.snapshot()}
    for line in deploy.export(nets[0], args.export, to_tensor(image.copy()), metadata,
                              args.labels):
        print(line)


def make_pipeline(args: argparse.Namespace) -> Pipeline:
    """Load the networks and return the pipeline into the folder of --out."""
    nets, classes, palette, lines = load_networks(checkpoint.find_checkpoints(),
                                                  args.overrides)
    options, device = config.eval_options(), distributed.pick_device()
    distributed.prepare_cpu(device)
    bases = read_bases(args.bases, nets) if args.responsibilities else []
    n_pixels = count_block_pixels(args.memory, nets, len(classes), options)
    precision = distributed.pick_precision(device)
    view = f'scales {config.format_value(options["scales"])}'
    if options['use_flip']:
        view += ', flipped too'
    print(f'{view}; {precision} on {device}; blocks of at most {n_pixels / 1e6:.1f} '
          'megapixels', flush=True)
    predictor = inference.Predictor(nets, device, precision, is_averaged=True,
                                    **options)
    results = ResultFolder(args.out, classes, palette, '; '.join([*lines, view]))
    return Pipeline(predictor, results, n_pixels, bases)


def list_missing(args: argparse.Namespace, files: dict[str, str], pipeline: Pipeline
                 ) -> list[Picture]:
    """Return pictures that lack results; note masks of other pictures as failures."""
    wanted = [folder for folder in SUFFIXES if getattr(args, folder, True)]
    results, missing, n_kept, n_others = pipeline.results, [], 0, 0
    for path, name in name_results(files).items():
        lacks = wanted if args.overwrite else results.find_missing(name, wanted)
        picture = Picture(path, name, lacks)
        try:
            if 'masks' not in lacks and not results.check_mask(picture):
                n_others += 1
        except (PictureError, OSError) as error:
            pipeline.failures.append((path, str(error)))
            continue
        if lacks:
            missing.append(picture)
        else:
            n_kept += 1
    print(f'{len(files)} pictures, {n_kept} are kept as they are (--overwrite predicts '
          'them again)')
    if n_others:
        print(f'NOTE: {n_others} of the masks that are kept are of another network or '
              'other scales')
    return missing


def predict(args: argparse.Namespace, files: dict[str, str], pipeline: Pipeline
            ) -> None:
    """Predict the pictures that lack results, and write what is of several."""
    pictures = list_missing(args, files, pipeline)
    began = time.perf_counter()
    try:
        pipeline.run(pictures)
    except KeyboardInterrupt:
        print(f'stopped: {len(pipeline.written)} written; the same command goes on')
        raise
    finally:
        pipeline.results.write_table()
    pipeline.write_overview()
    for path, message in pipeline.failures:
        print(f'failed: {path}: {message}', file=sys.stderr)
    print(f'{len(pipeline.written)} written, {len(pipeline.failures)} failed, in '
          f'{time.perf_counter() - began:.1f} s: {args.out}')


def main() -> int:
    """Export a network or predict pictures; return 1 if a picture failed."""
    sys.stdout.reconfigure(errors='backslashreplace')  # names can hold anything
    warnings.filterwarnings('ignore', module='PIL')
    warnings.filterwarnings('ignore', 'The given NumPy array is not writable')
    args = config.parse_args(__doc__, add_options, 'PICTURE')
    Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS is checked instead
    files, failures = find_files(args.inputs, args.out)
    check_options(args, files, failures)
    if args.export:
        export_network(args, files)
        return 0
    pipeline = make_pipeline(args)
    pipeline.failures += failures
    predict(args, files, pipeline)
    return 1 if pipeline.failures else 0


if __name__ == '__main__':
    config.run(main)
