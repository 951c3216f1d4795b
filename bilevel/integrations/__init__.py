"""Doors into other libraries, each optional: importing one asks for its library."""
