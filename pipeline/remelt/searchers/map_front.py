"""MAP: a quadratic for every eval task, and the Pareto set that these quadratics promise.

Li et al., "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation" (arXiv 2406.07529;
github luli-git/MAP): merges are sampled, each eval task gets a quadratic in the coefficients by least squares, NSGA-III
finds the Pareto set of the quadratics. Here its points are then evaluated for real, and the quadratics fitted anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from remelt.recipe import Variable
from remelt.searchers.options import whole_number
from remelt.searchers.pareto import POPULATION, find_front, front
from remelt.searchers.quadratic import Quadratic, fit_quadratic, num_coefficients
from remelt.searchers.random_search import distinct_point, generator, uniform_point
from remelt.searchers.spec import SearchSpace, Trial, objectives_of


class MapFront:
    """First a design of uniform draws, then points of the Pareto set of quadratics fitted to all complete trials.

    The quadratics are in the values, each scaled to its interval; of a simplex group the last value is left out, as the
    others say it. With V free variables there are (V + 1) (V + 2) / 2 coefficients for each objective: 15 for four
    free variables, 136 for fifteen. The design is over when `design` trials are complete, starts included.

    Every later ask fits anew, searches the Pareto set within the box, and takes the point of it that lies farthest
    from everything asked for before, running trials included. So measured points spread over the front, and where the
    quadratics were wrong, the next fit knows. `report` gives the fit errors.

    Args:
        space: The search space.
        seed: The study's seed.
        design: Trials before the first fit, 4 to 10,000; by default twice the number of coefficients.

    Raises:
        RecipeError: The option is out of its interval.
    """

    needs_objectives: ClassVar[bool] = True

    def __init__(self, space: SearchSpace, seed: int, *, design: int | None = None) -> None:
        self.space = space
        self.seed = seed
        left_out = {group[-1] for group in space.simplex}
        self._free = [variable for variable in space.variables if variable.name not in left_out]
        self.design = 2 * num_coefficients(len(self._free))
        if design is not None:
            self.design = whole_number("map", "design", design, 4, 10_000)

    def ask(self, number: int, seen: Sequence[Trial]) -> Mapping[str, float]:
        """A draw of the design, or a point of the front; see `remelt.searchers.spec.Searcher`."""
        draws = generator(self.seed, number)
        measured = self._measured(seen)
        if len(measured) < self.design:
            return uniform_point(self.space, draws)
        points_PV = self._front(measured, draws)
        free_PV = self._free_of(points_PV)
        asked_NV = self._scaled([values for trial in seen if (values := self._values(trial))])
        distances = [float(((asked_NV - free) ** 2).sum(axis=1).min()) for free in free_PV]
        return distinct_point(self.space, self.space.point_at(points_PV[int(np.argmax(distances))]), seen, draws)

    def report(self, seen: Sequence[Trial]) -> Mapping[str, Any]:
        """Fit errors of each objective's quadratic, and the front that they promise with the values it takes.

        Before the design is complete the fit is left out.
        """
        measured = self._measured(seen)
        report: dict[str, Any] = {"complete": len(measured), "design": self.design}
        if len(measured) < self.design:
            return report
        surrogate = self._fit(measured)
        points_PV = self._front(measured, generator(self.seed))
        predicted_PM = surrogate.predict(self._free_of(points_PV))
        return report | {
            "fit": [error._asdict() for error in surrogate.errors],
            "front": [
                {"values": self.space.values(self.space.point_at(point)), "predicted": predicted.tolist()}
                for point, predicted in zip(points_PV, predicted_PM, strict=True)
            ],
        }

    def _measured(self, seen: Sequence[Trial]) -> list[tuple[Mapping[str, float], tuple[float, ...]]]:
        """Values and objectives of the complete trials that have both, all with as many objectives as the first."""
        measured: list[tuple[Mapping[str, float], tuple[float, ...]]] = []
        for trial in seen:
            values, objectives = self._values(trial), objectives_of(trial)
            if values and objectives and (not measured or len(measured[0][1]) == len(objectives)):
                measured.append((values, objectives))
        return measured

    def _values(self, trial: Trial) -> Mapping[str, float]:
        """What a trial evaluated; nothing where the variables cannot say it."""
        values = trial.values or (self.space.values(trial.point) if trial.point else {})
        return values if all(variable.name in values for variable in self.space.variables) else {}

    def _fit(self, measured: Sequence[tuple[Mapping[str, float], tuple[float, ...]]]) -> Quadratic:
        objectives_NM = np.array([objectives for _, objectives in measured])
        return fit_quadratic(self._scaled([values for values, _ in measured]), objectives_NM)

    def _front(
        self, measured: Sequence[tuple[Mapping[str, float], tuple[float, ...]]], draws: np.random.Generator
    ) -> NDArray[np.float64]:
        """The Pareto set of the quadratics, as points of the unit cube."""
        surrogate = self._fit(measured)
        objectives_NM = np.array([objectives for _, objectives in measured])
        best = np.flatnonzero(front(objectives_NM))[: POPULATION // 2]
        first_PV = np.array([self._unit(measured[place][0]) for place in best])
        return find_front(
            lambda points_PV: surrogate.predict(self._free_of(points_PV)), first_PV, objectives_NM.shape[1], draws
        )

    def _free_of(self, points_PV: NDArray[np.float64]) -> NDArray[np.float64]:
        """The free variables, scaled, that points of the unit cube stand for: `SearchSpace.values` for many at once."""
        places = {variable.name: place for place, variable in enumerate(self.space.box)}
        declared_lows, declared_highs = _bounds(self.space.variables)
        values_PV = self.space.at(points_PV)
        for group in self.space.simplex:
            members = [places[name] for name in group]
            values_PV[:, members] /= values_PV[:, members].sum(axis=1, keepdims=True)
        # Few shares leave their intervals; what they become is the search space's business.
        for row in np.flatnonzero(((values_PV < declared_lows) | (values_PV > declared_highs)).any(axis=1)):
            values_PV[row] = list(self.space.values(self.space.point_at(points_PV[row])).values())
        free = [places[variable.name] for variable in self._free]
        return self._unit_free(values_PV[:, free])

    def _unit_free(self, values_PV: NDArray[np.float64]) -> NDArray[np.float64]:
        lows, highs = _bounds(self._free)
        unit_PV: NDArray[np.float64] = (values_PV - lows) / (highs - lows)
        return unit_PV

    def _scaled(self, values: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
        return self._unit_free(np.array([[each[variable.name] for variable in self._free] for each in values]))

    def _unit(self, values: Mapping[str, float]) -> NDArray[np.float64]:
        point = self.space.nearest_point(values)
        assert point is not None
        return self.space.unit_of(point)


def _bounds(variables: Sequence[Variable]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.array([variable.low for variable in variables]), np.array([variable.high for variable in variables])
