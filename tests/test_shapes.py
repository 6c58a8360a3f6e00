"""The embedded data set: the same everywhere, balanced, in the VOC layout."""
import numpy as np
import pytest
from made_up import run_prepare
from PIL import Image

import dataset
from config import UserError
from preparation import shapes


def test_drawing_is_a_function_of_seed_and_index():
    image, label = shapes.draw(0, 5)
    again = shapes.draw(0, 5)
    assert np.array_equal(image, again[0]) and np.array_equal(label, again[1])
    assert not np.array_equal(image[:99, :99], shapes.draw(1, 5)[0][:99, :99])
    assert not np.array_equal(image[:99, :99], shapes.draw(0, 6)[0][:99, :99])
    assert image.dtype == label.dtype == np.uint8 and image.shape == (*label.shape, 3)


def test_every_class_is_there_and_borders_are_void():
    counts, kinds = np.zeros(256, int), []
    for index in range(30):
        label = shapes.draw(0, index)[1]
        counts += np.bincount(label.ravel(), minlength=256)
        # two different classes never touch: a border of void lies between
        for a, b in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            touch = (a != b) & (a != 255) & (b != 255)
            assert touch.mean() < 0.002
        kinds.append(set(np.unique(label)) & {8, 9})
    share = counts / counts.sum()
    assert (share[1:10] > 0.01).all() and 0.4 < share[0] < 0.8
    assert 0.02 < share[255] < 0.1 and counts[10:255].sum() == 0
    # Ducks and geese never share a picture: the ground decides.
    assert {8} in kinds and {9} in kinds and {8, 9} not in kinds


def test_the_pictures_are_those_of_the_published_results():
    """Another version of numpy or Pillow may round otherwise, so only nearly."""
    image, label = shapes.draw(0, 1)
    assert label.shape == (161, 205)
    assert np.bincount(label.ravel(), minlength=256)[[0, 255]].tolist() == [17212, 1826]
    assert abs(image.mean() - 143.41) < 0.1


def test_prepare_refuses_no_pictures(tmp_path):
    with pytest.raises(UserError, match='^--train 0 '):
        run_prepare('shapes', '--root', tmp_path, '--train', 0)


def test_prepare_writes_and_keeps(tmp_path):
    words = 'shapes', '--root', tmp_path, '--train', 3, '--val', 2
    run_prepare(*words)
    info = dataset.DATASETS['shapes']
    train, val = (dataset.SegmentationDataset(str(tmp_path), name, info)
                  for name in ('train', 'val'))
    assert (len(train), len(val)) == (3, 2) and not set(train.ids) & set(val.ids)
    drawn = shapes.draw(0, int(train.ids[0].split('_')[1]))
    image, label = train.read(0)
    assert np.array_equal(label, drawn[1])
    assert np.abs(image.astype(int) - drawn[0]).mean() < 6  # JPEG
    with Image.open(train.labels[0]) as mask:
        assert mask.getpalette()[:6] == info['palette'][:6]

    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.jpg')}
    (tmp_path / 'JPEGImages' / f'{train.ids[1]}.jpg').unlink()
    run_prepare(*words)
    now = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.jpg')}
    assert files.keys() == now.keys()
    assert sum(files[p] != now[p] for p in files) == 1
    run_prepare('shapes', '--root', tmp_path, '--train', 2, '--val', 1)
    assert len(dataset.SegmentationDataset(str(tmp_path), 'train', info)) == 2
