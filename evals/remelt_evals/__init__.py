"""Everything in remelt that runs a model: suites, evaluators, reports."""
