/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * datagram.c: the Packets type.  Owns the memory of one batch of datagrams,
 * no descriptor; holds no state of a flow and takes no decision.
 *
 * Datagrams keep their boundaries: what the kernel has joined (UDP_GRO) is
 * passed on joined where the other side accepts that (UDP_SEGMENT, USO of the
 * tap), and one by one where it does not.  Datagrams to the guest that are
 * larger than the MTU go in fragments.
 *
 * system calls (serve): recvmmsg
 */
#include "datagram.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "message.h"
#include "tap.h"

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

#define SLOT ((size_t)65536 + 512)
/* Before the payload of a slot: the headers of its datagram, in place */
#define HEADROOM 256

struct packets {
	PyObject_HEAD
	struct module_state *state;
	PyObject *module;
	uint8_t *memory;
	/* The last batch received: slots in use, and what is in them */
	int count;
	uint32_t len[BATCH];
	uint16_t gso_size[BATCH];
};

/* send(tap, handle, fd, skip, address, control) -> frames sent, or -errno of
 * the first */
static PyObject *packets_send(PyObject *obj, PyObject *args)
{
	struct packets *self = (struct packets *)obj;
	uint16_t gso_size[BATCH_FRAMES];
	struct iovec iov[BATCH_FRAMES];
	int fd, skip, skipped, count = 0, n = 0;
	unsigned long long handle;
	struct route route;
	struct run *run;
	struct tap *tap;

	if (!PyArg_ParseTuple(args, "O!Kiiy*y*:send", self->state->tap_type,
			      &tap, &handle, &fd, &skip, &route.address,
			      &route.control))
		return NULL;
	run = tap_find_run(tap, handle);
	if (!run || !route_ok(&route))
		goto out;
	if (!run->first.udp || skip < 0) {
		PyErr_SetString(PyExc_ValueError, "not datagrams");
		goto out;
	}
	skipped = skip;
	for (int i = run->head; i >= 0; i = tap->frames[i].next) {
		if (skip) {
			skip--;
			continue;
		}
		iov[count].iov_base = tap->memory + tap->frames[i].payload;
		iov[count].iov_len = tap->frames[i].len;
		gso_size[count++] = tap->frames[i].gso_size;
	}
	/* Once one has failed, the rest go one by one: they may fail as well */
	n = message_send(fd, iov, gso_size, count, &route, !skipped);
out:
	route_release(&route);
	return PyErr_Occurred() ? NULL : PyLong_FromLong(n);
}

/* send_bytes(payload, fd, address, control) -> 0 or -errno */
static PyObject *packets_send_bytes(PyObject *obj, PyObject *args)
{
	struct route route;
	Py_buffer payload;
	int fd, rc = 0;

	(void)obj;
	if (!PyArg_ParseTuple(args, "y*iy*y*:send_bytes", &payload, &fd,
			      &route.address, &route.control))
		return NULL;
	if (route_ok(&route)) {
		struct iovec iov = { payload.buf, (size_t)payload.len };

		rc = message_send_one(fd, &iov, 0, &route);
	}
	PyBuffer_Release(&payload);
	route_release(&route);
	return PyErr_Occurred() ? NULL : PyLong_FromLong(rc);
}

/* What is known about one datagram of a batch besides its payload. */
struct arrival {
	uint8_t peer[sizeof(struct sockaddr_in6)];
	socklen_t peer_len;
	uint8_t local[16];              /* the address that it was sent to */
	size_t local_len;
	int interface;
};

static void read_control(struct msghdr *msg, struct arrival *arrival,
			 uint16_t *gso_size)
{
	static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };

	for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg); cmsg;
	     cmsg = CMSG_NXTHDR(msg, cmsg)) {
		const void *data = CMSG_DATA(cmsg);
		struct in_pktinfo info4;
		struct in6_pktinfo info6;
		int size;

		if (cmsg->cmsg_level == SOL_UDP &&
		    cmsg->cmsg_type == UDP_GRO) {
			memcpy(&size, data, sizeof(size));
			if (size > 0 && size < 65536)
				*gso_size = (uint16_t)size;
		} else if (cmsg->cmsg_level == IPPROTO_IP &&
			   cmsg->cmsg_type == IP_PKTINFO) {
			memcpy(&info4, data, sizeof(info4));
			/* Where it can be answered from: for a broadcast, the
			 * interface's own address */
			memcpy(arrival->local, &info4.ipi_spec_dst, 4);
			arrival->local_len = 4;
			arrival->interface = info4.ipi_ifindex;
		} else if (cmsg->cmsg_level == IPPROTO_IPV6 &&
			   cmsg->cmsg_type == IPV6_PKTINFO) {
			memcpy(&info6, data, sizeof(info6));
			arrival->interface = (int)info6.ipi6_ifindex;
			/* For IPv4, IP_PKTINFO says more */
			if (!memcmp(&info6.ipi6_addr, mapped, sizeof(mapped)))
				continue;
			memcpy(arrival->local, &info6.ipi6_addr, 16);
			arrival->local_len = 16;
		}
	}
}

