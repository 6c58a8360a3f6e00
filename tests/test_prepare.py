"""Every data set from made-up archives in their published formats, and from real ones.
"""
import argparse
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE, run_script
from PIL import Image
from scipy.io import savemat

import dataset
import prepare
import recipes
from preparation import masks, sources

REAL = Path(__file__).parents[2] / 'shared' / 'data'
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f'no real data in {REAL}')
H, W = 24, 31


# -- made-up files in the published formats --------------------------------------------

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


def values_of(seed, top, size=(H, W), bottom=0):
    return np.random.default_rng(seed).integers(bottom, top, size).astype(np.uint8)


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


def make(name, root, *archives, **more):
    """Run one of prepare.py's functions in this process."""
    args = argparse.Namespace(**{
        'name': name, 'root': str(root), 'archive': [str(a) for a in archives],
        'download': False, **more})
    prepare.MAKERS[name](args)


def files_below(root):
    return [p for p in root.rglob('*') if p.is_file() and p.name != 'lock']


def check_voc(root):
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
    facts = dataset.DATASETS['voc']
    assert dataset.Folder(str(root), 'trainaug', facts).masks == 'SegmentationClassAug'


# -- VOC and SBD -----------------------------------------------------------------------

@pytest.fixture
def archives(tmp_path):
    return (write_tar(tmp_path / 'voc.tar', voc_files()),
            write_tar(tmp_path / 'sbd.tgz', sbd_files(), 'w:gz'))


def test_voc_from_archives(archives, tmp_path, capsys):
    root = tmp_path / 'root'
    make('voc', root, *archives)
    check_voc(root)
    printed = capsys.readouterr().out
    assert '6 files of JPEGImages, 6 files of SegmentationClassAug' in printed
    assert '4 in the list; the published one has 10582' in printed
    # Again: nothing is touched. With a file less: just that one is made.
    stamps = {p: p.stat().st_mtime_ns for p in files_below(root)}
    (root / 'SegmentationClassAug/e.png').unlink()
    make('voc', root, *archives)
    check_voc(root)
    printed = capsys.readouterr().out
    assert '0 files of JPEGImages, 1 files of SegmentationClassAug' in printed
    assert '11 files are there and kept' in printed
    changed = [p.name for p, t in stamps.items() if p.stat().st_mtime_ns != t]
    assert changed == ['e.png']


def test_voc_from_folders_and_in_place(tmp_path):
    """Unpacked already, the VOC folder itself being the root."""
    for name, content in {**voc_files('voc'), **sbd_files('sbd/dataset')}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    mine = tmp_path / 'voc/SegmentationClass/notes.txt'
    mine.write_text('mine')
    make('voc', tmp_path / 'voc', tmp_path / 'sbd')
    check_voc(tmp_path / 'voc')
    assert mine.read_text() == 'mine'
    assert (tmp_path / 'voc/ImageSets/Main/train.txt').read_bytes() == lines('xyz')


def test_voc_without_sbd_and_with_the_test_list(archives, tmp_path, capsys):
    test = write_tar(tmp_path / 'test.tar', {
        'VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt': lines('g'),
        'VOCdevkit/VOC2012/JPEGImages/g.jpg': jpg(9)})
    root = tmp_path / 'root'
    make('voc', root, archives[0], test)
    assert 'TRAIN_SPLIT=train' in capsys.readouterr().out
    assert read_list(root, 'test') == ['g'] and (root / 'JPEGImages/g.jpg').exists()
    assert not (root / 'SegmentationClassAug').exists()
    assert not (root / 'ImageSets/Segmentation/trainaug.txt').exists()
    # SBD comes later
    make('voc', root, archives[1])
    check_voc(root)


def test_a_list_that_is_there_is_kept(archives, tmp_path, capsys):
    root = tmp_path / 'root'
    mine = root / 'ImageSets/Segmentation/trainaug.txt'
    mine.parent.mkdir(parents=True)
    mine.write_text('a\nmine\n')
    make('voc', root, *archives)
    assert mine.read_text() == 'a\nmine\n'
    assert 'KEPT as it was, with 2 others' in capsys.readouterr().out
    mine.write_text('a\n')  # a part of what there is now
    make('voc', root, *archives)
    check_voc(root)


def test_what_lacks_is_named_before_anything_is_written(tmp_path):
    files = sbd_files()
    del files['benchmark_RELEASE/dataset/cls/e.mat']
    voc = write_tar(tmp_path / 'voc.tar', voc_files())
    sbd = write_tar(tmp_path / 'sbd.tgz', files, 'w:gz')
    with pytest.raises(ValueError, match=r'^1 of 12 files cannot be made .* the first '
                                         r'is SegmentationClassAug/e.png: give VOC'):
        make('voc', tmp_path / 'root', voc, sbd)
    assert not (tmp_path / 'root/JPEGImages').exists()
    with pytest.raises(ValueError, match='there are no lists'):
        make('voc', tmp_path / 'other', sbd)
    with pytest.raises(FileNotFoundError, match='is not there'):
        make('voc', tmp_path / 'other', tmp_path / 'none.tar')


