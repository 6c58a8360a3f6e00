"""Settings of a run: the command line, recipes, checks, and errors in one sentence.

    python train.py RECIPE=demo STAGE_NUM=5 LR=0.02     # NAME=VALUE of settings.py
"""
import argparse
import ast
import difflib
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import recipes
import settings

ROOT = Path(__file__).resolve().parent  # the folder of the project
EXIT_USER = 2       # a user's error was printed
EXIT_STOPPED = 75   # SIGTERM: the step is saved, the same command resumes
EXIT_CTRL_C = 130
# These may differ between a run and its continuation: they do not change the result.
RESUME_IGNORED = (
    'RECIPE', 'RESUME', 'LOG_DIR', 'DATA_ROOT', 'MODEL_DIR', 'DEVICE', 'RANKS',
    'CHANNELS_LAST', 'COMPILE', 'RECOMPUTE', 'N_WORKERS', 'LOG_EVERY', 'IMAGE_EVERY',
    'EVAL_EVERY', 'ITER_SAVE', 'KEEP', 'CHECKPOINT', 'VAL_SPLIT', 'EVAL_STRIDE',
    'EVAL_STAGE_NUM', 'EVAL_MODE', 'EVAL_SCALES', 'EVAL_FLIP', 'EVAL_WINDOW',
    'EVAL_STEP', 'EVAL_BATCH', 'EVAL_IMAGES')
# Settings of earlier versions, and what to do instead.
REMOVED = {
    'WINOGRAD': 'it was slower than torch in bf16; leave it out',
    'CACHE': "the system's file cache is as fast; leave it out",
    'EVAL_SCALES_WIDE': 'set EVAL_MODE=multi and EVAL_SCALES'}
WIDE_SCALES = '0.5,0.75,1.0,1.25,1.5,1.75,2.0'
TYPE_NAMES = {bool: 'true or false is', int: 'a whole number is', float: 'a number is',
              tuple: 'numbers with commas between are'}


class UserError(ValueError):
    """An error that a user can cause and mend; its text is one sentence."""


# -- settings --------------------------------------------------------------------------

def snapshot() -> dict[str, Any]:
    """Return all settings as they are now, in the order of settings.py."""
    return {name: value for name, value in vars(settings).items() if name.isupper()}


def parse_value(name: str, text: str, default: Any) -> Any:
    """Parse one value with the type of its default.

    Args:
        name: of the setting, for the message.
        text: what stands after the first '='.
        default: bool: true, false, 1 or 0. int: 6e5 too. tuple: 0.5,1.0 in brackets or
            without. str: taken as it is.

    Raises:
        UserError: if the text has another type.
    """
    try:
        if isinstance(default, bool):
            return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
        if isinstance(default, int):
            return parse_int(text)
        if isinstance(default, float):
            if not math.isfinite(float(text)):
                raise ValueError
            return float(text)
        if isinstance(default, tuple):
            parts = [p.strip() for p in text.strip('()[] ').split(',') if p.strip()]
            if not parts:
                raise ValueError
            return tuple(parse_value(name, part, default[0]) for part in parts)
        return text
    except (KeyError, ValueError, OverflowError):
        raise UserError(f'{name}={text}: {TYPE_NAMES[type(default)]} expected, as in '
                        f'{name}={format_value(default)}') from None


def parse_int(text: str) -> int:
    """Parse a whole number, written as 600000 or 6e5."""
    if re.fullmatch(r'[+-]?\d+', text):
        return int(text)
    number = float(text)
    if number != int(number):
        raise ValueError
    return int(number)


