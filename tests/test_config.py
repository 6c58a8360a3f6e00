"""Settings: values, words, recipes, settings.txt, checks, and errors in a sentence."""
import io
import sys
import tokenize
from pathlib import Path

import pytest

import config
import recipes
import settings
from config import UserError

SETTINGS = (Path(__file__).parents[1] / 'settings.py').read_text()


# -- one value -------------------------------------------------------------------------

@pytest.mark.parametrize('text, default, value', [
    ('12', 5, 12), ('-3', 5, -3), ('+7', 5, 7), ('6e5', 5, 600000), ('2.0', 5, 2),
    ('9007199254740993', 5, 9007199254740993),
    ('0.02', 1.0, 0.02), ('3', 1.0, 3.0), ('3e-4', 1.0, 3e-4), ('-1', 1.0, -1.0),
    ('true', False, True), ('TRUE', False, True), ('1', False, True),
    ('false', True, False), ('FALSE', True, False), ('0', True, False),
    ('0.5,1', (1.0,), (0.5, 1.0)), ('(0.5, 1)', (1.0,), (0.5, 1.0)),
    ('[2]', (1.0, 2.0), (2.0,)), ('1,2,4', (1,), (1, 2, 4)), ('(1,)', (2, 2), (1,)),
    ('1e0, 2', (1,), (1, 2)),
    ('plain', 'x', 'plain'), ('', 'x', ''), ('a=b=c', '', 'a=b=c'),
    (' kept ', '', ' kept '), ('12', 'x', '12'), ('true', 'x', 'true')])
def test_values(text, default, value):
    found = config.parse_value('NAME', text, default)
    assert found == value and type(found) is type(default)
    if isinstance(value, tuple):
        assert {type(v) for v in found} == {type(default[0])}


@pytest.mark.parametrize('text, default, expected', [
    ('1.5', 5, 'a whole number'), ('', 5, 'a whole number'), ('x', 5, 'a whole number'),
    ('inf', 5, 'a whole number'), ('nan', 5, 'a whole number'),
    ('true', 5, 'a whole number'), ('0,5', 1.0, 'a number'), ('', 1.0, 'a number'),
    ('yes', True, 'true or false'), ('2', True, 'true or false'),
    ('', False, 'true or false'), ('1,x', (1,), 'numbers with commas'),
    ('1.5', (1,), 'numbers with commas'), ('', (1,), 'numbers with commas'),
    ('()', (1,), 'numbers with commas')])
def test_wrong_values(text, default, expected):
    with pytest.raises(UserError) as caught:
        config.parse_value('NAME', text, default)
    message = str(caught.value)
    assert message.startswith(f'NAME={text}: {expected}')
    assert f'NAME={config.format_value(default)}' in message


def test_values_are_shown_as_they_are_typed():
    for name, value in config.snapshot().items():
        assert config.parse_value(name, config.format_value(value), value) == value
    assert config.format_value(True) == 'true'
    assert config.format_value((1, 2)) == '1,2'


# -- words -----------------------------------------------------------------------------

def test_words_set_settings():
    given = config.apply_overrides(
        ['LR=0.02', 'N_LAYERS=50', 'SCALES=1,2', 'USE_FLIP=0', 'DATA_ROOT=/a=b/c',
         'LR=0.03'])
    assert given == {'LR': 0.03, 'N_LAYERS': 50, 'SCALES': (1.0, 2.0),
                     'USE_FLIP': False, 'DATA_ROOT': '/a=b/c'}
    assert (settings.LR, settings.N_LAYERS, settings.SCALES) == (0.03, 50, (1.0, 2.0))
    assert settings.USE_FLIP is False and settings.DATA_ROOT == '/a=b/c'


@pytest.mark.parametrize('words', [['RECIPE=demo', 'LR=0.123', 'N_BASES=7'],
                                   ['LR=0.123', 'N_BASES=7', 'RECIPE=demo'],
                                   ['LR=0.123', 'RECIPE=demo', 'N_BASES=7']])
def test_the_recipe_comes_first(words):
    demo = recipes.RECIPES['demo']['settings']
    assert demo['LR'] != 0.123 and demo['N_BASES'] != 7
    given = config.apply_overrides(words)
    assert given == {'RECIPE': 'demo', 'LR': 0.123, 'N_BASES': 7}
    assert (settings.RECIPE, settings.LR, settings.N_BASES) == ('demo', 0.123, 7)
    for name in set(demo) - {'LR', 'N_BASES'}:
        assert getattr(settings, name) == demo[name]


