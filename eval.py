"""Evaluate a checkpoint on a split: pixel accuracy, mIoU and the table of classes.

    python eval.py                                   # final.pth of LOG_DIR
    python eval.py CHECKPOINT=path/to/any.pth --pictures 12

Takes this project's checkpoints and the released ones. What the tensors mean comes from
the checkpoint; what training was given on its command line holds here too, and the
words of this command line come on top.
"""
import runtime


def add_options(parser) -> None:
    parser.add_argument('--pictures', type=int, default=0, metavar='N',
                        help='draw input, truth and prediction of N images')


if __name__ == '__main__':
    args = runtime.read_command_line(__doc__, add_options)  # before the slow imports

import argparse
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
import dataset
import inference
import metric
import network
import settings

NOT_TAKEN_OVER = ('CHECKPOINT', 'LOG_DIR', 'RESUME', 'DEVICE', 'RANKS',
                  'N_WORKERS')


def find_checkpoint() -> Path:
    """Return the file to evaluate: CHECKPOINT, or the last of LOG_DIR."""
    folder = Path(settings.LOG_DIR)
    if settings.CHECKPOINT:
        return Path(settings.CHECKPOINT)
    there = [p for p in (folder / 'final.pth', folder / 'latest.pth') if p.exists()]
    return max(there, key=lambda p: p.stat().st_mtime, default=folder / 'final.pth')


def load_network(path: Path, given: dict) -> tuple[network.Segmenter, list[str], dict]:
    """Build the network of a checkpoint, with its weights.

    Args:
        path: of the checkpoint.
        given: values of this command line, which win over those of training's.

    Returns:
        (net, lines, content): the network in evaluation mode, lines for the log, and
        the rest of the checkpoint.

    Raises:
        ValueError, FileNotFoundError: in a sentence; a network is never scored with
        weights that are not the checkpoint's.
    """
    content = checkpoint.load(path)
    trained = {name: value for name, value in content['run'].get('given', {}).items()
               if name not in NOT_TAKEN_OVER and hasattr(settings, name)}
    kept = {name: getattr(settings, name) for name in NOT_TAKEN_OVER}
    runtime.apply({**trained, **kept, **given})  # training's recipe may set them too
    lines = [f'{name} = {runtime.show_value(value)} as in training'
             for name, value in trained.items() if name not in given]
    lines += checkpoint.adopt_architecture(content['settings'])
    facts = dataset.get_facts()
    n_classes = checkpoint.n_classes_of(content['net'])
    if n_classes and n_classes != len(facts['classes']):
        raise ValueError(f'{path} predicts {n_classes} classes, but the data set '
                         f'{settings.DATASET} has {len(facts["classes"])}: give the '
                         'DATASET that it was trained on')
    net = network.build(len(facts['classes']), is_eval=True)
    checkpoint.load_net(net, content['net'], path)
    return net, lines, content


class Sheet:
    """Collects input, truth and prediction of the first n pictures as one image."""

    def __init__(self, n: int, palette: list[int]):
        self.n, self.palette, self.rows = n, palette, []

    def see(self, name, image, label, prediction) -> None:
        """Take a picture in: image (3, h, w) uint8, label and prediction (h, w)."""
        if len(self.rows) < self.n:
            white = torch.full((label.shape[0], 3, 3), 255, dtype=torch.uint8)
            self.rows.append(torch.cat([
                image.permute(1, 2, 0), white, dataset.colour(label, self.palette),
                white, dataset.colour(prediction, self.palette)], 1))

    def save(self, path: Path, gap: int = 9) -> None:
        """Write the rows, two beside each other, on white."""
        h = max(row.shape[0] for row in self.rows) + gap
        w = max(row.shape[1] for row in self.rows) + 2 * gap
        n_down = -(-len(self.rows) // 2)
        sheet = torch.full((n_down * h, min(len(self.rows), 2) * w, 3), 255,
                           dtype=torch.uint8)
        for i, row in enumerate(self.rows):
            top, left = i // 2 * h, i % 2 * w
            sheet[top:top + row.shape[0], left:left + row.shape[1]] = row
        Image.fromarray(sheet[:-gap, :-2 * gap].numpy()).save(path)


def main(args: argparse.Namespace) -> int:
    """Evaluate, print, and write JSON and pictures into LOG_DIR/eval."""
    status = runtime.launch()
    if status is not None:
        return status
    path = find_checkpoint()
    net, lines, content = load_network(path, args.given)
    facts = dataset.get_facts()
    folder = dataset.open_split('val')
    device = runtime.pick_device()
    team = runtime.Team(device)
    precision = runtime.pick_precision(device)
    inference.fold(net, precision).to(device)
    if settings.CHANNELS_LAST:
        net.to(memory_format=torch.channels_last)
    run = torch.compile(net, dynamic=True) if settings.COMPILE else net
    stages = settings.EVAL_STAGE_NUM or settings.STAGE_NUM
    lines.append(f'{path}, step {content["step"]}, on {len(folder)} images of list '
                 f'{folder.split} in {folder.root}, stride {net.stride}, T = {stages}, '
                 f'{precision}, {team.world} ranks')
    if team.is_first:
        print('\n'.join(lines))

    n_classes, sheet = len(facts['classes']), Sheet(args.pictures, facts['palette'])
    began = time.perf_counter()
    with runtime.autocast(device, precision):
        matrix = metric.evaluate(
            lambda image: inference.predict_logits(run, image, net),
            tqdm(dataset.eval_loader(folder, team.rank, team.world), 'evaluation',
                 unit='image', disable=None if team.is_first else True),
            n_classes, sheet.see)
    team.add(matrix)
    team.leave()
    if not team.is_first:
        return 0
    seconds = time.perf_counter() - began
    scores = metric.score(matrix)
    print(metric.table(scores, facts['classes']))
    print(f'{len(folder) / seconds:.2f} images/s')

    out = Path(settings.LOG_DIR) / 'eval'
    out.mkdir(parents=True, exist_ok=True)
    name = f'{settings.DATASET}_{folder.split}_{path.stem}'
    if settings.EVAL_STRIDE:
        name += f'_stride{settings.EVAL_STRIDE}'
    if settings.EVAL_STAGE_NUM:
        name += f'_T{settings.EVAL_STAGE_NUM}'
    result = {'checkpoint': str(path), 'step': content['step'], 'n_images': len(folder),
              **scores, 'classes': facts['classes'], 'confusion': matrix.tolist(),
              'images_per_s': len(folder) / seconds, 'precision': precision,
              'settings': runtime.snapshot(),
              'environment': runtime.describe_environment(device)}
    runtime.write_text(out / f'{name}.json', runtime.as_json(result, 1) + '\n')
    print(f'scores: {out / name}.json')
    if sheet.rows:
        sheet.save(out / f'{name}.png')
        print(f'pictures: {out / name}.png')
    return 0


if __name__ == '__main__':
    runtime.run(main, args)
