"""Samples, their order and the loaders, against loops and counting."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_voc
from PIL import Image

import dataset
import recipes
import runtime
import settings

REAL = Path(__file__).parents[2] / 'shared' / 'data' / 'VOCdevkit' / 'VOC2012'


class Ramp:
    """A folder of one picture: red is the column, green the row, blue 200."""
    n_classes, ids = 256, ['ramp']

    def __init__(self, h, w):
        rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
        self.image = torch.stack([cols, rows, torch.full_like(rows, 200)], 2)
        self.image = self.image.byte().numpy()
        self.label = ((rows // 8 + cols // 8) % 5).byte().numpy()

    def __len__(self):
        return 1

    def read(self, index):
        return self.image, self.label


def make_set(folder, crop=33, scales=(0.5, 1.0, 1.75), use_flip=True, seed=3):
    return dataset.TrainSet(folder, (crop, crop), scales, use_flip,
                            (0.485, 0.456, 0.406), seed)


@pytest.mark.parametrize('scale', [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0])
@pytest.mark.parametrize('size', [(60, 90), (20, 41), (200, 230)])
def test_image_and_label_lie_on_one_grid(scale, size):
    samples = make_set(Ramp(*size), 65, (scale,))
    for epoch in range(6):
        images, labels = samples.__getitems__([(epoch, 0)])
        image, label = images[0].numpy().astype(float), labels[0].numpy()
        _, top, left, h, w, flipped = samples.draw(epoch, 0, *size)
        assert h <= size[0] and w <= size[1] and top + h <= size[0]
        out = [min(int(n * scale), 65) for n in (h, w)]
        assert 65 in out or scale * max(size) < 66
        for y in range(0, out[0], 3):
            for x in range(0, out[1], 3):
                # where the centre of this output pixel lies in the window
                v, u = (y + 0.5) / scale - 0.5, (x + 0.5) / scale - 0.5
                v0, u0 = min(round_half_up(v), h - 1), min(round_half_up(u), w - 1)
                col = left + (w - 1 - u0 if flipped else u0)
                assert label[y, x] == samples.folder.label[top + v0, col]
                v, u = np.clip(v, 0, h - 1), np.clip(u, 0, w - 1)
                col = left + (w - 1 - u if flipped else u)
                assert abs(image[0, y, x] - col) <= 1  # bytes are rounded
                assert abs(image[1, y, x] - (top + v)) <= 1
        assert (label[out[0]:] == 255).all() and (label[:, out[1]:] == 255).all()
        for c, mean in enumerate((124, 116, 104)):
            assert (image[c, out[0]:] == mean).all()
            assert (image[c, :, out[1]:] == mean).all()


def round_half_up(x):
    return int(np.floor(x + 0.5))


def test_batches_are_bytes_with_channels_last(voc):
    folder = dataset.Folder(str(voc), 'train', dataset.DATASETS['voc'])
    images, labels = make_set(folder).__getitems__([(0, 1), (0, 2)])
    assert images.shape == (2, 3, 33, 33) and labels.shape == (2, 33, 33)
    assert images.dtype == labels.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_sample_is_a_function_of_seed_epoch_index(voc):
    folder = dataset.Folder(str(voc), 'train', dataset.DATASETS['voc'])
    samples, others = make_set(folder), make_set(folder, seed=4)
    a = samples.__getitems__([(0, 1), (5, 2), (0, 0)])
    b = make_set(folder).__getitems__([(5, 2), (0, 1)])
    assert torch.equal(a[0][0], b[0][1]) and torch.equal(a[1][1], b[1][0])
    draws = [samples.draw(e, i, 40, 52) for e in range(40) for i in range(3)]
    assert len(set(draws)) > 60
    assert {d[0] for d in draws} == {0.5, 1.0, 1.75}
    assert 0.3 < np.mean([d[5] for d in draws]) < 0.7
    assert draws != [others.draw(e, i, 40, 52) for e in range(40) for i in range(3)]
    assert not any(make_set(folder, use_flip=False).draw(e, 0, 40, 52)[5]
                   for e in range(20))


def test_steps_walk_through_shuffled_epochs():
    sampler = dataset.StepSampler(10, 4, 7, 0, 25)
    places = [place for step in sampler for place in step]
    assert len(places) == 100
    for epoch in range(10):
        part = places[10 * epoch:10 * epoch + 10]
        assert all(e == epoch for e, _ in part)
        assert sorted(i for _, i in part) == list(range(10))
    assert len({tuple(i for _, i in places[10 * e:10 * e + 10]) for e in range(10)}) > 8
    assert list(dataset.StepSampler(10, 4, 7, 9, 25)) == list(sampler)[9:]
    assert places != [p for s in dataset.StepSampler(10, 4, 8, 0, 25) for p in s]


def test_ranks_share_the_very_batch():
    whole = list(dataset.StepSampler(10, 8, 7, 0, 6))
    shares = [list(dataset.StepSampler(10, 8, 7, 0, 6, rank, 4)) for rank in range(4)]
    for step, batch in enumerate(whole):
        assert [p for rank in range(4) for p in shares[rank][step]] == batch


def test_workers_change_nothing(voc, monkeypatch):
    for name, value in dict(CROP_SIZE=33, BATCH_SIZE=4, DATA_ROOT=str(voc),
                            DATASET='voc', TRAIN_SPLIT='train').items():
        monkeypatch.setattr(settings, name, value)
    folder = dataset.open_split('train')
    found = []
    for workers, first in ((0, 0), (2, 0), (2, 4)):
        monkeypatch.setattr(settings, 'N_WORKERS', workers)
        found.append(list(dataset.train_loader(folder, first, 7, 'cpu')))
    assert len(found[0]) == 7 and len(found[2]) == 3
    for one, other in [*zip(found[0], found[1], strict=True),
                       *zip(found[0][4:], found[2], strict=True)]:
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_evaluation_samples_are_whole(voc, monkeypatch):
    folder = dataset.Folder(str(voc), 'val', dataset.DATASETS['voc'])
    monkeypatch.setattr(settings, 'N_WORKERS', 0)
    monkeypatch.setattr(settings, 'EVAL_BATCH', 1)
    batches = list(dataset.eval_loader(folder, 3))
    assert [indices for indices, _, _ in batches] == [(0,), (1,), (2,)]
    (image,), (label,) = batches[1][1:]
    assert image.shape == (3, 47, 45) and label.shape == (47, 45)
    with Image.open(voc / 'SegmentationClass/pic_7.png') as mask:
        assert np.array_equal(label.numpy(), np.asarray(mask))
    with Image.open(voc / 'JPEGImages/pic_7.jpg') as picture:
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int)
                      - np.asarray(picture)).max() == 0


def test_masks_are_taken_from_aug_where_it_is(voc):
    (voc / 'SegmentationClassAug').mkdir()
    for mask in (voc / 'SegmentationClass').iterdir():
        (voc / 'SegmentationClassAug' / mask.name).write_bytes(mask.read_bytes())
    folder = dataset.Folder(str(voc), 'train', dataset.DATASETS['voc'])
    assert folder.masks == 'SegmentationClassAug'
    assert Path(folder.labels[0]) == voc / 'SegmentationClassAug/pic_0.png'


def test_voc_palette():
    palette = np.reshape(recipes.voc_palette(), (256, 3))
    for index, colour in {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0),
                          15: (192, 128, 128), 20: (0, 64, 128),
                          255: (224, 224, 192)}.items():
        assert tuple(palette[index]) == colour


def test_facts_are_complete():
    for name, facts in dataset.DATASETS.items():
        assert {'classes', 'palette', 'root', 'images', 'masks', 'map', 'train', 'val',
                'counts', 'get', 'server'} == set(facts)
        n = len(facts['classes'])
        assert len(facts['palette']) == 768 and len(set(facts['classes'])) == n
        assert n > 1 or name == 'folder'
        assert set(facts['map'].values()) <= {*range(n), 255}
        colours = np.reshape(facts['palette'], (256, 3))[:n]
        assert len(np.unique(colours, axis=0)) == n


@pytest.mark.skipif(not REAL.is_dir(), reason=f'no real pictures in {REAL}')
def test_real_voc_pictures():
    facts = dataset.DATASETS['voc']
    folder, val = (dataset.Folder(str(REAL), name, facts) for name in ('train', 'val'))
    assert (len(folder), len(val)) == (311, 321)
    seen = set()
    for index in range(0, 311, 10):
        image, label = folder.read(index)
        assert image.shape == (*label.shape, 3)
        seen |= set(np.unique(label))
    assert len(seen) > 15 and 255 in seen


def test_made_up_voc_is_as_it_says(tmp_path):
    """The made-up set itself: what the other tests stand on."""
    root = write_voc(tmp_path / 'a', 2, 1)
    with Image.open(root / 'SegmentationClass/pic_0.png') as mask:
        assert mask.mode == 'P'
        assert set(np.unique(np.asarray(mask))) <= {0, 1, 2, 3, 255}


# -- rectangular crops -----------------------------------------------------------------

@pytest.mark.parametrize('scale', [0.5, 1.0, 1.75])
@pytest.mark.parametrize('crop', [(33, 65), (65, 33)])
@pytest.mark.parametrize('size', [(60, 90), (20, 41), (200, 40)])
def test_rectangular_crops_lie_on_one_grid(size, crop, scale):
    """Height before width, everywhere; each pixel against where its centre lies."""
    samples = dataset.TrainSet(Ramp(*size), crop, (scale,), True, (0.2, 0.4, 0.6), 3)
    windows = set()
    for epoch in range(5):
        images, labels = samples.__getitems__([(epoch, 0)])
        assert images.shape == (1, 3, *crop) and labels.shape == (1, *crop)
        image, label = images[0].numpy().astype(float), labels[0].numpy()
        _, top, left, h, w, flipped = samples.draw(epoch, 0, *size)
        windows.add((top, left, flipped))
        assert 0 <= top <= size[0] - h and 0 <= left <= size[1] - w
        out = [min(int(n * scale), c) for n, c in zip((h, w), crop, strict=True)]
        for n, whole, c, got in zip((h, w), size, crop, out, strict=True):
            # as much as the crop shows, or all there is
            assert got == c or n == whole and got == int(whole * scale)
        for y in range(0, out[0], 4):
            for x in range(0, out[1], 4):
                v, u = (y + 0.5) / scale - 0.5, (x + 0.5) / scale - 0.5
                v0, u0 = min(round_half_up(v), h - 1), min(round_half_up(u), w - 1)
                col = left + (w - 1 - u0 if flipped else u0)
                assert label[y, x] == samples.folder.label[top + v0, col]
                v, u = np.clip(v, 0, h - 1), np.clip(u, 0, w - 1)
                col = left + (w - 1 - u if flipped else u)
                assert abs(image[0, y, x] - col) <= 1
                assert abs(image[1, y, x] - (top + v)) <= 1
        assert (label[out[0]:] == 255).all() and (label[:, out[1]:] == 255).all()
        for c, mean in enumerate((51, 102, 153)):
            assert (image[c, out[0]:] == mean).all()
            assert (image[c, :, out[1]:] == mean).all()
    assert len(windows) > 1


@pytest.mark.parametrize('width, wanted', [(0, 33), (65, 65), (20, 20)])
def test_loader_cuts_what_settings_say(width, wanted, voc, monkeypatch):
    for name, value in dict(CROP_SIZE=33, CROP_WIDTH=width, BATCH_SIZE=2,
                            DATA_ROOT=str(voc), DATASET='voc', TRAIN_SPLIT='train',
                            N_WORKERS=0).items():
        monkeypatch.setattr(settings, name, value)
    loader = dataset.train_loader(dataset.open_split('train'), 0, 1, 'cpu')
    (images, labels), = loader
    assert images.shape == (2, 3, 33, wanted) and labels.shape == (2, 33, wanted)


# -- what the files are ----------------------------------------------------------------

def write_files(root, facts, lines, values=None, split='train'):
    """Write pictures and masks of a list in the layout of some facts.

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
                (facts['images'], parts[0], np.zeros((*values.shape, 3), np.uint8)),
                (facts['masks'][0], parts[-1], values)):
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
    facts = dataset.DATASETS[name]
    values = np.array([*range(top + 1), 255] * 3, np.uint8)
    values = np.random.default_rng(0).permutation(values).reshape(3, -1)
    folder = dataset.Folder(str(write_files(tmp_path, facts, ['a/b'], values)), 'train',
                            facts)
    label = folder.read_label(0)
    assert label.shape == values.shape and label.dtype == np.uint8
    for y in range(values.shape[0]):
        for x in range(values.shape[1]):
            assert label[y, x] == class_of(int(values[y, x]))
    assert set(np.unique(label)) == {*range(len(facts['classes'])), 255}
    assert np.array_equal(folder.read_label(0), label)  # and when it is known good
    assert np.array_equal(folder.read_values(0), values)


