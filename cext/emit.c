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

int datagram_emit(struct tap *tap, const uint8_t *template,
		    size_t template_len, uint8_t *payload, size_t len,
		    size_t gso_size, size_t mtu, int uso)
{
	size_t headers_len = frame_ip_len(template_len, 0) +
			     sizeof(struct udp_header);
	size_t unit = gso_size && gso_size < len ? gso_size : len;
	size_t step = unit;
	uint8_t headers[HEADERS_MAX];
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
