/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * frame_parse.c: frames from the guest, taken apart.  Owns nothing, decides
 * nothing; compiles without Python.h, so that it can run under a sanitizer by
 * itself.
 *
 * The guest may write anything: every length is checked against what was read
 * before the bytes behind it are touched.
 */
#include <stddef.h>

#include "csum.h"
#include "frame.h"

#define EXTENSION_HEADERS_MAX 4

/* Where layer 4 is in a frame, and what its checksum covers besides. */
struct layer4 {
	const uint8_t *frame;
	size_t at;                      /* offset in the frame */
	size_t len;
	const uint8_t *addresses;       /* source, then destination */
	size_t addresses_len;
	int trusted;                    /* no checksum: see docs/security.md */
};

static enum frame_kind bad(struct segment *seg, enum drop_reason reason)
{
	seg->reason = reason;
	return FRAME_BAD;
}

/* True if the checksum of LEN bytes of layer 4 is right (RFC 9293, section 3.1;
 * RFC 8200, section 8.1). */
static int sum_ok(const struct layer4 *l4, size_t len, uint8_t proto)
{
	const be32 tail[2] = { put32((uint32_t)len), put32(proto) };
	uint64_t sum = csum_add(l4->addresses, l4->addresses_len, 0);

	sum = csum_add(tail, sizeof(tail), sum);
	return csum_fold(csum_add(l4->frame + l4->at, len, sum)) == 0xffff;
}

/* Addresses and ports; False if a port is 0. */
static int set_key(struct segment *seg, const struct layer4 *l4)
{
	static const uint8_t none[2];
	const uint8_t *ports = l4->frame + l4->at;

	if (!memcmp(ports, none, 2) || !memcmp(ports + 2, none, 2))
		return 0;
	memcpy(seg->key, l4->addresses, l4->addresses_len);
	memcpy(seg->key + l4->addresses_len, ports, PORTS_LEN);
	seg->key_len = (uint8_t)(l4->addresses_len + PORTS_LEN);
	return 1;
}

/* RFC 9293, section 3.1 and RFC 7323, section 2.2: the options of a SYN. */
static void parse_options(const uint8_t *p, size_t len, struct segment *seg)
{
	while (len) {
		if (p[0] == TCP_OPTION_END)
			break;
		if (p[0] == TCP_OPTION_NOP) {
			p++;
			len--;
			continue;
		}
		/* RFC 9293, 3.1 (MUST-7): what is behind an illegal length
		 * cannot be read, and an option of another length than its own
		 * says nothing; the kernel does the same */
		if (len < 2 || p[1] < 2 || p[1] > len)
			break;
		if (p[0] == TCP_OPTION_MSS && p[1] == 4)
			seg->mss = get16((be16){ { p[2], p[3] } });
		else if (p[0] == TCP_OPTION_WSCALE && p[1] == 3)
			seg->wscale = p[2] > TCP_WSCALE_MAX ? TCP_WSCALE_MAX :
							      (int8_t)p[2];
		len -= p[1];
		p += p[1];
	}
}

static enum frame_kind parse_tcp(const struct layer4 *l4, struct segment *seg)
{
	const struct tcp_header *tcp = (const void *)(l4->frame + l4->at);
	size_t header;

	if (l4->len < sizeof(*tcp))
		return bad(seg, DROP_LENGTH);
	header = (size_t)(tcp->data_offset >> 4) * 4;
	if (header < sizeof(*tcp) || header > l4->len)
		return bad(seg, DROP_LENGTH);
	if (!l4->trusted && !sum_ok(l4, l4->len, PROTO_TCP))
		return bad(seg, DROP_CHECKSUM);

