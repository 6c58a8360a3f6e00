"""The embedded data set: the same everywhere, balanced, in the VOC layout."""
import numpy as np
from conftest import run_script
from PIL import Image

import dataset
from preparation import shapes


def test_classes_are_those_of_the_data_set():
    assert shapes.CLASSES == dataset.DATASETS['shapes']['classes']


def test_drawing_is_a_function_of_seed_and_index():
    image, label = shapes.draw(0, 5)
    again = shapes.draw(0, 5)
    assert np.array_equal(image, again[0]) and np.array_equal(label, again[1])
    assert not np.array_equal(image[:99, :99], shapes.draw(1, 5)[0][:99, :99])
    assert not np.array_equal(image[:99, :99], shapes.draw(0, 6)[0][:99, :99])
    assert image.dtype == label.dtype == np.uint8 and image.shape == (*label.shape, 3)


def test_every_class_is_there_and_borders_are_void():
    counts = np.zeros(256, int)
    for index in range(30):
        label = shapes.draw(0, index)[1]
        counts += np.bincount(label.ravel(), minlength=256)
        # two different classes never touch: a border of void lies between
        for a, b in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            touch = (a != b) & (a != 255) & (b != 255)
            assert touch.mean() < 0.002
    share = counts / counts.sum()
    assert (share[1:10] > 0.01).all() and 0.4 < share[0] < 0.8
    assert 0.02 < share[255] < 0.1 and counts[10:255].sum() == 0


def test_the_pair_differs_by_the_scene_only():
    """Ducks and geese never share a picture: the ground decides."""
    kinds = [set(np.unique(shapes.draw(0, i)[1])) & {8, 9} for i in range(30)]
    assert {8} in kinds and {9} in kinds and {8, 9} not in kinds


def test_prepare_writes_and_keeps(tmp_path):
    root = tmp_path / 'shapes'
    words = ('prepare.py', 'shapes', '--root', root, '--train', 3, '--val', 2)
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    facts = dataset.DATASETS['shapes']
    folder, val = (dataset.Folder(str(root), name, facts) for name in ('train', 'val'))
    assert (len(folder), len(val)) == (3, 2) and not set(folder.ids) & set(val.ids)
    drawn = shapes.draw(0, int(folder.ids[0].split('_')[1]))
    image, label = folder.read(0)
    assert np.array_equal(label, drawn[1])
    assert np.abs(image.astype(int) - drawn[0]).mean() < 6  # JPEG
    with Image.open(root / 'SegmentationClass' / f'{folder.ids[0]}.png') as mask:
        assert mask.getpalette()[:6] == facts['palette'][:6]

    files = {p: p.stat().st_mtime_ns for p in root.rglob('*.jpg')}
    (root / 'JPEGImages' / f'{folder.ids[1]}.jpg').unlink()
    assert run_script(*words).returncode == 0
    now = {p: p.stat().st_mtime_ns for p in root.rglob('*.jpg')}
    assert files.keys() == now.keys()
    assert sum(files[p] != now[p] for p in files) == 1
    assert run_script('prepare.py', 'shapes', '--train', 0).returncode == 2
