"""Windows on the proxy, not doors: these files look and never change anything.

log.py       lines for a person
describe.py  flows, packets and ends in words
trace.py     one line of JSON for each window that is advertised
"""
