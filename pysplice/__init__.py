"""pysplice: a network namespace on the host's network, without privileges.

The map of the rooms, in the order in which a byte passes.  Each imports only what stands below it.

    __main__    argv -> Config -> run
    cli         the options;  config: the Config, and the grammar of its values;  ports: that of -t, -u, -T, -U
    setup/      once, before the loop: namespaces, the tap, addresses, and the sandbox that we serve from
    proxy       0  the loop: readiness and one heap of timers; wires the rooms below
    budget      0a who may have how many descriptors and how much memory
    control     0b requests to look at it and to change what is forwarded; unix: the sockets that have a file
    births      1  TCP flows come to be: by the guest's SYN, or by a client on the host
    inbound     1a what becomes of clients of listeners
    tap         1  owns the tap: drains it into runs, emits frames
    services/   1b arp, ndp, dhcp, dhcpv6, icmp errors: bytes in, bytes out
    translate   1b what addresses mean on the other side; own: the host's own address, as the host moves
    flows       2  the table of TCP flows: lookup, death, limits
    tcp/        3  the protocol: one Connection per flow, no I/O; read its docstring for the theory
    datagram/   3b flows without a stream: UDP, echo, fragments
    host        4  owns the host sockets
    linger      4a host sockets whose guest is gone, while what was acknowledged goes out
    forward     4b listeners, and the policy for those who come by them
    splice      5  the short cut: loopback to loopback, socket to socket
    inside      5b sockets of the guest's namespace, made by a process in there
    observe/    windows on all of it: logging, the trace of what was advertised
    _cext       C: moves bytes, computes checksums, reads socket state; see _cext.pyi

The way of one frame from the guest: the tap is readable, `proxy` calls `TapDevice.drain`, which reads a
batch of frames and groups the segments in it into runs, a few numbers each; the payload stays in C.
`Flows` finds the connection, `Connection.on_tap` decides: payload goes out by `HostSocket.send`, straight
from the batch into the kernel; the answer is an acknowledgement with a window that was read off the
socket's memory a moment ago, by `TapEnd.segment`.

The way back: `HostSockets.poll` reports a socket, `Connection.on_host` takes bytes into a ring by
`HostSocket.receive` as far as the guest's window goes, and sends them by `TapEnd.data`.  They stay in
the ring until the guest has acknowledged them.
"""

__version__ = "0.1.0"
