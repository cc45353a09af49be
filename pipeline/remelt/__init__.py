"""remelt: merge checkpoints of any size tensor by tensor, and search the coefficients by their scores."""

__version__ = "0.1.0"