	seg->flags = tcp->flags &
		     (TCP_FIN | TCP_SYN | TCP_RST | TCP_PSH | TCP_ACK);
	if ((seg->flags & TCP_SYN) && (seg->flags & (TCP_FIN | TCP_RST)))
		return bad(seg, DROP_FLAGS);
	if (!set_key(seg, l4))
		return bad(seg, DROP_PORT);
	seg->wscale = -1;
	if (seg->flags & TCP_SYN)
		parse_options((const uint8_t *)(tcp + 1), header - sizeof(*tcp),
			      seg);

	seg->seq = get32(tcp->seq);
	seg->ack = get32(tcp->ack);
	seg->window = get16(tcp->window);
	seg->payload = (uint32_t)(l4->at + header);
	seg->len = (uint32_t)(l4->len - header);
	return FRAME_TCP;
}

static enum frame_kind parse_udp(const struct layer4 *l4, struct segment *seg)
{
	const struct udp_header *udp = (const void *)(l4->frame + l4->at);
	size_t len;

	if (l4->len < sizeof(*udp))
		return bad(seg, DROP_LENGTH);
	len = get16(udp->len);
	if (len < sizeof(*udp) || len > l4->len)
		return bad(seg, DROP_LENGTH);
	if (!l4->trusted) {
		/* RFC 768: 0 is "no checksum"; RFC 8200, 8.1: not for IPv6 */
		int none = !get16(udp->check) && l4->addresses_len == 8;

		if (!none &&
		    (!get16(udp->check) || !sum_ok(l4, len, PROTO_UDP)))
			return bad(seg, DROP_CHECKSUM);
	}
	/* RFC 768: source port 0 means none, so it cannot be answered */
	if (!set_key(seg, l4))
		return bad(seg, DROP_PORT);
	seg->payload = (uint32_t)(l4->at + sizeof(*udp));
	seg->len = (uint32_t)(len - sizeof(*udp));
	seg->udp = 1;
	return FRAME_UDP;
}

/* The rule for addresses; pysplice/wire.py has the same for the packets that
 * Python looks into (may_pass()). */

/* An address that a packet on the link can come from, or go to as to one host
 * (RFC 1122, 3.2.1.3). */
static int is_host4(const uint8_t *ip)
{
	return ip[0] && ip[0] != 127 && ip[0] < 224;
}

/* 224.0.0.0/4 and the limited broadcast address. */
static int is_group4(const uint8_t *ip)
{
	static const uint8_t all[4] = { 255, 255, 255, 255 };

	return (ip[0] & 0xf0) == 224 || !memcmp(ip, all, sizeof(all));
}

/* RFC 4291, section 2.5. */
static int is_host6(const uint8_t *ip)
{
	/* ::/96 has the unspecified and the loopback address; ::ffff:0:0/96 is
	 * IPv4 to a socket, and would lead past the rule for IPv4 */
	static const uint8_t low[12];
	static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };

	return ip[0] != 0xff && memcmp(ip, low, sizeof(low)) &&
	       memcmp(ip, mapped, sizeof(mapped));
}

/* Multicast beyond this interface (RFC 4291, section 2.7). */
static int is_group6(const uint8_t *ip)
{
	return ip[0] == 0xff && (ip[1] & 0xf) > 1;
}

static enum frame_kind parse_ipv4(const uint8_t *frame, size_t len, int trusted,
				  struct segment *seg)
{
	const struct ipv4_header *ip = (const void *)(frame + ETH_LEN);
	size_t header, total;
	int from_host, to_host, fragment;

	if (len < ETH_LEN + sizeof(*ip) || ip->version_ihl >> 4 != 4)
		return bad(seg, DROP_LENGTH);
	header = (size_t)(ip->version_ihl & 0xf) * 4;
	total = get16(ip->total_len);
	if (header < sizeof(*ip) || total < header || total > len - ETH_LEN)
		return bad(seg, DROP_LENGTH);
	if (csum_fold(csum_add(ip, header, 0)) != 0xffff)
		return bad(seg, DROP_CHECKSUM);
	seg->ttl = ip->ttl;
	seg->df = (get16(ip->fragment) & IPV4_DONT_FRAGMENT) != 0;
	/* RFC 1812, 5.3.1: with no hops left it is not forwarded */
	if (!seg->ttl)
		return FRAME_OTHER;

