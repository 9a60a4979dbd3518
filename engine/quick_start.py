"""
Programs that start quickly. Importing torch takes seconds; they import this file before it.
Printing the help needs nothing of torch: a program that is asked for its help imports a stand-in.
Otherwise nothing of what is imported is garbage, and looking for some takes a quarter of the time:
the collector rests until run_as_program.
"""

import gc
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


class Anything(type):
    """A class in place of whatever torch has under its name: a base class, decorator or dtype."""

    def __getattr__(cls, name):
        return stand_in(name)

    def __call__(cls, *args, **kwargs):
        return cls


def stand_in(name):
    """Anything of this name. What Python itself looks for (__wrapped__, ...) it has not."""
    if name.startswith('__'):
        raise AttributeError(name)
    return Anything(name, (), {})


class StandIns:
    """Finds and loads a module of stand-ins for torch and everything in it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The spec of a stand-in for torch and torch.*; None for all else."""
        if name.partition('.')[0] == 'torch':
            return ModuleSpec(name, StandIns, is_package=True)

    @staticmethod
    def create_module(spec):
        """An empty module that has any attribute."""
        module = ModuleType(spec.name)
        module.__getattr__ = stand_in
        return module

    @staticmethod
    def exec_module(module):
        """Nothing to run."""


# not another program that imports us, nor python -c, nor a pool's worker, whose main module has no
# file yet: they never reach run_as_program
program = Path(getattr(sys.modules['__main__'], '__file__', '')).resolve()
ours = program.is_file() and program.parent in (ROOT, ROOT / 'data', ROOT / 'extras')
if ours:
    gc.disable()
    if {'-h', '--help'} & set(sys.argv[1:]):
        sys.meta_path.insert(0, StandIns)
