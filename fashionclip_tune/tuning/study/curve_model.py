"""A Gaussian process over learning curves: what a trial will be worth at the end of its budget.

Settings are a point x [F] of about the unit cube, a stage is u = 1 + log9(share of the budget): 0 at a ninth, 1 at the end.
The values of two stages, of any two trials, covary by

    k = exp(-a (1 - u)) exp(-a (1 - u')) RBF(u - u'; l_u) [v_x Matern52(x, x'; l) c + v_t (of the same trial)]
        + (of the same data) 4 (1 + RBF(u - u'; 1.5)) + (of the same stage) variance of the evaluation + 0.05 v_n

The first line is how settings differ: less at early stages (a), and not quite in the order of the end (l_u), so that a late
starter is not written off; v_t is what settings do not explain, c is 1 within a data set and 0.7 between two. The second
line is the curve that all trials of a data set share, so that a data set's level is its own, and noise. The length scales
l [F], v_x, v_t, v_n, a and l_u are those of the highest posterior density.

Sources: freeze and thaw, Swersky, Snoek and Adams 2014 (arXiv:1406.3896), here with another kernel in time. Rasmussen and
Williams 2006, "Gaussian Processes for Machine Learning": predictions are equations 2.23 and 2.24, the likelihood 2.30 and its
gradient 5.9, Matern52 4.17. Nocedal and Wright 2006, "Numerical Optimization": BFGS is equation 6.17.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_FITTED = 120  # rows that the kernel's parameters are fitted to: a fit's cost is cubic
_ITERATIONS, _HALVINGS, _CONVERGED = 30, 8, 1e-2
_OTHER_DATA = 0.7
_COMMON, _COMMON_LENGTH = 4.0, 1.5
_NOISE = 0.05
_SMALLEST = 1e-6
# Median and spread of the logarithm of each parameter; of a, which may be negative, mean and spread.
_LENGTH, _V_X, _V_T, _V_N, _L_U = (0.7, 1.0), (2.0, 0.7), (0.2, 0.7), (1.0, 0.7), (1.5, 0.5)
_A = (0.7, 1.0)


@dataclass(frozen=True)
class Rows:
    """N values, in units of about their spread and around 0."""

    x_NF: Tensor
    u_N: Tensor
    trial_N: Tensor
    """Integers: which trial; -1 is a trial of its own without a share of its own (see ``CurveModel.predict``)."""
    data_N: Tensor
    """Integers: of which data set."""
    value_N: Tensor
    variance_N: Tensor
    """Of the evaluation, where known; else 0."""

    def __getitem__(self, index: Tensor | slice) -> "Rows":
        return Rows(*(column[index] for column in vars(self).values()))

    def joined(self, other: "Rows") -> "Rows":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Rows(*(torch.cat([mine, others]) for mine, others in pairs))


class CurveModel:
    """Fitted to rows; deterministic."""

    def __init__(self, rows: Rows, parameters: Tensor | None = None) -> None:
        """``parameters``: of a fitted model; None: they are fitted, to the first 120 rows where there are more."""
        self._rows = rows
        self.parameters = _fitted(rows[:_MOST_FITTED]) if parameters is None else parameters
        covariance_NN = _Pairs(rows, rows).covariance(self.parameters).total_NM + torch.diag(_noise(rows, self.parameters))
        self._cholesky_NN = torch.linalg.cholesky(covariance_NN)
        self._weights_N1 = torch.cholesky_solve(rows.value_N[:, None], self._cholesky_NN)

    def predict(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Mean and variance [M] of what the rows' trials are worth at their stages, without an evaluation's noise.

        Of a trial that is -1 the variance leaves out v_t: what settings do not explain is no reason to try them.
        """
        across_MN = _Pairs(rows, self._rows).covariance(self.parameters).total_NM
        solved_NM = torch.linalg.solve_triangular(self._cholesky_NN, across_MN.T, upper=False)
        own_M = _own_variance(rows, self.parameters)
        return (across_MN @ self._weights_N1)[:, 0], (own_M - (solved_NM**2).sum(dim=0)).clamp(min=_SMALLEST)

    def with_rows(self, rows: Rows) -> "CurveModel":
        """The model that knows these too, its parameters as they are."""
        return CurveModel(self._rows.joined(rows), self.parameters)


def _prior(num_features: int) -> tuple[Tensor, Tensor]:
    """Mean and spread [F + 5 + 1] of the parameters: logarithms, and a."""
    medians, spreads = zip(*[_LENGTH] * num_features, _V_X, _V_T, _V_N, _L_U, strict=True)
    means = [*map(math.log, medians), _A[0]]
    return torch.tensor(means, dtype=torch.float64), torch.tensor([*spreads, _A[1]], dtype=torch.float64)


