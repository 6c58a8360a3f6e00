"""Checkpoints: whole or refused, nothing executed, the released format read."""
import os
import pickle
import re
import zipfile

import pytest
import torch

import checkpoint
import network
import runtime
import settings


def make(step=7):
    return {'net': {'w': torch.arange(1000.) + step}, 'step': step,
            'settings': {'LR': 0.1, 'SCALES': (0.5, 1.0)}, 'run': {'best': 0.5},
            'optimizer': {'state': {0: {'momentum_buffer': torch.ones(3)}}},
            'scaler': {}}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    return a == b and type(a) is type(b)


# -- writing ---------------------------------------------------------------------------

def test_round_trip(tmp_path):
    path = tmp_path / 'latest.pth'
    for content in (make(), make(8)):  # the second over the first
        checkpoint.save(content, path)
        # what it does not record was as it was before there was a setting for it
        content['settings'] = {**checkpoint.BEFORE, **content['settings']}
        assert same(checkpoint.load(str(path)), content)
    assert os.listdir(tmp_path) == ['latest.pth']


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'),
                                   RuntimeError('[enforce fail at inline_container]')])
def test_a_failing_write_leaves_the_old_file(error, tmp_path, monkeypatch):
    path = tmp_path / 'latest.pth'
    checkpoint.save(make(), path)
    before = path.read_bytes()

    def fail(content, file):
        file.write(before[:len(before) // 2])
        raise error

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError) as caught:
        checkpoint.save(make(8), path)
    for part in (str(path), str(error), 'the last checkpoint is as it was'):
        assert part in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['latest.pth']


def test_the_new_file_takes_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda f: (order.append('fsync'), fsync(f)))
    monkeypatch.setattr(os, 'replace',
                        lambda *names: (order.append('replace'), replace(*names)))
    checkpoint.save(make(), tmp_path / 'a.pth')
    assert order[:2] == ['fsync', 'replace']


def test_no_folder_is_a_sentence(tmp_path):
    with pytest.raises(OSError, match='could not write .*nowhere'):
        checkpoint.save(make(), tmp_path / 'nowhere' / 'a.pth')


@pytest.mark.parametrize('keep, left', [(2, {3, 20, 100}), (1, {3, 100}),
                                        (9, {3, 5, 20, 100}), (0, {3}), (-1, {3})])
def test_remove_old(keep, left, tmp_path):
    for n in (5, 100, 20):
        (tmp_path / f'step_{n}.pth').touch()
    others = {'latest.pth', 'final.pth', 'step_best.pth', 'step_3.pth.tmp'}
    for name in others:
        (tmp_path / name).touch()
    checkpoint.remove_old(tmp_path, keep)
    assert set(os.listdir(tmp_path)) == others | {f'step_{n}.pth' for n in left - {3}}


# -- reading ---------------------------------------------------------------------------

def refuse(path, message, kind=ValueError):
    with pytest.raises(kind, match=message) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)
    return str(caught.value)


def test_a_missing_file(tmp_path):
    refuse(tmp_path / 'no.pth', 'there is no checkpoint', FileNotFoundError)
    refuse(tmp_path, 'there is no checkpoint', FileNotFoundError)


@pytest.mark.parametrize('share', [0, 0.01, 0.5, 0.99, 0.9999])
def test_an_empty_or_truncated_file(share, tmp_path):
    path = tmp_path / 'a.pth'
    checkpoint.save(make(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * share)])
    refuse(path, rf'is damaged or no checkpoint \({int(len(whole) * share)} bytes')


