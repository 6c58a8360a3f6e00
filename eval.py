"""Evaluate a checkpoint on a split: scores, tables, pictures, a test server's files.

    python eval.py                                   # final.pth of LOG_DIR
    python eval.py CHECKPOINT=path/to/any.pth --worst 12
    python eval.py EVAL_MODE=multi EVAL_FLIP=true    # several scales and mirrored
    python eval.py --stages 1,2,3,4 CHECKPOINT=a.pth,b.pth    # in one pass
    python eval.py VAL_SPLIT=test --submit           # the test server's archive

Takes this project's checkpoints, the released ones, and mmsegmentation's of EMANet
(with the DATASET that they were trained on). What the tensors mean comes from the
checkpoint; what training was given on its command line holds here too, and the words of
this command line come on top.
"""
import runtime


def add_options(parser) -> None:
    parser.add_argument('--pictures', type=int, default=0, metavar='N',
                        help='draw input, truth, prediction and errors of N images')
    parser.add_argument('--worst', type=int, default=0, metavar='N',
                        help='draw the N images with the lowest mIoU of their own')
    parser.add_argument('--stages', default='', metavar='T,T,...',
                        help='evaluate with each of these numbers of EM iterations')
    parser.add_argument('--average', action='store_true',
                        help="score the mean of the checkpoints' probabilities")
    parser.add_argument('--submit', action='store_true',
                        help='pack the predictions for the test server of the data set')


if __name__ == '__main__':
    args = runtime.read_command_line(__doc__, add_options)  # before the slow imports

import argparse
import csv
import hashlib
import io
import math
import os
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
import dataset
import drawing
import inference
import metric
import network
import settings

# What all networks of one pass have in common.
COMMON = ('DATA_ROOT', 'VAL_SPLIT', 'EVAL_MODE', 'EVAL_SCALES', 'EVAL_SCALES_WIDE',
          'EVAL_FLIP', 'EVAL_WINDOW', 'EVAL_STEP', 'EVAL_BATCH', 'EVAL_IMAGES',
          'PRECISION', 'CHANNELS_LAST', 'COMPILE', 'WINOGRAD')


class Variant(NamedTuple):
    """One thing that is scored: a network with a number of EM iterations."""
    name: str  # for files and tables
    path: Path
    step: int
    stride: int
    stages: int  # 0: it does none
    settings: dict


def read_stages(text: str) -> tuple[int, ...]:
    """Read the numbers of --stages; none for ''."""
    stages = runtime.parse_value('--stages', text, (1, 2, 3)) if text else ()
    if stages and min(stages) < 1:
        raise ValueError(f'--stages {text}: whole numbers of at least 1 with commas '
                         'between are expected, as in 1,2,3')
    return tuple(dict.fromkeys(stages))


