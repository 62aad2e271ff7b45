/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * datagram.c: the Packets type.  Owns the memory of one batch of datagrams,
 * no descriptor; holds no state of a flow and takes no decision.
 *
 * Datagrams keep their bounds: what the kernel has joined (UDP_GRO) goes on
 * joined where the other side takes it so (UDP_SEGMENT, USO of the tap), and
 * one by one where it does not.  Towards the guest those that are larger than
 * the MTU go in fragments.
 */
#include "datagram.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "csum.h"
#include "tap.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

#define BATCH 64
#define SLOT ((size_t)65536 + 512)
/* Before the payload of a slot: the headers of its datagram, in place */
#define HEADROOM 256
#define GSO_MAX 64                      /* UDP_MAX_SEGMENTS of older kernels */

struct packets {
	PyObject_HEAD
	struct module_state *state;
	PyObject *module;
	uint8_t *memory;
};

union control {
	char bytes[CMSG_SPACE(sizeof(int))];
	struct cmsghdr align;
};

static void set_gso(struct msghdr *msg, union control *control, uint16_t size)
{
	struct cmsghdr *cmsg;

	memset(control, 0, sizeof(*control));
	msg->msg_control = control;
	msg->msg_controllen = CMSG_SPACE(sizeof(size));
	cmsg = CMSG_FIRSTHDR(msg);
	cmsg->cmsg_level = SOL_UDP;
	cmsg->cmsg_type = UDP_SEGMENT;
	cmsg->cmsg_len = CMSG_LEN(sizeof(size));
	memcpy(CMSG_DATA(cmsg), &size, sizeof(size));
}

/* How many datagrams a payload is. */
static size_t count_of(size_t len, size_t gso_size)
{
	return gso_size && len > gso_size ? (len + gso_size - 1) / gso_size : 1;
}

