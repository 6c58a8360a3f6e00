"""settings.py, the words that override it, the recipes, and who imports whom."""
import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import recipes
import runtime
import settings

HERE = Path(__file__).parents[1]
SOURCES = {path.stem: path for folder in ('.', *runtime.ROOMS)
           for path in sorted((HERE / folder).glob('*.py'))}
VERBS = {'prepare', 'train', 'eval', 'measure', 'predict', 'ablate'}
MAY_IMPORT = {  # DESIGN.md, "Rooms"
    'settings': set(), 'recipes': set(), 'shapes': set(), 'metric': set(),
    'inference': set(), 'drawing': set(), 'backbone': set(), 'heads': {'backbone'},
    'network': {'backbone', 'heads', 'metric', 'settings'},
    'masks': {'recipes'}, 'sources': {'masks', 'runtime'},
    'check': {'dataset', 'drawing', 'runtime', 'settings'},
    'deploy': {'inference'}, 'pictures': {'dataset', 'drawing'},
    'results': {'drawing', 'pictures'},
    'cost': {'dataset', 'network', 'runtime', 'settings', 'tables'},
    'tables': {'manners', 'settings'},
    # A verb is never imported; but what times the step of train.py needs it, and a
    # copy of it would be another step.
    'manners': {'checkpoint', 'dataset', 'inference', 'metric', 'network', 'runtime',
                'settings', 'train'},
    'sides': {'cost', 'dataset', 'inference', 'manners', 'runtime'},
    'speed': {'dataset', 'inference', 'manners', 'network', 'runtime', 'settings',
              'sides'},
    'checkpoint': {'recipes', 'runtime', 'settings'},
    'experiments': set(), 'running': {'runtime'},
    'report': {'drawing', 'experiments', 'runtime'},
    **dict.fromkeys(('dataset', 'runtime'), {'settings', 'recipes'})}


def parse(name):
    return ast.parse(SOURCES[name].read_text())


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
    found = runtime.parse_value('NAME', text, default)
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
    with pytest.raises(ValueError) as caught:
        runtime.parse_value('NAME', text, default)
    message = str(caught.value)
    assert message.startswith(f'NAME={text}: {expected}')
    assert f'NAME={runtime.show_value(default)}' in message


def test_values_are_shown_as_they_are_typed():
    for name, value in runtime.snapshot().items():
        assert runtime.parse_value(name, runtime.show_value(value), value) == value
    assert runtime.show_value(True) == 'true'
    assert runtime.show_value((1, 2)) == '1,2'


# -- words -----------------------------------------------------------------------------

def test_words_set_settings():
    given = runtime.override(['LR=0.02', 'N_LAYERS=50', 'SCALES=1,2', 'USE_FLIP=0',
                              'DATA_ROOT=/a=b/c', 'LR=0.03'])
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
    given = runtime.override(words)
    assert given == {'RECIPE': 'demo', 'LR': 0.123, 'N_BASES': 7}
    assert (settings.RECIPE, settings.LR, settings.N_BASES) == ('demo', 0.123, 7)
    for name in set(demo) - {'LR', 'N_BASES'}:
        assert getattr(settings, name) == demo[name]


def test_a_recipe_in_settings_py():
    settings.RECIPE = 'demo'
    assert runtime.override(['LR=0.123']) == {'LR': 0.123}
    assert settings.DATASET == 'shapes' and settings.LR == 0.123
    assert runtime.override([]) == {}


def test_a_recipe_in_settings_py_gives_way_to_the_words():
    settings.RECIPE = 'demo'
    before = settings.DATASET
    runtime.override(['RECIPE='])
    assert settings.RECIPE == '' and settings.DATASET == before
    settings.RECIPE = 'demo'
    runtime.override(['RECIPE=voc_r50'])
    assert settings.RECIPE == 'voc_r50' and settings.DATASET == 'voc'
    assert settings.N_LAYERS == 50 and settings.STEM == 'auto'


