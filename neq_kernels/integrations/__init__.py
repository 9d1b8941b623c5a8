"""Support for particular libraries, imported only when they are."""