/* Send PAYLOAD as datagrams of GSO_SIZE one by one; the last error or 0. */
static int send_each(int fd, uint8_t *payload, size_t len, size_t gso_size)
{
	int error = 0;

	for (size_t done = 0; done < len; done += gso_size) {
		size_t part = len - done < gso_size ? len - done : gso_size;

		if (send(fd, payload + done, part,
			 MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
			error = -errno;
	}
	return error;
}

/* Send payload N of IOV, which is datagrams of GSO_SIZE each: joined if the
 * kernel takes that. */
static int send_one(int fd, struct iovec *iov, size_t gso_size)
{
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 1 };
	size_t count = count_of(iov->iov_len, gso_size);
	union control control;
	ssize_t n;

	if (count > 1 && count <= GSO_MAX) {
		set_gso(&msg, &control, (uint16_t)gso_size);
		n = sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
		/* Over a path with a smaller MTU, or without the offload */
		if (n >= 0 || (errno != EINVAL && errno != EMSGSIZE &&
			       errno != EIO && errno != EOPNOTSUPP))
			return n < 0 ? -errno : 0;
	}
	if (count > 1)
		return send_each(fd, iov->iov_base, iov->iov_len, gso_size);
	n = sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	return n < 0 ? -errno : 0;
}

/* Send the datagrams from SKIP on; how many went out, or -errno of the first. */
static int send_batch(int fd, struct iovec *iov, const uint16_t *gso_size,
		      int count)
{
	struct mmsghdr msgs[BATCH];
	int done = 0;

	while (done < count) {
		int plain = 0, n;

		memset(msgs, 0, sizeof(msgs));
		while (done + plain < count && plain < BATCH &&
		       count_of(iov[done + plain].iov_len,
				gso_size[done + plain]) == 1) {
			msgs[plain].msg_hdr.msg_iov = &iov[done + plain];
			msgs[plain].msg_hdr.msg_iovlen = 1;
			plain++;
		}
		if (plain) {
			n = sendmmsg(fd, msgs, (unsigned)plain,
				     MSG_DONTWAIT | MSG_NOSIGNAL);
			if (n < 0)
				n = -errno;
		} else {
			n = send_one(fd, &iov[done], gso_size[done]);
			n = n < 0 ? n : 1;
		}
		if (n < 0)
			return done ? done : n;
		done += n;
		if (plain && n < plain)
			break;
	}
	return done;
}

/* send(tap, handle, fd, skip) -> frames sent, or -errno of the first */
static PyObject *packets_send(PyObject *obj, PyObject *args)
{
	struct packets *self = (struct packets *)obj;
	uint16_t gso_size[BATCH_FRAMES];
	struct iovec iov[BATCH_FRAMES];
	unsigned long long handle;
	int fd, skip, count = 0;
	struct run *run;
	struct tap *tap;

	if (!PyArg_ParseTuple(args, "O!Kii:send", self->state->tap_type, &tap,
			      &handle, &fd, &skip))
		return NULL;
	run = tap_find_run(tap, handle);
	if (!run)
		return NULL;
	if (!run->first.udp || skip < 0) {
		PyErr_SetString(PyExc_ValueError, "not datagrams");
		return NULL;
	}
	for (int i = run->head; i >= 0; i = tap->frames[i].next) {
		if (skip) {
			skip--;
			continue;
		}
		iov[count].iov_base = tap->memory + tap->frames[i].payload;
		iov[count].iov_len = tap->frames[i].len;
		gso_size[count++] = tap->frames[i].gso_size;
	}
	return PyLong_FromLong(send_batch(fd, iov, gso_size, count));
}

/* Receive up to COUNT datagrams into the slots; how many, or -errno. */
static int receive_batch(struct packets *self, int fd, int count,
			 struct iovec *iov, uint16_t *gso_size)
{
	union control controls[BATCH];
	struct mmsghdr msgs[BATCH];
	int n;

	memset(msgs, 0, sizeof(msgs[0]) * (size_t)count);
	for (int i = 0; i < count; i++) {
		iov[i].iov_base = self->memory + SLOT * (size_t)i + HEADROOM;
		iov[i].iov_len = 65536;
		msgs[i].msg_hdr.msg_iov = &iov[i];
		msgs[i].msg_hdr.msg_iovlen = 1;
		msgs[i].msg_hdr.msg_control = &controls[i];
		msgs[i].msg_hdr.msg_controllen = sizeof(controls[i]);
	}
	n = recvmmsg(fd, msgs, (unsigned)count, MSG_DONTWAIT, NULL);
	if (n < 0)
		return -errno;
	for (int i = 0; i < n; i++) {
		struct msghdr *msg = &msgs[i].msg_hdr;

		iov[i].iov_len = msgs[i].msg_len;
		gso_size[i] = 0;
		for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg); cmsg;
		     cmsg = CMSG_NXTHDR(msg, cmsg)) {
			int size;

			if (cmsg->cmsg_level != SOL_UDP ||
			    cmsg->cmsg_type != UDP_GRO)
				continue;
			memcpy(&size, CMSG_DATA(cmsg), sizeof(size));
			if (size > 0 && size < 65536)
				gso_size[i] = (uint16_t)size;
		}
	}
	return n;
}

/* relay(from, to) -> (datagrams received or -errno, errno of sending) */
static PyObject *packets_relay(PyObject *obj, PyObject *args)
{
	struct packets *self = (struct packets *)obj;
	int from, to, n, done = 0, error = 0;
	uint16_t gso_size[BATCH];
	struct iovec iov[BATCH];

	if (!PyArg_ParseTuple(args, "ii:relay", &from, &to))
		return NULL;
	n = receive_batch(self, from, BATCH, iov, gso_size);
	while (done < n) {
		int sent = send_batch(to, iov + done, gso_size + done,
				      n - done);

		if (sent < 0)
			error = -sent;
		done += sent > 0 ? sent : 1;
	}
	return Py_BuildValue("ii", n, error);
}

/* One datagram to the guest in fragments of at most MTU; PAYLOAD has room for
 * its UDP header before it. */