def load_networks(paths: list[Path], stages: tuple[int, ...], given: dict
                  ) -> tuple[list[network.Segmenter], list[Variant], list[str]]:
    """Build the networks of checkpoints, with their weights.

    The settings are then those that all have in common, and otherwise the first one's.

    Args:
        paths: of the checkpoints.
        stages: numbers of EM iterations to try; none is the one in settings.
        given: values of this command line, which win over those of training's.

    Returns:
        (nets, variants, lines): the networks in evaluation mode, what each of them
        gives, and lines for the log.

    Raises:
        ValueError, FileNotFoundError: in a sentence; a network is never scored with
        weights that are not the checkpoint's.
    """
    stems = [path.stem for path in paths]
    if any(path.resolve().parent != Path(settings.LOG_DIR).resolve() for path in paths):
        stems = [f'{path.resolve().parent.name}_{path.stem}' for path in paths]
    if len(set(stems)) < len(stems):
        raise ValueError(f'CHECKPOINT={settings.CHECKPOINT}: the results are named '
                         'after the files and their folders, so these must differ')
    stems, nets, variants, lines = iter(stems), [], [], []
    for path, content, more in checkpoint.load_each(paths, given):
        lines += more
        facts = dataset.get_facts()
        n_classes = checkpoint.n_classes_of(content['net'])
        if n_classes and n_classes != len(facts['classes']):
            raise ValueError(f'{path} predicts {n_classes} classes, but the data set '
                             f'{settings.DATASET} has {len(facts["classes"])}: give '
                             'the DATASET that it was trained on')
        lines += checkpoint.sort_classes(content, facts['classes'], path)
        net = network.build(len(facts['classes']), is_eval=True)
        checkpoint.load_net(net, content['net'], path)
        if stages:
            net.set_stages(stages)
        nets.append(net)
        usual, stem = settings.EVAL_STAGE_NUM or settings.STAGE_NUM, next(stems)
        for t in stages or (usual if hasattr(net.head, 'emau') else 0,):
            name = stem + f'_T{t}' * bool(stages or t and settings.EVAL_STAGE_NUM)
            variants.append(Variant(name, path, content['step'], net.stride, t,
                                    runtime.snapshot()))
    names = {variant.settings['DATASET'] for variant in variants}
    if len(names) > 1:
        raise ValueError(f'these checkpoints are of different data sets ('
                         f'{", ".join(sorted(names))}): evaluate them by themselves')
    common = {name: getattr(settings, name) for name in COMMON}
    return nets, [variant._replace(settings={**variant.settings, **common})
                  for variant in variants], lines


def name_mode() -> str:
    """Return how the images are seen, as a part of a file's name; '' is plainly."""
    options = runtime.eval_options()
    window = 'x'.join(map(str, options['window']))
    scales = runtime.show_value(options['scales']).replace(',', '-')
    parts = [f'stride{settings.EVAL_STRIDE}' * bool(settings.EVAL_STRIDE),
             f'{settings.EVAL_MODE}{scales}' * (settings.EVAL_MODE != 'single'),
             'flip' * settings.EVAL_FLIP,
             f'window{window}by{options["step"]}' * any(settings.EVAL_WINDOW),
             f'first{settings.EVAL_IMAGES}' * bool(settings.EVAL_IMAGES)]
    return ''.join(f'_{part}' for part in parts if part)


# -- the test server -------------------------------------------------------------------