def test_names_of_cityscapes_and_context():
    city, whole = (dataset.DATASETS[name]['classes'] for name in ('cityscapes',
                                                                  'context'))
    assert list(city) == list(CITY_CLASSES)
    assert list(whole[1:]) == list(dataset.DATASETS['context59']['classes'])
    assert whole[0] == 'background' and len(whole) == 60


@pytest.mark.parametrize('name, value, top', [
    ('cityscapes', 34, 33), ('cityscapes', 254, 33), ('context59', 60, 59),
    ('context', 60, 59), ('cocostuff10k', 171, 170)])
def test_values_beyond_the_map_are_named(name, value, top, tmp_path):
    facts = dataset.DATASETS[name]
    values = np.zeros((4, 5), np.uint8)
    values[1, 2:4] = value
    folder = dataset.Folder(str(write_files(tmp_path, facts, ['x'], values)), 'train',
                            facts)
    with pytest.raises(ValueError, match=f'value {value} at 2 pixels.*0 to {top},'):
        folder.read_label(0)


def test_nested_entries(tmp_path):
    """Cityscapes: a folder for each town, and suffixes of pictures and masks."""
    facts = dataset.DATASETS['cityscapes']
    names = ['val/ulm/ulm_000001_000019', 'val/bonn/bonn_000007_000019']
    root = write_files(tmp_path, facts, names, split='val')
    folder = dataset.Folder(str(root), 'val', facts)
    assert folder.ids == names
    assert [Path(p).relative_to(root).as_posix() for p in folder.images] == [
        'leftImg8bit/val/ulm/ulm_000001_000019_leftImg8bit.png',
        'leftImg8bit/val/bonn/bonn_000007_000019_leftImg8bit.png']
    assert Path(folder.labels[1]) == (
        root / 'gtFine/val/bonn/bonn_000007_000019_gtFine_labelIds.png')
    assert folder.read(1)[1].shape == (6, 9)


