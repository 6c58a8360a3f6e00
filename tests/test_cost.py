"""The cost table: what is counted, and how it stands beside the paper."""
import json
import sys

import pytest
import torch
from test_heads import HAND
from torch import nn

import measure
from measurement import cost

# FACTS of the paper's networks, counted by hand: millions of parameters and billions of
# multiply-adds, at 513x513 and output stride 8.
COUNTED = {'ResNet-101': (42.624, 189.89), 'EMANet(512)': (10.008, 43.102),
           'EMANet(256)': (4.873, 20.997), 'DeepLabV3': (15.541, 63.430),
           'DeepLabV3+': (16.84, 85.17)}


def run_table_1(monkeypatch, *words) -> dict:
    monkeypatch.setattr(sys, 'argv', ['measure.py', 'table1', 'DEVICE=cpu', *words])
    measure.main()


def test_table_1(tmp_path, monkeypatch, capsys):
    """The whole table of the paper's networks: the counts, and what is explained."""
    run_table_1(monkeypatch, f'LOG_DIR={tmp_path}')
    text = (tmp_path / 'measure_table1.md').read_text()
    assert text in capsys.readouterr().out
    result = json.loads((tmp_path / 'measure_table1.json').read_text())
    rows = {row['name']: row for row in result['rows']}
    assert len(rows) == 11 and all(name in text for name in rows)
    for name, (millions, billions) in COUNTED.items():
        assert rows[name]['parameters'] / 1e6 == pytest.approx(millions, rel=5e-4), name
        assert rows[name]['multiply_adds'] / 1e9 == pytest.approx(billions, rel=5e-4)
        assert rows[name]['paper']
    whole = [sum(rows[name][key] for name in ('ResNet-101', 'EMANet, as released'))
             for key in ('parameters', 'multiply_adds')]
    assert whole[0] - 512 * 64 == pytest.approx(53.774e6, abs=500)  # without the bases
    assert whole[1] == pytest.approx(237.95e9, abs=5e6)
    for name, key in (('PSANet', 'psanet'), ('Non-local', 'nonlocal'), ('A2', 'a2')):
        assert (rows[name]['parameters'], rows[name]['multiply_adds']) == HAND[key]
    table = [line for line in text.splitlines() if line.startswith('|')]
    assert len({len(line) for line in table}) == 1 and len(table) == 13
    cells = [cell.strip() for cell in table[5].strip('|').split('|')]
    assert cells == ['DeepLabV3', '+15.541 M', '+15.5 M', '+63.43 G', '+63.4 G',
                     '+126.86 G', '+62 MB', '+66 MB']
    notes = [line for line in text.splitlines() if line.startswith('- ')]
    assert len(notes) == 2
    assert '- DeepLabV3+: +3.3 % parameters and +1.3 % operations' in notes[0]
    assert '- PSANet: +51.0 % parameters and +73.1 % operations' in notes[1]
    assert result['environment']['torch'] == torch.__version__


@pytest.mark.parametrize('words, is_compared', [
    (['STRIDE=16', 'EVAL_STRIDE=8'], True), (['EVAL_STRIDE=16'], False),
    (['N_BASES=256'], False)])
def test_only_like_is_compared(words, is_compared, tmp_path, monkeypatch, capsys):
    """The paper's numbers stand beside networks that are the paper's, and no others."""
    monkeypatch.setattr(cost, 'TABLE_1', cost.TABLE_1[:1])
    run_table_1(monkeypatch, f'LOG_DIR={tmp_path}', *words)
    text = capsys.readouterr().out
    assert ('190.6 G' in text) == is_compared and ('21.1 G' in text) == is_compared
    stride = 16 if words == ['EVAL_STRIDE=16'] else 8
    assert f'output stride {stride}.' in text


def test_peak_of_inference():
    """What is made and dropped inside counts while it is there, by hand."""
    parts = [nn.Sequential(nn.Conv2d(3, 40, 1, bias=False),
                           nn.Conv2d(40, 4, 1, bias=False)),
             nn.Conv2d(4, 8, 1, bias=False)]
    for device in ('cpu', 'meta'):
        found = cost.peak_of_inference([part.to(device) for part in parts], 8)
        assert found == pytest.approx(4e-6 * (120 + 160 + 32 + 64 * (3 + 40 + 4)))
