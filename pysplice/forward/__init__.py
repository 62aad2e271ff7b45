"""Forwarded ports: which are open, and where their clients are led.

forward.py    the rules: added, removed, followed
listeners.py  the listening sockets, and the clients that connect to them
scan.py       which ports are bound, asked of the kernel
policy.py     where a client is led
"""
