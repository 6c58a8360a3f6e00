"""A user's own images and masks: values, colours, lists, names."""
import json

import numpy as np
import pytest
from made_up import REAL, H, W, jpg, png, run_prepare, values_of, write_files
from PIL import Image

import dataset
import settings
from config import UserError

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f'no real data in {REAL}')
LISTS = 'ImageSets/Segmentation'


def write_own(root, mask_of, suffixes=('.jpg', '.png', '.tif', '.bmp', '.JPEG')):
    """Write images of several kinds in subfolders, and their masks."""
    for k, suffix in enumerate(suffixes):
        for folder in ('images', 'masks'):
            (root / folder / f'site {k % 2}').mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (H, W, 3), np.uint8)
        Image.fromarray(pixels).save(root / f'images/site {k % 2}/p{k}{suffix}')
        mask_of(k).save(root / f'masks/site {k % 2}/p{k}.png')


def make(source, root, *words):
    return run_prepare('folder', '--images', source / 'images', '--masks',
                       source / 'masks', '--root', root, *words)


def open_own(root, split):
    settings.DATASET, settings.DATA_ROOT = 'folder', str(root)
    return dataset.open_split(split)


def check_labels(root, expected_of):
    """Compare all masks of the list train with expected_of(number in the name)."""
    data = open_own(root, 'train')
    assert len(data)
    for index, name in enumerate(data.ids):
        image, label = data.read(index)
        assert np.array_equal(label, expected_of(int(name[-1])))
        assert image.shape == (H, W, 3)


def test_values_names_and_lists(tmp_path):
    write_own(tmp_path, lambda k: Image.fromarray(
        np.array([0, 1, 2, 3, 9], np.uint8)[values_of(k, 5)]))
    (tmp_path / 'classes.txt').write_text('sky\nsea\nland\nship\n')
    root = tmp_path / 'made'
    with pytest.raises(UserError, match='has the value 9, .* --map 9=255'):
        make(tmp_path, root)
    assert not root.exists()
    words = '--map', '9=ship', '--val', 0.4, '--seed'
    assert 'KEPT' not in make(tmp_path, root, *words, 3)
    train, val = open_own(root, 'train'), open_own(root, 'val')
    assert (len(train), len(val)) == (3, 2)
    assert {*train.ids, *val.ids} == {f'site {k % 2}/p{k}' for k in range(5)}
    check_labels(root, lambda k: np.array([0, 1, 2, 3, 3])[values_of(k, 5)])
    # Lists follow the draw until one is edited by hand.
    file = root / LISTS / 'val.txt'
    first = file.read_text()
    make(tmp_path, root, *words, 3)
    assert file.read_text() == first
    make(tmp_path, root, *words, 8)
    assert file.read_text() != first
    file.write_text(first.splitlines()[0] + '\nmine\n')
    assert 'KEPT' in make(tmp_path, root, *words, 3)
    assert file.read_text().endswith('\nmine\n')
    # Other images want another root.
    write_own(tmp_path / 'b', lambda k: Image.fromarray(values_of(k, 5)))
    with pytest.raises(UserError, match='give another --root'):
        make(tmp_path / 'b', root)


def test_two_values_0_and_255(tmp_path):
    write_own(tmp_path, lambda k: Image.fromarray(values_of(k, 2) * np.uint8(255)))
    with pytest.raises(UserError, match='--map 255=1'):
        make(tmp_path, tmp_path / 'made')
    make(tmp_path, tmp_path / 'made', '--map', '255=1')
    check_labels(tmp_path / 'made', lambda k: values_of(k, 2))


