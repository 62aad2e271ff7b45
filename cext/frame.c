/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * frame.c: frames in, frames out.  Owns nothing, takes no decision; compiles
 * without Python.h, so that it can run under a sanitizer by itself.
 *
 * The guest writes what it likes: every length is checked against what was
 * read before the bytes behind it are touched.
 */
#include "frame.h"

#include <arpa/inet.h>
#include <string.h>

#include "csum.h"

#define ETH_P_IPV4 0x0800
#define ETH_P_IPV6 0x86dd
#define PROTO_HOPOPTS 0
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_FRAGMENT 44
#define PROTO_DSTOPTS 60
#define EXTENSION_HEADERS_MAX 4

static uint16_t get16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t get32(const uint8_t *p)
{
	return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 |
	       (uint32_t)p[2] << 8 | p[3];
}

static void put16(uint8_t *p, uint16_t v)
{
	p[0] = (uint8_t)(v >> 8);
	p[1] = (uint8_t)v;
}

static void put32(uint8_t *p, uint32_t v)
{
	put16(p, (uint16_t)(v >> 16));
	put16(p + 2, (uint16_t)v);
}

/* Sum of the pseudo header (RFC 9293, section 3.1; RFC 8200, section 8.1). */
static uint64_t pseudo_sum(const uint8_t *addresses, size_t addresses_len,
			   size_t l4_len, uint8_t proto)
{
	uint8_t tail[8];

	put32(tail, (uint32_t)l4_len);
	put32(tail + 4, proto);
	return csum_add(tail, sizeof(tail),
			csum_add(addresses, addresses_len, 0));
}

static enum frame_kind bad(struct segment *seg, enum drop_reason reason)
{
	seg->reason = reason;
	return FRAME_BAD;
}

/* RFC 9293, section 3.1 and RFC 7323, section 2.2: the options of a SYN. */
static int parse_options(const uint8_t *p, size_t len, struct segment *seg)
{
	while (len) {
		if (p[0] == 0)
			break;
		if (p[0] == 1) {
			p++;
			len--;
			continue;
		}
		if (len < 2 || p[1] < 2 || p[1] > len)
			return -1;
		if (p[0] == 2) {
			if (p[1] != 4)
				return -1;
			seg->mss = get16(p + 2);
		} else if (p[0] == 3) {
			if (p[1] != 3)
				return -1;
			/* RFC 7323, section 2.3: more than 14 counts as 14 */
			seg->wscale = p[2] > 14 ? 14 : (int8_t)p[2];
		}
		len -= p[1];
		p += p[1];
	}
	return 0;
}

static enum frame_kind parse_tcp(const uint8_t *frame, size_t l4, size_t l4_len,
				 const uint8_t *addresses, size_t addresses_len,
				 int trusted, struct segment *seg)
{
	const uint8_t *tcp = frame + l4;
	size_t header;

	if (l4_len < 20)
		return bad(seg, DROP_LENGTH);
	header = (size_t)(tcp[12] >> 4) * 4;
	if (header < 20 || header > l4_len)
		return bad(seg, DROP_LENGTH);
	if (!trusted &&
	    csum_fold(csum_add(tcp, l4_len,
			       pseudo_sum(addresses, addresses_len, l4_len,
					  PROTO_TCP))) !=
		    0xffff)
		return bad(seg, DROP_CHECKSUM);

	seg->flags = tcp[13] & (TCP_FIN | TCP_SYN | TCP_RST | TCP_PSH | TCP_ACK);
	if ((seg->flags & TCP_SYN) && (seg->flags & (TCP_FIN | TCP_RST)))
		return bad(seg, DROP_FLAGS);
	if ((!tcp[0] && !tcp[1]) || (!tcp[2] && !tcp[3]))
		return bad(seg, DROP_PORT);

	seg->mss = 0;
	seg->wscale = -1;
	if ((seg->flags & TCP_SYN) && parse_options(tcp + 20, header - 20, seg))
		return bad(seg, DROP_FLAGS);

	memcpy(seg->key, addresses, addresses_len);
	memcpy(seg->key + addresses_len, tcp, 4);
	seg->key_len = (uint8_t)(addresses_len + 4);
	seg->seq = get32(tcp + 4);
	seg->ack = get32(tcp + 8);
	seg->window = get16(tcp + 14);
	seg->payload = (uint32_t)(l4 + header);
	seg->len = (uint32_t)(l4_len - header);
	seg->udp = 0;
	return FRAME_TCP;
}

