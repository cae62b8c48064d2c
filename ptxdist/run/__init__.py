"""A run from its settings to its report: plan, stages, evaluation, tracking. Never ray."""
