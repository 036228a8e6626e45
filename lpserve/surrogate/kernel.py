"""Covariance of a layer game between masks: the kernel of the Gaussian processes.

With dropped bits d = 1 - mask and z = 1 - 2d, two masks S and T of one game covary by

    k(S, T) = c + a <z_S, z_T> + b sum_{i<j} z_Si z_Sj z_Ti z_Tj
              + s(S) s(T) (v prod_i exp(-lambda_i [S_i != T_i]) + nu [S = T])
    s(S)    = prod_{i dropped} exp(g_i)

`c`, `a`, `b`: a constant, main effects and pairs (Bayesian ridge regression). `v`: a smooth rest,
which depends on every player differently: lambda_i is the rate at which the covariance of masks
that differ in player i decays (ARD, Rasmussen & Williams 2006, section 5.1), g_i the growth of the
standard deviation when player i is dropped: a model that lost a vital layer collapses, and its
score then depends strongly on everything else. `nu`, the nugget: the part of a mask's score that no
neighbour shares. Games are deterministic, so that it is no noise: it is known for scored masks and
remains as uncertainty for the others.

Hyperparameters maximise the marginal likelihood (Rasmussen & Williams 2006, eq. 5.8 and 5.9) times
normal priors. One prior draws every player's log lambda_i and g_i towards their means over all
players. A weak one on log nu matters where the other terms explain every tuning mask (more pairs
than masks), so that the likelihood no longer depends on nu: without it nu would vanish, and every
predictive standard deviation with it.

Notation: M, Q masks, P players.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from lpserve.types import BoolArray, FloatArray

COMPONENTS = {"ridge": "ab", "gp": "av", "gp+ridge": "abv"}
"""Kind of surrogate -> components beyond the constant and the nugget."""
JITTER = 1e-10
"""Added to the diagonal of the Gram matrix, relative to each mask's own variance. Relative to the
largest variance, which grows with every dropped player, it would exceed the nugget of masks that
keep most players (nugget 1e-8, variances up to 8e3)."""
PRIOR_DECAY, PRIOR_GROWTH = 1.0, 0.3
"""Standard deviations over players of log lambda_i and of g_i."""
PRIOR_NUGGET = (-9.2, 3.0)
"""Mean and standard deviation of log nu (1e-4 of the utilities' variance)."""
_MAX_STEPS = 60
_BLOCK_ROWS = 64
_LOGS = 7  # log c, a, b, v, nu, mean log lambda, mean g


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MaskKernel:
    """Hyperparameters of the module's formula, for utilities scaled to unit variance."""

    constant: float
    """c."""
    linear: float
    """a."""
    pairs: float
    """b."""
    product: float
    """v."""
    nugget: float
    """nu."""
    decay_P: FloatArray
    """lambda_i."""
    growth_P: FloatArray
    """g_i."""

    def smooth(self, queried_MP: BoolArray, masks_MP: BoolArray) -> FloatArray:
        """Covariance without the nugget, `float64[Q, M]`."""
        left, right = _dropped(queried_MP), _dropped(masks_MP)
        cross_gram = np.full((len(left), len(right)), self.constant)
        if self.linear or self.pairs:
            inner = (1 - 2 * left) @ (1 - 2 * right).T
            cross_gram += self.linear * inner
            if self.pairs:
                cross_gram += 0.5 * self.pairs * (inner**2 - left.shape[1])
        if self.product:
            cross_gram += self.products(queried_MP, masks_MP)
        return cross_gram

    def products(self, queried_MP: BoolArray, masks_MP: BoolArray) -> FloatArray:
        """The product part alone, `float64[Q, M]`."""
        return self.product * np.exp(_log_product(self, _dropped(queried_MP), _dropped(masks_MP)))

    def nugget_of(self, masks_MP: BoolArray) -> FloatArray:
        """Variance of each mask's own part, `float64[M]`."""
        return self.nugget * np.exp(2 * _dropped(masks_MP) @ self.growth_P)

    def variance(self, masks_MP: BoolArray) -> FloatArray:
        """Prior variance with the nugget, `float64[M]`."""
        num_players = masks_MP.shape[1]
        ridge = self.constant + self.linear * num_players
        ridge += 0.5 * self.pairs * (num_players**2 - num_players)
        growth_M = np.exp(2 * _dropped(masks_MP) @ self.growth_P)
        return ridge + (self.product + self.nugget) * growth_M

    def gram(self, masks_MP: BoolArray, noise_M: FloatArray) -> FloatArray:
        """Covariance of scored masks, nugget and noise included, `float64[M, M]`."""
        gram_MM = self.smooth(masks_MP, masks_MP)
        own_M = self.nugget_of(masks_MP) + noise_M
        gram_MM[np.diag_indices_from(gram_MM)] += own_M + JITTER * gram_MM.diagonal()
        return gram_MM


def whitening(gram_MM: FloatArray) -> FloatArray:
    """W with W K W' = 1: the inverse of K's lower Cholesky factor, `float64[M, M]`.

    Everything else is then products of matrices. In numpy alone, by blocks: a LAPACK call of scipy
    holds the interpreter lock for as long as it lasts (0.16 s for the inverse of 1,500 masks), and
    the thread that feeds the engines waits.

    Raises:
        LinAlgError: K is not positive definite, or numbers overflowed (some LAPACKs factorise NaN
            without an error).
    """
    factor = np.linalg.cholesky(gram_MM)
    if not np.isfinite(factor.diagonal()).all():
        raise np.linalg.LinAlgError("the covariance is not finite")
    inverse = np.zeros(factor.shape)
    for start in range(0, len(factor), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(factor))
        own = np.linalg.inv(factor[start:stop, start:stop])
        inverse[start:stop, start:stop] = np.tril(own)
        inverse[start:stop, :start] = -own @ (factor[start:stop, :start] @ inverse[:start, :start])
    return inverse


def _dropped(masks_MP: BoolArray) -> FloatArray:
    return 1.0 - np.asarray(masks_MP, dtype=np.float64)


def _log_product(kernel: MaskKernel, left_MP: FloatArray, right_MP: FloatArray) -> FloatArray:
    """log (s(S) s(T) prod ...): bits differ where d + d' - 2 d d' is 1."""
    decay_P, growth_P = kernel.decay_P, kernel.growth_P
    own_P = growth_P - decay_P
    log = (2 * left_MP * decay_P) @ right_MP.T
    log += (left_MP @ own_P)[:, None]
    log += right_MP @ own_P
    return log


def tune(
    kind: str,
    masks_MP: BoolArray,
    scaled_M: FloatArray,
    noise_M: FloatArray,
    start: MaskKernel | None = None,
) -> MaskKernel:
    """The kernel of maximum posterior for scaled utilities. Deterministic.

    Args:
        kind: one of `COMPONENTS`.
        scaled_M: utilities, scaled to mean 0 and unit variance.
        noise_M: noise variances in the same scale.
        start: a kernel tuned to fewer masks, where the search begins.
    """
    problem = _Likelihood(kind, masks_MP, scaled_M, noise_M)
    bounds = problem.bounds
    end = minimize(
        problem,
        problem.begin(start),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": _MAX_STEPS},
    )
    return problem.kernel(end.x)


class _Likelihood:
    """Negative log posterior of the hyperparameters and its gradient, as a function of one vector.

    The vector holds log c, a, b, v, nu, the mean of log lambda_i, the mean of g_i, then every
    player's difference of log lambda_i and of g_i from these means.
    """

    def __init__(
        self, kind: str, masks_MP: BoolArray, scaled_M: FloatArray, noise_M: FloatArray
    ) -> None:
        self._has = COMPONENTS[kind]
        self._target_M = scaled_M
        self._noise_M = noise_M
        self._drop_MP = _dropped(masks_MP)
        self._num_players = masks_MP.shape[1]
        coded = 1 - 2 * self._drop_MP
        self._inner_MM = coded @ coded.T
        self._pairs_MM = 0.5 * (self._inner_MM**2 - self._num_players)

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """(low, high) of every entry of the vector."""
        players = self._num_players
        return [
            (-12.0, 7.0),
            (-16.0, 5.0),
            (-20.0, 2.0),
            (-9.0, 9.0),
            (-21.0, 0.0),
            (-11.0, 1.5),
            (-1.0, 2.0),
            *[(-4.0, 4.0)] * players,
            *[(-2.0, 2.0)] * players,
        ]

    def begin(self, start: MaskKernel | None) -> FloatArray:
        """The vector where the search begins.

        A tiny variance has almost no gradient in logs, and a search from there would hardly move.
        So a warm start is clipped away from the bounds, its variances to at least e^-2 of the fresh
        ones.
        """
        players = self._num_players
        logs = np.log([1.0, 1 / players, 0.1 / players**2, 1.0, 1e-4, 2 / players])
        fresh = np.concatenate([logs, np.zeros(1 + 2 * players)])
        if start is None:
            return fresh
        variances = [start.constant, start.linear, start.pairs, start.product, start.nugget]
        logs = np.log(np.maximum([*variances, *start.decay_P], 1e-12))
        decay_P = logs[5:]
        means = [decay_P.mean(), start.growth_P.mean()]
        point = np.concatenate([logs[:5], means, decay_P - means[0], start.growth_P - means[1]])
        low, high = np.array(self.bounds).T
        point = np.clip(point, low + 0.1 * (high - low), high - 0.1 * (high - low))
        point[:5] = np.maximum(point[:5], fresh[:5] - 2.0)
        return point

    def kernel(self, point: FloatArray) -> MaskKernel:
        """The kernel of a vector."""
        constant, linear, pairs, product, nugget = np.exp(point[:5]).tolist()
        players = self._num_players
        smooth = "v" in self._has
        decay_P = np.exp(point[5] + point[_LOGS : _LOGS + players])
        growth_P = point[6] + point[_LOGS + players :]
        return MaskKernel(
            constant=constant,
            linear=linear,
            pairs=pairs if "b" in self._has else 0.0,
            product=product if smooth else 0.0,
            nugget=nugget,
            decay_P=decay_P if smooth else np.zeros(players),
            growth_P=growth_P if smooth else np.zeros(players),
        )

    def __call__(self, point: FloatArray) -> tuple[float, FloatArray]:
        """Value and gradient; with W = alpha alpha' - K^-1 the gradient is -tr(W dK) / 2."""
        players, kernel = self._num_players, self.kernel(point)
        drop_MP = self._drop_MP
        parts = [
            np.full_like(self._inner_MM, kernel.constant),
            kernel.linear * self._inner_MM,
            kernel.pairs * self._pairs_MM,
        ]
        smooth = "v" in self._has
        if smooth:
            parts.append(kernel.product * np.exp(_log_product(kernel, drop_MP, drop_MP)))
        own_M = kernel.nugget * np.exp(2 * drop_MP @ kernel.growth_P)
        gram = sum(parts)
        assert isinstance(gram, np.ndarray)
        gram[np.diag_indices_from(gram)] += own_M + self._noise_M + JITTER * gram.diagonal()
        try:
            half = whitening(gram)
        except np.linalg.LinAlgError:
            return 1e12, np.zeros_like(point)
        inverse = half.T @ half
        alpha_M = inverse @ self._target_M
        value = 0.5 * self._target_M @ alpha_M - np.log(np.diag(half)).sum()
        slope = np.zeros_like(point)
        weight = np.outer(alpha_M, alpha_M) - inverse
        for index, part in enumerate(parts):
            slope[index] = -0.5 * np.vdot(weight, part)
        own_slope_M = -0.5 * weight.diagonal() * own_M
        away = (point[4] - PRIOR_NUGGET[0]) / PRIOR_NUGGET[1]
        value += 0.5 * away**2
        slope[4] = own_slope_M.sum() + away / PRIOR_NUGGET[1]
        if not smooth:
            return float(value), slope
        by_pair = weight * parts[3]
        row_M = by_pair.sum(axis=1)
        once_P = 2 * drop_MP.T @ row_M
        both_P = np.einsum("mp,mp->p", drop_MP, by_pair @ drop_MP)
        decay_slope_P = 0.5 * kernel.decay_P * (once_P - 2 * both_P)
        growth_slope_P = -0.5 * once_P + 2 * drop_MP.T @ own_slope_M
        decay_P, growth_P = np.split(point[_LOGS:], [players])
        value += 0.5 * (decay_P @ decay_P) / PRIOR_DECAY**2
        value += 0.5 * (growth_P @ growth_P) / PRIOR_GROWTH**2
        slope[5], slope[6] = decay_slope_P.sum(), growth_slope_P.sum()
        slope[_LOGS : _LOGS + players] = decay_slope_P + decay_P / PRIOR_DECAY**2
        slope[_LOGS + players :] = growth_slope_P + growth_P / PRIOR_GROWTH**2
        return float(value), slope
