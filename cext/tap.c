/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * tap.c: the Tap type.  Owns the memory of one batch of frames, not the
 * descriptor; holds no connection state and takes no decision.
 *
 * drain() reads frames until the tap is empty or the batch is full, and groups
 * the TCP segments and UDP datagrams among them into runs (runs.c).  Of a run,
 * Python gets a handful of numbers and a handle, by which send() finds the
 * payload again until the next drain().
 *
 * system calls (serve): read writev sendmsg lseek ftruncate
 */
#include "tap.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "csum.h"
#include "frame.h"
#include "stream.h"

#define MEMORY_BYTES (FIRST_FRAME + BATCH_BYTES + VNET_HDR_LEN + FRAME_MAX)

#define JOINED_MAX 128u                 /* UDP_MAX_SEGMENTS of <linux/udp.h> */

/* Of frames that Python gets as they are: each costs the interpreter some time */
#define OTHER_BYTES ((size_t)1 << 18)

/* A frame as a record of a pcap file: microseconds, Ethernet. */
static void capture(struct tap *self, const struct iovec *iov, int count)
{
	struct iovec pieces[2 + 4];
	struct timespec now;
	uint32_t record[4];
	size_t len = 0;
	ssize_t n;

	for (int i = 0; i < count; i++) {
		pieces[1 + i] = iov[i];
		len += iov[i].iov_len;
	}
	clock_gettime(CLOCK_REALTIME, &now);
	record[0] = (uint32_t)now.tv_sec;
	record[1] = (uint32_t)(now.tv_nsec / 1000);
	record[2] = record[3] = (uint32_t)len;
	pieces[0].iov_base = record;
	pieces[0].iov_len = sizeof(record);
	/* After a partial record the rest of the file would be unreadable */
	n = writev(self->capture, pieces, count + 1);
	if (n == (ssize_t)(len + sizeof(record)))
		return;
	if (n > 0) {
		off_t end = lseek(self->capture, 0, SEEK_CUR);

		/* It cannot be taken back from a pipe */
		if (end >= n && ftruncate(self->capture, end - n))
			n = -1;
	}
	self->capture = -1;
}

static PyObject *tap_drain(PyObject *obj, PyObject *Py_UNUSED(ignored))
{
	struct tap *self = (struct tap *)obj;
	size_t vnet_len = self->vnet ? VNET_HDR_LEN : 0;
	size_t end = FIRST_FRAME, other_bytes = 0;
	PyObject *others = PyList_New(0), *runs, *datagrams, *result;

	if (!others)
		return NULL;
	self->generation++;
	self->frame_count = self->run_count = 0;

	for (int i = 0; i < BATCH_FRAMES && end < BATCH_BYTES &&
			other_bytes < OTHER_BYTES; i++) {
		uint8_t *buffer = self->memory + end;
		uint16_t gso_size = 0;
		struct vnet_header vnet;
		struct segment seg;
		int trusted = 0;
		ssize_t n;

		do
			n = read(self->fd, buffer, VNET_HDR_LEN + FRAME_MAX);
		while (n < 0 && errno == EINTR);
		if (n < 0) {
			if (errno == EAGAIN || errno == EWOULDBLOCK)
				break;
			/* The frames before the error must not be lost */
			if (i)
				break;
			PyErr_SetFromErrno(PyExc_OSError);
			Py_DECREF(others);
			return NULL;
		}
		if ((size_t)n < vnet_len) {
			self->dropped[DROP_LENGTH]++;
			continue;
		}
		if (vnet_len) {
			memcpy(&vnet, buffer, sizeof(vnet));
			trusted = vnet.flags & (VNET_F_NEEDS_CSUM |
						VNET_F_DATA_VALID);
			if (vnet.gso_type == VNET_GSO_UDP_L4)
				gso_size = vnet.gso_size;
		}
		buffer += vnet_len;
		n -= (ssize_t)vnet_len;
		if (self->capture >= 0)
			capture(self,
				&(struct iovec){ buffer, (size_t)n }, 1);

		switch (frame_parse(buffer, (size_t)n, trusted,
				    self->filter ? self->mac : NULL, &seg)) {
		case FRAME_TCP:
			gso_size = 0;
			/* fall through */
		case FRAME_UDP:
			tap_add_segment(self, &seg,
					(uint32_t)(buffer - self->memory),
					gso_size);
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
			other_bytes += (size_t)n;
			break;
		}
		default:
			self->dropped[seg.reason]++;
		}
	}

	runs = PyList_New(0);
	datagrams = PyList_New(0);
	for (int i = 0; runs && datagrams && i < self->run_count; i++) {
		PyObject *run = tap_make_run(self, i);

		if (!run ||
		    PyList_Append(self->runs[i].first.udp ? datagrams : runs,
				  run))
			Py_CLEAR(runs);
		Py_XDECREF(run);
	}
	result = runs && datagrams ? PyTuple_Pack(3, runs, datagrams, others) :
				     NULL;
	Py_XDECREF(runs);
	Py_XDECREF(datagrams);
	Py_DECREF(others);
	return result;
}

