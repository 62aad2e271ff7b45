/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * stream.c: the Stream type, a ring of bytes between two sockets.  Owns its
 * memory; knows no connection.
 *
 * One kind of ring serves both directions: bytes taken from a host socket that
 * the guest has not acknowledged yet, and bytes read from the guest that the
 * host socket did not take.
 *
 * system calls (serve): recvmsg sendmsg mmap munmap madvise
 */
#include "stream.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

/* Copies between page-aligned buffers of the kernel's and a buffer a few bytes
 * off the page (distance modulo 4096 of 1 to 15) are several times slower on
 * CPUs with fast string moves.  Payload starts here in each page of the ring,
 * away from that range. */
#define FIRST_BYTE 256

/* trim() leaves this much, so that small answers do not fault pages in and out */
#define TRIM_KEEP ((size_t)64 << 10)

#define CAPACITY_MAX ((size_t)1 << 30)

int stream_pieces(struct stream *stream, size_t offset, size_t len,
		  struct iovec iov[2])
{
	size_t start = stream->head + offset, first;

	if (start >= stream->capacity)
		start -= stream->capacity;
	first = stream->capacity - start;
	iov[0].iov_base = stream->memory + FIRST_BYTE + start;
	if (len <= first) {
		iov[0].iov_len = len;
		return 1;
	}
	iov[0].iov_len = first;
	iov[1].iov_base = stream->memory + FIRST_BYTE;
	iov[1].iov_len = len - first;
	return 2;
}

/* LEN bytes were written behind those that the stream holds. */
static void grow(struct stream *stream, size_t len)
{
	size_t end = stream->head + stream->len + len;

	if (end > stream->touched)
		stream->touched = end < stream->capacity ? end : stream->capacity;
	stream->len += len;
}

void stream_append(struct stream *stream, const uint8_t *data, size_t len)
{
	struct iovec iov[2];
	int n = stream_pieces(stream, stream->len, len, iov);

	for (int i = 0; i < n; i++) {
		memcpy(iov[i].iov_base, data, iov[i].iov_len);
		data += iov[i].iov_len;
	}
	grow(stream, len);
}

static void drop(struct stream *stream, size_t len)
{
	stream->len -= len;
	/* Start over when empty: the same memory stays in the cache */
	if (!stream->len) {
		stream->head = 0;
		return;
	}
	stream->head += len;
	if (stream->head >= stream->capacity)
		stream->head -= stream->capacity;
}

static PyObject *stream_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"capacity", NULL};
	allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	struct stream *self;
	Py_ssize_t capacity;
	void *memory;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n:Stream", names,
					 &capacity))
		return NULL;
	if (capacity < 1 || (size_t)capacity > CAPACITY_MAX) {
		PyErr_SetString(PyExc_ValueError, "capacity out of range");
		return NULL;
	}
	memory = mmap(NULL, (size_t)capacity + FIRST_BYTE,
		      PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		      0);
	if (memory == MAP_FAILED)
		return PyErr_NoMemory();
	self = (struct stream *)alloc(type, 0);
	if (!self) {
		munmap(memory, (size_t)capacity + FIRST_BYTE);
		return NULL;
	}
	self->memory = memory;
	self->capacity = (size_t)capacity;
	return (PyObject *)self;
}

static void stream_dealloc(PyObject *obj)
{
	struct stream *self = (struct stream *)obj;
	PyTypeObject *type = Py_TYPE(obj);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	if (self->memory)
		munmap(self->memory, self->capacity + FIRST_BYTE);
	release(obj);
	Py_DECREF(type);
}

static Py_ssize_t stream_length(PyObject *obj)
{
	return (Py_ssize_t)((struct stream *)obj)->len;
}

static PyObject *stream_receive(PyObject *obj, PyObject *args)
{
	struct stream *self = (struct stream *)obj;
	struct iovec iov[2];
	Py_ssize_t limit;
	ssize_t n;
	int fd;

	if (!PyArg_ParseTuple(args, "in:receive", &fd, &limit))
		return NULL;
	if (limit < 1 || (size_t)limit > self->capacity - self->len) {
		PyErr_SetString(PyExc_ValueError, "limit beyond the room");
		return NULL;
	}
	struct msghdr msg = {
		.msg_iov = iov,
		.msg_iovlen = (size_t)stream_pieces(self, self->len,
						    (size_t)limit, iov),
	};
	do
		n = recvmsg(fd, &msg, MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return PyLong_FromLong(-errno);
	grow(self, (size_t)n);
	return PyLong_FromSsize_t(n);
}

static PyObject *stream_send(PyObject *obj, PyObject *arg)
{
	struct stream *self = (struct stream *)obj;
	long fd = PyLong_AsLong(arg);
	struct iovec iov[2];
	ssize_t n;

	if (fd == -1 && PyErr_Occurred())
		return NULL;
	if (!self->len)
		return PyLong_FromLong(0);
	struct msghdr msg = {
		.msg_iov = iov,
		.msg_iovlen = (size_t)stream_pieces(self, 0, self->len, iov),
	};
	do
		n = sendmsg((int)fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return PyLong_FromLong(-errno);
	drop(self, (size_t)n);
	return PyLong_FromSsize_t(n);
}

static PyObject *stream_discard(PyObject *obj, PyObject *arg)
{
	struct stream *self = (struct stream *)obj;
	Py_ssize_t n = PyLong_AsSsize_t(arg);

	if (n == -1 && PyErr_Occurred())
		return NULL;
	if (n < 0 || (size_t)n > self->len) {
		PyErr_SetString(PyExc_ValueError, "more than the stream holds");
		return NULL;
	}
	drop(self, (size_t)n);
	Py_RETURN_NONE;
}

static PyObject *stream_trim(PyObject *obj, PyObject *Py_UNUSED(ignored))
{
	struct stream *self = (struct stream *)obj;

	if (self->len) {
		PyErr_SetString(PyExc_ValueError, "the stream is not empty");
		return NULL;
	}
	if (self->touched > TRIM_KEEP) {
		madvise(self->memory, self->capacity + FIRST_BYTE,
			MADV_DONTNEED);
		self->touched = 0;
	}
	Py_RETURN_NONE;
}

static PyMethodDef stream_methods[] = {
	{"receive", stream_receive, METH_VARARGS, NULL},
	{"send", stream_send, METH_O, NULL},
	{"discard", stream_discard, METH_O, NULL},
	{"trim", stream_trim, METH_NOARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static PyType_Slot stream_slots[] = {
	{Py_tp_new, stream_new},
	{Py_tp_dealloc, stream_dealloc},
	{Py_tp_methods, stream_methods},
	{Py_sq_length, stream_length},
	{Py_tp_doc, "A ring of bytes that Python never sees; see _cext.pyi."},
	{0, NULL},
};

PyType_Spec stream_spec = {
	.name = "pysplice._cext.Stream",
	.basicsize = sizeof(struct stream),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
	.slots = stream_slots,
};
