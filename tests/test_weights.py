"""ImageNet weights: which are chosen, and every way in which loading them can fail."""
import functools
import hashlib
import http.server
import re
import socket
import threading

import pytest
import torch
import torchvision
from test_backbone import meta_resnet
from torchvision.models._api import Weights, WeightsEnum

from backbone import ResNet
from config import UserError
from training import weights
from training.weights import choose_weights, load_weights, read_weights


def save_named(state, folder, start):
    """Save with the start of the sha256 in the name, as published files have it."""
    file = folder / 'unnamed'
    torch.save(state, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return file.rename(folder / f'{start}-{digest[:8]}.pth')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Real files of ResNet-18 with each stem: {stem: (file, state)}.

    That of v1c has open-mmlab's keys in the file and torchvision's in the state.
    """
    made = {}
    for stem in ('deep', 'plain', 'v1c'):
        torch.manual_seed(len(stem))
        state = ResNet(18, stem).state_dict()
        for key, value in state.items():  # unlike those of a fresh network
            if 'running' in key:
                value.uniform_(0.5, 2)
        state = {**state, 'fc.weight': torch.randn(10, 512), 'fc.bias': torch.randn(10)}
        folder = tmp_path_factory.mktemp(stem)
        if stem == 'v1c':
            theirs = {f'stem.{k[6:]}' if k.startswith('conv1.') else
                      f'stem.7.{k[4:]}' if k.startswith('bn1.') else k: v
                      for k, v in state.items()}
            assert {k.split('.')[1] for k in theirs if k.startswith('stem.')} == set(
                '013467')
            made[stem] = save_named({'state_dict': theirs}, folder,
                                    'resnet18_v1c'), state
            continue
        made[stem] = save_named(state, folder, 'resnet18'), state
    return made


@pytest.fixture
def deep_dir(files, monkeypatch):
    """A models folder with the deep-stem file of depth 18, which the table knows."""
    file = files['deep'][0]
    monkeypatch.setattr(weights, 'DEEP_FILES', {18: file.name, 50: 'resnet50-ff.pth'})
    return file.parent


def holds(net, state):
    own = net.state_dict()
    return set(own) == {k for k in state if not k.startswith('fc.')} and all(
        torch.equal(own[k], state[k]) for k in own)


# -- choosing --------------------------------------------------------------------------

def test_none_takes_no_weights(tmp_path):
    for stem, built in (('auto', 'deep'), ('deep', 'deep'), ('plain', 'plain'),
                        ('v1c', 'v1c')):
        assert choose_weights('none', stem, 50, tmp_path)[:2] == (built, '')
    assert 'PRETRAINED=none' in choose_weights('none', 'auto', 50, tmp_path)[2]


@pytest.mark.parametrize('stem', ['auto', 'deep'])
def test_auto_finds_the_deep_file(stem, deep_dir, files):
    chosen = choose_weights('auto', stem, 18, str(deep_dir))
    assert chosen[:2] == ('deep', str(files['deep'][0]))
    assert str(files['deep'][0]) in chosen[2] and 'ResNet-18' in chosen[2]


def test_auto_falls_back_to_torchvision(tmp_path, deep_dir):
    assert choose_weights('auto', 'auto', 50, tmp_path)[:2] == (
        'plain', 'IMAGENET1K_V1')
    assert choose_weights('auto', 'auto', 34, tmp_path)[:2] == (
        'plain', 'IMAGENET1K_V1')
    assert choose_weights('auto', 'plain', 18, deep_dir)[:2] == (  # as asked
        'plain', 'IMAGENET1K_V1')


def test_a_deep_stem_is_never_replaced(tmp_path, deep_dir):
    (tmp_path / 'resnet18-5c106cde.pth').touch()
    with pytest.raises(UserError) as caught:
        choose_weights('auto', 'deep', 50, tmp_path)
    for part in ('ResNet-50', 'deep', 'resnet50-ff.pth', str(tmp_path),
                 'found there: resnet18-5c106cde.pth', 'STEM=plain'):
        assert part in str(caught.value)
    with pytest.raises(UserError, match='no such file is published'):
        choose_weights('auto', 'deep', 34, tmp_path / 'nowhere')
    with pytest.raises(UserError, match='STEM=deep.*IMAGENET1K_V2.*plain'):
        choose_weights('IMAGENET1K_V2', 'deep', 50, tmp_path)


def test_the_v1c_file_is_taken_if_it_is_asked_for(files, tmp_path):
    file = files['v1c'][0]
    stem, source, line = choose_weights('auto', 'v1c', 18, str(file.parent))
    assert (stem, source) == ('v1c', str(file)) and 'v1c stem' in line
    assert choose_weights('auto', 'auto', 18, str(file.parent))[0] == 'plain'
    with pytest.raises(UserError) as caught:
        choose_weights('auto', 'v1c', 50, str(file.parent))
    for part in ('ResNet-50 with the v1c stem', 'resnet50_v1c*.pth of open-mmlab',
                 f'found there: {file.name}', 'STEM=plain'):
        assert part in str(caught.value)
    with pytest.raises(UserError, match='STEM=v1c.*IMAGENET1K_V2.*an open-mmlab file'):
        choose_weights('IMAGENET1K_V2', 'v1c', 50, tmp_path)


@pytest.mark.parametrize('stem', ['auto', 'plain'])
def test_a_name_of_torchvision(stem, deep_dir):
    assert choose_weights('IMAGENET1K_V2', stem, 18, deep_dir)[:2] == (
        'plain', 'IMAGENET1K_V2')


@pytest.mark.parametrize('stem', ['deep', 'plain', 'v1c'])
def test_a_file_tells_its_stem(stem, files, tmp_path):
    file = str(files[stem][0])
    assert choose_weights(file, 'auto', 18, tmp_path)[:2] == (stem, file)
    assert choose_weights(file, stem, 18, tmp_path)[:2] == (stem, file)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match='weights/x.pth is not there'):
        choose_weights('weights/x.pth', 'auto', 50, tmp_path)


def test_an_unknown_stem(tmp_path):
    with pytest.raises(UserError, match='STEM=wide is none of auto, deep, v1c, plain'):
        choose_weights('none', 'wide', 50, tmp_path)


# -- loading a file --------------------------------------------------------------------

@pytest.mark.parametrize('stem', ['deep', 'plain', 'v1c'])
def test_load(stem, files, tmp_path):
    file, state = files[stem]
    net = ResNet(18, stem)
    assert not holds(net, state)
    line = load_weights(net, str(file), tmp_path)
    assert holds(net, state)
    assert str(file) in line and f'{len(state) - 2} tensors' in line


def test_load_without_counters_and_below_state_dict(files, tmp_path):
    _, state = files['plain']
    counters = {k for k in state if k.endswith('num_batches_tracked')}
    assert len(counters) == 20
    torch.save({'state_dict': {k: state[k] for k in state if k not in counters}},
               tmp_path / 'old.pth')
    net = ResNet(18, 'plain')
    load_weights(net, str(tmp_path / 'old.pth'), tmp_path)
    assert holds(net, state)


def test_a_hash_that_differs(files, tmp_path):
    file = files['plain'][0]
    wrong = tmp_path / 'resnet18-0123abcd.pth'
    wrong.symlink_to(file)
    with pytest.raises(UserError) as caught:
        read_weights(str(wrong))
    for part in (str(wrong), 'damaged', '0123abcd', file.stem[-8:]):
        assert part in str(caught.value)
    with pytest.raises(UserError, match='damaged'):
        load_weights(meta_resnet(18, 'plain'), str(wrong), tmp_path)


def test_a_truncated_file(files, tmp_path):
    file = files['plain'][0]
    start = file.read_bytes()[:100000]
    named, unnamed = tmp_path / file.name, tmp_path / 'mine.pth'
    for path, message in ((named, 'is damaged'), (unnamed, 'cannot be read')):
        path.write_bytes(start)
        with pytest.raises(UserError, match=message) as caught:
            read_weights(str(path))
        assert str(path) in str(caught.value)


@pytest.mark.parametrize('depth, stem, own', [
    (34, 'plain', 'plain'), (50, 'plain', 'plain'), (18, 'deep', 'plain'),
    (18, 'deep', 'v1c'), (18, 'v1c', 'deep'), (18, 'plain', 'v1c')])
def test_another_depth_or_stem(depth, stem, own, files, tmp_path):
    file = files[own][0]
    with pytest.raises(UserError) as caught:
        load_weights(meta_resnet(depth, stem), str(file), tmp_path)
    for part in (str(file), f'ResNet-18 with the {own} stem',
                 f'ResNet-{depth} with the {stem} stem'):
        assert part in str(caught.value)


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
@pytest.mark.parametrize('stem', ['deep', 'plain', 'v1c'])
def test_describe_weights(depth, stem):
    state = meta_resnet(depth, stem).state_dict()
    assert weights.describe_weights(state) == (stem, depth)


@pytest.mark.parametrize('content', [
    {'net': {}, 'step': 1}, {'state_dict': {'decode_head.weight': torch.zeros(1)}},
    [torch.zeros(2)], torch.zeros(3)])
def test_a_file_without_a_resnet(content, tmp_path):
    path = tmp_path / 'other.pth'
    torch.save(content, path)
    with pytest.raises(UserError, match='holds no ResNet') as caught:
        read_weights(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize('lacks, surplus', [
    ('layer2.1.conv2.weight', ''), ('bn1.running_mean', ''), ('', 'layer5.weight'),
    ('layer1.0.bn1.bias', 'layer5.weight')])
def test_incomplete_and_surplus_tensors(lacks, surplus, files, tmp_path):
    state = dict(files['plain'][1])
    if lacks:
        del state[lacks]
    if surplus:
        state[surplus] = torch.zeros(1)
    torch.save(state, tmp_path / 'odd.pth')
    with pytest.raises(UserError) as caught:
        load_weights(ResNet(18, 'plain'), str(tmp_path / 'odd.pth'), tmp_path)
    for part in ('odd.pth', f'missing {[lacks][:len(lacks)]}',
                 f'unexpected {[surplus][:len(surplus)]}'):
        assert part in str(caught.value)


def test_another_width(files, tmp_path):
    state = {**files['plain'][1], 'conv1.weight': torch.zeros(32, 3, 7, 7)}
    torch.save(state, tmp_path / 'narrow.pth')
    with pytest.raises(UserError, match=r'narrow\.pth.*conv1\.weight'):
        load_weights(ResNet(18, 'plain'), str(tmp_path / 'narrow.pth'), tmp_path)


def test_a_file_that_runs_code_is_refused(tmp_path):
    path, trace = tmp_path / 'evil.pth', tmp_path / 'trace'

    class Evil:
        def __reduce__(self):
            return open, (str(trace), 'w')

    torch.save({'layer1.0': Evil()}, path)
    with pytest.raises(UserError, match='cannot be read'):
        read_weights(str(path))
    assert not trace.exists()


# -- torchvision's cache ---------------------------------------------------------------

@pytest.fixture
def offer(monkeypatch, tmp_path):
    """Point torchvision's IMAGENET1K_V1 of every depth to a url."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)

    def point(url):
        class Offered(WeightsEnum):
            IMAGENET1K_V1 = Weights(url=url, transforms=None, meta={})
        monkeypatch.setattr(torchvision.models, 'get_model_weights',
                            lambda name: Offered)
    return point


@pytest.fixture
def serve():
    """Serve a folder on a port of this machine; return the address and the requests."""
    servers = []

    def start(folder):
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *words):
                asked.append(self.path)

        server = http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), functools.partial(Handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f'http://127.0.0.1:{server.server_port}', asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_weights_are_fetched_once(files, offer, serve, tmp_path):
    file, state = files['plain']
    address, asked = serve(file.parent)
    offer(f'{address}/{file.name}')
    for _ in range(2):
        net = ResNet(18, 'plain')
        line = load_weights(net, 'IMAGENET1K_V1', tmp_path / 'models')
        assert holds(net, state) and f'{address}/{file.name}' in line
    assert asked == [f'/{file.name}']
    assert list((tmp_path / 'cache').rglob(file.name))


def test_a_file_in_models_is_not_fetched(files, offer, serve, tmp_path):
    file, state = files['plain']
    address, asked = serve(tmp_path)
    offer(f'{address}/{file.name}')
    net = ResNet(18, 'plain')
    assert str(file) in load_weights(net, 'IMAGENET1K_V1', file.parent)
    assert holds(net, state) and not asked


def test_a_fetched_file_with_another_hash(offer, serve, tmp_path):
    (tmp_path / 'resnet18-01234567.pth').write_bytes(b'a page that says sorry')
    address, _ = serve(tmp_path)
    offer(f'{address}/resnet18-01234567.pth')
    with pytest.raises(UserError, match='could not fetch') as caught:
        load_weights(meta_resnet(18, 'plain'), 'IMAGENET1K_V1', tmp_path / 'models')
    assert '01234567' in str(caught.value)


def test_no_connection_is_one_sentence(offer, tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{free.getsockname()[1]}/resnet18-01234567.pth'
    offer(url)
    with pytest.raises(UserError) as caught:
        load_weights(meta_resnet(18, 'plain'), 'IMAGENET1K_V1', tmp_path / 'models')
    for part in (f'could not fetch {url}', str(tmp_path / 'models'), 'PRETRAINED=none'):
        assert part in str(caught.value)
    assert '\n' not in str(caught.value)


def test_a_name_that_torchvision_does_not_have(tmp_path):
    with pytest.raises(UserError) as caught:
        load_weights(meta_resnet(18, 'plain'), 'IMAGENET1K_V9', tmp_path)
    assert re.search('IMAGENET1K_V9 .*ResNet-18.*IMAGENET1K_V1', str(caught.value))