def test_a_flipped_bit(tmp_path):
    path = tmp_path / 'a.pth'
    checkpoint.save(make(), path)
    data = bytearray(path.read_bytes())
    tensor = make()['net']['w'].numpy().tobytes()
    place = data.find(tensor)
    assert place > 0
    data[place + len(tensor) // 2] ^= 4
    path.write_bytes(data)
    assert zipfile.is_zipfile(path)
    found = torch.load(path, weights_only=True)['net']['w']  # torch does not notice
    assert (found != make()['net']['w']).sum() == 1
    refuse(path, 'is damaged')


@pytest.mark.parametrize('text', [
    '<html>not found</html>', 'hello world\n', 'version 1\n', '(1, 2)', '\x80\x02',
    'PK\x03\x04 and so on'])
def test_a_text_file(text, tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(text.encode('latin1'))
    refuse(path, 'is damaged or no checkpoint|holds more than tensors')


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f'touch {self.trace}',)


@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
@pytest.mark.parametrize('where', ['net', 'run'])
def test_code_in_a_file_is_not_run(form, where, tmp_path):
    path, trace = tmp_path / 'evil.pth', tmp_path / 'trace'
    content = {**make(), where: {'w': Evil(trace)}}
    if form == 'pickle':
        path.write_bytes(pickle.dumps({where: Evil(trace)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    refuse(path, 'could run code|is damaged')
    assert not trace.exists()
    if form == 'pickle':  # it is a file that would have
        pickle.loads(path.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize('content, found', [
    ({'state_dict': {}, 'meta': 1}, 'state_dict, meta'), ([1, 2], 'list'),
    ({'net': [1]}, 'net'), (torch.zeros(2), 'Tensor'), ({}, '.*empty.*')])
def test_what_is_no_checkpoint(content, found, tmp_path):
    torch.save(content, tmp_path / 'a.pth')
    message = refuse(tmp_path / 'a.pth', 'is no EMANet checkpoint')
    assert re.search(f'found {found}$', message)


def test_absent_parts_are_empty(tmp_path):
    torch.save({'net': {'w': torch.ones(1)}}, tmp_path / 'a.pth')
    content = checkpoint.load(tmp_path / 'a.pth')
    assert (content['step'], content['settings'], content['run']) == (0, {}, {})
    assert 'optimizer' not in content


# -- the newest sound one --------------------------------------------------------------

def test_load_newest(tmp_path):
    assert checkpoint.load_newest(tmp_path) == (None, None, [])
    assert checkpoint.load_newest(tmp_path / 'nowhere') == (None, None, [])
    for step in (9, 10):
        checkpoint.save(make(step), tmp_path / f'step_{step}.pth')
    checkpoint.save(make(99), tmp_path / 'final.pth')  # nothing to go on from
    content, path, warnings = checkpoint.load_newest(tmp_path)
    assert content['step'] == 10 and path.name == 'step_10.pth' and not warnings
    checkpoint.save(make(11), tmp_path / 'latest.pth')
    content, path, warnings = checkpoint.load_newest(tmp_path)
    assert content['step'] == 11 and path.name == 'latest.pth' and not warnings


def test_load_newest_falls_back_and_says_so(tmp_path):
    for step in (80, 90, 100):
        checkpoint.save(make(step), tmp_path / f'step_{step}.pth')
    for name in ('latest.pth', 'step_100.pth'):
        (tmp_path / name).write_bytes(b'half')
    content, path, warnings = checkpoint.load_newest(tmp_path)
    assert content['step'] == 90 and path == tmp_path / 'step_90.pth'
    assert len(warnings) == 2
    assert re.search('latest.pth is damaged', warnings[0])
    assert re.search('step_100.pth is damaged', warnings[1])


def test_load_newest_refuses_where_none_is_sound(tmp_path):
    for name in ('latest.pth', 'step_5.pth'):
        (tmp_path / name).write_bytes(b'half')
    with pytest.raises(ValueError, match='none of the 2 checkpoints') as caught:
        checkpoint.load_newest(tmp_path)
    assert 'latest.pth' in str(caught.value) and 'clean.sh' in str(caught.value)


# -- into a network --------------------------------------------------------------------

def linear():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


def test_load_net():
    net, other = linear(), linear()
    other[1].running_mean.normal_()
    checkpoint.load_net(net, other.state_dict(), 'a.pth')
    assert same(net.state_dict(), other.state_dict())


def test_load_net_names_what_differs():
    for change, parts in [
            (lambda s: s.pop('0.bias'), ['1 missing (0.bias)']),
            (lambda s: s.update({'2.w': torch.ones(1)}), ['1 unexpected (2.w)']),
            (lambda s: s.update({'0.weight': torch.ones(4, 2)}),
             ['1 tensors of another shape (0.weight: (4, 2), expected (3, 2))']),
            (lambda s: (s.pop('1.running_mean'), s.update({'x': torch.ones(1)})),
             ['1 missing (1.running_mean)', '1 unexpected (x)'])]:
        net, state = linear(), linear().state_dict()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        change(state)
        with pytest.raises(ValueError) as caught:
            checkpoint.load_net(net, state, 'logdir/a.pth')
        for part in ['logdir/a.pth is of another architecture', *parts]:
            assert part in str(caught.value)
        assert same(net.state_dict(), before)  # nothing is loaded by half


def test_load_net_keeps_the_counters_that_a_file_lacks():
    net, state = linear(), linear().state_dict()
    net[1].num_batches_tracked += 5
    del state['1.num_batches_tracked']
    checkpoint.load_net(net, state, 'a.pth')
    assert net[1].num_batches_tracked == 5
    assert torch.equal(net[0].weight, state['0.weight'])


def test_adopt_architecture():
    settings.N_LAYERS, settings.STEM, settings.LR = 101, 'auto', 0.009
    settings.N_BASES = 64
    lines = checkpoint.adopt_architecture({
        'N_LAYERS': 18, 'STEM': 'deep', 'N_BASES': 64, 'LR': 1.0, 'GONE': 3})
    assert len(lines) == 1
    assert re.fullmatch('N_LAYERS = 18 .* the checkpoint, not 101', lines[0])
    assert (settings.N_LAYERS, settings.STEM, settings.LR) == (18, 'deep', 0.009)
    assert not hasattr(settings, 'GONE')
    lines = checkpoint.adopt_architecture({'STEM': 'plain'})
    assert len(lines) == 1
    assert re.fullmatch("STEM = '?plain'? .* the checkpoint, not '?deep'?", lines[0])
    assert checkpoint.adopt_architecture({'STEM': 'plain'}) == []


def test_architecture_names_are_settings():
    assert set(checkpoint.ARCHITECTURE) <= set(runtime.snapshot())


# -- the released format ---------------------------------------------------------------

PLACES = {'backbone.conv1': 'extractor.0', 'backbone.bn1': 'extractor.1',
          'backbone.layer1': 'extractor.4', 'backbone.layer2': 'extractor.5',
          'backbone.layer3': 'extractor.6', 'backbone.layer4': 'extractor.7',
          'head.fc0': 'fc0', 'head.emau': 'emau', 'head.fc1': 'fc1.0',
          'head.fc2': 'fc2'}


def as_released(state):
    """Our keys in the released code's names, by FACTS section 5."""
    renamed = {}
    for key, value in state.items():
        place = next(p for p in PLACES if key.startswith(p + '.'))
        renamed[PLACES[place] + key[len(place):]] = value
    return renamed


def build(device='meta', **values):
    for name, value in values.items():
        setattr(settings, name, value)
    with torch.device(device):
        return network.build(5)


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
@pytest.mark.parametrize('stem', ['deep', 'plain'])
@pytest.mark.parametrize('fc1', [0, 24])
def test_released_architecture_is_read_off_the_shapes(depth, stem, fc1):
    choice = dict(N_LAYERS=depth, STEM=stem, HEAD_CHANNELS=32, FC1_CHANNELS=fc1,
                  N_BASES=6, HEAD='ema')
    state = build(**choice).state_dict()
    released = as_released(state)
    assert 'extractor.5.0.downsample.0.weight' in released and 'emau.mu' in released
    assert ('fc1.0.conv.weight' in released) == bool(fc1)
    renamed, found = checkpoint.convert_released(released, 'x.pth')
    unit = dict(MULTI_GRID=(1, 2, 4), STAGE_NUM=3, EM_LAMBDA=1.0, EM_KERNEL='exp_dot',
                EM_NORM='l2', EM_GRADIENT='none', EM_UPDATE='moving_average',
                EM_CONV1='auto', AUX_WEIGHT=0.0)  # what the released code does
    assert found == {**choice, **unit}
    assert list(renamed) == list(state)
    assert all(renamed[key] is state[key] for key in state)


def test_a_released_file_loads(tmp_path):
    net = build('cpu', N_LAYERS=18, STEM='deep', HEAD_CHANNELS=8, FC1_CHANNELS=0,
                N_BASES=3)
    released = as_released(net.state_dict())
    old = {k: v for k, v in released.items() if not k.endswith('num_batches_tracked')}
    assert len(released) - len(old) == 25  # of PyTorch before 0.4.1
    torch.save({'net': old, 'step': 30000}, tmp_path / 'final.pth')
    settings.N_LAYERS, settings.HEAD_CHANNELS, settings.N_BASES = 101, 512, 64
    settings.FC1_CHANNELS = 256
    content = checkpoint.load(tmp_path / 'final.pth')
    assert content['step'] == 30000 and checkpoint.n_classes_of(content['net']) == 5
    lines = checkpoint.adopt_architecture(content['settings'])
    assert len(lines) == 4
    fresh = network.build(5)
    assert not torch.equal(fresh.head.emau.mu, net.head.emau.mu)
    checkpoint.load_net(fresh, content['net'], 'final.pth')
    assert same(fresh.state_dict(), net.state_dict())


@pytest.mark.parametrize('key', ['emau.mu', 'fc0.conv.weight', 'extractor.6.'])
def test_an_incomplete_released_file(key):
    state = as_released(build(N_LAYERS=18, STEM='plain').state_dict())
    state = {k: v for k, v in state.items() if not k.startswith(key)}
    with pytest.raises(ValueError, match='x.pth looks like a released .* incomplete'):
        checkpoint.convert_released(state, 'x.pth')
