"""
Corpora that need no network: `pydocs`, the docstrings of Python's library and of the packages
below; `pycode`, their source; and the functions they define, for `signatures` and `preferences`.
With PYTHON and the versions in requirements.txt they are identical on every machine.
"""

import ast
import importlib.metadata
import platform
import re
import sysconfig
import zlib
from pathlib import Path

from engine.log import progress_bar

PYTHON = '3.11.7'  # with it the corpora were made on which the docs' numbers were measured
PACKAGES = 'datasets matplotlib numpy pytest safetensors tiktoken torch tqdm'.split()
SKIPPED_FOLDERS = set(
    'test tests testing idle_test _vendor vendor vendored _vendored third_party externals extern '
    'site-packages __pycache__ lib2to3 encodings'.split()
)
# tests, and what is generated at installation
SKIPPED_FILES = re.compile(r'test_|.*_test\.py|conftest|_sysconfigdata|.*version\.py')
LICENCE = re.compile(r'copyright|licen[cs]ed? |all rights reserved|redistribution', re.IGNORECASE)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def versions():
    """The installed versions: {package: version}, and that of `python`."""
    # without a local suffix: torch's 2.1.0+cpu has the Python files of 2.1.0
    found = {name: importlib.metadata.version(name).split('+')[0] for name in PACKAGES}
    return found | dict(python=platform.python_version())


def other_versions():
    """['package version', ...] of what is not installed in the version behind the docs' corpora."""
    pinned = (Path(__file__).parent.parent / 'requirements.txt').read_text(encoding='utf-8')
    wanted = dict(re.findall(r'^([\w-]+)==(\S+)', pinned, re.MULTILINE)) | dict(python=PYTHON)
    return [f'{name} {found}' for name, found in versions().items() if wanted[name] != found]


def source_files():
    """
    [(name, path)], sorted, of the .py files of Python's library and of the packages, without tests,
    vendored copies and files generated at installation. Names are the same on every machine.
    """
    library = Path(sysconfig.get_paths()['stdlib'])
    files = {f'python/{p.relative_to(library).as_posix()}': p for p in library.rglob('*.py')}
    for name in PACKAGES:
        for file in importlib.metadata.files(name) or []:
            if file.suffix == '.py' and '..' not in file.parts:
                files[f'{name}/{file.as_posix()}'] = Path(file.locate())
    return [
        (name, path)
        for name, path in sorted(files.items())
        if not SKIPPED_FOLDERS & {*name.split('/')[1:-1]} and not SKIPPED_FILES.match(path.name)
    ]


def parse_file(path):
    """
    (source, AST nodes that have a docstring) of a file; ('', []) if it is not valid Python, as some
    installed files are not.
    """
    try:
        source = Path(path).read_text(encoding='utf-8')
        nodes = ast.walk(ast.parse(source))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return '', []
    return source, [n for n in nodes if isinstance(n, DOCUMENTED) and ast.get_docstring(n)]


def read_source(corpus, path):
    """
    The texts of one file: its docstrings (pydocs), or its code without them (pycode). Very short
    ones are left out, and docstrings about licences.
    """
    source, nodes = parse_file(path)
    if corpus == 'pydocs':
        texts = map(ast.get_docstring, nodes)
        return [text for text in texts if len(text) >= 40 and not LICENCE.search(text)]
    lines = source.split('\n')
    for node in nodes:
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno
        lines[first:last] = [None] * (last - first)  # not deleted: line numbers must stay valid
    code = '\n'.join(line.rstrip() for line in lines if line is not None)
    code = re.sub(r'\A(#.*\n|\s)*', '', code).strip()  # a file's head is mostly its licence
    return [code] if len(code) >= 200 else []


def offline_documents(options):
    """
    Yield (text, is_val) of pydocs or pycode, split by file. Validation comes first, so that
    duplicates of its texts are removed from training, not the other way round.
    """
    files = [(options.holds_out(name), path) for name, path in source_files()]
    files.sort(key=lambda file: not file[0])
    seen = set()
    for is_val, path in progress_bar(files, desc=f'reading {options.corpus}', unit='file'):
        for text in read_source(options.corpus, path):
            if is_new(text, seen):
                yield text, is_val


def is_new(text, seen):
    """
    Whether at most a third of a text's runs of 8 words are in `seen`, a set of their CRCs; if so,
    adds them to it. This removes copies and boilerplate, and keeps validation out of training.
    """
    words = re.sub(r'[\W\d_]+', ' ', text.lower()).encode().split()
    starts = range(max(1, len(words) - 7))
    runs = {zlib.crc32(b' '.join(words[i : i + 8])) for i in starts}
    if 3 * len(runs & seen) > len(runs):
        return False
    seen |= runs
    return True


def signatures():
    """
    Yield (name of the file, signature, first line of the docstring) of functions: each line once,
    if it has 15 to 80 characters and the signature at most 80.
    """
    seen = set()
    for name, path in progress_bar(source_files(), desc='reading signatures', unit='file'):
        for node in parse_file(path)[1]:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            line = ast.get_docstring(node).strip().split('\n')[0].strip()
            signature = f'{node.name}({ast.unparse(node.args)})'
            if 15 <= len(line) <= 80 and len(signature) <= 80 and line not in seen:
                seen.add(line)
                yield name, signature, line
