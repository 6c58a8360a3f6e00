"""The cache of the training pictures: the same samples, and no file lost by it."""
import os
import pickle
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_voc
from PIL import Image

import dataset
import runtime
import settings

Usage = namedtuple('Usage', 'total used free')


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Settings of a small training set, as many workers as one asks for."""
    root = write_voc(tmp_path / 'VOC2012')
    for name, value in dict(CROP_SIZE=33, BATCH_SIZE=4, DATA_ROOT=str(root),
                            DATASET='voc', TRAIN_SPLIT='train', N_WORKERS=0).items():
        monkeypatch.setattr(settings, name, value)
    monkeypatch.setattr(dataset, 'n_cores', lambda: 8)
    return root


@pytest.fixture
def files(tmp_path):
    """Five files of a few bytes."""
    paths = [tmp_path / f'file_{i}' for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(b'content %d ' % i * (i + 1))
    return [str(path) for path in paths]


@pytest.fixture
def place(tmp_path):
    """A folder of its own for the cache."""
    (tmp_path / 'cache').mkdir()
    return tmp_path / 'cache' / 'pack.zip'


def open_packed(file):
    folder = dataset.open_split('train')
    folder.pack = dataset.Pack(folder.images + folder.labels, str(file))
    return folder


def batches(folder, n_workers=0, context=None):
    settings.N_WORKERS = n_workers
    loader = dataset.train_loader(folder, 0, 4, 'cpu')
    assert loader.num_workers == n_workers
    loader.multiprocessing_context = context
    return list(loader)


def is_same(one, other):
    return len(one) == len(other) == 4 and all(
        torch.equal(x, y) for pair in zip(one, other, strict=True)
        for x, y in zip(*pair, strict=True))


def contents(pack, n=5):
    return [pack[i] for i in range(n)]


def as_they_are(paths):
    return [Path(path).read_bytes() for path in paths]


def mark(path):
    stat = os.stat(path)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def sentence_of(error):
    """Return what a user reads: one sentence, raised on purpose."""
    text = runtime.explain(error)
    assert text and '\n' not in text, repr(error)
    return text


# -- samples ---------------------------------------------------------------------------

def test_samples_are_the_same(data, place):
    """Without the cache, from it, and from it after the pictures are gone."""
    plain = batches(dataset.open_split('train'))
    folder = open_packed(place)
    assert is_same(batches(folder), plain)
    shutil.rmtree(data / 'JPEGImages')
    shutil.rmtree(data / 'SegmentationClass')
    assert is_same(batches(folder), plain)
    assert is_same(batches(folder, 2), plain)  # forked, with the zip open already
    assert is_same(batches(folder), plain)
    with pytest.raises(ValueError, match='cannot be decoded'):  # they are really gone
        folder.pack = None
        folder.read(0)


def test_spawned_workers_read_it(data, place):
    """As on macOS and Windows, where a worker knows nothing but what is pickled."""
    plain = batches(dataset.open_split('train'))
    folder = open_packed(place)
    shutil.rmtree(data / 'JPEGImages')
    assert is_same(batches(folder, 1, 'spawn'), plain)


@pytest.mark.parametrize('is_read', [False, True])
def test_it_can_be_pickled(is_read, files, place):
    """At any time: also after this process has read from it."""
    pack = dataset.Pack(files, str(place))
    if is_read:
        assert pack[0] == Path(files[0]).read_bytes()
    other = pickle.loads(pickle.dumps(pack))
    assert contents(other) == as_they_are(files)


def test_evaluation_does_not_need_it(data, place):
    """The zip holds the training list only, in its order, pictures before masks."""
    folder = open_packed(place)
    assert len(folder) == 6
    with zipfile.ZipFile(place) as found:
        assert len(found.namelist()) == 12
        assert {info.compress_type for info in found.infolist()} == {zipfile.ZIP_STORED}
    assert contents(folder.pack, 12) == as_they_are(folder.images + folder.labels)
    assert dataset.open_split('val').pack is None


# -- used again, written again ---------------------------------------------------------

def test_used_again_as_long_as_nothing_changed(files, place):
    first = dataset.Pack(files, str(place))
    before = mark(place)
    again = dataset.Pack(list(files), str(place))
    assert mark(place) == before
    assert contents(again) == contents(first) == as_they_are(files)


def longer(files):
    Path(files[2]).write_bytes(b'something longer')


def later(files):
    """The size stays: only the time tells."""
    old = Path(files[2]).read_bytes()
    Path(files[2]).write_bytes(old[::-1])
    os.utime(files[2], ns=(1, 10 ** 18))


def older(files):
    """An older file put in its place, as a copy from an archive."""
    Path(files[2]).write_bytes(b'x' * os.stat(files[2]).st_size)
    os.utime(files[2], ns=(1, 5))


def other_order(files):
    files.reverse()


def one_less(files):
    files.pop()


def other_name(files):
    """Another file of the same size and time, as of another data set's copy."""
    content = Path(files[2]).read_bytes()[::-1]
    stat = os.stat(files[2])
    files[2] += '_other'
    Path(files[2]).write_bytes(content)
    os.utime(files[2], ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize('change', [longer, later, older, other_order, one_less,
                                    other_name])
def test_written_again_when_a_file_changed(change, files, place):
    dataset.Pack(files, str(place))
    before = mark(place)
    change(files)
    pack = dataset.Pack(files, str(place))
    assert mark(place) != before
    assert contents(pack, len(files)) == as_they_are(files)
    assert [p.name for p in place.parent.iterdir()] == ['pack.zip']


# -- other people's files --------------------------------------------------------------

def text_file(path):
    path.write_text('my thesis\n')


def empty_file(path):
    path.write_bytes(b'')


def zip_without_comment(path):
    with zipfile.ZipFile(path, 'w') as target:
        target.writestr('0', b'holiday')


def zip_with_a_comment(path):
    with zipfile.ZipFile(path, 'w') as target:
        target.writestr('0', b'holiday')
        target.comment = b'0123456789abcdef0123456789abcdef01234567'  # GitHub's


def zip_with_a_comment_as_long(path):
    with zipfile.ZipFile(path, 'w') as target:
        target.writestr('holiday/beach.jpg', b'holiday')
        target.comment = b'Pictures of our holiday at the sea'.ljust(64, b'.')


@pytest.mark.parametrize('make', [text_file, empty_file, zip_without_comment,
                                  zip_with_a_comment, zip_with_a_comment_as_long])
def test_another_file_is_not_overwritten(make, files, place):
    make(place)
    before = place.read_bytes()
    with pytest.raises(ValueError) as caught:
        dataset.Pack(files, str(place))
    assert f'CACHE={place}' in sentence_of(caught.value)
    assert place.read_bytes() == before
    assert [p.name for p in place.parent.iterdir()] == ['pack.zip']


def test_a_folder_is_no_cache(files, place):
    with pytest.raises(ValueError) as caught:
        dataset.Pack(files, str(place.parent))
    assert f'CACHE={place.parent}' in sentence_of(caught.value)
    assert list(place.parent.iterdir()) == []


# -- where it cannot be written --------------------------------------------------------

def test_no_room(files, place, monkeypatch, capsys):
    """The numbers are right, and asked of the folder that the cache is to be in."""
    os.truncate(files[1], 1_230_000_000)  # takes no room itself
    asked = []

    def disk_usage(path):
        asked.append(Path(path))
        return Usage(10 ** 12, 0, 560_000_000)

    monkeypatch.setattr(shutil, 'disk_usage', disk_usage)
    with pytest.raises(OSError) as caught:
        dataset.Pack(files, str(place))
    text = sentence_of(caught.value)
    assert f'CACHE={place}' in text and '1.23 GB' in text and '0.56 GB' in text
    assert asked == [place.parent] and list(place.parent.iterdir()) == []
    printed = capsys.readouterr().out
    assert '5 files' in printed and '1.23 GB' in printed and str(place) in printed


def test_room_for_just_so_much(files, place, monkeypatch):
    size = sum(map(len, as_they_are(files)))
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(0, 0, size - 1))
    with pytest.raises(OSError, match='free'):
        dataset.Pack(files, str(place))
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(0, 0, 2 * size))
    dataset.Pack(files, str(place))
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(0, 0, 0))
    assert contents(dataset.Pack(files, str(place))) == as_they_are(files)  # is there


