/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * tap.c: the Tap type.  Owns the memory of one batch of frames, not the
 * descriptor; holds no connection state and takes no decision.
 *
 * drain() reads frames until the tap is empty or the batch is full, and groups
 * the TCP segments among them into runs: segments of one flow that follow each
 * other.  What Python is told of a run is a handful of numbers and a handle,
 * by which send() finds the payload again until the next drain().
 *
 * Grouping keeps the order within a flow, and joins only what a receiver would
 * have treated alike one by one:
 *   - data that is contiguous, with no flags but ACK and PSH; a FIN ends it;
 *   - bare acknowledgements that move forward, or that repeat: `frames` then
 *     counts the repetitions of the last one.
 */
#include "tap.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "csum.h"
#include "frame.h"
#include "stream.h"

#define BATCH_FRAMES 256                /* IOV_MAX is 1024 */
#define BATCH_BYTES ((size_t)1 << 20)
/* See FIRST_BYTE in stream.c: payload begins 66 to 86 bytes further on */
#define FIRST_FRAME 512
#define FRAME_ALIGN 64

struct frame {
	uint32_t start;                 /* of the Ethernet header, in memory */
	uint32_t payload;               /* in memory */
	uint32_t len;                   /* of the payload */
	int next;                       /* frame of the same run, or -1 */
};

struct run {
	struct segment first;           /* seq, key, options of the first */
	uint32_t ack;
	uint32_t len;
	uint32_t frames;
	uint16_t window;
	uint8_t flags;
	int closed;                     /* nothing may be added */
	int head, tail;                 /* frames */
};

struct tap {
	PyObject_HEAD
	struct module_state *state;
	PyObject *module;
	int fd;
	int vnet;
	uint32_t generation;            /* of the handles: counts batches */
	int frame_count;
	int run_count;
	uint64_t dropped;
	struct frame frames[BATCH_FRAMES];
	struct run runs[BATCH_FRAMES];
	uint8_t *memory;
};

#define MEMORY_BYTES (FIRST_FRAME + BATCH_BYTES + VNET_HDR_LEN + FRAME_MAX)

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

		if (r->first.key_len == seg->key_len &&
		    !memcmp(r->first.key, seg->key, seg->key_len)) {
			run = r;
			break;
		}
	}
	if (!run || run->closed || !(seg->flags & TCP_ACK) ||
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
	self->frames[run->tail].next = frame;
	run->tail = frame;
	run->ack = seg->ack;
	run->window = seg->window;
	run->flags |= seg->flags;
	run->len += seg->len;
	run->closed = !!(seg->flags & TCP_FIN);
	return 1;
}

static void add_segment(struct tap *self, const struct segment *seg,
			uint32_t start)
{
	int frame = self->frame_count++;
	struct run *run;

	self->frames[frame] = (struct frame){
		.start = start,
		.payload = start + seg->payload,
		.len = seg->len,
		.next = -1,
	};
	if (join_run(self, seg, frame))
		return;
	run = &self->runs[self->run_count++];
	run->first = *seg;
	run->ack = seg->ack;
	run->len = seg->len;
	run->frames = 1;
	run->window = seg->window;
	run->flags = seg->flags;
	run->closed = !(seg->flags & TCP_ACK) ||
		      (seg->flags & (TCP_SYN | TCP_FIN | TCP_RST));
	run->head = run->tail = frame;
}

static PyObject *make_run(struct tap *self, int index)
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
	if (PyErr_Occurred()) {
		Py_DECREF(run);
		return NULL;
	}
	return run;
}

