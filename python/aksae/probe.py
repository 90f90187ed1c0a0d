"""The linear probe that reads a complexity score from an activation vector."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import UserError

# Rows converted to float64 at a time: bounds the extra memory to a few tens of MB at usual widths.
_CHUNK = 4096


@torch.no_grad()
def ridge_fit(X: Tensor, y: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Linear regression with a penalty on the weights and none on the bias.

        minimise  sum_i (x_i . w + b - y_i)^2 + lam |w|^2

    Solved in closed form in float64: centring removes b, and the `[D, D]` system `(Xc' Xc + lam I) w = Xc' yc` is
    factorised by Cholesky. Where that system is singular (`lam` 0, or too small to matter, with fewer rows than
    columns or dependent columns) directions without variance get weight 0, which is the minimum-norm solution.

    Args:
        X: `[N, D]` floating, N >= 1. Time and memory go as `N D^2` and `D^2`; N < D has no faster path of its own.
        y: `[N]` real, on the device of `X`.
        lam: penalty, 0 or more. It scales with N: the same data twice wants twice the `lam`.

    Returns:
        `(weight [D], bias [])` in the dtype and on the device of `X`, detached. One row, or a constant `y`, gives
        weight 0 and bias `mean(y)`.

    Raises:
        TypeError: `X` is not floating, `y` not real, `lam` not a number.
        UserError: shapes do not match, `X` is empty, `lam` is negative or not finite, a row of `X` or `y` holds NaN or
            infinity (the first one is named).
    """
    _check_data(X, y)
    _check_lam(lam, "lam")
    weight, bias = _Moments.of(X, y.double(), X.mean(0, dtype=torch.float64)).solve(lam)
    return weight.to(X.dtype), bias.to(X.dtype)


@dataclass
class ProbeReport:
    """How well a probe was fitted. All errors in score units, of clamped predictions."""

    lam: float
    """The penalty chosen."""
    lambdas: list[float]
    cv_rmse: list[float]
    """Root mean squared error over the validation rows of all folds together, one for each of `lambdas`."""
    heldout_n: int
    """Rows that neither the choice of the penalty nor the fit has seen; 0 leaves the three numbers below None."""
    heldout_rmse: float | None
    heldout_pearson: float | None
    """None where it is undefined: predictions or scores are constant."""
    heldout_spearman: float | None

    def to_dict(self) -> dict:
        """JSON-ready, as written to `probe.json`."""
        return {
            "lambda": self.lam,
            "cv": {"lambdas": self.lambdas, "rmse": self.cv_rmse},
            "heldout": {
                "n": self.heldout_n,
                "rmse": self.heldout_rmse,
                "pearson": self.heldout_pearson,
                "spearman": self.heldout_spearman,
            },
        }


