"""
Odd knobs, odd fields of files and damaged bytes, for every command: each case ends well, or in one
line, within ten seconds, and writes nothing outside its folder. FUZZ=10000 makes the run long.
"""

import collections
import json
import os
import queue
import subprocess
import sys
import threading

from conftest import ROOT

CASES = int(os.environ.get('FUZZ', 120))
SEED = os.environ.get('FUZZ_SEED', '0')
LIMIT = 10 * float(os.environ.get('FUZZ_SLOWNESS', 3))  # seconds; the tests' machines are busy


def lines_of(process):
    """A queue of the lines that a process prints, None at its end."""
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def run_cases(folder, first, last):
    """Yield (case, how it ended); stops after one that hangs or ends the process."""
    program = [sys.executable, ROOT / 'tests' / 'programs' / 'fuzz.py']
    command = [*program, folder, SEED, str(first), str(last)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines, case = lines_of(process), None
    try:
        while True:
            line = lines.get(timeout=LIMIT if case else 600)  # it imports torch first
            if line is None:
                if case:
                    yield case, f'died: {process.wait()}'
                return
            if not line.startswith('{"number"'):
                continue  # of a library
            found = json.loads(line)
            if 'outcome' in found:
                yield case, found['outcome']
                case = None
            else:
                case = found
    except queue.Empty:
        if case:
            yield case, 'hang'
    finally:
        process.kill()
        process.wait()


def test_nothing_surprising(tmp_path):
    kinds, number = collections.defaultdict(list), 0
    while number < CASES:
        before = number
        for case, outcome in run_cases(tmp_path, number, CASES):
            kinds[outcome].append(case)
            number = case['number'] + 1
        assert number > before, 'the fuzzer itself does not start'
    fine, one_line = len(kinds.pop('fine')), len(kinds.pop('one line'))
    first = {kind: [len(cases), cases[0]] for kind, cases in kinds.items()}
    assert not kinds, json.dumps(first, indent=1)  # every kind, with its first case
    assert fine + one_line == CASES and min(fine, one_line) > CASES / 10