def format_value(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, tuple):
        return ','.join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def apply_overrides(words: list[str]) -> dict[str, Any]:
    """Apply NAME=VALUE words to settings: the recipe first, then the rest in order.

    Returns:
        The values of the words, without the settings of the recipe.

    Raises:
        UserError: for an unknown name or recipe, or a wrong type.
    """
    defaults, overrides = snapshot(), {}
    for word in words:
        name, equals, text = word.partition('=')
        if not equals:
            raise UserError(f'{word!r} is not understood: settings are given as '
                            'NAME=VALUE, options start with --, see --help')
        if name in REMOVED:
            raise UserError(f'the setting {name} was removed: {REMOVED[name]}')
        default = defaults[check_name(name, defaults, 'setting')]
        overrides[name] = parse_value(name, text, default)
    recipe = {'RECIPE': settings.RECIPE} if settings.RECIPE else {}
    apply_settings({**recipe, **overrides})
    return overrides


def apply_settings(values: dict[str, Any]) -> None:
    """Set settings from a mapping; the settings of its RECIPE are set before it."""
    recipe = {}
    if values.get('RECIPE'):
        name = check_name(values['RECIPE'], recipes.RECIPES, 'recipe')
        recipe = recipes.RECIPES[name]['settings']
    for name, value in {**recipe, **values}.items():
        setattr(settings, check_name(name, snapshot(), 'setting'), value)


def check_name(name: str, names: Iterable[str], what: str) -> str:
    """Return the name if it is among the names.

    Raises:
        UserError: otherwise, with the nearest name.
    """
    if name in names:
        return name
    wanted = name.upper() if what == 'setting' else name
    near = difflib.get_close_matches(wanted, list(names), n=1, cutoff=0.5)
    hint = f'did you mean {near[0]}?' if near else f'--help lists every {what}'
    raise UserError(f'there is no {what} {name}: {hint}')


def rewrite_settings(text: str, values: dict[str, Any]) -> str:
    """Put values into the text of a settings.py; lines that stay equal stay verbatim.

    Args:
        text: of a settings.py.
        values: of the names to set; names that the text does not have are left out.
    """
    lines = text.splitlines()
    for node in reversed(ast.parse(text).body):  # from the end: line numbers stay true
        if not isinstance(node, ast.Assign):
            continue
        name = node.targets[0].id
        if name in values and values[name] != ast.literal_eval(node.value):
            last = lines[node.end_lineno - 1].encode()
            comment = last[node.end_col_offset:].decode().strip()
            line = f'{name} = {values[name]!r}'
            lines[node.lineno - 1:node.end_lineno] = [f'{line:<27} {comment}'.rstrip()]
    return '\n'.join(lines) + '\n'


def settings_text() -> str:
    """Return the settings of this run in the spelling and order of settings.py."""
    return rewrite_settings((ROOT / 'settings.py').read_text(encoding='utf-8'),
                            snapshot())


# -- checks ----------------------------------------------------------------------------

def eval_options() -> dict[str, Any]:
    """Return the evaluation settings as arguments of inference.Predictor.

    Raises:
        UserError: for values that are out of range.
    """
    s = settings
    if s.EVAL_MODE == 'wide':
        raise UserError('EVAL_MODE=wide was removed: set EVAL_MODE=multi EVAL_SCALES='
                        f'{WIDE_SCALES}')
    if s.EVAL_MODE not in ('single', 'multi'):
        raise UserError(f'EVAL_MODE={s.EVAL_MODE} is none of single, multi')
    scales = s.EVAL_SCALES if s.EVAL_MODE == 'multi' else (1.0,)
    if min(scales) <= 0 or max(scales) > 16:
        raise UserError(f'EVAL_SCALES={format_value(scales)}: numbers above 0, and at '
                        'most 16, are expected')
    if len(s.EVAL_WINDOW) > 2 or min(s.EVAL_WINDOW) < 0:
        raise UserError(f'EVAL_WINDOW={format_value(s.EVAL_WINDOW)}: one side or '
                        'height,width in pixels is expected, as in 513, or 0 for the '
                        'whole image')
    if not 0 < s.EVAL_STEP <= 1:
        raise UserError(f'EVAL_STEP={s.EVAL_STEP}: a share of the window above 0, and '
                        'at most 1, is expected')
    if s.EVAL_BATCH < 1 or s.EVAL_IMAGES < 0:
        raise UserError(f'EVAL_BATCH={s.EVAL_BATCH} and EVAL_IMAGES={s.EVAL_IMAGES}: '
                        'at least 1 and 0 are expected')
    return {'scales': scales, 'use_flip': s.EVAL_FLIP,
            'window': (s.EVAL_WINDOW * 2)[:2], 'step': s.EVAL_STEP,
            'batch': s.EVAL_BATCH, 'channels_last': s.CHANNELS_LAST,
            'is_compiled': s.COMPILE}