def test_a_damaged_mat_is_named(archives, tmp_path):
    files = sbd_files()
    files['benchmark_RELEASE/dataset/cls/e.mat'] = b'not a mat'
    (tmp_path / 'bad').mkdir()
    sbd = write_tar(tmp_path / 'bad/sbd.tgz', files, 'w:gz')
    with pytest.raises(ValueError, match=r'cls/e.mat cannot be made into a mask'):
        make('voc', tmp_path / 'root', archives[0], sbd)
    assert not (tmp_path / 'root/SegmentationClassAug/e.png').exists()
    assert not (tmp_path / 'root/ImageSets').exists()
    make('voc', tmp_path / 'root', *archives)  # and the sound one completes it
    check_voc(tmp_path / 'root')


@pytest.mark.parametrize('damage', ['cut in a header', 'bit in a header', 'no end'])
def test_a_tar_damaged_in_a_header_is_refused(damage, tmp_path):
    """Where tarfile itself stops without a word."""
    path = write_tar(tmp_path / 'voc.tar', voc_files())
    content = bytearray(path.read_bytes())
    place = content.rfind(b'VOCdevkit/VOC2012/SegmentationClass')
    if damage == 'bit in a header':
        content[place + 3] ^= 1
    else:
        content = content[:place + 200 if damage == 'cut in a header' else place]
    path.write_bytes(content)
    with pytest.raises(ValueError, match='is cut off or no sound archive'):
        make('voc', tmp_path / 'root', path)
    assert not list((tmp_path / 'root').rglob('*.jpg'))


def test_another_year_beside_it_is_left_out(tmp_path):
    other = {name.replace('2012', '2007').replace('train.txt', 'train.txt'): content
             for name, content in voc_files().items()}
    base = 'VOCdevkit/VOC2007/ImageSets/Segmentation'
    other |= {f'{base}/train.txt': lines('d'), f'{base}/val.txt': lines('ab')}
    for name, content in {**voc_files(), **other, **sbd_files()}.items():
        (tmp_path / 'given' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'given' / name).write_bytes(content)
    make('voc', tmp_path / 'root', tmp_path / 'given')
    check_voc(tmp_path / 'root')


def test_links_are_followed(tmp_path):
    for name, content in {**voc_files('real/voc'), **sbd_files('real/sbd')}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    store = (tmp_path / 'real/voc/JPEGImages').rename(tmp_path / 'store')
    (tmp_path / 'real/voc/JPEGImages').mkdir()
    for path in store.iterdir():
        (tmp_path / 'real/voc/JPEGImages' / path.name).symlink_to(
            Path('../../../store') / path.name)
    (tmp_path / 'given').mkdir()
    (tmp_path / 'given/VOC').symlink_to('../real/voc')
    (tmp_path / 'given/dataset').symlink_to('../real/sbd')
    (tmp_path / 'real/voc/circle').symlink_to('..')
    make('voc', tmp_path / 'root', tmp_path / 'given')
    check_voc(tmp_path / 'root')


