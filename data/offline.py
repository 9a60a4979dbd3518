"""
Corpora that need no network: `pydocs`, the documentation of Python and of the packages this
project depends on, `pycode`, their source, and the functions they define, for `signatures`.
They are the same wherever the same packages are installed.
"""

import ast
import importlib.metadata
import inspect
import re
import sysconfig
import zlib
from collections import deque
from pathlib import Path

from engine.progress import progress_bar

ROOT = Path(__file__).resolve().parent.parent
SKIPPED_FOLDERS = set(
    'test tests testing idle_test _vendor vendor vendored _vendored third_party externals extern '
    'site-packages __pycache__ lib2to3 encodings'.split()
)
LICENCE = re.compile(r'copyright|licen[cs]ed? |all rights reserved|redistribution', re.IGNORECASE)


def project_packages():
    """Names of the packages in requirements.txt and of those they require in turn, sorted."""

    def name_of(requirement):
        return re.match(r'[A-Za-z0-9._-]+', requirement)[0].lower().replace('_', '-')

    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    lines = [line.split('#')[0].strip() for line in lines]
    found, queue = set(), deque(name_of(line) for line in lines if line)
    while queue:
        name = queue.popleft()
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            queue.extend(name_of(r) for r in wanted if 'extra ==' not in r)
    return sorted(found)


def source_files():
    """
    [(name that is the same on every machine, path)] of the .py files of Python's library and of
    the packages, without tests and vendored copies.
    """
    library = Path(sysconfig.get_paths()['stdlib'])
    files = {f'python/{p.relative_to(library).as_posix()}': p for p in library.rglob('*.py')}
    for name in project_packages():
        for file in importlib.metadata.files(name) or []:
            if file.suffix == '.py' and '..' not in file.parts:
                files[f'{name}/{file.as_posix()}'] = Path(file.locate())
    return [(name, path) for name, path in sorted(files.items()) if is_used(name, path)]


def is_used(name, path):
    """Whether a source file is neither a test nor a vendored copy."""
    folders = set(Path(name).parts[1:-1])
    return not folders & SKIPPED_FOLDERS and not re.match(r'test_|.*_test\.py|conftest', path.name)


def docstrings(tree):
    """(node, text) of the docstrings of a module and everything defined in it, in order."""
    body = tree.body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        if isinstance(body[0].value.value, str):
            yield body[0], body[0].value.value
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(node)


def parse_file(path):
    """(source, syntax tree) of a file, or None: not every installed file is valid Python."""
    try:
        source = Path(path).read_text(encoding='utf-8')
        return source, ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None


def read_source(corpus, path):
    """The texts of one file: its docstrings (pydocs), or its code (pycode)."""
    parsed = parse_file(path)
    if parsed is None:
        return []
    source, tree = parsed
    if corpus == 'pydocs':
        texts = [inspect.cleandoc(text) for _, text in docstrings(tree)]
        if Path(path).parts[-2:] == ('pydoc_data', 'topics.py'):  # help('yield'): prose in a dict
            constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            texts += [value for value in constants if isinstance(value, str)]
        return [text for text in texts if len(text) >= 40 and not LICENCE.search(text)]
    lines = source.split('\n')
    for node, _ in docstrings(tree):
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    code = '\n'.join(line.rstrip() for line in lines if line is not None)
    header = re.match(r'(?:#[^\n]*\n|\s)*', code)[0]
    if LICENCE.search(header):
        code = code[len(header) :]
    code = code.strip()
    return [code] if len(code) >= 200 else []


def is_held_out(text, fraction):
    """Whether a text belongs to the validation split: by a hash, the same everywhere."""
    return zlib.crc32(text.encode('utf-8', 'replace')) < fraction * 2**32  # lone surrogates


def offline_documents(options):
    """Yield (text, is_validation) of pydocs or pycode, validation first; split by file."""
    files = [(is_held_out(name, options.val_fraction), path) for name, path in source_files()]
    files.sort(key=lambda file: not file[0])
    seen = set()
    for is_val, path in progress_bar(files, desc=f'reading {options.corpus}', unit='file'):
        for text in read_source(options.corpus, path):
            if is_new(text, seen):
                yield text, is_val


def is_new(text, seen):
    """
    Whether at most a third of a text was seen before, by its runs of 8 words, which are added to
    `seen`: copies and boilerplate go, and nothing of the validation split returns in training.
    """
    words = re.sub(r'[\W\d_]+', ' ', text.lower()).encode().split()
    starts = range(max(1, len(words) - 7))
    runs = {zlib.crc32(b' '.join(words[i : i + 8])) for i in starts}
    if 3 * len(runs & seen) > len(runs):
        return False
    seen |= runs
    return True


def signatures():
    """Yield (source name, signature, first line of its documentation) of functions."""
    seen = set()
    for name, path in progress_bar(source_files(), desc='reading signatures', unit='file'):
        parsed = parse_file(path)
        if parsed is None:
            continue
        for node in ast.walk(parsed[1]):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            text = ast.get_docstring(node) if is_function else None
            if not text:
                continue
            line = text.strip().split('\n')[0].strip()
            signature = f'{node.name}({ast.unparse(node.args)})'
            if 15 <= len(line) <= 80 and len(signature) <= 80 and line not in seen:
                seen.add(line)
                yield name, signature, line
