from .axes import Axis as Axis
from .axes import Column as Column
from .axes import Header as Header
from .axes import Value as Value
from .axes import Values as Values
from .record import Record as Record
