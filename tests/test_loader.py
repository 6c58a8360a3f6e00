"""Samples, their order and the loaders, against loops and counting."""
import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import loader
import recipes
import settings


class Ramp:
    """A data set of one image: red is the column, green the row, blue 200."""
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


def make_set(data, crop=(33, 33), scales=(0.5, 1.0, 1.75), use_flip=True, seed=3):
    return loader.TrainSet(data, crop, scales, use_flip, (0.485, 0.456, 0.406), seed)


@pytest.mark.parametrize('size, crop, scale', [
    ((60, 90), (65, 65), 0.5), ((60, 90), (65, 65), 0.75), ((60, 90), (65, 65), 1.25),
    ((20, 41), (65, 65), 1.0), ((20, 41), (65, 65), 2.0), ((200, 230), (65, 65), 0.5),
    ((200, 230), (65, 65), 1.0), ((200, 230), (65, 65), 1.5),
    ((60, 90), (33, 65), 1.75), ((60, 90), (65, 33), 0.5), ((20, 41), (33, 65), 1.0),
    ((20, 41), (65, 33), 1.75), ((200, 40), (33, 65), 0.5), ((200, 40), (65, 33), 1.0)])
def test_image_and_label_lie_on_one_grid(size, crop, scale):
    """Each pixel of both against where its centre lies in the window."""
    samples = make_set(Ramp(*size), crop, (scale,))
    for epoch in range(5):
        images, labels = samples.__getitems__([(epoch, 0)])
        assert images.shape == (1, 3, *crop) and labels.shape == (1, *crop)
        image, label = images[0].numpy().astype(float), labels[0].numpy()
        _, top, left, h, w, is_flipped = samples.draw_crop(epoch, 0, *size)
        assert 0 <= top <= size[0] - h and 0 <= left <= size[1] - w
        out = [min(int(n * scale), c) for n, c in zip((h, w), crop, strict=True)]
        for n, whole, c, n_out in zip((h, w), size, crop, out, strict=True):
            assert n_out == c or (n == whole and n_out == int(whole * scale))
        for y in range(0, out[0], 4):
            for x in range(0, out[1], 4):
                v, u = (y + 0.5) / scale - 0.5, (x + 0.5) / scale - 0.5
                row, column = round_half_up(v, h - 1), round_half_up(u, w - 1)
                column = w - 1 - column if is_flipped else column
                assert label[y, x] == samples.data.label[top + row, left + column]
                v, u = np.clip(v, 0, h - 1), np.clip(u, 0, w - 1)
                u = w - 1 - u if is_flipped else u
                assert abs(image[0, y, x] - (left + u)) <= 1  # bytes are rounded
                assert abs(image[1, y, x] - (top + v)) <= 1
        assert (label[out[0]:] == 255).all() and (label[:, out[1]:] == 255).all()
        for c, mean in enumerate((124, 116, 104)):
            assert (image[c, out[0]:] == mean).all()
            assert (image[c, :, out[1]:] == mean).all()


def round_half_up(x, largest):
    return min(int(np.floor(x + 0.5)), largest)


def test_batches_are_bytes_with_channels_last(voc):
    data = dataset.SegmentationDataset(str(voc), 'train', recipes.DATASETS['voc'])
    images, labels = make_set(data).__getitems__([(0, 1), (0, 2)])
    assert images.shape == (2, 3, 33, 33) and labels.shape == (2, 33, 33)
    assert images.dtype == labels.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_sample_is_a_function_of_seed_epoch_index(voc):
    data = dataset.SegmentationDataset(str(voc), 'train', recipes.DATASETS['voc'])
    samples, others = make_set(data), make_set(data, seed=4)
    a = samples.__getitems__([(0, 1), (5, 2), (0, 0)])
    b = make_set(data).__getitems__([(5, 2), (0, 1)])
    assert torch.equal(a[0][0], b[0][1]) and torch.equal(a[1][1], b[1][0])
    draws = [samples.draw_crop(epoch, index, 40, 52)
             for epoch in range(40) for index in range(3)]
    assert len(set(draws)) > 60
    assert {scale for scale, *_ in draws} == {0.5, 1.0, 1.75}
    assert 0.3 < np.mean([is_flipped for *_, is_flipped in draws]) < 0.7
    assert draws != [others.draw_crop(epoch, index, 40, 52)
                     for epoch in range(40) for index in range(3)]
    unflipped = make_set(data, use_flip=False)
    assert not any(unflipped.draw_crop(epoch, 0, 40, 52)[5] for epoch in range(20))


