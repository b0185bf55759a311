from .page import page as page
from .page import payload as payload
from .page import report as report
from .page import write_report as write_report