/* handle, skip, length: the part of a run that send() and store() work on. */
static struct run *find_part(struct tap *self, unsigned long long handle,
			     Py_ssize_t skip, Py_ssize_t len)
{
	struct run *run = tap_find_run(self, handle);

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
		.msg_iovlen = (size_t)tap_run_pieces(self, run,
						     (size_t)skip,
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
	count = tap_run_pieces(self, run, (size_t)skip, (size_t)len, iov);
	for (int i = 0; i < count; i++)
		stream_append(stream, iov[i].iov_base, iov[i].iov_len);
	Py_RETURN_NONE;
}

/* The first frame of a run: its headers, or with WHOLE all of it. */
static PyObject *first_frame(struct tap *self, PyObject *arg, int whole)
{
	unsigned long long handle = PyLong_AsUnsignedLongLong(arg);
	const struct frame *frame;
	struct run *run;

	if (PyErr_Occurred())
		return NULL;
	run = tap_find_run(self, handle);
	if (!run)
		return NULL;
	frame = &self->frames[run->head];
	return PyBytes_FromStringAndSize(
		(char *)self->memory + frame->start,
		frame->payload - frame->start + (whole ? frame->len : 0));
}

static PyObject *tap_headers(PyObject *obj, PyObject *arg)
{
	return first_frame((struct tap *)obj, arg, 0);
}

static PyObject *tap_frame(PyObject *obj, PyObject *arg)
{
	return first_frame((struct tap *)obj, arg, 1);
}

/* payloads(handle) -> the datagrams of a run, one by one */
static PyObject *tap_payloads(PyObject *obj, PyObject *arg)
{
	struct tap *self = (struct tap *)obj;
	unsigned long long handle = PyLong_AsUnsignedLongLong(arg);
	PyObject *list;
	struct run *run;

	if (PyErr_Occurred())
		return NULL;
	run = tap_find_run(self, handle);
	list = run ? PyList_New(0) : NULL;
	for (int i = run ? run->head : -1; list && i >= 0;
	     i = self->frames[i].next) {
		const struct frame *frame = &self->frames[i];
		uint32_t unit = frame->gso_size ? frame->gso_size : frame->len;
		uint32_t at = 0;

		/* No kernel joins more, and send() refuses them */
		if (frame->len > JOINED_MAX * unit)
			continue;

		do {
			uint32_t len = frame->len - at;
			PyObject *one = PyBytes_FromStringAndSize(
				(char *)self->memory + frame->payload + at,
				len < unit ? len : unit);

			if (!one || PyList_Append(list, one))
				Py_CLEAR(list);
			Py_XDECREF(one);
			at += unit;
		} while (list && at < frame->len);
	}
	return list;
}

ssize_t tap_write(struct tap *self, struct iovec *iov, int count)
{
	ssize_t n;

	if (self->capture >= 0) {
		struct iovec first = iov[0];
		size_t vnet_len = self->vnet ? VNET_HDR_LEN : 0;

		iov[0].iov_base = (uint8_t *)iov[0].iov_base + vnet_len;
		iov[0].iov_len -= vnet_len;
		capture(self, iov, count);
		iov[0] = first;
	}

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
	n = tap_write(self, &iov, 1);
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

	/* What one frame can carry: whole segments, if the guest cuts it */
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
		n = tap_write(self, iov, count + 1);
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
	n = tap_write(self, iov, 2);
	PyBuffer_Release(&frame);
	return PyLong_FromSsize_t(n < 0 ? n : 0);
}

static PyObject *tap_capture(PyObject *obj, PyObject *arg)
{
	long fd = PyLong_AsLong(arg);

	if (PyErr_Occurred())
		return NULL;
	((struct tap *)obj)->capture = (int)fd;
	Py_RETURN_NONE;
}

static PyObject *tap_capturing(PyObject *obj, void *Py_UNUSED(closure))
{
	return PyBool_FromLong(((struct tap *)obj)->capture >= 0);
}

static PyObject *tap_dropped(PyObject *obj, void *Py_UNUSED(closure))
{
	/* In the order of enum drop_reason */
	static const char *const names[DROP_REASONS] = {
		"length", "checksum", "flags", "port",
		"address", "fragment", "mac",
	};
	struct tap *self = (struct tap *)obj;
	PyObject *counts = PyDict_New();

	for (int i = 0; counts && i < DROP_REASONS; i++) {
		PyObject *count;

		if (!self->dropped[i])
			continue;
		count = PyLong_FromUnsignedLongLong(self->dropped[i]);
		if (!count || PyDict_SetItemString(counts, names[i], count))
			Py_CLEAR(counts);
		Py_XDECREF(count);
	}
	return counts;
}

static PyObject *tap_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"fd", "vnet", "mac", NULL};
	allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	PyObject *module = PyType_GetModule(type);
	const char *mac = "";
	Py_ssize_t mac_len = 0;
	struct tap *self;
	int fd, vnet;

	if (!module ||
	    !PyArg_ParseTupleAndKeywords(args, kwargs, "ip|y#:Tap", names, &fd,
					 &vnet, &mac, &mac_len))
		return NULL;
	if (mac_len && mac_len != 6) {
		PyErr_SetString(PyExc_ValueError, "a MAC address has 6 bytes");
		return NULL;
	}
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
	self->capture = -1;
	self->filter = mac_len == 6;
	if (self->filter)
		memcpy(self->mac, mac, 6);
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
	{"frame", tap_frame, METH_O, NULL},
	{"payloads", tap_payloads, METH_O, NULL},
	{"capture", tap_capture, METH_O, NULL},
	{"emit", tap_emit, METH_VARARGS, NULL},
	{"emit_data", tap_emit_data, METH_VARARGS, NULL},
	{"emit_frame", tap_emit_frame, METH_O, NULL},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef tap_getset[] = {
	{"dropped", tap_dropped, NULL, NULL, NULL},
	{"capturing", tap_capturing, NULL, NULL, NULL},
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