static int emit_fragments(struct tap *tap, const uint8_t *template,
			  size_t template_len, uint8_t *payload, size_t len,
			  size_t mtu)
{
	uint8_t headers[HEADERS_MAX + 8] = {0};
	size_t vnet_len = tap->vnet ? VNET_HDR_LEN : 0;
	uint8_t *udp = payload - 8;
	size_t total = len + 8, most;
	uint16_t check;

	memcpy(udp, template + template_len - 4, 4);
	udp[4] = (uint8_t)(total >> 8);
	udp[5] = (uint8_t)total;
	udp[6] = udp[7] = 0;
	check = frame_udp_check(template, template_len, udp, total);
	memcpy(udp + 6, &check, 2);

	most = (mtu - frame_ip_len(template_len, 1)) & ~(size_t)7;
	tap->ident++;
	for (size_t from = 0; from < total; from += most) {
		size_t part = total - from < most ? total - from : most;
		struct iovec iov[2];
		ssize_t n;

		iov[0].iov_base = headers;
		iov[0].iov_len = vnet_len +
				 frame_build_fragment(headers + vnet_len,
						      template, template_len,
						      from, part,
						      from + part < total,
						      tap->ident);
		iov[1].iov_base = udp + from;
		iov[1].iov_len = part;
		n = tap_write(tap, iov, 2);
		if (n < 0)
			return (int)n;
	}
	return 0;
}

/* One payload to the guest, which is datagrams of GSO_SIZE if that is not 0. */
static int emit_one(struct tap *tap, const uint8_t *template,
		    size_t template_len, uint8_t *payload, size_t len,
		    size_t gso_size, size_t mtu, int uso)
{
	size_t headers_len = frame_ip_len(template_len, 0) + 8;
	size_t unit = gso_size && gso_size < len ? gso_size : len;
	size_t step = unit;
	uint8_t headers[HEADERS_MAX];
	int error = 0;

	if (headers_len + unit > mtu ||
	    (template_len == TEMPLATE4_LEN && 28 + unit > IP_MAX)) {
		/* The last bytes of one are the header's place of the next */
		for (size_t at = 0; !error && (at < len || !at); at += unit) {
			size_t part = len - at < unit ? len - at : unit;
			uint8_t kept[8];

			memcpy(kept, payload + at - 8, 8);
			if (part < unit)
				error = emit_one(tap, template, template_len,
						 payload + at, part, 0, mtu, 0);
			else
				error = emit_fragments(tap, template,
						       template_len,
						       payload + at, part, mtu);
			memcpy(payload + at - 8, kept, 8);
			if (!unit)
				break;
		}
		return error;
	}
	if (tap->vnet && uso && unit < len) {
		/* As many as one frame can carry */
		step = (IP_MAX - headers_len) / unit;
		step = (step > GSO_MAX ? GSO_MAX : step) * unit;
	}
	for (size_t at = 0; at < len || !at; at += step) {
		size_t part = len - at < step ? len - at : step;
		uint64_t sum = 0;
		struct iovec iov[2];
		ssize_t n;

		if (!tap->vnet)
			sum = csum_add(payload + at, part, 0);
		iov[0].iov_base = headers;
		iov[0].iov_len = frame_build_udp(
			headers, template, template_len, part, sum,
			part > unit ? (uint16_t)unit : 0, tap->vnet);
		iov[1].iov_base = payload + at;
		iov[1].iov_len = part;
		n = tap_write(tap, iov, 2);
		if (n < 0)
			return (int)n;
		if (!step)
			break;
	}
	return 0;
}

static int template_ok(const Py_buffer *template, int mtu)
{
	if (frame_headers_len((size_t)template->len, 0) && mtu >= 68)
		return 1;
	PyErr_SetString(PyExc_ValueError, "bad template or MTU");
	return 0;
}

