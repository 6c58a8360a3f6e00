"""prepare.py as a whole: VOC from archives, folders and downloads, and restarts."""
import functools
import http.server
import io
import os
import signal
import sys
import threading
import time
from hashlib import md5, sha256

import numpy as np
import pytest
import torch
import torchvision.models
from made_up import (
    check_voc,
    files_below,
    jpg,
    lines,
    png,
    read_list,
    read_mask,
    run_prepare,
    sbd_files,
    sbd_mat,
    values_of,
    voc_files,
    write_files,
    write_tar,
    write_zip,
)
from torchvision.datasets import SBDataset, voc

import config
import prepare
from config import UserError
from logger import lock_folder


@pytest.fixture
def archives(tmp_path):
    return (write_tar(tmp_path / 'voc.tar', voc_files()),
            write_tar(tmp_path / 'sbd.tgz', sbd_files(), 'w:gz'))


def make_voc(root, *archives):
    return run_prepare('voc', '--root', root, '--archive', *archives)


# -- what is given ---------------------------------------------------------------------

def test_voc_from_archives(archives, tmp_path):
    root = tmp_path / 'root'
    printed = make_voc(root, *archives)
    check_voc(root)
    assert 'writing 12 files into' in printed
    assert '4 in the list; the published one has 10582' in printed
    # Again: nothing is touched. With a file less: just that one is made.
    stamps = {p: p.stat().st_mtime_ns for p in root.rglob('*.*g')}
    (root / 'SegmentationClassAug/e.png').unlink()
    printed = make_voc(root, *archives)
    check_voc(root)
    assert 'writing 1 files into' in printed and '11 exist and are kept' in printed
    changed = [p.name for p, t in stamps.items() if p.stat().st_mtime_ns != t]
    assert changed == ['e.png']


def test_voc_in_place(tmp_path):
    """Unpacked already, the VOC folder itself being the root."""
    write_files(tmp_path, {**voc_files('voc'), **sbd_files('sbd/dataset')})
    mine = tmp_path / 'voc/SegmentationClass/notes.txt'
    mine.write_text('mine')
    make_voc(tmp_path / 'voc', tmp_path / 'sbd')
    check_voc(tmp_path / 'voc')
    assert mine.read_text() == 'mine'
    assert (tmp_path / 'voc/ImageSets/Main/train.txt').read_bytes() == lines('xyz')


def test_voc_by_links_with_another_year_beside_it(tmp_path):
    """Links are followed, also one in a circle; VOC2007 in the same folder is not."""
    write_files(tmp_path, {**voc_files('real/voc'), **sbd_files('real/sbd')})
    images = tmp_path / 'real/voc/JPEGImages'
    store = images.rename(tmp_path / 'store')
    images.mkdir()
    for path in store.iterdir():
        (images / path.name).symlink_to(f'../../../store/{path.name}')
    base = 'given/VOCdevkit/VOC2007'
    write_files(tmp_path, voc_files(base))
    write_files(tmp_path / base, {'ImageSets/Segmentation/train.txt': lines('d'),
                                  'ImageSets/Segmentation/val.txt': lines('ab')})
    (tmp_path / 'given/VOCdevkit/VOC2012').symlink_to('../../real/voc')
    (tmp_path / 'given/dataset').symlink_to('../real/sbd')
    (tmp_path / 'real/voc/circle').symlink_to('..')
    make_voc(tmp_path / 'root', tmp_path / 'given')
    check_voc(tmp_path / 'root')


def test_voc_without_sbd_and_with_the_test_list(archives, tmp_path):
    test = write_tar(tmp_path / 'test.tar', {
        'VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt': lines('g'),
        'VOCdevkit/VOC2012/JPEGImages/g.jpg': jpg(9)})
    root = tmp_path / 'root'
    assert 'TRAIN_SPLIT=train' in make_voc(root, archives[0], test)
    assert read_list(root, 'test') == ['g'] and (root / 'JPEGImages/g.jpg').exists()
    assert not (root / 'SegmentationClassAug').exists()
    assert not (root / 'ImageSets/Segmentation/trainaug.txt').exists()
    make_voc(root, archives[1])  # SBD comes later
    check_voc(root)


def test_a_list_of_the_user_is_kept(archives, tmp_path):
    root = tmp_path / 'root'
    mine = root / 'ImageSets/Segmentation/trainaug.txt'
    mine.parent.mkdir(parents=True)
    mine.write_text('a\nmine\n')
    assert 'KEPT as it was' in make_voc(root, *archives)
    assert mine.read_text() == 'a\nmine\n'
    mine.unlink()
    make_voc(root, *archives)
    check_voc(root)
    mine.write_text('a\n')  # the user has shortened it
    assert 'KEPT as it was' in make_voc(root, *archives)
    assert mine.read_text() == 'a\n'


# -- what is wrong with it -------------------------------------------------------------

