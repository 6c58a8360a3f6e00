"""settings.py and recipes.py hold literals; and the house rules: imports, sizes, ends.
"""
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import config
import recipes

ROOT = Path(__file__).parents[1]
FOLDERS = ('conversion', 'training', 'evaluation', 'prediction', 'preparation',
           'measurement', 'ablation')
FILES = {str(path.relative_to(ROOT).with_suffix('')).replace('/', '.'): path
         for folder in ('.', *FOLDERS) for path in sorted((ROOT / folder).glob('*.py'))}
VERBS = {'prepare', 'train', 'eval', 'predict', 'measure', 'ablate'}
# The folders that hold the parts of verbs, and who may import from them.
PARTS = {'conversion': {'checkpoint'}, 'training': {'train'}, 'evaluation': {'eval'},
         'prediction': {'predict', 'eval'}, 'preparation': {'prepare'},
         'measurement': {'measure'}, 'ablation': {'ablate'}}
NO_SETTINGS = {'losses', 'metrics', 'inference', 'drawing', 'backbone', 'emau'}
# Packages that take long to import, or that not everybody has.
LOCAL_IMPORTS = {'matplotlib', 'scipy', 'onnx', 'onnxruntime', 'onnxscript',
                 'pycocotools', 'timm', 'tensorboard', 'torchvision'}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MAX_LINES, MAX_FUNCTION, MAX_BRANCHES = 400, 60, 12
MAX_COLUMNS = 88


def parse(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


# -- settings.py and recipes.py --------------------------------------------------------

def test_settings_py_holds_literals_only():
    body, names = parse('settings').body, []
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value.value, str)
    for node in body[1:]:
        assert isinstance(node, ast.Assign) and len(node.targets) == 1
        name, value = node.targets[0].id, ast.literal_eval(node.value)
        assert re.fullmatch('[A-Z][A-Z0-9_]*', name)
        assert type(value) in (int, float, bool, str, tuple), name
        if isinstance(value, tuple):
            assert value and {type(v) for v in value} in ({int}, {float}), name
        names.append(name)
    assert len(names) == len(set(names)) > 40
    assert names == list(config.snapshot())
    assert set(config.RESUME_IGNORED) <= set(names)


def test_recipes_hold_known_settings():
    assert {'demo', 'voc_r101', 'voc_r50'} <= set(recipes.RECIPES)
    defaults = config.snapshot()
    for name, recipe in recipes.RECIPES.items():
        assert recipe['about'] and isinstance(recipe['about'], str), name
        assert set(recipe) <= {'about', 'mIoU', 'mIoU_ms', 'settings'}, name
        for key, value in recipe['settings'].items():
            assert key in defaults and key != 'RECIPE', (name, key)
            assert type(value) is type(defaults[key]), (name, key)
            if isinstance(value, tuple):
                assert {type(v) for v in value} == {type(defaults[key][0])}, (name, key)


def find_reads(node: ast.AST) -> list[ast.Attribute]:
    """Return the reads of settings.NAME; `s` is their short name in some functions."""
    return [n for n in ast.walk(node) if isinstance(n, ast.Attribute)
            and isinstance(n.value, ast.Name) and n.value.id in ('settings', 's')
            and n.attr.isupper()]


def test_every_setting_is_read_and_every_one_that_is_read_is_there():
    reads = {node.attr for name in FILES for node in find_reads(parse(name))}
    assert reads <= set(config.snapshot())
    assert set(config.snapshot()) - reads <= {'RECIPE'}  # apply_settings takes that one


@pytest.mark.parametrize('name', list(FILES))
def test_settings_are_read_late(name):
    """Not when a file is imported: the command line has not been read then."""
    nodes = [parse(name)]
    while nodes:
        node = nodes.pop()
        early = list(ast.iter_child_nodes(node))
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            early = [*node.args.defaults, *filter(None, node.args.kw_defaults),
                     *getattr(node, 'decorator_list', [])]
        nodes += early
        assert not (isinstance(node, ast.Attribute) and node.attr.isupper()
                    and find_reads(node)), f'{name}:{node.lineno}'


# -- imports ---------------------------------------------------------------------------

