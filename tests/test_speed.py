"""What measure.py times: all implementations do the same work, and how it is summed up.
"""
import json
import sys

import pytest
import torch
from conftest import run_script

import config
import dataset
import measure
import settings
from measurement import cost, implementations, speed, tables, worker
from measurement.implementations import RELEASED, list_implementations

CPU = torch.device('cpu')
SMALL = dict(N_LAYERS=18, STEM='deep', STRIDE=8, HEAD_CHANNELS=16, FC1_CHANNELS=16,
             N_BASES=4, CROP_SIZE=33, DROPOUT=0.0, BN_MOM=0.1, PRECISION='fp32',
             LR=0.01, EVAL_SCALES=(0.5, 1.0, 1.5), RANKS=0)


@pytest.fixture(autouse=True)
def small(as_before):
    config.apply_settings(SMALL)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def all_of(part):
    """Arguments of all implementations of a part in fp32."""
    return {**list_implementations(part, False, False, 'fp32'),
            **list_implementations(part, True, False, 'fp32')}


# -- the implementations ---------------------------------------------------------------

def test_lists():
    settings.N_LAYERS = 50
    assert list(list_implementations('step', False, True, 'bf16')) == [
        RELEASED, 'torchvision', 'ours', 'ours compiled']
    options = list_implementations('step', True, False, 'bf16')
    assert list(options) == [RELEASED, '+ loss by rows', '+ channels last', '+ bf16',
                             '+ fused optimizer', 'ours']
    assert options['+ bf16'] == {'baseline': 'released', 'loss_by_rows': True,
                                 'channels_last': True, 'precision': 'bf16'}
    assert '+ fp32' not in list_implementations('evaluation', True, False, 'fp32')
    settings.EVAL_STRIDE = 16  # torchvision's is 8
    assert list(list_implementations('evaluation', False, False, 'bf16')) == [
        RELEASED, 'ours']


def test_all_steps_are_one_step(double):
    """The same losses over two steps: the same weights, batch, rates and update."""
    settings.STRIDE, settings.CROP_SIZE, found = 16, 17, {}
    for name, arguments in all_of('step').items():
        step = implementations.make_step(5, CPU, 2, **arguments)
        found[name] = torch.stack([step() for _ in range(2)])
    wanted = found[RELEASED]
    assert len(found) == 5 and wanted[1] < wanted[0] - 1e-3
    for name, losses in found.items():
        assert torch.allclose(losses, wanted, rtol=1e-6), name


@pytest.mark.parametrize('is_multi', [False, True])
def test_all_evaluations_are_one(is_multi):
    images, labels = implementations.make_images(2, (33, 41), 5)
    labels[1][:9] = 255
    found = {name: implementations.make_evaluation(5, CPU, images, labels, is_multi,
                                                   **arguments)()
             for name, arguments in all_of('evaluation').items()}
    wanted = found[RELEASED]
    assert wanted.sum() == 2 * 33 * 41 - 9 * 41 and (wanted.sum(0) > 0).sum() > 1
    for name, matrix in found.items():
        assert (matrix - wanted).abs().sum() <= 4, name  # a tie of two classes


def test_statistics_are_realistic():
    """Features of about unit variance, and no number that slows a CPU down."""
    settings.N_LAYERS, settings.HEAD_CHANNELS, settings.N_BASES = 50, 512, 64
    images, _ = implementations.make_images(2, (65, 81), 21)
    x, tiny = implementations.normalise(images), torch.finfo(torch.float32).tiny
    net = implementations.build('', 21, images, True)
    with torch.no_grad():
        feats = net.backbone(x)
        fc0 = net.head.fc0(feats[-1])
        zs = torch.stack(net.head.emau(fc0, return_z=True)[1])
    assert all(0.3 < f.std() < 3 for f in (*feats, fc0))
    assert not ((zs > 0) & (zs < tiny)).any() and zs.max() < 1
    net = implementations.build('torchvision', 21, images, True)
    with torch.no_grad():
        feats = net.net.backbone(x)['out']
        assert 0.3 < feats.std() < 3 and 0.3 < net.net.classifier[0](feats).std() < 3
        assert net(x).isfinite().all() and net(x).shape == (2, 21, 65, 81)


def test_loading(voc):
    settings.DATA_ROOT, settings.TRAIN_SPLIT = str(voc), 'train'
    data = dataset.open_split('train')
    for baseline in ('', 'released'):
        images, labels = implementations.make_loader(data, 4, baseline)()
        assert images.shape == (4, 3, 33, 33) and labels.shape == (4, 33, 33)
        assert set(labels.unique().tolist()) <= {0, 1, 2, 3, 255}
    assert len(implementations.make_loader(data, 4, 'decoding')()) == 4


# -- what is counted and summed up -----------------------------------------------------

