"""Forwarded ports: which are open, and which addresses their clients are led to.

forward.py    the rules: added, removed, followed
listeners.py  the listening sockets: how they are bound, and the clients that connect to them
scan.py       which ports are bound, asked of the kernel; forward.py leaves out our own
policy.py     which address of the guest's a client is led to, and whether it may be spliced; ../clients.py decides
"""