def test_what_cannot_be_meant(tmp_path):
    write_own(tmp_path, lambda k: Image.fromarray(values_of(k, 3) * np.uint8(30)))
    assert 'not all values up to 60 occur' in make(tmp_path, tmp_path / 'made')
    for words, message in ((('--map', '30=1,30=2'), 'two meanings'),
                           (('--map', '30=sea'), 'VALUE=CLASS is expected'),
                           (('--val', 1), 'cannot be divided'),
                           (('--classes', tmp_path / 'none.txt'), 'does not exist')):
        with pytest.raises(UserError, match=message):
            make(tmp_path, tmp_path / 'other', *words)
    write_files(tmp_path, {'images/train/x.jpg': jpg(1),
                           'masks/train/x.png': png(values_of(1, 2))})
    with pytest.raises(UserError, match='what belongs where'):
        make(tmp_path, tmp_path / 'other')
    damaged = tmp_path / 'masks/train/x.png'
    damaged.write_bytes(damaged.read_bytes()[:-60])
    with pytest.raises(UserError, match='x.png cannot be read'):
        make(tmp_path, tmp_path / 'other')
    damaged.rename(damaged.with_suffix('.jpg'))
    with pytest.raises(UserError, match='JPEG, which changes values'):
        make(tmp_path, tmp_path / 'other')
    write_files(tmp_path, {'masks/train/x.png': png(values_of(1, 2))})
    with pytest.raises(UserError, match='one picture of a name'):
        make(tmp_path, tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


def test_lists_and_tags(tmp_path):
    for k in range(4):
        write_files(tmp_path, {f'images/p{k}_rgb.jpg': jpg(k),
                               f'masks/p{k}_gt.png': png(values_of(k, 3))})
    write_files(tmp_path, {'images/alone_rgb.jpg': jpg(7),
                           'lists/train.txt': b'\xef\xbb\xbfp0\r\np2.jpg\r\np3_rgb\r\n',
                           'lists/val.txt': b'p1\n'})
    words = '--image-tag', '_rgb', '--mask-tag', '_gt', '--lists', tmp_path / 'lists'
    printed = make(tmp_path, tmp_path / 'made', *words)
    assert '1 images or masks have no partner' in printed
    assert 'the first is alone_rgb.jpg' in printed
    train = open_own(tmp_path / 'made', 'train')
    assert train.ids == ['p0_rgb', 'p2_rgb', 'p3_rgb'] and train.n_classes == 3
    (tmp_path / 'lists/val.txt').write_text('p9\n')
    with pytest.raises(UserError, match='the first: p9'):
        make(tmp_path, tmp_path / 'made', *words)
    with pytest.raises(UserError, match='--mask-tag'):
        make(tmp_path, tmp_path / 'made')


def test_masks_coded_by_colour(tmp_path):
    table = {(255, 0, 0): 0, (0, 255, 0): 1, (0, 0, 7): 2, (9, 9, 9): 255}
    colours = np.array(list(table), np.uint8)
    write_own(tmp_path, lambda k: Image.fromarray(colours[values_of(k, 4)]))
    root, file = tmp_path / 'made', tmp_path / 'colours.txt'
    with pytest.raises(UserError, match='coded by colour'):
        make(tmp_path, root)
    file.write_text('255 0 0 red\n0 255 0 green grass\n0, 0, 7, blue\n')
    with pytest.raises(UserError, match='as 9 9 9'):
        make(tmp_path, root, '--colours', file)
    file.write_text(file.read_text() + '9 9 9 void\n')
    assert 'red, green grass, blue' in make(tmp_path, root, '--colours', file)
    check_labels(root, lambda k: np.array([0, 1, 2, 255])[values_of(k, 4)])
    info = json.loads((root / 'dataset.json').read_text())
    assert info['palette'][:9] == [255, 0, 0, 0, 255, 0, 0, 0, 7]
    assert len(info['palette']) == 768
    # With another table the masks are made anew.
    file.write_text('0 255 0 green\n255 0 0 red\n# a comment\n0 0 7 blue\n9 9 9 void\n')
    make(tmp_path, root, '--colours', file)
    check_labels(root, lambda k: np.array([1, 0, 2, 255])[values_of(k, 4)])
    for line in ('1 2 grass', '300 0 0 red', 'red', '1 1 1 a\n1 1 1 b'):
        file.write_text(line + '\n')
        with pytest.raises(UserError, match='`r g b name`|is there twice'):
            make(tmp_path, tmp_path / 'other', '--colours', file)


@pytest.mark.parametrize('mode', ['1', 'I;16', 'RGB', 'LA'])
def test_masks_of_other_modes_are_converted(mode, tmp_path):
    def mask(k):
        values = values_of(k, 2)
        if mode == '1':
            return Image.fromarray(values * np.uint8(255)).convert('1')
        if mode == 'I;16':
            return Image.fromarray(values.astype(np.uint16))
        return Image.fromarray(values).convert(mode)
    write_own(tmp_path, mask)
    make(tmp_path, tmp_path / 'made')
    assert open_own(tmp_path / 'made', 'train').masks == 'masks_made'
    check_labels(tmp_path / 'made', lambda k: values_of(k, 2))


@needs_real
def test_real_camvid(tmp_path):
    run_prepare('folder', '--images', REAL / 'camvid/images', '--masks',
                REAL / 'camvid/masks', '--map', '11=255', '--root', tmp_path)
    counts = [len((tmp_path / LISTS / f'{split}.txt').read_text().splitlines())
              for split in ('train', 'val', 'test')]
    assert counts == [367, 101, 233]
    data = open_own(tmp_path, 'val')
    assert data.n_classes == 11
    raw = np.asarray(Image.open(data.labels[3]))
    assert 11 in raw
    assert np.array_equal(data.read_label(3), np.where(raw == 11, 255, raw))