def test_a_recipe_in_settings_py():
    settings.RECIPE = 'demo'
    assert config.apply_overrides(['LR=0.123']) == {'LR': 0.123}
    assert settings.DATASET == 'shapes' and settings.LR == 0.123
    assert config.apply_overrides([]) == {}


def test_a_recipe_in_settings_py_gives_way_to_the_words():
    settings.RECIPE = 'demo'
    before = settings.DATASET
    config.apply_overrides(['RECIPE='])
    assert settings.RECIPE == '' and settings.DATASET == before
    settings.RECIPE = 'demo'
    config.apply_overrides(['RECIPE=voc_r50'])
    assert settings.RECIPE == 'voc_r50' and settings.DATASET == 'voc'
    assert settings.N_LAYERS == 50 and settings.STEM == 'auto'


@pytest.mark.parametrize('word, parts', [
    ('BATCHSIZE=4', ['no setting BATCHSIZE', 'did you mean BATCH_SIZE?']),
    ('batch_size=4', ['no setting batch_size', 'did you mean BATCH_SIZE?']),
    ('STAGENUM=4', ['did you mean STAGE_NUM?']),
    ('QQQQ=4', ['no setting QQQQ', '--help lists every setting']),
    ('RECIPE=vocr50', ['no recipe vocr50', 'did you mean voc_r50?']),
    ('RECIPE=zzzzzz', ['no recipe zzzzzz', '--help lists every recipe']),
    ('WINOGRAD=on', ['WINOGRAD was removed']), ('CACHE=1', ['CACHE was removed']),
    ('EVAL_SCALES_WIDE=1,2', ['EVAL_SCALES_WIDE was removed', 'EVAL_MODE=multi']),
    ('LR', ["'LR'", 'NAME=VALUE']), ('=3', ['no setting']),
    ('__name__=x', ['no setting __name__']),
    ('LR=fast', ['LR=fast: a number is expected'])])
def test_wrong_words(word, parts):
    before = config.snapshot()
    with pytest.raises(UserError) as caught:
        config.apply_overrides([word])
    for part in parts:
        assert part in str(caught.value)
    assert config.snapshot() == before


def test_a_wrong_word_ends_the_script_with_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['x.py', 'BATCHSIZE=4'])
    with pytest.raises(SystemExit) as caught:
        config.run(lambda: config.parse_args('About.'))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith('error: there is no setting') and error.count('\n') == 1


def test_options_and_words_may_mix(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['x.py', 'N_BASES=7', '--pictures', '3', 'LR=0.5'])
    args = config.parse_args(
        'About.', lambda parser: parser.add_argument('--pictures', type=int))
    assert args.pictures == 3 and args.overrides == {'N_BASES': 7, 'LR': 0.5}


# -- writing settings.py ---------------------------------------------------------------

TEXT = '''"""Doc."""
# -- part
LR = 0.009                  # learning rate
NAME  =  'a # b'   # odd blanks stay
SCALES = (0.5, 1.0)

FLAG = True
N = 3  # number
'''


def run(text):
    values = {}
    exec(text, values)
    return {k: v for k, v in values.items() if k.isupper()}


def test_rewriting_changes_only_what_differs():
    values = {'LR': 0.5, 'NAME': 'a # b', 'SCALES': (0.5, 1.0), 'FLAG': False, 'N': 3,
              'OTHER': 1}
    text = config.rewrite_settings(TEXT, values)
    assert text == TEXT.replace('LR = 0.009                  #',
                                'LR = 0.5                    #').replace(
                                    'FLAG = True', 'FLAG = False')
    assert config.rewrite_settings(TEXT, {}) == TEXT
    assert config.rewrite_settings(TEXT, run(TEXT)) == TEXT


def test_rewriting_keeps_comments_and_types():
    values = {'LR': 1.0, 'NAME': "it's \"x\"\n# = \\", 'SCALES': (2.0,), 'FLAG': False,
              'N': -7}
    text = config.rewrite_settings(TEXT, values)
    assert run(text) == values
    assert type(run(text)['LR']) is float
    for comment in ('# learning rate', '# odd blanks stay', '# number', '# -- part'):
        assert text.count(comment) == 1
    assert len(text.splitlines()) == len(TEXT.splitlines())