@pytest.mark.parametrize('lost, count', [
    ('gtFine/val/bonn/bonn_7_gtFine_labelIds.png', 1),
    ('leftImg8bit/val/ulm/ulm_1_leftImg8bit.png', 1),
    ('leftImg8bit/val/ulm', 2)])
def test_missing_nested_files_are_named(lost, count, tmp_path):
    facts = dataset.DATASETS['cityscapes']
    names = ['val/ulm/ulm_1', 'val/ulm/ulm_2', 'val/bonn/bonn_7']
    root = write_files(tmp_path, facts, names, split='val')
    for path in sorted((root / lost).rglob('*')) or [root / lost]:
        path.unlink()
    if count == 2:
        (root / lost).rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        dataset.Folder(str(root), 'val', facts)
    text = sentence_of(caught.value)
    assert f'{count} of the 6 files' in text and str(root / lost) in text
    assert len(dataset.Folder(str(root), 'val', facts, is_complete=False)) == 3


def test_lists_of_pairs(tmp_path):
    """A tab between picture and mask, each with its own name, spaces allowed."""
    facts = {**dataset.DATASETS['folder'], 'classes': ('a', 'b'), 'images': 'in/{}',
             'masks': ('truth/{}',)}
    values = np.eye(5, 7, dtype=np.uint8)
    lines = ['one.jpg\tone.png', 'a walk/two.1.png\tother/2 b.png']
    root = write_files(tmp_path, facts, lines, values)
    with open(root / 'ImageSets/Segmentation/train.txt', 'a') as file:
        file.write('\n   \n')  # blank lines are none
    folder = dataset.Folder(str(root), 'train', facts)
    assert folder.ids == ['one', 'a walk/two.1']
    assert [Path(p) for p in (*folder.images, *folder.labels)] == [
        root / 'in/one.jpg', root / 'in/a walk/two.1.png', root / 'truth/one.png',
        root / 'truth/other/2 b.png']
    for index in range(2):
        image, label = folder.read(index)
        assert image.shape == (5, 7, 3) and np.array_equal(label, values)


