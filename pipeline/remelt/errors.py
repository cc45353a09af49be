"""The errors that remelt raises on purpose, as one tree.

A message says what was asked, what was found (numbers, names, file) and what to do about it. The command line turns
these, and only these, into one line and exit status 2; anything else keeps its traceback.

    RemeltError                 root: something that the user can mend
    ├── RecipeError             the recipe or the study file says something that cannot be done
    ├── CheckpointError         an input checkpoint is missing, damaged, hostile or of a kind that is not read
    ├── MismatchError           parents disagree in names, shapes, dtypes or vocabulary
    ├── BudgetError             memory or disk is too small for the plan; says what would do
    ├── OutputError             the output directory belongs to another recipe, or cannot be written
    ├── NonFiniteError          NaN or Inf in a parent or a result, where the recipe does not allow it
    ├── NumericsError           a worker or a resume would compute with another numerics tag than the run's
    ├── OperatorError           an operator cannot be applied to these very tensors (a pole, a zero sum)
    ├── ExecutionError          a unit failed after its retries; names the unit and the reason
    ├── EvaluationError         a suite, an eval task or an evaluator failed
    └── StudyError              a study directory is held by another driver, or its journal is damaged
"""


class RemeltError(Exception):
    """Root of everything that remelt raises on purpose."""


class RecipeError(RemeltError):
    """The recipe or the study file says something that cannot be done."""


class CheckpointError(RemeltError):
    """An input checkpoint is missing, damaged, hostile or of a kind that is not read."""


class MismatchError(RemeltError):
    """Parents disagree in names, shapes, dtypes or vocabulary."""


class BudgetError(RemeltError):
    """Memory or disk is too small for the plan."""


class OutputError(RemeltError):
    """The output directory belongs to another recipe, or cannot be written."""


class NonFiniteError(RemeltError):
    """A parent or a result holds NaN or Inf, and the recipe does not allow it."""


class NumericsError(RemeltError):
    """A worker or a resume would compute with another numerics tag than the run's."""


class OperatorError(RemeltError):
    """An operator cannot be applied to these very tensors."""


class ExecutionError(RemeltError):
    """A unit failed after its retries."""


class EvaluationError(RemeltError):
    """A suite, an eval task or an evaluator failed."""


class StudyError(RemeltError):
    """A study directory is held by another driver, or its journal is damaged."""
