/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * frame_build.c: frames to the guest, put together.  Owns nothing, decides
 * nothing; compiles without Python.h.
 */
#include <stddef.h>

#include "csum.h"
#include "frame.h"

/* The complement of a folded sum, as it goes on the wire. */
static be16 check_of(uint64_t sum)
{
	return put_check((uint16_t)~csum_fold(sum));
}

/* Write the lengths of the IP header at FRAME + ETH_LEN for L4_LEN bytes behind
 * it; the checksum of an IPv4 header too.  Returns the sum of the pseudo header
 * for PROTO. */
static uint64_t put_ip(uint8_t *frame, int ipv4, size_t l4_len, uint8_t proto)
{
	const be32 tail[2] = { put32((uint32_t)l4_len), put32(proto) };
	uint64_t sum = csum_add(tail, sizeof(tail), 0);

	if (ipv4) {
		struct ipv4_header *ip = (void *)(frame + ETH_LEN);

		ip->total_len = put16((uint16_t)(sizeof(*ip) + l4_len));
		ip->check = put16(0);
		ip->check = check_of(csum_add(ip, sizeof(*ip), 0));
		return csum_add(ip->source, 2 * sizeof(ip->source), sum);
	}
	struct ipv6_header *ip = (void *)(frame + ETH_LEN);

	ip->payload_len = put16((uint16_t)l4_len);
	return csum_add(ip->source, 2 * sizeof(ip->source), sum);
}

/* Write the virtio header (5.1.6.2): the receiver completes the checksum at
 * CHECK in the layer 4 header at L4_AT of HEADER bytes, and cuts the payload
 * into pieces of GSO_SIZE; 0: it does not. */
static void put_vnet(uint8_t *out, size_t l4_at, size_t header, size_t check,
		     uint8_t gso_type, uint16_t gso_size)
{
	const struct vnet_header vnet = {
		.flags = VNET_F_NEEDS_CSUM,
		.gso_type = gso_size ? gso_type : VNET_GSO_NONE,
		.gso_size = gso_size,
		.hdr_len = gso_size ? (uint16_t)(l4_at + header) : 0,
		.csum_start = (uint16_t)l4_at,
		.csum_offset = (uint16_t)check,
	};

	memcpy(out, &vnet, sizeof(vnet));
}

size_t frame_headers_len(size_t template_len, size_t options_len)
{
	if (template_len != TEMPLATE4_LEN && template_len != TEMPLATE6_LEN)
		return 0;
	return template_len - PORTS_LEN + sizeof(struct tcp_header) +
	       options_len;
}

size_t frame_build(uint8_t *out, const uint8_t *template, size_t template_len,
		   const struct tcp_fields *fields, size_t payload_len,
		   uint64_t payload_sum, uint16_t mss, int offload)
{
	size_t vnet_len = offload ? VNET_HDR_LEN : 0;
	size_t header = sizeof(struct tcp_header) + fields->options_len;
	size_t l4_at = template_len - PORTS_LEN;
	int ipv4 = template_len == TEMPLATE4_LEN;
	uint8_t *frame = out + vnet_len;
	struct tcp_header *tcp = (void *)(frame + l4_at);
	uint64_t sum;

	memcpy(frame, template, template_len);
	sum = put_ip(frame, ipv4, header + payload_len, PROTO_TCP);
	tcp->seq = put32(fields->seq);
	tcp->ack = put32(fields->ack);
	tcp->data_offset = (uint8_t)(header / 4 << 4);
	tcp->flags = fields->flags;
	tcp->window = put16(fields->window);
	tcp->check = tcp->urgent = put16(0);
	if (fields->options_len)
		memcpy(tcp + 1, fields->options, fields->options_len);

	if (offload) {
		/* The field holds the sum of the pseudo header */
		tcp->check = put_check(csum_fold(sum));
		put_vnet(out, l4_at, header, offsetof(struct tcp_header, check),
			 ipv4 ? VNET_GSO_TCPV4 : VNET_GSO_TCPV6,
			 payload_len > mss ? mss : 0);
	} else {
		sum = csum_add(tcp, header, sum) + csum_fold(payload_sum);
		tcp->check = check_of(sum);
	}
	return vnet_len + l4_at + header;
}

/* The checksum of a datagram, never 0: that would say that there is none
 * (RFC 768). */
static be16 udp_check_of(uint64_t sum)
{
	uint16_t check = (uint16_t)~csum_fold(sum);

	return put_check(check ? check : 0xffff);
}

void frame_put_udp_check(const uint8_t *template, size_t template_len,
			 struct udp_header *udp, size_t len)
{
	uint8_t headers[TEMPLATE6_LEN];

	memcpy(headers, template, template_len);
	udp->check = put16(0);
	udp->check = udp_check_of(csum_add(
		udp, len,
		put_ip(headers, template_len == TEMPLATE4_LEN, len,
		       PROTO_UDP)));
}

size_t frame_build_udp(uint8_t *out, const uint8_t *template,
		       size_t template_len, size_t payload_len,
		       uint64_t payload_sum, uint16_t gso_size, int offload)
{
	size_t vnet_len = offload ? VNET_HDR_LEN : 0;
	size_t l4_at = template_len - PORTS_LEN;
	uint8_t *frame = out + vnet_len;
	struct udp_header *udp = (void *)(frame + l4_at);
	size_t l4_len = sizeof(*udp) + payload_len;
	uint64_t sum;

	memcpy(frame, template, template_len);
	sum = put_ip(frame, template_len == TEMPLATE4_LEN, l4_len, PROTO_UDP);
	udp->len = put16((uint16_t)l4_len);
	udp->check = put16(0);
	if (offload) {
		udp->check = put_check(csum_fold(sum));
		put_vnet(out, l4_at, sizeof(*udp),
			 offsetof(struct udp_header, check), VNET_GSO_UDP_L4,
			 gso_size);
	} else {
		udp->check = udp_check_of(csum_add(udp, sizeof(*udp), sum) +
					  csum_fold(payload_sum));
	}
	return vnet_len + l4_at + sizeof(*udp);
}

size_t frame_ip_len(size_t template_len, int fragment)
{
	if (template_len == TEMPLATE4_LEN)
		return sizeof(struct ipv4_header);
	return sizeof(struct ipv6_header) +
	       (fragment ? sizeof(struct ipv6_fragment_header) : 0);
}

size_t frame_build_fragment(uint8_t *out, const uint8_t *template,
			    size_t template_len, size_t from, size_t len,
			    int more, uint32_t ident)
{
	memcpy(out, template, template_len - PORTS_LEN);
	if (template_len == TEMPLATE4_LEN) {
		struct ipv4_header *ip = (void *)(out + ETH_LEN);

		ip->ident = put16((uint16_t)ident);
		ip->fragment = put16((uint16_t)(
			(more ? IPV4_MORE_FRAGMENTS : 0) | from / 8));
		put_ip(out, 1, len, ip->protocol);
		return ETH_LEN + sizeof(*ip);
	}
	/* RFC 8200, section 4.5 */
	struct ipv6_header *ip = (void *)(out + ETH_LEN);
	struct ipv6_fragment_header *fragment = (void *)(ip + 1);

	*fragment = (struct ipv6_fragment_header){
		.next_header = ip->next_header,
		.offset_more = put16((uint16_t)(
			from | (more ? IPV6_MORE_FRAGMENTS : 0))),
		.ident = put32(ident),
	};
	ip->next_header = PROTO_FRAGMENT;
	ip->payload_len = put16((uint16_t)(sizeof(*fragment) + len));
	return ETH_LEN + sizeof(*ip) + sizeof(*fragment);
}