static PyObject *tap_drain(PyObject *obj, PyObject *Py_UNUSED(ignored))
{
	struct tap *self = (struct tap *)obj;
	size_t vnet_len = self->vnet ? VNET_HDR_LEN : 0;
	size_t end = FIRST_FRAME;
	PyObject *others = PyList_New(0), *runs, *result;

	if (!others)
		return NULL;
	self->generation++;
	self->frame_count = self->run_count = 0;

	for (int i = 0; i < BATCH_FRAMES && end < BATCH_BYTES; i++) {
		uint8_t *buffer = self->memory + end;
		struct segment seg;
		int trusted = 0;
		ssize_t n;

		do
			n = read(self->fd, buffer, VNET_HDR_LEN + FRAME_MAX);
		while (n < 0 && errno == EINTR);
		if (n < 0) {
			if (errno == EAGAIN || errno == EWOULDBLOCK)
				break;
			/* What came before the error must not be lost */
			if (i)
				break;
			PyErr_SetFromErrno(PyExc_OSError);
			Py_DECREF(others);
			return NULL;
		}
		if ((size_t)n < vnet_len) {
			self->dropped++;
			continue;
		}
		if (vnet_len)
			trusted = buffer[0] & (VNET_F_NEEDS_CSUM |
					       VNET_F_DATA_VALID);
		buffer += vnet_len;
		n -= (ssize_t)vnet_len;

		switch (frame_parse(buffer, (size_t)n, trusted, &seg)) {
		case FRAME_TCP:
			add_segment(self, &seg,
				    (uint32_t)(buffer - self->memory));
			end += vnet_len + (size_t)n + FRAME_ALIGN - 1;
			end &= ~(size_t)(FRAME_ALIGN - 1);
			break;
		case FRAME_OTHER: {
			PyObject *frame =
				PyBytes_FromStringAndSize((char *)buffer, n);

			if (!frame || PyList_Append(others, frame)) {
				Py_XDECREF(frame);
				Py_DECREF(others);
				return NULL;
			}
			Py_DECREF(frame);
			break;
		}
		default:
			self->dropped++;
		}
	}

	runs = PyList_New(self->run_count);
	for (int i = 0; runs && i < self->run_count; i++) {
		PyObject *run = make_run(self, i);

		if (!run)
			Py_CLEAR(runs);
		else
			PyList_SetItem(runs, i, run);
	}
	if (!runs) {
		Py_DECREF(others);
		return NULL;
	}
	result = PyTuple_Pack(2, runs, others);
	Py_DECREF(runs);
	Py_DECREF(others);
	return result;
}

static struct run *find_run(struct tap *self, unsigned long long handle)
{
	if (handle >> 16 != self->generation ||
	    (int)(handle & 0xffff) >= self->run_count) {
		PyErr_SetString(PyExc_ValueError, "handle of an earlier batch");
		return NULL;
	}
	return &self->runs[handle & 0xffff];
}

