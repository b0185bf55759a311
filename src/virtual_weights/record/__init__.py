"""The typed result of a question."""

from virtual_weights.record.axes import Axis, Column, Header, Value, Values
from virtual_weights.record.record import Record

__all__ = ["Axis", "Column", "Header", "Record", "Value", "Values"]
