"""Evaluate a checkpoint on a split: scores, tables, images, a test server's archive.

    python eval.py                  # final.pth of LOG_DIR, or latest.pth if newer
    python eval.py CHECKPOINT=path/to/any.pth --worst 12
    python eval.py EVAL_MODE=multi EVAL_FLIP=true    # several scales and flipped
    python eval.py --stages 1,2,3,4 CHECKPOINT=a.pth,b.pth    # in one pass
    python eval.py VAL_SPLIT=test --submit           # the test server's archive

Takes checkpoints of this project, the released ones, and those of mmsegmentation's
EMANet (with the DATASET that they were trained on). The architecture comes from the
checkpoint, and overrides of training apply here too; those of this command line win.
"""
import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

import checkpoint
import config
import dataset
import distributed
import drawing
import inference
import loader
import metrics
import network
import settings
from evaluation import report
from evaluation.report import Variant
from evaluation.submission import Submission

# Settings that are the same for all networks of one pass.
COMMON = ('DATA_ROOT', 'VAL_SPLIT', 'EVAL_MODE', 'EVAL_SCALES', 'EVAL_FLIP',
          'EVAL_WINDOW', 'EVAL_STEP', 'EVAL_BATCH', 'EVAL_IMAGES', 'PRECISION',
          'CHANNELS_LAST', 'COMPILE')


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this script."""
    parser.add_argument('--pictures', type=int, default=0, metavar='N',
                        help='draw image, truth, prediction and errors of N images')
    parser.add_argument('--worst', type=int, default=0, metavar='N',
                        help='draw the N images with the lowest mIoU of their own')
    parser.add_argument('--stages', default='', metavar='T,T,...',
                        help='evaluate with each of these numbers of EM iterations')
    parser.add_argument('--average', action='store_true',
                        help="score the mean of the checkpoints' probabilities")
    parser.add_argument('--submit', action='store_true',
                        help='pack the predictions for the test server of the data set')


def main() -> int:
    """Evaluate, print the scores and write them into LOG_DIR/eval."""
    args = config.parse_args(__doc__, add_options)
    status = distributed.launch()
    if status is not None:
        return status
    nets, variants, notes = load_networks(
        checkpoint.find_checkpoints(), parse_stages(args.stages), args.overrides)
    data = dataset.open_split('val', needs_masks=not args.submit)
    check_options(args, len(variants), data)
    if args.average:
        variants = [average_variants(variants)]
    files = report.make_paths(variants, data.split)
    submission = Submission(data, files[0]) if args.submit else None

    device = distributed.pick_device()
    distributed.prepare_cpu(device)
    group = distributed.ProcessGroup(device)
    precision = distributed.pick_precision(device, group)
    predictor = inference.Predictor(
        nets, device, precision, is_averaged=args.average, **config.eval_options())
    if group.is_main:
        print_run(notes, variants, data, predictor, group.world_size)
    meter, images_per_s = run_pass(predictor, data, len(variants), group, submission)
    group.destroy()
    if not group.is_main:
        return 0

    print(f'{images_per_s:.2f} images/s')
    if submission:
        print(f'archive for the test server, checked: {submission.pack()}')
    if meter.matrices.sum():
        report.report_scores(files, variants, meter, data, predictor, images_per_s)
        report.save_images(files[0], args, meter.counts[:, 0], data, predictor)
    else:
        print('the split has no labelled pixels, so there is nothing to score')
    return 0


# -- what is evaluated -----------------------------------------------------------------

def parse_stages(text: str) -> tuple[int, ...]:
    """Parse the numbers of --stages, without repeats; () for ''."""
    stages = config.parse_value('--stages', text, (1, 2, 3)) if text else ()
    if stages and min(stages) < 1:
        raise config.UserError(f'--stages {text}: whole numbers of at least 1 with '
                               'commas between are expected, as in 1,2,3')
    return tuple(dict.fromkeys(stages))


def load_networks(paths: list[Path], stages: tuple[int, ...], overrides: dict[str, Any]
                  ) -> tuple[list[network.Segmenter], list[Variant], list[str]]:
    """Build the networks of checkpoints and load their weights.

    Args:
        paths: of the checkpoints; afterwards the settings are those of the first.
        stages: numbers of EM iterations to try; () takes the one in settings.
        overrides: values of this command line.

    Returns:
        (nets, variants, notes): the networks in evaluation mode, what they predict one
        after another, and lines for the console.

    Raises:
        UserError: if a checkpoint does not fit the data set, or the others.
    """
    names, nets, variants, notes = name_checkpoints(paths), [], [], []
    for path, content, lines in checkpoint.load_all(paths, overrides):
        net, more_lines = load_network(path, content)
        all_stages = (0,)
        if stages:
            net.set_stages(stages)
            all_stages = stages
        elif hasattr(net.head, 'emau'):
            all_stages = (settings.EVAL_STAGE_NUM or settings.STAGE_NUM,)
        for t in all_stages:
            name = names[len(nets)]
            if t and (stages or settings.EVAL_STAGE_NUM):
                name += f'_T{t}'
            variants.append(Variant(name, [str(path)], content['step'], net.stride, t,
                                    config.snapshot()))
        nets.append(net)
        notes += lines + more_lines
    names = sorted({variant.settings['DATASET'] for variant in variants})
    if len(names) > 1:
        raise config.UserError('these checkpoints are of different data sets '
                               f'({", ".join(names)}): evaluate them one by one')
    for variant in variants:
        variant.settings.update({name: getattr(settings, name) for name in COMMON})
    return nets, variants, notes


def name_checkpoints(paths: list[Path]) -> list[str]:
    """Return names for the results: the files', with their folders outside LOG_DIR."""
    names = [path.stem for path in paths]
    folders = [path.resolve().parent for path in paths]
    if set(folders) != {Path(settings.LOG_DIR).resolve()}:
        names = [f'{folder.name}_{name}'
                 for folder, name in zip(folders, names, strict=True)]
    if len(set(names)) < len(names):
        raise config.UserError(f'CHECKPOINT={settings.CHECKPOINT}: the files or their '
                               'folders must differ in name, as the results do')
    return names


