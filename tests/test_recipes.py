"""Every recipe and every data set: three steps and an evaluation, on made-up pictures.

The numbers are made tiny; all else of a recipe stays in force, and its data lie in the
layout that its data set has.
"""
import json
import math
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import config
import eval as evaluation
import recipes
import settings
import train

# Cityscapes: the label id that each of the 19 classes has in the files.
CITY_IDS = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
# For each data set: the number of classes, the values that its masks may hold, and a
# function from such a value to the class, or None where it is ignored.
SETS = {
    'voc': (21, [*range(21), 255], lambda v: v if v < 255 else None),
    'coco_voc': (21, [*range(21), 255], lambda v: v if v < 255 else None),
    'context': (60, [*range(60), 255], lambda v: v if v < 255 else None),
    'context59': (59, [*range(60), 255], lambda v: v - 1 if 0 < v < 255 else None),
    'cocostuff10k': (171, [*range(171), 255], lambda v: v if v < 255 else None),
    'cocostuff164k': (171, [*range(171), 255], lambda v: v if v < 255 else None),
    'cityscapes': (19, [*range(34), 255],
                   lambda v: CITY_IDS.index(v) if v in CITY_IDS else None),
    'shapes': (10, [*range(10), 255], lambda v: v if v < 255 else None),
    'folder': (3, [0, 40, 127, 254, 255], {0: None, 40: 0, 127: 1, 254: 2,
                                           255: None}.get),
}
LISTS = {'voc': ('trainaug', 'val'), 'cocostuff10k': ('train', 'test')}


def write_set(root, name, n_train=3, n_val=2):
    """Write a data set in its own layout: runs of every value that a mask may hold.
    """
    values = np.array(SETS[name][1], np.uint8)
    train_list, val_list = LISTS.get(name, ('train', 'val'))
    if name == 'cityscapes':
        image, mask = 'leftImg8bit/{}_leftImg8bit.png', 'gtFine/{}_gtFine_labelIds.png'
        ids = [f'{"train/bonn" if i < n_train else "val/ulm"}/city_{i:06}_000019'
               for i in range(n_train + n_val)]
    elif name == 'folder':
        image, mask = 'pictures/{}', 'truth/{}'
        ids = [f'my picture {i}' for i in range(n_train + n_val)]
    else:
        image, mask = 'JPEGImages/{}.jpg', 'SegmentationClass/{}.png'
        ids = [f'2008_{i:06}' for i in range(n_train + n_val)]
    lines = [f'{x}.png\t{x}.png' if name == 'folder' else x for x in ids]
    draw = np.random.default_rng(len(values))
    for i, line in enumerate(lines):
        h, w = 40 + i, (80 if name == 'cityscapes' else 52) - i
        # each value is in each picture, and not as often as the next one
        runs = np.repeat(values, 1 + np.arange(len(values)) % 12)
        label = np.resize(np.roll(runs, 50 * i), (h, w))
        picture = label[..., None] // 2 + draw.integers(0, 99, (h, w, 3))
        entry = line.split('\t')[0]
        for pattern, array in ((image, picture), (mask, label)):
            path = root / pattern.replace('{}', entry)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(path)
    lists = root / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    (lists / f'{train_list}.txt').write_text('\n'.join(lines[:n_train]) + '\n')
    (lists / f'{val_list}.txt').write_text('\n'.join(lines[n_train:]) + '\n')
    if name == 'voc':  # of 5 pictures
        (lists / 'trainval.txt').write_text('\n'.join(lines) + '\n')
    if name == 'folder':
        facts = {'classes': ['road', 'lane', 'car'], 'images': image, 'masks': [mask],
                 'map': {v: 255 if SETS[name][2](v) is None else SETS[name][2](v)
                         for v in SETS[name][1]}}
        (root / 'dataset.json').write_text(json.dumps(facts))
    return [root / mask.replace('{}', line.split('\t')[-1])
            for line in lines[n_train:]]


def count_truth(files, name):
    """Count the pixels of each class in some masks, by the rule of the data set."""
    n_classes, _, class_of = SETS[name]
    counts = [0] * n_classes
    for file in files:
        with Image.open(file) as mask:
            for value in np.asarray(mask).flatten().tolist():
                if class_of(value) is not None:
                    counts[class_of(value)] += 1
    return counts


def tiny_words(wanted):
    """Return words that make a recipe tiny and leave the rest of it in force."""
    tall, wide = wanted.get('CROP_SIZE', 513), wanted.get('CROP_WIDTH', 0)
    side = 32 + tall % 2
    return {
        'CROP_SIZE': side, 'CROP_WIDTH': wide * side // tall, 'N_LAYERS': 18,
        'HEAD_CHANNELS': 16, 'FC1_CHANNELS': min(wanted.get('FC1_CHANNELS', 256), 8),
        'N_BASES': 4, 'PSA_GRID': (2, 3), 'PRETRAINED': 'none', 'BATCH_SIZE': 2,
        'ITER_MAX': 3, 'OHEM_MIN': 200, 'LOG_EVERY': 1, 'IMAGE_EVERY': 3,
        'N_WORKERS': 0, 'DEVICE': 'cpu', 'PRECISION': 'fp32'}