static enum frame_kind parse_udp(const uint8_t *frame, size_t l4, size_t l4_len,
				 const uint8_t *addresses, size_t addresses_len,
				 int trusted, struct segment *seg)
{
	const uint8_t *udp = frame + l4;
	size_t len;

	if (l4_len < 8)
		return bad(seg, DROP_LENGTH);
	len = get16(udp + 4);
	if (len < 8 || len > l4_len)
		return bad(seg, DROP_LENGTH);
	if (!trusted) {
		/* RFC 768: 0 is "no checksum"; RFC 8200, 8.1: not for IPv6 */
		if (!udp[6] && !udp[7]) {
			if (addresses_len != 8)
				return bad(seg, DROP_CHECKSUM);
		} else if (csum_fold(csum_add(
				   udp, len,
				   pseudo_sum(addresses, addresses_len, len,
					      PROTO_UDP))) != 0xffff) {
			return bad(seg, DROP_CHECKSUM);
		}
	}
	/* RFC 768: a source port of 0 means none; there is nothing to answer */
	if ((!udp[0] && !udp[1]) || (!udp[2] && !udp[3]))
		return bad(seg, DROP_PORT);

	memcpy(seg->key, addresses, addresses_len);
	memcpy(seg->key + addresses_len, udp, 4);
	seg->key_len = (uint8_t)(addresses_len + 4);
	seg->payload = (uint32_t)(l4 + 8);
	seg->len = (uint32_t)(len - 8);
	seg->udp = 1;
	return FRAME_UDP;
}

/* Addresses that nothing on the tap can come from, nor go to as to one host. */
static int bad_ipv4(const uint8_t *ip)
{
	return ip[0] == 127 || !ip[0] || ip[0] >= 224;
}

/* 224.0.0.0/4 and the limited broadcast address. */
static int group_ipv4(const uint8_t *ip)
{
	return (ip[0] & 0xf0) == 224 || get32(ip) == 0xffffffff;
}

static int bad_ipv6(const uint8_t *ip)
{
	/* ::/96 has the unspecified and the loopback address, ::ffff:0:0/96 is
	 * IPv4 to a socket, and would lead past what is said of IPv4 */
	static const uint8_t low[2][12] = {
		{0},
		{[10] = 0xff, [11] = 0xff},
	};

	return ip[0] == 0xff || !memcmp(ip, low[0], 12) ||
	       !memcmp(ip, low[1], 12);
}

/* Multicast beyond this interface (RFC 4291, section 2.7). */
static int group_ipv6(const uint8_t *ip)
{
	return ip[0] == 0xff && (ip[1] & 0xf) > 1;
}

static enum frame_kind parse_ipv4(const uint8_t *frame, size_t len, int trusted,
				  struct segment *seg)
{
	const uint8_t *ip = frame + ETH_LEN, *src = ip + 12, *dst = ip + 16;
	size_t header, total;

	if (len < ETH_LEN + 20 || ip[0] >> 4 != 4)
		return bad(seg, DROP_LENGTH);
	header = (size_t)(ip[0] & 0xf) * 4;
	total = get16(ip + 2);
	if (header < 20 || total < header || total > len - ETH_LEN)
		return bad(seg, DROP_LENGTH);
	if (csum_fold(csum_add(ip, header, 0)) != 0xffff)
		return bad(seg, DROP_CHECKSUM);
	seg->ttl = ip[8];
	seg->df = (ip[6] & 0x40) != 0;
	/* RFC 1812, 5.3.1: without a hop left it goes nowhere */
	if (!seg->ttl)
		return FRAME_OTHER;
	if (ip[9] == PROTO_UDP && !(get16(ip + 6) & 0x3fff) && !bad_ipv4(src) &&
	    (!bad_ipv4(dst) || group_ipv4(dst)))
		return parse_udp(frame, ETH_LEN + header, total - header, src,
				 8, trusted, seg);
	if (ip[9] != PROTO_TCP)
		return FRAME_OTHER;
	/* A TCP never has reason to send fragments on its own link */
	if (get16(ip + 6) & 0x3fff)
		return bad(seg, DROP_FRAGMENT);
	if (bad_ipv4(src) || bad_ipv4(dst) || seg->group)
		return bad(seg, DROP_ADDRESS);
	return parse_tcp(frame, ETH_LEN + header, total - header, src, 8,
			 trusted, seg);
}

static enum frame_kind parse_ipv6(const uint8_t *frame, size_t len, int trusted,
				  struct segment *seg)
{
	const uint8_t *ip = frame + ETH_LEN, *src = ip + 8, *dst = ip + 24;
	size_t l4 = ETH_LEN + 40, end;
	uint8_t next;

