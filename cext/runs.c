/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * runs.c: the segments of a batch, grouped into runs: segments of one flow that
 * follow each other.  Owns nothing; the batch is tap.c's.
 *
 * Grouping keeps the order within a flow, and joins only segments that a receiver
 * would have treated alike one by one:
 *   - data that is contiguous, with no flags but ACK and PSH; a FIN ends it;
 *   - bare acknowledgements that move forward, or that repeat: `frames` then
 *     counts the repetitions of the last one.
 * Datagrams of one flow make a run too; each keeps its boundaries.
 */
#include "tap.h"

#include <string.h>

static int32_t seq_diff(uint32_t a, uint32_t b)
{
	return (int32_t)(a - b);
}

/* Add the segment to the last run of its flow, if it may join it. */
static int join_run(struct tap *self, const struct segment *seg, int frame)
{
	struct run *run = NULL;

	for (int i = self->run_count - 1; i >= 0; i--) {
		struct run *r = &self->runs[i];

		if (r->first.udp == seg->udp &&
		    r->first.key_len == seg->key_len &&
		    !memcmp(r->first.key, seg->key, seg->key_len)) {
			run = r;
			break;
		}
	}
	if (run && seg->udp && run->first.ttl == seg->ttl &&
	    run->first.df == seg->df && run->first.group == seg->group) {
		run->frames++;
		goto join;
	}
	if (!run || run->closed || seg->udp || !(seg->flags & TCP_ACK) ||
	    (seg->flags & (TCP_SYN | TCP_RST)) ||
	    seg->seq != run->first.seq + run->len ||
	    seq_diff(seg->ack, run->ack) < 0)
		return 0;

	if (seg->len || (seg->flags & TCP_FIN)) {
		if (!run->len)
			return 0;
		run->frames++;
	} else {
		if (run->len)
			return 0;
		if (seg->ack != run->ack)
			run->frames = 1;
		else if (seg->window == run->window)
			run->frames++;
		else
			return 0;
	}
	run->ack = seg->ack;
	run->last_seq = seg->seq;
	run->window = seg->window;
	run->flags |= seg->flags;
join:
	self->frames[run->tail].next = frame;
	run->tail = frame;
	run->len += seg->len;
	run->closed = !seg->udp && (seg->flags & TCP_FIN);
	return 1;
}

void tap_add_segment(struct tap *self, const struct segment *seg,
		     uint32_t start, uint16_t gso_size)
{
	int frame = self->frame_count++;
	struct run *run;

	self->frames[frame] = (struct frame){
		.start = start,
		.payload = start + seg->payload,
		.len = seg->len,
		.gso_size = gso_size,
		.next = -1,
	};
	if (join_run(self, seg, frame))
		return;
	run = &self->runs[self->run_count++];
	run->first = *seg;
	run->ack = seg->ack;
	run->last_seq = seg->seq;
	run->len = seg->len;
	run->frames = 1;
	run->window = seg->window;
	run->flags = seg->flags;
	run->closed = !(seg->flags & TCP_ACK) ||
		      (seg->flags & (TCP_SYN | TCP_FIN | TCP_RST));
	run->head = run->tail = frame;
}

/* A struct sequence of COUNT items, which it takes over; NULL if it or one of
 * them cannot be made. */
static PyObject *make_sequence(PyTypeObject *type, PyObject **items, int count)
{
	PyObject *sequence = PyStructSequence_New(type);

	for (int i = 0; i < count; i++) {
		if (sequence)
			PyStructSequence_SetItem(sequence, i, items[i]);
		else
			Py_XDECREF(items[i]);
	}
	if (PyErr_Occurred())
		Py_CLEAR(sequence);
	return sequence;
}

PyObject *tap_make_run(struct tap *self, int index)
{
	const struct run *r = &self->runs[index];
	const struct segment *first = &r->first;
	PyObject *key = PyBytes_FromStringAndSize((const char *)first->key,
						  first->key_len);
	PyObject *handle = PyLong_FromUnsignedLongLong(
		(unsigned long long)self->generation << 16 | (unsigned)index);

	if (first->udp) {
		const struct ethernet_header *ethernet =
			(const void *)(self->memory +
				       self->frames[r->head].start);
		/* As class Datagrams in _cext.pyi has them */
		PyObject *items[] = {
			key,
			PyLong_FromUnsignedLong(r->frames),
			PyLong_FromUnsignedLong(r->len),
			PyLong_FromLong(first->ttl),
			handle,
			PyBytes_FromStringAndSize(
				(const char *)ethernet->source,
				sizeof(ethernet->source)),
			PyLong_FromLong(first->df),
			PyLong_FromLong(first->group),
		};

		return make_sequence(self->state->datagrams_type, items,
				     sizeof(items) / sizeof(*items));
	}
	/* As class Run in _cext.pyi has them */
	PyObject *items[] = {
		key,
		PyLong_FromUnsignedLong(first->seq),
		PyLong_FromUnsignedLong(r->ack),
		PyLong_FromLong(r->window),
		PyLong_FromLong(r->flags),
		PyLong_FromUnsignedLong(r->len),
		PyLong_FromUnsignedLong(r->frames),
		handle,
		PyLong_FromLong(first->mss),
		PyLong_FromLong(first->wscale),
		PyLong_FromUnsignedLong(r->last_seq),
	};

	return make_sequence(self->state->run_type, items,
			     sizeof(items) / sizeof(*items));
}

struct run *tap_find_run(struct tap *self, unsigned long long handle)
{
	if (handle >> 16 != self->generation ||
	    (int)(handle & 0xffff) >= self->run_count) {
		PyErr_SetString(PyExc_ValueError, "handle of an earlier batch");
		return NULL;
	}
	return &self->runs[handle & 0xffff];
}

int tap_run_pieces(struct tap *self, const struct run *run, size_t skip,
		   size_t len, struct iovec iov[BATCH_FRAMES])
{
	int count = 0;

	for (int i = run->head; i >= 0 && len; i = self->frames[i].next) {
		const struct frame *frame = &self->frames[i];
		size_t n = frame->len;

		if (skip >= n) {
			skip -= n;
			continue;
		}
		n -= skip;
		if (n > len)
			n = len;
		iov[count].iov_base = self->memory + frame->payload + skip;
		iov[count++].iov_len = n;
		skip = 0;
		len -= n;
	}
	return count;
}