def test_two_at_a_time_are_refused(archives, tmp_path):
    root = tmp_path / 'root'
    code = ('import sys, runtime\nkept = runtime.lock(sys.argv[1])\n'
            'print("held", flush=True)\nsys.stdin.read()')
    other = subprocess.Popen([sys.executable, '-c', code, str(root)], cwd=HERE,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(ValueError, match=f'--root={root} .process {other.pid} on'):
            make('voc', root, *archives)
    finally:
        other.kill()
        other.wait()
    make('voc', root, *archives)


@pytest.mark.parametrize('kind, share', [('tar', 0.97), ('tar', 0.5), ('tgz', 0.98),
                                         ('tgz', 0.4), ('zip', 0.9), ('tgz', 0.001)])
def test_a_cut_archive_is_refused(kind, share, tmp_path):
    files = voc_files()
    path = tmp_path / f'voc.{kind}'
    if kind == 'zip':
        write_zip(path, files)
    else:
        write_tar(path, files, 'w:gz' if kind == 'tgz' else 'w')
    whole = path.read_bytes()
    end = len(whole) if kind == 'tgz' else whole.rfind(b'\xff\xd9')  # of a picture
    path.write_bytes(whole[:int(end * share)])
    with pytest.raises(ValueError, match='is cut off or no sound archive'):
        make('voc', tmp_path / 'root', path)
    assert not files_below(tmp_path / 'root')


@pytest.mark.parametrize('kind', ['tar', 'zip'])
@pytest.mark.parametrize('name', ['../evil.txt', 'a/../../evil.txt', '/tmp/evil.txt',
                                  'C:/evil.txt', '..\\evil.txt'])
def test_members_that_would_land_outside_are_refused(kind, name, tmp_path):
    write = write_tar if kind == 'tar' else write_zip
    path = write(tmp_path / f'bad.{kind}', {**voc_files(), name: b'evil'})
    with pytest.raises(ValueError, match='would land outside'):
        make('voc', tmp_path / 'root', path)
    assert not list(tmp_path.rglob('evil*')) and not Path('/tmp/evil.txt').exists()
    assert not files_below(tmp_path / 'root')


def test_killed_and_run_again(tmp_path):
    """kill -9 while masks are made: no half file under a final name, then complete."""
    ids = [f'{i:05d}' for i in range(300)]
    base = tmp_path / 'given/dataset/cls'
    base.mkdir(parents=True)
    values = np.kron(values_of(1, 21, (90, 90)), np.ones((16, 16), np.uint8))
    content = sbd_mat(values)
    for i in ids:
        (base / f'{i}.mat').write_bytes(content)
    voc = tmp_path / 'given/VOC'
    for folder in ('ImageSets/Segmentation', 'JPEGImages', 'SegmentationClass'):
        (voc / folder).mkdir(parents=True)
    for i in ids + ['v']:
        (voc / f'JPEGImages/{i}.jpg').write_bytes(jpg(1))
    (voc / 'SegmentationClass/v.png').write_bytes(png(values_of(1, 21)))
    for where, split, names in ((voc / 'ImageSets/Segmentation', 'train', ['v']),
                                (voc / 'ImageSets/Segmentation', 'val', ['v']),
                                (base.parent, 'train', ids), (base.parent, 'val', ids)):
        (where / f'{split}.txt').write_bytes(lines(names))
    command = [sys.executable, str(HERE / 'prepare.py'), 'voc', '--root',
               str(tmp_path / 'root'), '--archive', str(tmp_path / 'given')]
    made = tmp_path / 'root/SegmentationClassAug'
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.time() + 30
    while time.time() < end and len(list(made.glob('*.png'))) < 20:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    there = list(made.glob('*.png'))
    assert 20 <= len(there) < 300
    assert all(np.array_equal(read_mask(p), values) for p in there if p.stem != 'v')
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(made.iterdir())) == 301 and not list(made.glob('*.tmp'))
    assert all(np.array_equal(read_mask(made / f'{i}.png'), values) for i in ids)


# -- downloads -------------------------------------------------------------------------

