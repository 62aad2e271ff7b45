"""The plane of spliced flows: loopback to loopback, from socket to socket, without the tap.

plane.py      the plane: ready sockets in
streams.py    TCP and UNIX sockets: splice(2)
datagrams.py  UDP
"""