def find_imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Yield each import of a file and the full name of the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, 'a flat folder has no relative imports'
            for alias in node.names:
                full = f'{node.module}.{alias.name}'
                yield node, full if full in FILES else node.module


def find_ours(name: str) -> set[str]:
    """Return the files of this project that one of them imports."""
    return {module for _, module in find_imports(parse(name)) if module in FILES}


@pytest.mark.parametrize('name', list(FILES))
def test_imports_run_one_way(name):
    folder = name.partition('.')[0] if '.' in name else ''
    for module in find_ours(name):
        if module in VERBS:
            assert (name == 'measure' or folder == 'measurement') and module == 'train'
        part = module.partition('.')[0] if '.' in module else ''
        if part and part != folder:
            assert name in PARTS[part] or (part, folder) == ('evaluation', 'prediction'
                                                             ), module
    if name in NO_SETTINGS:
        assert 'settings' not in find_ours(name)


@pytest.mark.parametrize('name, allowed', [
    ('settings', set()), ('recipes', set()), ('config', {'settings', 'recipes'}),
    ('backbone', set()), ('heads', {'backbone', 'emau', 'losses'}),
    ('emau', set()), ('losses', set()), ('metrics', set()),
    ('network', {'backbone', 'emau', 'heads', 'losses', 'settings', 'config'})])
def test_imports_of_the_nouns(name, allowed):
    assert find_ours(name) <= allowed


def test_the_unit_needs_torch_alone():
    modules = {module.partition('.')[0] for _, module in find_imports(parse('emau'))}
    assert modules - sys.stdlib_module_names == {'torch'}
    assert not [*find_imports(parse('settings')), *find_imports(parse('recipes'))]


@pytest.mark.parametrize('name', list(FILES))
def test_imports_stand_in_one_block_at_the_top(name):
    tree = parse(name)
    top = [isinstance(node, (ast.Import, ast.ImportFrom)) or is_optional(node)
           for node in tree.body[1:]]  # [0] is the docstring
    assert ast.get_docstring(tree), 'a file says what it owns'
    assert sorted(top, reverse=True) == top
    at_top = {id(node) for statement, is_import in zip(tree.body[1:], top, strict=True)
              if is_import for node in ast.walk(statement)}
    for node, module in find_imports(tree):
        assert id(node) in at_top or module.partition('.')[0] in LOCAL_IMPORTS, (
            f'{name}:{node.lineno}')


def is_optional(node: ast.stmt) -> bool:
    """Return whether a statement is `try: import ... except ImportError: ...`."""
    return isinstance(node, ast.Try) and isinstance(node.body[0],
                                                    (ast.Import, ast.ImportFrom))


# -- sizes and ends --------------------------------------------------------------------

def count_branches(function: ast.AST) -> int:
    """Count the branches of a function, those of functions inside of it included.

    One for each if, elif, for, while, except, conditional expression, case of a match,
    `if` of a comprehension, and for each `and` or `or` chain.
    """
    one_each = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.BoolOp, ast.IfExp,
                ast.match_case)
    nodes = list(ast.walk(function))
    n_comprehension_ifs = sum(len(node.ifs) for node in nodes
                              if isinstance(node, ast.comprehension))
    return sum(isinstance(node, one_each) for node in nodes) + n_comprehension_ifs


@pytest.mark.parametrize('name', list(FILES))
def test_files_and_functions_are_small(name):
    lines = FILES[name].read_text().splitlines()
    too_large = []
    if len(lines) > MAX_LINES:
        too_large.append(f'{name} has {len(lines)} lines')
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            too_large.append(f'{name}:{number} has {len(line)} columns')
    for node in ast.walk(parse(name)):
        if isinstance(node, FUNCTIONS):
            n_lines = node.end_lineno - node.lineno + 1
            n_branches = count_branches(node)
            if n_lines > MAX_FUNCTION or n_branches > MAX_BRANCHES:
                too_large.append(f'{name}.{node.name} has {n_lines} lines and '
                                 f'{n_branches} branches')
    assert not too_large


@pytest.mark.parametrize('name', sorted(VERBS))
def test_every_script_ends_alike(name):
    end = "if __name__ == '__main__':\n    config.run(main)\n"
    assert FILES[name].read_text().endswith('\n\n\n' + end)
