"""Flows without a stream: UDP, echo requests, and the fragments of both.

A flow is two addresses and two ports (or an identifier), a connected socket on the host, and a time at which it is
forgotten.  The kernel does the rest: a connected socket gets what is meant for it and nothing else, and the ICMP
errors that concern it (IP_RECVERR), which go back to the guest.

    table.py      flows by key, oldest first: limit and expiry
    udp.py        datagrams through the tap, and those that take the short cut over loopback
    echo.py       ICMP and ICMPv6 echo, by ping sockets
    errors.py     what the kernel knows of ICMP errors, as packets for the guest
    fragments.py  packets out of fragments and back; pure
"""
