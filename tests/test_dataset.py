"""The files of a data set: lists, images and masks, and what is wrong with them."""
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE
from PIL import Image

import config
import dataset
import recipes
import settings
from config import UserError
from dataset import SegmentationDataset

REAL = HERE.parent / 'shared' / 'data' / 'VOCdevkit' / 'VOC2012'


def test_masks_are_taken_from_aug_where_it_is(voc):
    (voc / 'SegmentationClassAug').mkdir()
    for mask in (voc / 'SegmentationClass').iterdir():
        (voc / 'SegmentationClassAug' / mask.name).write_bytes(mask.read_bytes())
    data = SegmentationDataset(str(voc), 'train', recipes.DATASETS['voc'])
    assert data.masks == 'SegmentationClassAug'
    assert Path(data.labels[0]) == voc / 'SegmentationClassAug/pic_0.png'


def test_voc_palette():
    palette = np.reshape(recipes.voc_palette(), (256, 3))
    for index, colour in {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0),
                          15: (192, 128, 128), 20: (0, 64, 128),
                          255: (224, 224, 192)}.items():
        assert tuple(palette[index]) == colour


def test_info_is_complete():
    for name, info in recipes.DATASETS.items():
        assert {'classes', 'palette', 'root', 'images', 'masks', 'map', 'train', 'val',
                'counts', 'get', 'server'} == set(info)
        n = len(info['classes'])
        assert len(info['palette']) == 768 and len(set(info['classes'])) == n
        assert n > 1 or name == 'folder'
        assert set(info['map'].values()) <= {*range(n), 255}
        colours = np.reshape(info['palette'], (256, 3))[:n]
        assert len(np.unique(colours, axis=0)) == n


@pytest.mark.skipif(not REAL.is_dir(), reason=f'no real pictures in {REAL}')
def test_real_voc_images():
    info = recipes.DATASETS['voc']
    data = SegmentationDataset(str(REAL), 'train', info)
    assert len(data) == 311
    assert len(SegmentationDataset(str(REAL), 'val', info)) == 321
    seen = set()
    for index in range(0, 311, 10):
        image, label = data.read(index)
        assert image.shape == (*label.shape, 3)
        seen |= set(np.unique(label))
    assert len(seen) > 15 and 255 in seen


# -- lists, images and masks -----------------------------------------------------------