@pytest.fixture
def server(archives):
    """A local port that serves the two archives: whole, cut off, or something else."""
    class Handler(http.server.BaseHTTPRequestHandler):
        manner, asked = 'whole', []

        def do_GET(self):
            type(self).asked.append(self.path)
            if self.manner == 'missing':
                self.send_error(404)
                return
            content = files[self.path]
            if self.manner == 'other':
                content = b'<html>please log in</html>'
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content if self.manner != 'broken' else
                             content[:len(content) // 2])

        def log_message(self, *words):
            pass

    files = {'/voc': archives[0].read_bytes(), '/sbd': archives[1].read_bytes()}
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Handler.addresses = {
            file: (f'http://127.0.0.1:{server.server_port}{path}',
                   md5(files[path]).hexdigest())
            for file, path in (('VOCtrainval_11-May-2012.tar', '/voc'),
                               ('benchmark.tgz', '/sbd'))}
        yield Handler
        server.shutdown()


def test_voc_is_downloaded(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'addresses', lambda: server.addresses)
    root = tmp_path / 'root'
    make('voc', root, download=True)
    check_voc(root)
    make('voc', root, download=True)
    assert server.asked == ['/voc', '/sbd']  # once


@pytest.mark.parametrize('manner, words', [
    ('other', '26 bytes came, of md5'), ('broken', 'could not fetch'),
    ('missing', '404')])
def test_a_bad_download_leaves_nothing(manner, words, server, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'addresses', lambda: server.addresses)
    server.manner = manner
    root = tmp_path / 'root'
    with pytest.raises(OSError, match='--archive') as found:
        make('voc', root, download=True)
    assert words in str(found.value)
    assert not files_below(root)
    server.manner = 'whole'
    make('voc', root, download=True)
    check_voc(root)


def test_the_addresses_are_torchvisions():
    known = sources.addresses()
    assert set(known) == {'VOCtrainval_11-May-2012.tar', 'benchmark.tgz',
                          'VOCtrainval_03-May-2010.tar'}
    for url, digest in known.values():
        assert url.startswith('http') and len(digest) == 32


def test_weights_are_fetched(tmp_path, monkeypatch):
    """torchvision's address, served from the disk; the hash is in the name."""
    from hashlib import sha256

    import torch
    import torchvision.models
    content = io.BytesIO()
    torch.save({'layer1.0.conv1.weight': torch.zeros(2)}, content)
    content = content.getvalue()
    name = f'resnet50-{sha256(content).hexdigest()[:8]}.pth'
    (tmp_path / name).write_bytes(content)

    class Weights:
        url = (tmp_path / name).as_uri()

    monkeypatch.setattr(torchvision.models, 'get_model_weights',
                        lambda model: {'IMAGENET1K_V1': Weights})
    args = argparse.Namespace(name='weights', root=str(tmp_path / 'models'), depth=[50])
    prepare.prepare_weights(args)
    assert (tmp_path / 'models' / name).read_bytes() == content
    prepare.prepare_weights(args)  # kept
    (tmp_path / 'models' / name).unlink()
    (tmp_path / name).write_bytes(content[:-9])
    with pytest.raises(OSError, match='by hand'):
        prepare.prepare_weights(args)
    assert not list((tmp_path / 'models').iterdir())


# -- the other data sets ---------------------------------------------------------------

def test_context(tmp_path):
    ids = ['2008_000001', '2008_000002', '2008_000003']
    pictures = {f'VOCdevkit/VOC2010/JPEGImages/{i}.jpg': jpg(k)
                for k, i in enumerate(ids)}
    base = 'VOCdevkit/VOC2010/ImageSets'
    pictures |= {f'{base}/Main/train.txt': lines(ids[:2]),
                 f'{base}/Main/val.txt': lines(ids[2:]),
                 f'{base}/Segmentation/train.txt': lines(['other'])}
    labels = {i: np.random.default_rng(k).integers(0, 460, (H, W), np.uint16)
              for k, i in enumerate(ids)}
    voc = write_tar(tmp_path / 'voc2010.tar', pictures)
    maps = write_tar(tmp_path / 'trainval.tar.gz', {
        f'trainval/{i}.mat': mat(LabelMap=x) for i, x in labels.items()}, 'w:gz')
    root = tmp_path / 'root'
    make('context', root, voc, maps)
    assert read_list(root, 'train') == ids[:2] and read_list(root, 'val') == ids[2:]
    known = dict(zip(masks.CONTEXT_IDS, range(1, 60), strict=True))
    for i, x in labels.items():
        expected = [[known.get(int(v), 0) for v in row] for row in x]
        assert np.array_equal(read_mask(root / f'SegmentationClass/{i}.png'), expected)
    # the same files as 59 classes, background ignored
    folder = dataset.Folder(str(root), 'train', dataset.DATASETS['context59'])
    expected = np.array([[known.get(int(v), 256) - 1 for v in row]
                         for row in labels[ids[0]]])
    assert np.array_equal(folder.read_label(0), expected)


def test_context_names():
    names = {label: f'name {label}' for label in range(1, 460)}
    names |= {label: masks.CONTEXT_NAMES.get(name, name) for label, name in zip(
        masks.CONTEXT_IDS, recipes.CONTEXT[1:], strict=True)}

    def text():
        return '\n'.join(f'{k}: {v}' for k, v in names.items())

    masks.check_context_names(text())
    names[2] = 'airplane'
    with pytest.raises(ValueError, match='label 2 is called airplane'):
        masks.check_context_names(text())


def test_cocostuff10k_from_mats_and_from_maps(tmp_path):
    numbers = ['000000000077', '000000000113', '000000000825']
    ids = [f'COCO_train2014_{n}' for n in numbers]
    labels = {i: values_of(k, 183) for k, i in enumerate(ids)}
    never = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
    kept = [i for i in range(1, 183) if i not in never]
    lists = {'imageLists/train.txt': lines(ids[:2]),
             'imageLists/test.txt': lines(ids[2:])}
    archive = write_zip(tmp_path / 'cocostuff-10k-v1.1.zip', {
        **lists, 'imageLists/all.txt': lines(ids),
        **{f'images/{i}.jpg': jpg(k) for k, i in enumerate(ids)},
        **{f'annotations/{i}.mat': mat(S=x, names=np.zeros(3))
           for i, x in labels.items()}})
    make('cocostuff10k', tmp_path / 'a', archive)
    # the same as 164k pixel maps: label - 1, 255 unlabelled
    maps = write_zip(tmp_path / 'stuffthingmaps_trainval2017.zip', {
        f'{"val" if k else "train"}2017/{i[-12:]}.png': png(x - np.uint8(1), False)
        for k, (i, x) in enumerate(labels.items())})
    images = write_zip(tmp_path / 'train2017.zip', {
        f'train2017/{n}.jpg': jpg(k) for k, n in enumerate(numbers)})
    for name, content in lists.items():
        (tmp_path / 'lists').mkdir(exist_ok=True)
        (tmp_path / 'lists' / Path(name).name).write_bytes(content)
    make('cocostuff10k', tmp_path / 'b', maps, images, tmp_path / 'lists')
    for root in (tmp_path / 'a', tmp_path / 'b'):
        assert read_list(root, 'train') == ids[:2]
        assert read_list(root, 'test') == ids[2:]
        for i, x in labels.items():
            expected = [[kept.index(v) if v in kept else 255 for v in row]
                        for row in x.tolist()]
            made = read_mask(root / f'SegmentationClass/{i}.png')
            assert np.array_equal(made, expected)
    make('cocostuff164k', tmp_path / 'c', maps, images)
    assert read_list(tmp_path / 'c', 'train') == numbers[:1]
    assert read_list(tmp_path / 'c', 'val') == numbers[1:]


def test_cityscapes(tmp_path):
    names = ['train/ulm/ulm_000001_000019', 'val/bonn/bonn_000002_000019',
             'test/kiel/kiel_000003_000019']
    labels = {n: values_of(k, 34) for k, n in enumerate(names)}
    frames = write_zip(tmp_path / 'leftImg8bit_trainvaltest.zip', {
        'README': b'', **{f'leftImg8bit/{n}_leftImg8bit.png': png(values_of(k, 256))
                          for k, n in enumerate(names)}})
    truth = write_zip(tmp_path / 'gtFine_trainvaltest.zip', {
        f'gtFine/{n}_gtFine_{kind}.png': png(x, False) for n, x in labels.items()
        for kind in ('labelIds', 'color', 'instanceIds')})
    root = tmp_path / 'root'
    make('cityscapes', root, frames, truth)
    assert [read_list(root, s) for s in ('train', 'val', 'test')] == [
        [n] for n in names]
    folder = dataset.Folder(str(root), 'train', dataset.DATASETS['cityscapes'])
    ids = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    expected = [[ids.index(v) if v in ids else 255 for v in row]
                for row in labels[names[0]].tolist()]
    assert np.array_equal(folder.read_label(0), expected)
    assert not list((root / 'gtFine').rglob('*color*'))
    # a folder that is Cityscapes already, as its own root: lists only
    before = {p for p in root.rglob('*') if p.is_file()}
    for p in (root / 'ImageSets/Segmentation').iterdir():
        p.unlink()
    make('cityscapes', root)
    assert {p for p in root.rglob('*') if p.is_file()} == before


def coco_json():
    """Four images: a person and a dog that overlap, a crowd, a few pixels, a truck."""
    box = [10, 10, 60, 10, 60, 50, 10, 50]
    other = [40, 10, 90, 10, 90, 50, 40, 50]
    run = {'size': [60, 100], 'counts': [0, 60 * 30, 60 * 70]}  # 30 columns
    items = [(1, 1, 0, [box]), (1, 18, 0, [other]), (2, 18, 0, [other]), (2, 1, 1, run),
             (3, 1, 0, [[1, 1, 9, 1, 9, 9, 1, 9]]), (4, 8, 0, [box])]
    return {'images': [{'id': i, 'file_name': f'{i:012d}.jpg', 'height': 60,
                        'width': 100} for i in (1, 2, 3, 4)],
            'categories': [{'id': 1, 'name': 'person'}, {'id': 18, 'name': 'dog'},
                           {'id': 8, 'name': 'truck'}, {'id': 3, 'name': 'motorcycle'}],
            'annotations': [{'image_id': i, 'category_id': c, 'iscrowd': crowd,
                             'segmentation': s} for i, c, crowd, s in items]}


def test_coco_voc(tmp_path):
    pytest.importorskip('pycocotools', reason='COCO needs pycocotools')
    truth = write_zip(tmp_path / 'annotations_trainval2017.zip', {
        'annotations/instances_train2017.json': json.dumps(coco_json()),
        'annotations/captions_train2017.json': '{}'})
    images = write_zip(tmp_path / 'train2017.zip', {
        f'train2017/{i:012d}.jpg': jpg(i, (60, 100)) for i in range(1, 5)})
    root = tmp_path / 'root'
    make('coco_voc', root, truth, images)
    assert read_list(root, 'train') == [f'{i:012d}' for i in (1, 2)]  # 3 is too small
    person, dog = recipes.VOC.index('person'), recipes.VOC.index('dog')
    one = read_mask(root / 'SegmentationClass/000000000001.png')
    assert one[30, 20] == person and one[30, 80] == dog and one[30, 50] == 255
    assert one[5, 5] == one[55, 95] == 0
    assert abs(int((one == person).sum()) - 30 * 40) < 80
    two = read_mask(root / 'SegmentationClass/000000000002.png')
    assert two[30, 20] == 255 and two[30, 80] == dog and two[30, 35] == 0
    assert sorted(p.stem for p in (root / 'JPEGImages').iterdir()) == read_list(
        root, 'train')


# -- a user's own folder ---------------------------------------------------------------

def write_own(root, masks_of, suffixes=('.jpg', '.png', '.tif', '.bmp', '.JPEG')):
    """Images of several kinds in subfolders, and their masks."""
    for k, suffix in enumerate(suffixes):
        for folder in ('images', 'masks'):
            (root / folder / f'site {k % 2}').mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (H, W, 3), np.uint8)
        Image.fromarray(pixels).save(root / f'images/site {k % 2}/p{k}{suffix}')
        masks_of(k).save(root / f'masks/site {k % 2}/p{k}.png')


