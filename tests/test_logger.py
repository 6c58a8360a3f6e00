"""The log of a run: its rows, its files, its lock."""
import json
import math

import pytest
import torch

import config
import logger
from config import UserError


def rows(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().split('\n')
            if line]


def test_rows_after_the_step_of_a_resumed_run_are_removed(tmp_path):
    log = logger.Logger(str(tmp_path))
    for step in (1, 2, 3):
        log.log_metrics(kind='train', step=step, loss=step / 2, IoU=[0.5, math.nan])
    log.rows.write('{"kind": "train", "ste')  # cut off
    log.rows.flush()
    again = logger.Logger(str(tmp_path), step=2)
    assert [row['step'] for row in rows(tmp_path)] == [1, 2]
    again.log_metrics(kind='train', step=3, loss=math.inf)
    again.info('a line', is_shown=False)
    assert rows(tmp_path)[0] == {'kind': 'train', 'step': 1, 'loss': 0.5,
                                 'IoU': [0.5, None]}
    assert rows(tmp_path)[-1] == {'kind': 'train', 'step': 3, 'loss': None}
    assert (tmp_path / 'log.txt').read_text() == 'a line\n'


def test_lines_are_shown_or_not(tmp_path, capsys):
    log = logger.Logger(str(tmp_path))
    log.info('shown')
    log.info('quiet', is_shown=False)
    assert capsys.readouterr().out == 'shown\n'
    assert (tmp_path / 'log.txt').read_text() == 'shown\nquiet\n'
    log.log_settings(config.snapshot(), config.settings_text())
    assert any('tfevents' in path.name for path in tmp_path.iterdir())


def test_other_ranks_write_nothing(tmp_path):
    log = logger.NullLogger(str(tmp_path / 'log'))
    log.info('a line')
    log.log_metrics(kind='train', step=1)
    log.writer.add_scalar('a', 1, 2)
    assert log.folder == tmp_path / 'log' and not log.folder.exists()


def test_json_has_no_numbers_that_are_not_finite():
    text = logger.to_json({'a': (math.nan, 1.5, -math.inf), 'b': {'c': True}})
    assert text == '{"a": [null, 1.5, null], "b": {"c": true}}'


def test_a_text_is_written_whole(tmp_path, monkeypatch):
    path = tmp_path / 'a.txt'
    logger.write_text(path, 'äöü\n')
    assert path.read_text(encoding='utf-8') == 'äöü\n'
    monkeypatch.setattr(logger.os, 'replace', lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logger.write_text(path, 'other')
    assert path.read_text(encoding='utf-8') == 'äöü\n'


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot write into LOG_DIR='):
        logger.Logger(str(tmp_path / 'file' / 'log'))
    with pytest.raises(UserError, match='cannot write into --out='):
        logger.lock_folder(tmp_path / 'file' / 'log', '--out')


def test_lock_names_the_process(tmp_path):  # test_faults.py has two of them
    file = logger.lock_folder(tmp_path / 'new')
    assert (tmp_path / 'new' / 'lock').read_text().startswith('process ')
    file.close()


def test_environment_is_text():
    found = logger.describe_environment(torch.device('cpu'))
    assert {'command', 'host', 'device', 'python', 'torch', 'numpy', 'torchvision',
            'source', 'started'} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())
    assert found['torch'] == str(torch.__version__)
    assert logger.package_version('no-such-package') == 'unknown'
