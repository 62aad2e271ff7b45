"""Every transition of the facts table, allowed or forbidden."""

import pytest

from pysplice.tcp import events

FACTS = tuple(events.NAMES)

# What the table says, once more and by hand: fact -> what must hold before, of which one, and what must not
BEFORE = {
    "TAP_SYN_RCVD": (set(), set(), set()),
    "SOCK_CONNECTED": (set(), set(), set()),
    "TAP_SYN_SENT": ({"SOCK_CONNECTED"}, set(), {"TAP_SYN_RCVD"}),
    "TAP_SYN_ACK_SENT": ({"TAP_SYN_RCVD", "SOCK_CONNECTED"}, set(), {"TAP_SYN_SENT"}),
    "ESTABLISHED": ({"TAP_SYN_RCVD", "SOCK_CONNECTED"}, {"TAP_SYN_ACK_SENT", "TAP_SYN_SENT"}, set()),
    "TAP_FIN_RCVD": ({"ESTABLISHED"}, set(), set()),
    "SOCK_FIN_SENT": ({"TAP_FIN_RCVD"}, set(), set()),
    "SOCK_FIN_RCVD": ({"ESTABLISHED"}, set(), set()),
    "TAP_FIN_SENT": ({"SOCK_FIN_RCVD"}, set(), set()),
    "TAP_FIN_ACKED": ({"TAP_FIN_SENT"}, set(), set()),
    "CLOSED": (set(), {"TAP_SYN_RCVD", "SOCK_CONNECTED"}, set()),
}


def test_facts_are_distinct_bits():
    assert all(fact & (fact - 1) == 0 for fact in FACTS)
    assert len(set(FACTS)) == len(FACTS) == len(BEFORE)


def allowed(have: set[str], name: str) -> bool:
    required, one_of, forbidden = BEFORE[name]
    return (
        required <= have
        and (not one_of or bool(one_of & have))
        and not (forbidden | {name, "CLOSED"}) & have
    )


def test_every_transition():
    """All sets of facts that can be reached, times all facts: allowed and refused as by hand."""
    reached, waiting = {0}, [0]
    taken = refused = 0
    while waiting:
        held = waiting.pop()
        have = {events.NAMES[fact] for fact in FACTS if held & fact}
        for fact in FACTS:
            name = events.NAMES[fact]
            if allowed(have, name):
                after = events.learn(held, fact)
                assert after == held | fact
                taken += 1
                if after not in reached:
                    reached.add(after)
                    waiting.append(after)
            else:
                with pytest.raises(events.IllegalTransition, match=name):
                    events.learn(held, fact)
                refused += 1
    # Open sets: 7 before ESTABLISHED, then 12 for either way of opening; all but the empty one can be closed.
    # Steps: 30 of those closes, 9 in the handshakes, 17 afterwards for either way.
    assert len(reached) == 31 + 30
    assert taken + refused == len(reached) * len(FACTS)
    assert taken == 30 + 9 + 2 * 17


def test_names():
    assert events.names(0) == "0"
    assert events.names(events.TAP_SYN_RCVD | events.CLOSED) == "TAP_SYN_RCVD|CLOSED"
