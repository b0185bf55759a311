"""Where the explorer's documents lie in an atlas, and the version of their form."""

FORMAT = "virtual-weights explorer 1"
FOLDER, INDEX = "explorer", "index.json"
