"""Readers of data from outside: within limits, checked, with one error class for each kind of data.

Every other package receives typed values. A module that opens a file, or parses text, JSON, YAML, a pickle or an
answer of a server, is listed in ``tests/untrusted/test_ways_in.py``.
"""
