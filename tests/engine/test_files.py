"""Files are written whole, or not at all."""

import os

import pytest

import engine.files
from engine.errors import UserError
from engine.files import write_atomically
from model import GPT, GPTConfig


def test_write_atomically_leaves_nothing_else(tmp_path, monkeypatch):
    write_atomically(tmp_path / 'a.txt', 'old')
    write_atomically(tmp_path / 'a.txt', 'new')
    with pytest.raises(UserError, match='not Unicode'):
        write_atomically(tmp_path / 'a.txt', 'an argument of odd bytes: \udcff')
    assert [path.name for path in tmp_path.iterdir()] == ['a.txt']
    monkeypatch.setattr(engine.files, 'commit_file', lambda temporary, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the plug is pulled before the rename
        write_atomically(tmp_path / 'a.txt', 'newer')
    assert (tmp_path / 'a.txt').read_text() == 'new'


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    """/dev/null, as a pipe stands for it here, is not replaced by a file."""
    os.mkfifo(tmp_path / 'pipe')
    reader = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / 'pipe', 'text')
    assert os.read(reader, 10) == b'text' and (tmp_path / 'pipe').is_fifo()
    os.close(reader)


@pytest.mark.parametrize('umask', [0o022, 0o027])
def test_files_may_be_read_by_those_the_umask_allows(tmp_path, umask):
    before = os.umask(umask)
    GPT(GPTConfig.named('16x1', vocab_size=257)).save(tmp_path / 'm', 'bytes')
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / 'm').iterdir()} == {0o666 & ~umask}
