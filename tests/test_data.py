"""Samples, their order and the loaders, against loops and counting."""
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_voc
from PIL import Image

import dataset
import recipes
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
    triples = list(dataset.eval_loader(folder))
    assert [name for _, _, name in triples] == ['pic_6', 'pic_7', 'pic_8']
    image, label, _ = triples[1]
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
                'counts', 'get'} == set(facts)
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