def own(root, target, *words):
    return run_script('prepare.py', 'folder', '--images', root / 'images', '--masks',
                      root / 'masks', '--root', target, *words)


def open_own(root, split):
    facts = {**dataset.DATASETS['folder'],
             **json.loads((root / 'dataset.json').read_text())}
    facts['map'] = {int(k): v for k, v in facts['map'].items()}
    return dataset.Folder(str(root), split, facts)


def test_own_folder(tmp_path):
    write_own(tmp_path, lambda k: Image.fromarray(
        np.where(values_of(k, 5) == 4, 9, values_of(k, 5)).astype(np.uint8)))
    (tmp_path / 'classes.txt').write_text('sky\nsea\nland\nship\n')
    target = tmp_path / 'made'
    done = own(tmp_path, target)
    assert done.returncode == 2 and 'has the value 9' in done.stderr
    assert '--map 9=255' in done.stderr and not target.exists()
    done = own(tmp_path, target, '--map', '9=ship', '--val', 0.4, '--seed', 3)
    assert done.returncode == 0, done.stderr
    train, val = open_own(target, 'train'), open_own(target, 'val')
    assert (len(train), len(val)) == (3, 2) and not set(train.ids) & set(val.ids)
    assert {*train.ids, *val.ids} == {f'site {k % 2}/p{k}' for k in range(5)}
    for folder in (train, val):
        for index, name in enumerate(folder.ids):
            k = int(name[-1])
            expected = values_of(k, 5)
            expected[expected == 4] = 3
            image, label = folder.read(index)
            assert np.array_equal(label, expected) and image.shape == (H, W, 3)
    lists = (target / 'ImageSets/Segmentation/val.txt').read_text()
    assert 'KEPT' not in done.stdout
    assert own(tmp_path, target, '--map', '9=3', '--val', 0.4, '--seed', 3
               ).returncode == 0
    assert (target / 'ImageSets/Segmentation/val.txt').read_text() == lists
    assert own(tmp_path, target, '--map', '9=3', '--val', 0.4, '--seed', 8
               ).returncode == 0
    assert (target / 'ImageSets/Segmentation/val.txt').read_text() != lists
    # A list that was edited by hand is kept; other images want another root.
    edited = (target / 'ImageSets/Segmentation/val.txt')
    edited.write_text(lists.splitlines()[0] + '\nmine\n')
    done = own(tmp_path, target, '--map', '9=3', '--val', 0.4, '--seed', 3)
    assert done.returncode == 0 and 'KEPT' in done.stdout
    assert edited.read_text().endswith('\nmine\n')
    (tmp_path / 'b').mkdir()
    (tmp_path / 'images').rename(tmp_path / 'b/images')
    (tmp_path / 'masks').rename(tmp_path / 'b/masks')
    done = own(tmp_path / 'b', target, '--map', '9=3')
    assert done.returncode == 2 and 'give another --root' in done.stderr