TENSOR = 'backbone.layer4.1.conv2.weight'  # one that is looked at


class Runs:
    """Runs each recipe once, and before it the one whose weights it starts from."""

    def __init__(self, folder):
        self.folder, self.done, self.roots = folder, {}, {}

    def root(self, name):
        if name not in self.roots:
            root = self.folder / 'data' / name
            self.roots[name] = root, write_set(root, name)
        return self.roots[name]

    def run(self, name, wanted):
        """Train and evaluate with the settings `wanted`; return what was written."""
        if name in self.done:
            return self.done[name]
        before = None
        if 'INIT_FROM' in wanted:
            stage = Path(wanted['INIT_FROM']).parent.name
            before = self.run(stage, recipes.RECIPES[stage]['settings'])
        data = wanted['DATASET']
        log = self.folder / name
        words = {**tiny_words(wanted), 'DATA_ROOT': str(self.root(data)[0]),
                 'LOG_DIR': str(log)}
        if before:
            words['INIT_FROM'] = str(before['log'] / 'final.pth')
        start = {'DATASET': data}
        if name in recipes.RECIPES:
            start = {'RECIPE': name}
        defaults = config.snapshot()
        self.call(train, {**start, **words}, defaults)
        # The rest of the words comes from the checkpoint, as a user relies on.
        self.call(evaluation, {'LOG_DIR': str(log), 'DEVICE': 'cpu', 'N_WORKERS': 0},
                  defaults)
        rows = [json.loads(x) for x in (log / 'log.jsonl').read_text().splitlines()]
        results = list((log / 'eval').glob('*.json'))
        assert len(results) == 1
        final = torch.load(log / 'final.pth', weights_only=True)
        (log / 'latest.pth').unlink()  # the momentum makes it large
        self.done[name] = {
            'log': log, 'rows': [row for row in rows if row['kind'] == 'train'],
            'result': json.loads(results[0].read_text()), 'words': words,
            'step': final['step'], 'settings': final['settings'],
            'keys': set(final['net']), 'tensor': final['net'][TENSOR].clone(),
            'text': (log / 'log.txt').read_text(),
            'pictures': list((log / 'eval').glob('*.png'))}
        return self.done[name]

    def call(self, verb, values, defaults):
        """Call a script's main with settings as they are at its start."""
        words = [f'{name}={config.format_value(value)}'
                 for name, value in values.items()]
        if verb is evaluation:
            words += ['--pictures', '2']
        try:
            with mock.patch.object(sys, 'argv', [f'{verb.__name__}.py', *words]):
                assert not verb.main()
        finally:
            for name, value in defaults.items():
                setattr(settings, name, value)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('recipes')
    yield Runs(folder)
    shutil.rmtree(folder)  # a gigabyte of weights


def check_run(done, name, truth):
    """Check that three steps were taken and two pictures scored, on all classes."""
    n_classes = SETS[name][0]
    assert [row['step'] for row in done['rows']] == [1, 2, 3] and done['step'] == 3
    assert all(math.isfinite(row['loss']) and row['loss'] > 0 for row in done['rows'])
    result = done['result']
    assert result['n_images'] == 2 and result['step'] == 3
    assert len(result['classes']) == len(result['IoU']) == n_classes
    assert np.shape(result['confusion']) == (n_classes, n_classes)
    assert min(truth) > 0  # the made-up masks hold every class
    assert np.sum(result['confusion'], 1).tolist() == truth
    assert 0 <= result['mIoU'] <= 1 and result['settings']['DATASET'] == name
    assert len(done['pictures']) == 2  # of images, and of the confusion matrix


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name == 'cityscapes_r101_ohem' else pytest.mark.slow)
    for name in recipes.RECIPES])
def test_recipe_trains_and_evaluates(name, runs):
    wanted = recipes.RECIPES[name]['settings']
    done = runs.run(name, wanted)
    data = wanted['DATASET']
    check_run(done, data, count_truth(runs.root(data)[1], data))
    for key, value in wanted.items():
        if key not in done['words']:
            assert done['settings'][key] == value, key
            if key == 'EVAL_IMAGES':  # eval.py takes its own
                continue
            assert done['result']['settings'][key] == json.loads(json.dumps(value)), key
    tall, wide = (done['settings'][key] for key in ('CROP_SIZE', 'CROP_WIDTH'))
    assert f'2 crops of {tall}x{wide or tall}' in done['text']
    if '512x1024' in name:
        assert wide == 2 * tall
    # the rate falls to LR_END where it is refreshed every step, and not where in tens
    end = wanted['LR_END'] if wanted.get('LR_EVERY') == 1 else wanted.get('LR', 0.009)
    assert math.isclose(done['rows'][-1]['lr'], end)
    assert any(k.startswith('aux.') for k in done['keys']) == ('cityscapes' in name)
    assert ('head.fc1.conv.weight' in done['keys']) == (
        not re.search('emanet256|deeplab|psanet', name))
    assert ('head.conv_cat.conv.weight' in done['keys']) == bool(
        re.search(r'\dx\d', name))
    start = 'network: all weights of' if 'INIT_FROM' in wanted else 'from scratch'
    assert start in done['text']


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(set(recipes.DATASETS) - {
    recipe['settings']['DATASET'] for recipe in recipes.RECIPES.values()}))