class _Pairs:
    """Of N rows with M others: what covariances [N, M] are made of, as far as it does not depend on the parameters."""

    def __init__(self, rows: Rows, others: Rows) -> None:
        self.rows, self.others = rows, others
        is_same_data_NM = rows.data_N[:, None] == others.data_N[None]
        self.likeness_NM = torch.where(is_same_data_NM, 1.0, _OTHER_DATA).double()
        self.is_same_trial_NM = (rows.trial_N[:, None] == others.trial_N[None]) & (rows.trial_N[:, None] >= 0)
        self.apart_NM = (rows.u_N[:, None] - others.u_N[None]) ** 2
        self.both_NM = rows.u_N[:, None] + others.u_N[None] - 2
        self.common_NM = _COMMON * (1 + (-self.apart_NM / (2 * _COMMON_LENGTH**2)).exp()) * is_same_data_NM

    def covariance(self, parameters: Tensor) -> "_Covariance":
        length_F, (v_x, v_t, _, l_u) = parameters[:-5].exp(), parameters[-5:-1].exp().tolist()
        scaled = self.rows.x_NF / length_F, self.others.x_NF / length_F
        root_NM = math.sqrt(5) * torch.cdist(*scaled, compute_mode="donot_use_mm_for_euclid_dist")
        reach_NM = (float(parameters[-1]) * self.both_NM - self.apart_NM / (2 * l_u**2)).exp()
        scale_NM = v_x * reach_NM * self.likeness_NM * (-root_NM).exp()
        return _Covariance(
            of_settings_NM=scale_NM * (1 + root_NM + root_NM**2 / 3),
            slope_NM=scale_NM * (1 + root_NM) * (5 / 3),
            of_trial_NM=v_t * reach_NM * self.is_same_trial_NM,
            common_NM=self.common_NM,
        )


@dataclass(frozen=True)
class _Covariance:
    of_settings_NM: Tensor
    slope_NM: Tensor
    """Of it by the logarithm of a parameter's length, but for the square of how many lengths they are apart in it."""
    of_trial_NM: Tensor
    common_NM: Tensor

    @property
    def total_NM(self) -> Tensor:
        """Without noise."""
        return self.of_settings_NM + self.of_trial_NM + self.common_NM


def _own_variance(rows: Rows, parameters: Tensor) -> Tensor:
    v_x, v_t = parameters[-5].exp(), parameters[-4].exp()
    return _reach(rows, parameters) ** 2 * (v_x + v_t * (rows.trial_N >= 0)) + 2 * _COMMON


def _reach(rows: Rows, parameters: Tensor) -> Tensor:
    return (-parameters[-1] * (1 - rows.u_N)).exp()


def _noise(rows: Rows, parameters: Tensor) -> Tensor:
    return rows.variance_N + _NOISE * parameters[-3].exp() + _SMALLEST


def _fitted(rows: Rows) -> Tensor:
    """The parameters of the highest posterior density, downhill from the prior's middle by BFGS."""
    mean_P, spread_P = _prior(rows.x_NF.shape[1])
    at_P = torch.zeros_like(mean_P)  # in spreads of the prior
    pairs = _Pairs(rows, rows)
    value, gradient_P = _descent(pairs, mean_P, spread_P, at_P)
    inverse_PP = identity_PP = torch.eye(len(at_P), dtype=torch.float64)
    for _ in range(_ITERATIONS):
        step_P = -inverse_PP @ gradient_P
        step_P /= max(1.0, float(step_P.abs().max()))
        slope = float(step_P @ gradient_P)
        for _ in range(_HALVINGS):
            new_value, new_gradient_P = _descent(pairs, mean_P, spread_P, at_P + step_P)
            if new_value <= value + 1e-4 * slope:
                break
            step_P, slope = step_P / 2, slope / 2
        else:
            break
        bend_P = new_gradient_P - gradient_P
        if (curvature := float(step_P @ bend_P)) > 0:
            turned_PP = identity_PP - torch.outer(step_P, bend_P) / curvature
            inverse_PP = turned_PP @ inverse_PP @ turned_PP.T + torch.outer(step_P, step_P) / curvature
        has_converged = value - new_value < _CONVERGED
        at_P, value, gradient_P = at_P + step_P, new_value, new_gradient_P
        if has_converged:
            break
    return mean_P + spread_P * at_P


def _descent(pairs: _Pairs, mean_P: Tensor, spread_P: Tensor, at_P: Tensor) -> tuple[float, Tensor]:
    """The negative logarithm of the posterior density, and its gradient [P]."""
    rows, parameters_P = pairs.rows, mean_P + spread_P * at_P
    covariance = pairs.covariance(parameters_P)
    cholesky_NN, info = torch.linalg.cholesky_ex(covariance.total_NM + torch.diag(_noise(rows, parameters_P)))
    if info or not cholesky_NN.isfinite().all():
        return math.inf, at_P
    inverse_NN = torch.cholesky_inverse(cholesky_NN)
    weights_N = inverse_NN @ rows.value_N
    value = rows.value_N @ weights_N / 2 + cholesky_NN.diagonal().log().sum() + at_P @ at_P / 2
    outer_NN = (inverse_NN - torch.outer(weights_N, weights_N)) / 2
    slope_NN, x_NF = outer_NN * covariance.slope_NM, rows.x_NF / parameters_P[:-5].exp()
    # The sum over pairs of slope (x - x')^2.
    of_lengths_F = 2 * (slope_NN.sum(dim=1) @ x_NF**2 - (x_NF * (slope_NN @ x_NF)).sum(dim=0))
    varied_NN = outer_NN * (covariance.of_settings_NM + covariance.of_trial_NM)
    others = (
        (outer_NN * covariance.of_settings_NM).sum(),
        (outer_NN * covariance.of_trial_NM).sum(),
        outer_NN.diagonal().sum() * _NOISE * parameters_P[-3].exp(),
        (varied_NN * pairs.apart_NM).sum() * (-2 * parameters_P[-2]).exp(),
        (varied_NN * pairs.both_NM).sum(),
    )
    return float(value), spread_P * torch.cat([of_lengths_F, torch.stack(others)]) + at_P


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in the order of one thread, so that results do not depend on how many a process has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
