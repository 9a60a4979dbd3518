"""The house: imports go down only, in no circle, and a reader finds every file."""

import ast
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


def test_imports_go_down_only():
    """From tools to methods to the foundation; and what nobody imports is a command, a tool."""
    extras = {name for name in NAMES if name.startswith('extras.')} - {'extras.chat'}
    used = set.union(*IMPORTS.values())
    for name, imports in IMPORTS.items():
        if name.startswith(('engine.', 'data.')) or name in ('model', 'configurator'):
            assert not imports & (TOOLS | METHODS | extras), name
        if name in METHODS or name in extras & used:
            assert not imports & TOOLS, name


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


def test_the_readme_names_every_file_of_the_root_and_every_folder():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    names = [path.name for path in FILES if path.parent == ROOT]
    folders = [f'{folder}/' for folder in ('config', 'data', 'engine', 'extras', 'docs', 'tests')]
    assert all(name in readme for name in names + folders)
    assert len(names) <= 11


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_functions_fit_on_a_screen_and_what_is_public_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            names = {argument.arg for argument in arguments} - {'self', 'cls', 'ctx'}
            longest = 130 if node.name == 'train_stage' else 50  # the loop is one story
            assert len(names) <= 6 and node.end_lineno - node.lineno < longest, node.name
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != '_':
            assert ast.get_docstring(node), node.name


def test_the_project_can_be_installed():
    """pyproject.toml lists the files, and ranges that hold what the tests run on."""
    content = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    setuptools = content['tool']['setuptools']
    assert sorted(setuptools['py-modules']) == [p.stem for p in FILES if p.parent == ROOT]
    assert setuptools['packages'] == [folder for folder in FOLDERS if folder]
    words = (ROOT / 'requirements.txt').read_text().split()
    tested = dict(word.split('==') for word in words if '==' in word and 'pytest' not in word)
    ranges = [Requirement(line) for line in content['project']['dependencies']]
    assert {wanted.name for wanted in ranges} == set(tested)
    assert all(wanted.specifier.contains(tested[wanted.name]) for wanted in ranges)
