"""Measure the model in settings: what it costs, and how fast it runs here.

    python measure.py cost N_LAYERS=50               # parameters and operations
    python measure.py table1                         # of all heads, beside the paper
    python measure.py speed N_LAYERS=50 DATA_ROOT=... TRAIN_SPLIT=train
    python measure.py options N_LAYERS=50

`speed` compares our loader, training step and evaluation with those of the released
code and with torchvision's DeepLabV3, and runs train.py as it is; `options` adds our
options to the released code, one after the other. They print tables, and write them and
JSON to LOG_DIR.
"""
import argparse
from pathlib import Path

import checkpoint
import config
import dataset
import distributed
import logger
import settings
from config import UserError
from measurement import cost, speed, tables


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('what', choices=('cost', 'table1', 'speed', 'options'))
    parser.add_argument('--size', type=int, default=513, metavar='PIXELS',
                        help='side of the images that are counted and evaluated (513)')
    parser.add_argument('--only', default='', metavar='PARTS',
                        help=f'of speed: {",".join(speed.PARTS)}; of options: '
                             f'{",".join(speed.OPTION_PARTS)} (all)')
    parser.add_argument('--rounds', type=int, default=5,
                        help='turns of each implementation (5)')
    parser.add_argument('--step-batch', type=int, default=2, metavar='CROPS',
                        help='of the training step that is measured (2)')
    parser.add_argument('--compile', action='store_true',
                        help='measure ours with COMPILE=true too')


def choose_parts(args: argparse.Namespace) -> list[str]:
    """Return the parts to measure, after a check of what they need."""
    known = speed.OPTION_PARTS if args.what == 'options' else speed.PARTS
    wanted = args.only.split(',') if args.only else known
    for part in wanted:
        if part not in known:
            raise UserError(f'--only {args.only}: {part} is none of {", ".join(known)}')
    if min(args.rounds, args.step_batch, args.size) < 1:
        raise UserError(f'--rounds {args.rounds}, --step-batch {args.step_batch} and '
                        f'--size {args.size}: at least 1 is expected')
    if 'loader' in wanted or 'training' in wanted:
        dataset.open_split('train')
    return [part for part in known if part in wanted]


def measure_speed(args: argparse.Namespace) -> dict:
    """Measure the parts that are asked for, and print each as it is done."""
    results, texts = {}, []
    parts = choose_parts(args)
    print(f'ResNet-{settings.N_LAYERS}, HEAD={settings.HEAD}, STRIDE={settings.STRIDE},'
          f' {args.step_batch} crops a step, images of {args.size}x{args.size}')
    for part in parts:
        results[part] = speed.measure_part(part, args)
        texts.append(tables.describe(part, results[part]))
        print(f'\n{texts[-1]}', flush=True)
    return {**results, 'markdown': '\n\n'.join(texts) + '\n'}


def make_folder() -> Path:
    """Return LOG_DIR, which is made if it is not there."""
    try:
        Path(settings.LOG_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write into LOG_DIR={settings.LOG_DIR} ({error}): give '
                        'a folder that can be written') from None
    return Path(settings.LOG_DIR)


def main() -> None:
    """Measure, print, and write LOG_DIR/measure_<what>.json and .md."""
    args = config.parse_args(__doc__, add_options)
    if settings.CHECKPOINT:
        found = checkpoint.load(settings.CHECKPOINT)['settings']
        checkpoint.use_checkpoint_architecture(found)
    if args.what == 'cost':
        result = cost.measure_cost(args.size)
    elif args.what == 'table1':
        result = cost.measure_table_1(args.size)
    else:
        result = measure_speed(args)
    result['environment'] = logger.describe_environment(distributed.pick_device())
    result['settings'] = config.snapshot()
    out = make_folder()
    if 'markdown' in result:
        logger.write_text(out / f'measure_{args.what}.md', result.pop('markdown'))
    logger.write_text(out / f'measure_{args.what}.json', logger.to_json(result) + '\n')
    print(f'\nnumbers: {out}/measure_{args.what}.json')


if __name__ == '__main__':
    config.run(main)