def test_pictures_of_other_modes(tmp_path):
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
    facts = {**dataset.DATASETS['folder'], 'classes': ('a', 'b'),
             'images': 'in/{}.png', 'masks': ('truth/{}.png',)}
    root = write_files(tmp_path, facts, list(cases))
    for name, (picture, _) in cases.items():
        picture.save(root / f'in/{name}.png')
    with Image.open(root / 'in/deep.png') as picture:
        assert picture.mode.startswith('I')
    folder = dataset.Folder(str(root), 'train', facts)
    for index, (name, (_, wanted)) in enumerate(cases.items()):
        image, _ = folder.read(index)
        assert image.shape == (6, 9, 3) and image.dtype == np.uint8, name
        assert np.array_equal(image, wanted), name


def test_a_mask_of_16_bits_is_refused(tmp_path):
    facts = dataset.DATASETS['cityscapes']
    root = write_files(tmp_path, facts, ['x'])
    Image.fromarray(np.zeros((6, 9), np.uint16)).save(
        root / 'gtFine/x_gtFine_labelIds.png')
    with pytest.raises(ValueError, match='mode I'):
        dataset.Folder(str(root), 'train', facts).read(0)


# -- a user's own pictures -------------------------------------------------------------

def sentence_of(error):
    """Return what a user reads: one sentence, raised on purpose."""
    text = runtime.explain(error)
    assert text and '\n' not in text, repr(error)
    return text


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, 'DATASET', 'folder')
    monkeypatch.setattr(settings, 'DATA_ROOT', str(tmp_path))
    return tmp_path / 'dataset.json'