# Allowed ranges: lowest and highest value, and the settings they hold for.
RANGES = (
    (0, 1, 'BN_MOM EM_MOM LR_MOM DROPOUT OHEM_KEPT OHEM_BELOW'),
    (1, math.inf, 'BATCH_SIZE ACCUMULATE ITER_MAX LR_EVERY LOG_EVERY ITER_SAVE '
                  'CROP_SIZE HEAD_CHANNELS'),
    (0, math.inf, 'SEED FC1_CHANNELS EM_LAMBDA LR LR_POWER BIAS_LR CLIP_GRAD '
                  'WEIGHT_DECAY N_WORKERS IMAGE_EVERY EVAL_EVERY KEEP CROP_WIDTH '
                  'LR_END OHEM_MIN AUX_WEIGHT'))
# Of tuples: the setting, how many numbers (0: any), and the lowest value.
TUPLE_RANGES = (('MEAN', 3, 0), ('STD', 3, 1e-6), ('SCALES', 0, 1e-3),
                ('MULTI_GRID', 0, 1), ('CLASS_WEIGHTS', 0, 0))


def check_train_settings(world_size: int = 1) -> None:
    """Check the settings of training on so many ranks.

    Raises:
        UserError: for values out of range, or settings that do not go together.
    """
    s = settings
    for low, high, names in RANGES:
        for name in names.split():
            if not low <= getattr(s, name) <= high:
                wanted = f'{low} or more' if high == math.inf else f'{low} to {high}'
                raise UserError(f'{name}={getattr(s, name)}: {wanted} is expected')
    for name, n, low in TUPLE_RANGES:
        value = getattr(s, name)
        if min(value) < low or (n and len(value) != n):
            raise UserError(f'{name}={format_value(value)}: {n or "some"} numbers of '
                            f'at least {low} are expected')
    if s.RESUME not in ('', 'force'):
        raise UserError(f"RESUME={s.RESUME} is unknown: 'force' or nothing is expected")
    n_parts = world_size * s.ACCUMULATE
    if s.BATCH_SIZE % n_parts:
        raise UserError(f'BATCH_SIZE={s.BATCH_SIZE}, of all ranks together, cannot be '
                        f'computed in equal parts by {world_size} ranks with '
                        f'ACCUMULATE={s.ACCUMULATE}: make it a multiple of {n_parts}, '
                        'or set RANKS')
    check_deeplab_batch()
    check_loss_settings()


def check_deeplab_batch() -> None:
    """Check that DeepLab sees two images or more at a time.

    Raises:
        UserError: for one, whose pooled pixel cannot be normalised.
    """
    is_deeplab = settings.HEAD in ('deeplabv3', 'deeplabv3plus')
    if is_deeplab and settings.BATCH_SIZE // settings.ACCUMULATE == 1:
        raise UserError('DeepLab pools each image to one pixel, so that its batch norm '
                        'needs two images or more at a time, but there is one: raise '
                        'BATCH_SIZE or lower ACCUMULATE')


