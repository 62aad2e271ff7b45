"""Every transition of the facts table, allowed or forbidden."""

import pytest

from pysplice.tcp import events

FACTS = tuple(events.NAMES)

# What the table says, once more and by hand: fact -> what must hold before
BEFORE = {
    "TAP_SYN_RCVD": set(),
    "SOCK_CONNECTED": {"TAP_SYN_RCVD"},
    "TAP_SYN_ACK_SENT": {"SOCK_CONNECTED"},
    "ESTABLISHED": {"TAP_SYN_ACK_SENT"},
    "TAP_FIN_RCVD": {"ESTABLISHED"},
    "SOCK_FIN_SENT": {"TAP_FIN_RCVD"},
    "SOCK_FIN_RCVD": {"ESTABLISHED"},
    "TAP_FIN_SENT": {"SOCK_FIN_RCVD"},
    "TAP_FIN_ACKED": {"TAP_FIN_SENT"},
    "CLOSED": {"TAP_SYN_RCVD"},
}


def test_facts_are_distinct_bits():
    assert all(fact & (fact - 1) == 0 for fact in FACTS)
    assert len(set(FACTS)) == len(FACTS) == len(BEFORE)


def test_every_transition():
    """All sets of facts that are consistent, times all facts: allowed and refused as by hand."""
    allowed = refused = 0
    for held in range(1 << len(FACTS)):
        have = {events.NAMES[fact] for fact in FACTS if held & fact}
        if any(not BEFORE[name] <= have for name in have):
            continue
        for fact in FACTS:
            name = events.NAMES[fact]
            if BEFORE[name] <= have and name not in have and "CLOSED" not in have:
                assert events.learn(held, fact) == held | fact
                allowed += 1
            else:
                with pytest.raises(events.IllegalTransition, match=name):
                    events.learn(held, fact)
                refused += 1
    # Open sets: 4 before ESTABLISHED, then 3 states of one direction times 4 of the other; each but the
    # empty one can be closed: 31 sets, 10 facts.  Allowed: 7 in the handshake, 12 closes, 8 and 9 steps.
    assert (allowed, refused) == (36, 310 - 36)


def test_names():
    assert events.names(0) == "0"
    assert events.names(events.TAP_SYN_RCVD | events.CLOSED) == "TAP_SYN_RCVD|CLOSED"
