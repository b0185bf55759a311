"""What is asked of a model, each question once: the only room that fills an atlas."""

from virtual_weights.survey.plan import Part, Plan, manifest_of, map_model
from virtual_weights.survey.survey import Survey
from virtual_weights.survey.validation import Validation

__all__ = ["Part", "Plan", "Survey", "Validation", "manifest_of", "map_model"]
