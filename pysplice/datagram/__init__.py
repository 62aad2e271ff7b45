"""Flows without a stream: UDP, echo requests, and the fragments of both.

A flow is two addresses and two ports (or an identifier), and a time at which it is forgotten.  UDP sockets are
not connected: there is one for each address and port of the guest's, whatever it talks to, and one for each published
port, for all its clients.  Each datagram is sent to an address, by an address and with a hop limit of its own
(IP_PKTINFO, IP_TTL), and each that comes is handed on with the address that it came from; ICMP errors that concern it
(IP_RECVERR) go back to the guest.

    table.py      flows by key, a share for each direction, unanswered ones give way first
    routes.py     addresses and sockets as the kernel has them
    udp.py        what the guest sends, and who may answer
    clients.py    clients of published ports
    spliced.py    loopback to loopback, without the tap
    echo.py       ICMP and ICMPv6 echo, by ping sockets
    errors.py     what the kernel knows of ICMP errors, as packets for the guest
    fragments.py  packets out of fragments and back; pure
"""
