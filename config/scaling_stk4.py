# Paper 001, Table 1, column Stk x4: stacked four times.
from _scaling import *

reuse = ('stk4',)
