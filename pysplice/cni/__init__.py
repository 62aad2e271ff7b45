"""The plugin for containers' network interfaces (CNI, https://www.cni.dev/docs/spec/): a pysplice for each sandbox.

An engine calls this program for each container: the environment has the request, stdin the configuration of the
network, and stdout takes the result.  ADD starts a pysplice in the background, which serves the container's namespace
until that is gone; DEL ends it.  A process is found by what it was started with, so nothing depends on a file that says
which one it is: after a crash or a reboot the same request finds none, and begins again.

__main__.py    the command `pysplice-cni`: one request
netavark.py    the command `pysplice-netavark`: the same for podman's networks
serve.py       the process that serves an attachment: begun, and ended
request.py     what a request is, and how it fails
attachment.py  the files of an attachment, and the processes that serve it
options.py     the configuration of a network as options of pysplice
result.py      the result, in the form of each version
"""
