"""Flows that are forgotten in time, or for others."""

from pysplice.datagram.table import INBOUND, NEVER, Expiring, Table


def make(most=10):
    return Table(most, 30.0, 120.0)


def add(table, name, now):
    flow = Expiring(name, now)
    table.add(flow)
    return flow


def test_expiry():
    table = make()
    one, other = add(table, b"1", 0.0), add(table, b"2", 10.0)
    assert table.expire(29.0) == 30.0
    assert table.expire(30.0) == 40.0
    assert one.closed and not other.closed and table.get(b"1") is None
    assert table.expire(40.0) == NEVER
    assert other.closed and len(table) == 0


def test_use_keeps_it():
    table = make()
    one, other = add(table, b"1", 0.0), add(table, b"2", 0.0)
    table.touch(one, 20.0)
    assert table.expire(30.0) == 50.0
    assert other.closed and not one.closed


def test_a_dialogue_lasts_longer():
    table = make()
    one = add(table, b"1", 0.0)
    table.answer(one, 0.0)
    other = add(table, b"2", 1.0)
    assert table.expire(40.0) == 120.0
    assert other.closed and not one.closed
    assert table.expire(120.0) == NEVER and one.closed


def test_the_one_used_least_lately_goes():
    table = make(3)
    flows = [add(table, bytes((n,)), float(n)) for n in range(3)]
    table.touch(flows[0], 5.0)
    add(table, b"new", 6.0)
    assert [flow.closed for flow in flows] == [False, True, False]
    assert len(table) == 3 and table.opened == 4


def test_removed_once():
    table = make()
    one = add(table, b"1", 0.0)
    table.remove(one)
    again = add(table, b"1", 1.0)
    table.remove(one)
    table.touch(one, 2.0)
    assert table.get(b"1") is again and not again.closed
    table.close()
    assert again.closed and len(table) == 0


def test_who_was_never_answered_gives_way_first():
    table = make(3)
    talking = add(table, b"old", 0.0)
    table.answer(talking, 0.0)
    strangers = [add(table, bytes((n,)), 1.0 + n) for n in range(20)]
    assert not talking.closed and [flow.closed for flow in strangers] == [True] * 18 + [False] * 2
    assert table.evicted == 18


def test_each_direction_has_a_share():
    table = Table((2, 3, 1), 30.0, 120.0)
    asked = add(table, b"asked", 0.0)
    for n in range(50):
        stranger = Expiring(b"in%d" % n, 1.0, INBOUND)
        table.add(stranger)
    assert not asked.closed and table.of_share(INBOUND) == 3 and table.of_share(0) == 1
    assert table.oldest(INBOUND).key == b"in47" and table.oldest(2) is None


def test_the_end_is_told_once():
    table, told = make(), []
    one = add(table, b"1", 0.0)
    one.forgotten = told.append
    table.remove(one)
    table.remove(one)
    assert told == [one]
