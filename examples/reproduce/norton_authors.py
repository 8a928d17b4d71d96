# SPDX-License-Identifier: BSD-3-Clause
"""What NORTON's published code computes, written anew in plain NumPy and torch: the comparator of norton_cifar10.py.

Pham, Zniyed, Nguyen, "Efficient tensor decomposition-based filter pruning" (IEEE TNNLS 2024, hal-04475167), code at
github.com/pvti/NORTON: a CP decomposition of every filter from a random start, three convolutions in the place of one,
filters selected by the 'pabs' criterion, and a smaller network whose batch normalisations start afresh. Nothing of
skfactor is used here, so that it can serve as a second source.
"""

import numpy as np
import torch
import torch.nn.functional as F
from networks import VGG, DenseNet, ResNet
from torch import nn

#: Settings of the published decomposition: TensorLy's `parafac` with its default tolerance.
MAX_ITER, TOL = 300, 1e-8


class CPConv2d(nn.Module):
    """NORTON's block: 1 x 1 to R·N channels (r-major), (kh, 1) and (1, kw) depthwise, sum over r, bias.

    With `composed` the three kernels are multiplied out first and one dense convolution runs: the same function and the
    same gradients of the same parameters, and on a CPU several times faster to train.
    """

    def __init__(self, c_in, c_out, rank, kernel_size=3, stride=1, padding=1, bias=False):
        super().__init__()
        z = rank * c_out
        self.rank, self.stride, self.padding, self.composed = rank, stride, padding, False
        self.in_channels, self.out_channels = c_in, c_out
        self.head = nn.Conv2d(c_in, z, 1, bias=False)
        self.body = nn.Conv2d(z, z, (kernel_size, 1), (stride, 1), (padding, 0), groups=z, bias=False)
        self.tail = nn.Conv2d(z, z, (1, kernel_size), (1, stride), (0, padding), groups=z, bias=False)
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None

    @property
    def weight(self):
        """Dense weight (c_out, c_in, kh, kw)."""
        A, B, C = self.factors()
        return torch.einsum("rni,rna,rnb->niab", A, B, C)

    def factors(self):
        """A (R, N, c_in), B (R, N, kh) and C (R, N, kw)."""
        shape = self.rank, self.out_channels, -1
        return self.head.weight.reshape(shape), self.body.weight.reshape(shape), self.tail.weight.reshape(shape)

    @torch.no_grad()
    def set_factors(self, A, B, C):
        for conv, values in zip((self.head, self.body, self.tail), (A, B, C), strict=True):
            conv.weight.copy_(torch.as_tensor(np.ascontiguousarray(values)).reshape(conv.weight.shape))

    def forward(self, x):
        if self.composed:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        y = self.tail(self.body(self.head(x)))
        y = y.view(len(y), self.rank, self.out_channels, *y.shape[2:]).sum(1)
        return y if self.bias is None else y + self.bias[:, None, None]


def cp_random(W, rank, rng, max_iter=MAX_ITER, tol=TOL):
    """CP of every filter by alternating least squares from uniform random factors, in float32, as `parafac` does it.

    Parameters
    ----------
    W : ndarray of shape (N, c_in, kh, kw)

    Returns
    -------
    A, B, C : ndarray of shapes (rank, N, c_in), (rank, N, kh) and (rank, N, kw)
        Zero for a filter whose normal equations stay singular in three tries: the published code leaves it so.
    """
    N = len(W)
    found = [np.zeros((N, n, rank), np.float32) for n in W.shape[1:]]
    left = np.arange(N)
    for _ in range(3):
        factors, solved = _als(W[left].astype(np.float32), rank, rng, max_iter, tol)
        for whole, part in zip(found, factors, strict=True):
            whole[left[solved]] = part[solved]
        left = left[~solved]
        if not len(left):
            break
    return tuple(f.transpose(2, 0, 1).copy() for f in found)


