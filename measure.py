"""Measure the model in settings: what it costs, and how fast it runs here.

    python measure.py cost N_LAYERS=50               # parameters and operations
    python measure.py table1                         # of all heads, beside the paper
    python measure.py speed N_LAYERS=50 DATA_ROOT=... TRAIN_SPLIT=train
    python measure.py options N_LAYERS=50 DATA_ROOT=... TRAIN_SPLIT=train

`speed` runs our loader, training step and evaluation in turn with the released code's
way of doing the same (float images, the whole picture resized in float, NCHW, fp32) and
with torchvision's DeepLabV3, then train.py as it is; `options` adds our options to the
released code's way, one after the other. All print tables and write JSON to LOG_DIR.
"""
import runtime


def add_options(parser) -> None:
    parser.add_argument('what', choices=('cost', 'table1', 'speed', 'options'))
    parser.add_argument('--size', type=int, default=513, metavar='PIXELS',
                        help='side of the image that is counted (513)')
    parser.add_argument('--only', default='', metavar='PARTS',
                        help='of speed: startup,loader,step,training,evaluation,multi; '
                             'of options: loader,step,evaluation,multi (all)')
    parser.add_argument('--rounds', type=int, default=5,
                        help='turns of each side (5)')
    parser.add_argument('--step-batch', type=int, default=2, metavar='CROPS',
                        help='of the measured training step (2); all ways of doing it '
                             'are in memory at a time')
    parser.add_argument('--profile', action='store_true',
                        help='also write traces of our step and evaluation, and print '
                             'their ten costliest kinds of operation')


if __name__ == '__main__':
    args = runtime.read_command_line(__doc__, add_options)  # before the slow imports

import argparse
from pathlib import Path

import checkpoint
import dataset
import settings
from measurement import cost, manners, sides, speed, tables


def measure_speed(args: argparse.Namespace) -> dict:
    """Measure the parts that are asked for, and print each as it is done.

    Returns:
        A result for each part, `markdown` with their tables, `environment`.
    """
    is_options = args.what == 'options'
    known = speed.OPTION_PARTS if is_options else speed.PARTS
    parts = [part for part in args.only.split(',') if part] or known
    for part in parts:
        if part not in known:
            raise ValueError(f'--only {args.only}: {part} is none of '
                             f'{", ".join(known)}')
    if min(args.rounds, args.step_batch) < 1:
        raise ValueError(f'--rounds {args.rounds} and --step-batch {args.step_batch}: '
                         'at least 1 is expected')
    # Say what is missing before anything takes time.
    device = runtime.pick_device()
    if {'startup', 'loader', 'training'} & {*parts}:
        dataset.open_split('train')
    if settings.CHECKPOINT and 'evaluation' in parts and not is_options:
        dataset.open_split('val')
    out = make_folder()
    print(f'ResNet-{settings.N_LAYERS}, HEAD={settings.HEAD}, stride '
          f'{settings.STRIDE}, {args.step_batch} crops of '
          f'{"x".join(map(str, dataset.crop_size()))}, pictures of '
          f'{"x".join(map(str, sides.EVAL_SIZE))}')
    ignored = [name for name, value in manners.OURS_ALONE.items()
               if getattr(settings, name) != value]
    if ignored:
        print(f'note: the step is measured without {", ".join(ignored)}, which the '
              'others do not have')
    result, texts = {}, []
    for part in sorted(set(parts), key=known.index):
        found = speed.measure_part(part, is_options, args.rounds, args.step_batch)
        result[part] = found
        text = tables.describe(part, found)
        print(f'\n{text}')
        texts.append(text)
    for part in ('step', 'evaluation') if args.profile else ():
        trace = out / f'measure_trace_{part}.json'
        found = speed.profile_part(part, args.step_batch, trace)
        result[f'profile_{part}'] = found
        text = tables.describe_profile(part, found)
        print(f'\n{text}\ntrace: {trace}')
        texts.append(text)
    result['environment'] = runtime.describe_environment(device)
    print()
    for key, value in result['environment'].items():
        print(f'{key}: {value}')
    return {**result, 'markdown': '\n\n'.join(texts) + '\n'}


def make_folder() -> Path:
    """Return LOG_DIR, which is made if it is not there."""
    out = Path(settings.LOG_DIR)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f'cannot write into LOG_DIR={out} ({error}): give a folder that '
                      'can be written') from None
    return out


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
        result = measure_speed(args)
    out = make_folder()
    result['settings'] = runtime.snapshot()
    files = {'md': result.pop('markdown', ''), 'json': runtime.as_json(result) + '\n'}
    for kind, text in files.items():
        if text:
            runtime.write_text(out / f'measure_{args.what}.{kind}', text)
    print('numbers: ' + ', '.join(f'{out}/measure_{args.what}.{kind}'
                                  for kind, text in files.items() if text))


if __name__ == '__main__':
    runtime.run(main, args)
