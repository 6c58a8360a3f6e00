"""The files of an evaluation: scores as JSON and CSV, the confusion matrix, images.

    python eval.py --worst 12        # writes them into LOG_DIR/eval
"""
import argparse
import csv
import io
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import config
import dataset
import drawing
import inference
import loader
import logger
import metrics
import settings
from evaluation.confusion import confusion_figure


class Variant(NamedTuple):
    """What one prediction comes from: a network and T, or the mean of several."""
    name: str                # for files and tables
    paths: list[str]         # the checkpoint; several for a mean
    step: int
    stride: int
    stages: int              # EM iterations; 0 for a head without them
    settings: dict[str, Any]


def make_paths(variants: Sequence[Variant], split: str) -> list[Path]:
    """Return the paths of the variants' files, without suffixes, in LOG_DIR/eval.

    Raises:
        UserError: if the folder cannot be written.
    """
    folder = Path(settings.LOG_DIR) / 'eval'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise config.UserError(f'cannot write into {folder} ({error}): set another '
                               'LOG_DIR') from None
    return [folder / file_name(variant.name, split) for variant in variants]


def file_name(variant_name: str, split: str) -> str:
    """Return the name of a variant's files, which tells how it was evaluated."""
    options = config.eval_options()
    parts = [settings.DATASET, split.replace('/', '_'), variant_name]
    if settings.EVAL_STRIDE:
        parts.append(f'stride{settings.EVAL_STRIDE}')
    if settings.EVAL_MODE == 'multi':
        parts.append('multi' + '-'.join(map(str, options['scales'])))
    if options['use_flip']:
        parts.append('flip')
    if any(options['window']):
        h, w = options['window']
        parts.append(f'window{h}x{w}by{options["step"]}')
    if settings.EVAL_IMAGES:
        parts.append(f'first{settings.EVAL_IMAGES}')
    return '_'.join(parts)


# -- scores ----------------------------------------------------------------------------

def report_scores(files: list[Path], variants: list[Variant],
                  meter: metrics.ConfusionMeter, data: dataset.SegmentationDataset,
                  predictor: inference.Predictor, images_per_s: float) -> None:
    """Print the scores of all variants and write them into files."""
    classes, all_scores = dataset.get_dataset_info()['classes'], []
    for i, matrix in enumerate(meter.matrices):
        low, high = metrics.bootstrap_interval(meter.counts[:, i], seed=settings.SEED)
        all_scores.append({**metrics.compute_scores(matrix), 'mIoU_low': low,
                           'mIoU_high': high})
    if len(variants) == 1:
        print(metrics.format_scores(all_scores[0], classes))
    else:
        names = [variant.name for variant in variants]
        print(metrics.format_comparison(all_scores, names, classes))
    environment = logger.describe_environment(predictor.device)
    for i, (file, variant) in enumerate(zip(files, variants, strict=True)):
        result = {
            'checkpoint': variant.paths[0], 'step': variant.step,
            'stages': variant.stages, 'n_images': len(meter.counts), **all_scores[i],
            'classes': classes, 'confusion': meter.matrices[i].tolist(),
            'images_per_s': images_per_s, 'precision': predictor.precision,
            'scales': predictor.scales,
            'averaged': variant.paths if predictor.is_averaged else [],
            'environment': environment, 'settings': variant.settings}
        write_scores(file, result, meter.counts[:, i], data.ids)
        print(f'scores: {file}.json, .csv, _images.csv, _confusion.png')


def write_scores(file: Path, result: dict[str, Any], counts: Tensor, ids: Sequence[str]
                 ) -> None:
    """Write NAME.json, NAME.csv, NAME_images.csv and NAME_confusion.png.

    Args:
        file: folder / NAME.
        result: the content of the JSON, with classes, IoU, acc, mIoU and confusion.
        counts: (n, 3, classes) pixels of each image, from metrics.ConfusionMeter.
        ids: names of the images; there may be more than were evaluated.
    """
    logger.write_text(f'{file}.json', logger.to_json(result, 1) + '\n')
    matrix, classes = np.array(result['confusion']), result['classes']
    write_csv(f'{file}.csv',
              ('class', 'IoU', 'accuracy', 'true_pixels', 'predicted_pixels'),
              zip(classes, result['IoU'], result['acc'], matrix.sum(1).tolist(),
                  matrix.sum(0).tolist(), strict=True))
    correct, true, _ = counts.double().sum(2).unbind(1)
    write_csv(f'{file}_images.csv', ('image', 'mIoU', 'accuracy'),
              zip(ids[:len(counts)], metrics.image_mious(counts).tolist(),
                  (correct / true).tolist(), strict=True))
    figure = confusion_figure(matrix, classes,
                              f'{file.name}, mIoU {100 * result["mIoU"]:.2f}')
    drawing.save_figure(figure, f'{file}_confusion.png')


def write_csv(path: str, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a table; a number that is not finite becomes an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(header)
    for row in rows:
        writer.writerow([format_cell(value) for value in row])
    logger.write_text(path, text.getvalue())


def format_cell(value: str | int | float) -> str:
    """Return a value as text for a table."""
    if not isinstance(value, float):
        return str(value)
    return f'{value:.6f}' if math.isfinite(value) else ''


# -- images ----------------------------------------------------------------------------

def save_images(file: Path, args: argparse.Namespace, counts: Tensor,
                data: dataset.SegmentationDataset, predictor: inference.Predictor
                ) -> None:
    """Draw the images that --pictures and --worst ask for, of the first variant."""
    mious = metrics.image_mious(counts)
    worst = mious.nan_to_num(2).argsort().tolist()  # without a label: last
    for path, indices in ((f'{file}.png', range(len(counts))[:args.pictures]),
                          (f'{file}_worst.png', worst[:args.worst])):
        if indices:
            rows = [draw_image(data, i, mious[i], predictor) for i in tqdm(
                indices, 'drawing', unit='image', leave=False, disable=None)]
            drawing.sheet(rows).save(path)
            print(f'images: {path}')


def draw_image(data: dataset.SegmentationDataset, index: int, miou: float,
               predictor: inference.Predictor) -> Image.Image:
    """Draw an image, its truth, its prediction and the errors in one row."""
    info, (_, image, label) = dataset.get_dataset_info(), loader.EvalSet(data)[index]
    prediction = predictor.predict_labels([image])[0][0].byte().cpu()
    return drawing.worst_row(
        image.permute(1, 2, 0).numpy(), label.numpy(), prediction.numpy(),
        f'{data.ids[index]}, mIoU {100 * miou:.1f}', info['classes'], info['palette'])
