"""The wire: scripts of segments, each run against Linux's own stack and against pysplice.

    language.py   the language of the scripts, and what may stand in a line
    frames.py     a step's frame, by scapy; a frame's fields, as a step names them
    stacks.py     what answers the frames: Linux behind a tap, pysplice, pasta, slirp4netns
    player.py     plays one script against one stack
    table         a command: what each script gives on each stack
    scripts/      the scripts, by topic

A script passes on Linux as it stands, or it says nothing about Linux.  Where pysplice answers otherwise, the script's
head says why, and the lines for it are marked.
"""