/* forward(tap, template, fd, mtu, uso) -> datagrams received, or -errno */
static PyObject *packets_forward(PyObject *obj, PyObject *args)
{
	struct packets *self = (struct packets *)obj;
	uint16_t gso_size[BATCH];
	struct iovec iov[BATCH];
	Py_buffer template;
	int fd, mtu, uso, n = 0;
	struct tap *tap;

	if (!PyArg_ParseTuple(args, "O!y*iip:forward", self->state->tap_type,
			      &tap, &template, &fd, &mtu, &uso))
		return NULL;
	if (template_ok(&template, mtu)) {
		n = receive_batch(self, fd, BATCH, iov, gso_size);
		for (int i = 0; i < n; i++)
			emit_one(tap, template.buf, (size_t)template.len,
				 iov[i].iov_base, iov[i].iov_len, gso_size[i],
				 (size_t)mtu, uso);
	}
	PyBuffer_Release(&template);
	return PyErr_Occurred() ? NULL : PyLong_FromLong(n);
}

/* emit(tap, template, payload, mtu) -> 0 or -errno */
static PyObject *packets_emit(PyObject *obj, PyObject *args)
{
	struct packets *self = (struct packets *)obj;
	Py_buffer template, payload;
	struct tap *tap;
	int mtu, rc = 0;

	if (!PyArg_ParseTuple(args, "O!y*y*i:emit", self->state->tap_type, &tap,
			      &template, &payload, &mtu))
		return NULL;
	if (payload.len > IP_MAX - 8) {
		PyErr_SetString(PyExc_ValueError, "no datagram is that long");
	} else if (template_ok(&template, mtu)) {
		memcpy(self->memory + HEADROOM, payload.buf,
		       (size_t)payload.len);
		rc = emit_one(tap, template.buf, (size_t)template.len,
			      self->memory + HEADROOM, (size_t)payload.len, 0,
			      (size_t)mtu, 0);
	}
	PyBuffer_Release(&template);
	PyBuffer_Release(&payload);
	return PyErr_Occurred() ? NULL : PyLong_FromLong(rc);
}

static PyObject *packets_new(PyTypeObject *type, PyObject *args,
			     PyObject *kwargs)
{
	static char *names[] = {NULL};
	allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	PyObject *module = PyType_GetModule(type);
	struct packets *self;

	if (!module ||
	    !PyArg_ParseTupleAndKeywords(args, kwargs, ":Packets", names))
		return NULL;
	self = (struct packets *)alloc(type, 0);
	if (!self)
		return NULL;
	self->memory = mmap(NULL, SLOT * BATCH, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (self->memory == MAP_FAILED) {
		self->memory = NULL;
		Py_DECREF(self);
		return PyErr_NoMemory();
	}
	Py_INCREF(module);
	self->module = module;
	self->state = PyModule_GetState(module);
	return (PyObject *)self;
}

static int packets_traverse(PyObject *obj, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE(obj));
	Py_VISIT(((struct packets *)obj)->module);
	return 0;
}

static int packets_clear(PyObject *obj)
{
	Py_CLEAR(((struct packets *)obj)->module);
	return 0;
}

static void packets_dealloc(PyObject *obj)
{
	struct packets *self = (struct packets *)obj;
	PyTypeObject *type = Py_TYPE(obj);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	PyObject_GC_UnTrack(obj);
	packets_clear(obj);
	if (self->memory)
		munmap(self->memory, SLOT * BATCH);
	release(obj);
	Py_DECREF(type);
}

static PyMethodDef packets_methods[] = {
	{"send", packets_send, METH_VARARGS, NULL},
	{"relay", packets_relay, METH_VARARGS, NULL},
	{"forward", packets_forward, METH_VARARGS, NULL},
	{"emit", packets_emit, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static PyType_Slot packets_slots[] = {
	{Py_tp_new, packets_new},
	{Py_tp_dealloc, packets_dealloc},
	{Py_tp_traverse, packets_traverse},
	{Py_tp_clear, packets_clear},
	{Py_tp_methods, packets_methods},
	{Py_tp_doc, "A batch of datagrams on its way; see _cext.pyi."},
	{0, NULL},
};

PyType_Spec packets_spec = {
	.name = "pysplice._cext.Packets",
	.basicsize = sizeof(struct packets),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC |
		 Py_TPFLAGS_IMMUTABLETYPE,
	.slots = packets_slots,
};
