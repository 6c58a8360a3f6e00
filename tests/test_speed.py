"""What measure.py times: that all manners do the same work, and how it is summed up."""
import json
import platform
import re
import subprocess
import sys

import pytest
import torch
from conftest import HERE, TINY, run_script

import dataset
import inference
import runtime
import settings
from measurement import cost, manners, sides, speed, tables
from measurement.manners import REFERENCE

CPU = torch.device('cpu')
SMALL = dict(N_LAYERS=18, STEM='deep', STRIDE=8, HEAD_CHANNELS=16, FC1_CHANNELS=16,
             N_BASES=4, CROP_SIZE=33, DROPOUT=0.0, BN_MOM=0.1, PRECISION='fp32',
             LR=0.01, EVAL_SCALES=(0.5, 1.0, 1.5), RANKS=0)


@pytest.fixture(autouse=True)
def small(as_before):
    for name, value in SMALL.items():
        setattr(settings, name, value)


# -- the manners -----------------------------------------------------------------------

def names_of(part):
    """The manners of fp32 on a CPU, but those that are compiled."""
    found = {name for is_options in (False, True)
             for name in manners.list_manners(part, is_options, 'fp32')}
    return sorted(name for name in found if 'torchvision' not in name
                  and 'compiled' not in name)


def test_the_lists():
    settings.N_LAYERS = 50
    assert manners.list_manners('step', False, 'bf16') == [
        REFERENCE, 'torchvision bf16', 'torchvision fp32', 'ours bf16', 'ours fp32']
    assert manners.list_manners('step', False, 'fp32') == [
        REFERENCE, 'torchvision fp32', 'ours fp32']
    assert manners.list_manners('step', True, 'bf16') == [
        REFERENCE, '+ loss by rows', '+ channels last', '+ bf16', '+ fused optimizer',
        manners.KEPT, 'ours bf16', 'ours bf16 compiled']
    assert '+ fp32' not in manners.list_manners('evaluation', True, 'fp32')
    on_cpu, on_gpu = (manners.list_manners('evaluation', True, 'bf16', is_cpu)
                      for is_cpu in (True, False))
    assert [name for name in on_cpu if name not in on_gpu] == [manners.FEWER,
                                                               manners.KEPT]
    def by_fewer_products(precision):
        names = (name for is_options in (True, False) for name in
                 manners.list_manners('evaluation', is_options, precision))
        options = manners.options_until(manners.KEPT, 'evaluation', precision)
        return options.get('has_winograd', False), [
            name for name in dict.fromkeys(names)
            if manners.has_winograd(name, 'evaluation', precision)]
    assert by_fewer_products('bf16') == (True, [
        manners.FEWER, manners.KEPT, 'ours bf16', 'ours bf16 compiled', 'ours fp32'])
    assert by_fewer_products('fp16') == (False, ['ours fp32'])
    settings.WINOGRAD = False
    assert by_fewer_products('bf16') == (False, [])
    assert manners.FEWER not in manners.list_manners('evaluation', True, 'bf16')
    assert manners.list_manners('multi', False, 'bf16') == [REFERENCE, 'ours bf16']
    settings.N_LAYERS = 34  # torchvision has no DeepLabV3 of it
    assert manners.list_manners('step', False, 'fp32') == [REFERENCE, 'ours fp32']


def test_options_add_up():
    def options(name):
        return manners.options_until(name, 'step', 'bf16')
    assert options(REFERENCE) == {}
    assert options('+ channels last') == {'by_rows': True, 'channels_last': True}
    assert options(manners.KEPT) == {'by_rows': True, 'channels_last': True,
                                     'precision': 'bf16', 'is_fused': True}
    for name, wanted in ((REFERENCE, 'fp32'), ('+ channels last', 'fp32'),
                         ('+ bf16', 'bf16'), (manners.KEPT, 'bf16'),
                         ('ours fp16 compiled', 'fp16'), ('torchvision fp32', 'fp32')):
        assert manners.precision_of(name, 'step', 'bf16') == wanted, name


def test_all_steps_are_one_step():
    """The same losses over three steps: the same weights, batch, rates and update."""
    found = {}
    for name in names_of('step'):
        step = manners.make_step(name, 5, CPU, 2)
        found[name] = torch.stack([step() for _ in range(3)])
    assert len(found) == 6
    wanted = found[REFERENCE]
    assert wanted[2] < wanted[0] - 0.01
    for name, losses in found.items():
        assert torch.allclose(losses, wanted, rtol=1e-4), name


