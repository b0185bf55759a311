"""The typed result of a question."""

from virtual_weights.record.record import Axis, Column, Record, Value

__all__ = ["Axis", "Column", "Record", "Value"]