/* The LEN payload bytes at SKIP of a run as pieces; returns their number. */
static int run_pieces(struct tap *self, const struct run *run, size_t skip,
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

/* handle, skip, length: the part of a run that send() and store() work on. */
static struct run *find_part(struct tap *self, unsigned long long handle,
			     Py_ssize_t skip, Py_ssize_t len)
{
	struct run *run = find_run(self, handle);

	if (run && (skip < 0 || len < 0 || (size_t)skip > run->len ||
		    (size_t)len > run->len - (size_t)skip)) {
		PyErr_SetString(PyExc_ValueError, "beyond the run");
		return NULL;
	}
	return run;
}

static PyObject *tap_send(PyObject *obj, PyObject *args)
{
	struct tap *self = (struct tap *)obj;
	struct iovec iov[BATCH_FRAMES];
	unsigned long long handle;
	Py_ssize_t skip, len;
	struct run *run;
	ssize_t n;
	int fd;

	if (!PyArg_ParseTuple(args, "Kinn:send", &handle, &fd, &skip, &len))
		return NULL;
	run = find_part(self, handle, skip, len);
	if (!run)
		return NULL;
	struct msghdr msg = {
		.msg_iov = iov,
		.msg_iovlen = (size_t)run_pieces(self, run, (size_t)skip,
						 (size_t)len, iov),
	};
	do
		n = sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	return PyLong_FromSsize_t(n < 0 ? -errno : n);
}

static PyObject *tap_store(PyObject *obj, PyObject *args)
{
	struct tap *self = (struct tap *)obj;
	struct iovec iov[BATCH_FRAMES];
	unsigned long long handle;
	struct stream *stream;
	Py_ssize_t skip, len;
	struct run *run;
	int count;

	if (!PyArg_ParseTuple(args, "KO!nn:store", &handle,
			      self->state->stream_type, &stream, &skip, &len))
		return NULL;
	run = find_part(self, handle, skip, len);
	if (!run)
		return NULL;
	if ((size_t)len > stream->capacity - stream->len) {
		PyErr_SetString(PyExc_ValueError, "beyond the stream's room");
		return NULL;
	}
	count = run_pieces(self, run, (size_t)skip, (size_t)len, iov);
	for (int i = 0; i < count; i++)
		stream_append(stream, iov[i].iov_base, iov[i].iov_len);
	Py_RETURN_NONE;
}

static PyObject *tap_headers(PyObject *obj, PyObject *arg)
{
	struct tap *self = (struct tap *)obj;
	unsigned long long handle = PyLong_AsUnsignedLongLong(arg);
	const struct frame *frame;
	struct run *run;

	if (PyErr_Occurred())
		return NULL;
	run = find_run(self, handle);
	if (!run)
		return NULL;
	frame = &self->frames[run->head];
	return PyBytes_FromStringAndSize((char *)self->memory + frame->start,
					 frame->payload - frame->start);
}

static ssize_t write_frame(struct tap *self, struct iovec *iov, int count)
{
	ssize_t n;

	do
		n = writev(self->fd, iov, count);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

static PyObject *tap_emit(PyObject *obj, PyObject *args)
{
	struct tap *self = (struct tap *)obj;
	unsigned long seq, ack, window;
	uint8_t headers[HEADERS_MAX];
	struct tcp_fields tcp;
	Py_buffer template, options;
	struct iovec iov;
	ssize_t n = -1;
	int flags;

	if (!PyArg_ParseTuple(args, "y*kkkiy*:emit", &template, &seq, &ack,
			      &window, &flags, &options))
		return NULL;
	if (!frame_headers_len((size_t)template.len, 0) ||
	    options.len > TCP_OPTIONS_MAX || options.len % 4) {
		PyErr_SetString(PyExc_ValueError, "bad template or options");
		goto out;
	}
	tcp = (struct tcp_fields){
		.seq = (uint32_t)seq,
		.ack = (uint32_t)ack,
		.window = (uint16_t)window,
		.flags = (uint8_t)flags,
		.options = options.buf,
		.options_len = (size_t)options.len,
	};
	iov.iov_base = headers;
	iov.iov_len = frame_build(headers, template.buf, (size_t)template.len,
				  &tcp, 0, 0, 0, self->vnet);
	n = write_frame(self, &iov, 1);
out:
	PyBuffer_Release(&template);
	PyBuffer_Release(&options);
	if (PyErr_Occurred())
		return NULL;
	return PyLong_FromSsize_t(n < 0 ? n : 0);
}

static PyObject *tap_emit_data(PyObject *obj, PyObject *args)
{
	struct tap *self = (struct tap *)obj;
	unsigned long seq, ack, window;
	uint8_t headers[HEADERS_MAX];
	Py_ssize_t offset, len, done = 0;
	struct stream *stream;
	struct tcp_fields tcp;
	struct iovec iov[3];
	Py_buffer template;
	int flags, mss;
	ssize_t n = 0;
	size_t most;

	if (!PyArg_ParseTuple(args, "y*kkkiiO!nn:emit_data", &template, &seq,
			      &ack, &window, &flags, &mss,
			      self->state->stream_type, &stream, &offset, &len))
		return NULL;
	most = frame_headers_len((size_t)template.len, 0);
	if (!most || mss < 1 || mss > IP_MAX) {
		PyErr_SetString(PyExc_ValueError, "bad template or MSS");
		goto out;
	}
	if (offset < 0 || len < 0 || (size_t)offset > stream->len ||
	    (size_t)len > stream->len - (size_t)offset) {
		PyErr_SetString(PyExc_ValueError, "beyond the stream");
		goto out;
	}

	/* What one frame can carry: whole segments, if it can be cut at all */
	most = IP_MAX - (most - ETH_LEN);
	if ((size_t)mss < most)
		most = self->vnet ? most / (size_t)mss * (size_t)mss :
				    (size_t)mss;

	tcp = (struct tcp_fields){
		.ack = (uint32_t)ack,
		.window = (uint16_t)window,
	};
	while (done < len) {
		size_t part = (size_t)(len - done);
		uint64_t sum = 0;
		int count;

		if (part > most)
			part = most;
		count = stream_pieces(stream, (size_t)(offset + done), part,
				      iov + 1);
		if (!self->vnet) {
			sum = csum_add(iov[1].iov_base, iov[1].iov_len, 0);
			if (count == 2) {
				uint64_t rest = csum_add(iov[2].iov_base,
							 iov[2].iov_len, 0);

				sum += iov[1].iov_len % 2 ? csum_swap(rest) :
							    rest;
			}
		}
		tcp.seq = (uint32_t)seq + (uint32_t)done;
		/* PSH belongs to the last segment alone (RFC 9293, 3.9.1) */
		tcp.flags = (uint8_t)(done + (Py_ssize_t)part < len ?
					      flags & ~TCP_PSH :
					      flags);
		iov[0].iov_base = headers;
		iov[0].iov_len = frame_build(headers, template.buf,
					     (size_t)template.len, &tcp, part,
					     sum, (uint16_t)mss, self->vnet);
		n = write_frame(self, iov, count + 1);
		if (n < 0)
			break;
		done += (Py_ssize_t)part;
	}
out:
	PyBuffer_Release(&template);
	if (PyErr_Occurred())
		return NULL;
	return PyLong_FromSsize_t(done || n >= 0 ? done : n);
}

static PyObject *tap_emit_frame(PyObject *obj, PyObject *arg)
{
	struct tap *self = (struct tap *)obj;
	uint8_t vnet[VNET_HDR_LEN] = {0};
	struct iovec iov[2];
	Py_buffer frame;
	ssize_t n;

	if (PyObject_GetBuffer(arg, &frame, PyBUF_SIMPLE))
		return NULL;
	iov[0].iov_base = vnet;
	iov[0].iov_len = self->vnet ? VNET_HDR_LEN : 0;
	iov[1].iov_base = frame.buf;
	iov[1].iov_len = (size_t)frame.len;
	n = write_frame(self, iov, 2);
	PyBuffer_Release(&frame);
	return PyLong_FromSsize_t(n < 0 ? n : 0);
}

static PyObject *tap_dropped(PyObject *obj, void *Py_UNUSED(closure))
{
	return PyLong_FromUnsignedLongLong(((struct tap *)obj)->dropped);
}

static PyObject *tap_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"fd", "vnet", NULL};
	allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	PyObject *module = PyType_GetModule(type);
	struct tap *self;
	int fd, vnet;

	if (!module ||
	    !PyArg_ParseTupleAndKeywords(args, kwargs, "ip:Tap", names, &fd,
					 &vnet))
		return NULL;
	self = (struct tap *)alloc(type, 0);
	if (!self)
		return NULL;
	self->memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (self->memory == MAP_FAILED) {
		self->memory = NULL;
		Py_DECREF(self);
		return PyErr_NoMemory();
	}
	Py_INCREF(module);
	self->module = module;
	self->state = PyModule_GetState(module);
	self->fd = fd;
	self->vnet = vnet;
	return (PyObject *)self;
}

