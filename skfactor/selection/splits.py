"""`WholeMatrixSplit`: fit and score on the same matrix, because it is this matrix that is stored."""
# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

__all__ = ["WholeMatrixSplit"]


class WholeMatrixSplit:
    """One split: all rows to fit and the same rows to score.

    Rows of a weight matrix are not samples of a population: they are what is stored, so size and error are those of
    the whole matrix. scikit-learn's default, `KFold(5)` without shuffling, would fit four fifths of the rows and score
    the rest; on layers stacked under each other it leaves whole layers out.

    Examples
    --------
    >>> import numpy as np
    >>> from skfactor.selection import WholeMatrixSplit
    >>> list(WholeMatrixSplit().split(np.zeros((3, 2))))
    [(array([0, 1, 2]), array([0, 1, 2]))]
    """

    def get_n_splits(self, X=None, y=None, groups=None):
        """Return 1; the arguments are ignored.

        Returns
        -------
        n_splits : int
        """
        return 1

    def split(self, X, y=None, groups=None):
        """Yield all rows twice.

        Parameters
        ----------
        X : array-like of shape (n_rows, n_columns)
        y, groups : None
            Ignored.

        Yields
        ------
        fit, score : ndarray of shape (n_rows,)
        """
        rows = np.arange(np.shape(X)[0])
        yield rows, rows.copy()

    def __repr__(self):
        return "WholeMatrixSplit()"