@pytest.mark.parametrize('head', ['fcn', 'ema'])
def test_flops(head):
    """Backward is twice forward, but for the image's gradient and what has none."""
    settings.HEAD, n = head, 5 * 5
    n_classes = len(dataset.get_dataset_info()['classes'])
    forward = speed.count_image_flops('evaluation', '', 33)
    assert forward == 2 * sum(cost.count_operations(cost.build_on_meta(n_classes), 33))
    wanted = 3 * forward - 2 * 17 * 17 * 64 * 3 * 9
    if head == 'ema':  # conv1, the iterations and what conv2 sees have no gradient
        wanted -= 2 * n * (3 * 16 * 16 + 2 * 7 * 16 * 4)
    assert speed.count_image_flops('step', '') == wanted


def test_flops_of_torchvision():
    """513x513, by hand: the backbone of Table 1 with the plain stem, ASPP, 3x3."""
    config.apply_settings({'N_LAYERS': 101, 'STEM': 'plain', 'HEAD': 'deeplabv3',
                           'HEAD_CHANNELS': 512, 'FC1_CHANNELS': 256})
    found = speed.count_image_flops('evaluation', 'torchvision', 513) / 2e9
    backbone, head = cost.count_operations(cost.build_on_meta(21), 513)
    one_more = 65 * 65 * 256 * 256 * 9  # the 3x3 convolution after its projection
    assert found == pytest.approx((backbone + head + one_more) / 1e9, rel=0.001)


def test_summary_and_table():
    rows = speed.summarise({RELEASED: [4.0, 6.0, 4.0], 'torchvision': [3.0, 3.0, 3.0],
                            'ours': [2.0, 2.0, 1.0]}, 2)
    assert rows['ours']['ratios'][RELEASED] == [3.0, 2.0, 4.0]  # turns: 2, 3, 4
    rows['ours'] |= {'memory_GB': 1.5, 'tflops': 0.25, 'share_of_peak': 0.5}
    lines = tables.describe('step', rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    cells = [cell.strip() for cell in lines[4].strip('|').split('|')]
    assert cells == ['ours', '1 (1 .. 2)', '3 (2 .. 4)', '1.5 (1.5 .. 3)', '1.50 GB',
                     '0.25', '50%']


# -- the processes and the command -----------------------------------------------------

def test_a_worker():
    """Turns, a peak that holds the tensors of a step, and errors as they are."""
    values, arguments = config.snapshot(), {'baseline': 'released'}
    good, bad = (worker.Worker('step', arguments, {**values, 'STRIDE': stride}, 2, 33)
                 for stride in (8, 7))
    with pytest.raises(config.UserError, match='the output stride is'):
        bad.receive()
    with pytest.raises(config.UserError, match='perhaps for want of memory'):
        bad.receive()
    good.receive()
    assert good.ask('time_call', 2) > 0 and 0.1 < good.ask('peak_memory') < 3
    with pytest.raises(RuntimeError, match="no attribute 'dance'"):
        good.ask('dance')
    for process in (good, bad):
        process.close()


def test_baselines_flush_denormals_too():
    worker.Benchmark('product', {'precision': 'fp32'}, {}, 1, 8)
    assert (torch.full((9,), 1e-30) * 1e-10).eq(0).all()
    torch.set_flush_denormal(False)


@pytest.mark.parametrize('options, told', [
    (['speed', '--only', 'loader,stepp'], 'stepp is none of'),
    (['options', '--only', 'training', '--rounds', '0'], 'training is none of'),
    (['speed', 'DATA_ROOT=/nowhere'], '/nowhere')])
def test_errors_come_before_the_work(options, told, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['measure.py', options[0], *tiny, *options[1:]])
    with pytest.raises(config.UserError, match=told):
        measure.main()
    assert not (tmp_path / 'log').exists()


def test_speed(tiny, tmp_path):
    """The real command, which runs train.py."""
    done = run_script('measure.py', 'speed', '--only', 'training', '--rounds', 1, *tiny)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'log' / 'measure_speed.json').read_text())
    assert found['training']['hours'] > 0 and found['training']['startup_s'] > 0
    assert 0 <= found['training']['waiting'] < 1
    text = (tmp_path / 'log' / 'measure_speed.md').read_text()
    assert text.startswith('train.py: ') and text in done.stdout
    assert found['environment']['torch'] == torch.__version__


@pytest.mark.parametrize('what, parts, n', [('options', 'evaluation', 4),
                                            ('speed', 'loader,step', 2)])
def test_turns(what, parts, n, tiny, tmp_path, monkeypatch):
    """The command in this process, with short turns; the workers are real ones."""
    monkeypatch.setattr(speed, 'TURN_SECONDS', 0.01)
    monkeypatch.setattr(speed, 'CPU_PRODUCT', 512)
    monkeypatch.setattr(sys, 'argv', ['measure.py', what, '--only', parts, '--size',
                                      '33', '--rounds', '2', *tiny])
    measure.main()
    found = json.loads((tmp_path / 'log' / f'measure_{what}.json').read_text())
    if 'loader' in found:
        assert list(found.pop('loader')) == [RELEASED, 'decoding only', 'ours']
    rows = found[parts.split(',')[-1]]
    assert len(rows) == n and 'ours' in rows
    for row in rows.values():
        assert len(row['seconds']) == 2 and row['share_of_peak'] > 0
        assert row['memory_GB'] > 0.1
