"""The plane of flows without a stream: UDP, echo requests, and fragments of packets.

A flow is two addresses and two ports (or an identifier), and a time at which it is forgotten.  UDP sockets are not
connected: there is one for each address and port of the guest, whatever hosts it talks to, and one for each forwarded
port, for all its clients.  Each datagram is sent to an address, from an address and with a hop limit of its own
(IP_PKTINFO, IP_TTL); each one that arrives comes with the address of its sender; and ICMP errors about it (IP_RECVERR)
go back to the guest.

    plane.py      the plane: batches and ready sockets in
    table.py      flows by key; a share for each direction; unanswered flows give way first
    routes.py     socket addresses as the kernel has them, and options of sockets
    endpoints.py  the guest's addresses and ports as sockets; given up when a listener wants the port
    udp.py        what the guest sends, and which hosts may answer
    clients.py    clients of forwarded ports, and what the guest itself sends from such a port
    echo.py       ICMP and ICMPv6 echo, by ping sockets
    errors.py     what the kernel knows about ICMP errors, as packets for the guest
    fragments.py  fragments into packets, and packets into fragments; pure
"""
