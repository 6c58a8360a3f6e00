"""How a run begins: from another checkpoint, resumed, or refused in a sentence."""
import pytest
import torch
from test_train import TINY, make_batch, weights

import checkpoint
import settings
import train
from config import UserError
from training import setup


@pytest.fixture
def stage(voc, monkeypatch, tmp_path):
    """Settings of a run on the made-up folder, and the weights of a stage before it."""
    for name, value in dict(
            **TINY, DATASET='voc', DATA_ROOT=str(voc), TRAIN_SPLIT='train',
            PRETRAINED='none', N_WORKERS=0, LOG_DIR=str(tmp_path / 'log'),
            INIT_FROM=str(tmp_path / 'before' / 'final.pth')).items():
        monkeypatch.setattr(settings, name, value)
    (tmp_path / 'before').mkdir()
    before = train.Session(21, torch.device('cpu'))
    before.train_step(*make_batch())
    checkpoint.save(before.state_dict(is_final=True), settings.INIT_FROM)
    monkeypatch.setattr(settings, 'SEED', 5)
    return checkpoint.load(settings.INIT_FROM)


def test_starts_from_a_whole_network(stage, monkeypatch, tmp_path):
    """Every tensor, the bases and the statistics too; and nothing else of that run."""
    session, *_ = train.prepare({})
    found = session.model.state_dict()
    assert found.keys() == stage['net'].keys() and len(found) > 100
    for name, value in found.items():
        assert torch.equal(value, stage['net'][name]), name
    assert session.step == 0 and not session.optimizer.state
    assert settings.STEM == 'plain'
    text = (tmp_path / 'log' / 'log.txt').read_text()
    assert f'all weights of {settings.INIT_FROM}' in text and 'scratch' not in text
    monkeypatch.setattr(settings, 'INIT_FROM', '')
    other = train.Session(21, torch.device('cpu')).model.state_dict()
    name = 'head.classifier.weight'
    assert not torch.equal(other[name], found[name])


def test_stem_is_taken_from_the_first_network(stage, monkeypatch):
    monkeypatch.setattr(settings, 'STEM', 'auto')
    session, *_ = train.prepare({})
    assert settings.STEM == session.model.backbone.stem == 'plain'


def test_a_resumed_run_does_not_start_again(stage, monkeypatch, tmp_path):
    """The file of the stage before may be gone by then."""
    session, _, _, log = train.prepare({})
    session.train_step(*make_batch(1))
    checkpoint.save(session.state_dict(), log.folder / 'latest.pth')
    (tmp_path / 'before' / 'final.pth').unlink()
    again, *_ = train.prepare({})
    assert again.step == 1
    for name, value in weights(session).items():
        assert torch.equal(value, weights(again)[name]), name
    assert again.weights == session.weights != ''


def test_first_network_that_is_not_there(stage, monkeypatch, tmp_path):
    monkeypatch.setattr(settings, 'INIT_FROM', str(tmp_path / 'nowhere.pth'))
    with pytest.raises(UserError) as caught:
        train.prepare({})
    assert 'nowhere.pth' in str(caught.value)
    assert 'INIT_FROM' in str(caught.value)
    assert not (tmp_path / 'log').exists()


@pytest.mark.parametrize('name, value', [('HEAD_CHANNELS', 12), ('N_LAYERS', 34),
                                         ('AUX_WEIGHT', 0.4), ('STEM', 'deep')])
def test_first_network_of_another_architecture(name, value, stage, monkeypatch,
                                               tmp_path):
    monkeypatch.setattr(settings, name, value)
    with pytest.raises(UserError, match='another architecture') as caught:
        train.prepare({})
    assert settings.INIT_FROM in str(caught.value)
    assert not (tmp_path / 'log').exists()


def test_first_network_of_other_classes(stage, monkeypatch, tmp_path):
    checkpoint.save(train.Session(5, torch.device('cpu')).state_dict(True),
                    settings.INIT_FROM)
    with pytest.raises(UserError) as caught:
        train.prepare({})
    text = str(caught.value)
    assert 'head.classifier' in text and '(5, 8, 1, 1), expected (21, 8, 1, 1)' in text


def test_ranks_that_begin_at_unlike_steps_are_one_sentence():
    """A rank that resumes says so before another waits for it to download."""
    class Group:
        def all_reduce_max(self, number):  # the other rank begins anew, at step -1
            return max(number, -1 if number > 0 else 1)

    start = setup.Start('plain', [], {'step': 7}, None, '')
    with pytest.raises(UserError, match='give a folder that all hosts share'):
        setup.check_same_start(start, Group())
