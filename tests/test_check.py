"""The check of a data set: sound data, planted faults, lists that are missing."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_voc
from PIL import Image

import dataset
import recipes
import settings
from config import UserError
from preparation import check

REAL = Path(__file__).parents[2] / 'shared' / 'data' / 'VOCdevkit' / 'VOC2012'


def use(monkeypatch, root, **values):
    for name, value in {'DATASET': 'voc', 'TRAIN_SPLIT': 'train', **values}.items():
        monkeypatch.setattr(settings, name, value)
    monkeypatch.setattr(settings, 'DATA_ROOT', str(root))


def run(tmp_path, n_pictures=2):
    """Return what check() answers, and its report."""
    is_sound = check.check(str(tmp_path / 'out'), n_pictures)
    file = tmp_path / 'out' / f'check_{settings.DATASET}.json'
    report = json.loads(file.read_text())
    assert report['is_sound'] == is_sound
    return is_sound, report


def found(report, of):
    return {(finding['kind'], Path(finding['file']).name) for finding in report[of]}


def read_mask(voc, name):
    return np.asarray(Image.open(voc / f'SegmentationClass/{name}.png'))


def write_list(voc, name, *entries):
    file = voc / 'ImageSets' / 'Segmentation' / f'{name}.txt'
    file.write_text('\n'.join(entries) + '\n')


def files_of(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob('*')}


def test_sound_data(monkeypatch, voc, tmp_path, capsys):
    use(monkeypatch, voc)
    before = files_of(voc)
    is_sound, report = run(tmp_path, 3)
    assert is_sound and not report['faults']
    assert found(report, 'warnings') == {('class not trained', 'train.txt')}
    assert files_of(voc) == before
    assert list(report['splits']) == ['train', 'val']
    assert report['n_pictures'] == 9

    # The same numbers, counted one by one.
    for split, ids in (('train', range(6)), ('val', range(6, 9))):
        of = report['splits'][split]
        masks = [read_mask(voc, f'pic_{i}') for i in ids]
        values = np.concatenate([mask.ravel() for mask in masks])
        n_valid = int((values != 255).sum())
        for label in range(21):
            n = int((values == label).sum())
            assert of['pixels'][label] == n
            assert of['share'][label] == pytest.approx(n / n_valid)
            assert of['images'][label] == sum(label in np.unique(m) for m in masks)
        assert of['void_share'] == pytest.approx((values == 255).mean())
        assert of['n_pictures'] == len(masks) and of['found'] == {}
        assert of['image_modes'] == {'RGB': len(masks)}
        assert of['mask_modes'] == {'P': len(masks)}
        heights = sorted(mask.shape[0] for mask in masks)
        assert of['height'] == [heights[0], np.median(heights), heights[-1]]

    pixels = np.array(report['splits']['train']['pixels'])
    middle = np.median(pixels[pixels > 0])
    assert report['class_weights'] == pytest.approx(
        [middle / n if n else 1.0 for n in pixels])
    text = capsys.readouterr().out
    word = next(line for line in text.splitlines() if line.startswith('CLASS_WEIGHTS='))
    assert len(word.split(',')) == 21
    sheet = Image.open(tmp_path / 'out' / 'check_voc.png')
    assert sheet.width > 4 * 300 and 2 * 250 < sheet.height < 2 * 500
    assert np.asarray(sheet).std() > 20
    assert 'check_voc.json' in text and 'check_voc.png' in text
    assert 'nothing stops training' in text.splitlines()[-1]


def test_the_sheet_is_drawn_from_the_seed(monkeypatch, voc, tmp_path):
    use(monkeypatch, voc)
    sheet = tmp_path / 'out' / 'check_voc.png'
    drawn = []
    for seed in (0, 0, 7):
        monkeypatch.setattr(settings, 'SEED', seed)
        run(tmp_path)
        drawn.append(sheet.read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
    sheet.unlink()
    run(tmp_path, 0)
    assert not sheet.exists()


def image_of(voc, i):
    return voc / 'JPEGImages' / f'pic_{i}.jpg'


def mask_of(voc, i):
    return voc / 'SegmentationClass' / f'pic_{i}.png'


def plant(voc):
    """Plant a fault or a warning in each picture; return what is to be found."""
    image_of(voc, 0).unlink()
    mask_of(voc, 1).unlink()
    data = image_of(voc, 2).read_bytes()
    image_of(voc, 2).write_bytes(data[:-len(data) // 3])
    data = mask_of(voc, 3).read_bytes()
    mask_of(voc, 3).write_bytes(data[:-60])
    image_of(voc, 4).write_bytes(b'')
    image_of(voc, 5).write_text('version https://git-lfs.github.com/spec/v1\n')
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(mask_of(voc, 6))
    Image.open(mask_of(voc, 7)).convert('RGB').save(mask_of(voc, 7))
    label = np.array(Image.open(mask_of(voc, 8)))
    label[20, 30:33], label[21, 30] = 77, 21
    Image.fromarray(label).save(mask_of(voc, 8))
    Image.fromarray(np.full_like(read_mask(voc, 'pic_9'), 255)).save(mask_of(voc, 9))
    turned, exif = Image.open(image_of(voc, 10)), Image.Exif()
    exif[0x0112] = 6
    turned.save(image_of(voc, 10), exif=exif)
    shutil.copy(image_of(voc, 10), image_of(voc, 15))
    shutil.copy(mask_of(voc, 10), mask_of(voc, 15))
    ids = [f'pic_{i}' for i in range(18)]
    write_list(voc, 'train', *ids[:12], ids[11])
    write_list(voc, 'val', *ids[12:], ids[1])
    return ({('image', f'pic_{i}.jpg') for i in (0, 2, 4, 5)}
            | {('mask', f'pic_{i}.png') for i in (1, 3, 7, 8)}
            | {('size mismatch', 'pic_6.png')},
            {('only void', 'pic_9.png'), ('turned picture', 'pic_10.jpg'),
             ('turned picture', 'pic_15.jpg'), ('entry twice', 'pic_11.jpg'),
             ('LEAK of a copy', 'pic_15.jpg'), ('LEAK', 'pic_1.jpg'),
             ('class not trained', 'train.txt')})


def test_every_planted_fault_is_named(monkeypatch, tmp_path, capsys):
    """What is a fault here is an error of the loader, and nothing else is."""
    voc = write_voc(tmp_path / 'VOC2012', 12, 6)
    faults, warnings = plant(voc)
    use(monkeypatch, voc)
    is_sound, report = run(tmp_path)
    assert not is_sound
    assert found(report, 'faults') == faults and len(faults) == 9
    assert found(report, 'warnings') == warnings
    lines = capsys.readouterr().out.splitlines()
    for word, findings in (('FAULT', faults), ('WARNING', warnings)):
        for kind, file in findings:
            assert [line for line in lines if line.startswith(f'{word} {kind}: ')
                    and file in line], (kind, file)
    texts = {Path(f['file']).name: f['text'] for f in report['faults']}
    assert 'value 21 at 1 pixels' in texts['pic_8.png']
    assert 'labels are 0 to 20, or 255' in texts['pic_8.png']
    assert 'RGB' in texts['pic_7.png']
    assert 'is 8x9' in texts['pic_6.png'] and '46x46' in texts['pic_6.png']
    copies = [f for f in report['warnings'] if f['kind'] == 'LEAK of a copy']
    assert 'pic_10.jpg' in copies[0]['text']
    assert 'faults: 9;' in lines[-1]
    assert report['splits']['train']['found']['mask'] == 4

    raised = set()
    for split in ('train', 'val'):
        data = dataset.open_split(split, is_complete=False)
        for i, name in enumerate(data.ids):
            try:
                data.read(i)
            except UserError:
                raised.add(name)
    assert {Path(finding['file']).stem for finding in report['faults']} == raised


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('text', [None, '\n'])
def test_a_list_that_training_needs(split, text, monkeypatch, voc, tmp_path):
    file = voc / 'ImageSets' / 'Segmentation' / f'{split}.txt'
    file.unlink()
    if text:
        file.write_text(text)
    use(monkeypatch, voc)
    is_sound, report = run(tmp_path)
    assert not is_sound and found(report, 'faults') == {('list', f'{split}.txt')}
    assert len(report['splits']) == 1


def test_a_list_without_masks(monkeypatch, voc, tmp_path):
    write_list(voc, 'test', 'pic_20', 'pic_21')
    shutil.copy(image_of(voc, 0), image_of(voc, 20))
    use(monkeypatch, voc, VAL_SPLIT='test')
    is_sound, report = run(tmp_path)
    assert not is_sound and found(report, 'faults') == {
        ('mask', 'pic_20.png'), ('mask', 'pic_21.png'), ('image', 'pic_21.jpg')}


def test_many_of_a_kind(monkeypatch, tmp_path, capsys):
    voc = write_voc(tmp_path / 'VOC2012', 14, 3)
    for i in range(14):
        image_of(voc, i).unlink()
    use(monkeypatch, voc)
    is_sound, report = run(tmp_path)
    assert not is_sound and len(report['faults']) == 14
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.startswith('FAULT image: ')]
    assert len(shown) == 11 and '14 in all' in shown[-1]


def test_the_map_of_values(monkeypatch, voc, tmp_path):
    """A user's data with raw values of their own, and two columns in the lists."""
    (voc / 'images').mkdir()
    (voc / 'masks').mkdir()
    rows = []
    for i in range(9):
        label = np.array(Image.open(mask_of(voc, i)))
        label[label < 255] *= 10  # 0, 10, 20, 30
        Image.fromarray(label).save(voc / 'masks' / f'{i}_truth.png')
        shutil.copy(image_of(voc, i), voc / 'images' / f'{i}.jpg')
        rows.append(f'{i}.jpg\t{i}_truth.png')
    write_list(voc, 'train', *rows[:6])
    write_list(voc, 'val', *rows[6:])
    info = {'images': 'images/{}', 'masks': ['masks/{}'], 'classes': ['a', 'b'],
             'map': {'0': 0, '10': 0, '20': 1, '30': 255}}
    (voc / 'dataset.json').write_text(json.dumps(info))
    use(monkeypatch, voc, DATASET='folder')
    is_sound, report = run(tmp_path)
    assert is_sound and not report['warnings']
    masks = [np.asarray(Image.open(voc / 'masks' / f'{i}_truth.png')) for i in range(6)]
    values = np.concatenate([mask.ravel() for mask in masks])
    assert report['splits']['train']['pixels'] == [
        int((values == 0).sum() + (values == 10).sum()), int((values == 20).sum())]
    assert report['splits']['train']['void_share'] == pytest.approx(
        ((values == 30) | (values == 255)).mean())

    info['map'] = {'0': 0, '10': 0, '30': 255}  # 20 means nothing now
    (voc / 'dataset.json').write_text(json.dumps(info))
    is_sound, report = run(tmp_path)
    assert not is_sound and {f['kind'] for f in report['faults']} == {'mask'}
    assert 'has the value 20' in report['faults'][0]['text']


def test_no_data_and_nowhere_to_write(monkeypatch, voc, tmp_path):
    use(monkeypatch, tmp_path / 'nowhere')
    with pytest.raises(UserError, match='there is no data in'):
        check.check(str(tmp_path / 'out'))
    use(monkeypatch, voc)
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write into'):
        check.check(str(tmp_path / 'file' / 'out'))


@pytest.mark.skipif(not REAL.exists(), reason='the VOC sample is not beside this copy')
def test_real_voc_is_sound(monkeypatch, tmp_path):
    use(monkeypatch, REAL)
    is_sound, report = run(tmp_path, 12)
    assert is_sound and not report['warnings']
    assert report['n_pictures'] == 632
    assert report['splits']['train']['n_pictures'] == 311
    assert report['splits']['val']['n_pictures'] == 321
    assert report['classes'] == list(recipes.VOC)
    assert Image.open(tmp_path / 'out' / 'check_voc.png').height > 1000