def test_no_such_folder(files, place):
    with pytest.raises(OSError) as caught:
        dataset.Pack(files, str(place.parent / 'nowhere' / 'pack.zip'))
    assert 'nowhere' in sentence_of(caught.value)


def test_folder_that_may_not_be_written_to(files, place, monkeypatch):
    whole = zipfile.ZipFile

    def zip_file(path, mode='r', *args, **kwargs):
        if mode != 'r':
            raise PermissionError(13, 'Permission denied', str(path))
        return whole(path, mode, *args, **kwargs)

    monkeypatch.setattr(zipfile, 'ZipFile', zip_file)
    with pytest.raises(OSError) as caught:
        dataset.Pack(files, str(place))
    assert f'CACHE={place}' in sentence_of(caught.value)


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(28, 'No space left')])
@pytest.mark.parametrize('is_there', [False, True])
def test_interrupted_writing_leaves_nothing(error, is_there, files, place, monkeypatch):
    """Neither a part of it under its name nor a temporary; an old one stays whole."""
    if is_there:
        dataset.Pack(files, str(place))
        later(files)
    before = place.read_bytes() if is_there else None
    read, seen = Path.read_bytes, []

    def read_bytes(path):
        seen.append(path)
        if len(seen) == 4:
            assert len(list(place.parent.iterdir())) == 1 + is_there
            raise error
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'read_bytes', read_bytes)
        with pytest.raises(type(error)):
            dataset.Pack(files, str(place))
    assert len(seen) == 4
    left = [p.name for p in place.parent.iterdir()]
    assert left == (['pack.zip'] if is_there else [])
    assert not is_there or place.read_bytes() == before
    assert contents(dataset.Pack(files, str(place))) == as_they_are(files)


def test_a_damaged_cache_is_named(data, place):
    """A flipped bit inside: never a wrong picture, and a sentence."""
    folder = open_packed(place)
    content = bytearray(place.read_bytes())
    start = content.find(Path(folder.images[2]).read_bytes())
    content[start + 300] ^= 16
    place.write_bytes(content)
    folder.pack = dataset.Pack(folder.images + folder.labels, str(place))
    folder.read(1)
    with pytest.raises((ValueError, OSError)) as caught:
        folder.read(2)
    assert f'the cache {place} is damaged' in sentence_of(caught.value)


def test_a_bad_picture_in_the_cache_is_named(data, place):
    Image.fromarray(np.zeros((42, 50, 3), np.uint8)).save(
        data / 'SegmentationClass/pic_2.png')
    folder = open_packed(place)
    with pytest.raises(ValueError) as caught:
        folder.read(2)
    assert 'SegmentationClass/pic_2.png' in sentence_of(caught.value)
