/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * emit.c: datagrams to the guest: joined where the tap segments them, in
 * fragments where they are larger than the MTU.  Owns nothing.
 *
 * system calls (serve): writev
 */
#include "datagram.h"

#include <string.h>

#include "csum.h"
#include "message.h"
#include "tap.h"

/* One datagram to the guest in fragments of at most MTU; PAYLOAD has room for
 * its UDP header before it. */
static int emit_fragments(struct tap *tap, const uint8_t *template,
			  size_t template_len, uint8_t *payload, size_t len,
			  size_t mtu)
{
	uint8_t headers[HEADERS_MAX + 8] = {0};
	size_t vnet_len = tap->vnet ? VNET_HDR_LEN : 0;
	struct udp_header *udp = (void *)(payload - sizeof(*udp));
	size_t total = len + sizeof(*udp), most;

	memcpy(udp, template + template_len - PORTS_LEN, PORTS_LEN);
	udp->len = put16((uint16_t)total);
	frame_put_udp_check(template, template_len, udp, total);

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
		iov[1].iov_base = (uint8_t *)udp + from;
		iov[1].iov_len = part;
		n = tap_write(tap, iov, 2);
		if (n < 0)
			return (int)n;
	}
	return 0;
}

/* COUNT pieces from IOV[1] on, LEN bytes in all, in one frame: datagrams of
 * UNIT bytes, of which the last may be shorter.  IOV[0] is for the headers. */
static int emit_joined(struct tap *tap, const uint8_t *template,
		       size_t template_len, struct iovec *iov, int count,
		       size_t len, size_t unit)
{
	uint8_t headers[HEADERS_MAX];
	uint64_t sum = 0;
	ssize_t n;

	/* Without offloads a frame has one datagram, in one piece */
	if (!tap->vnet)
		sum = csum_add(iov[1].iov_base, len, 0);
	iov[0].iov_base = headers;
	iov[0].iov_len = frame_build_udp(headers, template, template_len, len,
					 sum, len > unit ? (uint16_t)unit : 0,
					 tap->vnet);
	n = tap_write(tap, iov, 1 + count);
	return n < 0 ? (int)n : 0;
}

/* How many datagrams of UNIT bytes one frame can carry. */
static size_t joined_max(size_t template_len, size_t unit)
{
	size_t most = (IP_MAX - frame_ip_len(template_len, 0) -
		       sizeof(struct udp_header)) / unit;

	return most > GSO_MAX ? GSO_MAX : most;
}

int datagram_emit(struct tap *tap, const uint8_t *template,
		    size_t template_len, uint8_t *payload, size_t len,
		    size_t gso_size, size_t mtu, int uso)
{
	size_t headers_len = frame_ip_len(template_len, 0) +
			     sizeof(struct udp_header);
	size_t unit = gso_size && gso_size < len ? gso_size : len;
	size_t step = unit;
	int error = 0;

	if (headers_len + unit > mtu ||
	    (template_len == TEMPLATE4_LEN && headers_len + unit > IP_MAX)) {
		/* The header of each is written over the last bytes before it */
		for (size_t at = 0; !error && (at < len || !at); at += unit) {
			size_t part = len - at < unit ? len - at : unit;
			uint8_t kept[sizeof(struct udp_header)];

			memcpy(kept, payload + at - sizeof(kept), sizeof(kept));
			if (part < unit)
				error = datagram_emit(tap, template, template_len,
						 payload + at, part, 0, mtu, 0);
			else
				error = emit_fragments(tap, template,
						       template_len,
						       payload + at, part, mtu);
			memcpy(payload + at - sizeof(kept), kept, sizeof(kept));
			if (!unit)
				break;
		}
		return error;
	}
	if (tap->vnet && uso && unit < len)
		step = joined_max(template_len, unit) * unit;
	for (size_t at = 0; at < len || !at; at += step) {
		size_t part = len - at < step ? len - at : step;
		struct iovec iov[2];

		iov[1].iov_base = payload + at;
		iov[1].iov_len = part;
		error = emit_joined(tap, template, template_len, iov, 1, part,
				    unit);
		if (error || !step)
			break;
	}
	return error;
}

int datagram_emit_many(struct tap *tap, const uint8_t *template,
		       size_t template_len, const struct iovec *payloads,
		       int count, size_t mtu)
{
	size_t unit = payloads[0].iov_len, len = unit, most;
	struct iovec iov[1 + GSO_MAX];
	int n = 1, error;

	if (!unit || frame_ip_len(template_len, 0) +
			     sizeof(struct udp_header) + unit > mtu)
		return 0;
	most = joined_max(template_len, unit);
	/* A shorter one ends the frame */
	while (n < count && (size_t)n < most && payloads[n].iov_len &&
	       payloads[n].iov_len <= unit &&
	       payloads[n - 1].iov_len == unit)
		len += payloads[n++].iov_len;
	if (n == 1)
		return 0;
	memcpy(iov + 1, payloads, (size_t)n * sizeof(*iov));
	error = emit_joined(tap, template, template_len, iov, n, len, unit);
	return error ? error : n;
}