def check_loss_settings() -> None:
    """Check LOSS_NORM and the settings of OHEM.

    Raises:
        UserError: for settings that do not go together.
    """
    s = settings
    if s.LOSS_NORM not in ('all', 'valid'):
        raise UserError(f'LOSS_NORM={s.LOSS_NORM} is none of all, valid')
    if not (s.OHEM_KEPT or s.OHEM_BELOW):
        return
    n_pixels = s.CROP_SIZE * (s.CROP_WIDTH or s.CROP_SIZE)
    if s.OHEM_KEPT and s.OHEM_BELOW:
        raise UserError(f'OHEM_KEPT={s.OHEM_KEPT} and OHEM_BELOW={s.OHEM_BELOW}: only '
                        'one of the two is expected, set the other to 0')
    if s.LOSS_NORM != 'all':
        raise UserError(f'LOSS_NORM={s.LOSS_NORM} has no effect with OHEM, which takes '
                        'the mean over the pixels it keeps: leave it at all')
    if s.OHEM_MIN >= n_pixels:
        raise UserError(f'OHEM_MIN={s.OHEM_MIN}, but a crop has {n_pixels} pixels, so '
                        f'OHEM would keep them all: {n_pixels // 3} would do')


# -- command line and errors -----------------------------------------------------------

def parse_args(doc: str, add_options: Callable | None = None, inputs: str = ''
               ) -> argparse.Namespace:
    """Parse options and NAME=VALUE words, and apply the words to settings.

    Args:
        doc: the script's docstring.
        add_options: called with the parser; adds the options of the script.
        inputs: what words that do not begin with NAME= are, as 'PICTURE'; '' if the
            script takes none.

    Returns:
        The options; `overrides` holds the values of the words, `inputs` the others.

    Raises:
        UserError: for a wrong word.
    """
    settings_lines = (ROOT / 'settings.py').read_text(encoding='utf-8').splitlines()
    epilog = ['settings and their defaults:']
    epilog += [f'  {line}' for line in settings_lines if re.match(r'[A-Z]|# --', line)]
    epilog += ['', 'recipes:']
    epilog += [f'  RECIPE={name:18} {recipe["about"]}'
               for name, recipe in recipes.RECIPES.items()]
    words = f'{inputs} ... [NAME=VALUE ...]' if inputs else '[NAME=VALUE ...]'
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f'%(prog)s [options] {words}', epilog='\n'.join(epilog))
    if add_options:
        add_options(parser)
    parser.add_argument('words', nargs='*', metavar='NAME=VALUE',
                        help='override a setting of settings.py')
    args = parser.parse_intermixed_args()
    args.inputs = [word for word in args.words
                   if inputs and not re.match('[A-Z][A-Z0-9_]*=', word)]
    args.overrides = apply_overrides([word for word in args.words
                                      if word not in args.inputs])
    return args


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit; an error that a user can cause is one sentence."""
    try:
        status = main() or 0
    except KeyboardInterrupt:
        status = EXIT_CTRL_C
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except UserError as error:
        status = report_error(get_message(error))
    except Exception as error:
        status = 1
        if is_rank_lost(error):
            time.sleep(3)  # let the rank that failed print its error first
            print('error: another rank has ended', file=sys.stderr)
        else:
            traceback.print_exc()
    sys.exit(status)


def report_error(message: str) -> int:
    """Print the error of a user and return the exit status for it."""
    if int(os.environ.get('RANK', 0)):
        time.sleep(3)  # let rank 0 print an error that all ranks have
    print(f'error: {message}', file=sys.stderr, flush=True)
    return EXIT_USER


def get_message(error: UserError) -> str:
    """Return the sentence of an error, also of one from a loader process."""
    text = str(error)
    if 'in DataLoader worker' in text:  # torch puts the whole traceback in front
        text = text.strip().splitlines()[-1].partition(': ')[2]
    return text


def is_rank_lost(error: Exception) -> bool:
    """Return whether a collective operation failed because another rank has ended."""
    signs = ('Connection closed', 'Connection reset', 'NCCL', 'gloo')
    return (int(os.environ.get('WORLD_SIZE', 1)) > 1 and isinstance(error, RuntimeError)
            and any(sign in str(error) for sign in signs))