class ComplexityProbe(nn.Module):
    """`score = clamp(x . weight + bias, score_min, score_max)`.

    Parameters `weight [d_in]` and `bias []` start at 0. A score beyond an end of the range passes no gradient; NaN
    activations give NaN scores.
    """

    def __init__(self, d_in: int, score_min: float = 0.0, score_max: float = 10.0) -> None:
        super().__init__()
        _check_scores(score_min, score_max)
        self.weight = nn.Parameter(torch.zeros(d_in))
        self.bias = nn.Parameter(torch.zeros(()))
        self.score_min = score_min
        self.score_max = score_max

    def forward(self, x: Tensor) -> Tensor:
        """Scores `[...]` of activations `x [..., d_in]`, in the dtype of `weight`.

        Autocast is off in here: a 16-bit product would move k by about one and costs as much. Raises ValueError where
        the last dimension of `x` is not d_in.
        """
        if x.ndim == 0 or x.shape[-1] != self.weight.numel():
            raise ValueError(f"x: got shape {list(x.shape)}, needs [..., {self.weight.numel()}]")
        with torch.autocast(x.device.type, enabled=False):
            score = x.to(self.weight.dtype) @ self.weight + self.bias
        return score.clamp(self.score_min, self.score_max)

    def extra_repr(self) -> str:
        return f"d_in={self.weight.numel()}, score_min={self.score_min}, score_max={self.score_max}"

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        X: Tensor,
        y: Tensor,
        *,
        lambdas: Sequence[float],
        folds: int = 5,
        holdout: float = 0.2,
        seed: int = 0,
        score_min: float = 0.0,
        score_max: float = 10.0,
    ) -> tuple[ComplexityProbe, ProbeReport]:
        """Choose the penalty by cross-validation and fit a probe with it.

        A random share `holdout` of the rows is set aside for the report. On the others, `folds`-fold cross-validation
        takes the penalty of smallest RMSE (of several equal ones, the first), and the returned probe is fitted on all
        of them; the rows set aside stay out of it, so the numbers reported are those of this very probe. The split is
        by row: rows of one document may stand on both sides.

        Args:
            X: `[N, D]` floating; y: `[N]` scores within `[score_min, score_max]`.
            lambdas: penalties to try, on the scale of `ridge_fit` (sum, not mean, of squared errors).
            folds: at least 2.
            holdout: share of the rows, `0 <= holdout < 1`; 0 fits on everything and reports no held-out numbers.
            seed: of the split; the same seed and data give the same probe.

        Raises:
            TypeError, UserError: as `ridge_fit`; also for a score out of range, no `lambdas`, or fewer rows than folds.
        """
        _check_data(X, y)
        _check_scores(score_min, score_max)
        y = y.double()
        if (y < score_min).any() or (y > score_max).any():
            raise UserError(
                f"y: got scores from {y.min():g} to {y.max():g}, needs them within [{score_min:g}, {score_max:g}]"
            )
        if not lambdas:
            raise UserError("lambdas: got none, needs at least one penalty")
        for lam in lambdas:
            _check_lam(lam, "lambdas")
        if not 0 <= holdout < 1:
            raise UserError(f"holdout: got {holdout}, needs 0 or more and less than 1")
        n_heldout = round(len(X) * holdout)
        n_fit = len(X) - n_heldout
        if not 2 <= folds <= n_fit:
            raise UserError(
                f"folds: got {folds} for {n_fit} rows ({len(X)} less {n_heldout} held out), needs 2 to that many"
            )

        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed)).to(X.device)
        heldout, fitted = order[:n_heldout], order[n_heldout:]

        # Sums over the rows of a fold are taken once; those of its complement follow by subtraction, which costs no
        # digits that matter because the common centre is near the mean of every fold.
        centre = X.mean(0, dtype=torch.float64)
        parts = fitted.tensor_split(folds)
        moments = [_Moments.of(X[rows], y[rows], centre) for rows in parts]
        total = sum(moments[1:], start=moments[0])
        squared_error = torch.zeros(len(lambdas), dtype=torch.float64)
        for rows, part in zip(parts, moments, strict=True):
            rest = total - part
            for i, lam in enumerate(lambdas):
                weight, bias = rest.solve(lam)
                predicted = (X[rows].double() @ weight + bias).clamp(score_min, score_max)
                squared_error[i] += (predicted - y[rows]).square().sum().cpu()
        cv_rmse = (squared_error / n_fit).sqrt()
        lam = float(lambdas[int(cv_rmse.argmin())])

        probe = cls(X.shape[1], score_min, score_max).to(X.device)
        weight, bias = total.solve(lam)
        probe.weight.copy_(weight)
        probe.bias.copy_(bias)

        predicted, wanted = probe(X[heldout]).double(), y[heldout]
        report = ProbeReport(
            lam=lam,
            lambdas=[float(value) for value in lambdas],
            cv_rmse=cv_rmse.tolist(),
            heldout_n=n_heldout,
            heldout_rmse=(predicted - wanted).square().mean().sqrt().item() if n_heldout else None,
            heldout_pearson=_pearson(predicted, wanted),
            heldout_spearman=_pearson(_ranks(predicted), _ranks(wanted)),
        )
        return probe, report