@pytest.mark.parametrize('part', ['evaluation', 'multi'])
def test_all_evaluations_are_one(part):
    images, labels = manners.make_pictures(3, (49, 57), 5)
    labels[1][:9] = 255
    found = {name: manners.make_evaluation(name, part, 5, CPU, images, labels)()
             for name in names_of(part)}
    wanted = found[REFERENCE]
    assert wanted.sum() == 3 * 49 * 57 - 9 * 57 and (wanted.sum(0) > 0).sum() > 1
    for name, matrix in found.items():
        assert (matrix - wanted).abs().sum() <= 4, name  # a tie of two classes


def test_torchvision_learns_and_predicts():
    settings.N_LAYERS = 50
    step = manners.make_step('torchvision fp32', 5, CPU, 2)
    losses = [step().item() for _ in range(2)]
    assert losses[1] < losses[0]
    images, labels = manners.make_pictures(1, (33, 41), 5)
    run = manners.make_evaluation('torchvision fp32', 'evaluation', 5, CPU, images,
                                  labels)
    assert run().sum() == 33 * 41
    n = sum(p.numel() for p in manners.build_torchvision(21).parameters())
    assert round(n / 1e6, 1) == 39.6  # as torchvision's documentation says: 42.0 with
    # its auxiliary head, which is 2.36 M


def test_loading(voc):
    settings.DATA_ROOT, settings.TRAIN_SPLIT = str(voc), 'train'
    folder = dataset.open_split('train')
    for name in ('ours', REFERENCE, '+ crop before resizing'):
        load = manners.make_loading(name, folder, 4)
        for images, labels in (load(), load()):
            assert images.shape == (4, 3, 33, 33) and labels.shape == (4, 33, 33)
            assert set(labels.unique().tolist()) <= {0, 1, 2, 3, 255}
    read = manners.make_loading('decoding alone', folder, 4)()
    assert len(read) == 4 and read[0][0].shape[2] == 3


# -- what is counted -------------------------------------------------------------------

@pytest.mark.parametrize('head', ['fcn', 'ema'])
def test_flops(head):
    """Backward is twice forward, but for the image's gradient and what has none."""
    settings.HEAD = head
    size, n = (33, 33), 5 * 5
    forward = speed.count_flops(False, 5, size, False)
    net = speed.network.build(5, is_eval=True)
    assert forward == 2 * sum(cost.count_operations(net, 33))
    wanted = 3 * forward - 2 * 17 * 17 * 64 * 3 * 9
    if head == 'ema':  # conv1, the iterations and what conv2 sees have no gradient
        wanted -= 2 * n * (3 * 16 * 16 + 2 * 7 * 16 * 4)
    assert speed.count_flops(False, 5, size, True) == wanted


def test_flops_of_fewer_products():
    """By hand: 25 products for each pair of channels and patch instead of 81, and the
    two transforms."""
    settings.HEAD_CHANNELS = settings.FC1_CHANNELS = 256
    settings.N_LAYERS, settings.STEM, settings.STRIDE = 18, 'plain', 16
    size = (81, 81)  # 6x6 features: the number of patches by dilation is
    patches = {1: 2 * 2, 2: 4 * 1, 4: 16 * 1}
    plain, fewer = (speed.count_flops(False, 5, size, False, has)
                    for has in (False, True))
    saved = 0
    net = speed.network.build(5, is_eval=True)
    for conv in net.modules():
        if isinstance(conv, torch.nn.Conv2d
                      ) and inference.WinogradConv2d.pays_for(conv):
            c, o, n = conv.in_channels, conv.out_channels, patches[conv.dilation[0]]
            saved += 2 * (9 * c * o * 36 - n * (25 * c * o + 25 * 25 * c + 9 * 25 * o))
    assert saved > 0 and plain - fewer == saved


def test_flops_of_torchvision():
    """513x513, by hand: the backbone of Table 1 with the plain stem, ASPP, 3x3."""
    settings.N_LAYERS = 101
    found = speed.count_flops(True, 21, (513, 513), False) / 2e9
    settings.STEM, settings.HEAD = 'plain', 'deeplabv3'
    settings.HEAD_CHANNELS, settings.FC1_CHANNELS = 512, 256
    net = speed.network.build(21, is_eval=True)
    backbone, head = cost.count_operations(net, 513)
    one_more = 65 * 65 * 256 * 256 * 9  # the 3x3 convolution after its projection
    assert found == pytest.approx((backbone + head + one_more) / 1e9, rel=0.001)


