"""The version of the package: one line, read by the build and stamped on every stored result."""

VERSION = "0.1.0"
