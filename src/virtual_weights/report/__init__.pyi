from .page import page as page
from .page import report as report