def test_summary():
    seconds = {REFERENCE: [4.0, 6.0, 4.0], 'ours bf16': [2.0, 2.0, 1.0],
               'ours fp32': [4.0, 3.0, 4.0], 'product bf16': [0.5, 0.25, 0.25],
               'convolution bf16': [1.0, 1.0, 1.0], 'product fp32': [2.0, 2.0, 2.0]}
    flops = 2 * sides.PRODUCT ** 3
    found = speed.summarise(seconds, 2, {'ours bf16': flops / 4, REFERENCE: flops},
                            {'ours bf16': 'bf16', REFERENCE: 'fp32'})
    assert set(found) == {REFERENCE, 'ours bf16', 'ours fp32'}
    row = found['ours bf16']
    assert row['images_per_s'] == 1.0 and row['range'] == [1.0, 2.0]
    assert row['ratios'][REFERENCE] == [3.0, 2.0, 4.0]  # turn by turn: 2, 3, 4
    assert row['tflops'] == flops / 4e12
    assert row['share_of_peak'] == pytest.approx(1 / 16)
    assert found[REFERENCE]['share_of_peak'] == pytest.approx(1.0)
    assert 'tflops' not in found['ours fp32']


def test_tables():
    found = {REFERENCE: {'images_per_s': 0.5, 'range': [0.4, 0.6], 'ratios': {},
                         'GB': {'tensors': 4.0, 'process': 5.0}},
             'torchvision bf16': {'images_per_s': 0.8, 'range': [0.8, 0.8],
                                  'ratios': {REFERENCE: [1.6, 1.5, 1.7]}},
             'ours bf16': {'images_per_s': 1234.5, 'range': [1.0, 2.0],
                           'ratios': {REFERENCE: [2.0, 1.5, 2.5],
                                      'torchvision bf16': [1.25, 1.0, 1.5]},
                           'GB': {'tensors': 1.0, 'process': 2.5},
                           'tflops': 0.25, 'share_of_peak': 0.5}}
    lines = tables.describe('step', found).splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert len({len(line) for line in lines}) == 1
    assert cells[0] == ['step', 'images/s (range)', 'x reference (range)',
                        'x torchvision (range)', 'memory: tensors', 'process',
                        'TFLOP/s', 'of peak']
    assert cells[2] == [REFERENCE, '0.5 (0.4 .. 0.6)', '', '', '4.00 GB', '5.00 GB', '',
                        '']
    assert cells[3][:4] == ['torchvision bf16', '0.8 (0.8 .. 0.8)',
                            '1.60 (1.50 .. 1.70)', '']
    assert cells[4] == ['ours bf16', '1234 (1 .. 2)', '2.00 (1.50 .. 2.50)',
                        '1.25 (1.00 .. 1.50)', '1.00 GB (0.25)', '2.50 GB (0.50)',
                        '0.250', '50%']
    kinds = [{'kind': f'op{i}', 'ms': 12.0 - i, 'calls': i, 'share': (12 - i) / 78}
             for i in range(12)]
    text = tables.describe_profile('step', {'ms': 78.0, 'kinds': kinds})
    assert len(text.splitlines()) == 13 and '3.8% |  3.00' in text  # ten, and the rest


# -- memory ----------------------------------------------------------------------------

FAULTS = '''
import resource, sys, torch
import runtime
if sys.argv[1] == 'kept':
    runtime.keep_freed_memory()
for i in range(32):
    if i == 16:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12_000_000)  # 48 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
'''


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc' or tuple(
    map(int, platform.libc_ver()[1].split('.'))) < (2, 35), reason='an old or no glibc')
def test_freed_memory_is_kept():
    """Pages that are got from the system again: 11,719 a tensor, or none."""
    found = [int(subprocess.run([sys.executable, '-c', FAULTS, how], cwd=HERE,
                                capture_output=True, check=True).stdout)
             for how in ('given back', 'kept')]
    assert found[1] < 0.25 * found[0], found  # a hole may be filled now and then


def test_memory_of_a_side():
    """A side's process: turns, and a peak that knows the tensors of a step."""
    values = {k: v for k, v in runtime.snapshot().items() if k != 'RECIPE'}
    side = sides.Side('step', 'ours fp32', values, 2)
    try:
        side.ask('build')
        side.warm_up()
        assert side.ask('call', 2) > 0
        found = side.ask('peak_memory')
    finally:
        side.close()
    assert not side.process.is_alive()
    n = sum(p.numel() for p in speed.network.build(21).parameters())
    assert found['tensors'] * 1e9 > 3 * 4 * n  # weights, momentum and gradients
    assert 0.1 < found['process'] < 3


