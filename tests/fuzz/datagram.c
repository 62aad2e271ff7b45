/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * datagram.c: datagrams to the guest (emit.c): whole, joined, in fragments.  What
 * would go to the tap is put together again, and is what came.
 * Input: choices, MTU, size of the datagrams, then the payload.
 */
#include "../../cext/datagram.h"

#include <errno.h>

#include "fuzz.h"

#include "../../cext/csum.h"
#include "../../cext/message.h"

#define LONGEST 9000

/* What the tap got: datagrams in order, and the parts of the one that comes in
 * fragments. */
static uint8_t got[LONGEST + 1], parts[LONGEST + 64];
static size_t got_len, part_len, mtu, unit;
static int ipv4, failing;

static void deliver(const uint8_t *payload, size_t len, size_t size)
{
	/* All of one size, but for the last */
	for (size_t at = 0; size && at + size < len; at += size)
		CHECK(size == unit);
	CHECK(got_len % (unit ? unit : 1) == 0);
	CHECK(got_len + len <= LONGEST);
	memcpy(got + got_len, payload, len);
	got_len += len;
}

static void fragment(const uint8_t *frame, size_t len)
{
	const uint8_t *ip = frame + ETH_LEN;
	size_t header = ipv4 ? 20 : 48, at;
	int more;

	CHECK(len - ETH_LEN <= mtu);
	if (ipv4) {
		at = (size_t)((ip[6] & 0x1f) << 8 | ip[7]) * 8;
		more = ip[6] & 0x20;
		CHECK(plain_sum(ip, 20, 0) == 0xffff);
	} else {
		CHECK(ip[6] == PROTO_FRAGMENT && ip[40] == PROTO_UDP);
		at = (size_t)(ip[42] << 8 | ip[43]) & ~(size_t)7;
		more = ip[43] & 1;
	}
	CHECK(at == part_len);
	CHECK(!more || (len - ETH_LEN - header) % 8 == 0);
	CHECK(part_len + len <= sizeof(parts));
	memcpy(parts + part_len, ip + header, len - ETH_LEN - header);
	part_len += len - ETH_LEN - header;
	if (more)
		return;
	CHECK((size_t)(parts[4] << 8 | parts[5]) == part_len);
	/* The sum over the whole, with the addresses of this packet */
	uint32_t sum = plain_sum(ip + (ipv4 ? 12 : 8), ipv4 ? 8 : 32,
				 (uint32_t)part_len + PROTO_UDP);
	CHECK(plain_sum(parts, part_len, sum) == 0xffff);
	deliver(parts + 8, part_len - 8, 0);
	part_len = 0;
}

ssize_t tap_write(struct tap *tap, struct iovec *iov, int count)
{
	static uint8_t frame[VNET_HDR_LEN + FRAME_MAX];
	struct vnet_header vnet = { 0 };
	struct segment seg;
	size_t len = 0;

	if (failing)
		return -EAGAIN;
	for (int i = 0; i < count; i++) {
		CHECK(len + iov[i].iov_len <= sizeof(frame));
		memcpy(frame + len, iov[i].iov_base, iov[i].iov_len);
		len += iov[i].iov_len;
	}
	if (tap->vnet)
		memcpy(&vnet, frame, sizeof(vnet));
	const uint8_t *start = frame + (tap->vnet ? VNET_HDR_LEN : 0);
	size_t n = len - (size_t)(start - frame);

	if (start[ETH_LEN + (ipv4 ? 9 : 6)] == PROTO_FRAGMENT ||
	    (ipv4 && (start[ETH_LEN + 6] & 0x3f || start[ETH_LEN + 7]))) {
		fragment(start, n);
		return (ssize_t)len;
	}
	CHECK(frame_parse(start, n, vnet.flags & VNET_F_NEEDS_CSUM, NULL, &seg) ==
	      FRAME_UDP);
	CHECK(vnet.gso_size || n - ETH_LEN <= mtu);
	CHECK(!vnet.gso_size || vnet.gso_size < seg.len);
	deliver(start + seg.payload, seg.len, vnet.gso_size);
	return (ssize_t)len;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct tap tap;
	static uint8_t memory[256 + LONGEST];
	struct input in = { data, size };
	uint8_t choices = (uint8_t)take(&in, 1), template[TEMPLATE6_LEN];
	size_t template_len, gso_size;
	int error, uso = choices >> 2 & 1;

	ipv4 = choices & 1;
	failing = (choices & 0x70) == 0x70;
	tap.vnet = choices >> 1 & 1;
	mtu = 68 + take(&in, 2) % 9000;
	if (!ipv4 && mtu < 1280)
		mtu = 1280;
	gso_size = take(&in, 2);
	if (in.len > LONGEST)
		return -1;
	unit = gso_size && gso_size < in.len ? gso_size : in.len;
	template_len = make_template(template, ipv4, PROTO_UDP, 0x9c400050);
	memcpy(memory + 256, in.data, in.len);
	got_len = part_len = 0;

	if (choices & 8 && unit && in.len) {
		/* The same as single datagrams, as many as one frame takes */
		struct iovec payloads[64];
		int count = 0, done;
		size_t total = 0;

		for (size_t at = 0; at < in.len && count < 64; at += unit) {
			payloads[count].iov_base = memory + 256 + at;
			payloads[count].iov_len =
				in.len - at < unit ? in.len - at : unit;
			count++;
		}
		tap.vnet = 1;
		done = datagram_emit_many(&tap, template, template_len, payloads,
					  count, mtu);
		CHECK(done <= count && done != 1);
		if (failing || done < 0) {
			CHECK(done <= 0 && got_len == 0);
			return 0;
		}
		for (int i = 0; i < done; i++)
			total += payloads[i].iov_len;
		CHECK(got_len == total && !memcmp(got, in.data, total));
		return 0;
	}
	error = datagram_emit(&tap, template, template_len, memory + 256, in.len,
			      gso_size, mtu, uso);
	CHECK(error == (failing ? -EAGAIN : 0));
	/* What was there before the payload is there again */
	CHECK(!memcmp(memory + 256, in.data, in.len));
	if (!failing)
		CHECK(got_len == in.len && !memcmp(got, in.data, in.len));
	return 0;
}