def test_rewriting_after_letters_of_two_bytes():
    text = config.rewrite_settings("NAME = 'äöü'  # the name\n", {'NAME': 'b'})
    assert run(text) == {'NAME': 'b'} and text.endswith('# the name\n')


def test_rewriting_a_literal_over_several_lines():
    text = """A = 1  # one
WEIGHTS = (
    1.0,   # road
    2.0)   # lane
B = (3,
     4)
# -- the rest
C = 'x'  # last
"""
    for values in ({'WEIGHTS': (5.0,)}, {'WEIGHTS': (5.0,), 'B': (6,), 'C': 'y'},
                   {'A': 2, 'WEIGHTS': tuple(map(float, range(19)))}, {'B': (3, 4)}):
        changed = config.rewrite_settings(text, values)
        assert run(changed) == {**run(text), **values}
        for comment in ('# one', '# lane', '# -- the rest', '# last'):
            assert changed.count(comment) == 1, changed
    assert config.rewrite_settings(text, run(text)) == text


def comments_of(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def test_rewriting_the_real_settings():
    text = SETTINGS
    other = {}
    for name, value in run(text).items():
        other[name] = (not value if isinstance(value, bool) else value + 'x'
                       if isinstance(value, str) else value * 2
                       if isinstance(value, tuple) else value + 1)
    changed = config.rewrite_settings(text, other)
    assert run(changed) == other
    assert len(comments_of(text)) > 40
    assert comments_of(changed) == comments_of(text)
    assert run(config.rewrite_settings(changed, run(text))) == run(text)


def test_settings_text_is_of_this_run():
    assert run(config.settings_text()) == config.snapshot()
    settings.LR, settings.DATASET = 0.77, 'shapes'
    text = config.settings_text()
    assert run(text) == config.snapshot() and run(text)['LR'] == 0.77
    original = SETTINGS.splitlines()
    differ = [line for line in text.splitlines() if line not in original]
    assert [line.split()[0] for line in differ] == ['DATASET', 'LR']


# -- checks ----------------------------------------------------------------------------

def set_all(monkeypatch, **values):
    for name, value in {'CROP_SIZE': 33, **values}.items():
        monkeypatch.setattr(settings, name, value)


@pytest.mark.parametrize('name, value', [
    ('LR', -1.0), ('SEED', -1), ('DROPOUT', 2.0), ('BN_MOM', -1.0), ('MEAN', (0.5,)),
    ('STD', (0.0, 0.0, 0.0)), ('N_WORKERS', -1), ('HEAD_CHANNELS', 0),
    ('RESUME', 'yes'),
    ('MULTI_GRID', (0, 0)), ('SCALES', (0.0,)), ('LOSS_NORM', 'mean'), ('ITER_MAX', 0)])
def test_settings_out_of_range_are_refused(name, value, monkeypatch):
    monkeypatch.setattr(settings, name, value)
    with pytest.raises(UserError, match=name):
        config.check_train_settings()


@pytest.mark.parametrize('words, wrong', [
    (dict(OHEM_KEPT=0.5, OHEM_BELOW=0.7), 'OHEM_KEPT=0.5 and OHEM_BELOW=0.7'),
    (dict(OHEM_KEPT=0.5, LOSS_NORM='valid'), 'LOSS_NORM=valid'),
    (dict(OHEM_BELOW=0.7, LOSS_NORM='valid'), 'LOSS_NORM=valid'),
    (dict(OHEM_BELOW=0.7, OHEM_MIN=33 * 33), 'OHEM_MIN=1089, .* 1089 pixels'),
    (dict(OHEM_KEPT=0.5, OHEM_MIN=100000), 'OHEM_MIN=100000'),
    (dict(OHEM_KEPT=0.5, CROP_WIDTH=50, OHEM_MIN=33 * 50), '1650 pixels'),
    (dict(OHEM_KEPT=1.5), 'OHEM_KEPT=1.5'), (dict(OHEM_KEPT=-0.5), 'OHEM_KEPT=-0.5'),
    (dict(OHEM_BELOW=2.0), 'OHEM_BELOW=2.0'), (dict(OHEM_MIN=-1), 'OHEM_MIN=-1'),
    (dict(LR_END=-0.1), 'LR_END=-0.1'), (dict(AUX_WEIGHT=-0.4), 'AUX_WEIGHT=-0.4'),
    (dict(CROP_WIDTH=-1), 'CROP_WIDTH=-1'),
    (dict(CLASS_WEIGHTS=(1.0, -1.0)), 'CLASS_WEIGHTS=1.0,-1.0')])
def test_settings_of_the_loss_that_are_refused(words, wrong, monkeypatch):
    base = {'OHEM_MIN': 100} if words.keys() & {'OHEM_KEPT', 'OHEM_BELOW'} else {}
    with pytest.raises(UserError, match=wrong):
        set_all(monkeypatch, **{**base, **words})
        config.check_train_settings()


@pytest.mark.parametrize('words', [
    dict(OHEM_MIN=100000), dict(OHEM_KEPT=0.5, OHEM_MIN=33 * 33 - 1),
    dict(OHEM_BELOW=0.7, OHEM_MIN=33 * 33, CROP_WIDTH=34),
    dict(OHEM_KEPT=1.0, OHEM_MIN=0)])
def test_settings_of_the_loss_that_are_allowed(words, monkeypatch):
    set_all(monkeypatch, **words)
    config.check_train_settings()


@pytest.mark.parametrize('n_ranks, words', [(3, {}), (2, {'ACCUMULATE': 3})])
def test_the_batch_is_shared_in_equal_parts(n_ranks, words, monkeypatch):
    set_all(monkeypatch, BATCH_SIZE=4, **words)
    n = n_ranks * words.get('ACCUMULATE', 1)
    with pytest.raises(UserError, match=f'a multiple of {n}'):
        config.check_train_settings(n_ranks)


@pytest.mark.parametrize('words, part', [
    ({'EVAL_MODE': 'wide'}, r'EVAL_MODE=multi EVAL_SCALES=0\.5,0\.75'),
    ({'EVAL_MODE': 'all'}, 'none of single, multi'),
    ({'EVAL_MODE': 'multi', 'EVAL_SCALES': (0.0,)}, 'EVAL_SCALES=0.0'),
    ({'EVAL_WINDOW': (1, 2, 3)}, 'EVAL_WINDOW=1,2,3'),
    ({'EVAL_STEP': 0.0}, 'EVAL_STEP=0.0'),
    ({'EVAL_BATCH': 0}, 'EVAL_BATCH=0'), ({'EVAL_IMAGES': -1}, 'EVAL_IMAGES=-1')])
def test_settings_of_the_evaluation_that_are_refused(words, part, monkeypatch):
    set_all(monkeypatch, **words)
    with pytest.raises(UserError, match=part):
        config.eval_options()


def test_options_of_the_evaluation(monkeypatch):
    assert config.eval_options()['scales'] == (1.0,)
    set_all(monkeypatch, EVAL_MODE='multi', EVAL_SCALES=(0.5, 1.0), EVAL_WINDOW=(65,))
    options = config.eval_options()
    assert options['scales'] == (0.5, 1.0) and options['window'] == (65, 65)


# -- how a script ends -----------------------------------------------------------------

@pytest.mark.parametrize('error, status, part', [
    (UserError('a, b'), 2, 'error: a, b\n'), (ValueError('a'), 1, 'Traceback'),
    (OSError('a'), 1, 'Traceback'), (KeyboardInterrupt(), 130, '')])
def test_a_user_reads_a_sentence_and_a_fault_has_a_traceback(error, status, part,
                                                             capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        config.run(main)
    text = capsys.readouterr().err
    assert end.value.code == status and text.startswith(part)


def test_a_rank_that_lost_another_says_so(capsys, monkeypatch):
    def main():
        raise RuntimeError('[gloo/transport] Connection closed by peer')

    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(config.time, 'sleep', lambda seconds: None)
    with pytest.raises(SystemExit) as end:
        config.run(main)
    assert end.value.code == 1
    assert capsys.readouterr().err == 'error: another rank has ended\n'


@pytest.mark.parametrize('status', [None, 0, 75])
def test_the_status_of_main_is_that_of_the_script(status):
    with pytest.raises(SystemExit) as end:
        config.run(lambda: status)
    assert end.value.code == (status or 0)
