"""What a compression stored: a table of the tensors of a result or of a file, and the difference of two files.

Every size is a number of bytes that a file really has, or would have: the bytes of the tensors and of the overhead
(header, index, metadata) sum to the size of the file exactly. Nothing here changes what it reports on.
"""
# SPDX-License-Identifier: BSD-3-Clause

from skfactor.report.comparison import Comparison, TensorComparison, compare
from skfactor.report.execution import FACTORIZED, REMOVED, LayerExecution, NetworkCost
from skfactor.report.files import is_skf, naming_file
from skfactor.report.rows import TensorReport
from skfactor.report.summary import Report

__all__ = ["FACTORIZED", "REMOVED", "Comparison", "LayerExecution", "NetworkCost", "Report", "TensorComparison",
           "TensorReport", "compare", "is_skf", "naming_file"]
