"""The 25 statements about the residual stream, each with a check that computes evidence and a verdict."""

from virtual_weights.statements.catalog import STATEMENTS
from virtual_weights.statements.evidence import Finding, Statement
from virtual_weights.statements.question import Statements

__all__ = ["STATEMENTS", "Finding", "Statement", "Statements"]
