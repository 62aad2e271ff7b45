"""The guest's link: the tap, and the services that a host expects of its link.

tap.py         the device: drains frames, emits frames
neighbours.py  where the guest's addresses are on the link.  An ARP or neighbour request moves an address to another
               MAC address, and so does a SYN (../stream/open.py); a UDP flow follows its own frames
               (../datagram/udp.py)
reader.py      reads the tap, batch by batch
plane.py       what happens to a frame that is not TCP
responder.py   ARP, neighbour discovery, DHCP and DHCPv6 as one
arp.py, ndp.py, dhcp.py, dhcpv6.py, icmp.py    one protocol each; bytes in, bytes out
advertise.py   unsolicited router advertisements; ../assemble.py decides which services there are
"""