static int tap_traverse(PyObject *obj, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE(obj));
	Py_VISIT(((struct tap *)obj)->module);
	return 0;
}

static int tap_clear(PyObject *obj)
{
	Py_CLEAR(((struct tap *)obj)->module);
	return 0;
}

static void tap_dealloc(PyObject *obj)
{
	struct tap *self = (struct tap *)obj;
	PyTypeObject *type = Py_TYPE(obj);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	PyObject_GC_UnTrack(obj);
	tap_clear(obj);
	if (self->memory)
		munmap(self->memory, MEMORY_BYTES);
	release(obj);
	Py_DECREF(type);
}

static PyMethodDef tap_methods[] = {
	{"drain", tap_drain, METH_NOARGS, NULL},
	{"send", tap_send, METH_VARARGS, NULL},
	{"store", tap_store, METH_VARARGS, NULL},
	{"headers", tap_headers, METH_O, NULL},
	{"emit", tap_emit, METH_VARARGS, NULL},
	{"emit_data", tap_emit_data, METH_VARARGS, NULL},
	{"emit_frame", tap_emit_frame, METH_O, NULL},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef tap_getset[] = {
	{"dropped", tap_dropped, NULL, NULL, NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot tap_slots[] = {
	{Py_tp_new, tap_new},
	{Py_tp_dealloc, tap_dealloc},
	{Py_tp_traverse, tap_traverse},
	{Py_tp_clear, tap_clear},
	{Py_tp_methods, tap_methods},
	{Py_tp_getset, tap_getset},
	{Py_tp_doc, "Drains and fills one tap; see _cext.pyi."},
	{0, NULL},
};

PyType_Spec tap_spec = {
	.name = "pysplice._cext.Tap",
	.basicsize = sizeof(struct tap),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC |
		 Py_TPFLAGS_IMMUTABLETYPE,
	.slots = tap_slots,
};