def test_what_is_missing_is_named_before_anything_is_written(tmp_path):
    files = sbd_files()
    del files['benchmark_RELEASE/dataset/cls/e.mat']
    voc = write_tar(tmp_path / 'voc.tar', voc_files())
    sbd = write_tar(tmp_path / 'sbd.tgz', files, 'w:gz')
    with pytest.raises(UserError, match=r'^1 of 12 files cannot be made .* the first '
                                        r'is SegmentationClassAug/e.png: give '):
        make_voc(tmp_path / 'root', voc, sbd)
    assert not (tmp_path / 'root/JPEGImages').exists()
    with pytest.raises(UserError, match='there are no lists'):
        make_voc(tmp_path / 'other', sbd)
    with pytest.raises(UserError, match='does not exist'):
        make_voc(tmp_path / 'other', tmp_path / 'none.tar')


def test_a_damaged_mat_is_named(archives, tmp_path):
    files = sbd_files()
    files['benchmark_RELEASE/dataset/cls/e.mat'] = b'not a mat'
    (tmp_path / 'bad').mkdir()
    sbd = write_tar(tmp_path / 'bad/sbd.tgz', files, 'w:gz')
    with pytest.raises(UserError, match=r'e.png cannot be made from .*cls/e.mat'):
        make_voc(tmp_path / 'root', archives[0], sbd)
    assert not (tmp_path / 'root/SegmentationClassAug/e.png').exists()
    assert not (tmp_path / 'root/ImageSets').exists()
    make_voc(tmp_path / 'root', *archives)  # and the sound one completes it
    check_voc(tmp_path / 'root')


@pytest.mark.parametrize('damage', ['cut in a header', 'bit in a header', 'no end'])
def test_a_tar_damaged_in_a_header_is_refused(damage, tmp_path):
    """tarfile itself stops without an error there."""
    path = write_tar(tmp_path / 'voc.tar', voc_files())
    content = bytearray(path.read_bytes())
    place = content.rfind(b'VOCdevkit/VOC2012/SegmentationClass')
    if damage == 'bit in a header':
        content[place + 3] ^= 1
    else:
        content = content[:place + 200 if damage == 'cut in a header' else place]
    path.write_bytes(content)
    with pytest.raises(UserError, match='is cut off or no sound archive'):
        make_voc(tmp_path / 'root', path)
    assert not files_below(tmp_path / 'root')


@pytest.mark.parametrize('kind, share', [('tar', 0.97), ('tar', 0.5), ('tgz', 0.98),
                                         ('tgz', 0.4), ('zip', 0.9), ('tgz', 0.001)])
def test_a_cut_archive_is_refused(kind, share, tmp_path):
    path = tmp_path / f'voc.{kind}'
    if kind == 'zip':
        write_zip(path, voc_files())
    else:
        write_tar(path, voc_files(), 'w:gz' if kind == 'tgz' else 'w')
    whole = path.read_bytes()
    end = len(whole) if kind == 'tgz' else whole.rfind(b'\xff\xd9')  # of a picture
    path.write_bytes(whole[:int(end * share)])
    with pytest.raises(UserError, match='is cut off or no sound archive'):
        make_voc(tmp_path / 'root', path)
    assert not files_below(tmp_path / 'root')


@pytest.mark.parametrize('write', [write_tar, write_zip])
@pytest.mark.parametrize('name', ['../evil.txt', 'a/../../evil.txt', '{}/evil.txt'])
def test_no_member_lands_outside(write, name, tmp_path):
    outside = tmp_path / 'outside'
    path = write(tmp_path / 'bad', {**voc_files(), name.format(outside): b'evil'})
    root = tmp_path / 'root'
    if write is write_tar and '..' in name:
        with pytest.raises(UserError, match='outside the destination'):
            make_voc(root, path)
        assert not files_below(root)
    else:  # lands inside
        make_voc(root, path)
        assert read_list(root, 'train') == ['a', 'b']
    unpacked = root / 'unpacked' / 'bad'
    assert all(p.is_relative_to(unpacked) for p in tmp_path.rglob('evil*'))


def test_two_at_a_time_are_refused(archives, tmp_path):
    root = tmp_path / 'root'
    locked, end = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        lock = lock_folder(root)
        os.write(locked[1], b'x')
        os.read(end[0], 1)
        lock.close()
        os._exit(0)
    os.read(locked[0], 1)
    with pytest.raises(UserError, match=f'--root={root} .process {child} on'):
        make_voc(root, *archives)
    os.write(end[1], b'x')
    os.waitpid(child, 0)
    make_voc(root, *archives)


