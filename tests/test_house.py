"""The house: imports go down only, in no circle, and a reader finds every file in the map."""

import ast
import re
import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

FOLDERS = ('', 'data', 'engine', 'extras')
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob('*.py'))]
TOOLS = {'train', 'sample', 'evaluate', 'bench'}
METHODS = {'expand', 'inheritune', 'let', 'col', 'scaling'}


def name_of(path):
    """engine/stage.py -> engine.stage"""
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


NAMES = {name_of(path): path for path in FILES}


def imports_of(path):
    """The project's own modules that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return found & NAMES.keys()


IMPORTS = {name: imports_of(path) for name, path in NAMES.items()}


def test_the_foundation_imports_no_method_and_no_tool():
    for name, imports in IMPORTS.items():
        if name.startswith(('engine.', 'data.')) or name in ('model', 'configurator'):
            extras = {i for i in imports if i.startswith('extras.')} - {'extras.chat'}
            above = imports & (TOOLS | METHODS) | extras
            assert not above, f'{name} imports {above}'


def test_methods_and_extras_import_no_tool():
    used = set.union(*IMPORTS.values())  # what nobody imports is a command, and a tool itself
    for name, imports in IMPORTS.items():
        if name in METHODS or name.startswith('extras.') and name in used:
            assert not imports & TOOLS, f'{name} imports {imports & TOOLS}'


def test_no_circle():
    done = set()

    def visit(name, path):
        assert name not in path, ' -> '.join([*path, name])
        if name not in done:
            for imported in IMPORTS[name]:
                visit(imported, [*path, name])
            done.add(name)

    for name in NAMES:
        visit(name, [])


def test_every_file_is_in_the_readmes_map():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    for path in ROOT.glob('*.py'):
        assert re.search(rf'^ *{path.name}\b', readme, re.MULTILINE), path.name
    for folder in ('config', 'data', 'engine', 'extras', 'docs', 'tests'):
        assert re.search(rf'^ *{folder}/', readme, re.MULTILINE), folder
    assert len(list(ROOT.glob('*.py'))) <= 11


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_functions_fit_on_a_screen_and_take_six_parameters_at_most(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            names = [argument.arg for argument in arguments]
            assert len([name for name in names if name not in ('self', 'cls', 'ctx')]) <= 6, (
                node.name
            )
            longest = 130 if node.name == 'train_stage' else 50  # the loop is one story
            assert node.end_lineno - node.lineno < longest, node.name


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_what_is_public_has_a_docstring(path):
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != '_':
            assert ast.get_docstring(node), node.name


def test_the_project_can_be_installed():
    """pyproject.toml lists the files, and ranges that hold what the tests run on."""
    with open(ROOT / 'pyproject.toml', 'rb') as file:
        content = tomllib.load(file)
    modules = content['tool']['setuptools']['py-modules']
    assert sorted(modules) == sorted(path.stem for path in FILES if path.parent == ROOT)
    assert content['tool']['setuptools']['packages'] == [folder for folder in FOLDERS if folder]
    words = (ROOT / 'requirements.txt').read_text().split()
    tested = dict(word.split('==') for word in words if '==' in word and 'pytest' not in word)
    ranges = [Requirement(line) for line in content['project']['dependencies']]
    assert {wanted.name for wanted in ranges} == set(tested)
    for wanted in ranges:
        assert wanted.specifier.contains(tested[wanted.name])