def load_network(path: Path, content: dict[str, Any]
                 ) -> tuple[network.Segmenter, list[str]]:
    """Build the network of one checkpoint for the data set in settings."""
    classes = dataset.get_dataset_info()['classes']
    n_classes = checkpoint.count_classes(content['net'])
    if n_classes and n_classes != len(classes):
        raise config.UserError(f'{path} predicts {n_classes} classes, but the data set '
                               f'{settings.DATASET} has {len(classes)}: give the '
                               'DATASET that it was trained on')
    notes = checkpoint.reorder_classes(content, classes, path)
    net = network.build(len(classes), is_eval=True)
    checkpoint.load_net(net, content['net'], path)
    return net, notes


def check_options(args: argparse.Namespace, n_variants: int,
                  data: dataset.SegmentationDataset) -> None:
    """Check that the options go together, before the work begins."""
    n_left_out = len(data) - dataset.n_eval_images(data)
    if args.average and args.stages:
        raise config.UserError('--average and --stages: only one of them is expected')
    if args.submit and n_left_out:
        raise config.UserError('--submit: the server wants all images of the split, '
                               f'but EVAL_IMAGES={settings.EVAL_IMAGES} leaves '
                               f'{n_left_out} out: set it to 0')
    if args.submit and n_variants > 1 and not args.average:
        raise config.UserError(f'--submit: one result is expected, not {n_variants}; '
                               'take one checkpoint and T, or --average')
    if min(args.pictures, args.worst) < 0:
        raise config.UserError('--pictures and --worst: 0 images or more are expected')
    drawing.new_figure(1, 1)  # fails without matplotlib


def average_variants(variants: list[Variant]) -> Variant:
    """Return the variant that stands for the mean of all."""
    name = '+'.join(variant.name for variant in variants)
    if len(name) > 80:
        name = f'{len(variants)}_{hashlib.sha256(name.encode()).hexdigest()[:8]}'
    paths = [variant.paths[0] for variant in variants]
    return variants[0]._replace(name=f'mean_of_{name}', paths=paths)


# -- the pass --------------------------------------------------------------------------

def print_run(notes: list[str], variants: list[Variant],
              data: dataset.SegmentationDataset, predictor: inference.Predictor,
              n_processes: int) -> None:
    """Print what is evaluated, on which images and how."""
    lines = list(notes)
    for name, paths, step, stride, stages, _ in variants:
        line = f'{name}: {", ".join(paths)}, step {step}, stride {stride}'
        lines.append(f'{line}, T = {stages}' if stages else line)
    flipped = ', flipped too' if predictor.use_flip else ''
    lines.append(f'{dataset.n_eval_images(data)} of {len(data)} images of split '
                 f'{data.split} in {data.root}; scales '
                 f'{config.format_value(predictor.scales)}{flipped}; '
                 f'{predictor.precision}; processes: {n_processes}')
    print('\n'.join(lines))


def run_pass(predictor: inference.Predictor, data: dataset.SegmentationDataset,
             n_variants: int, group: distributed.ProcessGroup,
             submission: Submission | None) -> tuple[metrics.ConfusionMeter, float]:
    """Predict the images, shared among the ranks; return all counts and images/s."""
    device, n_images = predictor.device, dataset.n_eval_images(data)
    meter = metrics.ConfusionMeter(n_variants, n_images, data.n_classes, device)
    bar = tqdm(total=n_images, desc='evaluation', unit='image',
               disable=None if group.is_main else True)

    def finish_image(index, predictions, label):
        if submission:
            submission.write(index, predictions[0])
        bar.update(min(group.world_size, n_images - bar.n))

    batches = loader.eval_loader(data, n_images, device.type, group.rank,
                                 group.world_size)
    start = time.perf_counter()
    try:
        metrics.evaluate(predictor.predict_labels, batches, meter, finish_image)
        group.barrier()
        meter.matrices = group.all_reduce_sum(meter.matrices).cpu()
        meter.counts = group.all_reduce_sum(meter.counts).cpu()
    except RuntimeError as error:
        if not distributed.is_out_of_memory(error):
            raise
        message = str(error).splitlines()[0]
        raise config.UserError(f'{device} has too little memory for the images '
                               f'({message}): lower EVAL_BATCH, set EVAL_WINDOW=513 or '
                               'PRECISION=bf16') from error
    bar.close()
    return meter, n_images / (time.perf_counter() - start)


if __name__ == '__main__':
    config.run(main)
