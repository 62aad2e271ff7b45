"""What runs before the loop: namespaces, the tap and its addresses, and what the process gives up.

Of this room the running loop calls only watch.py, interrupts.py, command.Init, and what reads a report of follow.py.

join.py        the namespace that is served, and the processes that prepare it
command.py     the init of new namespaces, and the command in them
watch.py       notices when a namespace ends
follow.py      the process that notices when the host changes
children.py    processes of ours, and what they report
device.py      the tap
addresses.py   addresses and routes, from the host's interface to the tap
template.py    these as a record;  netlink.py: rtnetlink
names.py       name servers and search domains
privileges.py  users and capabilities
files.py       descriptors, and files that are written
background.py  leaving the terminal;  interrupts.py: SIGINT while a command runs
sandbox.py     the place to serve from;  landlock.py, seccomp.py, syscalls.py: its walls
libc.py        calls that Python does not have, and their constants
"""