class Submission:
    """Writes predictions as a test server wants them: PNGs in an archive.

    Args:
        folder: the list that is predicted.
        facts: of the data set, see DATASETS in recipes.py.
        where: folder for the PNGs; the archive is put beside it.

    Raises:
        ValueError: where the data set has no server that is known here.
    """

    def __init__(self, folder: dataset.Folder, facts: dict, where: Path):
        self.kind, self.pattern = facts['server']
        if not self.kind:
            raise ValueError(f'--submit: no test server is known for DATASET='
                             f'{settings.DATASET}; voc and cityscapes have one')
        self.folder, self.where = folder, where
        self.palette = facts['palette'] if not facts['map'] else None
        back = {label: value for value, label in facts['map'].items()}
        self.table = np.array([back.get(i, i) for i in range(256)], np.uint8)
        self.n_classes, self.pool = len(facts['classes']), ThreadPoolExecutor(2)
        self.jobs = []
        counts = Counter(self.place(index) for index in range(len(folder)))
        twice = [name for name, n in counts.items() if n > 1]
        if twice:
            raise ValueError(f'--submit: {len(twice)} names are twice in the list '
                             f'{folder.file}, the first is {twice[0]}: each image must '
                             'stand there once')

    def place(self, index: int) -> str:
        """Return the name of an image's result in the archive."""
        return self.pattern.replace('{}', self.folder.ids[index].rpartition('/')[2])

    def see(self, index: int, predictions: torch.Tensor, _) -> None:
        """Write the prediction (1, h, w) of an image, while others are computed."""
        while self.jobs and (self.jobs[0].done() or len(self.jobs) > 32):
            self.settle()
        values = self.table[predictions[0].cpu().numpy()]
        self.jobs.append(self.pool.submit(self.write, index, values))

    def write(self, index: int, values: np.ndarray) -> None:
        """Write one PNG."""
        file = self.where / self.place(index)
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(values)
        if self.palette:
            picture.putpalette(self.palette)
        picture.save(file)

    def finish(self) -> None:
        """Wait until all PNGs of this process are written."""
        while self.jobs:
            self.settle()
        self.pool.shutdown()

    def settle(self) -> None:
        """Wait until the first PNG is written."""
        try:
            self.jobs.pop(0).result()
        except OSError as error:
            raise OSError(f'cannot write into {self.where} ({error}): make room or set '
                          'another LOG_DIR') from error

    def pack(self) -> Path:
        """Put the PNGs into the archive, check it and return its path."""
        path = self.where.with_name(f'{self.where.name}.{self.kind}')
        temporary = path.with_name(path.name + '.tmp')
        names = [self.place(index) for index in range(len(self.folder))]
        if self.kind == 'tar':
            with tarfile.open(temporary, 'w') as archive:
                for name in names:
                    archive.add(self.where / name, name)
        else:
            with zipfile.ZipFile(temporary, 'w') as archive:
                for name in names:
                    archive.write(self.where / name, name)
        self.check(temporary, names)
        os.replace(temporary, path)
        return path

    def check(self, path: Path, names: list[str]) -> None:
        """Read the archive as the server would: every name, size and value.

        Raises:
            RuntimeError: for a file that the server would refuse.
        """
        values, mode = self.table[:self.n_classes], 'P' if self.palette else 'L'
        if self.kind == 'tar':
            with tarfile.open(path) as archive:
                found = {m.name: archive.extractfile(m).read() for m in archive}
        else:
            with zipfile.ZipFile(path) as archive:
                found = {name: archive.read(name) for name in archive.namelist()}
        if sorted(found) != sorted(names):
            raise RuntimeError(f'{path} has {len(found)} results for {len(names)} '
                               'images')
        for index, name in enumerate(names):
            with (Image.open(io.BytesIO(found[name])) as result,
                  Image.open(self.folder.images[index]) as image):
                if result.size != image.size or result.mode != mode or (
                        not np.isin(np.asarray(result), values).all()):
                    raise RuntimeError(f'{name} in {path} has another size, mode or '
                                       'value than the server wants')


# -- what is written -------------------------------------------------------------------

def write_scores(out: Path, name: str, variant: Variant, scores: dict,
                 counts: torch.Tensor, matrix: torch.Tensor, folder: dataset.Folder,
                 facts: dict, run: dict) -> None:
    """Write the scores of a variant as JSON, tables and a picture.

    Args:
        out: folder.
        name: of the files.
        variant: what was scored.
        scores: of metric.score, with the interval.
        counts: (n, 3, classes), as of metric.Tally.
        matrix: (classes, classes).
        folder: the list.
        facts: of the data set.
        run: what else is to stand in the JSON.
    """
    result = {'checkpoint': str(variant.path), 'step': variant.step,
              'stages': variant.stages, 'n_images': len(counts), **scores,
              'classes': facts['classes'], 'confusion': matrix.tolist(), **run,
              'settings': variant.settings}
    runtime.write_text(out / f'{name}.json', runtime.as_json(result, 1) + '\n')
    text = io.StringIO()
    rows = csv.writer(text, lineterminator='\n')
    rows.writerow(['class', 'IoU', 'accuracy', 'true_pixels', 'predicted_pixels'])
    rows.writerows(zip(facts['classes'], *(map(show_number, scores[key]) for key in
                                           ('IoU', 'acc')),
                       matrix.sum(1).tolist(), matrix.sum(0).tolist(), strict=True))
    runtime.write_text(out / f'{name}.csv', text.getvalue())
    text = io.StringIO()
    rows = csv.writer(text, lineterminator='\n')
    rows.writerow(['image', 'mIoU', 'accuracy'])
    hit, truth, _ = counts.double().sum(2).unbind(1)
    rows.writerows(zip(folder.ids, *(map(show_number, values.tolist()) for values in
                                     (metric.image_scores(counts), hit / truth)),
                       strict=False))  # there may be more ids than were evaluated
    runtime.write_text(out / f'{name}_images.csv', text.getvalue())
    drawing.save(drawing.confusion_figure(
        matrix.numpy(), facts['classes'], f'{name}, mIoU {100 * scores["mIoU"]:.2f}'),
        out / f'{name}_confusion.png')