@dataclass
class _Moments:
    """Sums over rows, about a fixed centre, that determine a ridge fit; `+` joins and `-` removes rows."""

    n: int
    centre: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor

    @classmethod
    def of(cls, X: Tensor, y: Tensor, centre: Tensor) -> _Moments:
        d = X.shape[1]
        x, xy, xx = centre.new_zeros(d), centre.new_zeros(d), centre.new_zeros(d, d)
        for rows, targets in zip(X.split(_CHUNK), y.split(_CHUNK), strict=True):
            rows = rows.double() - centre
            x += rows.sum(0)
            xy += rows.T @ targets
            xx.addmm_(rows.T, rows)
        return cls(len(X), centre, x, y.sum(), xx, xy)

    def __add__(self, other: _Moments) -> _Moments:
        return self._combine(other, 1)

    def __sub__(self, other: _Moments) -> _Moments:
        return self._combine(other, -1)

    def _combine(self, other: _Moments, sign: int) -> _Moments:
        sums = (getattr(self, name) + sign * getattr(other, name) for name in ("x", "y", "xx", "xy"))
        return _Moments(self.n + sign * other.n, self.centre, *sums)

    def solve(self, lam: float) -> tuple[Tensor, Tensor]:
        """Ridge weight `[D]` and bias `[]` in float64."""
        mean_x, mean_y = self.x / self.n, self.y / self.n
        gram = self.xx - self.n * torch.outer(mean_x, mean_x)
        weight = solve_psd(gram, self.xy - self.x * mean_y, lam)
        return weight, mean_y - (self.centre + mean_x) @ weight


def solve_psd(gram: Tensor, rhs: Tensor, lam: float) -> Tensor:
    """`(gram + lam I)^-1 rhs`; where that is singular up to rounding, 0 along the directions in which `gram` is 0."""
    noise = len(gram) * torch.finfo(gram.dtype).eps * gram.trace()
    system = gram.clone()
    system.diagonal().add_(lam)
    factor, failed = torch.linalg.cholesky_ex(system)
    # A singular matrix may pass by luck of rounding; its smallest pivot gives it away.
    if not failed and factor.diagonal().square().min() > noise:
        return torch.cholesky_solve(rhs[:, None], factor)[:, 0]
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[values > noise], vectors[:, values > noise]
    return vectors @ (vectors.T @ rhs / (values + lam))


def _pearson(a: Tensor, b: Tensor) -> float | None:
    """Correlation of two vectors; None if either is constant or has fewer than two entries."""
    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        return None
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[group]


def _check_data(X: Tensor, y: Tensor) -> None:
    if not isinstance(X, Tensor) or not X.is_floating_point():
        raise TypeError(f"X: got {X.dtype if isinstance(X, Tensor) else type(X).__name__}, needs a floating tensor")
    if not isinstance(y, Tensor) or y.dtype == torch.bool or y.is_complex():
        raise TypeError(f"y: got {y.dtype if isinstance(y, Tensor) else type(y).__name__}, needs a tensor of numbers")
    if X.ndim != 2 or not X.numel():
        raise UserError(f"X: got shape {tuple(X.shape)}, needs [N, D] with at least one row and one column")
    if y.shape != X.shape[:1]:
        raise UserError(f"y: got shape {tuple(y.shape)}, needs [{len(X)}], one score for each row of X")
    if X.device != y.device:
        raise UserError(f"y: got it on {y.device}, needs the device of X, {X.device}")
    for name, bad in (("X", ~X.isfinite().all(1)), ("y", ~y.isfinite())):
        if bad.any():
            raise UserError(f"{name}: row {int(bad.int().argmax())} holds NaN or infinity, needs finite numbers")


def _check_lam(lam: float, name: str) -> None:
    if not isinstance(lam, numbers.Real) or isinstance(lam, bool):
        raise TypeError(f"{name}: got {lam!r}, needs a number")
    if not math.isfinite(lam) or lam < 0:
        raise UserError(f"{name}: got {lam}, needs a finite number, 0 or more")


def _check_scores(score_min: float, score_max: float) -> None:
    if not (math.isfinite(score_min) and math.isfinite(score_max) and score_min < score_max):
        raise UserError(f"score_max: got {score_max}, needs finite ends with score_min = {score_min} below it")