	if (len < l4 || ip[0] >> 4 != 6)
		return bad(seg, DROP_LENGTH);
	end = l4 + get16(ip + 4);
	if (end > len)
		return bad(seg, DROP_LENGTH);

	next = ip[6];
	for (int i = 0; next == PROTO_HOPOPTS || next == PROTO_DSTOPTS; i++) {
		if (i == EXTENSION_HEADERS_MAX || end - l4 < 8)
			return bad(seg, DROP_LENGTH);
		size_t size = ((size_t)frame[l4 + 1] + 1) * 8;
		if (size > end - l4)
			return bad(seg, DROP_LENGTH);
		next = frame[l4];
		l4 += size;
	}
	seg->ttl = ip[7];
	seg->df = 1;
	if (!seg->ttl)
		return FRAME_OTHER;
	if (next == PROTO_UDP && !bad_ipv6(src) &&
	    (!bad_ipv6(dst) || group_ipv6(dst)))
		return parse_udp(frame, l4, end - l4, src, 32, trusted, seg);
	if (next != PROTO_TCP)
		return FRAME_OTHER;
	if (bad_ipv6(src) || bad_ipv6(dst) || seg->group)
		return bad(seg, DROP_ADDRESS);
	return parse_tcp(frame, l4, end - l4, src, 32, trusted, seg);
}

enum frame_kind frame_parse(const uint8_t *frame, size_t len, int trusted,
			    const uint8_t *mac, struct segment *seg)
{
	if (len < ETH_LEN)
		return bad(seg, DROP_LENGTH);
	seg->group = frame[0] & 1;
	if (mac && !seg->group && memcmp(frame, mac, 6))
		return bad(seg, DROP_MAC);
	switch (get16(frame + 12)) {
	case ETH_P_IPV4:
		return parse_ipv4(frame, len, trusted, seg);
	case ETH_P_IPV6:
		return parse_ipv6(frame, len, trusted, seg);
	default:
		return FRAME_OTHER;
	}
}

size_t frame_headers_len(size_t template_len, size_t options_len)
{
	if (template_len != TEMPLATE4_LEN && template_len != TEMPLATE6_LEN)
		return 0;
	return template_len + 16 + options_len;
}

size_t frame_build(uint8_t *out, const uint8_t *template, size_t template_len,
		   const struct tcp_fields *tcp, size_t payload_len,
		   uint64_t payload_sum, uint16_t mss, int offload)
{
	size_t vnet_len = offload ? VNET_HDR_LEN : 0;
	size_t header = 20 + tcp->options_len, l4_len = header + payload_len;
	int ipv4 = template_len == TEMPLATE4_LEN;
	uint8_t *frame = out + vnet_len;
	uint8_t *ip = frame + ETH_LEN;
	uint8_t *l4 = frame + template_len - 4;
	uint64_t sum;

	memcpy(frame, template, template_len);
	if (ipv4) {
		put16(ip + 2, (uint16_t)(20 + l4_len));
		memset(ip + 10, 0, 2);
		uint16_t check = (uint16_t)~csum_fold(csum_add(ip, 20, 0));
		memcpy(ip + 10, &check, 2);
		sum = pseudo_sum(ip + 12, 8, l4_len, PROTO_TCP);
	} else {
		put16(ip + 4, (uint16_t)l4_len);
		sum = pseudo_sum(ip + 8, 32, l4_len, PROTO_TCP);
	}

	put32(l4 + 4, tcp->seq);
	put32(l4 + 8, tcp->ack);
	l4[12] = (uint8_t)(header / 4 << 4);
	l4[13] = tcp->flags;
	put16(l4 + 14, tcp->window);
	memset(l4 + 16, 0, 4);
	if (tcp->options_len)
		memcpy(l4 + 20, tcp->options, tcp->options_len);

	if (offload) {
		/* virtio 5.1.6.2: the field holds the sum of the pseudo header,
		 * the receiver adds the rest; numbers in the host's byte order */
		struct vnet_header vnet = {
			.flags = VNET_F_NEEDS_CSUM,
			.gso_type = VNET_GSO_NONE,
			.csum_start = (uint16_t)(l4 - frame),
			.csum_offset = 16,
		};

		if (payload_len > mss) {
			vnet.gso_type = ipv4 ? VNET_GSO_TCPV4 : VNET_GSO_TCPV6;
			vnet.gso_size = mss;
			vnet.hdr_len = (uint16_t)(template_len - 4 + header);
		}
		memcpy(out, &vnet, VNET_HDR_LEN);
		uint16_t check = csum_fold(sum);
		memcpy(l4 + 16, &check, 2);
	} else {
		sum = csum_add(l4, header, sum) + csum_fold(payload_sum);
		uint16_t check = (uint16_t)~csum_fold(sum);
		memcpy(l4 + 16, &check, 2);
	}
	return vnet_len + (size_t)(l4 - frame) + header;
}

