/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * stream.h: bytes on their way, in memory that Python never sees.
 */
#ifndef PYSPLICE_STREAM_H
#define PYSPLICE_STREAM_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <sys/uio.h>

/* A ring of bytes, taken from a socket or from a run and dropped in order at
 * the head. */
struct stream {
	PyObject_HEAD
	uint8_t *memory;
	size_t capacity;
	size_t head;            /* offset of the first byte */
	size_t len;             /* bytes held */
	size_t touched;         /* memory in use since the last trim() */
};

extern PyType_Spec stream_spec;

/* The LEN bytes at OFFSET from the head as one or two pieces; returns their
 * number.  The caller has checked offset + len <= stream->len. */
int stream_pieces(struct stream *stream, size_t offset, size_t len,
		  struct iovec iov[2]);

/* Append LEN bytes; the caller has checked the room. */
void stream_append(struct stream *stream, const uint8_t *data, size_t len);

#endif