	const struct layer4 l4 = {
		.frame = frame,
		.at = ETH_LEN + header,
		.len = total - header,
		.addresses = ip->source,
		.addresses_len = 2 * sizeof(ip->source),
		.trusted = trusted,
	};

	from_host = is_host4(ip->source);
	to_host = is_host4(ip->destination);
	fragment = get16(ip->fragment) & IPV4_FRAGMENT_MASK;
	if (ip->protocol == PROTO_UDP && !fragment && from_host &&
	    (to_host || is_group4(ip->destination)))
		return parse_udp(&l4, seg);
	if (ip->protocol != PROTO_TCP)
		return FRAME_OTHER;
	/* A TCP never has a reason to send fragments on its own link */
	if (fragment)
		return bad(seg, DROP_FRAGMENT);
	if (!from_host || !to_host || seg->group)
		return bad(seg, DROP_ADDRESS);
	return parse_tcp(&l4, seg);
}

static enum frame_kind parse_ipv6(const uint8_t *frame, size_t len, int trusted,
				  struct segment *seg)
{
	const struct ipv6_header *ip = (const void *)(frame + ETH_LEN);
	size_t at = ETH_LEN + sizeof(*ip), end;
	int from_host, to_host;
	uint8_t next;

	if (len < at || ip->version_class_flow.byte[0] >> 4 != 6)
		return bad(seg, DROP_LENGTH);
	end = at + get16(ip->payload_len);
	if (end > len)
		return bad(seg, DROP_LENGTH);

	next = ip->next_header;
	for (int i = 0; next == PROTO_HOPOPTS || next == PROTO_DSTOPTS; i++) {
		const struct ipv6_options_header *options;
		size_t size;

		if (i == EXTENSION_HEADERS_MAX || end - at < 8)
			return bad(seg, DROP_LENGTH);
		options = (const void *)(frame + at);
		size = ((size_t)options->len + 1) * 8;
		if (size > end - at)
			return bad(seg, DROP_LENGTH);
		next = options->next_header;
		at += size;
	}
	seg->ttl = ip->hop_limit;
	seg->df = 1;
	if (!seg->ttl)
		return FRAME_OTHER;

	const struct layer4 l4 = {
		.frame = frame,
		.at = at,
		.len = end - at,
		.addresses = ip->source,
		.addresses_len = 2 * sizeof(ip->source),
		.trusted = trusted,
	};

	from_host = is_host6(ip->source);
	to_host = is_host6(ip->destination);
	if (next == PROTO_UDP && from_host &&
	    (to_host || is_group6(ip->destination)))
		return parse_udp(&l4, seg);
	if (next != PROTO_TCP)
		return FRAME_OTHER;
	if (!from_host || !to_host || seg->group)
		return bad(seg, DROP_ADDRESS);
	return parse_tcp(&l4, seg);
}

enum frame_kind frame_parse(const uint8_t *frame, size_t len, int trusted,
			    const uint8_t *mac, struct segment *seg)
{
	const struct ethernet_header *ethernet = (const void *)frame;

	memset(seg, 0, sizeof(*seg));
	if (len < sizeof(*ethernet))
		return bad(seg, DROP_LENGTH);
	seg->group = ethernet->destination[0] & 1;
	if (mac && !seg->group &&
	    memcmp(ethernet->destination, mac, sizeof(ethernet->destination)))
		return bad(seg, DROP_MAC);
	switch (get16(ethernet->type)) {
	case ETHERTYPE_IPV4:
		return parse_ipv4(frame, len, trusted, seg);
	case ETHERTYPE_IPV6:
		return parse_ipv6(frame, len, trusted, seg);
	default:
		return FRAME_OTHER;
	}
}