def test_data_set_without_a_recipe(name, runs):
    done = runs.run(f'data_{name}', {'DATASET': name})
    check_run(done, name, count_truth(runs.root(name)[1], name))


def test_every_data_set_is_covered():
    assert set(SETS) == set(recipes.DATASETS)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['voc_test_r101', 'voc_test_r152'])
def test_three_stages_are_a_chain(name, runs):
    """COCO, trainaug, trainval: each starts from what the one before it writes."""
    stages = [f'{name}_coco', f'{name}_trainaug', name]
    wanted = [recipes.RECIPES[stage]['settings'] for stage in stages]
    assert [w['DATASET'] for w in wanted] == ['coco_voc', 'voc', 'voc']
    assert 'INIT_FROM' not in wanted[0] and len({w['LOG_DIR'] for w in wanted}) == 3
    for one, other in zip(wanted, wanted[1:], strict=False):
        assert other['INIT_FROM'] == f'{one["LOG_DIR"]}/final.pth'
        assert other['N_LAYERS'] == one['N_LAYERS'] == int(name[-3:])
    found = [runs.run(stage, w) for stage, w in zip(stages, wanted, strict=True)]
    assert '3 images of list train in' in found[0]['text']
    assert '3 images of list trainaug in' in found[1]['text']
    assert '5 images of list trainval in' in found[2]['text']
    assert f'all weights of {found[1]["log"]}' in found[2]['text']
    # three steps at a ten-thousandth move the weights by little, not by nothing
    one, other = found[1]['tensor'], found[2]['tensor']
    assert 0 < (one - other).norm() < 0.01 * one.norm()


# -- the numbers of FACTS.md -----------------------------------------------------------

@pytest.mark.parametrize('name, single, multi', [
    ('voc_r101', 80.05, 81.32), ('voc_r101_emanet256', 79.73, 80.94),
    ('voc_r101_deeplabv3', 78.51, 79.77), ('voc_r101_deeplabv3plus', 79.35, 80.57),
    ('voc_r101_psanet', 78.51, 79.77), ('voc_r50', 78.52, None),
    ('voc_r50_a2', 77.41, None), ('voc_r50_nonlocal', 77.78, None),
    ('voc_r50_t1', 77.34, None), ('voc_test_r101', None, 87.7),
    ('voc_test_r152', None, 88.2), ('context_r50', None, 50.5),
    ('context_r101', None, 53.1), ('cocostuff_r50', None, 37.6),
    ('cocostuff_r101', None, 39.9), ('cityscapes_r50_512x1024', 77.59, 79.44),
    ('cityscapes_r101_512x1024', 79.10, 81.21),
    ('cityscapes_r50_769x769', 79.33, 80.49),
    ('cityscapes_r101_769x769', 79.62, 81.00), ('cityscapes_r101_ohem', 81.14, None)])
def test_scores_are_the_published_ones(name, single, multi):
    recipe = recipes.RECIPES[name]
    for key, wanted in (('mIoU', single), ('mIoU_ms', multi)):
        assert recipe.get(key) == (wanted and pytest.approx(wanted / 100)), key


@pytest.mark.parametrize('name', list(recipes.RECIPES))
def test_recipes_are_what_their_names_say(name, monkeypatch):
    for key, value in recipes.RECIPES[name]['settings'].items():
        monkeypatch.setattr(settings, key, value)
    config.check_train_settings()
    if depth := re.search(r'_r(\d+)', name):
        assert settings.N_LAYERS == int(depth[1])
    size = re.search(r'_(\d+)x(\d+)', name)
    if size:
        wide = settings.CROP_WIDTH or settings.CROP_SIZE
        assert (settings.CROP_SIZE, wide) == (int(size[1]), int(size[2]))
    assert bool(settings.OHEM_KEPT or settings.OHEM_BELOW) == ('ohem' in name)
    # mmsegmentation's head, and its corners: aligned at 769, not at 512x1024
    assert (settings.HEAD == 'ema_mmseg') == bool(size)
    assert settings.ALIGN_CORNERS == (not size or settings.CROP_SIZE % 8 == 1)
    schedule = settings.ITER_MAX, settings.LR
    if name.startswith('cityscapes'):
        assert schedule == (80000, 0.01)
        assert settings.LR_END == 1e-4
    elif name.startswith('voc_test'):
        stage = next((s for s in ('coco', 'trainaug') if s in name), 'trainval')
        assert schedule == {'coco': (150000, 0.009), 'trainaug': (30000, 0.001),
                            'trainval': (30000, 0.0001)}[stage]
    elif name.startswith(('voc', 'context', 'cocostuff')):
        assert schedule == (15000 if 'context' in name else 30000, 0.009)