def write_files(root, info, lines, values=None, split='train'):
    """Write pictures and masks of a list in the layout of a data set.

    Args:
        lines: of the list.
        values: (h, w) uint8 of every mask.
    """
    lists = root / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f'{split}.txt').write_text('\n'.join(lines) + '\n')
    values = np.zeros((6, 9), np.uint8) if values is None else values
    for line in lines:
        parts = line.split('\t')
        for pattern, name, array in (
                (info['images'], parts[0], np.zeros((*values.shape, 3), np.uint8)),
                (info['masks'][0], parts[-1], values)):
            path = root / pattern.replace('{}', name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return root


# The label ids that the Cityscapes benchmark evaluates, in the order of its classes.
CITY_CLASSES = {
    'road': 7, 'sidewalk': 8, 'building': 11, 'wall': 12, 'fence': 13, 'pole': 17,
    'traffic light': 19, 'traffic sign': 20, 'vegetation': 21, 'terrain': 22, 'sky': 23,
    'person': 24, 'rider': 25, 'car': 26, 'truck': 27, 'bus': 28, 'train': 31,
    'motorcycle': 32, 'bicycle': 33}


def city_class(value):
    for i, label_id in enumerate(CITY_CLASSES.values()):
        if label_id == value:
            return i
    return 255


def context59_class(value):
    return value - 1 if 1 <= value <= 59 else 255


@pytest.mark.parametrize('name, class_of, top', [('cityscapes', city_class, 33),
                                                 ('context59', context59_class, 59)])
def test_values_of_masks_become_classes(name, class_of, top, tmp_path):
    info = recipes.DATASETS[name]
    values = np.array([*range(top + 1), 255] * 3, np.uint8)
    values = np.random.default_rng(0).permutation(values).reshape(3, -1)
    root = write_files(tmp_path, info, ['a/b'], values)
    data = SegmentationDataset(str(root), 'train', info)
    label = data.read_label(0)
    assert label.shape == values.shape and label.dtype == np.uint8
    for y in range(values.shape[0]):
        for x in range(values.shape[1]):
            assert label[y, x] == class_of(int(values[y, x]))
    assert set(np.unique(label)) == {*range(len(info['classes'])), 255}
    assert np.array_equal(data.read_values(0), values)


def test_names_of_cityscapes_and_context():
    city, whole = (recipes.DATASETS[name]['classes'] for name in ('cityscapes',
                                                                  'context'))
    assert list(city) == list(CITY_CLASSES)
    assert list(whole[1:]) == list(recipes.DATASETS['context59']['classes'])
    assert whole[0] == 'background' and len(whole) == 60


@pytest.mark.parametrize('name, value, top', [
    ('cityscapes', 34, 33), ('cityscapes', 254, 33), ('context59', 60, 59),
    ('context', 60, 59), ('cocostuff10k', 171, 170)])
def test_values_beyond_the_map_are_named(name, value, top, tmp_path):
    info = recipes.DATASETS[name]
    values = np.zeros((4, 5), np.uint8)
    values[1, 2:4] = value
    root = write_files(tmp_path, info, ['x'], values)
    data = SegmentationDataset(str(root), 'train', info)
    with pytest.raises(UserError, match=f'value {value} at 2 pixels.*0 to {top},'):
        data.read_label(0)


def test_nested_entries(tmp_path):
    """Cityscapes: a folder for each town, and suffixes of pictures and masks."""
    info = recipes.DATASETS['cityscapes']
    names = ['val/ulm/ulm_000001_000019', 'val/bonn/bonn_000007_000019']
    root = write_files(tmp_path, info, names, split='val')
    data = SegmentationDataset(str(root), 'val', info)
    assert data.ids == names
    assert [Path(p).relative_to(root).as_posix() for p in data.images] == [
        'leftImg8bit/val/ulm/ulm_000001_000019_leftImg8bit.png',
        'leftImg8bit/val/bonn/bonn_000007_000019_leftImg8bit.png']
    assert Path(data.labels[1]) == (
        root / 'gtFine/val/bonn/bonn_000007_000019_gtFine_labelIds.png')
    assert data.read(1)[1].shape == (6, 9)


@pytest.mark.parametrize('lost, count', [
    ('gtFine/val/bonn/bonn_7_gtFine_labelIds.png', 1),
    ('leftImg8bit/val/ulm/ulm_1_leftImg8bit.png', 1),
    ('leftImg8bit/val/ulm', 2)])
def test_missing_nested_files_are_named(lost, count, tmp_path):
    info = recipes.DATASETS['cityscapes']
    names = ['val/ulm/ulm_1', 'val/ulm/ulm_2', 'val/bonn/bonn_7']
    root = write_files(tmp_path, info, names, split='val')
    for path in sorted((root / lost).rglob('*')) or [root / lost]:
        path.unlink()
    if count == 2:
        (root / lost).rmdir()
    with pytest.raises(UserError) as caught:
        SegmentationDataset(str(root), 'val', info)
    text = sentence_of(caught.value)
    assert f'{count} of the 6 files' in text and str(root / lost) in text
    assert len(SegmentationDataset(str(root), 'val', info, is_complete=False)) == 3


def test_lists_of_pairs(tmp_path):
    """A tab between picture and mask, each with its own name, spaces allowed."""
    info = {**recipes.DATASETS['folder'], 'classes': ('a', 'b'), 'images': 'in/{}',
             'masks': ('truth/{}',)}
    values = np.eye(5, 7, dtype=np.uint8)
    lines = ['one.jpg\tone.png', 'a walk/two.1.png\tother/2 b.png']
    root = write_files(tmp_path, info, lines, values)
    with open(root / 'ImageSets/Segmentation/train.txt', 'a') as file:
        file.write('\n   \n')  # blank lines are none
    data = SegmentationDataset(str(root), 'train', info)
    assert data.ids == ['one', 'a walk/two.1']
    assert [Path(p) for p in (*data.images, *data.labels)] == [
        root / 'in/one.jpg', root / 'in/a walk/two.1.png', root / 'truth/one.png',
        root / 'truth/other/2 b.png']
    for index in range(2):
        image, label = data.read(index)
        assert image.shape == (5, 7, 3) and np.array_equal(label, values)


def test_images_of_other_modes(tmp_path):
    """16 bits keep the high byte, grey becomes three equal colours, nothing white."""
    draw = np.random.default_rng(1)
    deep = draw.integers(0, 65536, (6, 9)).astype(np.uint16)
    deep[0, :4] = 0, 255, 256, 65535
    grey = draw.integers(0, 256, (6, 9)).astype(np.uint8)
    colours = draw.integers(0, 256, (6, 9, 3)).astype(np.uint8)
    palette = Image.fromarray(grey).convert('P')
    palette.putpalette([v for i in range(256) for v in (255 - i, i, 7)])
    is_there = draw.integers(0, 2, (6, 9, 1)).astype(bool)
    alpha = np.dstack([colours, 255 * is_there.astype(np.uint8)])
    repeat = np.dstack([grey] * 3)
    cases = {
        'deep': (Image.fromarray(deep), np.dstack([deep // 256] * 3)),
        'grey': (Image.fromarray(grey), repeat),
        'colour': (Image.fromarray(colours), colours),
        'alpha': (Image.fromarray(alpha), np.where(is_there, colours, 255)),
        'palette': (palette, np.dstack([255 - grey, grey, np.full_like(grey, 7)])),
        'two': (Image.fromarray(grey > 99), np.dstack([255 * (grey > 99)] * 3))}
    info = {**recipes.DATASETS['folder'], 'classes': ('a', 'b'),
             'images': 'in/{}.png', 'masks': ('truth/{}.png',)}
    root = write_files(tmp_path, info, list(cases))
    for name, (picture, _) in cases.items():
        picture.save(root / f'in/{name}.png')
    with Image.open(root / 'in/deep.png') as picture:
        assert picture.mode.startswith('I')
    data = SegmentationDataset(str(root), 'train', info)
    for index, (name, (_, expected)) in enumerate(cases.items()):
        image, _ = data.read(index)
        assert image.shape == (6, 9, 3) and image.dtype == np.uint8, name
        assert np.array_equal(image, expected), name


def test_a_mask_of_16_bits_is_refused(tmp_path):
    info = recipes.DATASETS['cityscapes']
    root = write_files(tmp_path, info, ['x'])
    Image.fromarray(np.zeros((6, 9), np.uint16)).save(
        root / 'gtFine/x_gtFine_labelIds.png')
    with pytest.raises(UserError, match='mode I'):
        SegmentationDataset(str(root), 'train', info).read(0)


# -- a user's own images ---------------------------------------------------------------

def sentence_of(error):
    """Return the sentence that a user reads."""
    text = config.get_message(error)
    assert text and '\n' not in text, repr(error)
    return text


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, 'DATASET', 'folder')
    monkeypatch.setattr(settings, 'DATA_ROOT', str(tmp_path))
    return tmp_path / 'dataset.json'


def test_info_of_own_images(own):
    content = {'classes': ['wall', 'door'], 'images': 'in/{}', 'masks': ['truth/{}'],
               'map': {'0': 255, '10': 0, '200': 1}, 'val': 'test'}
    own.write_text(json.dumps(content))
    info = dataset.get_dataset_info()
    assert info['map'] == {0: 255, 10: 0, 200: 1}
    assert list(info['classes']) == ['wall', 'door'] and info['images'] == 'in/{}'
    assert info['val'] == 'test' and info['train'] == 'train'
    assert info['palette'] == recipes.voc_palette()  # a default
    assert not recipes.DATASETS['folder']['classes']
    write_files(own.parent, info, ['x.png\tx.png'],
                np.array([[0, 10, 200, 255]], np.uint8))
    assert dataset.open_split('train').read(0)[1].tolist() == [[255, 0, 1, 255]]


def test_own_images_that_are_not_prepared(own):
    with pytest.raises(UserError) as caught:
        dataset.get_dataset_info()
    text = sentence_of(caught.value)
    assert str(own) in text and 'prepare.py folder' in text and 'DATA_ROOT' in text


GOOD = {'classes': ['wall', 'door'], 'map': {}}


@pytest.mark.parametrize('content', [
    b'', b'{"classes": ["a", "b"', b'[1, 2]', b'null', b'\xff\xfe\x00', {'map': {}},
    {'classes': ['a']}, {**GOOD, 'classes': []}, {**GOOD, 'map': [1, 2]},
    {**GOOD, 'map': {'sky': 1}}, {**GOOD, 'map': {'1': 'sky'}},
    {**GOOD, 'map': {'1': None}}, {**GOOD, 'map': {'1': 300}},
    {**GOOD, 'map': {'300': 1}}, {**GOOD, 'map': {'-1': 0}}])
def test_a_broken_dataset_json(content, own):
    if isinstance(content, dict):
        content = json.dumps(content).encode()
    own.write_bytes(content)
    with pytest.raises(UserError) as caught:
        dataset.get_dataset_info()
    text = sentence_of(caught.value)
    assert str(own) in text and 'prepare.py folder' in text


def test_unknown_data_set(monkeypatch):
    monkeypatch.setattr(settings, 'DATASET', 'vocc')
    with pytest.raises(UserError) as caught:
        dataset.get_dataset_info()
    text = sentence_of(caught.value)
    assert 'DATASET=vocc' in text and all(name in text for name in recipes.DATASETS)
