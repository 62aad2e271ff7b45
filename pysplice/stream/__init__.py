"""The plane of TCP: connections of the guest's, and the host sockets behind them.

plane.py   batches of segments and ready sockets in, calls of Connection out
open.py    how a flow comes into being: by the guest's SYN, or by a client on the host
flows.py   the table of flows: their limits and timers
host.py    the host sockets
linger.py  host sockets whose connection has ended for the guest, but not yet for the remote host
"""
