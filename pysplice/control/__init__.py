"""Requests at run time.

server.py  takes requests over a UNIX socket
client.py  pysplice ctl: the other end
status.py  what there is, in words and figures
"""