def show_number(value: float) -> str:
    """Return a number for a table; nothing where there is none."""
    return f'{value:.6f}' if math.isfinite(value) else ''


def draw_images(predictor: inference.Predictor, folder: dataset.Folder,
                chosen: list[int], counts: torch.Tensor, facts: dict) -> Image.Image:
    """Draw input, truth, prediction and errors of some images, of the first variant."""
    mious, rows = metric.image_scores(counts), []
    for index in tqdm(chosen, 'drawing', unit='image', leave=False, disable=None):
        _, image, label = dataset.EvalSet(folder)[index]
        found = predictor.predict_labels([image])[0][0].byte().cpu()
        rows.append(drawing.worst_row(
            image.permute(1, 2, 0).numpy(), label.numpy(), found.numpy(),
            f'{folder.ids[index]}, mIoU {100 * mious[index]:.1f}', facts['classes'],
            facts['palette']))
    return drawing.sheet(rows)


def check_options(args: argparse.Namespace, n_variants: int, n_left_out: int) -> None:
    """Refuse options that do not go together, each in a sentence."""
    if args.average and args.stages:
        raise ValueError('--average and --stages: only one of the two is expected')
    if min(args.pictures, args.worst) < 0:
        raise ValueError(f'--pictures {args.pictures}, --worst {args.worst}: 0 images '
                         'or more are expected')
    if args.submit and n_left_out:
        raise ValueError('--submit: the server wants all images of the list, but '
                         f'EVAL_IMAGES={settings.EVAL_IMAGES} leaves {n_left_out} out: '
                         'set it to 0')
    if args.submit and n_variants > 1 and not args.average:
        raise ValueError(f'--submit: one result is expected, not {n_variants}; take '
                         'one checkpoint and T, or --average')
    drawing.new_figure(1, 1)  # is matplotlib there?


def name_mean(variants: list[Variant]) -> str:
    """Return a name for the mean of variants, not a very long one."""
    name = '+'.join(variant.name for variant in variants)
    if len(name) > 80:
        name = f'{len(variants)}_{hashlib.sha256(name.encode()).hexdigest()[:8]}'
    return f'mean_of_{name}'