static int same_arrival(const struct arrival *a, const struct arrival *b)
{
	return a->peer_len == b->peer_len && a->local_len == b->local_len &&
	       a->interface == b->interface &&
	       !memcmp(a->peer, b->peer, a->peer_len) &&
	       !memcmp(a->local, b->local, a->local_len);
}

/* receive(fd) -> [(peer, local, interface, first, count)], or -errno */
static PyObject *packets_receive(PyObject *obj, PyObject *arg)
{
	struct packets *self = (struct packets *)obj;
	union {
		char bytes[CMSG_SPACE(sizeof(struct in_pktinfo)) +
			   CMSG_SPACE(sizeof(struct in6_pktinfo)) +
			   CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} controls[BATCH];
	struct arrival arrivals[BATCH];
	struct mmsghdr msgs[BATCH];
	struct iovec iov[BATCH];
	long fd = PyLong_AsLong(arg);
	PyObject *groups;
	int n;

	if (fd == -1 && PyErr_Occurred())
		return NULL;
	memset(msgs, 0, sizeof(msgs));
	memset(arrivals, 0, sizeof(arrivals));
	for (int i = 0; i < BATCH; i++) {
		struct msghdr *msg = &msgs[i].msg_hdr;

		iov[i].iov_base = self->memory + SLOT * (size_t)i + HEADROOM;
		iov[i].iov_len = 65536;
		msg->msg_iov = &iov[i];
		msg->msg_iovlen = 1;
		msg->msg_name = arrivals[i].peer;
		msg->msg_namelen = sizeof(arrivals[i].peer);
		msg->msg_control = &controls[i];
		msg->msg_controllen = sizeof(controls[i]);
	}
	self->count = 0;
	n = recvmmsg((int)fd, msgs, BATCH, MSG_DONTWAIT, NULL);
	if (n < 0)
		return PyLong_FromLong(-errno);
	self->count = n;
	for (int i = 0; i < n; i++) {
		struct arrival *arrival = &arrivals[i];

		arrival->peer_len = msgs[i].msg_hdr.msg_namelen;
		if (arrival->peer_len > sizeof(arrival->peer))
			arrival->peer_len = 0;
		self->len[i] = msgs[i].msg_len;
		self->gso_size[i] = 0;
		read_control(&msgs[i].msg_hdr, arrival, &self->gso_size[i]);
	}

	groups = PyList_New(0);
	for (int first = 0, next; groups && first < n; first = next) {
		const struct arrival *arrival = &arrivals[first];
		PyObject *group;

		for (next = first + 1; next < n; next++)
			if (!same_arrival(arrival, &arrivals[next]))
				break;
		group = Py_BuildValue("y#y#iii", arrival->peer,
				      (Py_ssize_t)arrival->peer_len,
				      arrival->local,
				      (Py_ssize_t)arrival->local_len,
				      arrival->interface, first, next - first);
		if (!group || PyList_Append(groups, group))
			Py_CLEAR(groups);
		Py_XDECREF(group);
	}
	return groups;
}

static int part_ok(const struct packets *self, int first, int count)
{
	if (first >= 0 && count >= 0 && first <= self->count &&
	    count <= self->count - first)
		return 1;
	PyErr_SetString(PyExc_ValueError, "beyond the batch");
	return 0;
}

static uint8_t *slot(struct packets *self, int i)
{
	return self->memory + SLOT * (size_t)i + HEADROOM;
}

/* payload(index) -> [bytes]: joined datagrams one by one */
static PyObject *packets_payload(PyObject *obj, PyObject *arg)
{
	struct packets *self = (struct packets *)obj;
	long i = PyLong_AsLong(arg);
	size_t at, len, unit;
	PyObject *list;

	if (i == -1 && PyErr_Occurred())
		return NULL;
	if (i < 0 || i >= self->count) {
		PyErr_SetString(PyExc_ValueError, "beyond the batch");
		return NULL;
	}
	list = PyList_New(0);
	len = self->len[i];
	for (at = 0; list && (at < len || !at); at += unit) {
		PyObject *part;

		unit = self->gso_size[i] ? self->gso_size[i] : len;
		if (unit > len - at)
			unit = len - at;
		part = PyBytes_FromStringAndSize((char *)slot(self, (int)i) + at,
						 (Py_ssize_t)unit);
		if (!part || PyList_Append(list, part))
			Py_CLEAR(list);
		Py_XDECREF(part);
		if (!unit)
			break;
	}
	return list;
}

/* relay(first, count, fd, address, control) -> 0 or the last -errno */
static PyObject *packets_relay(PyObject *obj, PyObject *args)
{
	struct packets *self = (struct packets *)obj;
	int first, count, fd, error = 0;
	struct iovec iov[BATCH];
	struct route route;

	if (!PyArg_ParseTuple(args, "iiiy*y*:relay", &first, &count, &fd,
			      &route.address, &route.control))
		return NULL;
	if (part_ok(self, first, count) && route_ok(&route)) {
		for (int i = 0; i < count; i++) {
			iov[i].iov_base = slot(self, first + i);
			iov[i].iov_len = self->len[first + i];
		}
		for (int done = 0, tries = 0; done < count;) {
			int n = message_send(fd, iov + done,
					   self->gso_size + first + done,
					   count - done, &route, !error);

			if (n < 0)
				error = n;
			/* It may be the error of an earlier datagram, even to
			 * another peer; once reported, it is gone */
			if (n < 0 && n != -EAGAIN && tries++ < 2)
				continue;
			tries = 0;
			done += n > 0 ? n : 1;
		}
	}
	route_release(&route);
	return PyErr_Occurred() ? NULL : PyLong_FromLong(error);
}

static int template_ok(const Py_buffer *template, int mtu)
{
	if (frame_headers_len((size_t)template->len, 0) && mtu >= 68)
		return 1;
	PyErr_SetString(PyExc_ValueError, "bad template or MTU");
	return 0;
}

/* The datagrams from FIRST on, as far as they can be joined; how many. */
static int emit_many(struct packets *self, struct tap *tap,
		     const Py_buffer *template, int first, int count,
		     size_t mtu)
{
	struct iovec iov[BATCH];
	int n = 0;

	/* What the kernel has joined is passed on as it is */
	for (; n < count && !self->gso_size[first + n]; n++) {
		iov[n].iov_base = slot(self, first + n);
		iov[n].iov_len = self->len[first + n];
	}
	if (n < 2)
		return 0;
	return datagram_emit_many(tap, template->buf, (size_t)template->len,
				  iov, n, mtu);
}

/* emit(tap, template, first, count, mtu, uso) -> 0 or the last -errno */
static PyObject *packets_emit(PyObject *obj, PyObject *args)
{
	struct packets *self = (struct packets *)obj;
	int first, count, mtu, uso, error = 0;
	Py_buffer template;
	struct tap *tap;

	if (!PyArg_ParseTuple(args, "O!y*iiip:emit", self->state->tap_type,
			      &tap, &template, &first, &count, &mtu, &uso))
		return NULL;
	if (template_ok(&template, mtu) && part_ok(self, first, count)) {
		int joins = tap->vnet && uso;

		for (int i = first, n; i < first + count; i += n) {
			n = joins ? emit_many(self, tap, &template, i,
					      first + count - i, (size_t)mtu) :
				    0;
			if (n < 0) {
				joins = 0;
				n = 0;
			}
			if (!n) {
				int rc = datagram_emit(
					tap, template.buf, (size_t)template.len,
					slot(self, i), self->len[i],
					self->gso_size[i], (size_t)mtu, uso);

				if (rc)
					error = rc;
				n = 1;
			}
		}
	}
	PyBuffer_Release(&template);
	return PyErr_Occurred() ? NULL : PyLong_FromLong(error);
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
	{"send_bytes", packets_send_bytes, METH_VARARGS, NULL},
	{"receive", packets_receive, METH_O, NULL},
	{"payload", packets_payload, METH_O, NULL},
	{"relay", packets_relay, METH_VARARGS, NULL},
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