def test_turns():
    assert [sides.how_often(s) for s in (7.0, 0.5, 0.34, 0.1, 1e-9)] == [1, 1, 2, 5,
                                                                         1000]


def test_errors_of_a_side():
    """A sentence where the user can cause it, a traceback where not, an end seen."""
    values = {k: v for k, v in runtime.snapshot().items() if k != 'RECIPE'}
    side = sides.Side('step', 'ours fp32', {**values, 'STRIDE': 7}, 2)
    with pytest.raises(ValueError, match='ours fp32: the output stride is 8 or 16'):
        side.ask('build')
    with pytest.raises(RuntimeError, match="KeyError: 'dance'"):
        side.ask('dance')
    side.process.terminate()
    with pytest.raises(ValueError, match='was ended, perhaps for want of memory'):
        side.ask('call', 1)
    side.close()


# -- the command -----------------------------------------------------------------------

def read(path):
    return json.loads(path.read_text())


def test_errors_come_before_the_work(voc, tmp_path):
    words = [f'DATA_ROOT={voc}', 'TRAIN_SPLIT=train', f'LOG_DIR={tmp_path / "log"}']
    for options, told in ((['speed', '--only', 'loader,stepp'], 'stepp is none of'),
                          (['options', '--only', 'training'], 'training is none of'),
                          (['speed', '--rounds', '0'], 'at least 1'),
                          (['speed', 'DATA_ROOT=/nowhere'], 'no data in /nowhere')):
        done = run_script('measure.py', options[0], *words, *options[1:])
        assert done.returncode == 2 and told in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / 'log').exists()


def test_the_loader_is_measured(tiny, tmp_path):
    done = run_script('measure.py', 'options', '--only', 'loader', '--rounds', 2, *tiny)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / 'log' / 'measure_options.json')
    assert list(found['loader']) == [REFERENCE, '+ crop before resizing', 'ours',
                                     'decoding alone']
    assert all(len(row['seconds']) == 2 for row in found['loader'].values())
    text = (tmp_path / 'log' / 'measure_options.md').read_text()
    assert text.strip() in done.stdout and 'decoding alone' in text
    assert found['environment']['torch'] == torch.__version__


@pytest.mark.slow
def test_speed(tiny, tmp_path):
    """All parts and the profile, of a network that is small."""
    words = [*tiny, 'N_LAYERS=50', 'EVAL_SCALES=0.5,1.0']
    done = run_script('measure.py', 'speed', '--rounds', 2, '--profile', *words,
                      timeout=900)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / 'log' / 'measure_speed.json')
    assert set(found) == {*speed.PARTS, 'profile_step', 'profile_evaluation',
                          'environment', 'settings'}
    assert found['startup']['help_s'] < found['startup']['first_step_s']
    assert found['training']['hours'] > 0 and 0 <= found['training']['waiting'] < 1
    for part in ('step', 'evaluation', 'multi'):
        for row in found[part].values():
            assert row['share_of_peak'] > 0 and row['GB']['tensors'] > 0
    for part in ('step', 'evaluation'):
        kinds = [kind['kind'] for kind in found[f'profile_{part}']['kinds'][:10]]
        assert any('convolution' in kind for kind in kinds), kinds
        trace = tmp_path / 'log' / f'measure_trace_{part}.json'
        assert read(trace)['traceEvents']
    assert re.search(r'train.py begins its first step [\d.]+ s after', done.stdout)


@pytest.mark.slow
def test_options(tiny, tmp_path):
    done = run_script('measure.py', 'options', '--rounds', 1, *tiny,
                      'EVAL_SCALES=0.5,1.0', timeout=900)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / 'log' / 'measure_options.json')
    assert set(found) == {*speed.OPTION_PARTS, 'environment', 'settings'}
    assert 'ours fp32 compiled' in found['step']


def test_a_training_that_fails_is_told(voc):
    for word in TINY:
        name, _, text = word.partition('=')
        setattr(settings, name, runtime.parse_value(name, text,
                                                    getattr(settings, name)))
    settings.DATA_ROOT, settings.TRAIN_SPLIT, settings.STRIDE = str(voc), 'train', 7
    with pytest.raises(ValueError, match='while it was measured: the output stride is'):
        speed.run_training(1, 2, 1)
