"""Made-up files in the published formats, and prepare.py in this process."""
import contextlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from scipy.io import savemat

import dataset
import prepare
import recipes

REAL = Path(__file__).parents[2] / 'shared' / 'data'
H, W = 24, 31


def run_prepare(*words) -> str:
    """Run prepare.py in this process and return what it prints."""
    printed = io.StringIO()
    with (mock.patch.object(sys, 'argv', ['prepare.py', *map(str, words)]),
          contextlib.redirect_stdout(printed)):
        assert prepare.main() is None
    return printed.getvalue()


def jpg(seed, size=(H, W)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return encode(Image.fromarray(pixels), 'JPEG')


def png(values, palette=True):
    picture = Image.fromarray(values)
    if palette:
        picture.putpalette(recipes.voc_palette())
    return encode(picture, 'PNG')


def encode(picture, kind):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def values_of(seed, top, size=(H, W)):
    return np.random.default_rng(seed).integers(0, top, size).astype(np.uint8)


def mat(**variables):
    file = io.BytesIO()
    savemat(file, variables)
    return file.getvalue()


def sbd_mat(values):
    return mat(GTcls={'Boundaries': np.zeros((20, 1)), 'Segmentation': values,
                      'CategoriesPresent': np.unique(values)})


def write_tar(path, files, mode='w'):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def lines(ids):
    return ''.join(f'{i}\n' for i in ids).encode()


def voc_files(base='VOCdevkit/VOC2012'):
    """a, b train; c, d val; e, f only in SBD."""
    files = {f'{base}/ImageSets/Segmentation/train.txt': lines('ab'),
             f'{base}/ImageSets/Segmentation/val.txt': lines('cd'),
             f'{base}/ImageSets/Segmentation/trainval.txt': lines('abcd'),
             f'{base}/ImageSets/Main/train.txt': lines('xyz'),
             f'{base}/Annotations/a.xml': b'<annotation/>'}
    for i, name in enumerate('abcdef'):
        files[f'{base}/JPEGImages/{name}.jpg'] = jpg(i)
    for i, name in enumerate('abcd'):
        files[f'{base}/SegmentationClass/{name}.png'] = png(values_of(i, 21))
        files[f'{base}/SegmentationObject/{name}.png'] = png(values_of(9, 3))
    return files


def sbd_files(base='benchmark_RELEASE/dataset'):
    files = {f'{base}/train.txt': lines('aec'), f'{base}/val.txt': lines('fd')}
    for i, name in enumerate('acdef'):
        files[f'{base}/cls/{name}.mat'] = sbd_mat(values_of(50 + i, 21))
        files[f'{base}/inst/{name}.mat'] = mat(GTinst=np.zeros((2, 2)))
    return files


def read_mask(path):
    with Image.open(path) as picture:
        assert picture.mode == 'P'
        assert picture.getpalette()[:60] == recipes.voc_palette()[:60]
        return np.array(picture)


def read_list(root, split):
    return (root / f'ImageSets/Segmentation/{split}.txt').read_text().split()


def files_below(root):
    return [p for p in root.rglob('*') if p.is_file() and p.name != 'lock']


def open_list(name, root, split):
    return dataset.SegmentationDataset(str(root), split, dataset.DATASETS[name])


def check_voc(root):
    """Compare a whole VOC made of voc_files and sbd_files with what it must be."""
    assert read_list(root, 'trainaug') == ['a', 'b', 'e', 'f']
    assert read_list(root, 'train') == ['a', 'b']
    assert read_list(root, 'val') == ['c', 'd']
    assert read_list(root, 'trainval') == ['a', 'b', 'c', 'd']
    made = root / 'SegmentationClassAug'
    for i, name in enumerate('abcd'):  # VOC's own masks go before SBD's
        assert np.array_equal(read_mask(made / f'{name}.png'), values_of(i, 21))
    for i, name in ((3, 'e'), (4, 'f')):
        assert np.array_equal(read_mask(made / f'{name}.png'), values_of(50 + i, 21))
    for i, name in enumerate('abcdef'):
        assert (root / f'JPEGImages/{name}.jpg').read_bytes() == jpg(i)
    assert not list(root.rglob('*.tmp')) + list(root.rglob('*.part'))
    assert open_list('voc', root, 'trainaug').masks == 'SegmentationClassAug'