def test_facts_of_own_pictures(own):
    found = {'classes': ['wall', 'door'], 'images': 'in/{}', 'masks': ['truth/{}'],
             'map': {'0': 255, '10': 0, '200': 1}, 'val': 'test'}
    own.write_text(json.dumps(found))
    facts = dataset.get_facts()
    assert facts['map'] == {0: 255, 10: 0, 200: 1}
    assert list(facts['classes']) == ['wall', 'door'] and facts['images'] == 'in/{}'
    assert facts['val'] == 'test' and facts['train'] == 'train'
    assert facts['palette'] == recipes.voc_palette()  # what it does not say
    assert not dataset.DATASETS['folder']['classes']  # nor is it kept
    root = write_files(own.parent, facts, ['x.png\tx.png'],
                       np.array([[0, 10, 200, 255]], np.uint8))
    assert dataset.open_split('train').read(0)[1].tolist() == [[255, 0, 1, 255]]
    assert root == own.parent


def test_own_pictures_that_are_not_prepared(own):
    with pytest.raises(FileNotFoundError) as caught:
        dataset.get_facts()
    text = sentence_of(caught.value)
    assert str(own) in text and 'prepare.py folder' in text and 'DATA_ROOT' in text


GOOD = {'classes': ['wall', 'door'], 'map': {}}


@pytest.mark.parametrize('text', [
    '', '{"classes": ["a", "b"', '[1, 2]', '3', 'null', json.dumps({'classes': ['a']}),
    json.dumps({**GOOD, 'map': [1, 2]}), json.dumps({**GOOD, 'map': {'sky': 1}}),
    json.dumps({**GOOD, 'map': {'1': 'sky'}}), json.dumps({**GOOD, 'map': {'1': None}}),
    b'\xff\xfe\x00'])
def test_a_broken_dataset_json(text, own):
    own.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        dataset.get_facts()
    text = sentence_of(caught.value)
    assert str(own) in text and 'prepare.py folder' in text


@pytest.mark.parametrize('words', [
    {'map': {}}, {**GOOD, 'classes': []}, {**GOOD, 'map': {'1': 300}},
    {**GOOD, 'map': {'300': 1}}, {**GOOD, 'map': {'-1': 0}}])
def test_a_dataset_json_that_cannot_be_used(words, own):
    """No classes, or values that no byte holds: said at the start, in a sentence."""
    own.write_text(json.dumps(words))
    with pytest.raises(ValueError) as caught:
        facts = dataset.get_facts()
        write_files(own.parent, facts, ['x'])
        dataset.Folder(str(own.parent), 'train', facts)
    assert str(own) in sentence_of(caught.value)


def test_unknown_data_set(monkeypatch):
    monkeypatch.setattr(settings, 'DATASET', 'vocc')
    with pytest.raises(ValueError) as caught:
        dataset.get_facts()
    text = sentence_of(caught.value)
    assert 'DATASET=vocc' in text and all(name in text for name in dataset.DATASETS)
