"""Where sockets come from.

request.py  what a socket is to be, and the maker on the host
guest.py    the maker in the guest's namespace: a process there, and our end of it (how it enters: ../setup/join.py)
unix.py     sockets that have a file: a process that makes the files and removes them
"""