def test_own_masks_that_cannot_be_meant(tmp_path):
    def masks_of(name, paint, *words):
        write_own(tmp_path / name, paint)
        return own(tmp_path / name, tmp_path / name / 'made', *words)

    def binary(k):
        return Image.fromarray(values_of(k, 2) * np.uint8(255))
    done = masks_of('a', binary)
    assert done.returncode == 2 and '--map 255=1' in done.stderr
    done = masks_of('b', binary, '--map', '255=1')
    assert done.returncode == 0, done.stderr
    folder = open_own(tmp_path / 'b/made', 'train')
    assert np.array_equal(folder.read_label(0), values_of(int(folder.ids[0][-1]), 2))
    done = masks_of('c', lambda k: Image.fromarray(values_of(k, 3) * np.uint8(30)))
    assert done.returncode == 0 and 'not all values up to 60 occur' in done.stdout
    done = own(tmp_path / 'c', tmp_path / 'c/d', '--map', '30=1,30=2')
    assert done.returncode == 2 and 'two meanings' in done.stderr
    for path in (tmp_path / 'c/masks').rglob('*.png'):
        path.rename(path.with_suffix('.jpg'))
    done = own(tmp_path / 'c', tmp_path / 'c/d')
    assert done.returncode == 2 and 'JPEG, which changes values' in done.stderr
    (tmp_path / 'c/images/train').mkdir()
    (tmp_path / 'c/masks/train').mkdir()
    for folder, suffix in (('images', 'jpg'), ('masks', 'png')):
        binary(1).save(tmp_path / f'b/{folder}/x.{suffix}')
        (tmp_path / f'b/{folder}/train').mkdir()
        binary(1).save(tmp_path / f'b/{folder}/train/x.{suffix}')
    done = own(tmp_path / 'b', tmp_path / 'b/d', '--map', '255=1')
    assert done.returncode == 2 and 'what belongs where' in done.stderr


def test_own_folder_with_lists_names_and_tags(tmp_path):
    for k in range(4):
        for folder in ('images', 'masks'):
            (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / f'images/p{k}_rgb.jpg').write_bytes(jpg(k))
        (tmp_path / f'masks/p{k}_gt.png').write_bytes(png(values_of(k, 3)))
    (tmp_path / 'images/alone_rgb.jpg').write_bytes(jpg(7))
    (tmp_path / 'lists').mkdir()
    (tmp_path / 'lists/train.txt').write_text('p0\np2.jpg\np3\n')
    (tmp_path / 'lists/val.txt').write_text('p1\n')
    words = '--image-tag', '_rgb', '--mask-tag', '_gt', '--lists', tmp_path / 'lists'
    done = own(tmp_path, tmp_path / 'made', *words)
    assert done.returncode == 0, done.stderr
    assert '1 images or masks have no partner' in done.stdout
    assert 'the first is alone_rgb.jpg' in done.stdout
    assert open_own(tmp_path / 'made', 'train').ids == ['p0_rgb', 'p2_rgb', 'p3_rgb']
    assert open_own(tmp_path / 'made', 'val').n_classes == 3
    (tmp_path / 'lists/val.txt').write_text('p9\n')
    done = own(tmp_path, tmp_path / 'made', *words)
    assert done.returncode == 2 and 'the first: p9' in done.stderr
    done = own(tmp_path, tmp_path / 'made')
    assert done.returncode == 2 and '--mask-tag' in done.stderr


