# Paper 001, Table 1, column Stk (sta): stacked from the stable phase.
from _scaling import *

reuse = ('stk2+stable',)
