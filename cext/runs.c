/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * runs.c: the segments of a batch, grouped into runs: those of one flow that
 * follow each other.  Owns nothing beyond what tap.c has.
 *
 * Grouping keeps the order within a flow, and joins only what a receiver would
 * have treated alike one by one:
 *   - data that is contiguous, with no flags but ACK and PSH; a FIN ends it;
 *   - bare acknowledgements that move forward, or that repeat: `frames` then
 *     counts the repetitions of the last one.
 * Datagrams of one flow make a run too; each keeps its bounds.
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

PyObject *tap_make_run(struct tap *self, int index)
{
	struct run *r = &self->runs[index];
	PyObject *run = PyStructSequence_New(self->state->run_type);
	unsigned long long handle =
		(unsigned long long)self->generation << 16 | (unsigned)index;

	if (!run)
		return NULL;
	PyStructSequence_SetItem(run, 0,
				 PyBytes_FromStringAndSize((char *)r->first.key,
							   r->first.key_len));
	PyStructSequence_SetItem(run, 1, PyLong_FromUnsignedLong(r->first.seq));
	PyStructSequence_SetItem(run, 2, PyLong_FromUnsignedLong(r->ack));
	PyStructSequence_SetItem(run, 3, PyLong_FromLong(r->window));
	PyStructSequence_SetItem(run, 4, PyLong_FromLong(r->flags));
	PyStructSequence_SetItem(run, 5, PyLong_FromUnsignedLong(r->len));
	PyStructSequence_SetItem(run, 6, PyLong_FromUnsignedLong(r->frames));
	PyStructSequence_SetItem(run, 7, PyLong_FromUnsignedLongLong(handle));
	PyStructSequence_SetItem(run, 8, PyLong_FromLong(r->first.mss));
	PyStructSequence_SetItem(run, 9, PyLong_FromLong(r->first.wscale));
	PyStructSequence_SetItem(run, 10,
				 PyLong_FromUnsignedLong(r->last_seq));
	if (PyErr_Occurred()) {
		Py_DECREF(run);
		return NULL;
	}
	return run;
}

PyObject *tap_make_datagrams(struct tap *self, int index)
{
	struct run *r = &self->runs[index];
	PyObject *run = PyStructSequence_New(self->state->datagrams_type);
	unsigned long long handle =
		(unsigned long long)self->generation << 16 | (unsigned)index;

	if (!run)
		return NULL;
	PyStructSequence_SetItem(run, 0,
				 PyBytes_FromStringAndSize((char *)r->first.key,
							   r->first.key_len));
	PyStructSequence_SetItem(run, 1, PyLong_FromUnsignedLong(r->frames));
	PyStructSequence_SetItem(run, 2, PyLong_FromUnsignedLong(r->len));
	PyStructSequence_SetItem(run, 3, PyLong_FromLong(r->first.ttl));
	PyStructSequence_SetItem(run, 4, PyLong_FromUnsignedLongLong(handle));
	PyStructSequence_SetItem(
		run, 5,
		PyBytes_FromStringAndSize(
			(char *)self->memory + self->frames[r->head].start + 6,
			6));
	PyStructSequence_SetItem(run, 6, PyLong_FromLong(r->first.df));
	PyStructSequence_SetItem(run, 7, PyLong_FromLong(r->first.group));
	if (PyErr_Occurred())
		Py_CLEAR(run);
	return run;
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