def test_own_folder_coded_by_colour(tmp_path):
    table = {(255, 0, 0): 0, (0, 255, 0): 1, (0, 0, 7): 2, (9, 9, 9): 255}
    colours = np.array(list(table), np.uint8)
    write_own(tmp_path, lambda k: Image.fromarray(colours[values_of(k, 4)]))
    done = own(tmp_path, tmp_path / 'made')
    assert done.returncode == 2 and 'coded by colour' in done.stderr
    file = tmp_path / 'colours.txt'
    file.write_text('255 0 0 red\n0 255 0 green grass\n0, 0, 7, blue\n')
    done = own(tmp_path, tmp_path / 'made', '--colours', file)
    assert done.returncode == 2 and 'the colour 9 9 9' in done.stderr
    file.write_text(file.read_text() + '9 9 9 void\n')
    done = own(tmp_path, tmp_path / 'made', '--colours', file)
    assert done.returncode == 0, done.stderr
    assert 'red, green grass, blue' in done.stdout
    folder = open_own(tmp_path / 'made', 'train')
    for index, name in enumerate(folder.ids):
        expected = np.array(list(table.values()))[values_of(int(name[-1]), 4)]
        assert np.array_equal(folder.read_label(index), expected)
    facts = json.loads((tmp_path / 'made/dataset.json').read_text())
    assert facts['palette'][:9] == [255, 0, 0, 0, 255, 0, 0, 0, 7]
    assert len(facts['palette']) == 768
    # Another table, or another mask: the masks are made anew.
    file.write_text('0 255 0 green\n255 0 0 red\n# a comment\n0 0 7 blue\n9 9 9 void\n')
    done = own(tmp_path, tmp_path / 'made', '--colours', file)
    assert done.returncode == 0 and 'is made anew' in done.stdout
    folder = open_own(tmp_path / 'made', 'train')
    expected = np.array([1, 0, 2, 255])[values_of(int(folder.ids[0][-1]), 4)]
    assert np.array_equal(folder.read_label(0), expected)
    done = own(tmp_path, tmp_path / 'made', '--colours', file)
    assert done.returncode == 0 and '5 files are there and kept' in done.stdout
    for line in ('1 2 grass', '300 0 0 red', 'red', '1 1 1 a\n1 1 1 b'):
        file.write_text(line + '\n')
        done = own(tmp_path, tmp_path / 'other', '--colours', file)
        assert done.returncode == 2, done.stderr
        assert '`r g b name`' in done.stderr or 'stands there twice' in done.stderr


@pytest.mark.parametrize('as_mode', ['1', 'I;16', 'RGB', 'LA'])
def test_own_masks_of_other_modes_are_converted_once(as_mode, tmp_path):
    def mask(k):
        values = values_of(k, 2)
        if as_mode == '1':
            return Image.fromarray(values * np.uint8(255)).convert('1')
        if as_mode == 'I;16':
            return Image.fromarray(values.astype(np.uint16))
        return Image.fromarray(values).convert(as_mode)
    write_own(tmp_path, mask)
    done = own(tmp_path, tmp_path / 'made')
    assert done.returncode == 0, done.stderr
    folder = open_own(tmp_path / 'made', 'train')
    assert folder.n_classes == 2 and folder.masks == 'masks_made'
    for index, name in enumerate(folder.ids):
        assert np.array_equal(folder.read_label(index), values_of(int(name[-1]), 2))


# -- real data -------------------------------------------------------------------------

@needs_real
def test_the_rule_gives_the_official_trainaug():
    def ids(*names):
        return sum(((REAL / 'lists' / n).read_text().split() for n in names), [])
    found = prepare.join_trainaug(ids('voc2012/train.txt'), ids('voc2012/val.txt'),
                                  ids('sbd/train.txt', 'sbd/val.txt'))
    official = ids('voc2012/trainaug.txt')
    assert len(found) == len(set(found)) == 10582 and set(found) == set(official)
    for name, facts in (('voc', 'voc2012'), ('context', 'context'),
                        ('cocostuff10k', 'cocostuff10k')):
        for split, count in recipes.DATASETS[name]['counts'].items():
            if (REAL / 'lists' / facts / f'{split}.txt').exists():
                assert len(ids(f'{facts}/{split}.txt')) == count


