"""The cost table: what is counted and measured, and how it stands beside the paper."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script
from test_heads import HAND
from torch import nn

import settings
from measurement import cost


def test_table_1_runs(tmp_path):
    done = run_script('measure.py', 'table1', '--size', 65, 'N_LAYERS=18', 'STRIDE=16',
                      'DEVICE=cpu', 'PSA_GRID=5,5', f'LOG_DIR={tmp_path}')
    assert done.returncode == 0, done.stderr
    text = (tmp_path / 'measure_table1.md').read_text()
    assert text in done.stdout
    result = json.loads((tmp_path / 'measure_table1.json').read_text())
    rows = {row['name']: row for row in result['rows']}
    assert list(rows)[0] == 'ResNet-18' and len(rows) == 11
    assert all(name in text for name in rows)
    n = 5 * 5
    assert rows['FCN']['multiply_adds'] == n * 512 * (512 * 9 + 21)
    assert rows['FCN']['parameters'] == 512 * 512 * 9 + 2 * 512 + 512 * 21 + 21
    assert rows['A2']['settings'] == {'HEAD': 'a2', 'HEAD_CHANNELS': 512,
                                      'FC1_CHANNELS': 256}
    assert not any(row['paper'] for row in rows.values())  # of another backbone
    # of so small an image the weights are nearly all
    assert rows['FCN']['memory_MB'] == pytest.approx(
        4e-6 * rows['FCN']['parameters'], rel=0.05)
    assert result['environment']['torch'] == torch.__version__


def test_peak_of_inference():
    """Two convolutions: image and features, then features and logits, by hand."""
    net = SimpleNamespace(backbone=nn.Conv2d(3, 4, 1, bias=False),
                          head=nn.Conv2d(4, 8, 1, bias=False))
    cpu = torch.device('cpu')
    assert cost.peak_of_inference(net, False, 8, cpu) == pytest.approx(
        4e-6 * (12 + 64 * (3 + 4)))
    assert cost.peak_of_inference(net, True, 8, cpu) == pytest.approx(
        4e-6 * (12 + 32 + 64 * (4 + 8)))
    # what is made and dropped inside counts while it is there
    net.backbone = nn.Sequential(nn.Conv2d(3, 40, 1, bias=False),
                                 nn.Conv2d(40, 4, 1, bias=False))
    assert cost.peak_of_inference(net, False, 8, cpu) == pytest.approx(
        4e-6 * (120 + 160 + 64 * (3 + 40 + 4)))


def test_what_differs_from_the_paper_is_explained():
    rows = [{'name': 'ResNet-101', 'settings': {}, 'parameters': 42_624_000,
             'multiply_adds': 189_890_000_000, 'memory_MB': 330.0,
             'paper': cost.BACKBONE_1}]
    for name, key in (('DeepLabV3', 'deeplabv3'), ('DeepLabV3+', 'deeplabv3plus'),
                      ('PSANet', 'psanet')):
        paper = next(row[2] for row in cost.TABLE_1 if row[0] == name)
        parameters, macs = HAND[key]
        rows.append({'name': name, 'settings': {}, 'parameters': parameters,
                     'multiply_adds': macs, 'memory_MB': 40.4, 'paper': paper})
    text = cost.write_table(rows, 513, 8)
    table = [line for line in text.splitlines() if line.startswith('|')]
    assert len({len(line) for line in table}) == 1 and len(table) == 6
    cells = [cell.strip() for cell in table[3].strip('|').split('|')]
    assert cells == ['DeepLabV3', '+15.541 M', '+15.5 M', '+63.43 G', '+63.4 G',
                     '+126.86 G', '+40 MB', '+66 MB']
    notes = [line for line in text.splitlines() if line.startswith('- ')]
    assert len(notes) == 2
    assert '- DeepLabV3+: +3.3 % parameters and +1.3 % operations' in notes[0]
    assert '- PSANet: +51.0 % parameters and +73.1 % operations' in notes[1]


@pytest.mark.parametrize('words, is_compared', [
    ({}, True), ({'STRIDE': 16, 'EVAL_STRIDE': 8}, True), ({'EVAL_STRIDE': 16}, False),
    ({'STAGE_NUM': 8}, False), ({'N_BASES': 256}, False), ({'PSA_GRID': (9, 9)}, False),
    ({'DATASET': 'cityscapes'}, False), ({'N_LAYERS': 50}, False)])
def test_only_like_is_compared(words, is_compared, monkeypatch, capsys):
    """The paper's figures stand beside networks that are the paper's, and no others."""
    monkeypatch.setattr(cost, 'peak_of_inference', lambda *_: 1.0)
    build = cost.network.build

    def build_nothing(*args, **options):
        with torch.device('meta'):
            return build(*args, **options)

    monkeypatch.setattr(cost.network, 'build', build_nothing)
    monkeypatch.setattr(cost, 'TABLE_1', cost.TABLE_1[:1])
    for name, value in words.items():
        monkeypatch.setattr(settings, name, value)
    result = cost.measure_table_1(513)
    assert all((row['paper'] is not None) == is_compared for row in result['rows'])
    assert ('190.6 G' in capsys.readouterr().out) == is_compared
    stride = 16 if words == {'EVAL_STRIDE': 16} else 8
    assert f'output stride {stride};' in result['markdown']


def test_numbers_of_the_explanations():
    """What WHY says of DeepLabV3+ without its image pooling (PSANet: test_heads)."""
    parameters, macs = HAND['deeplabv3plus']
    pooling = 2048 * 256 + 2 * 256 + 256 * 256
    assert f'{(parameters - pooling) / 1e6:.2f} M' in cost.WHY['DeepLabV3+']
    operations = 2048 * 256 + 65 * 65 * 256 * 256
    assert f'{(macs - operations) / 1e9:.2f} G' in cost.WHY['DeepLabV3+']