@pytest.mark.parametrize('word, parts', [
    ('BATCHSIZE=4', ['no setting BATCHSIZE', 'did you mean BATCH_SIZE?']),
    ('batch_size=4', ['no setting batch_size', 'did you mean BATCH_SIZE?']),
    ('STAGENUM=4', ['did you mean STAGE_NUM?']),
    ('QQQQ=4', ['no setting QQQQ', '--help lists every setting']),
    ('RECIPE=vocr50', ['no recipe vocr50', 'did you mean voc_r50?']),
    ('RECIPE=zzzzzz', ['no recipe zzzzzz', '--help lists every recipe']),
    ('LR', ["'LR'", 'NAME=VALUE']), ('=3', ['no setting']),
    ('__name__=x', ['no setting __name__']),
    ('LR=fast', ['LR=fast: a number is expected'])])
def test_wrong_words(word, parts):
    before = runtime.snapshot()
    with pytest.raises(ValueError) as caught:
        runtime.override([word])
    for part in parts:
        assert part in str(caught.value)
    assert runtime.snapshot() == before


def test_a_wrong_word_ends_the_script_with_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['x.py', 'BATCHSIZE=4'])
    with pytest.raises(SystemExit) as caught:
        runtime.read_command_line('About.')
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith('error: there is no setting') and error.count('\n') == 1


def test_options_and_words_may_mix(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['x.py', 'N_BASES=7', '--pictures', '3', 'LR=0.5'])
    args = runtime.read_command_line(
        'About.', lambda parser: parser.add_argument('--pictures', type=int))
    assert args.pictures == 3 and args.given == {'N_BASES': 7, 'LR': 0.5}


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
    text = runtime.rewrite_settings(TEXT, values)
    assert text == TEXT.replace('LR = 0.009                  #',
                                'LR = 0.5                    #').replace(
                                    'FLAG = True', 'FLAG = False')
    assert runtime.rewrite_settings(TEXT, {}) == TEXT
    assert runtime.rewrite_settings(TEXT, run(TEXT)) == TEXT


def test_rewriting_keeps_comments_and_types():
    values = {'LR': 1.0, 'NAME': "it's \"x\"\n# = \\", 'SCALES': (2.0,), 'FLAG': False,
              'N': -7}
    text = runtime.rewrite_settings(TEXT, values)
    assert run(text) == values
    assert type(run(text)['LR']) is float
    for comment in ('# learning rate', '# odd blanks stay', '# number', '# -- part'):
        assert text.count(comment) == 1
    assert len(text.splitlines()) == len(TEXT.splitlines())


def test_rewriting_after_letters_of_two_bytes():
    text = runtime.rewrite_settings("NAME = 'äöü'  # the name\n", {'NAME': 'b'})
    assert run(text) == {'NAME': 'b'} and text.endswith('# the name\n')


def comments_of(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def test_rewriting_the_real_settings():
    text = SOURCES['settings'].read_text()
    other = {}
    for name, value in run(text).items():
        other[name] = (not value if isinstance(value, bool) else value + 'x'
                       if isinstance(value, str) else value * 2
                       if isinstance(value, tuple) else value + 1)
    changed = runtime.rewrite_settings(text, other)
    assert run(changed) == other
    assert len(comments_of(text)) > 40
    assert comments_of(changed) == comments_of(text)
    assert run(runtime.rewrite_settings(changed, run(text))) == run(text)


def test_settings_text_is_of_this_run():
    assert run(runtime.settings_text()) == runtime.snapshot()
    settings.LR, settings.DATASET = 0.77, 'shapes'
    text = runtime.settings_text()
    assert run(text) == runtime.snapshot() and run(text)['LR'] == 0.77
    original = SOURCES['settings'].read_text().splitlines()
    differ = [line for line in text.splitlines() if line not in original]
    assert [line.split()[0] for line in differ] == ['DATASET', 'LR']


# -- the files themselves --------------------------------------------------------------

def test_settings_py_holds_literals_only():
    body, names = parse('settings').body, []
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value.value, str)
    for node in body[1:]:
        assert isinstance(node, ast.Assign) and len(node.targets) == 1
        name, value = node.targets[0].id, ast.literal_eval(node.value)
        assert re.fullmatch('[A-Z][A-Z0-9_]*', name)
        assert node.lineno == node.end_lineno
        assert type(value) in (int, float, bool, str, tuple), name
        if isinstance(value, tuple):
            assert value and {type(v) for v in value} in ({int}, {float}), name
        names.append(name)
    assert len(names) == len(set(names)) > 40
    assert names == list(runtime.snapshot())


