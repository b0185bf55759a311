"""The 25 statements about the residual stream, each with a check that computes evidence and a verdict."""

from virtual_weights.statements.catalog import STATEMENTS, Statements
from virtual_weights.statements.evidence import Finding, Statement

__all__ = ["STATEMENTS", "Finding", "Statement", "Statements"]