def main(args: argparse.Namespace) -> int:
    """Evaluate, print, and write tables and pictures into LOG_DIR/eval."""
    status = runtime.launch()
    if status is not None:
        return status
    paths = checkpoint.find_checkpoints()
    stages = read_stages(args.stages)
    nets, variants, lines = load_networks(paths, stages, args.given)
    options, facts = runtime.eval_options(), dataset.get_facts()
    folder = dataset.open_split('val', needs_masks=not args.submit)
    n_images, n_classes = dataset.n_to_evaluate(folder), len(facts['classes'])
    check_options(args, len(variants), len(folder) - n_images)
    if args.average:
        variants = [variants[0]._replace(name=name_mean(variants))]
    mode = f'{settings.DATASET}_{folder.split.replace("/", "_")}'
    names = [f'{mode}_{variant.name}{name_mode()}' for variant in variants]
    out = Path(settings.LOG_DIR) / 'eval'
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # learn it now, not after the work
    except OSError as error:
        raise OSError(f'cannot write into {out} ({error}): set another LOG_DIR'
                      ) from None
    submission = (Submission(folder, facts, out / f'{names[0]}_submit')
                  if args.submit else None)

    device = runtime.pick_device()
    if device.type == 'cpu':
        runtime.keep_freed_memory()
    team = runtime.Team(device)
    precision = runtime.pick_precision(device)
    predictor = inference.Predictor(nets, device, precision, is_averaged=args.average,
                                    **options)
    if team.is_first:
        print(*lines, sep='\n', end='\n' * bool(lines))
        for variant in variants:
            files = ', '.join(map(str, paths)) if args.average else variant.path
            told = f', T = {variant.stages}' * bool(variant.stages)
            print(f'{variant.name}: {files}, step {variant.step}, stride '
                  f'{variant.stride}{told}')
        print(f'{n_images} of {len(folder)} images of list {folder.split} in '
              f'{folder.root}; scales {runtime.show_value(options["scales"])}'
              f'{", mirrored too" * settings.EVAL_FLIP}; {precision}; processes: '
              f'{team.world}')

    # Predict and count; the first batch, in which the kernels are chosen, is timed too.
    bar = tqdm(total=n_images, desc='evaluation', unit='image',
               disable=None if team.is_first else True)

    def see(index, predictions, label):
        if submission:
            submission.see(index, predictions, label)
        bar.update(min(team.world, n_images - bar.n))

    began = time.perf_counter()
    try:
        tally = metric.evaluate(
            predictor.predict_labels,
            dataset.eval_loader(folder, n_images, device.type, team.rank, team.world),
            metric.Tally(len(variants), n_images, n_classes, device), see)
        team.largest(0)  # wait here for slower ranks, NCCL has little patience
        matrices, counts = (team.add(tensor).cpu() for tensor in
                            (tally.matrices, tally.counts))
    except RuntimeError as error:
        if not runtime.is_out_of_memory(error):
            raise
        raise ValueError(
            f'the memory of {device} does not hold the images ('
            f'{str(error).splitlines()[0]}): lower EVAL_BATCH, set EVAL_WINDOW=513 or '
            'PRECISION=bf16') from error
    bar.close()
    seconds = time.perf_counter() - began
    if submission:
        submission.finish()
    team.leave()  # when all have written
    if not team.is_first:
        return 0
    if submission:
        print(f"the server's file, checked: {submission.pack()}")
    print(f'{n_images / seconds:.2f} images/s')
    if not matrices.sum():
        print('the list has no labelled pixel, so there is nothing to score or to draw')
        return 0

    # Score, print and write.
    scored = []
    for i, matrix in enumerate(matrices):
        low, high = metric.bootstrap(counts[:, i], seed=settings.SEED)
        scored.append({**metric.score(matrix), 'mIoU_low': low, 'mIoU_high': high})
    print(metric.table(scored[0], facts['classes']) if len(scored) == 1 else
          metric.compare(scored, [variant.name for variant in variants],
                         facts['classes']))
    run = {'images_per_s': n_images / seconds, 'precision': precision,
           'scales': options['scales'],
           'averaged': list(map(str, paths)) if args.average else [],
           'environment': runtime.describe_environment(device)}
    for i, (name, variant, scores) in enumerate(zip(names, variants, scored,
                                                    strict=True)):
        write_scores(out, name, variant, scores, counts[:, i], matrices[i], folder,
                     facts, run)
        print(f'scores: {out / name}.json, .csv, _images.csv, _confusion.png')
    worst = metric.image_scores(counts[:, 0]).nan_to_num(2).argsort().tolist()
    for kind, chosen in (('', list(range(n_images))[:args.pictures]),
                         ('_worst', worst[:args.worst])):
        if chosen:
            draw_images(predictor, folder, chosen, counts[:, 0], facts).save(
                out / f'{names[0]}{kind}.png')
            print(f'pictures: {out / names[0]}{kind}.png')
    return 0


if __name__ == '__main__':
    runtime.run(main, args)