def _als(X, rank, rng, max_iter, tol):
    """Factors (N, n, R) of all filters, and which were solved; each stops where its own error changes less than tol."""
    N = len(X)
    result = [rng.random((N, n, rank), dtype=np.float32) for n in X.shape[1:]]
    solved, before = np.ones(N, bool), np.full(N, np.inf, np.float32)
    norm2 = np.einsum("niab,niab->n", X, X)
    active = np.flatnonzero(norm2 > 0)
    for _ in range(max_iter):
        A, B, C = (f[active] for f in result)
        x = X[active]
        xc = np.matmul(x, C[:, None])                                       # (n, i, a, r)
        A = _solved(np.einsum("niar,nar->nir", xc, B), _gram(B) * _gram(C))
        xa = np.matmul(A.transpose(0, 2, 1), x.reshape(len(x), x.shape[1], -1)).reshape(len(x), rank, *x.shape[2:])
        B = _solved(np.einsum("nrab,nbr->nar", xa, C), _gram(A) * _gram(C))
        m = np.einsum("nrab,nar->nbr", xa, B)
        C = _solved(m, _gram(A) * _gram(B))
        for whole, part in zip(result, (A, B, C), strict=True):
            whole[active] = part
        fit = (_gram(A) * _gram(B) * _gram(C)).sum((1, 2))
        inner = np.einsum("nbr,nbr->n", m, C)
        error = np.sqrt(np.abs(norm2[active] + fit - 2 * inner) / norm2[active])
        failed = ~np.isfinite(error)
        solved[active[failed]] = False
        go = ~failed & (np.abs(before[active] - error) >= tol)
        before[active] = error
        active = active[go]
        if not len(active):
            break
    return result, solved


def _gram(f):
    return np.matmul(f.transpose(0, 2, 1), f)


def _solved(mttkrp, gram):
    """mttkrp gram⁻¹ for every filter; NaN where the matrix is singular."""
    right = mttkrp.transpose(0, 2, 1)
    try:
        return np.linalg.solve(gram, right).transpose(0, 2, 1)
    except np.linalg.LinAlgError:
        out = np.full_like(right, np.nan)
        for i, (g, r) in enumerate(zip(gram, right, strict=True)):
            try:
                out[i] = np.linalg.solve(g, r)
            except np.linalg.LinAlgError:
                continue
        return out.transpose(0, 2, 1)


def published_distances(factors):
    """Sum over the factors of what the published code takes for the angle of each pair of filters."""
    return sum(_published_angles(f) for f in factors)


def elimination(D):
    """The published order: of the closest pair of filters goes the one that is nearer to the rest, and so on."""
    D = D.copy()
    np.fill_diagonal(D, np.inf)
    N = len(D)
    order = np.full(N, N - 1)
    for step in range(N - 1):
        row, col = np.flatnonzero((D.min() == D).any(axis=1))[:2]
        sums = [D[i][np.isfinite(D[i])].sum() for i in (row, col)]
        order[step] = row if sums[0] < sums[1] else col
        D[order[step]] = D[:, order[step]] = np.inf
    return order


def selected(factors, n_keep):
    """Filters that the published 'pabs' selection keeps, sorted; factors as of `cp_random`.

    Two steps are as published although they are not what the paper says: a chordal distance of one or more becomes
    the angle zero, and the order of elimination is read as if it were a score of each filter.
    """
    order = elimination(published_distances(factors))
    return np.sort(np.argsort(order, kind="stable")[len(order) - n_keep:])


def _published_angles(factor):
    """asin(min(1, ‖E‖)) mod π/2 for all pairs i < j, with E = Q_j − Q_i Q_iᵀ Q_j, mirrored; float32."""
    Q = np.linalg.qr(factor.transpose(1, 2, 0))[0]                          # (N, n, r)
    N = len(Q)
    theta = np.zeros((N, N), np.float32)
    for i in range(N - 1):
        E = Q[i + 1:] - Q[i] @ (Q[i].T @ Q[i + 1:])
        norm = np.minimum(np.float32(1), np.sqrt((E * E).sum((1, 2))))
        theta[i, i + 1:] = np.remainder(np.arcsin(norm), np.float32(np.pi / 2))
    return theta + theta.T


# --------------------------------------------------------------------------------------------------------- networks
def rates(text):
    """"[0.1]*2+[0.4]*3" as a list: how the published scripts write the share removed from each layer."""
    out = []
    for part in text.split("+"):
        value, _, times = part.partition("*")
        out += [float(value.strip("[]"))] * int(times or 1)
    return out