def test_steps_walk_through_shuffled_epochs():
    sampler = loader.StepSampler(10, 4, 7, 0, 25)
    pairs = [pair for step in sampler for pair in step]
    assert len(pairs) == 100
    for epoch in range(10):
        part = pairs[10 * epoch:10 * epoch + 10]
        assert all(e == epoch for e, _ in part)
        assert sorted(i for _, i in part) == list(range(10))
    assert len({tuple(i for _, i in pairs[10 * e:10 * e + 10]) for e in range(10)}) > 8
    assert list(loader.StepSampler(10, 4, 7, 9, 25)) == list(sampler)[9:]
    assert pairs != [p for s in loader.StepSampler(10, 4, 8, 0, 25) for p in s]


def test_ranks_share_the_same_batch():
    whole = list(loader.StepSampler(10, 8, 7, 0, 6))
    shares = [list(loader.StepSampler(10, 8, 7, 0, 6, rank, 4)) for rank in range(4)]
    for step, batch in enumerate(whole):
        assert [p for rank in range(4) for p in shares[rank][step]] == batch


def test_workers_change_nothing(voc, monkeypatch):
    for name, value in dict(CROP_SIZE=33, BATCH_SIZE=4, DATA_ROOT=str(voc),
                            DATASET='voc', TRAIN_SPLIT='train').items():
        monkeypatch.setattr(settings, name, value)
    data = dataset.open_split('train')
    runs = []
    for workers, first in ((0, 0), (2, 0), (2, 4)):
        monkeypatch.setattr(settings, 'N_WORKERS', workers)
        runs.append(list(loader.train_loader(data, first, 7, 'cpu')))
    assert len(runs[0]) == 7 and len(runs[2]) == 3
    for one, other in [*zip(runs[0], runs[1], strict=True),
                       *zip(runs[0][4:], runs[2], strict=True)]:
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_evaluation_samples_are_whole(voc, monkeypatch):
    data = dataset.SegmentationDataset(str(voc), 'val', recipes.DATASETS['voc'])
    monkeypatch.setattr(settings, 'N_WORKERS', 0)
    monkeypatch.setattr(settings, 'EVAL_BATCH', 1)
    batches = list(loader.eval_loader(data, 3))
    assert [indices for indices, _, _ in batches] == [(0,), (1,), (2,)]
    (image,), (label,) = batches[1][1:]
    assert image.shape == (3, 47, 45) and label.shape == (47, 45)
    with Image.open(voc / 'SegmentationClass/pic_7.png') as mask:
        assert np.array_equal(label.numpy(), np.asarray(mask))
    with Image.open(voc / 'JPEGImages/pic_7.jpg') as picture:
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int)
                      - np.asarray(picture)).max() == 0


@pytest.mark.parametrize('width, expected', [(0, 33), (65, 65), (20, 20)])
def test_crops_are_of_the_size_in_settings(width, expected, voc, monkeypatch):
    for name, value in dict(CROP_SIZE=33, CROP_WIDTH=width, BATCH_SIZE=2,
                            DATA_ROOT=str(voc), DATASET='voc', TRAIN_SPLIT='train',
                            N_WORKERS=0).items():
        monkeypatch.setattr(settings, name, value)
    batches = loader.train_loader(dataset.open_split('train'), 0, 1, 'cpu')
    (images, labels), = batches
    assert images.shape == (2, 3, 33, expected) and labels.shape == (2, 33, expected)
