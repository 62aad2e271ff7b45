"""Requests at run time.

server.py    the clients of both control sockets
requests.py  what `pysplice ctl` asks for: lines of JSON
updates.py   what pesto(1) asks for: other tables of rules
tables.py    those tables as bytes: pasta's control protocol
client.py    pysplice ctl
pesto.py     pesto
status.py    what there is, in words and figures
"""