def test_killed_and_run_again(tmp_path):
    """kill -9 while masks are made: no half file under a final name, then complete."""
    ids = [f'{i:05d}' for i in range(128)]
    values = np.kron(values_of(1, 21, (80, 80)), np.ones((12, 12), np.uint8))
    files = {f'dataset/cls/{i}.mat': sbd_mat(values) for i in ids}
    files |= {f'VOC/JPEGImages/{i}.jpg': jpg(1) for i in [*ids, 'v']}
    files['VOC/SegmentationClass/v.png'] = b''
    for split in ('train', 'val'):
        files[f'VOC/ImageSets/Segmentation/{split}.txt'] = lines(['v'])
        files[f'dataset/{split}.txt'] = lines(ids)
    write_files(tmp_path / 'given', files)
    made = tmp_path / 'root/SegmentationClassAug'
    child = os.fork()
    if not child:
        os.setsid()
        make_voc(tmp_path / 'root', tmp_path / 'given')
        os._exit(0)
    end = time.time() + 30
    while time.time() < end and len(list(made.glob('*.png'))) < 10:
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    there = [p for p in made.glob('*.png') if p.stem != 'v']
    assert 5 < len(there) < 128
    assert all(np.array_equal(read_mask(p), values) for p in there)
    make_voc(tmp_path / 'root', tmp_path / 'given')
    assert len(list(made.iterdir())) == 129 and not list(made.glob('*.tmp'))
    assert all(np.array_equal(read_mask(made / f'{i}.png'), values) for i in ids)


# -- downloads -------------------------------------------------------------------------

@pytest.fixture
def server(archives, monkeypatch):
    """The folder of the archives, served at a local port under their true names."""
    folder, asked = archives[0].parent, []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *words):
            asked.append(words)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}'
        hashes = [md5(path.read_bytes()).hexdigest() for path in archives]
        monkeypatch.setitem(voc.DATASET_YEAR_DICT['2012'], 'url', f'{url}/voc.tar')
        monkeypatch.setitem(voc.DATASET_YEAR_DICT['2012'], 'md5', hashes[0])
        monkeypatch.setattr(SBDataset, 'url', f'{url}/sbd.tgz')
        monkeypatch.setattr(SBDataset, 'md5', hashes[1])
        yield asked
        server.shutdown()


def test_voc_is_downloaded_once(server, tmp_path):
    root = tmp_path / 'root'
    run_prepare('voc', '--root', root, '--download')
    check_voc(root)
    n_requests = len(server)
    run_prepare('voc', '--root', root, '--download')
    assert len(server) == n_requests > 0


@pytest.mark.parametrize('damage', ['other', 'cut off', 'missing'])
def test_a_bad_download_is_not_used(damage, server, archives, tmp_path):
    root, content = tmp_path / 'root', archives[0].read_bytes()
    if damage == 'missing':
        archives[0].unlink()
    else:
        archives[0].write_bytes(content[:5000] if damage == 'cut off' else b'<html>')
    with pytest.raises(UserError, match='could not fetch http.*--archive'):
        run_prepare('voc', '--root', root, '--download')
    assert not [p for p in files_below(root) if p.suffix != '.part']
    archives[0].write_bytes(content)
    run_prepare('voc', '--root', root, '--download')
    check_voc(root)


def test_weights_are_fetched(tmp_path, monkeypatch):
    """From torchvision's address, here on the disk; the hash is in the name."""
    content = io.BytesIO()
    torch.save({'layer1.0.conv1.weight': torch.zeros(2)}, content)
    content = content.getvalue()
    name = f'resnet50-{sha256(content).hexdigest()[:8]}.pth'
    (tmp_path / name).write_bytes(content)

    class Weights:
        url = (tmp_path / name).as_uri()

    monkeypatch.setattr(torchvision.models, 'get_model_weights',
                        lambda model: {'IMAGENET1K_V1': Weights})
    words = 'weights', '--root', tmp_path / 'models', '--depth', 50
    run_prepare(*words)
    run_prepare(*words)  # kept
    assert (tmp_path / 'models' / name).read_bytes() == content
    (tmp_path / 'models' / name).unlink()
    (tmp_path / name).write_bytes(content[:-9])
    with pytest.raises(UserError, match='by hand'):
        run_prepare(*words)
    assert not list((tmp_path / 'models').iterdir())


def test_an_error_of_a_worker_process_is_one_sentence(tmp_path, monkeypatch, capsys):
    files = {f'masks/{i}.png': png(values_of(i, 3)) for i in range(70)}
    files |= {f'images/{i}.jpg': jpg(i) for i in range(70)}
    write_files(tmp_path, files)
    (tmp_path / 'masks/40.png').write_bytes(b'not a picture')
    words = f'folder --images {tmp_path}/images --masks {tmp_path}/masks --root x'
    monkeypatch.setattr(sys, 'argv', ['prepare.py', *words.split()])
    with pytest.raises(SystemExit) as ended:
        config.run(prepare.main)
    assert ended.value.code == config.EXIT_USER
    printed = capsys.readouterr().err
    assert printed.startswith(f'error: {tmp_path}/masks/40.png cannot be read')
    assert printed.count('\n') == 1
