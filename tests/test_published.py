"""The other published data sets from made-up archives, and all from real samples."""
import json

import numpy as np
import pytest
from made_up import (
    REAL,
    H,
    W,
    jpg,
    lines,
    mat,
    open_list,
    png,
    read_list,
    read_mask,
    run_prepare,
    values_of,
    write_files,
    write_tar,
    write_zip,
)
from PIL import Image

import recipes
from preparation import masks, published

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f'no real data in {REAL}')
# PASCAL Context's 459 labels call three of the 59 classes otherwise.
CONTEXT_NAMES = {'diningtable': 'table', 'clothes': 'cloth', 'bedcloth': 'bedclothes'}


def make(name, root, *archives):
    words = ['--archive', *archives] if archives else []
    run_prepare(name, '--root', root, *words)


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
    expected = np.array([[known.get(int(v), 256) - 1 for v in row]
                         for row in labels[ids[0]]])
    data = open_list('context59', root, 'train')
    assert np.array_equal(data.read_label(0), expected)


def test_cocostuff_from_mats_and_from_maps(tmp_path):
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
    write_files(tmp_path, lists)
    make('cocostuff10k', tmp_path / 'b', maps, images, tmp_path / 'imageLists')
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
    ids = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    expected = [[ids.index(v) if v in ids else 255 for v in row]
                for row in labels[names[0]].tolist()]
    data = open_list('cityscapes', root, 'train')
    assert np.array_equal(data.read_label(0), expected)
    assert not list((root / 'gtFine').rglob('*color*'))
    # a folder that is Cityscapes already, as its own root: lists only
    before = {p for p in root.rglob('*') if p.is_file()}
    for path in (root / 'ImageSets/Segmentation').iterdir():
        path.unlink()
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
            'annotations': [{'id': k, 'image_id': i, 'category_id': c, 'iscrowd': crowd,
                             'segmentation': s}
                            for k, (i, c, crowd, s) in enumerate(items)]}


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


# -- real data -------------------------------------------------------------------------

@needs_real
def test_the_rule_gives_the_official_trainaug():
    def ids(*names):
        return sum(((REAL / 'lists' / n).read_text().split() for n in names), [])
    found = published.join_trainaug(ids('voc2012/train.txt'), ids('voc2012/val.txt'),
                                    ids('sbd/train.txt', 'sbd/val.txt'))
    official = ids('voc2012/trainaug.txt')
    assert len(found) == len(set(found)) == 10582 and set(found) == set(official)
    for name, folder in (('voc', 'voc2012'), ('context', 'context'),
                         ('cocostuff10k', 'cocostuff10k')):
        for split, count in recipes.DATASETS[name]['counts'].items():
            if (REAL / 'lists' / folder / f'{split}.txt').exists():
                assert len(ids(f'{folder}/{split}.txt')) == count


@needs_real
def test_names_are_the_official_ones():
    def names(file):
        found = [line.partition(': ') for line in (REAL / 'lists' / file).read_text()
                 .splitlines()]
        return {int(number): name.strip() for number, _, name in found}
    context = names('context/classes-59.txt')
    assert tuple(context[i] for i in range(60)) == recipes.CONTEXT
    labels = names('context/classes-459.txt')
    for label, name in zip(masks.CONTEXT_IDS, recipes.CONTEXT[1:], strict=True):
        assert labels[label] == CONTEXT_NAMES.get(name, name)
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
    data = open_list('cityscapes', tmp_path / 'city', 'train')
    assert len(data) == 4
    seen = set()
    for index in range(2):
        image, label = data.read(index)
        assert image.shape == (1024, 2048, 3)
        seen |= set(np.unique(label).tolist())
    assert seen <= {*range(19), 255} and {0, 2, 8, 10, 13, 255} <= seen
    make('cocostuff164k', tmp_path / 'stuff', REAL / 'cocostuff164k')
    splits = [open_list('cocostuff164k', tmp_path / 'stuff', s)
              for s in ('train', 'val')]
    assert [len(data) for data in splits] == [13, 8]
    seen = {label for data in splits for i in range(len(data))
            for label in np.unique(data.read_label(i)).tolist()}
    assert seen <= {*range(171), 255} and len(seen) > 50


@needs_real
def test_real_coco(tmp_path):
    """Every image has enough pixels, and a person's mask lies in a person's box."""
    pytest.importorskip('pycocotools', reason='COCO needs pycocotools')
    make('coco_voc', tmp_path, REAL / 'coco')
    content = json.loads((REAL / 'coco/annotations/instances_val2017.json').read_text())
    persons = {c['id'] for c in content['categories'] if c['name'] == 'person'}
    names, boxes = {i['id']: i['file_name'][:-4] for i in content['images']}, {}
    for item in content['annotations']:
        if item['category_id'] in persons:
            boxes.setdefault(names[item['image_id']], []).append(item['bbox'])
    data, n_seen = open_list('coco_voc', tmp_path, 'val'), 0
    assert 20 < len(data) <= 50
    assert 20 < len(open_list('coco_voc', tmp_path, 'train')) <= 50
    for index, name in enumerate(data.ids):
        label = data.read_label(index)
        assert ((label > 0) & (label < 255)).sum() >= 1000
        is_inside = np.zeros(label.shape, bool)
        for x, y, w, h in boxes.get(name, ()):
            is_inside[int(y):int(y + h) + 2, int(x):int(x + w) + 2] = True
        is_person = label == recipes.VOC.index('person')
        assert not (is_person & ~is_inside).any()
        n_seen += is_person.sum()
    assert n_seen > 10000
