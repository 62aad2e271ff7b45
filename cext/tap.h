/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * tap.h: the type that drains and fills a tap, and what its files share.
 */
#ifndef PYSPLICE_TAP_H
#define PYSPLICE_TAP_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sys/uio.h>

#include "frame.h"

/* What the types of the module share; one for each module object. */
struct module_state {
	PyTypeObject *stream_type;
	PyTypeObject *tap_type;
	PyTypeObject *packets_type;
	PyTypeObject *run_type;
	PyTypeObject *datagrams_type;
	PyTypeObject *facts_type;
};

#define BATCH_FRAMES 256                /* IOV_MAX is 1024 */
#define BATCH_BYTES ((size_t)1 << 20)
/* See FIRST_BYTE in stream.c: payload begins 66 to 86 bytes further on */
#define FIRST_FRAME 512
#define FRAME_ALIGN 64

struct frame {
	uint32_t start;                 /* of the Ethernet header, in memory */
	uint32_t payload;               /* in memory */
	uint32_t len;                   /* of the payload */
	uint16_t gso_size;              /* size of its datagrams; 0: only one */
	int next;                       /* frame of the same run, or -1 */
};

struct run {
	struct segment first;           /* seq, key, options of the first */
	uint32_t ack;
	uint32_t last_seq;              /* of the last segment */
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
	int capture;                    /* descriptor of a pcap file, or -1 */
	uint32_t ident;                 /* of fragments */
	uint32_t generation;            /* of the handles: counts batches */
	int frame_count;
	int run_count;
	uint64_t dropped[DROP_REASONS];
	int filter;                     /* frames for other stations are dropped */
	uint8_t mac[6];
	struct frame frames[BATCH_FRAMES];
	struct run runs[BATCH_FRAMES];
	uint8_t *memory;
};

extern PyType_Spec tap_spec;

/* Add a segment or datagram that frame_parse() has taken apart to the batch;
 * START is where its frame begins in memory. */
void tap_add_segment(struct tap *self, const struct segment *seg,
		     uint32_t start, uint16_t gso_size);

/* A run as Python has it: a Run, or Datagrams. */
PyObject *tap_make_run(struct tap *self, int index);

/* The run that a handle names, or NULL with ValueError set. */
struct run *tap_find_run(struct tap *self, unsigned long long handle);

/* The LEN payload bytes at SKIP of a run as pieces; returns their number. */
int tap_run_pieces(struct tap *self, const struct run *run, size_t skip,
		   size_t len, struct iovec iov[BATCH_FRAMES]);

/* Write one frame, vnet header first if there is one; bytes or -errno. */
ssize_t tap_write(struct tap *self, struct iovec *iov, int count);

#endif