static void put_vnet(uint8_t *out, const uint8_t *frame, const uint8_t *l4,
		     size_t header, uint16_t gso_size)
{
	struct vnet_header vnet = {
		.flags = VNET_F_NEEDS_CSUM,
		.gso_type = gso_size ? VNET_GSO_UDP_L4 : VNET_GSO_NONE,
		.gso_size = gso_size,
		.hdr_len = gso_size ? (uint16_t)(l4 - frame + header) : 0,
		.csum_start = (uint16_t)(l4 - frame),
		.csum_offset = 6,
	};

	memcpy(out, &vnet, VNET_HDR_LEN);
}

static void put_ipv4_len(uint8_t *ip, size_t len)
{
	put16(ip + 2, (uint16_t)len);
	memset(ip + 10, 0, 2);
	uint16_t check = (uint16_t)~csum_fold(csum_add(ip, 20, 0));
	memcpy(ip + 10, &check, 2);
}

uint16_t frame_udp_check(const uint8_t *template, size_t template_len,
			 const uint8_t *udp, size_t len)
{
	const uint8_t *ip = template + ETH_LEN;
	uint64_t sum = template_len == TEMPLATE4_LEN ?
			       pseudo_sum(ip + 12, 8, len, PROTO_UDP) :
			       pseudo_sum(ip + 8, 32, len, PROTO_UDP);
	uint16_t check = (uint16_t)~csum_fold(csum_add(udp, len, sum));

	return check ? check : 0xffff;
}

size_t frame_build_udp(uint8_t *out, const uint8_t *template,
		       size_t template_len, size_t payload_len,
		       uint64_t payload_sum, uint16_t gso_size, int offload)
{
	size_t vnet_len = offload ? VNET_HDR_LEN : 0;
	size_t l4_len = 8 + payload_len;
	uint8_t *frame = out + vnet_len;
	uint8_t *ip = frame + ETH_LEN;
	uint8_t *l4 = frame + template_len - 4;
	uint64_t sum;
	uint16_t check;

	memcpy(frame, template, template_len);
	if (template_len == TEMPLATE4_LEN) {
		put_ipv4_len(ip, 20 + l4_len);
		sum = pseudo_sum(ip + 12, 8, l4_len, PROTO_UDP);
	} else {
		put16(ip + 4, (uint16_t)l4_len);
		sum = pseudo_sum(ip + 8, 32, l4_len, PROTO_UDP);
	}
	put16(l4 + 4, (uint16_t)l4_len);
	memset(l4 + 6, 0, 2);
	if (offload) {
		put_vnet(out, frame, l4, 8, gso_size);
		check = csum_fold(sum);
	} else {
		check = (uint16_t)~csum_fold(csum_add(l4, 8, sum) +
					     csum_fold(payload_sum));
		if (!check)
			check = 0xffff;
	}
	memcpy(l4 + 6, &check, 2);
	return vnet_len + (size_t)(l4 - frame) + 8;
}

size_t frame_ip_len(size_t template_len, int fragment)
{
	return template_len == TEMPLATE4_LEN ? 20 : fragment ? 48 : 40;
}

size_t frame_build_fragment(uint8_t *out, const uint8_t *template,
			    size_t template_len, size_t from, size_t len,
			    int more, uint32_t ident)
{
	uint8_t *ip = out + ETH_LEN;

	memcpy(out, template, template_len - 4);
	if (template_len == TEMPLATE4_LEN) {
		put16(ip + 4, (uint16_t)ident);
		put16(ip + 6, (uint16_t)((more ? 0x2000 : 0) | from / 8));
		put_ipv4_len(ip, 20 + len);
		return ETH_LEN + 20;
	}
	/* RFC 8200, section 4.5 */
	put16(ip + 4, (uint16_t)(8 + len));
	ip[40] = ip[6];
	ip[6] = PROTO_FRAGMENT;
	ip[41] = 0;
	put16(ip + 42, (uint16_t)(from | (more ? 1 : 0)));
	put32(ip + 44, ident);
	return ETH_LEN + 48;
}