def test_recipes_hold_known_settings():
    assert {'demo', 'voc_r101', 'voc_r50'} <= set(recipes.RECIPES)
    defaults = runtime.snapshot()
    for name, recipe in recipes.RECIPES.items():
        assert recipe['about'] and isinstance(recipe['about'], str), name
        assert recipe['settings'], name
        for key, value in recipe['settings'].items():
            assert key in defaults and key != 'RECIPE', (name, key)
            assert type(value) is type(defaults[key]), (name, key)
            if isinstance(value, tuple):
                assert {type(v) for v in value} == {type(defaults[key][0])}, (name, key)
            json.dumps(value)  # plain literals
    assert not imports_of(parse('recipes'))


def test_free_settings_are_settings():
    assert set(runtime.FREE) <= set(runtime.snapshot())


def imports_of(tree):
    """All modules imported anywhere in a file, as first names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split('.')[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, 'a flat folder has no relative imports'
            first, _, second = node.module.partition('.')
            if first in runtime.ROOMS:
                found |= {second} if second else {alias.name for alias in node.names}
            found.add(first)
    return found


@pytest.mark.parametrize('name', list(SOURCES))
def test_imports_follow_the_rooms(name):
    ours = imports_of(parse(name)) & set(SOURCES)
    if name in VERBS:
        assert not ours & VERBS
    else:
        assert name in MAY_IMPORT, f'{name}.py is no room of DESIGN.md'
        assert ours <= MAY_IMPORT[name]


def test_the_folder_is_small():
    assert len([*HERE.glob('*.py')]) <= 17


def reads_of_settings(node):
    return [n for n in ast.walk(node) if isinstance(n, ast.Attribute)
            and isinstance(n.value, ast.Name) and n.value.id == 'settings']


def frozen_reads(tree):
    """Lines that read settings when the file is imported: outside of any function."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    found, queue = [], [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, functions):
            queue += [d for d in (*node.args.defaults, *node.args.kw_defaults) if d]
            queue += getattr(node, 'decorator_list', [])
            inside = node.body if isinstance(node.body, list) else [node.body]
            for part in inside:  # defaults inside of functions are frozen as well
                queue += [n for n in ast.walk(part) if isinstance(n, functions)]
        elif isinstance(node, ast.Attribute) and reads_of_settings(node):
            found.append(node.lineno)
        else:
            queue += ast.iter_child_nodes(node)
    return found


def test_frozen_reads_are_seen():
    code = '''
A = settings.A
def f(a=settings.B, *, b=settings.C): return settings.OK
@wrap(settings.D)
class K:
    x = settings.E
    @wrap(settings.F)
    def g(self):
        def h(a=settings.G): pass
        return settings.OK
k = lambda a=settings.H: settings.OK
'''
    lines = [i for i, line in enumerate(code.splitlines(), 1)
             for _ in re.findall(r'settings\.[A-H]', line)]
    assert sorted(set(frozen_reads(ast.parse(code)))) == sorted(set(lines))


@pytest.mark.parametrize('name', list(SOURCES))
def test_settings_are_read_late(name):
    tree = parse(name)
    assert not frozen_reads(tree)
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)
                and n.module == 'settings']


def test_network_reads_settings_in_build_only():
    for node in parse('network').body:
        if getattr(node, 'name', '') in ('build', 'build_head'):
            assert reads_of_settings(node)
        else:
            assert not reads_of_settings(node)


@pytest.mark.parametrize('name', list(SOURCES))
def test_settings_that_are_read_are_there(name):
    for node in reads_of_settings(parse(name)):
        assert node.attr in runtime.snapshot(), f'{name}.py:{node.lineno}'


def test_every_setting_is_read():
    read = {node.attr for name in SOURCES for node in reads_of_settings(parse(name))}
    assert not set(runtime.snapshot()) - read - {'RECIPE'}  # apply() takes that one


@pytest.mark.parametrize('name', ['train', 'eval', 'ablate'])
def test_help_answers_without_torch(name):
    code = f'''
import runpy, sys
sys.argv = ['{name}.py', '--help']
try:
    runpy.run_path('{name}.py', run_name='__main__')
except SystemExit as end:
    print('status', end.code, 'torch' in sys.modules)
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=HERE, text=True,
                          capture_output=True, timeout=100)
    assert done.stdout.splitlines()[-1:] == ['status 0 False'], done.stderr
    for line in ('BATCH_SIZE = 16', 'RECIPE=demo', f'python {name}.py'):
        assert line in done.stdout