def smaller(network, removed):
    """The network with random weights and int(width · (1 − rate)) channels in each layer, as published."""
    def kept(widths, shares):
        return [int(w * (1 - r)) for w, r in zip(widths, shares, strict=True)]

    if network == "cifar10_vgg16":
        widths = (64, 64, 128, 128, 256, 256, 256, *[512] * 6)
        return VGG(kept(widths, (list(removed) + [0.0] * 13)[:13]))
    if network == "cifar10_densenet40":
        r = (list(removed) + [0.0] * 39)[:39]
        growths = kept([12] * 36, r[1:13] + r[14:26] + r[27:39])
        first = int((24 + sum(growths[:12])) * (1 - r[13]))
        return DenseNet(growths, (first, int((first + sum(growths[12:24])) * (1 - r[26]))))
    n = {"cifar10_resnet8": 1, "cifar10_resnet20": 3, "cifar10_resnet56": 9}[network]
    r = (list(removed) + [0.0] * (3 + 3 * n))[: 3 + 3 * n]
    mids = kept([c for c in (16, 32, 64) for _ in range(n)], r[3:])
    return ResNet(n, kept((16, 16, 32, 64), [*r[:3], 0.0]), mids)


def with_cp(model, rank):
    """3 x 3 convolutions replaced by blocks of random factors, in place."""
    for path, conv in convolutions(model):
        block = CPConv2d(conv.in_channels, conv.out_channels, rank, 3, conv.stride[0], conv.padding[0],
                         conv.bias is not None)
        model.set_submodule(path, block.train(conv.training))
    return model


def convolutions(model):
    """(path, module) of the 3 x 3 convolutions, in order."""
    return [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def decomposed(model, network, rank, rng):
    """The network with every 3 x 3 convolution decomposed; normalisations, biases and the rest are kept."""
    small = with_cp(smaller(network, []), rank)
    dense = dict(convolutions(model))
    state = small.state_dict()
    small.load_state_dict(state | {k: v for k, v in model.state_dict().items() if k in state})
    for path, conv in dense.items():
        small.get_submodule(path).set_factors(*cp_random(conv.weight.detach().numpy(), rank, rng))
    return small.eval()


def pruned(model, network, rank, removed):
    """The decomposed network with filters selected as published; batch normalisations (and VGG's biases) start afresh.

    As published, the layer that follows reads the channels that the one before it in the list kept. Where the width of
    a residual stage is pruned, each block's second convolution selects on its own, so the sums add channels that do not
    belong together.
    """
    small = with_cp(smaller(network, removed), rank)
    blocks = {p: m for p, m in small.named_modules() if isinstance(m, (CPConv2d, nn.Conv2d)) and ".head" not in p
              and ".body" not in p and ".tail" not in p}
    inputs, last = None, np.arange(3)                                       # channels of the input that are kept
    for path, block in blocks.items():
        old = model.get_submodule(path)
        if "trans" in path:
            weight = old.weight.detach()[:, torch.as_tensor(last)]
            keep = np.sort(np.argsort(weight.flatten(1).norm(dim=1).numpy())[-block.out_channels:])
            with torch.no_grad():
                block.weight.copy_(weight[torch.as_tensor(keep)])
            inputs = last = keep
            continue
        A, B, C = (f.detach().numpy() for f in old.factors())
        A = A[:, :, last]
        N, n = old.out_channels, block.out_channels
        keep = np.arange(N) if n == N else selected((A, B, C), n)
        block.set_factors(A[:, keep], B[:, keep], C[:, keep])
        if network == "cifar10_densenet40":
            seen = old.in_channels if inputs is not None else 0
            last = inputs = keep if inputs is None else np.concatenate((inputs, seen + keep))
        else:
            last = keep
    _copy_linear(model, small, last)
    return small.eval()


@torch.no_grad()
def _copy_linear(model, small, last):
    """Linear layers, the first one with the columns of the channels that are left."""
    for path, layer in small.named_modules():
        if isinstance(layer, nn.Linear):
            old = model.get_submodule(path)
            same = layer.weight.shape == old.weight.shape
            layer.weight.copy_(old.weight if same else old.weight[:, torch.as_tensor(last)])
            layer.bias.copy_(old.bias)