@needs_real
def test_names_are_the_official_ones():
    def names(file):
        found = [line.partition(': ') for line in (REAL / 'lists' / file).read_text()
                 .splitlines()]
        return {int(number): name.strip() for number, _, name in found}
    context = names('context/classes-59.txt')
    assert tuple(context[i] for i in range(60)) == recipes.CONTEXT
    text = (REAL / 'lists/context/classes-459.txt').read_text()
    masks.check_context_names(text)
    stuff, table = names('cocostuff10k/labels.txt'), masks.stuff_table()
    assert (table != 255).sum() == 171
    for label, number in enumerate(table):
        if number != 255:
            assert recipes.COCO_STUFF[number] == stuff[label]


@needs_real
def test_real_voc_and_sbd(tmp_path):
    make('voc', tmp_path, REAL / 'VOCdevkit', REAL / 'sbd')
    assert [len(read_list(tmp_path, s)) for s in ('train', 'val', 'trainaug')] == [
        311, 321, 313]
    for expected in (REAL / 'sbd/expected').iterdir():
        with Image.open(expected) as picture:
            made = read_mask(tmp_path / 'SegmentationClassAug' / expected.name)
            assert np.array_equal(made, np.asarray(picture))


@needs_real
def test_real_cityscapes_and_cocostuff(tmp_path):
    make('cityscapes', tmp_path / 'city', REAL / 'cityscapes')
    folder = dataset.Folder(str(tmp_path / 'city'), 'train',
                            dataset.DATASETS['cityscapes'])
    assert len(folder) == 4
    seen = set()
    for index in range(4):
        image, label = folder.read(index)
        assert image.shape == (1024, 2048, 3)
        seen |= set(np.unique(label).tolist())
    assert seen <= {*range(19), 255} and {0, 2, 8, 10, 13, 255} <= seen
    make('cocostuff164k', tmp_path / 'stuff', REAL / 'cocostuff164k')
    facts = dataset.DATASETS['cocostuff164k']
    folders = [dataset.Folder(str(tmp_path / 'stuff'), s, facts)
               for s in ('train', 'val')]
    assert [len(f) for f in folders] == [13, 8]
    labels = [f.read(i)[1] for f in folders for i in range(len(f))]
    seen = set(np.unique(np.concatenate([x.ravel() for x in labels])).tolist())
    assert seen <= {*range(171), 255} and len(seen) > 50


@needs_real
def test_real_coco(tmp_path):
    pytest.importorskip('pycocotools', reason='COCO needs pycocotools')
    make('coco_voc', tmp_path, REAL / 'coco')
    facts = dataset.DATASETS['coco_voc']
    areas = {}
    for split in ('train', 'val'):
        folder = dataset.Folder(str(tmp_path), split, facts)
        assert 20 < len(folder) <= 50
        for index in range(len(folder)):
            _, label = folder.read(index)
            assert ((label > 0) & (label < 255)).sum() >= 1000
            areas[folder.ids[index]] = label
    # a person's mask lies in its box
    data = json.loads((REAL / 'coco/annotations/instances_val2017.json').read_text())
    persons = {c['id'] for c in data['categories'] if c['name'] == 'person'}
    boxes, file = {}, {i['id']: i['file_name'][:-4] for i in data['images']}
    for item in data['annotations']:
        if item['category_id'] in persons:
            boxes.setdefault(file[item['image_id']], []).append(item['bbox'])
    n_seen = 0
    for name, found in boxes.items():
        if name in areas:
            is_inside = np.zeros(areas[name].shape, bool)
            for x, y, w, h in found:
                is_inside[int(y):int(y + h) + 2, int(x):int(x + w) + 2] = True
            is_person = areas[name] == recipes.VOC.index('person')
            assert not (is_person & ~is_inside).any()
            n_seen += is_person.sum()
    assert n_seen > 10000


@needs_real
def test_camvid_trains_and_evaluates(tmp_path):
    done = run_script('prepare.py', 'folder', '--images', REAL / 'camvid/images',
                      '--masks', REAL / 'camvid/masks', '--map', '11=255', '--root',
                      tmp_path / 'camvid')
    assert done.returncode == 0, done.stderr
    from conftest import TINY
    words = [*TINY, 'DATASET=folder', f'DATA_ROOT={tmp_path / "camvid"}', 'ITER_MAX=3',
             f'LOG_DIR={tmp_path / "log"}']
    done = run_script('train.py', *words, 'CROP_SIZE=129')
    assert done.returncode == 0, done.stderr
    assert '367 images of list train' in done.stdout
    lists = tmp_path / 'camvid/ImageSets/Segmentation'
    lines = (lists / 'val.txt').read_text().splitlines()
    assert len(lines) == 101
    (lists / 'few.txt').write_text('\n'.join(lines[::10]))
    done = run_script('eval.py', f'LOG_DIR={tmp_path / "log"}', 'VAL_SPLIT=few')
    assert done.returncode == 0, done.stderr
    assert '11 of 11 images of list few' in done.stdout and 'sign_symbol' in done.stdout
