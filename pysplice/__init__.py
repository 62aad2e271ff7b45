"""pysplice: a network namespace on the host's network, without privileges.

The map.  Each room imports only rooms that stand below it; a test checks this list against the imports.  A name with a
slash is a folder, and its __init__.py lists its files.

    __main__      the command: argv, set-up, exit status
    cni/          another command: the plugin of CNI, which starts the first one for each sandbox
    assemble      the composition root: which planes and services of the link there are, and what values they get
    proxy         one tap and its planes: start; at the end it closes listeners and sets how long silence is borne
    control/      requests at run time: the server, the clients pesto and `pysplice ctl`, and the texts that they show
    clients       takes the clients of listeners, and decides for each: splice, or through the tap
    ending        waits, with a bound, until what the guest has sent is delivered
    host_changes  what is made again when the host's addresses or name servers change
    splice/       the plane of spliced flows: loopback to loopback, without the tap
    datagram/     the plane of flows without a stream: UDP, echo, fragments
    stream/       the plane of TCP: flows, how they are opened, and their host sockets
    forward/      forwarded ports: rules, listeners, the scan, and which addresses clients are led to
    link/         the guest's link: the tap, ARP, NDP, DHCP, DHCPv6, ICMP errors
    setup/        before the loop: namespaces, command, tap, addresses, privileges, sandbox; and what the loop asks
                  of them later (has the namespace ended, how did the command, SIGINT)
    observe/      what looks on: log, descriptions, the trace of windows
    translate     what an address means on the other side of the tap; assemble and setup/names.py choose what the
                  gateway's addresses and the name servers lead to
    budget        how many descriptors each kind of flow may have, and how much memory; what happens at a limit
    config/       the options: one table, the grammar of values and ports, every cross-check
    sockets/      where sockets come from: one typed request, a maker on each side
    backlog       what waits for its turn, so that a flood of new flows holds nothing up
    loop          the event loop: readable descriptors, and one heap of timers
    tcp/          the protocol: one Connection per flow, no I/O; its docstring has the theory
    wire          header layouts
    _cext         C, in ../cext: tap.c, stream.c and datagram.c have its classes, runs.c groups segments, sockio.c asks
                  sockets about themselves and which ports are bound; _cext.pyi describes all of it

docs/hacking.md has recipes, says which files are generated, and which tests drive what.

The path of one frame from the guest.  The tap is readable, so the loop calls `Proxy`, which calls `TapReader`
(link/reader.py).  `TapDevice.drain` reads a batch of frames, and groups the segments in it into runs, a few numbers
each; the payload stays in C.  `StreamPlane.on_batch` looks up the flow of each run, and `Connection.on_tap` decides:
the payload goes out through `HostSocket.send`, from the batch into the kernel.  Once the whole batch is done,
`StreamPlane` asks the host sockets for answers; what is still not acknowledged then gets an acknowledgement through
`TapEnd.segment`, with a window computed from the socket's memory a moment before.

The way back.  `HostSockets.poll` reports a socket, and `Connection.on_host` takes bytes into a ring through
`HostSocket.receive`, as many as the guest's window allows, and sends them through `TapEnd.data`.  They stay in the
ring until the guest has acknowledged them.

A frame that is not TCP goes to `LinkPlane` (link/plane.py): the link's services answer it, or it goes on to
`DatagramPlane`.
"""

__version__ = "0.2.0"
