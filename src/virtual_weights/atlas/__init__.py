"""Records at rest: a folder of content-addressed results that opens anywhere and resumes."""

from virtual_weights.atlas.atlas import FORMAT, Atlas
from virtual_weights.atlas.edges import edges
from virtual_weights.atlas.export import export
from virtual_weights.atlas.ledger import Entry
from virtual_weights.atlas.status import Status, status
from virtual_weights.atlas.stored import task_key

__all__ = ["FORMAT", "Atlas", "Entry", "Status", "edges", "export", "status", "task_key"]
