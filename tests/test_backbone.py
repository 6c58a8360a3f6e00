"""The ResNets against torchvision's."""
import pytest
import torch
import torchvision

from backbone import ResNet


def meta_resnet(depth, stem):
    """A network without memory, for what must be refused before anything is loaded."""
    with torch.device('meta'):
        return ResNet(depth, stem)


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_keys_are_torchvisions(depth):
    with torch.device('meta'):
        theirs = getattr(torchvision.models, f'resnet{depth}')().state_dict()
    ours = meta_resnet(depth, 'plain')
    theirs = {k: v for k, v in theirs.items() if not k.startswith('fc.')}
    ours.load_state_dict(theirs, strict=True)
    assert list(ours.state_dict()) == list(theirs)


def forward_theirs(net, x):
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    feats = []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = layer(x)
        feats.append(x)
    return feats


def randomise(net):
    torch.manual_seed(5)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 1)
            m.bias.data.normal_(0, 0.1)
    return net.eval()


@pytest.mark.parametrize('depth, stride, n_levels', [(50, 8, 4), (50, 16, 4),
                                                     (18, 16, 3)])
def test_features_are_torchvisions(depth, stride, n_levels):
    """Without multi-grid the dilated layers are torchvision's own.

    Torchvision does not dilate basic blocks, so layer4 of ResNet-18 differs.
    """
    dilate = [False, stride == 8, True] if depth >= 50 else None
    theirs = randomise(getattr(torchvision.models, f'resnet{depth}')(
        replace_stride_with_dilation=dilate))
    ours = ResNet(depth, 'plain', stride, (1, 1, 1)).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith('fc.')}
    ours.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 49, 65)
    with torch.no_grad():
        pairs = list(zip(ours(x), forward_theirs(theirs, x), strict=True))
    for a, b in pairs[:n_levels]:
        assert a.shape == b.shape and b.abs().max() > 0
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize('stem, channels', [('deep', (64, 64, 128)),
                                            ('v1c', (32, 32, 64))])
def test_stems_of_three_convolutions(stem, channels):
    net = meta_resnet(50, stem)
    convs = [m for m in net.conv1 if isinstance(m, torch.nn.Conv2d)]
    assert tuple(m.out_channels for m in convs) == channels
    assert [m.kernel_size + m.stride for m in convs] == [(3, 3, 2, 2), (3, 3, 1, 1),
                                                         (3, 3, 1, 1)]
    assert net.bn1.num_features == net.layer1[0].conv1.in_channels == channels[-1]
    with torch.device('meta'):
        assert net(torch.empty(1, 3, 33, 49))[0].shape == (1, 256, 9, 13)
    with pytest.raises(ValueError, match="'deep', 'v1c' or 'plain', not 'wide'"):
        meta_resnet(50, 'wide')
